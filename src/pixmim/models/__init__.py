"""Who predicts. One literal dict of builders; `create_model` is the only door."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import timm
from jaxtyping import Float
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixmim.models import convmae, swin, vit
from pixmim.models.base import Features, MaskedModel, unsupported_encoder
from pixmim.models.mae import MAE, DecoderOptions
from pixmim.models.simmim import SimMIM
from pixmim.utils.errors import UserError, did_you_mean, first_line, shown
from pixmim.utils.validation import check_name, check_options


def _mae(backbone: str, **options: Any) -> MAE:
    decoder, options = _split(options)
    return MAE(vit.check_plain(create_encoder("mae", backbone, **options), backbone), decoder)


def _lsmae(backbone: str, **options: Any) -> MAE:
    """MAE for long sequences: 448 px, and for ViT-B a thinner decoder (LSMAE, arXiv 2210.07224)."""
    thinner = {"decoder_dim": 384, "decoder_heads": 12} if "base" in backbone else {}
    return _mae(backbone, **{"img_size": 448, **thinner, **options})


def _convmae(backbone: str, **options: Any) -> MaskedModel:
    decoder, options = _split(options)
    return convmae.ConvMAE(_convmae_encoder(backbone, **options), decoder)


def _simmim(backbone: str, head: str = "linear", outputs: int = 1, **options: Any) -> MaskedModel:
    encoder = create_encoder("simmim", backbone, **options)
    if not isinstance(encoder, SwinTransformer | Beit | VisionTransformer):
        raise UserError(f"SimMIM takes a swin_, beit_ or vit_ backbone of timm's, not '{backbone}'")
    return SimMIM(encoder, head, outputs)  # type: ignore[arg-type]


Module = TypeVar("Module", bound=nn.Module)

BUILDERS: dict[str, Callable[..., MaskedModel]] = {
    "mae": _mae,
    "lsmae": _lsmae,
    "convmae": _convmae,
    "simmim": _simmim,
}

SIMMIM_BEIT = {
    "global_pool": "token",  # with a final norm over all tokens
    "use_abs_pos_emb": False,
    "use_rel_pos_bias": False,
    "use_shared_rel_pos_bias": True,
    "init_values": 0.1,
}
"""timm's keywords that make a Beit SimMIM's ViT: one table of relative positions for all blocks, layer scale 0.1."""

BACKBONES = {"convmae": "convmae_base", "simmim": "swin_base_patch4_window7_224"}
"""Each method's own backbone, where it is not ViT-B/16."""


def create_model(name: str, backbone: str | None = None, **options: Any) -> MaskedModel:
    """A model ready for pre-training: `model(images, mask) -> prediction (b n p*p*c)`, with the module `.encoder`.

    name      "mae", "lsmae", "convmae" or "simmim"
    backbone  mae, lsmae: any plain timm ViT (vit_base_patch16_224); simmim: a timm Swin, Beit or ViT
              (swin_base_patch4_window7_224); convmae: convmae_base, convmae_tiny
    options   decoder_dim, decoder_depth, decoder_heads, decoder_stride, predict_patch (see `DecoderOptions`), or for
              simmim head ("linear", "mlp"); for all of them outputs, which is 1, or the bins of ColorBins: the
              prediction is then (b n p*p*c*bins), bins last; the others go to the backbone (img_size, in_chans ...)

    Weights are drawn from torch's global generator. Raises UserError for an unknown name, backbone or option, and for a
    value that is out of bounds (see `pixmim.utils.validation`).
    """
    backbone = backbone or BACKBONES.get(name, "vit_base_patch16_224")
    _check(name, BUILDERS, backbone, options)
    eps = options.pop("norm_eps", None)
    with _refusing(backbone):
        return _with_eps(BUILDERS[name](backbone, **options), eps)


def create_encoder(name: str, backbone: str, **options: Any) -> nn.Module:
    """The encoder alone of the method `name`, as that method makes it; for "timm", as timm does. No head, unless
    options ask for num_classes. Raises UserError as `create_model`.
    """
    _check(name, (*BUILDERS, "timm"), backbone, options)
    eps = options.pop("norm_eps", None)
    with _refusing(backbone):
        if name == "convmae":
            return _with_eps(_convmae_encoder(backbone, **options), eps)
        if name == "lsmae":
            options = {"img_size": 448, **options}
        if name == "simmim" and backbone.startswith("beit"):
            options = {**SIMMIM_BEIT, **options}
        if name == "simmim" and backbone.startswith("swin"):
            options = {"drop_path_rate": 0.0, **options}
        return _with_eps(_timm(backbone, **options), eps)


