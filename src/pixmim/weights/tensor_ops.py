"""What a change of names does not do: tensors joined, split, folded or moved, all with pixmim's names."""

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def fuse_qkv(tensors: Tensors) -> Tensors:
    """Separate q, k, v as one qkv, and a bias for q and v alone with zeros for k: timm's ViT and Swin have one matrix.

    Beit, which has no bias for k, keeps its two in timm, too.
    """
    found = dict(tensors)
    for name in tensors:
        if name.endswith((".attn.q.weight", ".attn.q.bias")):
            stem, kind = name.rsplit(".q.", 1)
            found[f"{stem}.qkv.{kind}"] = torch.cat([found.pop(f"{stem}.{part}.{kind}") for part in "qkv"])
        elif name.endswith(".attn.q_bias") and name.replace("attn.q_bias", "gamma_1") not in tensors:
            q, v = found.pop(name), found.pop(name.replace("q_bias", "v_bias"))
            found[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return found


def split_qkv(tensors: Tensors) -> Tensors:
    """The inverse of `fuse_qkv` for separate q, k and v."""
    found: Tensors = {}
    for name, value in tensors.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = piece.contiguous()
        else:
            found[name] = value
    return found


def fold_batch_norm(tensors: Tensors) -> Tensors:
    """A linear probe's BatchNorm without weights, (x - mean) / sqrt(variance + 1e-6), folded into the head after it."""
    found = dict(tensors)
    mean, variance = found.pop("probe.running_mean", None), found.pop("probe.running_var", None)
    found.pop("probe.num_batches_tracked", None)
    if mean is not None and variance is not None and "encoder.head.weight" in found:
        weight = found["encoder.head.weight"].double() / (variance.double() + 1e-6).sqrt()
        bias = found["encoder.head.bias"].double() - weight @ mean.double()
        found["encoder.head.weight"], found["encoder.head.bias"] = weight.float(), bias.float()
    return found


def move_downsampling(tensors: Tensors) -> Tensors:
    """Swin's step between two stages: the end of the first in the original code, the start of the second in timm."""
    return _shift(tensors, +1)


def move_downsampling_back(tensors: Tensors) -> Tensors:
    """The inverse of `move_downsampling`."""
    return _shift(tensors, -1)


def order_merged(tensors: Tensors) -> Tensors:
    """Swin's step between two stages joins four neighbours' values: here channel by channel in the order of rows
    (mmcv's unfold), in timm neighbour by neighbour in the order of columns.
    """
    found = dict(tensors)
    for name, value in tensors.items():
        if ".downsample.norm." in name or name.endswith(".downsample.reduction.weight"):
            found[name] = value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)
    return found


def _shift(tensors: Tensors, by: int) -> Tensors:
    found: Tensors = {}
    for name, value in tensors.items():
        if ".downsample." in name:
            before, rest = name.split(".downsample.")
            stem, stage = before.rsplit(".", 1)
            name = f"{stem}.{int(stage) + by}.downsample.{rest}"
        found[name] = value
    return found
