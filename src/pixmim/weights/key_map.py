"""Rename tensors between pixmim and another project: tables of key patterns, and changes that renaming cannot do."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pixmim.utils.errors import UserError

Tensors = dict[str, Tensor]
Kind = Literal["vit", "beit", "swin", "convmae", "resnet", "convnext"]


class KeyMap:
    """A table of pairs (other project's key, pixmim's key), readable in both directions.

    `*` matches one part of a dotted key, `**` any number of parts. The stars of both sides match the same texts in
    order. The first matching pair decides.
    """

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._forward = [(_pattern(other), re.split(r"\*\*|\*", own)) for other, own in pairs]
        self._backward = [(_pattern(own), re.split(r"\*\*|\*", other)) for other, own in pairs]

    def to_pixmim(self, key: str) -> str | None:
        """Return pixmim's name of another project's tensor, or None if no pair matches."""
        return _rename(self._forward, key)

    def from_pixmim(self, key: str) -> str | None:
        """Return the other project's name of a tensor of pixmim, or None if no pair matches."""
        return _rename(self._backward, key)


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)"))


def _rename(table: list[tuple[re.Pattern[str], list[str]]], key: str) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(key):
            return template[0] + "".join(a + b for a, b in zip(match.groups(), template[1:], strict=True))
    return None


@dataclass(frozen=True)
class CheckpointFormat:
    """A project's layout of a model's checkpoint.

    Pixmim's names are those of its models' `state_dict`: `encoder.` and timm's names for the encoder, and for the rest
    `decoder.` (MAE, ConvMAE) or `head.`, `mask_token` and of CNNs `mask_scale` (SimMIM).
    """

    name: str  # of the project, for messages
    kind: Kind  # architecture of the encoder
    required: tuple[str, ...]  # identify the format: it is the first in `FORMATS` whose required keys the file contains
    keys: KeyMap
    ignored: tuple[tuple[str, str], ...] = ()  # patterns of keys that no model needs, with the reason
    transforms: tuple[Callable[[Tensors], Tensors], ...] = ()  # applied in order after keys are renamed to pixmim's
    inverse: tuple[Callable[[Tensors], Tensors], ...] = ()  # applied in order before they are renamed back

    def to_pixmim(self, tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
        """Convert tensors to pixmim's names; also return ignored keys with the reason. Raises UserError for others."""
        renamed: Tensors = {}
        ignored: dict[str, str] = {}
        unknown = []
        for key, value in tensors.items():
            reason = next((reason for pattern, reason in self.ignored if fnmatchcase(key, pattern)), None)
            if reason is not None:
                ignored[key] = reason
            elif name := self.keys.to_pixmim(key):
                renamed[name] = value
            else:
                unknown.append(key)
        if unknown:
            raise UserError(f"{len(unknown)} unexpected keys: {', '.join(unknown[:6])}")
        for transform in self.transforms:
            renamed = transform(renamed)
        return renamed, ignored

    def from_pixmim(self, tensors: Tensors) -> Tensors:
        """Convert tensors with pixmim's names to the project's. Raises UserError if a key is not in the table."""
        for transform in self.inverse:
            tensors = transform(tensors)
        renamed: Tensors = {}
        for name, value in tensors.items():
            key = self.keys.from_pixmim(name)
            if key is None:
                raise UserError(f"the format of {self.name} has no key for {name}")
            renamed[key] = value.detach().clone().contiguous()
        return renamed


def fuse_qkv(tensors: Tensors) -> Tensors:
    """Concatenate q, k and v to one qkv, with zeros for a missing bias of k; Beit keeps its biases, as in timm."""
    fused = dict(tensors)
    for name in tensors:
        if name.endswith((".attn.q.weight", ".attn.q.bias")):
            stem, kind = name.rsplit(".q.", 1)
            fused[f"{stem}.qkv.{kind}"] = torch.cat([fused.pop(f"{stem}.{part}.{kind}") for part in "qkv"])
        elif name.endswith(".attn.q_bias") and name.replace("attn.q_bias", "gamma_1") not in tensors:
            q, v = fused.pop(name), fused.pop(name.replace("q_bias", "v_bias"))
            fused[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return fused


def split_qkv(tensors: Tensors) -> Tensors:
    """Invert `fuse_qkv` for separate q, k and v."""
    split: Tensors = {}
    for name, value in tensors.items():
        parts = zip("qkv", value.chunk(3), strict=True) if ".attn.qkv." in name else ()
        split |= {name.replace(".qkv.", f".{part}."): chunk for part, chunk in parts} or {name: value}
    return split


def split_class_tokens(tensors: Tensors) -> Tensors:
    """Split several class tokens (Pixio) into timm's one, and registers."""
    token = tensors.get("encoder.cls_token")
    if token is None or token.ndim != 3 or token.shape[1] < 2 or "encoder.reg_token" in tensors:
        return tensors
    return tensors | {"encoder.cls_token": token[:, :1], "encoder.reg_token": token[:, 1:]}


def join_class_tokens(tensors: Tensors) -> Tensors:
    """Invert `split_class_tokens`."""
    joined = dict(tensors)
    if "encoder.reg_token" in joined:
        joined["encoder.cls_token"] = torch.cat([joined["encoder.cls_token"], joined.pop("encoder.reg_token")], dim=1)
    return joined


def drop_key_bias(tensors: Tensors) -> Tensors:
    """Remove Beit's bias of k, a buffer of zeros in timm."""
    return {name: value for name, value in tensors.items() if not name.endswith("k_bias")}


def fold_batch_norm(tensors: Tensors) -> Tensors:
    """Fold a linear probe's BatchNorm without weights, (x - mean) / sqrt(variance + 1e-6), into the following head."""
    folded = dict(tensors)
    mean, variance = folded.pop("probe.running_mean", None), folded.pop("probe.running_var", None)
    folded.pop("probe.num_batches_tracked", None)
    if mean is not None and variance is not None and "encoder.head.weight" in folded:
        weight = folded["encoder.head.weight"].double() / (variance.double() + 1e-6).sqrt()
        bias = folded["encoder.head.bias"].double() - weight @ mean.double()
        folded["encoder.head.weight"], folded["encoder.head.bias"] = weight.float(), bias.float()
    return folded


def add_final_norm(tensors: Tensors) -> Tensors:
    """Add the final norm of an encoder that was trained without one: a norm with unit weights."""
    width = tensors["encoder.patch_embed.proj.weight"].shape[0]
    return {"encoder.norm.weight": torch.ones(width), "encoder.norm.bias": torch.zeros(width)} | tensors


def _shift_downsampling(tensors: Tensors, offset: int) -> Tensors:
    shifted: Tensors = {}
    for name, value in tensors.items():
        if ".downsample." in name:
            before, rest = name.split(".downsample.")
            stem, stage = before.rsplit(".", 1)
            name = f"{stem}.{int(stage) + offset}.downsample.{rest}"
        shifted[name] = value
    return shifted


# Swin's patch merging is at the end of a stage in the original code, and at the start of the next one in timm.
downsampling_to_next_stage = partial(_shift_downsampling, offset=+1)
downsampling_to_previous_stage = partial(_shift_downsampling, offset=-1)


def reorder_merged_patches(tensors: Tensors) -> Tensors:
    """Reorder the four neighbors that Swin's patch merging concatenates.

    mmcv's unfold orders them channel by channel and row by row, timm neighbor by neighbor and column by column.
    """
    return {
        name: value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)
        if ".downsample.norm." in name or name.endswith(".downsample.reduction.weight")
        else value
        for name, value in tensors.items()
    }
