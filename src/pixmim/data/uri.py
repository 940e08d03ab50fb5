"""Parse what is passed as --data: the parts of a mixture with their weights, and the options of each part.

    data     = [split] part {"+" part}
    split    = "split:" ("train" | "test") [",share=" number] [",seed=" integer] ":"
    part     = source ["*" weight]          weight: an integer of at least 1
    source   = path {option} | glob {option} | URL {option} | "shapes:" ... | "hf:" name [":" split] {option}
    option   = "," name "=" value           which names depends on what the source is

A path that exists is taken literally, whatever characters it has. Imports no torch, so that the command line starts
fast.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from pathlib import Path

from braceexpand import braceexpand

from pixmim.utils.errors import UserError, did_you_mean, shown

_ADDRESS = re.compile(r"hf:|shapes:|[a-z][a-z0-9]*://")
_WEIGHTED = re.compile(r"(.+)\*([0-9]+\.?[0-9]*|\.[0-9]+)", re.DOTALL)
_MAX_WEIGHT_DIGITS = 6
_WILDCARD = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.(-?\d+))?\n?\}|[{,}]")
_MAX_NAMES = 1_000_000  # in the expansion of a brace pattern
_SPLIT = re.compile(r"split:(train|test)((?:,share=0?\.[0-9]{1,20}|,seed=[0-9]{1,20})*):(?!split:)(.+)", re.DOTALL)
_HAS_OWN_OPTIONS = re.compile(r"hf:(?!//)|shapes:")
_OPTION = re.compile(r",(?=\w+=)")
_MAX_OPTIONS = 100
_OPTIONS = ("root", "key", "image", "path", "label", "group", "include", "exclude", "channels")
_REPEATABLE = ("include", "exclude")


@dataclass(frozen=True)
class SplitSpec:
    """The prefix `split:SIDE[,share=0.8][,seed=0]:` of a dataset: the train or the test images of a random split.

    Args:
        side: "train" or "test".
        share: Share of the train images of each class.
        seed: Seed of the split.
    """

    side: str
    share: float = 0.8
    seed: int = 0

    @staticmethod
    def read(spec: str) -> "tuple[SplitSpec | None, str]":
        """Split the prefix from a spec. It is None if there is none, or if the spec is an existing path."""
        if not spec.startswith("split:") or _exists(spec):
            return None, spec
        match = _SPLIT.fullmatch(spec)
        options = dict(option.split("=") for option in match[2].split(",")[1:]) if match else {}
        share, seed = float(options.get("share", 0.8)), int(options.get("seed", 0))
        if not match or match[2].count(",") != len(options) or not share:
            raise UserError(
                f"'{spec[:200]}' is not a split: write split:train,share=0.8,seed=0:DATA, and test for the other part. "
                "share is above 0 and below 1; both options may be left out"
            )
        return SplitSpec(match[1], share, seed), match[3]

    @property
    def prefix(self) -> str:
        """The prefix as text, with all of its values."""
        return f"split:{self.side},share={Decimal(str(self.share)):f},seed={self.seed}:"


def describe_split(spec: str) -> str:
    """Return a spec for messages, which may come from --labelled: "test part of DATA (share 0.8, seed 0)"."""
    match = _SPLIT.fullmatch(spec)
    if not match:
        return spec
    options = match[2].lstrip(",").replace(",", ", ").replace("=", " ")
    return f"{match[1]} part of {match[3]}{f' ({options})' * bool(options)}"


@dataclass(frozen=True)
class Part:
    """One source of a mixture as the user wrote it, and how often each of its images occurs in an epoch."""

    source: str
    weight: int = 1


def spec_text(data: object) -> str:
    """Return what names a dataset as a text. Raises UserError unless it is one, or a path."""
    text = os.fspath(data) if isinstance(data, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UserError(f"data are one folder or another source, such as 'a+b' for two folders, not {shown(data)}")
    return text


def read_parts(spec: str) -> list[Part]:
    """Split a spec into the parts that `+` joins. A prefix `split:...:`, which applies to each, is left out.

    Only `*` and digits at the end of a part are a weight, so `shards/*.tar*2` is the glob `shards/*.tar`, twice. Paths
    may contain `+`: a part ends at the first `+` where the text before it exists. After a URL, text that does not
    exist is taken as part of the URL.

    Raises:
        UserError: If a weight is not an integer of at least 1, or a part is empty.
    """
    if "\0" in spec:
        raise UserError(f"{spec!r} is not a dataset: it contains a zero byte")
    _, spec = SplitSpec.read(spec)
    if _exists(spec):
        return [Part(spec)]
    pieces, sources = spec.split("+"), list[str]()
    while pieces:
        prefixes = ("+".join(pieces[:count]) for count in range(1, len(pieces) + 1))
        count = next((count for count, text in enumerate(prefixes, 1) if is_there(text)), 0)
        text = "+".join(pieces[: count or 1])
        if count or not (sources and _ADDRESS.match(sources[-1])):
            sources.append(text)
        else:
            sources[-1] += f"+{text}"
        del pieces[: count or 1]
    return [_read_part(text, spec) for text in sources]


def _read_part(text: str, spec: str) -> Part:
    source, weight = _split_weight(text)
    if not source:
        raise UserError(f"a part is missing before or after a + in '{spec}'")
    if len(weight) > _MAX_WEIGHT_DIGITS:
        raise UserError(f"weight {weight[:20]} in '{text[:200]}' is too large: use at most {_MAX_WEIGHT_DIGITS} digits")
    if not weight.isdigit() or int(weight) < 1:
        raise UserError(
            f"weight {weight} in '{text}' is not an integer of at least 1. It is how often each image occurs in an "
            "epoch; for 1.5 to 1, multiply both: a*3+b*2"
        )
    return Part(source, int(weight))


def _split_weight(text: str) -> tuple[str, str]:
    match = None if _exists(text) else _WEIGHTED.fullmatch(text)
    return (match[1], match[2]) if match else (text, "1")


def is_there(text: str) -> bool:
    """Return True if a part is a URL, an existing path, or a pattern in an existing folder."""
    source, options = split_options(_split_weight(text)[0])
    if _ADDRESS.match(source) or _exists(source):
        return all(_exists(root) for root in options.get("root", []))
    literal = _WILDCARD.split(source, maxsplit=1)[0]
    folder = os.path.dirname(literal)
    return literal != source and (_exists(folder) if folder else "+" not in source)


def absolute(spec: str) -> str:
    """Return a spec with absolute paths. Names, URLs and options stay as they are."""
    return _with_sources(spec, _absolute_source) if spec else spec


def _with_sources(spec: str, change: Callable[[str], str]) -> str:
    """Return a spec with the source of each part changed, and all values of a split written out."""
    split, spec = SplitSpec.read(spec)
    parts = [f"{change(part.source)}{f'*{part.weight}' * (part.weight > 1)}" for part in read_parts(spec)]
    return (split.prefix if split is not None else "") + "+".join(parts)


def with_patterns(spec: str, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Return a spec each of whose parts has these patterns as options `include=` and `exclude=`.

    Raises:
        UserError: If a part is not a folder or a .zip, or a pattern would be read as another part of a spec.
    """
    pairs = [("include", pattern) for pattern in include] + [("exclude", pattern) for pattern in exclude]
    if not pairs:
        return spec
    for name, pattern in pairs:
        if not pattern or "+" in pattern or _OPTION.search(pattern) or _WEIGHTED.fullmatch(f"-{pattern}"):
            raise UserError(
                f"--{name} '{pattern}' is empty, or has a +, a ',name=' or digits after a last *, which mean something "
                "else in --data: write ? in place of the character"
            )
    if other := next((part.source for part in read_parts(spec) if _HAS_OWN_OPTIONS.match(part.source)), ""):
        raise UserError(f"--include and --exclude choose files of a folder or a .zip, and '{other}' is neither")
    suffix = "".join(f",{name}={pattern}" for name, pattern in pairs)
    return _with_sources(spec, lambda source: source + suffix)


