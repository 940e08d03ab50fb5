"""Pre-train vision backbones on your own unlabelled images by masked image modelling, with PixMIM.

The public names, each loaded when it is first used: `import pixmim` alone does not import torch, so that the command
line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixmim.losses import Objective
    from pixmim.masking import BlockMask, Mask, RandomMask, SquareMask, UnitMask
    from pixmim.models import create_model
    from pixmim.targets import ColourBins, LowFrequency, Pixels, low_pass
    from pixmim.transforms.crops import CentreCrop, RandomResizedCrop, SimpleResizedCrop
    from pixmim.utils.patches import patchify, unpatchify
    from pixmim.weights.load import load_encoder, load_model

__version__ = "0.1.0"

_HOME = {
    "BlockMask": "masking",
    "CentreCrop": "transforms",
    "ColourBins": "targets",
    "LowFrequency": "targets",
    "Mask": "masking",
    "Objective": "losses",
    "Pixels": "targets",
    "RandomMask": "masking",
    "RandomResizedCrop": "transforms",
    "SimpleResizedCrop": "transforms",
    "SquareMask": "masking",
    "UnitMask": "masking",
    "create_model": "models",
    "load_encoder": "pretrained",
    "load_model": "pretrained",
    "low_pass": "targets",
    "patchify": "grid",
    "unpatchify": "grid",
}

__all__ = [
    "BlockMask",
    "CentreCrop",
    "ColourBins",
    "LowFrequency",
    "Mask",
    "Objective",
    "Pixels",
    "RandomMask",
    "RandomResizedCrop",
    "SimpleResizedCrop",
    "SquareMask",
    "UnitMask",
    "create_model",
    "load_encoder",
    "load_model",
    "low_pass",
    "patchify",
    "unpatchify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pixmim' has no attribute '{name}'")
    return getattr(import_module(f"pixmim.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
