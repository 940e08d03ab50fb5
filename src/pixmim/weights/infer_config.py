"""Infer a model's configuration from the shapes of its tensors, its file's settings, and hints of the caller.

What none of them determines is taken from the published models, and noted.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from pixmim.config import ArchitectureConfig, MaskConfig, ModelConfig, Option, TargetConfig
from pixmim.utils.errors import UserError, shown
from pixmim.utils.validation import MAX_DEPTH, check_options
from pixmim.weights.key_map import Kind
from pixmim.weights.safe_load import RawCheckpoint

Tensors = Mapping[str, Tensor]
Options = dict[str, Option]
Size = tuple[int, int]


@dataclass
class ModelHints:
    """Facts that a file may not contain, given by the caller or read from the file's settings."""

    img_size: object = None  # (h, w) of the training images; must match the file's tables
    target_size: object = None  # (h, w) that the model will be used at: assumed for tables that are not square
    num_heads: object = None
    decoder_heads: object = None
    likely_heads: object = None  # where the file states none
    likely_decoder_heads: object = None
    norm_eps: object = None
    mean: object = None
    std: object = None
    prefix: str = ""  # of the model's tensors, in a file of several models
    ema: bool = False  # take the moving average of a training file
    assumed: list[str] = field(default_factory=list)  # collects flags for the values that were assumed


# the published models: timm's names by (width, depth, patch), or for Swin (width, depths)
VITS = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
BEITS = {(768, 12, 16): "beit_base_patch16_224", (1024, 24, 16): "beit_large_patch16_224"}
SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2)): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2)): "swin_large_patch4_window7_224",
}
RESNETS: dict[tuple[int, tuple[int, ...]], str] = {  # by (last convolution of a block, depths)
    (2, (2, 2, 2, 2)): "resnet18",
    (2, (3, 4, 6, 3)): "resnet34",
    (3, (2, 2, 2, 2)): "resnet26",
    (3, (3, 4, 6, 3)): "resnet50",
    (3, (3, 4, 23, 3)): "resnet101",
    (3, (3, 8, 36, 3)): "resnet152",
    (3, (3, 24, 36, 3)): "resnet200",
}
CONVNEXTS: dict[tuple[int, tuple[int, ...]], str] = {  # by (width, depths)
    (96, (3, 3, 9, 3)): "convnext_tiny",
    (96, (3, 3, 27, 3)): "convnext_small",
    (128, (3, 3, 27, 3)): "convnext_base",
    (192, (3, 3, 27, 3)): "convnext_large",
    (256, (3, 3, 27, 3)): "convnext_xlarge",
}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width
DECODER_HEADS = {512: 16, 384: 12, 256: 8}  # by width: MAE and ConvMAE; LSMAE-base; CrossMAE-small
_EPS = {"vit": 1e-6, "beit": 1e-6, "swin": 1e-5, "convmae": 1e-6, "resnet": None, "convnext": 1e-6}  # of layer norms
_FIRST = {"convmae": "patch_embed1.proj", "resnet": "conv1", "convnext": "stem.0"}  # convolution; others: patch_embed
_HF_EPS = {"vit": 1e-12, "vit_mae": 1e-12, "beit": 1e-12, "swin": 1e-5}  # transformers' defaults, by model_type


def infer_config(file: RawCheckpoint, kind: Kind, tensors: Tensors, hints: ModelHints) -> ModelConfig:
    """Infer the configuration that builds a recognized model from its tensors, with pixmim's names.

    Adds assumptions to `hints.assumed`. Raises UserError for ambiguous shapes, or KeyError for a missing tensor.
    """
    backbone, options, size = _ENCODERS[kind](tensors, hints)
    heads = [
        tensors[name]
        for name in ("encoder.head.weight", "encoder.head.fc.weight", "encoder.fc.weight")
        if name in tensors
    ]
    options |= {"num_classes": heads[0].shape[0]} if heads else {}
    if hints.norm_eps not in (None, _EPS[kind]):
        options["norm_eps"] = cast(float, hints.norm_eps)
    if kind in ("swin", "beit", "resnet", "convnext") or "mask_token" in tensors:
        mlp = any(name.startswith("head.2.") for name in tensors)
        model = ArchitectureConfig("simmim", backbone, head="mlp" if mlp else "linear", options=options)
    else:
        decoder = _decoder(tensors, hints)
        long = decoder.get("decoder_dim") == 384 or size == (448, 448)
        method = "convmae" if kind == "convmae" else "lsmae" if long else "mae"
        if "fusion.weights" in tensors:
            method = "mff"
        elif "decoder.mix.weight" in tensors:
            method = "crossmae"
        elif options.get("no_embed_class") is False and "encoder.cls_token" in tensors:
            method = "pixio"  # only Pixio has a class token and registers with positions
        model = replace(ArchitectureConfig(method, backbone, options=options), **decoder)  # type: ignore[arg-type]
    pretraining = "mask_token" in tensors or "decoder.mask_token" in tensors
    return ModelConfig(
        model=model,
        size=f"{size[0]}x{size[1]}",
        channels=tensors[f"encoder.{_FIRST.get(kind, 'patch_embed.proj')}.weight"].shape[1],
        target=_target(file, model) if pretraining else None,
        mask=_mask(file, model) if pretraining else None,
    )


