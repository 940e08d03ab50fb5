"""Export to transformers: weights, config.json and preprocessor_config.json."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.config import ModelConfig
from pixmim.utils.errors import UserError
from pixmim.utils.files import write_text_atomically
from pixmim.weights.detect import Weights
from pixmim.weights.formats.huggingface import HF_BEIT, HF_SWIN, HF_SWIN_BODY, HF_VIT, HF_VIT_BODY


def to_hf(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write ViTMAE for MAE and LSMAE on squares, masked-image ViT or Swin for SimMIM, otherwise the encoder only."""
    if weights.config.model.options.get("num_classes"):
        raise UserError("a classifier is not handed to transformers: its heads pool otherwise")
    if isinstance(encoder, Beit):
        source, kind, config = HF_BEIT, "BeitModel", _hf_beit(encoder)
    elif isinstance(encoder, SwinTransformer):
        source, kind = (HF_SWIN, "SwinForMaskedImageModeling") if weights.has_decoder else (HF_SWIN_BODY, "SwinModel")
        config = _hf_swin(encoder)
    elif isinstance(encoder, VisionTransformer):
        if encoder.num_prefix_tokens != 1 or encoder.cls_token is None or encoder.pos_embed is None:
            raise UserError("transformers' ViT has one class token and a table of positions, and this one does not")
        h, w = weights.config.image_size
        simmim = weights.has_decoder and weights.config.model.name == "simmim"
        mae = weights.has_decoder and not simmim and h == w  # transformers' ViTMAE makes square tables only
        source, kind = (HF_VIT, "ViTMAEForPreTraining") if mae else (HF_VIT_BODY, "ViTModel")
        if simmim:
            source, kind = HF_VIT, "ViTForMaskedImageModeling"
        config = _hf_vit(encoder, weights) if mae else _hf_vit(encoder)
    else:
        raise UserError("transformers has no ConvMAE: see --to onnx")
    if weights.config.model.head == "mlp" and weights.has_decoder and weights.config.model.name == "simmim":
        raise UserError("transformers' head for masked images is one convolution, and this one is an MLP")
    run = weights.config
    h, w = run.image_size
    config |= {
        "architectures": [kind],
        "image_size": h if h == w else [h, w],
        "num_channels": run.channels,
        "dtype": "float32",
    }
    body = source in (HF_BEIT, HF_SWIN_BODY, HF_VIT_BODY)
    tensors = {f"encoder.{key}": value for key, value in weights.encoder.items()} if body else weights.tensors
    _write_json(folder / "config.json", config)
    write_text_atomically(folder / "model.safetensors", save(source.translate_back(tensors), metadata={"format": "pt"}))
    mean, std = run.normalization
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": h, "width": w},
            "resample": 3,
            "do_rescale": run.dtype != "float32",
            "rescale_factor": 1 / (65535 if run.dtype == "uint16" else 255),
            "do_normalize": True,
            "image_mean": mean,
            "image_std": std,
        },
    )
    more = ", add_pooling_layer=False" if kind in ("ViTModel", "BeitModel", "SwinModel") else ""
    return [f'transformers.{kind}.from_pretrained("FOLDER"{more})']


def _hf_blocks(encoder: VisionTransformer | Beit) -> dict[str, Any]:
    blocks: Any = encoder.blocks
    return {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "layer_norm_eps": blocks[0].norm1.eps,
        "patch_size": encoder.patch_embed.patch_size[0],
    }


def _hf_vit(encoder: VisionTransformer, weights: Weights | None = None) -> dict[str, Any]:
    config = {"model_type": "vit", **_hf_blocks(encoder), "encoder_stride": encoder.patch_embed.patch_size[0]}
    if weights is not None:
        model = weights.config.model
        config |= {
            "model_type": "vit_mae",
            "decoder_hidden_size": model.decoder_dim,
            "decoder_num_hidden_layers": model.decoder_depth,
            "decoder_num_attention_heads": model.decoder_heads,
            "decoder_intermediate_size": 4 * model.decoder_dim,
            **_pretraining(weights.config),
        }
    return config


def _pretraining(config: ModelConfig) -> dict[str, Any]:
    """Return what transformers wants to know of the pre-training, as far as it is known."""
    known: dict[str, Any] = {} if config.mask is None else {"mask_ratio": config.mask.ratio}
    return known if config.target is None else known | {"norm_pix_loss": config.target.normalize_patches}


def _hf_swin(encoder: SwinTransformer) -> dict[str, Any]:
    stages: Any = encoder.layers
    patch: Any = encoder.patch_embed.patch_size
    windows = {stage.blocks[0].window_size for stage in stages}
    if len(windows) > 1:
        raise UserError(f"transformers' Swin has one window for all stages, and this one has {sorted(windows)}")
    return {
        "model_type": "swin",
        "embed_dim": encoder.embed_dim,
        "depths": [len(stage.blocks) for stage in stages],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in stages],
        "window_size": next(iter(windows))[0],
        "patch_size": patch[0],
        "layer_norm_eps": encoder.norm.eps,
        "encoder_stride": patch[0] * 2 ** (len(stages) - 1),
        "use_absolute_embeddings": False,
    }


def _hf_beit(encoder: Beit) -> dict[str, Any]:
    blocks: Any = encoder.blocks
    block = blocks[0]
    return {
        "model_type": "beit",
        **_hf_blocks(encoder),
        "layer_scale_init_value": 0.1 if block.gamma_1 is not None else 0,
        "use_shared_relative_position_bias": encoder.rel_pos_bias is not None,
        "use_relative_position_bias": block.attn.relative_position_bias_table is not None,
        "use_absolute_position_embeddings": encoder.pos_embed is not None,
        "use_mask_token": False,
        "use_mean_pooling": False,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
