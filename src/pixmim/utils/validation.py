"""Ranges of settings, and the model keywords that files and users may set.

Keywords come from files (metadata of weights, config.json) and from the command line, and are passed to timm's
constructors, which have other keywords that name files, URLs and classes. Call `check_name` and `check_options` before
building a model.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pixmim.utils.errors import UserError, did_you_mean, shown

MAX_SIDE = 16_384
"""Largest image side in pixels."""

MAX_CHANNELS = 4_096

MAX_WIDTH = 16_384
"""Largest layer width; the widest published ViT has 6,144."""

MAX_DEPTH = 96
"""Largest number of blocks over all stages; the deepest published ViT has 48."""

_MAX_TEXT = 2**16
_NAME = re.compile(r"[a-z0-9_]{1,100}(\.[a-z0-9_]{1,100})?")


@dataclass(frozen=True)
class Integer:
    """An integer from `low` to `high`, or up to `max_length` of them; `limit_sum` bounds their sum by `high` too."""

    low: int
    high: int
    max_length: int = 1
    limit_sum: bool = False

    def takes(self, value: object) -> bool:
        values = value if isinstance(value, list | tuple) and 1 <= len(value) <= self.max_length > 1 else [value]
        valid = all(type(item) is int and self.low <= item <= self.high for item in values)
        return valid and not (self.limit_sum and sum(values) > self.high)

    def __str__(self) -> str:
        several = f", or up to {self.max_length} of them" if self.max_length > 1 else ""
        return f"an integer from {self.low} to {self.high:,}{several}{' in all' if self.limit_sum else ''}"


@dataclass(frozen=True)
class Real:
    """A number from `low` to `high`; `above` and `below` exclude the bounds themselves."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def takes(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above_low = self.low < value if self.above else self.low <= value
        return above_low and (value < self.high if self.below else value <= self.high)  # NaN fails

    def __str__(self) -> str:
        low, high = "above" if self.above else "from", "and below" if self.below else "to"
        return f"a number {low} {self.low:g} {high} {self.high:g}"


@dataclass(frozen=True)
class Text:
    """A text that matches a pattern."""

    pattern: str
    description: str

    def takes(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value, re.DOTALL) is not None

    def __str__(self) -> str:
        return self.description


@dataclass(frozen=True)
class Choice:
    """One of some values, of the same type."""

    values: tuple[object, ...]

    def takes(self, value: object) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(choice) for choice in self.values)


@dataclass(frozen=True)
class Sides:
    """A side in pixels, or HEIGHTxWIDTH; with `empty`, an empty text too."""

    empty: bool = False

    def takes(self, value: object) -> bool:
        return isinstance(value, str) and (parse_size(value) is not None or (self.empty and not value))

    def __str__(self) -> str:
        return f"a number of pixels such as 224, or HEIGHTxWIDTH such as 192x384, at most {MAX_SIDE:,} each"


@dataclass(frozen=True)
class Percentiles:
    """Two percentiles, such as 1,99; empty for none."""

    def takes(self, value: object) -> bool:
        return isinstance(value, str) and (not value or parse_stretch(value) is not None)

    def __str__(self) -> str:
        return "two increasing percentiles, such as 1,99"


Rule = Integer | Real | Choice | Text | Sides | Percentiles

