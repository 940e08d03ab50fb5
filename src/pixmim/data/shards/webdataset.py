"""Opening the tars of others: which are meant, what is in each, and what their classes are called."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from posixpath import dirname

import numpy as np
from rich.console import Console

from pixmim.data.dataset import COLOUR, Form
from pixmim.data.shards import anywhere
from pixmim.data.shards.dataset import Contents, Shards
from pixmim.data.shards.fsspec_io import NoAccessError, is_far
from pixmim.data.shards.index import PICTURES, Found, contents
from pixmim.data.shards.local import Version
from pixmim.data.uri import expand_braces
from pixmim.utils.console import say
from pixmim.utils.errors import UserError
from pixmim.utils.progress import parallel_map

_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)\}*$", re.IGNORECASE)


def names_tars(spec: str) -> bool:
    """Whether a name or a pattern ends as a tar's does; a compressed one's too, which is refused later."""
    name = spec.split("?", 1)[0] if is_far(spec) else spec  # a URL may be signed
    return _TAR.search(name) is not None


def tar_names(spec: str) -> dict[str, Version | None] | None:
    """The tars that `spec` names: one, several by pattern, or all of a folder; near only if that holds no other files.

    None if it names something else. Versions are given where finding the names told them. Raises UserError where
    nothing fits a pattern, and for a URL that leads to no tars.
    """
    if is_far(spec):
        return _named(spec if names_tars(spec) else f"{spec}/*.tar")
    if os.path.isdir(spec):
        names = sorted(name for name in os.listdir(spec) if not name.startswith("."))
        tars = [name for name in names if names_tars(name)]
        others = set(names) - {*tars, "classes.txt"}
        return dict.fromkeys(f"{spec}/{name}" for name in tars) if tars and not others else None
    if not names_tars(spec):
        return None
    return {spec: None} if os.path.isfile(spec) else _named(spec)


def _named(pattern: str) -> dict[str, Version | None]:
    found: dict[str, Version | None] = {}
    for name in expand_braces(pattern):
        if any(character in name for character in ("*" if is_far(name) else "*?[")):
            fitting = anywhere.matching(name)
            if not fitting:
                lists = ", or the server lists no files" if is_far(name) else ""
                raise UserError(f"nothing fits {name}{lists}")
            found |= fitting
        else:
            found[name] = None
    return found


def open_tars(
    spec: str,
    names: dict[str, Version | None],
    form: Form = COLOUR,
    local_copy: float = 50.0,
    last_dot: bool = False,
) -> Shards:
    """The samples of tars in the order of the names, searched through first where that was not yet done.

    A tar that is cut off or damaged is an error, not a loss: its samples before the damage are not used either. Raises
    UserError for that, for tars that are not there, and if there is no picture in any.
    """
    tars = list(names)
    asked = parallel_map("looking for shards", lambda i: names[tars[i]] or anywhere.version(tars[i]), len(tars))
    missing = [name for name, version in zip(tars, asked, strict=True) if version is None]
    if missing:
        more = f"; {len(missing)} of {len(tars)} are missing" if len(missing) > 1 else ""
        raise UserError(f"there is no {missing[0]}{more}")
    versions = [version for version in asked if version is not None]
    shelf = anywhere.shelf(tars, versions, local_copy)
    found = parallel_map(
        "searching shards", lambda i: contents(tars[i], versions[i], shelf, i, last_dot), len(tars), threads=8
    )
    if not any(len(one.contents.entries) for one in found):
        extensions = sum((Counter(one.extensions) for one in found), Counter[str]())
        what = " ".join(f".{extension}" for extension, _ in extensions.most_common(8)) or "no files"
        raise UserError(f"no pictures in {spec} (found {what}); known: {' '.join('.' + name for name in PICTURES)}")
    _warn(spec, found)
    if any(one.words for one in found) and not any(one.unlabelled for one in found):
        classes, held = _words(found)
    else:
        classes, held = _classes(tars, found), [one.contents for one in found]
    return Shards(spec, form, tars, shelf, held, classes=classes, note=_note(found, bool(classes)))


def _warn(spec: str, found: Sequence[Found]) -> None:
    """Say on the terminal, once and by one process, how many images are not read: that is seldom meant."""
    lost, links = sum(one.lost for one in found), sum(one.links for one in found)
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if spec in _warned or not first:
        return
    _warned.add(spec)
    images = sum(len(one.contents.entries) for one in found) + lost
    if lost:
        say(
            Console(stderr=True),
            f"warning: {spec}: {lost:,} of {images:,} images are left out. Files whose names are the same up to "
            f"the first dot are one sample, of which one image counts (the first of {', '.join(PICTURES[:4])}...). If "
            f"the dots belong to the names, give '{spec},key=last-dot'",
        )
    if links:
        say(
            Console(stderr=True),
            f"warning: {spec}: {links:,} images are links, which are left out: pack them with --dereference "
            "--hard-dereference",
        )


_warned: set[str] = set()


def _words(found: Sequence[Found]) -> tuple[list[str], list[Contents]]:
    """Names of the classes where .cls files hold words, sorted, and each tar's samples with labels to match."""
    own = [
        one.words or [str(n) for n in range(int(one.contents.entries["label"].max(initial=-1)) + 1)] for one in found
    ]
    used = [
        {words[label] for label in np.unique(one.contents.entries["label"])}
        for one, words in zip(found, own, strict=True)
    ]
    classes = sorted(set().union(*used))
    place = {word: i for i, word in enumerate(classes)}
    held = []
    for one, words in zip(found, own, strict=True):
        entries = one.contents.entries.copy()
        entries["label"] = np.asarray([place.get(word, -1) for word in words], np.int32)[entries["label"]]
        held.append(replace(one.contents, entries=entries))
    return classes, held


def _classes(tars: Sequence[str], found: Sequence[Found]) -> list[str]:
    """Names of the classes: the lines of a classes.txt beside the tars, or else their numbers. Empty: no labels."""
    if any(one.unlabelled for one in found):
        return []
    highest = max(int(one.contents.entries["label"].max(initial=-1)) for one in found)
    folders = {dirname(name) for name in tars}
    beside = os.path.join(folders.pop(), "classes.txt") if len(folders) == 1 else ""
    try:
        text = anywhere.read(beside) if beside else None
    except NoAccessError:  # what some storages answer where there is nothing
        text = None
    if text is None:
        return [str(number) for number in range(highest + 1)]
    names = text.decode("utf-8", "replace").split("\n")
    names = [line.strip() for line in names[: -1 if not names[-1].strip() else None]]
    if highest >= len(names):
        raise UserError(f"{beside} names {len(names)} classes, and there is a class number {highest}")
    return names


def _note(found: Sequence[Found], labelled: bool) -> str:
    """What a user should know of what was left out."""
    samples = sum(len(one.contents.entries) for one in found)
    several, without, unlabelled, lost, links = (
        sum(getattr(one, name) for one in found) for name in ("several", "without", "unlabelled", "lost", "links")
    )
    notes = []
    if several:
        notes.append(
            f"{several:,} samples hold several pictures, of which the first of {', '.join(PICTURES[:4])}... counts: "
            f"{lost:,} are left out"
        )
    if links:
        notes.append(f"{links:,} links are left out")
    if without:
        notes.append(f"{without:,} samples without a picture are left out")
    if not labelled and unlabelled < samples:
        notes.append(f"{unlabelled:,} of {samples:,} have no class in a .cls, so there are no labels")
    return "".join(f"; {note}" for note in notes)
