"""What --data says, taken apart: the parts of a mixture and their weights, and the fields of a Hugging Face data set.

    data     = part {"+" part}
    part     = source ["*" weight]          weight: a whole number of at least 1
    source   = path [",root=" folder] | tars [",key=last-dot"] | glob | address | "shapes:" ...
             | "hf:" place [":" split] {"," option "=" value}

A path that is there is taken whole, whatever characters are in it. `root=` belongs to a list of images and to tables,
and names a folder that the paths in them may lead to. Imports no torch, for the command line.
"""

import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from braceexpand import braceexpand

from pixmim.utils.errors import UserError, did_you_mean

_ADDRESS = re.compile(r"hf:|shapes:|[a-z][a-z0-9]*://")
_WEIGHTED = re.compile(r"(.+)\*([0-9]+\.?[0-9]*|\.[0-9]+)", re.DOTALL)
_MOST_DIGITS = 6  # of a weight
_WILDCARD = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.(-?\d+))?\n?\}|[{,}]")
_MAX_NAMES = 1_000_000  # that braces may stand for
_ROOTED = re.compile(r"(.+?),root=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One source of a mixture, as it was written, and how often each of its images comes in an epoch."""

    source: str
    weight: int = 1


def read_parts(spec: str) -> list[Part]:
    """The parts that a spec joins with `+`. Raises UserError for a weight that is no whole number of at least 1.

    Only `*` and digits at the end of a part are a weight, so `shards/*.tar*2` is the glob `shards/*.tar`, twice. Since
    a path may hold a `+`, a part ends at the first one before which something is there. What follows an address and
    is not there itself belongs to the address.
    """
    if "\0" in spec:
        raise UserError(f"{spec!r} is not the name of any data: it holds a zero byte")
    if _exists(spec):
        return [Part(spec)]
    pieces, found = spec.split("+"), list[str]()
    while pieces:
        joined = ("+".join(pieces[:count]) for count in range(1, len(pieces) + 1))
        count = next((count for count, text in enumerate(joined, 1) if is_there(text)), 0)
        text = "+".join(pieces[: count or 1])
        if count or not (found and _ADDRESS.match(found[-1])):
            found.append(text)
        else:
            found[-1] += f"+{text}"
        del pieces[: count or 1]
    return [_read_part(text, spec) for text in found]


def absolute(spec: str) -> str:
    """The spec with the whole path of every file and folder in it; names, addresses and options as they are."""
    if not spec:
        return spec
    return "+".join(
        _absolute_source(part.source) + (f"*{part.weight}" if part.weight > 1 else "") for part in read_parts(spec)
    )


def split_root(source: str) -> tuple[str, Path | None]:
    """Split `PATH,root=FOLDER`, the source of a list or a table, into path and folder; None if no folder is named.

    A path that exists is taken literally, whatever it holds.
    """
    match = None if _exists(source) or _ADDRESS.match(source) else _ROOTED.fullmatch(source)
    return (match[1], Path(os.path.expanduser(match[2]))) if match else (source, None)


def split_key(source: str) -> tuple[str, bool]:
    """Split `TARS,key=last-dot`: the tars, and whether names count up to their last dot. Raises UserError."""
    tars, comma, key = source.rpartition(",key=")
    if not comma or _exists(source) or source.startswith(("hf:", "shapes:")):
        return source, False
    if key != "last-dot":
        raise UserError(f"key={key} in '{source}': only key=last-dot is known")
    return tars, True


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern such as `{a,b}-{000..146}.tar` stands for, in the order of a shell.

    Raises:
        UserError: If there are more than a million, or the braces are not balanced.
    """
    try:
        if _count_names(pattern) <= _MAX_NAMES:
            return list(braceexpand(pattern, escape=False))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{pattern[:200]} cannot be expanded: {str(error)[:200]}") from None
    raise UserError(f"{pattern[:200]} stands for more than {_MAX_NAMES:,} files")


def _count_names(pattern: str) -> int:
    """Bound the number of names, which `braceexpand` makes (in parts) before it returns the first."""
    count, before = 1, 0  # of the alternative at hand up to here, and of the alternatives before it
    outer: list[tuple[int, int]] = []
    for token in _BRACES.finditer(pattern):
        first, last, letter, other, step = token.groups()
        if first:
            count *= abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
        elif letter:
            count *= abs(ord(other) - ord(letter)) + 1
        elif token[0] == "{":
            outer.append((count, before))
            count, before = 1, 0
        elif token[0] == "," and outer:
            count, before = 1, before + count
        elif token[0] == "}":
            if not outer:
                raise ValueError("unbalanced braces")
            inside = before + count
            count, before = outer.pop()
            count *= inside
    if outer:
        raise ValueError("unbalanced braces")
    return count


@dataclass(frozen=True)
class HubSpec:
    """`hf:PLACE[:SPLIT][,config=NAME][,revision=NAME][,image=COLUMN][,label=COLUMN][,root=FOLDER]`; empty: not said.

    place     a folder or file, if there is one; otherwise the name of a data set on the hub
    split     such as train
    config    which of the data set's configurations (subsets)
    revision  a branch, tag or commit on the hub
    image     the column of pictures
    label     the column of classes
    root      a folder that paths in the table may lead to, besides the table's own
    """

    place: str
    split: str = ""
    config: str = ""
    revision: str = ""
    image: str = ""
    label: str = ""
    root: str = ""

    @staticmethod
    def read(spec: str) -> "HubSpec":
        """Take a spec apart. Raises UserError naming what is wrong in it."""
        known = [field.name for field in fields(HubSpec)][2:]
        place, *options = re.split(r",(?=\w+=)", spec.removeprefix("hf:"))
        values: dict[str, str] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key not in known:
                raise UserError(f"hf: has no option '{key}'{did_you_mean(key, known) or '.'} Known: {', '.join(known)}")
            if not value:
                raise UserError(f"'{spec}' gives no value for {key}")
            values[key] = value
        split = ""
        if not _exists(place) and ":" in place:
            place, _, split = place.rpartition(":")
        if not _exists(place):
            if place.startswith(("/", ".", "~")):
                raise UserError(f"there is no {place}")
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place, re.ASCII):
                raise UserError(
                    f"'{place}' in '{spec}' is neither a path nor the name of a data set; "
                    "hf:USER/NAME:SPLIT,image=COLUMN,label=COLUMN is the pattern, all after the name optional"
                )
        return HubSpec(place, split, **values)

    @property
    def path(self) -> Path | None:
        """The place as a path, if it is there on this machine."""
        return Path(os.path.expanduser(self.place)) if _exists(self.place) else None

    def __str__(self) -> str:
        options = "".join(f",{f.name}={value}" for f in fields(self)[2:] if (value := getattr(self, f.name)))
        return f"hf:{self.place}{':' * bool(self.split)}{self.split}{options}"


def _read_part(text: str, spec: str) -> Part:
    source, weight = _split_weight(text)
    if not source:
        raise UserError(f"nothing stands on one side of a + in '{spec}'")
    if len(weight) > _MOST_DIGITS:
        raise UserError(
            f"the weight {weight[:20]} in '{text[:200]}' is too large: it has more than {_MOST_DIGITS} digits"
        )
    if not weight.isdigit() or int(weight) < 1:
        raise UserError(
            f"the weight {weight} in '{text}' is no whole number of at least 1: it says how often each image comes in "
            "an epoch. For 1.5 to 1, multiply both: a*3+b*2"
        )
    return Part(source, int(weight))


def _split_weight(text: str) -> tuple[str, str]:
    match = None if _exists(text) else _WEIGHTED.fullmatch(text)
    return (match[1], match[2]) if match else (text, "1")


def is_there(text: str) -> bool:
    """Whether a part is an address or names something: a path, or a glob or brace pattern in a folder that exists."""
    source, _ = _split_weight(text)
    source, _, _ = source.partition(",key=") if not _exists(source) else (source, "", "")
    if _ADDRESS.match(source) or _exists(source):
        return True
    path, root = split_root(source)
    if root is not None:
        return _exists(path) and root.exists()
    fixed = _WILDCARD.split(source, maxsplit=1)[0]
    folder = os.path.dirname(fixed)
    return fixed != source and (_exists(folder) if folder else "+" not in source)


def _absolute_source(source: str) -> str:
    if source.startswith("hf:") and not source.startswith("hf://"):
        wanted = HubSpec.read(source)
        root = _absolute_root(Path(os.path.expanduser(wanted.root))) if wanted.root else ""
        place = wanted.place if wanted.path is None else str(wanted.path.resolve())
        return str(replace(wanted, place=place, root=root)) if wanted.path or root else source
    if _ADDRESS.match(source):
        return source
    path, named = split_root(source)
    return os.path.realpath(os.path.expanduser(path)) + (f",root={_absolute_root(named)}" if named else "")


def _absolute_root(root: Path) -> str:
    """The whole path of a root, with links as they are: paths in a list may spell it so."""
    return os.path.abspath(root)


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(os.path.expanduser(path))
