"""SimMIM on a convolutional network of timm, in the way of A2MIM (Li et al., arXiv 2205.13943).

Convolutions cannot drop hidden patches. So the input shows the mean color of the image in their place, which removes no
statistics as zeros would, and a learned token marks them again where the network has seen most of its context: in front
of the last stage. The network is run module by module, from outside: its state_dict stays a timm checkpoint.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float
from timm.models.convnext import ConvNeXtStage
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.models.simmim import Head, build_head
from pixmim.utils.errors import UserError
from pixmim.utils.patches import hidden_pixels, patchify

_AFTER = ("global_pool", "head", "head_drop", "fc", "classifier")
"""Children of timm's networks that come after `forward_features`."""


class CNNSimMIM(MaskedModel):
    """A timm network of convolutions that predicts the pixels of hidden patches.

    `patch` is the stride of the network, 32 px, which is A2MIM's block size: masks are sampled on the last map. In
    front of the last stage (of ConvNeXt, after its downsampling), features x of hidden positions become s x + t, with a
    learned t, and a learned scale s for each channel that is 1e-6 at first. The head is SimMIM's, of ConvNeXt after its
    final norm.

    Args:
        encoder: A timm network with `feature_info` whose forward pass is a sequence of its modules, such as ResNet,
            ConvNeXt, RegNet or EfficientNet. Its weights keep timm's initialization; head and token have A2MIM's.
        head: "linear" or "mlp": see `SimMIM`.
        outputs: Numbers per value: 1, or the number of color bins.

    Raises:
        UserError: If the forward pass is not such a sequence.
    """

    def __init__(self, encoder: nn.Module, head: Head = "linear", outputs: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        info: Any = encoder.feature_info
        self.patch = int(info[-1]["reduction"])
        self._names = [name for name, _ in _sequence(encoder)]
        before = [number for number, name in enumerate(self._names) if name.startswith(info[-2]["module"])]
        self._last = before[-1] + 1
        self._last += self._names[self._last].endswith(".downsample")
        for name, parameter in encoder.named_parameters():
            if not name.startswith(tuple(f"{part}." for part in self._names)):
                parameter.requires_grad_(False)  # of the classifier: no prediction depends on it
        channels = next(encoder.parameters()).shape[1]
        width, final = self._widths(channels)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.mask_scale = nn.Parameter(torch.full((1, width, 1, 1), 1e-6))
        self.head = build_head(final, self.patch**2 * channels * outputs, head)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in self.head:
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b n d"]:
        self.check_mask(images, mask)
        h, w = images.shape[-2:]
        x = torch.where(hidden_pixels(mask.hidden, self.patch, (h, w)), images.mean(dim=(2, 3), keepdim=True), images)
        for number, name in enumerate(self._names):
            if number == self._last:
                rows, columns = x.shape[-2:]
                here = hidden_pixels(mask.hidden, self.patch * rows // h, (rows, columns))
                x = torch.where(here, x * self.mask_scale.to(x.dtype) + self.mask_token.to(x.dtype), x)
            x = self.encoder.get_submodule(name)(x)
        return patchify(F.pixel_shuffle(self.head(x), self.patch), self.patch)

    @torch.no_grad()
    def _widths(self, channels: int) -> tuple[int, int]:
        """Return the channels in front of the last stage and at the end, and check that the sequence is complete."""
        training = self.encoder.training
        encoder: Any = self.encoder.eval()
        x = images = torch.linspace(-1, 1, channels * 4 * self.patch**2).view(1, channels, 2 * self.patch, -1)
        width = 0
        for number, name in enumerate(self._names):
            width = x.shape[1] if number == self._last else width
            x = self.encoder.get_submodule(name)(x)
        same = x.device.type == "meta" or torch.equal(x, final_norm(encoder)(encoder.forward_features(images)))
        self.encoder.train(training)
        if not same:
            raise UserError(
                f"{type(encoder).__name__} cannot be masked: its forward pass is not a sequence of its modules"
            )
        return width, int(x.shape[1])


def is_cnn(encoder: nn.Module) -> TypeGuard[nn.Module]:
    """Return True for a timm network that ends in a map of channels first, such as ResNet or ConvNeXt."""
    has_map = hasattr(encoder, "feature_info") and hasattr(encoder, "forward_features")
    return has_map and not hasattr(encoder, "patch_embed") and getattr(encoder, "output_fmt", "NCHW") == "NCHW"


def final_norm(encoder: nn.Module) -> nn.Module:
    """Return the norm over channels that ConvNeXt has in its head, where timm pools first; an identity for others."""
    norm = getattr(getattr(encoder, "head", None), "norm", None)
    return norm if isinstance(norm, nn.LayerNorm) else nn.Identity()


def _sequence(encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of `forward_features` and `final_norm` in order, with stages one by one."""
    info: Any = encoder.feature_info
    containers = {cast(str, stage["module"]).partition(".")[0] for stage in info if "." in stage["module"]}
    for name, child in encoder.named_children():
        if name in _AFTER:
            break
        stages = child.named_children() if name in containers else [("", child)]
        for part, stage in stages:
            path = f"{name}.{part}" if part else name
            if isinstance(stage, ConvNeXtStage):
                yield from ((f"{path}.{half}", getattr(stage, half)) for half in ("downsample", "blocks"))
            else:
                yield path, stage
    if isinstance(norm := final_norm(encoder), nn.LayerNorm):
        yield "head.norm", norm
