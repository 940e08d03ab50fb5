"""The fusion of several blocks for a decoder: MFF (Liu et al., arXiv 2308.00261)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pixmim.models.vit import init_like_mae


class LevelFusion(nn.Module):
    """A weighted sum of the tokens of every second block, for the decoder: MFF (arXiv 2308.00261).

    Blocks 0, 2, 4, 6, 8 and 11 of 0 to 11, as in its code. All but the last go through a linear map; the weights are
    the softmax of learned numbers, equal at first. The encoder thus need not carry details of the pixels to its last
    block. It adds 2,952,966 parameters to ViT-B, which are left out of the exported encoder.

    Args:
        width: Width of the tokens.
        depth: Number of blocks.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.levels = [*range(0, depth - 2 + depth % 2, 2), depth - 1]
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in self.levels[:-1])
        init_like_mae(self.projections)
        self.weights = nn.Parameter(torch.ones(len(self.levels), 1, 1, 1))

    def forward(self, blocks: nn.Sequential, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Apply the blocks one after another, and return the sum."""
        outputs = []
        for number, block in enumerate(blocks):
            tokens = block(tokens)
            if number in self.levels:
                outputs.append(tokens)
        projected = [layer(level) for layer, level in zip(self.projections, outputs, strict=False)]
        return (torch.stack([*projected, tokens]) * self.weights.softmax(dim=0)).sum(dim=0)
