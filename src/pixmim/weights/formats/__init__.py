"""The projects whose files pixmim reads. One literal tuple of them."""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from pixmim.weights.format import CheckpointFormat
from pixmim.weights.formats.huggingface import HF_BEIT, HF_BEIT_BODY, HF_SWIN, HF_SWIN_BODY, HF_VIT, HF_VIT_BODY
from pixmim.weights.formats.official import CONVMAE, MAE, SIMMIM_SWIN, SIMMIM_VIT, SWIN
from pixmim.weights.formats.openmmlab import MM, MM_BODY, MM_SWIN, MM_SWIN_BODY
from pixmim.weights.formats.timm import BEIT, TIMM_SWIN, TIMM_VIT

FORMATS = (
    MAE,
    CONVMAE,
    SIMMIM_SWIN,
    SIMMIM_VIT,
    SWIN,
    TIMM_SWIN,
    BEIT,
    MM,
    MM_BODY,
    MM_SWIN,
    MM_SWIN_BODY,
    HF_VIT,
    HF_BEIT,
    HF_BEIT_BODY,  # before the body of a ViT, whose marks it has as well
    HF_VIT_BODY,
    HF_SWIN,
    HF_SWIN_BODY,
    TIMM_VIT,
)


def detect_format(keys: Collection[str], prefix: str = "") -> CheckpointFormat | None:
    """The first source all of whose marks are among the keys, behind a prefix, or None."""
    return next((source for source in FORMATS if all(prefix + mark in keys for mark in source.marks)), None)


_WRAPPER = re.compile(
    r"((base|ema|image|momentum|online|student|target|teacher|vision)_)?"
    r"(backbone|encoder|encoder_[qk]|method|model|module|net|network|trunk|vit|swin|visual)|"
    r"_orig_mod|_forward_module|model_ema|ema|momentum|online|student|target|teacher|feature_extractor"
)
"""Parts of names that training code puts before a model's own (Lightning, solo-learn, lightly, DINO, torch)."""

_MAX_DEPTH, _MAX_PREFIXES = 8, 4_096


def find_format(keys: Collection[str], given: str = "") -> tuple[str, CheckpointFormat | None, list[str]]:
    """Return the prefix behind which there is a model that pixmim knows, its source, and the other such prefixes.

    The shortest prefix decides, and between several of one length first one that is neither a student's nor a
    teacher's, then a teacher's.

    Args:
        keys: Names of tensors.
        given: The prefix to look behind; it ends with a dot, or is empty.
    """
    prefixes = {given: None}
    for key in keys:
        parts, depth = key.removeprefix(given).split(".") if key.startswith(given) else [], 0
        while depth < min(len(parts), _MAX_DEPTH) and _WRAPPER.fullmatch(parts[depth]):
            depth += 1
            if len(prefixes) < _MAX_PREFIXES:
                prefixes[given + "".join(f"{part}." for part in parts[:depth])] = None
    ranked = sorted(prefixes, key=lambda prefix: (prefix.count("."), _rank(prefix)))
    found = [(prefix, source) for prefix in ranked if (source := detect_format(keys, prefix)) is not None]
    if not found:
        return given, None, []
    (prefix, source), others = found[0], [other for other, _ in found[1:]]
    return prefix, source, [other for other in others if not other.startswith(prefix)]


def _rank(prefix: str) -> int:
    if re.search("teacher|ema|online", prefix):
        return 1
    return 2 if re.search("student|momentum|target|encoder_k", prefix) else 0


_FOREIGN = (
    ("*attn.logit_scale", "a Swin V2"),
    ("*self.logit_scale", "a Swin V2"),
    ("*.ls1.gamma", "a ViT with layer scale, such as DINOv2's or DeiT III's"),
    ("*.layer_scale1.lambda1", "a ViT with layer scale, such as DINOv2's"),
    ("*.mlp.w12.weight", "a ViT with SwiGLU, such as DINOv2's largest"),
    ("*rope*", "a ViT with rotary positions, such as EVA-02's or DINOv3's"),
    ("*attn.q_norm.weight", "a ViT with normalized queries and keys"),
    ("*attn.rel_pos_h", "a ViT with decomposed relative positions, such as SAM's or ViTDet's"),
    ("*dist_token", "a DeiT with a distillation token"),
    ("*distillation_token", "a DeiT with a distillation token"),
    ("*norm_pre.weight", "a ViT of CLIP"),
    ("*resblocks.0.ln_1.weight", "a transformer of CLIP"),
    ("*pre_layrnorm.weight", "a transformer of CLIP"),
    ("*absolute_pos_embed", "a Swin with absolute positions"),
)
_ATTENTION = ("*attn*", "*attention*", "*qkv*", "*self_att*")
_CONVOLUTION = ("*conv*.weight", "*bn1.running_mean", "*features.0.weight", "*dwconv.weight", "*downsample*.weight")


def describe_unsupported(tensors: Mapping[str, Tensor]) -> str:
    """Return what a model is that pixmim does not use, as far as the names of its tensors tell; empty otherwise."""
    for pattern, what in _FOREIGN:
        if any(fnmatchcase(key, pattern) for key in tensors):
            return what
    if any(fnmatchcase(key, pattern) for key in tensors for pattern in _ATTENTION):
        return ""
    convolves = any(fnmatchcase(key, pattern) and v.ndim == 4 for key, v in tensors.items() for pattern in _CONVOLUTION)
    return "a convolutional network (CNN), such as a ResNet or a ConvNeXt" if convolves else ""
