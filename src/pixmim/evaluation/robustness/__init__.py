"""What corruption costs: ImageNet-C, -A, -R and -Sketch as published, and corruptions made in memory on any images.

ImageNet-C: arXiv 1903.12261. -A: 1907.07174. -R: 2006.16241. -Sketch: 1905.13549.
"""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pixmim.data.dataset import Source
from pixmim.data.loader import iterate_in_order
from pixmim.evaluation import imagenet_classes as imagenet
from pixmim.evaluation.classification import check_classes, majority, open_labelled, rated, tally
from pixmim.evaluation.classifiers import Judge, imagenet_head, labels_among, own_head, probe
from pixmim.evaluation.context import Bench, Values, discard
from pixmim.evaluation.metrics import corruption_errors, wilson_interval
from pixmim.evaluation.robustness.corruptions import CORRUPTIONS, SEVERITIES, VERSION, check_channels, corrupt
from pixmim.evaluation.settings import Robustness
from pixmim.transforms.crops import CentreCrop, Crop, evaluation_crop
from pixmim.utils.console import say
from pixmim.utils.errors import UserError, nearest
from pixmim.utils.files import read_json, write_whole
from pixmim.utils.progress import progress
from pixmim.utils.threads import workers

T = TypeVar("T")

Variant = tuple[str, int]
"""A corruption and its severity."""

_CLEAN: Variant = ("clean", 0)


def measure(bench: Bench, settings: Robustness) -> Values:
    """Everything whose data are given. What is done is kept, so that the same call goes on. Raises UserError."""
    check(bench, settings)
    corruptions, severities = _chosen(settings)
    notes = _Notes(bench.work("robustness", settings), bench.console)
    if settings.imagenet_c:
        yield from _imagenet_c(bench, settings.imagenet_c, corruptions, severities, notes)
    for name, folder in _relatives(settings).items():
        yield from _relative(bench, name, folder, notes)
    if settings.test:
        yield from _in_memory(bench, settings, corruptions, severities, notes)
    discard(notes.folder)


def check(bench: Bench, settings: Robustness) -> None:
    """Raise UserError now for data, settings or an encoder that `measure` would refuse. Fits nothing.

    Of ImageNet-C it looks for the folders, and lists no images.
    """

    def make() -> None:
        corruptions, severities = _chosen(settings)
        relatives = _relatives(settings)
        if not (settings.imagenet_c or settings.test or relatives):
            raise UserError("no data given: robustness needs --test, --imagenet-c, --imagenet-a, -r or -sketch")
        if settings.imagenet_c:
            _parts(bench, settings.imagenet_c, corruptions, severities)
        for name, folder in relatives.items():
            _opened(bench, name, folder)
        if settings.test:
            _check_form(bench)
            data = bench.data(settings.test)
            if _kind(bench, data, settings) == "probe":
                open_labelled(bench, settings.train, settings.test)
            else:
                _own(bench, data)

    bench.once(("robustness", repr(settings)), make)


def _relatives(settings: Robustness) -> dict[str, str]:
    """Folders of ImageNet-A, -R and -Sketch, of those that are given."""
    given = {"a": settings.imagenet_a, "r": settings.imagenet_r, "sketch": settings.imagenet_sketch}
    return {name: folder for name, folder in given.items() if folder}


def _chosen(settings: Robustness) -> tuple[list[str], list[int]]:
    for name in settings.corruptions:
        if name not in CORRUPTIONS:
            known = ", ".join(CORRUPTIONS)
            raise UserError(f"there is no corruption '{name}'{nearest(name, CORRUPTIONS)} Known: {known}")
    if not settings.severities:
        raise UserError("--severities takes some of 1, 2, 3, 4 and 5")
    wanted = [name for name in CORRUPTIONS if name in (settings.corruptions or CORRUPTIONS)]
    return wanted, sorted(set(settings.severities))


