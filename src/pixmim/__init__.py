"""Pre-train vision backbones on your own unlabeled images by masked image modeling, with PixMIM.

    config = pixmim.get_recipe("pixmim-vit-small", data="photos", epochs=100)
    result = pixmim.pretrain(config, out="runs/photos")
    scores = pixmim.evaluate(result.encoder, "knn", train="labeled/train", test="labeled/test")

Names are loaded on first use: `import pixmim` does not import torch, so that the command line starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixmim.advice import Advice, advise
    from pixmim.api import embed, embed_to_file, evaluate, evaluate_to_folder, reconstruct
    from pixmim.config import ModelConfig, PretrainConfig
    from pixmim.data import create_loader, open_dataset
    from pixmim.losses import ReconstructionLoss
    from pixmim.mask_patterns import BeitBlockMask, GreenNoiseMask, SquareMask
    from pixmim.masking import BlockwiseRandomMask, Mask, RandomMask
    from pixmim.models import create_model
    from pixmim.pretraining import pretrain
    from pixmim.recipes import get_recipe
    from pixmim.run_folder import PretrainResult
    from pixmim.targets import ColorBins, LowFrequency, Pixels, low_pass
    from pixmim.transforms.crops import CenterCrop, RandomResizedCrop, SimpleResizedCrop
    from pixmim.utils.errors import UserError
    from pixmim.utils.patches import patchify, unpatchify
    from pixmim.viewer import view
    from pixmim.weights.load import load_encoder, load_model

__version__ = "0.1.0"

_NAMES = {
    "advice": ("Advice", "advise"),
    "api": ("embed", "embed_to_file", "evaluate", "evaluate_to_folder", "reconstruct"),
    "config": ("ModelConfig", "PretrainConfig"),
    "data": ("create_loader", "open_dataset"),
    "losses": ("ReconstructionLoss",),
    "mask_patterns": ("BeitBlockMask", "GreenNoiseMask", "SquareMask"),
    "masking": ("BlockwiseRandomMask", "Mask", "RandomMask"),
    "models": ("create_model",),
    "pretraining": ("pretrain",),
    "run_folder": ("PretrainResult",),
    "recipes": ("get_recipe",),
    "targets": ("ColorBins", "LowFrequency", "Pixels", "low_pass"),
    "transforms.crops": ("CenterCrop", "RandomResizedCrop", "SimpleResizedCrop"),
    "utils.errors": ("UserError",),
    "utils.patches": ("patchify", "unpatchify"),
    "viewer": ("view",),
    "weights.load": ("load_encoder", "load_model"),
}
_MODULES = {name: f"pixmim.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "Advice",
    "BeitBlockMask",
    "BlockwiseRandomMask",
    "CenterCrop",
    "ColorBins",
    "GreenNoiseMask",
    "LowFrequency",
    "Mask",
    "ModelConfig",
    "Pixels",
    "PretrainConfig",
    "PretrainResult",
    "RandomMask",
    "RandomResizedCrop",
    "ReconstructionLoss",
    "SimpleResizedCrop",
    "SquareMask",
    "UserError",
    "advise",
    "create_loader",
    "create_model",
    "embed",
    "embed_to_file",
    "evaluate",
    "evaluate_to_folder",
    "get_recipe",
    "load_encoder",
    "load_model",
    "low_pass",
    "open_dataset",
    "patchify",
    "pretrain",
    "reconstruct",
    "unpatchify",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pixmim' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
