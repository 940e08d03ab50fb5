"""The map: every image of an index as a point, shown by embedding-atlas (https://github.com/apple/embedding-atlas)."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pixmim.config import ModelConfig
from pixmim.data.dataset import ImageDataset
from pixmim.evaluation.embed import file_columns, import_parquet, project, thumbnail_column
from pixmim.evaluation.neighbors import Index
from pixmim.utils.console import utf8
from pixmim.utils.errors import UserError
from pixmim.viewer.index import Job

_TIMEOUT = 600  # seconds


@dataclass
class Atlas(Job):
    """The files of embedding-atlas's page for one index, in a temporary folder."""

    _folder: "TemporaryDirectory[str]" = field(default_factory=lambda: TemporaryDirectory(prefix="pixmim-map-"))

    @property
    def folder(self) -> Path:
        """Folder of the page, with an index.html once the state is "ready"."""
        return Path(self._folder.name, "page")

    def start(self, index: Index, data: ImageDataset, config: ModelConfig) -> None:
        """Start to write the page in a thread, unless it is written or in progress."""

        def write() -> None:
            table = Path(self._folder.name, "images.parquet")
            write_table(table, index, data, config)
            export_page(table, self.folder)

        self.start_work(write)


def write_table(out: Path, index: Index, data: ImageDataset, config: ModelConfig) -> None:
    """Write file, class, projection and thumbnail of each image as .parquet.

    Raises:
        UserError: Without the extra.
        BadImage: If an image cannot be read any more.
    """
    x, y = project(index.unit.numpy()).T  # names the extra if it is missing
    arrow, parquet = import_parquet()
    numbers = index.indices.tolist()
    columns: dict[str, Any] = {k: [utf8(name) for name in names] for k, names in file_columns(data, numbers).items()}
    columns |= {"x": x, "y": y, "thumbnail": thumbnail_column(data, numbers, config)}
    parquet.write_table(arrow.table(columns), out)


def export_page(table: Path, folder: Path) -> None:
    """Write embedding-atlas's page for a table of `write_table`. Raises UserError if it is missing or fails."""
    columns = ", ".join(import_parquet()[1].read_schema(table).names)  # without embedding-atlas's own, the table's path
    command = [sys.executable, "-P", "-m", "embedding_atlas.cli", str(table)]  # -P: import nothing from this folder
    command += ["--x", "x", "--y", "y", "--image", "thumbnail", "--pagerank", "", "--export-application", str(folder)]
    command += ["--query", f"SELECT {columns} FROM data"]
    options: Any = {"capture_output": True, "text": True, "timeout": _TIMEOUT, "stdin": subprocess.DEVNULL}
    try:
        subprocess.run(command, check=True, cwd=table.parent, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **options)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"embedding-atlas did not answer within {_TIMEOUT} s") from error
    except subprocess.CalledProcessError as error:
        if "No module named" in error.stderr:
            raise UserError("the map needs embedding-atlas: pip install 'pixmim[map]'") from error
        raise UserError(f"embedding-atlas failed: {(error.stderr.strip().splitlines() or ['?'])[-1]}") from error
