"""Published weights by name: timm:NAME and hf:NAME, which timm and the Hugging Face hub download or find cached."""

from pathlib import Path
from typing import Any

import timm

from pixmim.config import ArchitectureConfig, ModelConfig
from pixmim.models import create_pretrained
from pixmim.utils.errors import UserError, did_you_mean, first_line, shown
from pixmim.utils.validation import Text, check_name
from pixmim.weights.detect import Weights
from pixmim.weights.safe_load import PARTS

_HUB_NAME = Text(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", "a name on the hub, such as timm/NAME")
_KINDS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin", "model.pth"),
)
"""Files of weights on the hub, in order of preference: only the first kind that exists is downloaded."""


def describe_timm(name: str, head: bool = False) -> ModelConfig:
    """Describe a pretrained model of timm without loading it; `head` keeps its classifier. Raises UserError."""
    check_name(name)
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model '{name}'{did_you_mean(name, timm.list_models())}")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the model has no such tag
        cfg = None
    if cfg is None or not cfg.has_weights:
        near = did_you_mean(name, timm.list_pretrained(f"{name.split('.')[0]}.*"))
        raise UserError(
            f"timm has no pretrained weights for '{name}': `timm.list_pretrained()` lists those it has{near}"
        )
    classes = int(cfg.num_classes or 0) if head else 0
    channels, h, w = cfg.input_size
    return ModelConfig(
        model=ArchitectureConfig("timm", name, options={"num_classes": classes} if classes else {}),
        size=f"{h}x{w}",
        channels=channels,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
    )


def download_timm(name: str, head: bool) -> Weights:
    """Return a pretrained model of timm, which timm downloads or finds in its cache. Raises UserError."""
    config = describe_timm(name, head)
    try:
        module: Any = create_pretrained(name, int(str(config.model.options.get("num_classes", 0))))
    except UserError:
        raise
    except Exception as error:  # no network or no such weights: the hub raises many exception types
        raise UserError(f"timm:{name} cannot be loaded: {first_line(error)}") from error
    tensors = {f"encoder.{name}": value for name, value in module.state_dict().items()}
    return Weights(config, tensors, "timm's pre-trained weights")


def download_hub(name: str) -> Path:
    """Return a folder with the weights and settings of a model on the Hugging Face hub. Raises UserError."""
    from huggingface_hub import snapshot_download

    if not _HUB_NAME.takes(name):
        raise UserError(f"hf:{name} must be {_HUB_NAME}, not {shown(name)}")
    try:
        for files in _KINDS:
            allowed = ["config.json", "preprocessor_config.json", *files]
            folder = Path(snapshot_download(name, allow_patterns=allowed))
            if any((folder / part).exists() for part in PARTS):
                return folder
    except Exception as error:  # no network, no such name, or no permission: the hub raises many exception types
        raise UserError(f"hf:{name} cannot be loaded: {first_line(error)}") from error
    raise UserError(f"hf:{name} contains no weights: expected one of {', '.join(PARTS)}")
