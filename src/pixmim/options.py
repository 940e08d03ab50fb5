"""The keywords that a model takes: an allow-list with types and bounds.

They come from files (metadata of weights, a run's config.json) and from the command line, and end in timm's
constructors, whose other keywords name files, URLs and classes. Whoever builds a model passes `check_options` and
`check_name` first.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pixmim.errors import UserError, nearest, shown

MAX_SIDE = 16_384
"""Largest image side in pixels."""

MAX_CHANNELS = 4_096

MAX_WIDTH = 16_384
"""Largest width of a layer; the widest published ViT has 6,144."""

MAX_DEPTH = 96
"""Most blocks, in all stages together; the deepest published ViT has 48."""

_NAME = re.compile(r"[a-z0-9_]{1,100}(\.[a-z0-9_]{1,100})?")


@dataclass(frozen=True)
class _Whole:
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
class _Real:
    least: float
    most: float

    def takes(self, value: object) -> bool:
        return type(value) in (int, float) and self.least <= value <= self.most  # type: ignore[operator]

    def __str__(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class _Choice:
    values: tuple[object, ...]

    def takes(self, value: object) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(one) for one in self.values)


_FLAG = _Choice((True, False))
_RATE = _Real(0, 1)

KEYWORDS: dict[str, _Whole | _Real | _Choice] = {
    # of every backbone
    "img_size": _Whole(1, MAX_SIDE, many=2),
    "in_chans": _Whole(1, MAX_CHANNELS),
    "num_classes": _Whole(0, 1_000_000),
    "patch_size": _Whole(1, 1_024, many=2),
    "embed_dim": _Whole(1, MAX_WIDTH, many=5),
    "depth": _Whole(1, MAX_DEPTH, many=5, together=True),
    "depths": _Whole(1, MAX_DEPTH, many=5, together=True),
    "num_heads": _Whole(1, 1_024, many=5),
    "head_dim": _Whole(1, 1_024),
    "window_size": _Whole(1, 1_024, many=5),
    "mlp_ratio": _Real(0.01, 64),
    "norm_eps": _Real(0, 0.1),
    "init_values": _Real(0, 100),
    "head_init_scale": _Real(0, 100),
    "reg_tokens": _Whole(0, 1_024),
    "global_pool": _Choice(("", "avg", "avgmax", "max", "token", "map", "prr")),
    "pos_embed": _Choice(("", "none", "learn")),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), _RATE),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), _RATE),
    **dict.fromkeys(("qkv_bias", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm"), _FLAG),
    **dict.fromkeys(("class_token", "no_embed_class", "pool_include_prefix", "fix_init"), _FLAG),
    **dict.fromkeys(("pre_norm", "final_norm", "fc_norm", "use_fc_norm"), _FLAG),
    **dict.fromkeys(("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"), _FLAG),
    **dict.fromkeys(("swiglu_mlp", "scale_mlp", "always_partition"), _FLAG),
    # of what decodes
    "decoder_dim": _Whole(1, MAX_WIDTH),
    "decoder_depth": _Whole(0, MAX_DEPTH),
    "decoder_heads": _Whole(1, 1_024),
    "decoder_stride": _Whole(1, 1_024),
    "predict_patch": _Whole(0, MAX_SIDE),
    "outputs": _Whole(1, 4_096),
    "head": _Choice(("linear", "mlp")),
}


NOT_OF_TIMM = ("norm_eps",)
"""Keywords that pixmim carries out itself, since no constructor of timm's takes them."""


def check_options(options: Mapping[str, object]) -> None:
    """Raise UserError unless each is a known keyword with a value of its type, within its bounds."""
    for name, value in options.items():
        kind = KEYWORDS.get(name)
        if kind is None:
            raise UserError(f"a model has no option {shown(name)}{nearest(name, KEYWORDS)}")
        if not kind.takes(value):
            raise UserError(f"the model's option '{name}' must be {kind}, not {shown(value)}")


def check_name(backbone: str) -> None:
    """Raise UserError unless it is the plain name of a model, such as vit_base_patch16_224.augreg_in21k: no path, no
    URL, no other source of timm's (hf-hub:, local-dir:).
    """
    if not isinstance(backbone, str) or not _NAME.fullmatch(backbone):
        raise UserError(f"{shown(backbone)} is not the plain name of a model, such as vit_base_patch16_224")
