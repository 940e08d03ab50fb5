"""Count right predictions on clean and corrupted images; the counts are kept in a file, to resume from."""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import iterate_in_order
from pixmim.evaluation.classifiers import ImageClassifier
from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.robustness.corruptions import VERSION, corrupt
from pixmim.transforms.crops import Crop
from pixmim.utils.console import print_plain, progress
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_json, write_text_atomically
from pixmim.utils.threads import ThreadPool

Variant = tuple[str, int]
"""A corruption and its severity."""

CLEAN: Variant = ("clean", 0)


class CountsFile:
    """Counts by name, in a JSON file."""

    def __init__(self, folder: Path, console: Console | None) -> None:
        self.folder, self._path, self._console = folder, folder / "counts.json", console or Console(quiet=True)
        self._counts: dict[str, Any] = {}
        if self._path.exists():
            try:
                content = read_json(self._path)
            except UserError:
                content = None
            if isinstance(content, dict):
                self._counts = content
            else:
                self._warn("is not a JSON object")

    def load(self, key: str, length: int, most: int) -> list[int]:
        """Return `length` counts from 0 to `most` each; zeros if none are kept."""
        counts = self._counts.get(key)
        if counts is None:
            return [0] * length
        valid = isinstance(counts, list) and len(counts) == length
        if valid and all(type(count) is int and 0 <= count <= most for count in counts):
            return list(counts)
        self._warn("contains impossible counts")
        return [0] * length

    def save(self, key: str, counts: list[int]) -> None:
        """Keep counts, in place of older ones."""
        self._counts[key] = counts
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._path, json.dumps(self._counts))

    def _warn(self, problem: str) -> None:
        print_plain(self._console, f"warning: {self._path} {problem}: that part is measured again")


def count_correct(
    context: EvalContext,
    data: ImageDataset,
    crop: Crop,
    classifier: ImageClassifier,
    labels: Int[Tensor, " n"],
    classes: int,
    file: CountsFile,
    *,
    among: Sequence[int] | None = None,
    variants: Sequence[Variant] = (CLEAN,),
    seed: int = 0,
) -> tuple[Int[Tensor, "v k"], Int[Tensor, " k"]]:
    """Count the images of each class that are classified right, for each variant, and all that could be read.

    Images are read once for all variants; counts are kept after each batch.

    Args:
        context: The context.
        data: The images.
        crop: Crop of each image.
        classifier: Predicts the classes.
        labels: Label of each image.
        classes: Number of classes.
        file: Where counts are kept.
        among: The outputs that compete; None: all.
        variants: Corruptions, or CLEAN.
        seed: Seed of the corruptions.

    Raises:
        UserError: If no image can be read.
    """
    key = f"version {VERSION}, {len(variants)} variants: {data.spec} {data.fingerprint()}"
    first, *counts = file.load(key, 1 + (1 + len(variants)) * classes, len(data))
    total, *right = torch.tensor(counts).view(-1, classes)
    with (
        progress(f"{len(variants)} variants of {data.spec}", len(data), context.console) as advance,
        ThreadPool(0, "pixmim-corrupt") as pool,
    ):
        for images, indices, end in iterate_in_order(data, crop, skipped=context.skipped(data), batch=256, first=first):
            if len(indices):
                wanted = labels[indices]
                for count, changed in zip(
                    right, corrupted(images, indices.tolist(), variants, seed, pool), strict=True
                ):
                    answers = classifier.predict(changed, among)
                    count += torch.bincount(wanted[answers == wanted], minlength=classes)
                total += torch.bincount(wanted, minlength=classes)
            if len(variants) > 1 or end == len(data):  # a stored set has up to 75 parts, each of few seconds
                file.save(key, [end, *torch.stack([total, *right]).flatten().tolist()])
            advance(end)
    if not bool(total.any()):
        raise UserError(f"no image of {data.spec} can be read")
    return torch.stack(right), total


def corrupted(
    images: Tensor, indices: list[int], variants: Sequence[Variant], seed: int, pool: Executor
) -> Iterator[Tensor]:
    """Yield each variant of a batch; the next one is computed by threads meanwhile."""

    def start(variant: Variant) -> list[Future[Tensor]]:
        if variant == CLEAN:
            return []
        make = partial(_corrupt_one, variant=variant, seed=seed)
        return [pool.submit(make, image, index) for image, index in zip(images, indices, strict=True)]

    pending: deque[list[Future[Tensor]]] = deque()
    for variant in [*variants, None]:
        if variant is not None:
            pending.append(start(variant))
        if len(pending) > (variant is not None):
            parts = pending.popleft()
            yield torch.stack([part.result() for part in parts]) if parts else images


def _corrupt_one(image: Tensor, index: int, *, variant: Variant, seed: int) -> Tensor:
    return corrupt(image, *variant, seed=seed, index=index)