Positive = Annotated[float, Real(0, 1e9, above=True)]
Count = Annotated[int, Integer(1, 999_999_999)]
NonNegative = Annotated[int, Integer(0, 999_999_999)]
Seed = Annotated[int, Integer(0, 2**63 - 1)]
Threads = Annotated[int, Integer(0, 1_024)]
Share = Annotated[float, Real(0, 1)]
LearningRate = Annotated[float, Real(0, 100, above=True)]
Data = Annotated[str, Text(".+", "data: a folder or another source that --data takes")]
Device = Annotated[str, Text(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", "auto, cpu, cuda, cuda:1 or mps")]
Size = Annotated[str, Sides()]
Stretch = Annotated[str, Percentiles()]

_FLAG = Choice((True, False))
_RATE = Real(0, 1)

KEYWORDS: dict[str, Integer | Real | Choice] = {
    # backbones
    "img_size": Integer(1, MAX_SIDE, max_length=2),
    "in_chans": Integer(1, MAX_CHANNELS),
    "num_classes": Integer(0, 1_000_000),
    "patch_size": Integer(1, 1_024, max_length=2),
    "embed_dim": Integer(1, MAX_WIDTH, max_length=5),
    "depth": Integer(1, MAX_DEPTH, max_length=5, limit_sum=True),
    "depths": Integer(1, MAX_DEPTH, max_length=5, limit_sum=True),
    "dims": Integer(1, MAX_WIDTH, max_length=5),
    "num_heads": Integer(1, 1_024, max_length=5),
    "head_dim": Integer(1, 1_024),
    "window_size": Integer(1, 1_024, max_length=5),
    "mlp_ratio": Real(0.01, 64),
    "norm_eps": Real(0, 0.1),
    "init_values": Real(0, 100),
    "head_init_scale": Real(0, 100),
    "reg_tokens": Integer(0, 1_024),
    "global_pool": Choice(("", "avg", "avgmax", "max", "token", "map", "prr")),
    "pos_embed": Choice(("", "none", "learn")),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate"), _RATE),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), _RATE),
    **dict.fromkeys(("qkv_bias", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm"), _FLAG),
    **dict.fromkeys(("class_token", "no_embed_class", "pool_include_prefix", "fix_init"), _FLAG),
    **dict.fromkeys(("pre_norm", "final_norm", "fc_norm", "use_fc_norm"), _FLAG),
    **dict.fromkeys(("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"), _FLAG),
    **dict.fromkeys(("swiglu_mlp", "scale_mlp", "always_partition", "conv_mlp"), _FLAG),
    # decoders and heads
    "decoder_dim": Integer(1, MAX_WIDTH),
    "decoder_depth": Integer(0, MAX_DEPTH),
    "decoder_heads": Integer(1, 1_024),
    "decoder_stride": Integer(1, 1_024),
    "predict_patch": Integer(0, MAX_SIDE),
    "outputs": Integer(1, 4_096),
    "head": Choice(("linear", "mlp")),
}

NOT_OF_TIMM = ("norm_eps",)
"""Keywords that pixmim applies itself, because timm's constructors do not take them."""


def parse_size(text: str) -> tuple[int, int] | None:
    """Return (height, width) of a text such as 224 or 192x384, or None if it is not a size."""
    if not re.fullmatch(r"(?i)[0-9]{1,8}(x[0-9]{1,8})?", text):
        return None
    sides = [int(side) for side in text.lower().split("x")]
    return (sides[0], sides[-1]) if all(1 <= side <= MAX_SIDE for side in sides) else None


def parse_stretch(text: str) -> tuple[float, float] | None:
    """Return the percentiles of a text such as 1,99 or 0.5,99.5, or None if it is not two increasing ones."""
    match = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,4})?),([0-9]{1,3}(?:\.[0-9]{1,4})?)", text)
    low, high = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
    return (low, high) if low < high <= 100 else None


class Settings:
    """Base of settings dataclasses, whose fields are checked against their annotations on construction."""

    def __post_init__(self) -> None:
        check(self)


def from_python(cls: Any, values: Mapping[str, object]) -> dict[str, Any]:
    """Return keywords of a settings class as its fields are typed.

    Numbers may be NumPy's or torch's, sizes numbers, texts of several numbers a number or a list, and several values an
    array, a list, or only one.
    """
    hints, result = hints_of(cls), dict[str, Any]()
    for name, value in values.items():
        hint, value = hints.get(name), plain(value)
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if any(isinstance(mark, Sides) for mark in getattr(hint, "__metadata__", ())):
            value = size_text(value)
        elif kind is str:
            value = _numbers_text(value)
        elif get_origin(kind) is tuple and isinstance(value, int | float | str):
            value = (value,)
        result[name] = tuple(value) if isinstance(value, list | range) else value
    return result


def size_text(value: Any) -> Any:
    """Return an integer or a pair of integers (h, w) as the text of a size, such as 192x384; others unchanged."""
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return "x".join(map(str, sides)) if all(type(side) is int for side in sides) else value


def _numbers_text(value: object) -> object:
    """Return a number, or several values with one among them, as a text such as 10,100,all; others unchanged."""
    words = value if isinstance(value, list | tuple | range) else [value]
    return ",".join(map(str, words)) if any(type(word) in (int, float) for word in words) else value


def plain(value: Any) -> Any:
    """Return scalars and arrays of NumPy and torch as Python's numbers and lists, in mappings and sequences too."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def check(settings: Any, prefix: str = "--") -> None:
    """Check all fields of a dataclass, and of dataclasses in it, against their types and rules.

    Args:
        settings: The dataclass.
        prefix: Prefix of the flags in messages.

    Raises:
        UserError: If a value is invalid. The message names its flag.
    """
    for name, hint in hints_of(settings.__class__).items():
        value, flag = getattr(settings, name), prefix + name.replace("_", "-")
        check_value(flag, value, hint)
        if is_dataclass(value):
            flat = any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))
            check(value, prefix if flat else f"{flag}.")


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with its rules."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def check_value(flag: str, value: object, hint: Any) -> None:
    """Raise UserError, naming the flag, unless a value has its type and obeys its rules."""
    expected = _expected(value, hint)
    if expected:
        raise UserError(f"{flag} must be {expected}, not {shown(value)}")
    if isinstance(value, dict):
        check_options(value)


def _expected(value: object, hint: Any) -> str:
    """Describe the values that a type with rules takes; empty if `value` is one of them."""
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, TypeVar):  # of settings that may be unset
        return _expected(value, type(None))
    if origin is Annotated:
        rule = next((mark for mark in hint.__metadata__ if isinstance(mark, Rule)), None)
        if rule is None or isinstance(rule, Text) or get_origin(args[0]) is None:
            return _expected(value, args[0]) if rule is None or rule.takes(value) else str(rule)
        values = value if isinstance(value, tuple) else (value,)
        numbers = [item for item in values if isinstance(item, int | float)]  # the type decides about None and words
        return _expected(value, args[0]) or ("" if all(map(rule.takes, numbers)) else str(rule))
    if origin in (Union, UnionType):
        expected = [_expected(value, option) for option in args]
        return "" if "" in expected else " or ".join(expected)
    if origin is Literal:
        return "" if Choice(args).takes(value) else "one of " + ", ".join(map(str, args))
    if origin is tuple:
        any_length = args[-1] is Ellipsis
        if not isinstance(value, tuple) or not (any_length or len(value) == len(args)):
            return "several values" if any_length else f"{len(args)} values"
        if any_length and args[0] in (int, float):  # one number of each type decides for all
            value = tuple({type(item): item for item in value}.values())
        return next(filter(None, map(_expected, value, args[:1] * len(value) if any_length else args)), "")
    if is_dataclass(origin or hint):
        return "" if isinstance(value, origin or hint) else f"of type {(origin or hint).__name__}"
    description, is_valid = _PLAIN.get(origin or hint, ("", None))
    return "" if is_valid is None or is_valid(value) else description


def _is_valid_text(text: str) -> bool:
    """Return True if the operating system takes the text as part of a path."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # an unpaired surrogate
        return False
    return len(text) <= _MAX_TEXT and "\0" not in text


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    int: ("an integer", lambda value: type(value) is int),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str) and _is_valid_text(value)),
    dict: ("names and values", lambda value: isinstance(value, dict)),
    type(None): ("nothing", lambda value: value is None),
}
"""What a plain type takes, and whether it takes a value."""


def check_options(options: Mapping[str, object]) -> None:
    """Raise UserError unless each option is a known keyword with a valid value."""
    for name, value in options.items():
        rule = KEYWORDS.get(name)
        if rule is None:
            raise UserError(f"a model has no option {shown(name)}{did_you_mean(name, KEYWORDS)}")
        if not rule.takes(value):
            raise UserError(f"the model's option '{name}' must be {rule}, not {shown(value)}")


def check_name(backbone: str) -> None:
    """Raise UserError unless it is a plain model name, such as vit_base_patch16_224.augreg_in21k.

    Paths, URLs and timm's other sources (hf-hub:, local-dir:) are refused.
    """
    if not isinstance(backbone, str) or not _NAME.fullmatch(backbone):
        raise UserError(f"{shown(backbone)} is not the plain name of a model, such as vit_base_patch16_224")
