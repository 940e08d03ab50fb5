"""Save models as safetensors: encoder/ (a folder in timm's layout) and model.safetensors (with the decoder).

The metadata of both contain their configuration, so that each file is sufficient on its own.
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
from pixmim.models.cnn import is_cnn
from pixmim.utils.files import write_json, write_text_atomically
from pixmim.utils.validation import NOT_OF_TIMM

METADATA_KEY = "pixmim"  # metadata key of the configuration, as JSON

ENCODER_FOLDER = "encoder"  # folder of a run that contains its encoder

ENCODER_WEIGHTS = f"{ENCODER_FOLDER}/model.safetensors"
"""The encoder's weights. They are written last, so the folder is complete if they exist."""


def save_encoder(
    encoder: nn.Module,
    folder: Path,
    config: ModelConfig,
    step: int,
    steps: int = 0,
    classes: list[str] | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Save an encoder or a classifier as a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    timm reads keywords, image size, channels, mean and std from it. timm has no ConvMAE; pixmim reads that folder too.
    Existing files are replaced one by one. `steps` are those of the complete run, 0 if unknown; `classes` are names in
    the order of a classifier's outputs; `more` is further metadata. Raises OSError if writing fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", timm_config(encoder, config, classes))
    metadata = {**(more or {}), **({"classes": json.dumps(classes)} if classes else {})}
    save_tensors(encoder.state_dict(), folder / "model.safetensors", config, step, steps, metadata)


def timm_config(encoder: nn.Module, config: ModelConfig, classes: list[str] | None = None) -> dict[str, Any]:
    """Return the config.json of timm's hub layout: architecture, keywords, and format of the input."""
    mean, std = config.normalization
    published: Any = getattr(encoder, "pretrained_cfg", None) or {}
    pool = getattr(encoder, "global_pool", "")  # of a CNN a module
    outputs = int(config.model.options.get("num_classes", 0))  # type: ignore[arg-type]
    pretrained: dict[str, Any] = {
        "tag": "pixmim",
        "custom_load": False,
        "input_size": [config.channels, *config.image_size],
        "fixed_input_size": not is_cnn(encoder),
        "interpolation": config.interpolation,
        "crop_pct": 0.875,
        "mean": mean,
        "std": std,
        "num_classes": outputs,
        "classifier": published.get("classifier", "head"),
    }
    if config.channels == 3:  # older timm would "adapt" the first convolution of any other number of channels
        pretrained["first_conv"] = published.get("first_conv", "patch_embed.proj")
    if classes:
        pretrained["label_names"] = classes
    options = {key: value for key, value in config.model.options.items() if key not in ("num_classes", *NOT_OF_TIMM)}
    return {
        "architecture": config.model.backbone.split(".")[0],
        "num_classes": outputs,
        "num_features": int(encoder.num_features),  # type: ignore[arg-type]
        "global_pool": config.model.options.get("global_pool", pool if isinstance(pool, str) else "avg"),
        "model_args": {**method_options(encoder, config), **options},
        "pretrained_cfg": pretrained,
    }


def method_options(encoder: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """Return timm's keywords that the method sets and a run's options therefore do not contain."""
    options: dict[str, Any] = {"in_chans": config.channels}
    if not is_cnn(encoder):  # timm's CNNs take any size
        options["img_size"] = list(config.image_size)
    if config.model.name == "pixio":
        options["reg_tokens"] = encoder.num_prefix_tokens - 1  # type: ignore[operator]
    if isinstance(encoder, SwinTransformer) and config.model.name == "simmim":
        options["drop_path_rate"] = 0.0
    if isinstance(encoder, Beit):
        block: Any = encoder.blocks[0]
        options["global_pool"] = encoder.global_pool
        options["use_shared_rel_pos_bias"] = encoder.rel_pos_bias is not None
        options["use_abs_pos_emb"] = encoder.pos_embed is not None
        options["use_rel_pos_bias"] = block.attn.relative_position_bias_table is not None
        options["init_values"] = 0.1 if block.gamma_1 is not None else 0
    return options


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    config: ModelConfig,
    step: int,
    steps: int = 0,
    more: Mapping[str, str] | None = None,
) -> None:
    """Save tensors atomically as safetensors, with the metadata needed to build and feed their model.

    The metadata contain the configuration, its main values separately for other programs, and `more`. They contain no
    path of this machine. Equal weights give identical files.
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
    write_text_atomically(path, _sort_metadata(content))


def _sort_metadata(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library writes in random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])
