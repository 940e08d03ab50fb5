"""Small random checkpoints in the official formats, and slow reference forwards of the official models.

Keys and shapes are the published ones. The forwards follow the papers, use the raw tensors of a file, and share no code
with pixmim's models.
"""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
DIM, DEPTH, HEADS, PATCH, SIDE = 48, 2, 3, 8, 32
WIDE, DECODER_HEADS = 24, 4  # of the decoder
GRID = SIDE // PATCH


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Return random tensors, so that any missing, swapped or transposed one changes the output."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) < 2 or shape[0] == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.randn(shape, generator=generator) * scale + (1.0 if _is_scale(name) else 0.0)
    return state


def _is_scale(name: str) -> bool:
    return ("norm" in name or ".ln" in name) and name.endswith("weight")


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, inputs: int, outputs: int, k: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, k, k), f"{name}.bias": (outputs,)}


def blocks(name: str, width: int, depth: int, key_bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        b = f"{name}.{i}"
        shapes |= norm(f"{b}.norm1", width) | linear(f"{b}.attn.qkv", width, 3 * width)
        if not key_bias:
            del shapes[f"{b}.attn.qkv.bias"]
            shapes |= {f"{b}.attn.q_bias": (width,), f"{b}.attn.v_bias": (width,)}
        shapes |= linear(f"{b}.attn.proj", width, width) | norm(f"{b}.norm2", width)
        shapes |= linear(f"{b}.mlp.fc1", width, 4 * width) | linear(f"{b}.mlp.fc2", 4 * width, width)
    return shapes


def vit(key_bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes = {"cls_token": (1, 1, DIM), "pos_embed": (1, 1 + GRID**2, DIM)} | conv("patch_embed.proj", 3, DIM, PATCH)
    return shapes | blocks("blocks", DIM, DEPTH, key_bias)


def decoder(prefix: int, width: int = DIM, patch: int = PATCH, n: int = GRID**2) -> dict[str, tuple[int, ...]]:
    shapes = {"mask_token": (1, 1, WIDE), "decoder_pos_embed": (1, prefix + n, WIDE)}
    shapes |= linear("decoder_embed", width, WIDE) | blocks("decoder_blocks", WIDE, 1) | norm("decoder_norm", WIDE)
    return shapes | linear("decoder_pred", WIDE, 3 * patch * patch)


def mae(key_bias: bool = True) -> State:
    return random(vit(key_bias) | norm("norm", DIM) | decoder(1))


def crossmae(depth: int = 3) -> State:
    """Return the tensors of CrossMAE with weighted feature maps, the input among them: no final norm of the encoder."""
    shapes = {"mask_token": (1, 1, WIDE), "decoder_pos_embed": (1, 1 + GRID**2, WIDE), "wfm.linear.weight": (depth, 3)}
    for i in range(depth):
        b = f"decoder_blocks.{i}"
        shapes |= norm(f"dec_norms.{i}", DIM) | norm(f"{b}.norm1", WIDE) | linear(f"{b}.cross_attn.q", WIDE, WIDE)
        shapes |= linear(f"{b}.cross_attn.kv", DIM, 2 * WIDE) | linear(f"{b}.cross_attn.proj", WIDE, WIDE)
        shapes |= norm(f"{b}.norm2", WIDE) | linear(f"{b}.mlp.fc1", WIDE, 4 * WIDE)
        shapes |= linear(f"{b}.mlp.fc2", 4 * WIDE, WIDE)
    return random(vit() | shapes | norm("decoder_norm", WIDE) | linear("decoder_pred", WIDE, 3 * PATCH**2))


def mae_training_file(path: Path) -> State:
    """Save what main_pretrain saves. Its `input_size` is unrelated to the model."""
    state = mae()
    args = Namespace(model="mae_vit_tiny", input_size=224, norm_pix_loss=False, mask_ratio=0.6, output_dir=path.parent)
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}, path)
    return state


CONV_DIMS = (16, 24, DIM)


