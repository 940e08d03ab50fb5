"""Open WebDataset tars: find them, index them, and read the names of their classes."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from posixpath import dirname

import numpy as np
from rich.console import Console

from pixmim.data.dataset import RGB, ImageSpec
from pixmim.data.shards import fsspec_io
from pixmim.data.shards.dataset import ShardDataset, ShardIndex
from pixmim.data.shards.fsspec_io import NoAccessError, is_url
from pixmim.data.shards.index import IMAGE_EXTENSIONS, ScanResult, load_or_scan
from pixmim.data.shards.local import FileVersion
from pixmim.data.shards.remote import open_shards
from pixmim.data.uri import expand_braces
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.threads import parallel_map

_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)\}*$", re.IGNORECASE)

_warned: set[str] = set()  # datasets whose ignored images were reported


def is_tar(spec: str) -> bool:
    """Return True if a name or pattern ends like a tar's, compressed or not."""
    name = spec.split("?", 1)[0] if is_url(spec) else spec  # a URL may be signed
    return _TAR.search(name) is not None


def find_tars(spec: str) -> dict[str, FileVersion | None] | None:
    """Find the tars of a path, a URL, a pattern, or a folder (a local one must contain only tars).

    Returns:
        Their names, with their versions where those are known; None if `spec` is something else.

    Raises:
        UserError: If nothing matches a pattern, or a URL leads to no tars.
    """
    if is_url(spec):
        return _expand(spec if is_tar(spec) else f"{spec}/*.tar")
    if os.path.isdir(spec):
        names = sorted(name for name in os.listdir(spec) if not name.startswith("."))
        tars = [name for name in names if is_tar(name)]
        others = set(names) - {*tars, "classes.txt"}
        return dict.fromkeys(f"{spec}/{name}" for name in tars) if tars and not others else None
    if not is_tar(spec):
        return None
    return {spec: None} if os.path.isfile(spec) else _expand(spec)


def _expand(pattern: str) -> dict[str, FileVersion | None]:
    found: dict[str, FileVersion | None] = {}
    for name in expand_braces(pattern):
        if any(character in name for character in ("*" if is_url(name) else "*?[")):
            matching = fsspec_io.find_matching(name)
            if not matching:
                raise UserError(f"nothing matches {name}" + ", or the server does not list files" * is_url(name))
            found |= matching
        else:
            found[name] = None
    return found


def open_webdataset(
    spec: str,
    tars: dict[str, FileVersion | None],
    form: ImageSpec = RGB,
    shard_cache_gib: float = 50.0,
    last_dot: bool = False,
) -> ShardDataset:
    """Open the samples of tars, scanning those whose index is not cached.

    A truncated or damaged tar is an error: samples before the damage are not used either.

    Args:
        spec: What the user passed.
        tars: What `find_tars` returned.
        form: Channels and dtype that images are converted to.
        shard_cache_gib: Bound of the disk cache for remote shards, in GiB.
        last_dot: Whether keys end at the last dot of a file name instead of the first.

    Raises:
        UserError: If a tar is missing or damaged, or none contains an image.
    """
    names = list(tars)
    found = parallel_map("looking for shards", lambda i: tars[names[i]] or fsspec_io.file_version(names[i]), len(names))
    missing = [name for name, version in zip(names, found, strict=True) if version is None]
    if missing:
        count = f" ({len(missing)} of {len(names)} are missing)" * (len(missing) > 1)
        raise UserError(f"{missing[0]} does not exist{count}")
    versions = [version for version in found if version is not None]
    store = open_shards(names, versions, shard_cache_gib)
    scans = parallel_map(
        "indexing shards", lambda i: load_or_scan(names[i], versions[i], store, i, last_dot), len(names), threads=8
    )
    if not any(len(scan.index.entries) for scan in scans):
        extensions = sum((Counter(scan.extensions) for scan in scans), Counter[str]())
        what = " ".join(f".{extension}" for extension, _ in extensions.most_common(8)) or "no files"
        known = " ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        raise UserError(f"no images in {spec} (found {what}); supported: {known}")
    _warn_ignored(spec, scans)
    classes, indexes = _merge_labels(names, scans)
    return ShardDataset(spec, form, names, store, indexes, classes=classes, note=_note(scans, bool(classes)))


def _warn_ignored(spec: str, scans: Sequence[ScanResult]) -> None:
    """Warn once, on rank 0, about images that are ignored, which is rarely intended."""
    extra, links = sum(scan.extra_images for scan in scans), sum(scan.links for scan in scans)
    if spec in _warned or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    _warned.add(spec)
    images = sum(len(scan.index.entries) for scan in scans) + extra
    if extra:
        print_plain(
            Console(stderr=True),
            f"warning: {spec}: {extra:,} of {images:,} images are ignored. Files with the same name up to the first "
            f"dot are one sample, of which one image is used. If names contain dots, pass '{spec},key=last-dot'",
        )
    if links:
        print_plain(
            Console(stderr=True),
            f"warning: {spec}: {links:,} images are links, which are ignored. Pack them with --dereference "
            "--hard-dereference",
        )


def _merge_labels(tars: Sequence[str], scans: Sequence[ScanResult]) -> tuple[list[str], list[ShardIndex]]:
    """Return the names of all classes, and each tar's samples with labels by them; no names if a class is missing."""
    indexes = [scan.index for scan in scans]
    if any(scan.unlabeled for scan in scans):
        return [], indexes
    names = sorted({name for scan in scans for name in scan.class_names})
    if all(name.isascii() and name.isdecimal() for name in names):
        label_of = {name: int(name) for name in names}
        classes = _read_class_names(tars, max(label_of.values()))
    else:
        label_of = {name: label for label, name in enumerate(names)}
        classes = names
    for i, scan in enumerate(scans):
        entries = scan.index.entries.copy()
        entries["label"] = np.asarray([label_of[name] for name in scan.class_names], np.int32)[entries["label"]]
        indexes[i] = replace(scan.index, entries=entries)
    return classes, indexes


def _read_class_names(tars: Sequence[str], highest: int) -> list[str]:
    """Return the lines of classes.txt in the tars' folder, or the numbers up to `highest`."""
    folders = {dirname(name) for name in tars}
    path = os.path.join(folders.pop(), "classes.txt") if len(folders) == 1 else ""
    try:
        text = fsspec_io.read_small_file(path) if path else None
    except NoAccessError:  # what some storages answer if there is no such file
        text = None
    if text is None:
        return [str(number) for number in range(highest + 1)]
    names = [line.strip() for line in text.decode("utf-8", "replace").rstrip().split("\n")]
    if highest >= len(names):
        raise UserError(f"{path} names {len(names)} classes, but a sample has class number {highest}")
    return names


def _note(scans: Sequence[ScanResult], labeled: bool) -> str:
    """Describe the samples that are left out."""
    samples = sum(len(scan.index.entries) for scan in scans)
    ignored = sum(scan.extra_images + scan.links for scan in scans)
    without_image, unlabeled = sum(scan.without_image for scan in scans), sum(scan.unlabeled for scan in scans)
    notes = {
        f"{ignored:,} images are ignored": ignored,
        f"{without_image:,} samples without an image are ignored": without_image,
        f"no labels: {unlabeled:,} of {samples:,} samples have no class": not labeled and unlabeled < samples,
    }
    return "".join(f"; {note}" for note, applies in notes.items() if applies)
