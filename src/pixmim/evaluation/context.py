"""What an evaluation works with: the encoder, features that are computed once, and a place for its files."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from rich.console import Console

from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset
from pixmim.evaluation.features import FeatureSet, bad_image_log, check_finite, extract_features
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint
from pixmim.utils.console import print_plain
from pixmim.utils.trust import inside

T = TypeVar("T")

Values = Iterator[tuple[str, float]]
"""What an evaluation yields: named numbers, shares in per cent."""


@dataclass
class EvalContext:
    """The encoder to evaluate. An evaluation is a function of an EvalContext and its settings that yields Values.

    folder    where results, pictures, and unfinished work that can be gone on with, are kept
    which     "trained", or "untrained" for the weights that a run began with
    overwrite  whether the user has said that a classifier with other settings may be replaced (--overwrite)
    pictures  what an evaluation drew, by caption: saved beside its result, and shown in the report
    """

    encoder: FrozenEncoder
    folder: Path
    encoder_state: str = "trained"
    console: Console | None = None
    overwrite: bool = False
    images: dict[str, Image.Image] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def data(self, spec: str) -> ImageDataset:
        """A data set, read in the encoder's form. Raises UserError."""
        return open_dataset(spec, self.encoder.image_spec)

    def skipped(self, data: ImageDataset) -> BadImageLog:
        """The account of images that cannot be read, of a data set that is evaluated on."""
        return bad_image_log(data, self.folder / "evaluations-skipped.csv")

    def features(self, spec: str) -> FeatureSet:
        """The features of a labeled data set, computed the first time they are asked for. Raises UserError."""

        def make() -> FeatureSet:
            data = self.data(spec)
            skipped = self.skipped(data)
            found = extract_features(self.encoder, data, skipped, console=self.console)
            if len(skipped) and self.console is not None:
                print_plain(
                    self.console,
                    f"{len(skipped):,} of the {len(data):,} images of {spec} are left out: {skipped.reasons}",
                )
            check_finite(found.mean, f"features of {spec}")
            return found

        return self.cached(("features", spec), make)

    def cached(self, what: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What several evaluations of one call need, made the first time it is asked for."""
        if what not in self._made:
            self._made[what] = make()
        found: T = self._made[what]
        return found

    def work_dir(self, name: str, settings: Any) -> Path:
        """A folder for the unfinished work of an evaluation with these settings, to be gone on with next time."""
        key = sha256(repr((self.encoder_state, fingerprint(self.encoder), settings)).encode()).hexdigest()[:12]
        return inside(self.folder, f"unfinished/{name}-{self.encoder_state}-{key}")


def discard(work: Path) -> None:
    """Remove the folder of work that is finished, and the one above it if that is empty then."""
    shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        work.parent.rmdir()
