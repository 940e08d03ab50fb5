"""Export to transformers: weights, config.json and preprocessor_config.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.utils.errors import UserError
from pixmim.utils.files import write_json, write_text_atomically
from pixmim.weights.detect import Weights
from pixmim.weights.formats import HF_BEIT, HF_PIXIO, HF_SWIN, HF_SWIN_BODY, HF_VIT, HF_VIT_BODY
from pixmim.weights.key_map import CheckpointFormat

_BODIES = ("ViTModel", "BeitModel", "SwinModel", "PixioModel")


def to_hf(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write ViTMAE for MAE and LSMAE on squares, masked-image ViT or Swin for SimMIM, otherwise the encoder only."""
    run = weights.config
    if run.model.options.get("num_classes"):
        raise UserError("classifiers cannot be exported to transformers, whose heads pool differently")
    if weights.has_decoder and not _predicts_pixels(weights, encoder):  # color bins, or larger patches
        weights = replace(weights, tensors={f"encoder.{key}": value for key, value in weights.encoder.items()})
    checkpoint_format, kind, config = _model(weights, encoder)
    if run.model.head == "mlp" and weights.has_decoder and run.model.name == "simmim":
        raise UserError("transformers' head for masked images is one convolution, but this model's is an MLP")
    h, w = run.image_size
    config |= {
        "architectures": [kind],
        "image_size": h if h == w else [h, w],
        "num_channels": run.channels,
        "dtype": "float32",
    }
    tensors = weights.tensors
    if kind in _BODIES:
        tensors = {f"encoder.{key}": value for key, value in weights.encoder.items()}
    write_json(folder / "config.json", config)
    content = save(checkpoint_format.from_pixmim(tensors), metadata={"format": "pt"})
    write_text_atomically(folder / "model.safetensors", content)
    mean, std = run.normalization
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": h, "width": w},
        "resample": 2 if run.interpolation == "bilinear" else 3,  # PIL's numbers
        "do_rescale": run.dtype != "float32",
        "rescale_factor": 1 / (65535 if run.dtype == "uint16" else 255),
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    has_pooler = kind == "PixioModel" or config.get("use_mean_pooling")
    pooler = ", add_pooling_layer=False" * (kind in _BODIES and not has_pooler)
    return [f'transformers.{kind}.from_pretrained("FOLDER"{pooler})']


def _model(weights: Weights, encoder: nn.Module) -> tuple[CheckpointFormat, str, dict[str, Any]]:
    """Return the format, class and configuration of a model in transformers."""
    if isinstance(encoder, Beit):
        return HF_BEIT, "BeitModel", _beit(encoder)
    if isinstance(encoder, SwinTransformer):
        masked = (HF_SWIN, "SwinForMaskedImageModeling") if weights.has_decoder else (HF_SWIN_BODY, "SwinModel")
        return *masked, _swin(encoder)
    if not isinstance(encoder, VisionTransformer):
        kind = weights.config.model.backbone
        raise UserError(f"transformers' models do not have the layout of {kind}: use --to timm or --to onnx")
    if weights.config.model.name == "pixio":
        if weights.config.image_size[0] != weights.config.image_size[1]:
            raise UserError(f"transformers' Pixio takes squares only, but this model {weights.config.size} pixels")
        blocks = _blocks(encoder)
        ratio, rest = divmod(blocks.pop("intermediate_size"), encoder.embed_dim)
        if rest:
            raise UserError("transformers' Pixio takes an integer as mlp_ratio, unlike this model")
        config = {"model_type": "pixio", **blocks, "mlp_ratio": ratio, "n_cls_tokens": encoder.num_prefix_tokens}
        return HF_PIXIO, "PixioModel", config
    rows = encoder.patch_embed.num_patches + 1
    if encoder.cls_token is None or encoder.pos_embed is None or encoder.pos_embed.shape[1] != rows:
        raise UserError(
            "transformers' ViT has one class token and a table of its and all patches' positions, unlike this model"
        )
    patch = encoder.patch_embed.patch_size[0]
    config = {"model_type": "vit", **_blocks(encoder), "encoder_stride": patch}
    h, w = weights.config.image_size
    if weights.has_decoder and weights.config.model.name == "simmim":
        return HF_VIT, "ViTForMaskedImageModeling", config
    if not weights.has_decoder or h != w or weights.config.model.name in ("mff", "crossmae"):  # not ViTMAE's
        return HF_VIT_BODY, "ViTModel", config
    model, mask, target = weights.config.model, weights.config.mask, weights.config.target
    config |= {
        "model_type": "vit_mae",
        "decoder_hidden_size": model.decoder_dim,
        "decoder_num_hidden_layers": model.decoder_depth,
        "decoder_num_attention_heads": model.decoder_heads,
        "decoder_intermediate_size": 4 * model.decoder_dim,
    }
    config |= {} if mask is None else {"mask_ratio": mask.ratio}
    config |= {} if target is None else {"norm_pix_loss": target.normalize_patches}
    return HF_VIT, "ViTMAEForPreTraining", config


def _predicts_pixels(weights: Weights, encoder: nn.Module) -> bool:
    """Return True if a decoder predicts one number per value of the encoder's patches, as those of transformers do."""
    if weights.config.model.name == "simmim":
        return weights.config.target is None or weights.config.target.distance != "cross_entropy"
    patch: Any = encoder.patch_embed.patch_size if isinstance(encoder, VisionTransformer) else (0,)
    predicted = weights.tensors.get("decoder.predict.weight")
    return predicted is not None and predicted.shape[0] == patch[0] ** 2 * weights.config.channels


def _blocks(encoder: VisionTransformer | Beit) -> dict[str, Any]:
    blocks: Any = encoder.blocks
    if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in blocks):
        raise UserError(f"transformers has no blocks like {type(blocks[0]).__name__} of this model: use --to timm")
    return {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "layer_norm_eps": blocks[0].norm1.eps,
        "patch_size": encoder.patch_embed.patch_size[0],
    }


def _swin(encoder: SwinTransformer) -> dict[str, Any]:
    stages: Any = encoder.layers
    patch: Any = encoder.patch_embed.patch_size
    windows = {stage.blocks[0].window_size for stage in stages}
    if len(windows) > 1:
        raise UserError(f"transformers' Swin has one window size for all stages, but this model has {sorted(windows)}")
    return {
        "model_type": "swin",
        "embed_dim": encoder.embed_dim,
        "depths": [len(stage.blocks) for stage in stages],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in stages],
        "window_size": next(iter(windows))[0],
        "patch_size": patch[0],
        "mlp_ratio": stages[0].blocks[0].mlp.fc1.out_features / encoder.embed_dim,
        "layer_norm_eps": encoder.norm.eps,
        "encoder_stride": patch[0] * 2 ** (len(stages) - 1),
        "use_absolute_embeddings": False,
    }


def _beit(encoder: Beit) -> dict[str, Any]:
    block: Any = encoder.blocks[0]
    return {
        "model_type": "beit",
        **_blocks(encoder),
        "layer_scale_init_value": 0.1 if block.gamma_1 is not None else 0,
        "use_shared_relative_position_bias": encoder.rel_pos_bias is not None,
        "use_relative_position_bias": block.attn.relative_position_bias_table is not None,
        "use_absolute_position_embeddings": encoder.pos_embed is not None,
        "use_mask_token": False,
        "use_mean_pooling": isinstance(encoder.norm, nn.Identity),  # the norm is then that of the pooled feature
    }
