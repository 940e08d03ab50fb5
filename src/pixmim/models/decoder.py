"""MAE's decoder: a small transformer over all patches, the hidden ones filled with one learnt token."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.grid import sincos_positions
from pixmim.masking import Mask
from pixmim.models.vit import gather, init_like_mae


class Decoder(nn.Module):
    """From an encoder's tokens to a prediction for every patch.

    width   of the encoder's tokens
    grid    (rows, columns) of patches
    values  to predict for each patch: p*p*c
    prefix  tokens before the patches (cls, registers); they go through the blocks and are dropped at the end
    dim, depth, heads  of the blocks: pre-norm, MLP ratio 4, norms with eps 1e-6; (512, 8, 16) in MAE's paper
    """

    def __init__(
        self, width: int, grid: tuple[int, int], values: int, prefix: int, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.prefix = prefix
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = F.pad(sincos_positions(dim, grid), (0, 0, prefix, 0))
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, values)
        init_like_mae(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Float[Tensor, "b m width"], mask: Mask) -> Float[Tensor, "b n d"]:
        """Predict all patches from the prefix and visible tokens, m = prefix + k."""
        keep, restore = mask.tables
        tokens = self.embed(tokens)
        prefix, visible = tokens[:, : self.prefix], tokens[:, self.prefix :]
        b, n = restore.shape
        blanks = self.mask_token.to(visible.dtype).expand(b, n - keep.shape[1], -1)
        tokens = torch.cat([prefix, gather(torch.cat([visible, blanks], dim=1), restore)], dim=1)
        return self.predict(self.norm(self.blocks(tokens + self.pos_embed)))[:, self.prefix :]
