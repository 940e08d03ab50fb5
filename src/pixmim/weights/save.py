"""pixmim's own files: encoder/, a folder that timm reads, and model.safetensors, a complete model in pre-training.

Both hold the Run that they came from in the metadata of their weights, so that each is enough by itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.config_io import portable, to_json
from pixmim.utils.files import write_text_atomically
from pixmim.utils.validation import NOT_OF_TIMM

METADATA_KEY = "pixmim"
"""Where the metadata hold the Run, as JSON."""

ENCODER_FOLDER = "encoder"
"""Folder of a run that holds its product."""

ENCODER_WEIGHTS = f"{ENCODER_FOLDER}/model.safetensors"
"""The weights in it; they are written last, so the folder is complete once they are there."""


def save_encoder(
    encoder: nn.Module,
    folder: Path,
    config: ModelConfig,
    step: int,
    steps: int = 0,
    classes: list[str] | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write an encoder, or a classifier, as a folder that timm reads with nothing to repeat.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` has its options, image size, channels, mean and std. timm
    has no ConvMAE; pixmim reads that folder as it reads all others.

    Args:
        encoder: The module; its `state_dict` is written.
        folder: Made if need be. What is in it is replaced file by file.
        run: Its settings.
        step: Steps of training done.
        steps: Steps of the complete run; 0 if unknown.
        classes: Names of what a classifier tells apart, in the order of its outputs.
        more: Further metadata of the weights.

    Raises:
        OSError: As writing does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "config.json", json.dumps(timm_config(encoder, config, classes), indent=2) + "\n")
    about = {**(more or {}), **({"classes": json.dumps(classes)} if classes else {})}
    save_tensors(encoder.state_dict(), folder / "model.safetensors", config, step, steps, about)


def timm_config(encoder: nn.Module, config: ModelConfig, classes: list[str] | None = None) -> dict[str, Any]:
    """Return the config.json of timm's hub layout: the architecture, its keywords, and what its input must be."""
    mean, std = config.normalization
    known: Any = getattr(encoder, "pretrained_cfg", None) or {}
    outputs = int(config.model.options.get("num_classes", 0))  # type: ignore[arg-type]
    pretrained: dict[str, Any] = {
        "tag": "pixmim",
        "custom_load": False,
        "input_size": [config.channels, *config.image_size],
        "fixed_input_size": True,
        "interpolation": config.interpolation,
        "crop_pct": 0.875,
        "mean": mean,
        "std": std,
        "num_classes": outputs,
        "classifier": known.get("classifier", "head"),
    }
    if config.channels == 3:  # older timm would "adapt" the first convolution of any other number of channels
        pretrained["first_conv"] = known.get("first_conv", "patch_embed.proj")
    if classes:
        pretrained["label_names"] = classes
    own = {key: value for key, value in config.model.options.items() if key not in ("num_classes", *NOT_OF_TIMM)}
    return {
        "architecture": config.model.backbone.split(".")[0],
        "num_classes": outputs,
        "num_features": int(encoder.num_features),  # type: ignore[arg-type]
        "global_pool": config.model.options.get("global_pool", getattr(encoder, "global_pool", "")),
        "model_args": {**_made(encoder, config), **own},
        "pretrained_cfg": pretrained,
    }


def _made(encoder: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """Return keywords of timm's that a method sets without naming them in a run's options."""
    trained_at: dict[str, Any] = {"img_size": list(config.image_size), "in_chans": config.channels}
    if isinstance(encoder, SwinTransformer) and config.model.name == "simmim":
        trained_at["drop_path_rate"] = 0.0
    if isinstance(encoder, Beit):
        block: Any = encoder.blocks[0]
        trained_at["global_pool"] = encoder.global_pool
        trained_at["use_shared_rel_pos_bias"] = encoder.rel_pos_bias is not None
        trained_at["use_abs_pos_emb"] = encoder.pos_embed is not None
        trained_at["use_rel_pos_bias"] = block.attn.relative_position_bias_table is not None
        trained_at["init_values"] = 0.1 if block.gamma_1 is not None else 0
    return trained_at


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    config: ModelConfig,
    step: int,
    steps: int = 0,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write tensors with what a reader must know to feed them, completely or not at all.

    The metadata are words: the Run, its main points by themselves for other programs, and `more` (a classifier's
    classes). They name nothing of the machine they are written on.
    """
    mean, std = config.normalization
    method = config.model.name
    if isinstance(config, PretrainConfig):
        method += f" with {config.target.kind} target and {config.crop.kind} crop"
    metadata = {
        "format": "pt",
        "method": method,
        "backbone": config.model.backbone,
        "img_size": json.dumps(config.image_size),
        "in_chans": str(config.channels),
        "dtype": config.dtype,
        "options": json.dumps(config.model.options),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "step": str(step),
        "steps": str(steps),
        METADATA_KEY: to_json(portable(config)),
        **(more or {}),
    }
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=metadata)
    write_text_atomically(path, _in_order(content))


def _in_order(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, whose order is random: equal weights make equal files."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])
