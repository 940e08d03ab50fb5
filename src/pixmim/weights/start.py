"""Derive the settings of a run from the weights that it continues, for the recipe `adapt`."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer

from pixmim.build import build_encoder
from pixmim.config import ArchitectureConfig, MaskConfig, ModelConfig, Option, PretrainConfig, TargetConfig
from pixmim.models.cnn import is_cnn
from pixmim.models.vit import check_plain
from pixmim.utils.errors import UserError
from pixmim.utils.initialization import build_on_meta
from pixmim.weights.load import resolve_model
from pixmim.weights.published import describe_timm
from pixmim.weights.save import method_options


def continue_from(recipe: PretrainConfig, init: str) -> PretrainConfig:
    """Fill in what weights decide: model, image size, channels, normalization, mask, and distance to the target.

    The target becomes PixMIM's, low frequencies. A decoder that the weights lack gets a size that suits the encoder; if
    they have one, its warm-up is dropped. `init` is a file, a run, timm:NAME or hf:NAME; of timm:NAME, nothing is
    downloaded. Raises UserError if the weights cannot be read, or pixmim does not pre-train their model.
    """
    try:
        start, has_decoder = _read(init)
        model, stride = _architecture(start, has_decoder)
    except UserError as error:
        to = f"`pixmim import {quote(init)} --to FOLDER` takes what a file does not state; then --init FOLDER"
        raise UserError(f"--init {init}: {error}" + f". {to}" * Path(init).expanduser().is_file()) from error
    simmim = model.name == "simmim"
    mask = MaskConfig("blocks", ratio=0.6, block_size=32, whole_blocks=True) if simmim else MaskConfig()
    target = start.target or (TargetConfig(normalize_patches=False, distance="l1") if simmim else TargetConfig())
    mean, std = start.normalization
    h, w = (max(stride, side // stride * stride) for side in start.image_size)
    return replace(
        recipe,
        init=init,
        model=model,
        size=f"{h}" if h == w else f"{h}x{w}",
        channels=start.channels,
        dtype=start.dtype,
        tiff_pages=start.tiff_pages,
        stretch=start.stretch,
        max_no_data=start.max_no_data,
        bands=start.bands,
        mean=mean,
        std=std,
        mask=start.mask or mask,
        target=replace(target, kind="low-frequency", radius="auto") if target.kind == "pixels" else target,
        optim=replace(recipe.optim, decoder_warmup=0.0) if has_decoder else recipe.optim,
    )


def _read(init: str) -> tuple[ModelConfig, bool]:
    """Return the configuration of weights, and whether they include a decoder. Raises UserError."""
    if init.startswith("timm:"):
        return describe_timm(init.removeprefix("timm:")), False
    weights = resolve_model(init, with_decoder=True)
    return weights.config, weights.has_decoder


def _architecture(start: ModelConfig, has_decoder: bool) -> tuple[ArchitectureConfig, int]:
    """Return the masked model of an encoder, without a classifier, and of what its image size must be a multiple.

    Raises:
        UserError: For unsupported encoders.
    """
    options: dict[str, Option] = {name: v for name, v in start.model.options.items() if name != "num_classes"}
    model = replace(start.model, options=options)
    encoder: Any = build_on_meta(lambda: build_encoder(replace(start, model=model)), model.backbone)
    if isinstance(encoder, Eva):
        raise UserError(
            f"{model.backbone} is a ViT with rotary positions (timm's Eva), which pixmim does not "
            "pre-train. Choose one with a position table, such as timm:vit_small_patch14_reg4_dinov2"
        )
    if model.name == "timm":
        if isinstance(encoder, Beit):  # keywords that SimMIM's form of it would replace
            own: dict[str, Any] = method_options(encoder, start)
            options |= {name: value for name, value in own.items() if name not in ("img_size", "in_chans")}
        is_simmim = isinstance(encoder, Beit | SwinTransformer) or is_cnn(encoder)
        if not is_simmim:
            check_plain(encoder, model.backbone)
        model = replace(model, name="simmim" if is_simmim else "mae", options=options)
    if is_cnn(encoder):
        info: Any = encoder.feature_info
        return model, int(info[-1]["reduction"])
    if has_decoder:
        return model, 1
    width = int(encoder.num_features)
    dim, depth, heads = (128, 2, 4) if width <= 192 else (256, 4, 8) if width <= 384 else (512, 8, 16)
    return replace(model, decoder_dim=dim, decoder_depth=depth, decoder_heads=heads), 1
