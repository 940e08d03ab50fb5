"""Model registry: `create_model` builds any model by name, `create_encoder` its encoder alone."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import timm
from timm.layers.helpers import to_2tuple
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.models import convmae, vit
from pixmim.models.base import MaskedModel
from pixmim.models.cnn import CNNSimMIM, is_cnn
from pixmim.models.crossmae import CrossMAE
from pixmim.models.feature_maps import depth as depth
from pixmim.models.feature_maps import features as features
from pixmim.models.mae import MAE, DecoderOptions
from pixmim.models.simmim import SimMIM
from pixmim.utils.errors import UserError, did_you_mean, first_line, shown
from pixmim.utils.initialization import Module
from pixmim.utils.validation import check_name, check_options, plain

METHODS = ("mae", "lsmae", "mff", "pixio", "crossmae", "convmae", "simmim")

_DEPTHS = {"crossmae": 12, "pixio": 32}
"""Published numbers of decoder blocks other than MAE's 8."""


def _build(name: str, backbone: str, options: dict[str, Any]) -> MaskedModel:
    """Build a model, by default with the decoder of its paper."""
    if name == "simmim":
        return _simmim(backbone, **options)
    options = {"decoder_depth": _DEPTHS.get(name, 8), **options}
    if name == "lsmae" and "base" in backbone:
        options = {"decoder_dim": 384, "decoder_heads": 12, **options}
    sizes = {field.name: options.pop(field.name) for field in fields(DecoderOptions) if field.name in options}
    encoder, decoder = create_encoder(name, backbone, **options), DecoderOptions(**sizes)
    if isinstance(encoder, convmae.ConvMAEEncoder):
        return convmae.ConvMAE(encoder, decoder)
    plain = vit.check_plain(encoder, backbone)
    if name == "crossmae":
        return CrossMAE(plain, decoder)
    return MAE(plain, decoder, fused=name == "mff", learned_positions=name == "pixio")


def _simmim(backbone: str, head: str = "linear", outputs: int = 1, **options: Any) -> MaskedModel:
    encoder = create_encoder("simmim", backbone, **options)
    if is_cnn(encoder):
        model = CNNSimMIM(encoder, head, outputs)  # type: ignore[arg-type]
        size: Any = options.get("img_size", 224)
        _check_size(to_2tuple(size), model.patch, backbone)
        return model
    if not isinstance(encoder, SwinTransformer | Beit | VisionTransformer):
        raise UserError(f"SimMIM takes a Swin, Beit, ViT or convolutional network of timm, not '{backbone}'")
    simmim = SimMIM(encoder, head, outputs)  # type: ignore[arg-type]
    embed: Any = encoder.patch_embed
    _check_size(embed.img_size, simmim.stride, backbone)
    return simmim


SIMMIM_BEIT = {
    "global_pool": "token",  # with a final norm over all tokens
    "use_abs_pos_emb": False,
    "use_rel_pos_bias": False,
    "use_shared_rel_pos_bias": True,
    "init_values": 0.1,
}
"""timm keywords of SimMIM's ViT: a Beit with one relative position bias table for all blocks, layer scale 0.1."""

PIXIO = {"img_size": 256, "reg_tokens": 7}
"""timm keywords of Pixio's ViT: its 8 class tokens are timm's one and 7 registers, all with positions."""

BACKBONES = {"convmae": "convmae_base", "simmim": "swin_base_patch4_window7_224"}
"""Default backbones other than ViT-B/16."""


def create_model(name: str, backbone: str | None = None, **options: Any) -> MaskedModel:
    """Build a model for pre-training, with random weights from torch's global generator.

    Args:
        name: "mae", "lsmae", "mff", "pixio", "crossmae", "convmae" or "simmim".
        backbone: simmim: a timm Swin, Beit or ViT, or a network of convolutions (swin_base_patch4_window7_224,
            resnet50, convnext_base). convmae: convmae_base or convmae_tiny. Others: any plain timm ViT
            (vit_base_patch16_224).
        **options: Fields of `DecoderOptions`, or for simmim head ("linear", "mlp"). outputs is 1, or the bins of
            `ColorBins`. The others are passed to the backbone (img_size, in_chans, ...).

    Returns:
        A model, `model(images, mask) -> prediction (b n p*p*c*outputs)`, with the module `.encoder`.

    Raises:
        UserError: If the name, backbone or an option is unknown, or a value out of range (`pixmim.utils.validation`).
    """
    backbone = backbone or BACKBONES.get(name, "vit_base_patch16_224")
    options = plain(options)
    _check(name, METHODS, backbone, options)
    eps = options.pop("norm_eps", None)
    with _option_errors(backbone):
        return _with_eps(_build(name, backbone, options), eps)


