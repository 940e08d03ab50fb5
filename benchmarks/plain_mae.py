"""MAE in plain PyTorch and float32: the reference of the benchmarks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


class PlainMAE(nn.Module):
    """Embeds every patch, keeps a quarter, decodes all; the loss is on normalized pixels."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, decoder: tuple[int, int, int] = (512, 8, 16)
    ) -> None:
        super().__init__()
        n, (thin, layers, thin_heads) = (size // patch) ** 2, decoder
        self.patch = patch
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls, self.blank = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 1, thin))
        self.positions = nn.Parameter(torch.randn(1, n + 1, width), requires_grad=False)
        self.decoder_positions = nn.Parameter(torch.randn(1, n + 1, thin), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width, eps=1e-6))
        self.narrow = nn.Linear(width, thin)
        self.decoder = nn.Sequential(*(Block(thin, thin_heads) for _ in range(layers)), nn.LayerNorm(thin, eps=1e-6))
        self.predict = nn.Linear(thin, patch * patch * 3)

    def forward(self, images: Tensor) -> Tensor:
        b, p = len(images), self.patch
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        n, d = x.shape[1:]
        order = torch.rand(b, n, device=x.device).argsort(dim=1)
        back, kept = order.argsort(dim=1), order[:, : n // 4]
        x = x.gather(1, kept[..., None].expand(-1, -1, d))
        x = self.narrow(self.blocks(torch.cat([(self.cls + self.positions[:, :1]).expand(b, -1, -1), x], dim=1)))
        full = torch.cat([x[:, 1:], self.blank.expand(b, n - n // 4, -1)], dim=1)
        full = full.gather(1, back[..., None].expand(-1, -1, full.shape[2]))
        full = self.decoder(torch.cat([x[:, :1], full], dim=1) + self.decoder_positions)
        prediction = self.predict(full)[:, 1:]
        g = images.shape[-1] // p
        target = images.reshape(b, 3, g, p, g, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n, p * p * 3)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = (back >= n // 4).float()
        return ((prediction - target).square().mean(-1) * hidden).sum() / hidden.sum()