def _imagenet_c(bench: Bench, folder: str, corruptions: list[str], severities: list[int], notes: "_Notes") -> Values:
    """CE and mCE of the stored pictures, the whole picture at the encoder's size (CenterCrop(224) and no resize).

    The errors are always given. CE needs five severities and all thousand classes, since AlexNet's were measured so;
    mCE needs all 15 corruptions as well.
    """
    judge, root = _parts(bench, folder, corruptions, severities)
    errors: dict[str, list[float]] = {name: [] for name in corruptions}
    counts, whole = torch.zeros(2, len(judge.classes), dtype=torch.int64), True
    for name in corruptions:
        for severity in severities:
            data = bench.data(str(root / name / str(severity)))
            labels = labels_among(data, judge.classes)
            whole = whole and len(data.classes) == len(judge.classes)
            found = _count(bench, data, CentreCrop(bench.encoder.size), judge, labels, None, notes, judge.classes)
            errors[name].append(1 - float(found[0].sum() / found[1].sum()))
            counts += found
            yield f"imagenet_c/severity/{name}/{severity}", 100 * errors[name][-1]
    yield from _classes(counts, judge.classes, "imagenet_c/")
    means = {name: sum(each) / len(each) for name, each in errors.items()}
    yield "imagenet_c/error", 100 * sum(means.values()) / len(means)
    for name, mean in means.items():
        yield f"imagenet_c/corruption/{name}", 100 * mean
    if whole and severities == list(SEVERITIES):
        ces, mce = corruption_errors(errors)
        for name, ce in ces.items():
            yield f"imagenet_c/ce/{name}", ce
        if mce is not None:
            yield "imagenet_c/mce", mce


def _parts(bench: Bench, folder: str, corruptions: list[str], severities: list[int]) -> tuple[Judge, Path]:
    """Return the classifier and the root of ImageNet-C. Raises UserError for a part that is missing."""
    judge = imagenet_head(bench, "ImageNet-C")
    root = Path(folder).expanduser()
    missing = [f"{c}/{s}" for c in corruptions for s in severities if not (root / c / str(s)).is_dir()]
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(corruptions) * len(severities)} parts of ImageNet-C: {some}. "
            "--corruptions and --severities measure a part; there is no mCE of a part"
        )
    return judge, root


def _relative(bench: Bench, name: str, folder: str, notes: "_Notes") -> Values:
    """Top-1 on ImageNet-A, -R or -Sketch, at the evaluation crop; of A and R only the 200 outputs compete."""
    judge, own, data, labels = _opened(bench, name, folder)
    among = [judge.classes.index(wnid) for wnid in own]
    counts = _count(bench, data, evaluation_crop(bench.encoder.size), judge, labels, among, notes, own)
    yield from rated(counts, own, f"imagenet_{name}/")
    yield f"imagenet_{name}/majority", majority(counts)


def _opened(bench: Bench, name: str, folder: str) -> tuple[Judge, list[str], Source, Tensor]:
    """Return the classifier, the classes, the data and their labels. Raises UserError."""
    title = f"ImageNet-{name.upper() if len(name) == 1 else name.title()}"
    judge = imagenet_head(bench, title)
    own = judge.classes if name == "sketch" else imagenet.part(name)
    data = bench.data(folder)
    labels = labels_among(data, own)
    lacks = [wnid for wnid in own if wnid not in data.classes]
    if lacks:
        raise UserError(f"{folder} lacks {len(lacks)} of {title}'s {len(own)} class folders: {', '.join(lacks[:5])}")
    return judge, own, data, labels


def _classes(counts: Tensor, names: list[str], key: str) -> Values:
    """The error when each class counts the same, the recall of each, and the share of the largest, in per cent."""
    for name, value in rated(counts, names, key):
        if name == f"{key}balanced":
            yield name, 100 - value
        elif not name.startswith(f"{key}top1"):
            yield name, value
    yield f"{key}majority", majority(counts)


