"""Images in a column of a Hugging Face data set, read straight from its Arrow table.

The table is memory-mapped and never changes, so any number of threads may read it. A row's bytes are copied out with
the GIL released: a page that is not in memory yet makes one thread wait, and not all of them.
"""

from __future__ import annotations

import re
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from pixmim.data.dataset import COLOUR, BadImage, Form, Source
from pixmim.data.decode.image import decode
from pixmim.data.decode.limits import check_bytes
from pixmim.data.huggingface.columns import cells, only_images, read_labels
from pixmim.transforms.crops import Array
from pixmim.utils.errors import UserError
from pixmim.utils.files import open_regular, read_file

if TYPE_CHECKING:
    from datasets import Dataset


_MOST_BYTES = 2**30  # of a picture file

_ZIPPED = re.compile(r"zip://([^:]+)::(.+)", re.DOTALL)


class Table(Source):
    """The images of a map-style `datasets.Dataset`, selected and shuffled as it may be.

    spec    what the user wrote to get it
    name    what stands before the row's number in messages
    image   column of pictures: the library's Image, bytes, a struct of bytes and path, or paths; by default the only
            column that holds pictures
    label   column of classes: ClassLabel, whole numbers, strings or booleans; by default the only ClassLabel
    folder  where paths without bytes begin, and what they stay below, links resolved
    roots   more folders that they may lead to
    address a URL that they may begin with: that of the data set itself on the hub; empty: no URL is opened

    Raises UserError for an empty data set, a column that is not there or cannot serve, and a choice left open.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: str,
        form: Form = COLOUR,
        *,
        name: str = "",
        image: str = "",
        label: str = "",
        folder: Path = Path(),
        roots: Sequence[Path] = (),
        address: str = "",
    ) -> None:
        if not len(dataset):
            raise UserError(f"{spec} holds no rows")
        self._name, self._folder, self._address = name or spec, folder, address
        self._roots = [root.resolve() for root in (folder, *roots)]
        indices = dataset._indices  # the rows left by a select or shuffle; there is no public name for them
        self._rows = None if indices is None else indices.column(0).to_numpy()
        self._length = len(dataset)
        column = image or only_images(dataset, spec)
        self._bytes, self._paths = cells(dataset, column, spec)
        self._starts = [0, *np.cumsum([len(chunk) for chunk in dataset.data.column(column).chunks]).tolist()]
        labels, classes, said = read_labels(dataset, label, self._rows, spec)
        super().__init__(spec, form, labels=labels, classes=classes, about=f"pictures from column '{column}', {said}")
        self._fingerprint = f"{dataset._fingerprint}-{column}"  # the library's own, of all rows and what was done

    def __len__(self) -> int:
        return self._length

    def locate(self, index: int) -> str:
        path = self._path(*self._find(index))
        return f"{self._name}#{index}" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        return self._fingerprint

    def read(self, index: int) -> bytes:
        """What is in a row's picture file. Raises BadImage."""
        return self._read(*self._find(index))

    def array(self, index: int) -> Shaped[Array, "h w c"]:
        return decode(self.read(index), self.form)

    def _find(self, index: int) -> tuple[int, int]:
        """The chunk of the table that holds a row, and the row in it."""
        row = index if self._rows is None else int(self._rows[index])
        chunk = bisect_right(self._starts, row) - 1
        return chunk, row - self._starts[chunk]

    def _read(self, chunk: int, row: int) -> bytes:
        import pyarrow

        if self._bytes and (cell := self._bytes[chunk][row]).is_valid:
            buffer = cell.as_buffer()
            check_bytes(buffer.size)
            return pyarrow.BufferReader(buffer).read()  # as_py() would copy while it holds the GIL
        path = self._path(chunk, row)
        if not path:
            raise BadImage("the row has neither bytes nor a path")
        try:
            data = self._file(path)
        except BadImage:
            raise
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        except Exception as error:  # of archives, file systems, and names that no file can have
            raise BadImage(f"{path}: {error}") from None
        check_bytes(len(data))
        return data

    def _file(self, path: str) -> bytes:
        """What is in the file that a row names. Raises BadImage for one that it may not name, and much else."""
        zipped = _ZIPPED.fullmatch(path)
        if zipped is not None:
            with open(open_regular(self._inside(zipped[2])), "rb") as file, zipfile.ZipFile(file) as archive:
                return archive.open(zipped[1]).read(_MOST_BYTES + 1)
        if self._address and re.match(re.escape(self._address) + "[@/]", path) and "::" not in path:
            import fsspec

            with fsspec.open(path, "rb") as remote:
                return bytes(remote.read(_MOST_BYTES + 1))
        return read_file(self._inside(path), _MOST_BYTES)

    def _inside(self, path: str) -> Path:
        """The whole path of a file, if that is below the folders. Raises BadImage."""
        if "://" in path:
            raise BadImage(f"{path}: paths in a table are those of files, without a protocol")
        real = (self._folder / path).resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            raise BadImage(f"{path} leads out of {self._roots[0]}: a spec with ,root=FOLDER allows it")
        return real

    def _path(self, chunk: int, row: int) -> str:
        return (self._paths[chunk][row].as_py() or "") if self._paths else ""
