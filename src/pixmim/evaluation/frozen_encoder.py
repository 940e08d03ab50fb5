"""The encoder that is measured, ready to use: a run's product, the same untrained, or one in training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pixmim.build import build_model, image_spec
from pixmim.config import ModelConfig
from pixmim.config_io import pretrain_config
from pixmim.data.dataset import ImageSpec
from pixmim.training.precision import Precision, choose_attention, choose_device, choose_precision
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.utils.memory import free_memory
from pixmim.utils.trust import refusal, untrusted_references
from pixmim.weights.detect import Weights, read_config
from pixmim.weights.load import build_encoder_with_weights, describe, initialize_from, resolve_model


@dataclass(frozen=True)
class FrozenEncoder:
    """A timm module with what is needed to feed it. size: (h, w) in pixels; mean, std: per channel, on the device.

    run    what builds it
    names  of the outputs of its own classifier, in their order; empty where its file does not name them
    notes  lines to print: how far its training is, and what was assumed of it
    """

    config: ModelConfig
    module: nn.Module
    size: tuple[int, int]
    image_spec: ImageSpec
    mean: Tensor
    std: Tensor
    device: torch.device
    precision: Precision
    step: int
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def preprocess(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pictures as they come out of a crop, on the device and normalized."""
        return flip_and_normalize(images.to(self.device, non_blocking=True), None, self.mean, self.std)

    def check_batch(self, images: int) -> None:
        """Raise UserError if so many images take more memory than is free: their size may come from a file."""
        (h, w), free = self.size, free_memory()
        size = images * h * w * self.image_spec.channels * (self.image_spec.itemsize + 4)
        if free is not None and size > free:
            raise UserError(
                f"a batch of {images} images of {h}x{w} pixels takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} "
                "are free: give fewer at once, or another size"
            )

    @property
    def classes(self) -> int:
        """What its own classifier tells apart: the outputs of its head, or 0 if it has none."""
        head = getattr(self.module, "head", None)
        layer = getattr(head, "fc", head)
        return layer.out_features if isinstance(layer, nn.Linear) else 0


def load_frozen_encoder(
    name: str,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    untrained: bool = False,
    hints: Mapping[str, Any] | None = None,
) -> FrozenEncoder:
    """The encoder that `name` means (see `resolve_model`, also for `hints`); with `untrained` the one a run began with.

    Raises UserError.
    """
    if untrained:
        found = read_config(Path(name).expanduser())
        if found is None:
            raise UserError(f"{name} is not a run, so what it was before training is not known")
        run, text = pretrain_config(found[0], name), found[1]
        strange = untrusted_references(text, {"--init": run.init})
        if strange:
            raise UserError(f"{refusal(name, strange)}. Without --untrained, those weights can be measured themselves")
        model = build_model(run)
        if run.init:
            initialize_from(model, run)
        return of_module(run, model.encoder, device, precision)
    weights = resolve_model(name, head=True, hints=hints)
    encoder = frozen_encoder_from_weights(weights, device=device, precision=precision)
    return replace(encoder, notes=tuple(describe(name, weights)))


def frozen_encoder_from_weights(
    weights: Weights, *, device: str = "auto", precision: Precision = "auto"
) -> FrozenEncoder:
    """The encoder of weights that are at hand. Raises UserError."""
    found = of_module(weights.config, build_encoder_with_weights(weights), device, precision, weights.step)
    if len(weights.classes) not in (0, found.classes):
        raise UserError(f"the file names {len(weights.classes)} classes, and its classifier has {found.classes}")
    return replace(found, names=weights.classes)


def fingerprint(encoder: FrozenEncoder) -> str:
    """A text that is the same for encoders of which every evaluation, and fine-tuning, must find the same."""
    run = encoder.config
    found = sha256(
        repr((run.model, run.image_size, encoder.image_spec, run.normalization, getattr(run, "epochs", None))).encode()
    )
    for name, value in encoder.module.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def of_module(
    config: ModelConfig, module: nn.Module, device: str, precision: Precision, step: int = 0
) -> FrozenEncoder:
    """Move a module to a device, and wrap it. Raises UserError if there is no such device."""
    where = choose_device(device)
    chosen = choose_precision(precision, where)
    choose_attention(module, where, chosen)
    return wrap_live_encoder(config, module.to(where), where, chosen, step)


def wrap_live_encoder(
    config: ModelConfig, module: nn.Module, device: torch.device, precision: Precision, step: int = 0
) -> FrozenEncoder:
    """Wrap a module that is on its device already."""
    mean, std = (torch.tensor(values, device=device) for values in config.normalization)
    return FrozenEncoder(config, module, config.image_size, image_spec(config), mean, std, device, precision, step)


def rebuild_at_size(encoder: FrozenEncoder, size: str, **options: Any) -> nn.Module:
    """A copy of an encoder made for images of another size ("512", "192x384"), on its device, to be trained further.

    Tables of positions are refitted. options: more keywords for the backbone, such as drop_path_rate. Raises UserError
    for a size that it cannot take.
    """
    run = replace(encoder.config, size=size)
    run = replace(run, model=replace(run.model, options={**run.model.options, **options}))
    tensors = {f"encoder.{name}": value.detach().cpu() for name, value in encoder.module.state_dict().items()}
    module = build_encoder_with_weights(
        Weights(run, tensors, "the encoder that is measured"), trained_at=encoder.config
    )
    choose_attention(module, encoder.device, encoder.precision)
    return module.to(encoder.device)