def _in_memory(
    bench: Bench, settings: Robustness, corruptions: list[str], severities: list[int], notes: "_Notes"
) -> Values:
    """Errors on pictures that are corrupted after the evaluation crop, and on clean ones, in per cent.

    Yields, under in_memory/head or in_memory/probe: clean; corruption/NAME, the mean over the severities; error, the
    mean of those; lost, error minus clean, in points; times, error over clean; severity/NAME/SEVERITY.
    """
    _check_form(bench)
    data = bench.data(settings.test)
    judge, labels, among, names = _judge(bench, data, settings)
    variants = [_CLEAN, *((name, severity) for name in corruptions for severity in severities)]
    right, total = _count_corrupted(bench, data, judge, labels, among, variants, settings.seed, notes, len(names))
    images = int(total.sum())
    errors = {variant: 100 * (1 - int(right[variant].sum()) / images) for variant in variants}
    clean = errors[_CLEAN]
    means = {name: sum(errors[name, s] for s in severities) / len(severities) for name in corruptions}
    error = sum(means.values()) / len(means)
    key = f"in_memory/{judge.kind}"
    low, high = wilson_interval(images - int(right[_CLEAN].sum()), images)
    yield f"{key}/clean", clean
    yield f"{key}/clean/low", 100 * low
    yield f"{key}/clean/high", 100 * high
    corrupted = torch.stack([torch.stack([right[v] for v in variants[1:]]).sum(dim=0), total * (len(variants) - 1)])
    yield from _classes(torch.stack([right[_CLEAN], total]), names, f"{key}/clean/")
    yield from _classes(corrupted, names, f"{key}/corrupted/")
    yield f"{key}/error", error
    yield f"{key}/lost", error - clean
    yield f"{key}/times", error / clean if clean else float("inf")
    for name, mean in means.items():
        yield f"{key}/corruption/{name}", mean
    for name, severity in variants[1:]:
        yield f"{key}/severity/{name}/{severity}", errors[name, severity]


def _check_form(bench: Bench) -> None:
    form = bench.encoder.form
    check_channels(form.channels)
    if form.pixels != "uint8":
        raise UserError(f"the corruptions are made for pictures of 8 bits, and this encoder reads {form.pixels}")


def _kind(bench: Bench, data: Source, settings: Robustness) -> str:
    """Whether the encoder's own classifier ("head") or a probe classifies the test data. Raises UserError."""
    kind = settings.classifier
    if kind == "auto":
        kind = "head" if _named(bench, data) or not settings.train else "probe"
    if kind == "probe" and not settings.train:
        raise UserError("a probe needs labelled clean data to be fitted to: --train")
    return kind


def _named(bench: Bench, data: Source) -> bool:
    """Whether the encoder's own classifier has all classes of the data by name."""
    own = own_head(bench)
    return bool(own.classes) and set(data.classes) <= set(own.classes)


def _judge(bench: Bench, data: Source, settings: Robustness) -> tuple[Judge, Tensor, list[int] | None, list[str]]:
    """Who classifies the test data, their labels, its outputs that compete (None: all), and the labels' names."""
    if _kind(bench, data, settings) == "probe":
        found = open_labelled(bench, settings.train, settings.test)
        return (
            probe(bench, settings.train, epochs=settings.epochs, seed=settings.seed),
            found.wanted,
            None,
            found.classes,
        )
    labels, line = _own(bench, data)
    own, console = own_head(bench), bench.console or Console(quiet=True)
    say(console, f"test data: {line}")
    if _named(bench, data):
        if len(data.classes) < len(own.classes):
            say(console, f"of the classifier's {len(own.classes):,} outputs only those of these classes compete")
        return own, labels, [own.classes.index(name) for name in data.classes], data.classes
    say(console, "warning: the classifier does not name its classes: its outputs are taken for these in sorted order")
    return own, labels, None, data.classes


def _own(bench: Bench, data: Source) -> tuple[Tensor, str]:
    """Return the labels of data that the encoder's own classifier answers to, and a line about their classes.

    Raises UserError if it does not know their classes.
    """
    line = check_classes(data)
    if not _named(bench, data):
        if bench.encoder.names:
            labels_among(data, own_head(bench).classes)  # names what is missing
        if bench.encoder.classes != len(data.classes):
            has = f"a classifier of {bench.encoder.classes}" if bench.encoder.classes else "no classifier"
            raise UserError(
                f"{data.spec} has {len(data.classes)} classes, and this encoder has {has}: give --train, labelled data "
                "of the same classes that a probe is fitted to"
            )
    return torch.from_numpy(cast(np.ndarray, data.labels)), line


