"""Count correct predictions on clean and corrupted images. Counts are saved to a file, so evaluations resume."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from pixmim.data.dataset import ImageDataset
from pixmim.evaluation.classifiers import ImageClassifier
from pixmim.evaluation.context import EvalContext, describe_labels, read_batches
from pixmim.evaluation.robustness.corruptions import VERSION, corrupt
from pixmim.transforms.crops import Crop
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_json, write_text_atomically
from pixmim.utils.threads import ThreadPool

Variant = tuple[str, int]  # a corruption and its severity

CLEAN: Variant = ("clean", 0)


@dataclass(frozen=True)
class LabeledImages:
    """Images to classify."""

    data: ImageDataset
    labels: Int[Tensor, " n"]  # label of each image, as an index into `classes`
    classes: list[str]
    outputs: list[int] | None = None  # output of the classifier for each class; None: its outputs are the classes


class CountsFile:
    """Counts by name, in a JSON file."""

    def __init__(self, folder: Path, console: Console | None) -> None:
        self.folder, self._path, self._console = folder, folder / "counts.json", console
        content: Any = {}
        if self._path.exists():
            content = None
            with suppress(UserError):
                content = read_json(self._path)
        if not isinstance(content, dict):
            self._warn("is not a JSON object")
        self._counts: dict[str, Any] = content if isinstance(content, dict) else {}

    def load(self, key: str, length: int, maximum: int) -> list[int]:
        """Return `length` saved counts in [0, maximum]; zeros if nothing is saved."""
        counts = self._counts.get(key)
        if counts is None:
            return [0] * length
        valid = isinstance(counts, list) and len(counts) == length
        if valid and all(type(count) is int and 0 <= count <= maximum for count in counts):
            return list(counts)
        self._warn("contains impossible counts")
        return [0] * length

    def save(self, key: str, counts: list[int]) -> None:
        """Save counts, replacing older ones."""
        self._counts[key] = counts
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._path, json.dumps(self._counts))

    def _warn(self, problem: str) -> None:
        print_plain(self._console, f"warning: {self._path} {problem}: restarting this part")


def count_correct(
    context: EvalContext,
    images: LabeledImages,
    classifier: ImageClassifier,
    crop: Crop,
    file: CountsFile,
    variants: Sequence[Variant] = (CLEAN,),
    seed: int = 0,
) -> tuple[Int[Tensor, "v k"], Int[Tensor, " k"]]:
    """Count correct predictions by variant and class, and readable images by class; saved after each batch."""
    data, classes = images.data, len(images.classes)
    key = f"version {VERSION}, {len(variants)} variants: {describe_labels(data)}"
    first, *counts = file.load(key, 1 + (1 + len(variants)) * classes, len(data))
    total, *correct = torch.tensor(counts).view(-1, classes)
    skipped, title = context.skipped(data), f"{len(variants)} variants of"
    with ThreadPool(0, "pixmim-corrupt") as pool:
        for batch, indices, end in read_batches(data, crop, skipped, title, context.console, first=first):
            labels = images.labels[indices]
            for count, x in zip(correct, corrupted(batch, indices.tolist(), variants, seed, pool), strict=True):
                hits = labels[classifier.predict(x, images.outputs) == labels]
                count += torch.bincount(hits, minlength=classes)
            total += torch.bincount(labels, minlength=classes)
            if len(variants) > 1 or end == len(data):  # each of ImageNet-C's 75 parts takes only seconds
                file.save(key, [end, *torch.stack([total, *correct]).flatten().tolist()])
    return torch.stack(correct), total


def corrupted(
    images: Tensor, indices: list[int], variants: Sequence[Variant], seed: int, pool: Executor
) -> Iterator[Tensor]:
    """Yield each variant of a batch, while threads compute the next one."""

    def start(variant: Variant) -> list[Future[Tensor]]:
        if variant == CLEAN:
            return []
        pairs = zip(images, indices, strict=True)
        return [pool.submit(corrupt, image, *variant, seed=seed, index=index) for image, index in pairs]

    started = map(start, variants)
    upcoming = next(started, [])
    for _ in variants:
        futures, upcoming = upcoming, next(started, [])
        yield torch.stack([future.result() for future in futures]) if futures else images