def convmae(classes: int = 0) -> State:
    a, b, c = CONV_DIMS
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 4, c)}
    for i, (inputs, width, k) in enumerate([(3, a, 4), (a, b, 2), (b, c, 2)], start=1):
        shapes |= conv(f"patch_embed{i}.proj", inputs, width, k) | norm(f"patch_embed{i}.norm", width)
    shapes |= linear("patch_embed4", c, c)
    for stage, width in ((1, a), (2, b)):
        for i in range(2):
            name = f"blocks{stage}.{i}"
            shapes |= norm(f"{name}.norm1", width) | conv(f"{name}.conv1", width, width, 1)
            shapes |= conv(f"{name}.attn", 1, width, 5) | conv(f"{name}.conv2", width, width, 1)
            shapes |= norm(f"{name}.norm2", width) | conv(f"{name}.mlp.fc1", width, 4 * width, 1)
            shapes |= conv(f"{name}.mlp.fc2", 4 * width, width, 1)
    shapes |= blocks("blocks3", c, DEPTH)
    if classes:
        return random(shapes | norm("fc_norm", c) | linear("head", c, classes))
    shapes |= conv("stage1_output_decode", a, c, 4) | conv("stage2_output_decode", b, c, 2) | norm("norm", c)
    return random(shapes | decoder(0, c, 16, 4))


SWIN_DIM, SWIN_DEPTHS, SWIN_HEADS, WINDOW, SWIN_SIDE = 12, (2, 2), (1, 2), 4, 32


