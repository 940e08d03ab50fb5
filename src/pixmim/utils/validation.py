"""What settings may be: ranges beside the fields of settings, and the keywords that a model takes.

Keywords come from files (metadata of weights, a run's config.json) and from the command line, and end in timm's
constructors, whose other keywords name files, URLs and classes. Whoever builds a model passes `check_options` and
`check_name` first.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pixmim.utils.errors import UserError, did_you_mean, shown

MAX_SIDE = 16_384
"""Largest image side in pixels."""

MAX_CHANNELS = 4_096

MAX_WIDTH = 16_384
"""Largest width of a layer; the widest published ViT has 6,144."""

MAX_DEPTH = 96
"""Most blocks, in all stages together; the deepest published ViT has 48."""

_NAME = re.compile(r"[a-z0-9_]{1,100}(\.[a-z0-9_]{1,100})?")


@dataclass(frozen=True)
class Whole:
    """A whole number, or up to `many` of them; `together` bounds their sum too."""

    least: int
    most: int
    many: int = 1
    together: bool = False

    def takes(self, value: object) -> bool:
        values = value if isinstance(value, list | tuple) and 1 <= len(value) <= self.many > 1 else [value]
        fits = all(type(one) is int and self.least <= one <= self.most for one in values)
        return fits and not (self.together and sum(values) > self.most)

    def __str__(self) -> str:
        several = f", or up to {self.many} of them" if self.many > 1 else ""
        return f"a whole number from {self.least} to {self.most:,}{several}{' in all' if self.together else ''}"


@dataclass(frozen=True)
class Real:
    """A number from `least` to `most`. `above`, `below`: these themselves excluded."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def takes(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low = self.least < value if self.above else self.least <= value
        return low and (value < self.most if self.below else value <= self.most)  # NaN fails

    def __str__(self) -> str:
        low, high = "above" if self.above else "from", "and below" if self.below else "to"
        return f"a number {low} {self.least:g} {high} {self.most:g}"


@dataclass(frozen=True)
class Text:
    """A text that matches a pattern; `about` describes it."""

    pattern: str
    about: str

    def takes(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value, re.DOTALL) is not None

    def __str__(self) -> str:
        return self.about


@dataclass(frozen=True)
class Choice:
    values: tuple[object, ...]

    def takes(self, value: object) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(one) for one in self.values)


_FLAG = Choice((True, False))
_RATE = Real(0, 1)

