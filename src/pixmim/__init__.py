"""Pre-train vision backbones on your own unlabeled images by masked image modelling, with PixMIM.

    config = pixmim.get_recipe("pixmim-vit-small", data="photos", epochs=100)
    result = pixmim.pretrain(config, out="runs/photos")
    scores = pixmim.evaluate(result.encoder, "knn", train="labeled/train", test="labeled/test")

Names are loaded on first use: `import pixmim` alone does not import torch, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixmim.api import embed, embed_to_file, evaluate, evaluate_to_folder, reconstruct
    from pixmim.config import ModelConfig, PretrainConfig
    from pixmim.data import create_loader, open_dataset
    from pixmim.losses import ReconstructionLoss
    from pixmim.masking import BeitBlockMask, BlockwiseRandomMask, Mask, RandomMask, SquareMask
    from pixmim.models import create_model
    from pixmim.pretraining import PretrainResult, pretrain
    from pixmim.recipes import get_recipe
    from pixmim.targets import ColorBins, LowFrequency, Pixels, low_pass
    from pixmim.transforms.crops import CenterCrop, RandomResizedCrop, SimpleResizedCrop
    from pixmim.utils.errors import UserError
    from pixmim.utils.patches import patchify, unpatchify
    from pixmim.weights.load import load_encoder, load_model

__version__ = "0.1.0"

_MODULES = {
    "BeitBlockMask": "masking",
    "CenterCrop": "transforms.crops",
    "ColorBins": "targets",
    "LowFrequency": "targets",
    "Mask": "masking",
    "ModelConfig": "config",
    "ReconstructionLoss": "losses",
    "Pixels": "targets",
    "PretrainConfig": "config",
    "PretrainResult": "pretraining",
    "RandomMask": "masking",
    "RandomResizedCrop": "transforms.crops",
    "SimpleResizedCrop": "transforms.crops",
    "SquareMask": "masking",
    "BlockwiseRandomMask": "masking",
    "UserError": "utils.errors",
    "create_loader": "data",
    "create_model": "models",
    "embed": "api",
    "embed_to_file": "api",
    "evaluate": "api",
    "evaluate_to_folder": "api",
    "get_recipe": "recipes",
    "load_encoder": "weights.load",
    "load_model": "weights.load",
    "low_pass": "targets",
    "open_dataset": "data",
    "patchify": "utils.patches",
    "pretrain": "pretraining",
    "reconstruct": "api",
    "unpatchify": "utils.patches",
}

__all__ = [
    "BeitBlockMask",
    "BlockwiseRandomMask",
    "CenterCrop",
    "ColorBins",
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
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pixmim' has no attribute '{name}'")
    return getattr(import_module(f"pixmim.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