def swin() -> dict[str, tuple[int, ...]]:
    """Return the original code's keys, with patch merging at the end of a stage."""
    shapes = conv("patch_embed.proj", 3, SWIN_DIM, 4) | norm("patch_embed.norm", SWIN_DIM)
    for s, depth in enumerate(SWIN_DEPTHS):
        width = SWIN_DIM * 2**s
        shapes |= blocks(f"layers.{s}.blocks", width, depth)
        for i in range(depth):
            shapes[f"layers.{s}.blocks.{i}.attn.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, SWIN_HEADS[s])
        if s + 1 < len(SWIN_DEPTHS):
            shapes[f"layers.{s}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= norm(f"layers.{s}.downsample.norm", 4 * width)
    return shapes | norm("norm", SWIN_DIM * 2)


def simmim_swin() -> State:
    state = {f"encoder.{name}": value for name, value in random(swin()).items()}
    state |= random({"encoder.mask_token": (1, 1, SWIN_DIM)} | conv("decoder.0", 2 * SWIN_DIM, 3 * 8 * 8, 1))
    for s, depth in enumerate(SWIN_DEPTHS):
        for i in range(depth):
            index = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
            state[f"encoder.layers.{s}.blocks.{i}.attn.relative_position_index"] = index
    state["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, WINDOW**2, WINDOW**2)
    return state


def beit(shared: bool) -> dict[str, tuple[int, ...]]:
    shapes = {"cls_token": (1, 1, DIM)} | conv("patch_embed.proj", 3, DIM, PATCH)
    shapes |= blocks("blocks", DIM, DEPTH, key_bias=False)
    table = ((2 * GRID - 1) ** 2 + 3, HEADS)
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.gamma_1": (DIM,), f"blocks.{i}.gamma_2": (DIM,)}
        if not shared:
            shapes[f"blocks.{i}.attn.relative_position_bias_table"] = table
    return shapes | ({"rel_pos_bias.relative_position_bias_table": table} if shared else {})


def simmim_vit() -> State:
    state = {f"encoder.{name}": value for name, value in random(beit(shared=True) | norm("norm", DIM)).items()}
    state |= random({"encoder.mask_token": (1, 1, DIM)} | conv("decoder.0", DIM, 3 * PATCH * PATCH, 1))
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    return state


# ---- slow forwards


def attend(x: Tensor, p: State, name: str, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Attend over (b n d), head by head; add `bias` (heads n n), or broadcastable, to the scores."""
    w = p[f"{name}.qkv.weight"]
    d = w.shape[1]
    b = p.get(f"{name}.qkv.bias")
    if b is None:
        b = torch.cat([p[f"{name}.q_bias"], torch.zeros(d), p[f"{name}.v_bias"]])
    q, k, v = (x @ w[i * d : (i + 1) * d].T + b[i * d : (i + 1) * d] for i in range(3))
    size, out = d // heads, []
    for h in range(heads):
        s = slice(h * size, (h + 1) * size)
        scores = q[..., s] @ k[..., s].transpose(-1, -2) / math.sqrt(size)
        scores = scores + (bias[..., h, :, :] if isinstance(bias, Tensor) else bias)
        out.append(scores.softmax(-1) @ v[..., s])
    return torch.cat(out, -1) @ p[f"{name}.proj.weight"].T + p[f"{name}.proj.bias"]


def ln(x: Tensor, p: State, name: str, eps: float = 1e-6) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(x: Tensor, p: State, name: str) -> Tensor:
    x = F.gelu(x @ p[f"{name}.fc1.weight"].flatten(1).T + p[f"{name}.fc1.bias"])
    return x @ p[f"{name}.fc2.weight"].flatten(1).T + p[f"{name}.fc2.bias"]


def run_blocks(x: Tensor, p: State, name: str, heads: int, bias: Any = 0.0, eps: float = 1e-6) -> Tensor:
    i = 0
    while f"{name}.{i}.norm1.weight" in p:
        b = f"{name}.{i}"
        one, two = p.get(f"{b}.gamma_1", 1.0), p.get(f"{b}.gamma_2", 1.0)
        x = x + one * attend(ln(x, p, f"{b}.norm1", eps), p, f"{b}.attn", heads, bias(i) if callable(bias) else bias)
        x = x + two * mlp(ln(x, p, f"{b}.norm2", eps), p, f"{b}.mlp")
        i += 1
    return x


def embed(images: Tensor, p: State, name: str = "patch_embed.proj") -> Tensor:
    w = p[f"{name}.weight"]
    return F.conv2d(images, w, p[f"{name}.bias"], stride=w.shape[-1]).flatten(2).transpose(1, 2)


def vit_tokens(images: Tensor, p: State) -> Tensor:
    x = embed(images, p) + p["pos_embed"][:, 1:]
    x = torch.cat([(p["cls_token"] + p["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)
    return run_blocks(x, p, "blocks", HEADS)


def decode(visible: Tensor, cls: Tensor | None, hidden: Tensor, p: State) -> Tensor:
    """Run MAE's decoder image by image, with mask tokens at the hidden patches."""
    out = []
    for i, row in enumerate(hidden):
        tokens = p["mask_token"][0].repeat(len(row), 1)
        tokens[~row] = visible[i] @ p["decoder_embed.weight"].T + p["decoder_embed.bias"]
        if cls is not None:
            tokens = torch.cat([(cls[i : i + 1] @ p["decoder_embed.weight"].T + p["decoder_embed.bias"]), tokens])
        x = run_blocks((tokens + p["decoder_pos_embed"][0])[None], p, "decoder_blocks", DECODER_HEADS)
        x = ln(x, p, "decoder_norm") @ p["decoder_pred.weight"].T + p["decoder_pred.bias"]
        out.append(x[0, 0 if cls is None else 1 :])
    return torch.stack(out)


def mae_forward(images: Tensor, hidden: Tensor, p: State) -> Tensor:
    x = embed(images, p) + p["pos_embed"][:, 1:]
    x = torch.stack([tokens[~row] for tokens, row in zip(x, hidden, strict=True)])
    x = torch.cat([(p["cls_token"] + p["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)
    x = ln(run_blocks(x, p, "blocks", HEADS), p, "norm")
    return decode(x[:, 1:], x[:, 0], hidden, p)


def crossmae_forward(images: Tensor, hidden: Tensor, p: State) -> Tensor:
    """Predict each patch of each image on its own, from a mask token that attends to the visible tokens."""
    embedded, out = embed(images, p) + p["pos_embed"][:, 1:], []
    for tokens, row in zip(embedded, hidden, strict=True):
        levels = [torch.cat([p["cls_token"][0] + p["pos_embed"][0, :1], tokens[~row]])[None]]
        for i in range(DEPTH):
            one = {name.replace(f"blocks.{i}.", "only.0."): v for name, v in p.items() if name.startswith("blocks.")}
            levels.append(run_blocks(levels[-1], one, "only", HEADS))
        predictions = []
        for position in p["decoder_pos_embed"][0, 1:]:
            x, i = p["mask_token"][0, 0] + position, 0
            while f"dec_norms.{i}.weight" in p:
                b, size = f"decoder_blocks.{i}", WIDE // DECODER_HEADS
                mixed = sum(w * level[0] for w, level in zip(p["wfm.linear.weight"][i], levels, strict=True))
                kv = ln(mixed, p, f"dec_norms.{i}") @ p[f"{b}.cross_attn.kv.weight"].T + p[f"{b}.cross_attn.kv.bias"]
                q = p[f"{b}.cross_attn.q.weight"] @ ln(x, p, f"{b}.norm1") + p[f"{b}.cross_attn.q.bias"]
                heads = []
                for h in range(DECODER_HEADS):
                    part = slice(h * size, (h + 1) * size)
                    share = (kv[:, :WIDE][:, part] @ q[part] / size**0.5).softmax(0)
                    heads.append(share @ kv[:, WIDE:][:, part])
                x = x + p[f"{b}.cross_attn.proj.weight"] @ torch.cat(heads) + p[f"{b}.cross_attn.proj.bias"]
                x = x + mlp(ln(x, p, f"{b}.norm2"), p, f"{b}.mlp")
                i += 1
            predictions.append(p["decoder_pred.weight"] @ ln(x, p, "decoder_norm") + p["decoder_pred.bias"])
        out.append(torch.stack(predictions))
    return torch.stack(out)


def convmae_stages(images: Tensor, p: State, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grid = images.shape[-1] // 16
    x, maps = images, []
    for stage in (1, 2, 3):
        w = p[f"patch_embed{stage}.proj.weight"]
        x = F.conv2d(x, w, p[f"patch_embed{stage}.proj.bias"], stride=w.shape[-1]).movedim(1, -1)
        x = F.gelu(ln(x, p, f"patch_embed{stage}.norm", 1e-5))
        for i in range(2 if stage < 3 else 0):
            name = f"blocks{stage}.{i}"
            y = ln(x, p, f"{name}.norm1", 1e-5) @ p[f"{name}.conv1.weight"].flatten(1).T + p[f"{name}.conv1.bias"]
            if hidden is not None:  # upsampled from the last stage's grid, by 4, then by 2
                factor = 8 // 2**stage
                y = y * (~hidden).view(-1, grid, grid).float().kron(torch.ones(factor, factor))[..., None]
            y = F.conv2d(
                y.movedim(-1, 1), p[f"{name}.attn.weight"], p[f"{name}.attn.bias"], padding=2, groups=y.shape[-1]
            )
            x = x + y.movedim(1, -1) @ p[f"{name}.conv2.weight"].flatten(1).T + p[f"{name}.conv2.bias"]
            x = x + mlp(ln(x, p, f"{name}.norm2", 1e-5), p, f"{name}.mlp")
        x = x.movedim(-1, 1)
        maps.append(x)
    tokens = x.flatten(2).transpose(1, 2) @ p["patch_embed4.weight"].T + p["patch_embed4.bias"]
    return maps[0], maps[1], tokens + p["pos_embed"]


def convmae_forward(images: Tensor, hidden: Tensor, p: State) -> Tensor:
    one, two, x = convmae_stages(images, p, hidden)
    finer = embed(one, p, "stage1_output_decode") + embed(two, p, "stage2_output_decode")
    keep = [~row for row in hidden]
    x = run_blocks(torch.stack([t[k] for t, k in zip(x, keep, strict=True)]), p, "blocks3", HEADS)
    x = x + torch.stack([t[k] for t, k in zip(finer, keep, strict=True)])
    return decode(ln(x, p, "norm"), None, hidden, p)


def relative_bias(table: Tensor, window: int, cls: bool) -> Tensor:
    """Return (heads n n) biases by relative position; with a class token, BEiT's three further entries."""
    patches = [(y, x) for y in range(window) for x in range(window)]
    start, n = int(cls), window**2 + int(cls)
    bias = torch.zeros(table.shape[1], n, n)
    for i, (y, x) in enumerate(patches):
        for j, (v, u) in enumerate(patches):
            bias[:, start + i, start + j] = table[(y - v + window - 1) * (2 * window - 1) + (x - u + window - 1)]
    if cls:
        bias[:, 0, :], bias[:, :, 0], bias[:, 0, 0] = table[-3][:, None], table[-2][:, None], table[-1]
    return bias


def swin_map(x: Tensor, p: State) -> Tensor:
    """Attend window by window. In every second block, windows are shifted and attention stays within a region."""
    for s, depth in enumerate(SWIN_DEPTHS):
        for i in range(depth):
            name = f"layers.{s}.blocks.{i}"
            side = x.shape[1]
            shift = WINDOW // 2 if i % 2 and side > WINDOW else 0
            bias = relative_bias(p[f"{name}.attn.relative_position_bias_table"], WINDOW, False)
            y = ln(x, p, f"{name}.norm1", 1e-5).roll((-shift, -shift), (1, 2))
            region = torch.arange(side).roll(-shift)  # 1 for rows and columns that were rolled around the edge
            region = (region < shift).long() if shift else torch.zeros(side, dtype=torch.long)
            out = torch.zeros_like(y)
            for top in range(0, side, WINDOW):
                for left in range(0, side, WINDOW):
                    rows, columns = slice(top, top + WINDOW), slice(left, left + WINDOW)
                    regions = (region[rows, None] * 2 + region[None, columns]).flatten()
                    separate = (regions[:, None] != regions[None, :]).float() * -100
                    window = y[:, rows, columns].flatten(1, 2)
                    y_window = attend(window, p, f"{name}.attn", SWIN_HEADS[s], bias + separate)
                    out[:, rows, columns] = y_window.unflatten(1, (WINDOW, WINDOW))
            x = x + out.roll((shift, shift), (1, 2))
            x = x + mlp(ln(x, p, f"{name}.norm2", 1e-5), p, f"{name}.mlp")
        if f"layers.{s}.downsample.norm.weight" in p:
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = ln(x, p, f"layers.{s}.downsample.norm", 1e-5) @ p[f"layers.{s}.downsample.reduction.weight"].T
    return ln(x, p, "norm", 1e-5)


def swin_embed(images: Tensor, p: State) -> Tensor:
    side = images.shape[-1] // 4
    return ln(embed(images, p), p, "patch_embed.norm", 1e-5).unflatten(1, (side, side))


def simmim_head(x: Tensor, p: State, stride: int) -> Tensor:
    """Convert (b rows columns d) to images; each patch's values are ordered by channel, row, column."""
    x = x @ p["decoder.0.weight"].flatten(1).T + p["decoder.0.bias"]
    b, rows, columns, _ = x.shape
    x = x.view(b, rows, columns, 3, stride, stride).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, 3, rows * stride, columns * stride)


def simmim_swin_forward(images: Tensor, hidden: Tensor, state: State) -> Tensor:
    p = {name.removeprefix("encoder."): value for name, value in state.items()}
    x = swin_embed(images, p)
    x = torch.where(hidden.view(*x.shape[:3], 1), p["mask_token"][:, None], x)
    return simmim_head(swin_map(x, p), p, 8)


def simmim_vit_forward(images: Tensor, hidden: Tensor, state: State) -> Tensor:
    p = {name.removeprefix("encoder."): value for name, value in state.items()}
    x = torch.where(hidden[..., None], p["mask_token"], embed(images, p))
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1)
    bias = relative_bias(p["rel_pos_bias.relative_position_bias_table"], GRID, True)
    x = ln(run_blocks(x, p, "blocks", HEADS, bias), p, "norm")[:, 1:]
    return simmim_head(x.unflatten(1, (GRID, GRID)), p, PATCH)
