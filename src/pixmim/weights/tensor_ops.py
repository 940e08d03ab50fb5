"""What renaming does not do: join, split, fold and move tensors, all with pixmim's names."""

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def fuse_qkv(tensors: Tensors) -> Tensors:
    """Join separate q, k and v to one qkv, with zeros for a bias that k does not have.

    Beit keeps its separate biases of q and v, as in timm.
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
    """Invert `fuse_qkv` for separate q, k and v."""
    found: Tensors = {}
    for name, value in tensors.items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = piece.contiguous()
        else:
            found[name] = value
    return found


def drop_key_bias(tensors: Tensors) -> Tensors:
    """Remove Beit's bias of the keys, a buffer of zeros in timm."""
    return {name: value for name, value in tensors.items() if not name.endswith("k_bias")}


def fold_batch_norm(tensors: Tensors) -> Tensors:
    """Fold a probe's BatchNorm without weights, (x - mean) / sqrt(variance + 1e-6), into the head after it."""
    found = dict(tensors)
    mean, variance = found.pop("probe.running_mean", None), found.pop("probe.running_var", None)
    found.pop("probe.num_batches_tracked", None)
    if mean is not None and variance is not None and "encoder.head.weight" in found:
        weight = found["encoder.head.weight"].double() / (variance.double() + 1e-6).sqrt()
        bias = found["encoder.head.bias"].double() - weight @ mean.double()
        found["encoder.head.weight"], found["encoder.head.bias"] = weight.float(), bias.float()
    return found


def move_downsampling(tensors: Tensors) -> Tensors:
    """Move Swin's step between stages from the end of the first (original code) to the start of the next (timm)."""
    return _shift(tensors, +1)


def move_downsampling_back(tensors: Tensors) -> Tensors:
    """Invert `move_downsampling`."""
    return _shift(tensors, -1)


def order_merged(tensors: Tensors) -> Tensors:
    """Reorder the four neighbors that Swin joins between two stages.

    mmcv's unfold goes channel by channel in the order of rows, timm neighbor by neighbor in the order of columns.
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
