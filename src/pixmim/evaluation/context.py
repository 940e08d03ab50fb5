"""Context of an evaluation: the encoder, datasets, features that are computed once, and the folder for its files."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image
from rich.console import Console
from torch import Tensor

from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import iterate_in_order
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint
from pixmim.models import features
from pixmim.transforms.crops import Crop, evaluation_crop
from pixmim.utils.console import print_plain, progress
from pixmim.utils.errors import UserError
from pixmim.utils.trust import inside
from pixmim.utils.validation import MAX_DEPTH

S = TypeVar("S")
T = TypeVar("T")

Values = Iterator[tuple[str, float]]  # named results of an evaluation; shares are in per cent

BLOCKS = 4  # number of last blocks whose global tokens are features

SKIPPED_FILE = "evaluations-skipped.csv"  # in the folder of the results


@dataclass(frozen=True)
class FeatureSet:
    """Features of n images, float32 on the CPU."""

    # `Features.vector` of each of the last k blocks after the final norm (n k d), last block last
    vector: Float[Tensor, "n k d"]
    mean: Float[Tensor, "n d"]  # mean of the last block's patch tokens (n d)
    labels: Int[Tensor, " n"]  # class of each image (n)
    classes: list[str]
    indices: Int[np.ndarray, " n"] | None = None  # dataset index of each image (n); None if unknown
    vector_name: str = "cls"  # of `Features`
    groups: Int[np.ndarray, " n"] | None = None  # number of each image's group (n), if the dataset has any

    def select(self, rows: Int[np.ndarray, " r"]) -> "FeatureSet":
        """Return the features of some rows."""
        groups, labels = None if self.groups is None else self.groups[rows], self.labels[rows]
        return replace(self, vector=self.vector[rows], mean=self.mean[rows], labels=labels, indices=None, groups=groups)


@dataclass
class EvalContext:
    """The encoder to evaluate. An evaluation is a function of an EvalContext and its settings that yields Values."""

    encoder: FrozenEncoder
    folder: Path  # folder for results, images and unfinished work
    encoder_state: str = "trained"  # "trained", or "untrained" for the initial weights of a run
    console: Console | None = None  # where to print; None prints nothing
    overwrite: bool = False  # replace a classifier that was fine-tuned with other settings (--overwrite)
    # images drawn by an evaluation, by caption; saved with its result and shown in the report
    images: dict[str, Image.Image] = field(default_factory=dict)
    # datasets opened by any context that has this dictionary
    shared: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _logs: list[tuple[ImageDataset, BadImageLog]] = field(default_factory=list)

    def data(self, spec: str) -> ImageDataset:
        """Open a dataset in the encoder's image format, once for all contexts. Raises UserError."""
        return self.once_for_all(("data", spec), lambda: open_dataset(spec, self.encoder.image_spec))

    def skipped(self, data: ImageDataset) -> BadImageLog:
        """Return a log of unreadable images, for `print_skipped`. At most 25 % may be skipped."""
        log = bad_image_log(data, self.folder / SKIPPED_FILE)
        self._logs.append((data, log))
        return log

    def features(self, spec: str, blocks: tuple[int, ...] = ()) -> list[FeatureSet]:
        """Return the features of a labeled dataset as `extract_block_features`, computed once. Raises UserError."""

        def compute() -> list[FeatureSet]:
            data = self.data(spec)
            result = extract_block_features(self.encoder, data, blocks, self.skipped(data), console=self.console)
            for each in result:
                for values in (each.mean, each.vector):
                    check_finite(values, f"features of {data.spec}")
            return result

        return self.cached(("features", spec, blocks), compute)

    def print(self, line: str) -> None:
        """Print a line on the console, if there is one."""
        print_plain(self.console, line)

    def print_skipped(self) -> None:
        """Print how many images of each dataset were skipped since the last call, and why, if any were."""
        lines = dict.fromkeys(log.summary(data) for data, log in self._logs)
        self._logs.clear()
        for line in filter(None, lines):
            self.print(line)

    def cached(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """Return the cached result of `compute`, which several evaluations of this context use."""
        return _cached(self._cache, key, compute)

    def once_for_all(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """Return a cached result that depends on the data and the encoder's image format only."""
        return _cached(self.shared, (*key, self.encoder.image_spec), compute)

    def work_dir(self, name: str, settings: Any, truth: str) -> Path:
        """Return the folder for unfinished work of an evaluation, to resume from.

        `truth` describes the images with their labels, masks or boxes: see `describe_labels`.
        """
        parts = self.encoder_state, fingerprint(self.encoder), self.encoder.precision, settings, truth
        key = sha256(repr(parts).encode()).hexdigest()[:12]
        return inside(self.folder, f"unfinished/{name}-{self.encoder_state}-{key}")


def describe_labels(data: ImageDataset) -> str:
    """Return a text that differs if the images, their labels or the names of the classes do."""
    labels = sha256(b"" if data.labels is None else np.ascontiguousarray(data.labels, np.int64).tobytes()).hexdigest()
    return f"{data.spec} {data.fingerprint()} {len(data)} {labels[:16]} {data.classes}"


def checked_once(check: Callable[[EvalContext, S], T]) -> Callable[[EvalContext, S], T]:
    """Call a check once for equal settings of a context: evaluations use what their checks return."""

    @wraps(check)
    def cached(context: EvalContext, settings: S) -> T:
        return context.cached((check.__name__, repr(settings)), lambda: check(context, settings))

    return cached


def _cached(cache: dict[tuple[Any, ...], Any], key: tuple[Any, ...], compute: Callable[[], T]) -> T:
    if key not in cache:
        cache[key] = compute()
    value: T = cache[key]
    return value


def discard(work: Path) -> None:
    """Remove the folder of finished work, and its parent if that is empty."""
    shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        work.parent.rmdir()


def read_batches(
    data: ImageDataset,
    crop: Crop,
    skipped: BadImageLog,
    title: str,
    console: Console | None,
    batch: int = 256,
    first: int = 0,
) -> Iterator[tuple[Shaped[Tensor, "b c h w"], Int[np.ndarray, " b"], int]]:
    """Yield the readable images of each batch from index `first` on, their indices and the next index; show a bar."""
    with progress(f"{title} {data.spec}", len(data), console) as advance:
        advance(first)
        for images, indices, end in iterate_in_order(data, crop, skipped=skipped, batch=batch, first=first):
            if len(indices):
                yield images, indices, end
            advance(end)


def extract_features(encoder: FrozenEncoder, data: ImageDataset, **options: Any) -> FeatureSet:
    """Compute the features of a labeled dataset as `extract_block_features` does."""
    return extract_block_features(encoder, data, **options)[0]


def extract_block_features(
    encoder: FrozenEncoder,
    data: ImageDataset,
    blocks: Sequence[int] = (),
    skipped: BadImageLog | None = None,
    batch: int = 256,
    console: Console | None = None,
) -> list[FeatureSet]:
    """Compute the features of a labeled dataset: resize to 256/224 of the size, center crop, no augmentation.

    Each of the `blocks` (indices) gets features of its own, with k = 1, all from one pass; by default there is one set
    of features, with k = BLOCKS. Raises UserError if the data have no labels.
    """
    if data.labels is None:
        raise UserError(data.no_labels_message)
    if skipped is None:
        skipped = bad_image_log(data)
    encoder.check_batch(min(batch, len(data)))
    all_labels = torch.from_numpy(data.labels)  # once: some datasets compute them on each access
    vectors, means = ([list[Tensor]() for _ in blocks or [0]] for _ in range(2))
    read, crop, name = [], evaluation_crop(encoder.size), "cls"
    with encoder.evaluating():  # one autocast context casts weights once
        for images, indices, _ in read_batches(data, crop, skipped, "features of", console, batch):
            result = features(encoder.module, encoder.preprocess(images), MAX_DEPTH if blocks else BLOCKS)
            for i, each in enumerate(map(result.of_block, blocks) if blocks else [result]):
                vectors[i].append(each.vector.float().cpu())
                means[i].append(each.mean.float().cpu())
            read.append(indices)
            name = result.vector_name
    order = np.concatenate(read)
    labels, groups = all_labels[torch.from_numpy(order)], None if data.groups is None else data.groups[order]
    return [
        FeatureSet(torch.cat(vector), torch.cat(mean), labels, data.classes, order, name, groups)
        for vector, mean in zip(vectors, means, strict=True)
    ]


def bad_image_log(data: ImageDataset, path: Path | None = None) -> BadImageLog:
    """Return a log of unreadable images, saved to `path` if given. At most 25 % may be skipped, as in training."""
    allowed = PretrainConfig.max_bad_fraction
    return BadImageLog(path, len(data), allowed, "that an evaluation may leave out: mend or remove them")


def check_finite(values: Tensor, name: str) -> None:
    """Raise UserError if any value is not finite: the largest of such values would be arbitrary."""
    parts = values.flatten(1).split(2**16)  # features may fill half of the memory
    bad = sum(int((~torch.isfinite(part).all(dim=1)).sum()) for part in parts)
    if bad:
        raise UserError(f"the {name} are not finite for {bad:,} of {len(values):,} images: try --precision fp32")
