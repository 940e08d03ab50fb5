"""The two contracts every model keeps: what pre-training asks of it, and what a finished encoder gives."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from pixmim.masking import Mask
from pixmim.utils.errors import UserError


def unsupported_encoder(encoder: nn.Module) -> UserError:
    """Return the error for a module that is none of the encoders that pixmim drives."""
    kind = type(encoder).__name__
    return UserError(f"{kind} is not an encoder that pixmim uses: it takes timm's ViT, Beit and Swin, and ConvMAE")


class MaskedModel(nn.Module, ABC):
    """A model that predicts what a mask hides."""

    encoder: nn.Module
    """The module that a run hands over; its state_dict is a timm checkpoint."""

    patch: int
    """Side in pixels of the patches that a mask hides."""

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m d"]:
        """Predict every patch, d = p*p*c values each, from the visible ones of normalized images.

        Its patches may be larger than the n of the mask: p says how large. A model made for color bins predicts as
        many scores in place of each value. Raises ValueError for a mask of another grid.
        """

    def check_mask(self, images: Float[Tensor, "b c h w"], mask: Mask) -> None:
        """Raise ValueError unless a mask is of as many patches as the images have."""
        (h, w), n = images.shape[-2:], mask.hidden.shape[1]
        rows, columns = h // self.patch, w // self.patch
        if n != rows * columns:
            raise ValueError(
                f"the mask is of {n} patches, and images of {h}x{w} pixels have {rows}x{columns} = {rows * columns} of "
                f"the model's patches of {self.patch} pixels"
            )


class Features(NamedTuple):
    """What an encoder says of images, block by block (the last `len` of them, each after the final norm).

    vector  the global token of each block (b k d); the mean of the patch tokens where the encoder has no such token
    mean    the mean of the last block's patch tokens (b d)
    map     the last block's patch tokens on their grid (b d rows columns)
    """

    vector: Float[Tensor, "b k d"]
    mean: Float[Tensor, "b d"]
    map: Float[Tensor, "b d rows columns"]