def _vit(tensors: Tensors, hints: ModelHints) -> tuple[str, Options, Size]:
    """Return timm's name, keywords and image size (h, w) of a plain ViT."""
    dim, _, patch, _ = tensors["encoder.patch_embed.proj.weight"].shape
    depth, heads = _count(tensors, "encoder.blocks"), _heads(dim, HEADS, hints)
    ratio = _mlp_ratio(tensors, dim)
    options: Options = {}
    registers = tensors["encoder.reg_token"].shape[1] if "encoder.reg_token" in tensors else 0
    prefix = int("encoder.cls_token" in tensors) + registers
    if "encoder.pos_embed" in tensors:
        rows = tensors["encoder.pos_embed"].shape[1]
        positioned = _fits(rows - prefix, patch, hints) or not _fits(rows, patch, hints)
        size = _size_of_table(rows - prefix * positioned, patch, hints)
        if registers:
            options["reg_tokens"] = registers
        if registers or not positioned:
            options["no_embed_class"] = not positioned
    else:
        size = _default_size(hints, 224)
        options["pos_embed"] = "none"
    if "encoder.cls_token" not in tensors:
        options |= {"class_token": False, "global_pool": "avg"}
    name = VITS.get((dim, depth, patch))
    if name is None or ratio != 4 or heads != HEADS.get(dim):
        name = VITS[192, 12, 16]
        options |= _block_options(patch, dim, depth, heads, ratio)
    return name, options | _pooling(tensors), size


def _beit(tensors: Tensors, hints: ModelHints) -> tuple[str, Options, Size]:
    """Return timm's name, keywords and image size of a Beit, such as SimMIM's ViT."""
    dim, _, patch, _ = tensors["encoder.patch_embed.proj.weight"].shape
    depth = _count(tensors, "encoder.blocks")
    shared = "encoder.rel_pos_bias.relative_position_bias_table" in tensors
    module = "encoder.rel_pos_bias" if shared else "encoder.blocks.0.attn"
    table = tensors.get(f"{module}.relative_position_bias_table")
    absolute = "encoder.pos_embed" in tensors
    options: Options = {
        "use_abs_pos_emb": absolute,
        "use_rel_pos_bias": table is not None and not shared,
        "use_shared_rel_pos_bias": shared,
        "init_values": 0.1 if "encoder.blocks.0.gamma_1" in tensors else 0,
        "global_pool": "token",
    }
    heads = _heads(dim, HEADS, hints) if table is None else table.shape[1]
    if table is not None:
        size = _size_of_table(table.shape[0], patch, hints, relative=True)
    elif absolute:
        size = _size_of_table(tensors["encoder.pos_embed"].shape[1] - 1, patch, hints)
    else:
        size = _default_size(hints, 224)
    name = BEITS.get((dim, depth, patch))
    if name is None:
        name = BEITS[768, 12, 16]
        options |= _block_options(patch, dim, depth, heads, _mlp_ratio(tensors, dim))
    return name, options | _pooling(tensors), size


