"""The encoder to evaluate, with what its input needs: loaded from weights, untrained, or in training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from pixmim.build import build_model, image_spec
from pixmim.config import ModelConfig
from pixmim.config_io import pretrain_config
from pixmim.data.dataset import ImageSpec
from pixmim.training.precision import Precision, autocast, choose_attention, choose_device, choose_precision
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.utils.memory import free_memory
from pixmim.utils.trust import refusal, untrusted_references
from pixmim.weights.detect import Weights, read_config
from pixmim.weights.load import build_encoder_with_weights, describe, initialize_from, resolve_model


@dataclass(frozen=True)
class FrozenEncoder:
    """A timm module and the format of its input."""

    config: ModelConfig  # configuration that builds the module
    module: nn.Module  # the timm module, on `device`
    size: tuple[int, int]  # height and width of its images in pixels
    image_spec: ImageSpec  # channels and dtype of its images
    mean: Tensor  # mean per channel, on `device`
    std: Tensor  # standard deviation per channel, on `device`
    device: torch.device
    precision: Precision
    step: int  # training step of its weights
    # names of the outputs of its own classifier, in order; empty if its file does not name them
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # lines to print: how far it is trained, and which values were assumed

    def preprocess(
        self, images: Shaped[Tensor, "b c h w"], flip: Bool[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Move cropped images to the device, flip some of them and normalize them."""
        flip = None if flip is None else flip.to(self.device, non_blocking=True)
        return flip_and_normalize(images.to(self.device, non_blocking=True), flip, self.mean, self.std)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Set eval mode and precision of the module in a `with` statement, without gradients; its mode is restored."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), autocast(self.device, self.precision):
                yield
        finally:
            self.module.train(training)

    def check_batch(self, images: int) -> None:
        """Raise UserError if a batch of images exceeds the free memory: the image size may come from a file."""
        (h, w), free = self.size, free_memory()
        size = images * h * w * self.image_spec.channels * (self.image_spec.itemsize + 4)
        if free is not None and size > free:
            raise UserError(
                f"a batch of {images} images of {h}x{w} pixels needs {size / 2**30:.1f} GiB, and {free / 2**30:.1f} "
                "are free: use a smaller batch or another image size"
            )

    @property
    def classes(self) -> int:
        """Number of outputs of its own classifier; 0 if it has none."""
        module: Any = self.module
        layer = module.get_classifier() if hasattr(module, "get_classifier") else getattr(module, "head", None)
        return layer.out_features if isinstance(layer, nn.Linear) else 0


def load_frozen_encoder(
    name: str,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    untrained: bool = False,
    hints: Mapping[str, Any] | None = None,
) -> FrozenEncoder:
    """Load the encoder of a run, a file of weights, timm:NAME or hf:NAME, or a run's initial weights (`untrained`).

    See `weights.load.resolve_model` for `name` and `hints`. Raises UserError if there is no such model, or its initial
    weights are unknown.
    """
    if not untrained:
        weights = resolve_model(name, head=True, hints=hints)
        encoder = frozen_encoder_from_weights(weights, device=device, precision=precision)
        return replace(encoder, notes=tuple(describe(name, weights)))
    content = read_config(Path(name).expanduser())
    if content is None:
        raise UserError(f"{name} is not a run: its initial weights (--untrained) are unknown")
    config, text = pretrain_config(content[0], name), content[1]
    untrusted = untrusted_references(text, {"--init": config.init})
    if untrusted:
        raise UserError(f"{refusal(name, untrusted)}. Without --untrained, those weights can be evaluated themselves")
    model = build_model(config)
    if config.init:
        initialize_from(model, config)
    return encoder_from_module(config, model.encoder, device, precision)


def frozen_encoder_from_weights(
    weights: Weights, *, device: str = "auto", precision: Precision = "auto"
) -> FrozenEncoder:
    """Build the encoder of loaded weights. Raises UserError."""
    encoder = encoder_from_module(weights.config, build_encoder_with_weights(weights), device, precision, weights.step)
    if len(weights.classes) not in (0, encoder.classes):
        raise UserError(f"the file names {len(weights.classes)} classes, and its classifier has {encoder.classes}")
    return replace(encoder, names=weights.classes)


def encoder_from_module(
    config: ModelConfig, module: nn.Module, device: str, precision: Precision, step: int = 0
) -> FrozenEncoder:
    """Move a module to a device and wrap it. Raises UserError if the device does not exist."""
    target = choose_device(device)
    resolved = choose_precision(precision, target)
    choose_attention(module, target, resolved)
    return wrap_live_encoder(config, module.to(target), target, resolved, step)


def wrap_live_encoder(
    config: ModelConfig, module: nn.Module, device: torch.device, precision: Precision, step: int = 0
) -> FrozenEncoder:
    """Wrap a module that is on its device already."""
    mean, std = (torch.tensor(values, device=device) for values in config.normalization)
    return FrozenEncoder(config, module, config.image_size, image_spec(config), mean, std, device, precision, step)


def fingerprint(encoder: FrozenEncoder) -> str:
    """Return a digest of an encoder: equal digests give equal results in every evaluation."""
    config = encoder.config
    parts = config.model, config.image_size, encoder.image_spec, config.normalization, getattr(config, "epochs", None)
    digest = sha256(repr(parts).encode())
    for name, value in encoder.module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def rebuild_at_size(encoder: FrozenEncoder, size: str, **options: Any) -> nn.Module:
    """Build a copy of an encoder for another image size, on the same device, to train it further.

    Position tables are interpolated; `options` are more keywords of the backbone. Raises UserError for unsupported
    sizes.
    """
    config = replace(encoder.config, size=size)
    config = replace(config, model=replace(config.model, options={**config.model.options, **options}))
    tensors = {f"encoder.{name}": value.detach().cpu() for name, value in encoder.module.state_dict().items()}
    weights = Weights(config, tensors, "the encoder that is measured")
    module = build_encoder_with_weights(weights, trained_at=encoder.config)
    choose_attention(module, encoder.device, encoder.precision)
    return module.to(encoder.device)
