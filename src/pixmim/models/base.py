"""Contracts of models: `MaskedModel` for pre-training, `Features` of a trained encoder."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from pixmim.masking import Mask
from pixmim.utils.errors import UserError


def unsupported_encoder(encoder: nn.Module) -> UserError:
    """Return the error for an encoder that pixmim does not support."""
    name = type(encoder).__name__
    return UserError(
        f"{name} is not a supported encoder: use timm's ViT, Beit, Swin or CNNs such as ResNet, or ConvMAE"
    )


class MaskedModel(nn.Module, ABC):
    """Base of models that predict the patches that a mask hides.

    Attributes:
        encoder: The module that pre-training produces; except for ConvMAE, its state_dict is a timm checkpoint.
        patch: Side of the mask's patches in pixels.
        any_size: Whether images may also have another size, in the proportions of the one that the model was made for.
    """

    encoder: nn.Module
    patch: int
    any_size: bool = True

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m d"]:
        """Predict all patches from the visible ones.

        Args:
            images: Normalized images.
            mask: Mask on the grid of patches of `patch` pixels.

        Returns:
            Patches of d = p*p*c*outputs values, ordered (row, column, channel, output). p may be a multiple of `patch`,
            and outputs is 1, or the number of color bins.

        Raises:
            ValueError: If the mask has another grid.
        """

    def check_mask(self, images: Float[Tensor, "b c h w"], mask: Mask) -> None:
        """Raise ValueError unless the mask has as many patches as the images."""
        (h, w), n = images.shape[-2:], mask.hidden.shape[1]
        rows, columns = h // self.patch, w // self.patch
        if n != rows * columns:
            raise ValueError(
                f"the mask has {n} patches, but images of {h}x{w} pixels have {rows}x{columns} = {rows * columns} "
                f"patches of {self.patch} pixels"
            )


def freeze_pooling(encoder: nn.Module) -> None:
    """Exclude what pools the patch tokens of a classifier from training: no prediction depends on it."""
    for name in ("fc_norm", "attn_pool"):
        if isinstance(module := getattr(encoder, name, None), nn.Module):
            module.requires_grad_(False)


class Features(NamedTuple):
    """Features of images from the last k blocks of an encoder, after its final norm.

    Attributes:
        vector: Class token of each block, of Pixio the mean of its 8; without one the pooled map, as the network pools.
        maps: The patch tokens of each block as a map.
        vector_name: "cls" if the vector is the class token, otherwise "pooled".
    """

    vector: Float[Tensor, "b k d"]
    maps: list[Float[Tensor, "b d rows columns"]]
    vector_name: str = "pooled"

    @property
    def map(self) -> Float[Tensor, "b d rows columns"]:
        """The last block's patch tokens as a map."""
        return self.maps[-1]

    @property
    def mean(self) -> Float[Tensor, "b d"]:
        """Mean of the last block's patch tokens."""
        return self.map.mean(dim=(2, 3))

    def of_block(self, index: int) -> "Features":
        """Return the features of one of the blocks alone."""
        return Features(self.vector[:, [index]], [self.maps[index]], self.vector_name)