KEYWORDS: dict[str, Whole | Real | Choice] = {
    # of every backbone
    "img_size": Whole(1, MAX_SIDE, many=2),
    "in_chans": Whole(1, MAX_CHANNELS),
    "num_classes": Whole(0, 1_000_000),
    "patch_size": Whole(1, 1_024, many=2),
    "embed_dim": Whole(1, MAX_WIDTH, many=5),
    "depth": Whole(1, MAX_DEPTH, many=5, together=True),
    "depths": Whole(1, MAX_DEPTH, many=5, together=True),
    "num_heads": Whole(1, 1_024, many=5),
    "head_dim": Whole(1, 1_024),
    "window_size": Whole(1, 1_024, many=5),
    "mlp_ratio": Real(0.01, 64),
    "norm_eps": Real(0, 0.1),
    "init_values": Real(0, 100),
    "head_init_scale": Real(0, 100),
    "reg_tokens": Whole(0, 1_024),
    "global_pool": Choice(("", "avg", "avgmax", "max", "token", "map", "prr")),
    "pos_embed": Choice(("", "none", "learn")),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), _RATE),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), _RATE),
    **dict.fromkeys(("qkv_bias", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm"), _FLAG),
    **dict.fromkeys(("class_token", "no_embed_class", "pool_include_prefix", "fix_init"), _FLAG),
    **dict.fromkeys(("pre_norm", "final_norm", "fc_norm", "use_fc_norm"), _FLAG),
    **dict.fromkeys(("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"), _FLAG),
    **dict.fromkeys(("swiglu_mlp", "scale_mlp", "always_partition"), _FLAG),
    # of what decodes
    "decoder_dim": Whole(1, MAX_WIDTH),
    "decoder_depth": Whole(0, MAX_DEPTH),
    "decoder_heads": Whole(1, 1_024),
    "decoder_stride": Whole(1, 1_024),
    "predict_patch": Whole(0, MAX_SIDE),
    "outputs": Whole(1, 4_096),
    "head": Choice(("linear", "mlp")),
}


NOT_OF_TIMM = ("norm_eps",)
"""Keywords that pixmim carries out itself, since no constructor of timm's takes them."""


@dataclass(frozen=True)
class Sides:
    """A side in pixels, or HEIGHTxWIDTH; with `empty`, or nothing for a model's own."""

    empty: bool = False

    def takes(self, value: object) -> bool:
        return isinstance(value, str) and (parse_size(value) is not None or (self.empty and not value))

    def __str__(self) -> str:
        return f"a number of pixels such as 224, or HEIGHTxWIDTH such as 192x384, at most {MAX_SIDE:,} each"


def parse_size(text: str) -> tuple[int, int] | None:
    """Return height and width, or None for a text that is not a size."""
    if not re.fullmatch(r"(?i)[0-9]{1,8}(x[0-9]{1,8})?", text):
        return None
    sides = [int(side) for side in text.lower().split("x")]
    return (sides[0], sides[-1]) if all(1 <= side <= MAX_SIDE for side in sides) else None


Rule = Whole | Real | Choice | Text | Sides

Positive = Annotated[float, Real(0, 1e9, above=True)]
Count = Annotated[int, Whole(1, 999_999_999)]
Some = Annotated[int, Whole(0, 999_999_999)]
Seed = Annotated[int, Whole(0, 2**63 - 1)]
Threads = Annotated[int, Whole(0, 1_024)]
Share = Annotated[float, Real(0, 1)]
LearningRate = Annotated[float, Real(0, 100, above=True)]
Rate = Annotated[float, Real(0, 100)]
"""A learning rate at an end of a schedule."""
Data = Annotated[str, Text(".+", "data: a folder or what else --data takes")]
Device = Annotated[str, Text(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", "auto, cpu, cuda, cuda:1 or mps")]
Size = Annotated[str, Sides()]


class Settings:
    """Settings whose fields are checked, by the rules that annotate them, whenever some are made."""

    def __post_init__(self) -> None:
        check(self)


def check(settings: Any, prefix: str = "--") -> None:
    """Raise UserError for a field whose value breaks the rule that annotates it, or is of another type.

    The message names the field as its flag, which begins with `prefix`.
    """
    for name, hint in hints_of(settings.__class__).items():
        value, flag = getattr(settings, name), prefix + name.replace("_", "-")
        if is_dataclass(value):
            flat = any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))
            check(value, prefix if flat else f"{flag}.")
        else:
            check_value(flag, value, hint)


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass, with the rules that annotate it."""
    hints = get_type_hints(cls, include_extras=True)
    return {one.name: hints[one.name] for one in fields(cls)}


def check_value(flag: str, value: object, hint: Any) -> None:
    """Raise UserError unless a flag's value is of its type and keeps the rules that annotate it."""
    if isinstance(value, dict):
        check_options(value)
    expected = _expected(value, hint)
    if expected:
        raise UserError(f"{flag} must be {expected}, not {shown(value)}")


def _expected(value: object, hint: Any) -> str:
    """Return what should stand in place of a value, or an empty text if it fits."""
    kind, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, TypeVar):  # of settings that may be left out
        return _expected(value, type(None))
    if kind is Annotated:
        rule = next((mark for mark in hint.__metadata__ if isinstance(mark, Rule)), None)
        if rule is None or isinstance(rule, Text) or get_origin(inner[0]) is None:
            return _expected(value, inner[0]) if rule is None or rule.takes(value) else str(rule)
        several = value if isinstance(value, tuple) else (value,)
        numbers = [one for one in several if isinstance(one, int | float)]  # None and words are the type's business
        return _expected(value, inner[0]) or ("" if all(map(rule.takes, numbers)) else str(rule))
    if kind in (Union, UnionType):
        found = [_expected(value, one) for one in inner]
        return "" if "" in found else " or ".join(found)
    if kind is Literal:
        fits = any(type(value) is type(one) and value == one for one in inner)
        return "" if fits else "one of " + ", ".join(map(str, inner))
    if kind is tuple:
        any_number = inner[-1] is Ellipsis
        if not isinstance(value, tuple) or not (any_number or len(value) == len(inner)):
            return "several values" if any_number else f"{len(inner)} values"
        return next(filter(None, map(_expected, value, inner[:1] * len(value) if any_number else inner)), "")
    if hint is float:
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if hint is str:
        return "" if isinstance(value, str) and "\0" not in value else "a text"
    if kind is dict:
        return "" if isinstance(value, dict) else "names and values"
    if hint in (int, bool, type(None)):
        word = {int: "a whole number", bool: "true or false", type(None): "nothing"}[hint]
        return "" if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)) else word
    return ""


def check_options(options: Mapping[str, object]) -> None:
    """Raise UserError unless each is a known keyword with a value of its type, within its bounds."""
    for name, value in options.items():
        kind = KEYWORDS.get(name)
        if kind is None:
            raise UserError(f"a model has no option {shown(name)}{did_you_mean(name, KEYWORDS)}")
        if not kind.takes(value):
            raise UserError(f"the model's option '{name}' must be {kind}, not {shown(value)}")


def check_name(backbone: str) -> None:
    """Raise UserError unless it is the plain name of a model, such as vit_base_patch16_224.augreg_in21k: no path, no
    URL, no other source of timm's (hf-hub:, local-dir:).
    """
    if not isinstance(backbone, str) or not _NAME.fullmatch(backbone):
        raise UserError(f"{shown(backbone)} is not the plain name of a model, such as vit_base_patch16_224")