def _count(
    bench: Bench,
    data: Source,
    crop: Crop,
    judge: Judge,
    labels: Tensor,
    among: list[int] | None,
    notes: "_Notes",
    names: list[str],
) -> Tensor:
    """Pictures of each class that are classified rightly, and that could be read (2 k). Raises UserError if none could.

    names  of the labels
    """
    key, shape = f"{data.spec} {data.fingerprint()}", (2, len(names))
    kept = notes.counts(key, 2 * len(names), len(data))
    if kept is not None:
        return torch.tensor(kept).view(shape)
    counts = torch.zeros(shape, dtype=torch.int64)
    with progress(data.spec, len(data), bench.console) as advance:
        for images, indices, end in iterate_in_order(data, crop, skipped=bench.skipped(data), batch=256):
            if len(indices):
                counts += tally(judge.answers(images, among), labels[indices], len(names))
            advance(end)
    if not bool(counts[1].any()):
        raise UserError(f"not one picture of {data.spec} can be read")
    notes.keep(key, counts.flatten().tolist())
    return counts


def _count_corrupted(
    bench: Bench,
    data: Source,
    judge: Judge,
    labels: Tensor,
    among: list[int] | None,
    variants: list[Variant],
    seed: int,
    notes: "_Notes",
    classes: int,
) -> tuple[dict[Variant, Tensor], Tensor]:
    """The same for each variant of every picture. Pictures are read once; what is done is kept batch by batch."""
    key = f"in memory, version {VERSION}: {data.spec} {data.fingerprint()}"
    crop, kept = evaluation_crop(bench.encoder.size), 1 + (1 + len(variants)) * classes
    first, *flat = notes.counts(key, kept, len(data)) or [0] * kept
    total, *rows = torch.tensor(flat).view(-1, classes)
    right = dict(zip(variants, rows, strict=True))
    with (
        progress(f"{len(variants) - 1} corruptions of {data.spec}", len(data), bench.console) as advance,
        workers(0, "pixmim-corrupt") as pool,
    ):
        for images, indices, end in iterate_in_order(data, crop, skipped=bench.skipped(data), batch=256, first=first):
            if len(indices):
                wanted = labels[indices]
                for variant, changed in _made(images, indices.tolist(), variants, seed, pool):
                    right[variant] += tally(judge.answers(changed, among), wanted, classes)[0]
                total += torch.bincount(wanted, minlength=classes)
            notes.keep(key, [end, *torch.stack([total, *rows]).flatten().tolist()])
            advance(end)
    if not bool(total.any()):
        raise UserError(f"not one picture of {data.spec} can be read")
    return right, total


def _made(
    images: Tensor, indices: list[int], variants: list[Variant], seed: int, pool: Executor
) -> Iterator[tuple[Variant, Tensor]]:
    """Each variant of a batch, made by threads while the one before is looked at."""

    def start(variant: Variant) -> tuple[Variant, list[Future[Tensor]]]:
        if variant == _CLEAN:
            return variant, []
        make = partial(_one, variant=variant, seed=seed)
        return variant, [pool.submit(make, image, index) for image, index in zip(images, indices, strict=True)]

    ahead: deque[tuple[Variant, list[Future[Tensor]]]] = deque()
    for variant in variants:
        ahead.append(start(variant))
        if len(ahead) > 1:
            done, parts = ahead.popleft()
            yield done, torch.stack([part.result() for part in parts]) if parts else images
    for done, parts in ahead:
        yield done, torch.stack([part.result() for part in parts]) if parts else images


def _one(image: Tensor, index: int, *, variant: Variant, seed: int) -> Tensor:
    return corrupt(image, *variant, seed=seed, index=index)


class _Notes:
    """Counts of what is done, in a file, so that an interrupted evaluation goes on."""

    def __init__(self, folder: Path, console: Console | None) -> None:
        self.folder, self._path, self._console = folder, folder / "counts.json", console or Console(quiet=True)
        self._done: dict[str, Any] = {}
        if self._path.exists():
            try:
                content = read_json(self._path)
                self._done = content if isinstance(content, dict) else self._warn("is not an object", {})
            except UserError:
                self._warn("is not valid JSON", None)

    def counts(self, key: str, length: int, most: int) -> list[int] | None:
        """So many counts, from 0 to `most` each, that are kept under a key; None if there are none."""
        counts = self._done.get(key)
        if counts is None:
            return None
        fits = isinstance(counts, list) and len(counts) == length
        if fits and all(type(count) is int and 0 <= count <= most for count in counts):
            return list(counts)
        return self._warn("holds counts that cannot be", None)

    def keep(self, key: str, counts: list[int]) -> None:
        self._done[key] = counts
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self._done))

    def _warn(self, what: str, instead: T) -> T:
        say(self._console, f"warning: {self._path} {what}: that part is measured again")
        return instead
