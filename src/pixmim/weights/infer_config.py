"""What a model's shapes tell of its sizes; and what they can't tell, from the published models or from the caller."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pixmim.config import Option
from pixmim.utils.errors import UserError
from pixmim.utils.validation import MAX_DEPTH

Tensors = Mapping[str, Tensor]
Options = dict[str, Option]


@dataclass
class ModelHints:
    """What the caller, or a file's own settings, say of a model; what nobody says is taken from the published ones.

    img_size  (h, w) of the images that the weights were trained_at for; it must fit their tables
    wanted    (h, w) that they are wanted for: taken for theirs where their tables are for no square
    mean, std, prefix, ema  not of sizes: see `recognize.read_weights`
    assumed   collects, in words, what was taken since nobody said it
    """

    img_size: object = None
    wanted: object = None
    num_heads: object = None
    decoder_heads: object = None
    norm_eps: object = None
    mean: object = None
    std: object = None
    prefix: str = ""
    ema: bool = False
    assumed: list[str] = field(default_factory=list)


VITS = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
"""timm's name of a ViT of this (width, depth, patch)."""

SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2)): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2)): "swin_large_patch4_window7_224",
}
"""timm's name of a Swin of this (width, depths)."""

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Attention heads of the published ViTs, by width."""

DECODER_HEADS = {512: 16, 384: 12}
"""Attention heads of the published decoders (MAE, ConvMAE; LSMAE-base), by width."""

SWIN_SIDES = {6: 192, 7: 224, 12: 192, 14: 224}
"""Image size that the published Swins with this window were trained at (12 for SimMIM's Swin-L)."""


def vit(tensors: Tensors, known: ModelHints) -> tuple[str, Options, tuple[int, int]]:
    """timm's name, keywords and image size (h, w) of a plain ViT. `known` is what the caller or the file says."""
    dim, _, patch, _ = tensors["encoder.patch_embed.proj.weight"].shape
    depth, ratio = count(tensors, "encoder.blocks"), _mlp_ratio(tensors, "encoder.blocks.0", dim)
    heads = _heads(dim, HEADS, known)
    options: Options = {}
    registers = tensors["encoder.reg_token"].shape[1] if "encoder.reg_token" in tensors else 0
    prefix = int("encoder.cls_token" in tensors) + registers
    grid = None
    if "encoder.pos_embed" in tensors:
        places = tensors["encoder.pos_embed"].shape[1]
        placed = prefix if not registers or math.isqrt(places - prefix) ** 2 == places - prefix else 0
        grid = _grid(places - placed, patch, known)
        if registers:
            options |= {"reg_tokens": registers, "no_embed_class": placed == 0}
    else:
        options["pos_embed"] = "none"
    if "encoder.cls_token" not in tensors:
        options |= {"class_token": False, "global_pool": "avg"}
    name = VITS.get((dim, depth, patch))
    if name is None or ratio != 4 or heads != HEADS.get(dim):
        name = VITS[192, 12, 16]
        options |= {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
        options |= {} if ratio == 4 else {"mlp_ratio": ratio}
    size = (grid[0] * patch, grid[1] * patch) if grid else _side(known, 224)
    return name, options | _pooling(tensors), size


def beit(tensors: Tensors, known: ModelHints) -> tuple[str, Options, tuple[int, int]]:
    """timm's name, keywords and image size of a Beit, SimMIM's ViT among them."""
    dim, _, patch, _ = tensors["encoder.patch_embed.proj.weight"].shape
    depth = count(tensors, "encoder.blocks")
    shared = "encoder.rel_pos_bias.relative_position_bias_table" in tensors
    where = "encoder.rel_pos_bias" if shared else "encoder.blocks.0.attn"
    table = tensors.get(f"{where}.relative_position_bias_table")
    absolute = "encoder.pos_embed" in tensors
    options: Options = {
        "use_abs_pos_emb": absolute,
        "use_rel_pos_bias": table is not None and not shared,
        "use_shared_rel_pos_bias": shared,
        "init_values": 0.1 if "encoder.blocks.0.gamma_1" in tensors else 0,
        "global_pool": "token",
    }
    if table is not None:
        heads = table.shape[1]
        size = _beit_size(table.shape[0], patch, known)
    else:
        heads = _heads(dim, HEADS, known)
        size = _side(known, 224)
    if absolute and table is None:
        grid = _grid(tensors["encoder.pos_embed"].shape[1] - 1, patch, known)
        size = (grid[0] * patch, grid[1] * patch)
    name = {(768, 12, 16): "beit_base_patch16_224", (1024, 24, 16): "beit_large_patch16_224"}.get((dim, depth, patch))
    if name is None:
        name = "beit_base_patch16_224"
        options |= {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
        ratio = _mlp_ratio(tensors, "encoder.blocks.0", dim)
        options |= {} if ratio == 4 else {"mlp_ratio": ratio}
    return name, options | _pooling(tensors), size


def swin(tensors: Tensors, known: ModelHints) -> tuple[str, Options, tuple[int, int]]:
    """timm's name, keywords and image size of a Swin. Its largest window is the one it was trained_at with."""
    dim, _, patch, _ = tensors["encoder.patch_embed.proj.weight"].shape
    stages = range(count(tensors, "encoder.layers"))
    depths = tuple(count(tensors, f"encoder.layers.{stage}.blocks") for stage in stages)
    tables = [tensors[f"encoder.layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in stages]
    window = max((math.isqrt(table.shape[0]) + 1) // 2 for table in tables)
    options: Options = {"window_size": window}
    name = SWINS.get((dim, depths))
    if name is None:
        name = SWINS[96, (2, 2, 6, 2)]
        options |= {"embed_dim": dim, "depths": list(depths), "num_heads": [table.shape[1] for table in tables]}
        options |= {} if patch == 4 else {"patch_size": patch}
    if "encoder.head.fc.weight" in tensors:
        options["num_classes"] = tensors["encoder.head.fc.weight"].shape[0]
    # Otherwise the convention: the last stage's map is one window.
    return name, options, _side(known, SWIN_SIDES.get(window, window * patch * 2 ** (len(depths) - 1)))


def convmae(tensors: Tensors, known: ModelHints) -> tuple[str, Options, tuple[int, int]]:
    """pixmim's name, keywords and image size of a ConvMAE encoder."""
    dims = [tensors[f"encoder.patch_embed{stage}.proj.weight"].shape[0] for stage in (1, 2, 3)]
    depths = [count(tensors, f"encoder.blocks{stage}") for stage in (1, 2, 3)]
    grid = _grid(tensors["encoder.pos_embed"].shape[1], 16, known)
    heads = _heads(dims[2], HEADS, known, "num_heads")
    options: Options = {}
    name = "convmae_base"
    if (dims, depths) != ([256, 384, 768], [2, 2, 11]):
        name, options = "convmae_tiny", {"embed_dim": dims, "depth": depths, "num_heads": heads}
    if "encoder.head.weight" in tensors:
        options["num_classes"] = tensors["encoder.head.weight"].shape[0]
    return name, options, (grid[0] * 16, grid[1] * 16)


def decoder(tensors: Tensors, known: ModelHints) -> dict[str, int]:
    """Keywords of MAE's decoder, LSMAE's coarser grid and larger patches among them; nothing where there is none."""
    if "decoder.embed.weight" not in tensors:
        return {}
    dim = tensors["decoder.embed.weight"].shape[0]
    heads = _heads(dim, DECODER_HEADS, known, "decoder_heads", "--decoder-heads")
    found = {"decoder_dim": dim, "decoder_depth": count(tensors, "decoder.blocks"), "decoder_heads": heads}
    if "decoder.downsample.weight" in tensors:
        found["decoder_stride"] = tensors["decoder.downsample.weight"].shape[-1]
        channels = tensors["encoder.patch_embed.proj.weight"].shape[1]
        found["predict_patch"] = math.isqrt(tensors["decoder.predict.weight"].shape[0] // channels)
    return found


def count(tensors: Tensors, prefix: str) -> int:
    """How many numbered parts there are under a name. Raises UserError for more than a model can have."""
    pattern = re.compile(re.escape(prefix) + r"\.([0-9]{1,9})\.")
    found = (pattern.match(name) for name in tensors)
    most = 1 + max((int(match[1]) for match in found if match), default=-1)
    if most > MAX_DEPTH:
        raise UserError(f"it counts its {prefix} up to {most:,}: at most {MAX_DEPTH}")
    return most


def pair(size: object) -> tuple[int, int]:
    """A side, or (h, w), as (h, w)."""
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return int(str(size)), int(str(size))


def _heads(
    dim: int, published: dict[int, int], known: ModelHints, keyword: str = "num_heads", flag: str = "--heads"
) -> int:
    said = getattr(known, keyword)
    if said is not None:
        return int(said)
    if dim not in published:
        raise UserError(f"shapes do not tell how many attention heads a width of {dim} has: give {flag} ({keyword})")
    known.assumed.append(f"{flag} {published[dim]}")
    return published[dim]


def _grid(places: int, patch: int, known: ModelHints) -> tuple[int, int]:
    """Rows and columns of a table of positions: those of the image size that was said, or else of a square."""
    side = math.isqrt(places)
    square = (side * patch, side * patch) if side * side == places else None
    h, w = _size_of_table(square, patch, known, f"a table of {places} positions", lambda h, w: h * w == places)
    return h // patch, w // patch


_IMPORT = "give --size HEIGHTxWIDTH (to `pixmim import`, where --size is another thing)"


def _size_of_table(
    square: tuple[int, int] | None, patch: int, known: ModelHints, table: str, fits: Callable[[int, int], bool]
) -> tuple[int, int]:
    """Return the image size (h, w) that a table is for: the one that was said, or a square, or the wanted one."""
    said = known.img_size or (None if square else known.wanted)
    if said is None and square is None:
        raise UserError(f"it has {table}, which is for no square of patches: {_IMPORT}")
    if said is None:
        assert square is not None
        known.assumed.append(f"--size {square[0]}x{square[1]}")
        return square
    h, w = pair(said)
    if h % patch or w % patch or not fits(h // patch, w // patch):
        trained_at = f"{h / patch:g}x{w / patch:g} patches of {patch} pixels"
        raise UserError(f"an image size of {h}x{w} makes {trained_at}, and it has {table}: {_IMPORT}")
    return h, w


def _beit_size(entries: int, patch: int, known: ModelHints) -> tuple[int, int]:
    """Of (2h-1)(2w-1) distances and three entries that touch the cls token: the size the caller gave, or a square."""
    side = (math.isqrt(max(0, entries - 3)) + 1) // 2
    square = (side * patch, side * patch) if (2 * side - 1) ** 2 + 3 == entries else None
    table = f"a table of {entries} relative positions"
    return _size_of_table(square, patch, known, table, lambda h, w: (2 * h - 1) * (2 * w - 1) + 3 == entries)


def _side(known: ModelHints, default: int) -> tuple[int, int]:
    said = known.img_size or known.wanted
    if said is not None:
        return pair(said)
    if not default:
        raise UserError("shapes do not tell the image size: give --size HEIGHTxWIDTH")
    known.assumed.append(f"--size {default}x{default}")
    return default, default


def _mlp_ratio(tensors: Tensors, block: str, dim: int) -> float:
    return tensors[f"{block}.mlp.fc1.weight"].shape[0] / dim


def _pooling(tensors: Tensors) -> Options:
    """A classifier's keywords: its classes, and the pooling that its norms show."""
    options: Options = {}
    if "encoder.head.weight" in tensors:
        options["num_classes"] = tensors["encoder.head.weight"].shape[0]
    if "encoder.fc_norm.weight" in tensors:
        options["global_pool"] = "avg"
    return options