def create_pretrained(name: str, classes: int = 0) -> nn.Module:
    """One of timm's models with its published weights, which timm downloads or finds in its cache. Raises UserError."""
    check_name(name)
    return _timm(name, pretrained=True, num_classes=classes)


def features(encoder: nn.Module, images: Float[Tensor, "b c h w"], blocks: int = 1) -> Features:
    """What a finished encoder says of normalized images, from its last `blocks` blocks.

    Raises UserError for a module that pixmim does not know as an encoder.
    """
    if isinstance(encoder, VisionTransformer | Beit):
        return vit.features(encoder, images, blocks)
    if isinstance(encoder, SwinTransformer):
        return swin.features(encoder, images)
    if isinstance(encoder, convmae.ConvMAEEncoder):
        return convmae.features(encoder, images, blocks)
    raise unsupported_encoder(encoder)


def _convmae_encoder(backbone: str, **options: Any) -> convmae.ConvMAEEncoder:
    if backbone not in convmae.SIZES:
        known = ", ".join(convmae.SIZES)
        raise UserError(f"ConvMAE's encoders are {known}, and not '{backbone}'{did_you_mean(backbone, convmae.SIZES)}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    size = given.get("img_size", 224)
    _check_size(size if isinstance(size, tuple) else (size, size), convmae.PATCH, backbone)
    return convmae.ConvMAEEncoder(**{**convmae.SIZES[backbone], **given})


def _timm(backbone: str, pretrained: bool = False, num_classes: int = 0, **options: Any) -> nn.Module:
    """A timm model, without a head unless asked for classes, whose image size its patches divide."""
    if not timm.is_model(backbone):
        known = timm.list_models(backbone.split("_")[0] + "_*") or timm.list_models("vit_*")
        raise UserError(f"timm has no model '{backbone}'{did_you_mean(backbone, known)}")
    encoder: nn.Module = timm.create_model(backbone, pretrained=pretrained, num_classes=num_classes, **options)
    embed: Any = getattr(encoder, "patch_embed", None)
    if hasattr(embed, "img_size") and hasattr(embed, "patch_size"):
        _check_size(embed.img_size, embed.patch_size[0], backbone)
    return encoder


def _with_eps(module: Module, eps: float | None) -> Module:
    """Set what the layer norms of blocks and outputs add to the variance, if not the published 1e-6 (Swin: 1e-5).

    A Swin's norms where patches are embedded or merged keep theirs, as in transformers, whose layer_norm_eps this is.
    """
    for name, layer in module.named_modules():
        fixed = "patch_embed" in name or "downsample" in name
        if eps is not None and isinstance(layer, nn.LayerNorm) and not fixed:
            layer.eps = eps
    return module


def _check(name: str, known: Collection[str], backbone: str, options: dict[str, Any]) -> None:
    """Raise UserError unless a method, a backbone and its options may be handed to a constructor."""
    if name not in known:
        raise UserError(f"there is no model {shown(name)}{did_you_mean(name, known)} Known: {', '.join(known)}")
    check_name(backbone)
    check_options(options)


@contextmanager
def _refusing(backbone: str) -> Iterator[None]:
    """Raise UserError for what constructors raise over options that do not go together."""
    try:
        yield
    except (TypeError, ValueError, AssertionError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{backbone} refuses an option: {first_line(error)}") from error


def _check_size(size: tuple[int, int], patch: int, backbone: str) -> None:
    if size[0] % patch or size[1] % patch:
        raise UserError(
            f"an image of {size[0]}x{size[1]} pixels does not divide into the {patch}x{patch} patches of '{backbone}': "
            f"choose multiples of {patch}"
        )


def _split(options: dict[str, Any]) -> tuple[DecoderOptions, dict[str, Any]]:
    """The keywords that are the decoder's, and those for the backbone."""
    own = {field.name: options[field.name] for field in fields(DecoderOptions) if field.name in options}
    return DecoderOptions(**own), {name: value for name, value in options.items() if name not in own}