def create_encoder(name: str, backbone: str, **options: Any) -> nn.Module:
    """Build the encoder of a method, without a head unless num_classes is given.

    Args:
        name: A method of `create_model`, or "timm" for an encoder as timm builds it.
        backbone: As for `create_model`.
        **options: Keywords of the backbone.

    Raises:
        UserError: As `create_model`.
    """
    _check(name, (*METHODS, "timm"), backbone, options)
    eps = options.pop("norm_eps", None)
    with _option_errors(backbone):
        if name == "convmae":
            return _with_eps(_convmae_encoder(backbone, **options), eps)
        if name == "lsmae":
            options = {"img_size": 448, **options}
        if name == "pixio":
            return _with_eps(_with_class_tokens(_timm(backbone, **{**PIXIO, **options})), eps)
        if name == "simmim" and backbone.startswith("beit"):
            options = {**SIMMIM_BEIT, **options}
        if name == "simmim" and backbone.startswith("swin"):
            options = {"drop_path_rate": 0.0, **options}
        return _with_eps(_timm(backbone, **options), eps)


def create_pretrained(name: str, classes: int = 0) -> nn.Module:
    """Build a timm model with its pretrained weights, from timm's cache or downloaded. Raises UserError."""
    check_name(name)
    return _timm(name, pretrained=True, num_classes=classes)


def _convmae_encoder(backbone: str, **options: Any) -> convmae.ConvMAEEncoder:
    if backbone not in convmae.SIZES:
        known = ", ".join(convmae.SIZES)
        raise UserError(
            f"there is no ConvMAE encoder '{backbone}'; known: {known}{did_you_mean(backbone, convmae.SIZES)}"
        )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    size = given.get("img_size", 224)
    _check_size(to_2tuple(size), convmae.PATCH, backbone)
    return convmae.ConvMAEEncoder(**{**convmae.SIZES[backbone], **given})


def _timm(backbone: str, pretrained: bool = False, num_classes: int = 0, **options: Any) -> nn.Module:
    """Build a timm model, by default without a head, checking that its patches divide its image size."""
    if not timm.is_model(backbone):
        known = timm.list_models(backbone.split("_")[0] + "_*") or timm.list_models("vit_*")
        raise UserError(f"timm has no model '{backbone}'{did_you_mean(backbone, known)}")
    options |= {"pretrained": pretrained, "num_classes": num_classes}
    encoder = _without_lacking(backbone, options)
    embed: Any = getattr(encoder, "patch_embed", None)
    if hasattr(embed, "img_size") and hasattr(embed, "patch_size"):
        _check_size(embed.img_size, embed.patch_size[0], backbone)
    return encoder


def _without_lacking(backbone: str, options: dict[str, Any]) -> nn.Module:
    """Build a timm model without keywords that change nothing: an image size for CNNs, a rate 0 of dropped paths."""
    try:
        return timm.create_model(backbone, **options)
    except TypeError as error:
        for name in ("img_size", "drop_path_rate"):
            if f"'{name}'" in str(error) and name in options and (name == "img_size" or not options[name]):
                return _without_lacking(backbone, {key: value for key, value in options.items() if key != name})
        raise


def _with_class_tokens(encoder: Module) -> Module:
    """Mark all prefix tokens as class tokens, whose mean is the feature of an image: see `features`."""
    encoder.class_tokens = encoder.num_prefix_tokens
    return encoder


def _with_eps(module: Module, eps: float | None) -> Module:
    """Set eps of the layer norms, except in patch embedding and merging: layer_norm_eps of Hugging Face's configs."""
    for name, layer in module.named_modules():
        fixed = "patch_embed" in name or "downsample" in name
        if eps is not None and isinstance(layer, nn.LayerNorm) and not fixed:
            layer.eps = eps
    return module


def _check(name: str, known: Collection[str], backbone: str, options: dict[str, Any]) -> None:
    """Raise UserError unless method, backbone and options may be passed to a constructor."""
    if name not in known:
        raise UserError(f"there is no model {shown(name)}; known: {', '.join(known)}{did_you_mean(name, known)}")
    check_name(backbone)
    check_options(options)


@contextmanager
def _option_errors(backbone: str) -> Iterator[None]:
    """Turn constructors' errors about incompatible options into UserError."""
    try:
        yield
    except (TypeError, ValueError, AssertionError, LookupError, ArithmeticError, AttributeError) as error:
        hint = ": it has no stochastic depth (--drop-path 0)" if "drop_path_rate" in str(error) else ""
        raise UserError(f"{backbone} cannot be built with these options: {first_line(error)}{hint}") from error


def _check_size(size: tuple[int, int], patch: int, backbone: str) -> None:
    if size[0] % patch or size[1] % patch:
        raise UserError(
            f"an image of {size[0]}x{size[1]} pixels is not divisible into {patch}x{patch} patches of '{backbone}': "
            f"choose multiples of {patch}"
        )