def _absolute_source(source: str) -> str:
    if source.startswith("hf:") and not source.startswith("hf://"):
        hub = HubSpec.read(source)
        root = os.path.abspath(os.path.expanduser(hub.root)) if hub.root else ""
        place = hub.place if hub.path is None else str(hub.path.resolve())
        return str(replace(hub, place=place, root=root)) if hub.path or root else source
    if _ADDRESS.match(source):
        return source
    path, options = split_options(source)
    pairs = [(name, value) for name, values in options.items() for value in values]
    suffix = "".join(
        f",{name}={os.path.abspath(os.path.expanduser(value)) if name == 'root' else value}" for name, value in pairs
    )  # abspath keeps links, since a list may name them
    return os.path.realpath(os.path.expanduser(path)) + suffix


def split_options(source: str) -> tuple[str, dict[str, list[str]]]:
    """Split `PATH,option=value,...` into the path and the values of each option, in their order.

    The longest existing path is the path. If there is none (a pattern, a URL, a misspelled name), known options at the
    end are split off. `hf:` and `shapes:` have options of their own and stay as they are.

    Raises:
        UserError: If there are more than a hundred options.
    """
    pieces = _OPTION.split(source)
    if len(pieces) == 1 or _exists(source) or _HAS_OWN_OPTIONS.match(source):
        return source, {}
    if len(pieces) > _MAX_OPTIONS:
        raise UserError(f"'{source[:100]}...' has {len(pieces):,} options: use at most {_MAX_OPTIONS}")
    count = next((n for n in range(len(pieces), 0, -1) if _exists(",".join(pieces[:n]))), 0)
    if not count:
        count = len(pieces)
        while count > 1 and pieces[count - 1].partition("=")[0] in _OPTIONS:
            count -= 1
    return ",".join(pieces[:count]), group_options(pieces[count:])


