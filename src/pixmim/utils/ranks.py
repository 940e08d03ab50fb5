"""Ranks of the values in each row, and inverse permutations: what masks are sorted with."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ranks(values: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return the rank of each value in its row. Stable, so that devices agree on ties."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        return inverse(_stable_argsort(values))
    return inverse(torch.argsort(values, dim=1, stable=True))


def _stable_argsort(values: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Sort float32 values on a CPU as integers, with the index of each in the lower bits: a tenth of argsort's time."""
    bits = (values + 0.0).view(torch.int32).long()  # the sum replaces -0, which equals 0, by 0
    ascending = bits ^ (bits >> 31 & 0x7FFFFFFF)  # negative numbers descend with their bits
    keys = ascending << 32 | torch.arange(values.shape[1], device=values.device)
    keys.numpy().sort(axis=1)  # NumPy's is vectorized
    return keys & 0xFFFFFFFF


def inverse(permutation: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return the inverse of the permutation in each row."""
    numbers = torch.arange(permutation.shape[1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, numbers)
