"""What is hidden from the network. A mask is a value made outside the model; models never draw random numbers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which patches are hidden, and the index tables a model needs to drop them and to put them back.

    hidden   bool (b n): True = hidden from the network, everywhere in pixmim
    keep     int64 (b k): the visible patches of each row, in rising order
    restore  int64 (b n): place of each patch in the sequence "visible patches, then hidden ones"
    """

    hidden: Bool[Tensor, "b n"]
    keep: Int[Tensor, "b k"]
    restore: Int[Tensor, "b n"]

    @staticmethod
    def from_hidden(hidden: Bool[Tensor, "b n"], visible: int | None = None) -> "Mask":
        """Build a Mask. `visible` is the number of visible patches in each row; giving it spares a wait for the device.

        Raises ValueError if the rows hide different numbers of patches, or all of them, or none.
        """
        if visible is None:
            counts = (~hidden).sum(dim=1)
            visible = int(counts[0])
            if not bool((counts == visible).all()):
                raise ValueError("every row of a mask must hide the same number of patches")
            if not 0 < visible < hidden.shape[1]:
                raise ValueError("a mask must hide some patches and leave some")
        order = torch.argsort(hidden.to(torch.uint8), dim=1, stable=True)
        return Mask(hidden, order[:, :visible], torch.argsort(order, dim=1))

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask on another device, copied without waiting where that is possible."""
        return Mask(*(t.to(device, non_blocking=True) for t in (self.hidden, self.keep, self.restore)))


@dataclass(frozen=True)
class RandomMask:
    """MAE's mask: each patch is as likely to be hidden as any other; int(n * (1 - ratio)) stay visible.

    Source: MAE (arXiv 2111.06377), section 3; 196 -> 49, 256 -> 64, 784 -> 196 at ratio 0.75.
    """

    ratio: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"a mask ratio lies between 0 and 1, not {self.ratio}")

    def visible(self, patches: int) -> int:
        """Number of patches that stay visible out of `patches`. Raises ValueError if that is none or all."""
        kept = int(patches * (1 - self.ratio))
        if not 0 < kept < patches:
            raise ValueError(f"a ratio of {self.ratio} over {patches} patches would leave {kept} visible")
        return kept

    def __call__(self, batch: int, patches: int, generator: torch.Generator | None = None) -> Mask:
        """Masks for `batch` images of `patches` patches each, drawn from torch's `generator`."""
        device = generator.device if generator is not None else None
        return self.from_noise(torch.rand(batch, patches, generator=generator, device=device))

    def from_noise(self, noise: Float[Tensor, "b n"]) -> Mask:
        """The mask that noise in [0, 1) decides: in each row, the patches with the smallest numbers stay visible."""
        visible = self.visible(noise.shape[1])
        rank = torch.argsort(torch.argsort(noise, dim=1, stable=True), dim=1)
        return Mask.from_hidden(rank >= visible, visible)
