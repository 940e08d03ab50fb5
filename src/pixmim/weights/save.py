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

KEY = "pixmim"
"""Where the metadata hold the Run, as JSON."""

ENCODER = "encoder"
"""Folder of a run that holds its product."""

WEIGHTS = f"{ENCODER}/model.safetensors"
"""The weights in it; they are written last, so the folder is complete once they are there."""


def save_encoder(
    encoder: nn.Module,
    folder: Path,
    run: ModelConfig,
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
    write_text_atomically(folder / "config.json", json.dumps(timm_config(encoder, run, classes), indent=2) + "\n")
    about = {**(more or {}), **({"classes": json.dumps(classes)} if classes else {})}
    save_tensors(encoder.state_dict(), folder / "model.safetensors", run, step, steps, about)


def timm_config(encoder: nn.Module, run: ModelConfig, classes: list[str] | None = None) -> dict[str, Any]:
    """Return the config.json of timm's hub layout: the architecture, its keywords, and what its input must be."""
    mean, std = run.normalization
    known: Any = getattr(encoder, "pretrained_cfg", None) or {}
    outputs = int(run.model.options.get("num_classes", 0))  # type: ignore[arg-type]
    pretrained: dict[str, Any] = {
        "tag": "pixmim",
        "custom_load": False,
        "input_size": [run.channels, *run.image_size],
        "fixed_input_size": True,
        "interpolation": run.interpolation,
        "crop_pct": 0.875,
        "mean": mean,
        "std": std,
        "num_classes": outputs,
        "classifier": known.get("classifier", "head"),
    }
    if run.channels == 3:  # older timm would "adapt" the first convolution of any other number of channels
        pretrained["first_conv"] = known.get("first_conv", "patch_embed.proj")
    if classes:
        pretrained["label_names"] = classes
    own = {key: value for key, value in run.model.options.items() if key not in ("num_classes", *NOT_OF_TIMM)}
    return {
        "architecture": run.model.backbone.split(".")[0],
        "num_classes": outputs,
        "num_features": int(encoder.num_features),  # type: ignore[arg-type]
        "global_pool": run.model.options.get("global_pool", getattr(encoder, "global_pool", "")),
        "model_args": {**_made(encoder, run), **own},
        "pretrained_cfg": pretrained,
    }


def _made(encoder: nn.Module, run: ModelConfig) -> dict[str, Any]:
    """Return keywords of timm's that a method sets without naming them in a run's options."""
    made: dict[str, Any] = {"img_size": list(run.image_size), "in_chans": run.channels}
    if isinstance(encoder, SwinTransformer) and run.model.name == "simmim":
        made["drop_path_rate"] = 0.0
    if isinstance(encoder, Beit):
        block: Any = encoder.blocks[0]
        made["global_pool"] = encoder.global_pool
        made["use_shared_rel_pos_bias"] = encoder.rel_pos_bias is not None
        made["use_abs_pos_emb"] = encoder.pos_embed is not None
        made["use_rel_pos_bias"] = block.attn.relative_position_bias_table is not None
        made["init_values"] = 0.1 if block.gamma_1 is not None else 0
    return made


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    run: ModelConfig,
    step: int,
    steps: int = 0,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write tensors with what a reader must know to feed them, completely or not at all.

    The metadata are words: the Run, its main points by themselves for other programs, and `more` (a classifier's
    classes). They name nothing of the machine they are written on.
    """
    mean, std = run.normalization
    method = run.model.name
    if isinstance(run, PretrainConfig):
        method += f" with {run.target.kind} target and {run.crop.kind} crop"
    metadata = {
        "format": "pt",
        "method": method,
        "backbone": run.model.backbone,
        "img_size": json.dumps(run.image_size),
        "in_chans": str(run.channels),
        "pixels": run.pixels,
        "options": json.dumps(run.model.options),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "step": str(step),
        "steps": str(steps),
        KEY: to_json(portable(run)),
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