def group_options(pieces: Iterable[str]) -> dict[str, list[str]]:
    """Return the values of each option, given `option=value`, in their order."""
    options: dict[str, list[str]] = {}
    for name, _, value in (piece.partition("=") for piece in pieces):
        options.setdefault(name, []).append(value)
    return options


def read_options(source: str, kind: str, known: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
    """Split a source as `split_options` does, and check that its options are some of those `known` for its `kind`.

    Raises:
        UserError: If an option is unknown, has no value, or is given twice without being a pattern.
    """
    path, options = split_options(source)
    check_options(source, f"{path} is {kind} and", options, known)
    return path, options


def check_options(source: str, what: str, options: dict[str, list[str]], known: Sequence[str]) -> None:
    """Raise UserError for options as `read_options` does."""
    for name, values in options.items():
        if name not in known:
            names = f"Its options: {', '.join(known)}" if known else "It takes no options"
            raise UserError(f"{what} has no option {name}={did_you_mean(name, known) or '.'} {names}")
        if not all(values):
            raise UserError(f"'{source}' has no value for {name}=")
        if len(values) > 1 and name not in _REPEATABLE:
            raise UserError(f"'{source}' has {name}= {len(values)} times: give it once")


def read_root(name: str, source: str) -> Path | None:
    """Return the folder that `root=` names; None without a name. Raises UserError if there is no such folder."""
    root = Path(os.path.expanduser(name))
    if name and not root.is_dir():
        raise UserError(f"no folder {root}, which '{source}' names as root=")
    return root if name else None


def expand_braces(pattern: str) -> list[str]:
    """Expand a pattern such as `{a,b}-{000..146}.tar` as a shell does.

    Raises:
        UserError: If the braces are not balanced, or there are more than a million names.
    """
    try:
        if _count_names(pattern) <= _MAX_NAMES:
            return list(braceexpand(pattern, escape=False))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UserError(f"{pattern[:200]} cannot be expanded: {str(error)[:200]}") from None
    raise UserError(f"{pattern[:200]} expands to more than {_MAX_NAMES:,} files")


def _count_names(pattern: str) -> int:
    """Return an upper bound of the number of names: `braceexpand` builds many of them before it yields the first."""
    stack = [[1, 0]]  # by depth: names of the current alternative up to here, and of those before it
    for token in _BRACES.finditer(pattern):
        first, last, first_letter, last_letter, step = token.groups()
        if first:
            stack[-1][0] *= abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
        elif first_letter:
            stack[-1][0] *= abs(ord(last_letter) - ord(first_letter)) + 1
        elif token[0] == "{":
            stack.append([1, 0])
        elif token[0] == "," and len(stack) > 1:
            stack[-1] = [1, sum(stack[-1])]
        elif token[0] == "}" and len(stack) > 1:
            inner = sum(stack.pop())
            stack[-1][0] *= inner
        elif token[0] == "}":
            raise ValueError("unbalanced braces")
    return stack[0][0]  # braceexpand refuses a brace that is not closed


@dataclass(frozen=True)
class HubSpec:
    """The fields of `hf:PLACE[:SPLIT][,config=NAME][,revision=NAME][,image=COLUMN][,label=COLUMN][,root=FOLDER]`.

    Args:
        place: An existing folder or file, or the name of a dataset on the hub.
        split: Such as train; "" for the default, as in all fields below.
        config: Configuration (subset) of the dataset.
        revision: Branch, tag or commit on the hub.
        image: Column of images.
        label: Column of classes.
        root: Folder that paths in the table may lead to, in addition to the table's own.
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
        """Parse a spec. Raises UserError."""
        place, *pieces = _OPTION.split(spec.removeprefix("hf:"))
        options = group_options(pieces)
        check_options(spec, "hf:", options, [field.name for field in fields(HubSpec)][2:])
        split = ""
        if not _exists(place) and ":" in place:
            place, _, split = place.rpartition(":")
        if not _exists(place):
            if place.startswith(("/", ".", "~")):
                raise UserError(f"{place} does not exist")
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place, re.ASCII):
                raise UserError(
                    f"'{place}' in '{spec}' is neither a path nor the name of a dataset; "
                    "hf:USER/NAME:SPLIT,image=COLUMN,label=COLUMN is the pattern, all after the name optional"
                )
        return HubSpec(place, split, **{name: values[0] for name, values in options.items()})

    @property
    def path(self) -> Path | None:
        """The place as a path if it exists on this machine."""
        return Path(os.path.expanduser(self.place)) if _exists(self.place) else None

    def __str__(self) -> str:
        options = "".join(f",{f.name}={value}" for f in fields(self)[2:] if (value := getattr(self, f.name)))
        return f"hf:{self.place}{':' * bool(self.split)}{self.split}{options}"


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(os.path.expanduser(path))