def _swin(tensors: Tensors, hints: ModelHints) -> tuple[str, Options, Size]:
    """Return timm's name, keywords and image size of a Swin. Its largest window is the one it was trained with."""
    dim, _, patch, _ = tensors["encoder.patch_embed.proj.weight"].shape
    stages = range(_count(tensors, "encoder.layers"))
    depths = tuple(_count(tensors, f"encoder.layers.{stage}.blocks") for stage in stages)
    tables = [tensors[f"encoder.layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in stages]
    windows = [(math.isqrt(table.shape[0]) + 1) // 2 for table in tables]
    window = max(windows)
    # By convention, the last stage's map is one window; a window smaller than others has been cut to its stage's map.
    stage = next((stage for stage in stages if windows[stage] < window), len(depths) - 1)
    size = _default_size(hints, windows[stage] * patch * 2**stage)
    shrunk = [min(window, min(size) // patch // 2**stage) for stage in stages]  # to maps smaller than the window
    options: Options = {"window_size": window if windows == shrunk else windows}
    name = SWINS.get((dim, depths))
    if name is None:
        name = SWINS[96, (2, 2, 6, 2)]
        options |= {"embed_dim": dim, "depths": list(depths), "num_heads": [table.shape[1] for table in tables]}
        options |= {} if patch == 4 else {"patch_size": patch}
    ratio = tensors["encoder.layers.0.blocks.0.mlp.fc1.weight"].shape[0] / dim
    options |= {} if ratio == 4 else {"mlp_ratio": ratio}
    return name, options, size


def _convmae(tensors: Tensors, hints: ModelHints) -> tuple[str, Options, Size]:
    """Return pixmim's name, keywords and image size of a ConvMAE encoder."""
    dims = [tensors[f"encoder.patch_embed{stage}.proj.weight"].shape[0] for stage in (1, 2, 3)]
    depths = [_count(tensors, f"encoder.blocks{stage}") for stage in (1, 2, 3)]
    size = _size_of_table(tensors["encoder.pos_embed"].shape[1], 16, hints)
    heads = _heads(dims[2], HEADS, hints)
    name, options = "convmae_base", Options()
    if (dims, depths) != ([256, 384, 768], [2, 2, 11]):
        name, options = "convmae_tiny", {"embed_dim": dims, "depth": depths, "num_heads": heads}
    return name, options, size


def _resnet(tensors: Tensors, hints: ModelHints) -> tuple[str, Options, Size]:
    """Return timm's name, keywords and image size of a ResNet."""
    depths = tuple(_count(tensors, f"encoder.layer{stage}") for stage in (1, 2, 3, 4))
    last = 3 if "encoder.layer1.0.conv3.weight" in tensors else 2
    name, options = RESNETS.get((last, depths)), Options()
    if name is None:
        raise UserError(
            f"it is a ResNet of {depths} blocks, which timm does not have; known: {', '.join(RESNETS.values())}"
        )
    return name, options, _default_size(hints, 224)


def _convnext(tensors: Tensors, hints: ModelHints) -> tuple[str, Options, Size]:
    """Return timm's name, keywords and image size of a ConvNeXt."""
    stages = range(_count(tensors, "encoder.stages"))
    depths = tuple(_count(tensors, f"encoder.stages.{stage}.blocks") for stage in stages)
    dims = [tensors[f"encoder.stages.{stage}.blocks.0.norm.weight"].shape[0] for stage in stages]
    name, options = CONVNEXTS.get((dims[0], depths)), Options()
    if name is None:
        name, options = CONVNEXTS[96, (3, 3, 9, 3)], {"depths": list(depths), "dims": dims}
    if tensors["encoder.stages.0.blocks.0.mlp.fc1.weight"].ndim == 4:
        options["conv_mlp"] = True
    return name, options, _default_size(hints, 224)


_ENCODERS: dict[Kind, Callable[[Tensors, ModelHints], tuple[str, Options, Size]]] = {
    "vit": _vit,
    "beit": _beit,
    "swin": _swin,
    "convmae": _convmae,
    "resnet": _resnet,
    "convnext": _convnext,
}


def _decoder(tensors: Tensors, hints: ModelHints) -> dict[str, int]:
    """Return keywords of MAE's decoder, with LSMAE's coarser grid and larger patches; empty without a decoder."""
    if "decoder.predict.weight" not in tensors:
        return {}
    dim = tensors["decoder.predict.weight"].shape[1]
    heads = _heads(dim, DECODER_HEADS, hints, "decoder_heads", "--decoder-heads")
    options = {"decoder_dim": dim, "decoder_depth": _count(tensors, "decoder.blocks"), "decoder_heads": heads}
    if "decoder.downsample.weight" in tensors:
        options["decoder_stride"] = tensors["decoder.downsample.weight"].shape[-1]
        channels = tensors["encoder.patch_embed.proj.weight"].shape[1]
        options["predict_patch"] = math.isqrt(tensors["decoder.predict.weight"].shape[0] // channels)
    return options


def _count(tensors: Tensors, prefix: str) -> int:
    """Count the numbered modules under a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.([0-9]{1,9})\.")
    count = 1 + max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1)
    if count > MAX_DEPTH:
        raise UserError(f"it numbers its {prefix} up to {count - 1:,}: at most {MAX_DEPTH} are supported")
    return count


def _heads(
    dim: int, published: dict[int, int], hints: ModelHints, keyword: str = "num_heads", flag: str = "--heads"
) -> int:
    heads = getattr(hints, keyword)
    heads = getattr(hints, f"likely_{keyword.removeprefix('num_')}") if heads is None else heads
    if heads is not None:
        return int(heads)
    if dim not in published:
        raise UserError(f"the attention heads for a width of {dim} cannot be inferred: give {flag} ({keyword})")
    hints.assumed.append(f"{flag} {published[dim]}")
    return published[dim]


def _block_options(patch: int, dim: int, depth: int, heads: int, ratio: float) -> Options:
    options: Options = {"patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}
    return options if ratio == 4 else options | {"mlp_ratio": ratio}


def _mlp_ratio(tensors: Tensors, dim: int) -> float:
    return tensors["encoder.blocks.0.mlp.fc1.weight"].shape[0] / dim


def _pooling(tensors: Tensors) -> Options:
    """Return the pooling that a classifier's norms imply."""
    return {"global_pool": "avg"} if "encoder.fc_norm.weight" in tensors else {}


def to_pair(size: object) -> Size:
    """Return (h, w) of a side or an (h, w)."""
    return (int(size[0]), int(size[-1])) if isinstance(size, list | tuple) else (int(str(size)), int(str(size)))


_IMPORT = "give --size HEIGHTxWIDTH (to `pixmim import`, where --size has another meaning)"


def _size_of_table(rows: int, patch: int, hints: ModelHints, relative: bool = False) -> Size:
    """Return the image size of a table of (relative) positions: the hint, else a square, else the target size."""

    def count(h: int, w: int) -> int:
        return (2 * h - 1) * (2 * w - 1) + 3 if relative else h * w  # Beit's table includes 3 rows of the class token

    side = math.isqrt(rows)
    square = next((n for n in (side, (side + 1) // 2) if count(n, n) == rows), None)
    size = hints.img_size or (hints.target_size if square is None else None)
    table = f"a table of {rows} {'relative ' * relative}positions"
    if size is None and square is None:
        raise UserError(f"it has {table}, which do not form a square of patches: {_IMPORT}")
    if size is None:
        side = patch * (square or 0)
        hints.assumed.append(f"--size {side}x{side}")
        return side, side
    h, w = to_pair(size)
    if h % patch or w % patch or count(h // patch, w // patch) != rows:
        patches = f"{h / patch:g}x{w / patch:g} patches of {patch} pixels"
        raise UserError(f"an image size of {h}x{w} makes {patches}, but it has {table}: {_IMPORT}")
    return h, w


def _fits(rows: int, patch: int, hints: ModelHints) -> bool:
    """Return True if a table may have a row for each patch: of the known image size, or else of a square or target."""
    size = hints.img_size or hints.target_size
    if hints.img_size is None and (size is None or math.isqrt(rows) ** 2 == rows):
        return math.isqrt(rows) ** 2 == rows
    h, w = to_pair(size)
    return (h // patch) * (w // patch) == rows


def _default_size(hints: ModelHints, default: int) -> Size:
    size = hints.img_size or hints.target_size
    if size is not None:
        return to_pair(size)
    if not default:
        raise UserError("the image size cannot be inferred: give --size HEIGHTxWIDTH")
    hints.assumed.append(f"--size {default}x{default}")
    return default, default


# ---- settings in the file, or in files next to it

_SETTINGS: dict[str, tuple[str, tuple[type, ...]]] = {
    "DATA.IMG_SIZE": ("img_size", (int,)),
    "img_size": ("img_size", (int, list, tuple)),
    "image_size": ("img_size", (int, list)),
    "num_attention_heads": ("num_heads", (int,)),
    "decoder_num_attention_heads": ("decoder_heads", (int,)),
    "layer_norm_eps": ("norm_eps", (float, int)),
}
"""A file's settings: hint and accepted types. MAE's `input_size` is not one of them: its model ignores it."""


def read_settings(file: RawCheckpoint, hints: ModelHints) -> dict[str, Any]:
    """Return a file's `img_size`, `num_heads`, `decoder_heads`, `norm_eps`, `dtype`, and `mean`, `std` if not given."""
    content = {**file.settings, **file.config}
    settings: dict[str, Any] = {
        hint: content[key] for key, (hint, types) in _SETTINGS.items() if type(content.get(key)) in types
    }
    activation = file.config.get("hidden_act", "gelu")  # no shape shows it
    if activation not in ("gelu", "gelu_python"):
        raise UserError(f"its config.json has hidden_act {shown(activation)}, but only gelu is supported")
    model_type = content.get("model_type")
    if isinstance(model_type, str) and model_type in _HF_EPS:
        settings.setdefault("norm_eps", _HF_EPS[model_type])
    preprocessor = file.preprocessor
    for name, neutral in (("mean", 0.0), ("std", 1.0)):
        if getattr(hints, name) is not None:  # the file's may be of no use
            continue
        value = numbers(preprocessor, f"image_{name}") or numbers(content, name)
        value = (neutral,) if preprocessor.get("do_normalize") is False else value
        settings |= {} if value is None else {name: value}
    if content.get("made_by") == "pixmim" and content.get("dtype") in ("uint8", "uint16", "float32"):
        settings["dtype"] = content["dtype"]
    if preprocessor.get("do_rescale") is False:
        settings["dtype"] = "float32"
    elif isinstance(factor := preprocessor.get("rescale_factor"), float) and 0 < factor < 1 / 4096:
        settings["dtype"] = "uint16"
    return settings


def merge_hints(hints: ModelHints, settings: Mapping[str, Any]) -> ModelHints:
    """Fill in missing hints from a file's settings. Raises UserError for values out of bounds."""
    options = {name: getattr(hints, name) for name in ("img_size", "num_heads", "decoder_heads", "norm_eps")}
    options = {name: settings.get(name) if value is None else value for name, value in options.items()}
    check_options({name: value for name, value in options.items() if value is not None})
    return replace(hints, **options)


def numbers(settings: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """Return a list of numbers in a file's settings, or None if missing. Raises UserError for anything else."""
    value = settings.get(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value or any(type(one) not in (int, float) for one in value):
        flag = f"--{name.removeprefix('image_')}"
        raise UserError(f"its setting {name} is {shown(value)}: expected a list of numbers; {flag} replaces it")
    return tuple(float(one) for one in value)


def _target(file: RawCheckpoint, model: ArchitectureConfig) -> TargetConfig:
    """Return the pre-training target that the file states, otherwise the method's own."""
    if model.name == "simmim":
        return TargetConfig("pixels", normalize_patches=False, distance="l1")
    kept = file.tensors.get("target_generator.low_pass_filter")  # 1 in a circle, otherwise 0, for each channel
    if kept is not None:
        if kept.ndim != 3 or not kept[:1].any():
            raise UserError(f"its low_pass_filter, of shape {tuple(kept.shape)}, is no mask of frequencies (c h w)")
        y, x = (index - (side - 1) / 2 for index, side in zip(kept[0].nonzero().T, kept.shape[1:], strict=True))
        return TargetConfig("low-frequency", radius=math.ceil(torch.hypot(y, x).max()), variant="paper-code")
    normalize = file.settings.get("norm_pix_loss", file.config.get("norm_pix_loss", True))
    return TargetConfig("pixels", normalize_patches=bool(normalize))


def _mask(file: RawCheckpoint, model: ArchitectureConfig) -> MaskConfig:
    """Return the pre-training mask that the file states, otherwise the method's own."""
    if model.name == "simmim":
        return MaskConfig("blocks", ratio=0.6, block_size=32, whole_blocks=True)
    ratio = file.settings.get("mask_ratio", file.config.get("mask_ratio", 0.75))
    if type(ratio) not in (int, float) or not 0 <= ratio <= 1:
        raise UserError(f"its setting mask_ratio is {shown(ratio)}: expected a number from 0 to 1")
    if ratio in (0, 1):  # set for fine-tuning or visualization; pre-training with it is impossible
        ratio = 0.75
    side = {"lsmae": 32, "pixio": 64}.get(model.name)
    return MaskConfig(ratio=ratio) if side is None else MaskConfig("blocks", ratio=ratio, block_size=side)
