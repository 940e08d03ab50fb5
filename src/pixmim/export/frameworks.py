"""Export to timm, mmpretrain and detectron2."""

import io
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.utils.errors import UserError
from pixmim.utils.files import write_text_atomically
from pixmim.weights.detect import Weights
from pixmim.weights.formats.openmmlab import MM
from pixmim.weights.save import save_encoder
from pixmim.weights.tensor_ops import move_downsampling_back


def to_timm(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write timm's hub layout, as in a run's own encoder/."""
    if weights.config.model.name == "convmae":
        raise UserError("timm has no ConvMAE: its encoder is pixmim's own (pixmim.load_encoder, or --to onnx)")
    save_encoder(encoder, folder, weights.config, weights.step, weights.steps)
    return ['timm.create_model("local-dir:FOLDER", pretrained=True)']


def to_mmpretrain(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write a plain ViT under mmpretrain's names, with MAE's decoder if there is one."""
    if type(encoder) is not VisionTransformer or weights.config.model.name == "simmim":
        raise UserError("for mmpretrain pixmim writes plain ViTs (MAE, LSMAE)")
    state = MM.translate_back(weights.tensors)
    _write_torch(folder / "model.pth", {"state_dict": state, "meta": _meta(weights, encoder)})
    return [
        "init_cfg=dict(type='Pretrained', checkpoint='FOLDER/model.pth', prefix='backbone.') of VisionTransformer",
        f"  with img_size={weights.config.image_size}",
    ]


def to_detectron2(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write {"model": names of the original code}, which detectron2 matches by their ends by itself."""
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    if isinstance(encoder, SwinTransformer):
        state = move_downsampling_back(state)
    content = {"model": state, "matching_heuristics": True, "__author__": "pixmim", "meta": _meta(weights, encoder)}
    _write_torch(folder / "model.pth", content)
    return ['train.init_checkpoint = "FOLDER/model.pth"']


def _meta(weights: Weights, encoder: nn.Module) -> dict[str, Any]:
    """Return what a file must state besides its tensors, as `weights.detect` reads it."""
    mean, std = weights.config.normalization
    blocks: Any = getattr(encoder, "blocks", None)
    meta: dict[str, Any] = {"made_by": "pixmim", "img_size": weights.config.image_size, "mean": mean, "std": std}
    if blocks is not None and hasattr(blocks[0].attn, "num_heads"):
        meta |= {"num_attention_heads": blocks[0].attn.num_heads, "layer_norm_eps": blocks[0].norm1.eps}
    if weights.has_decoder:
        meta["decoder_num_attention_heads"] = weights.config.model.decoder_heads
    return meta | {"step": weights.step}


def _write_torch(path: Path, content: dict[str, Any]) -> None:
    """Write a file for torch.load. torch.save itself does not raise OSError when the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_text_atomically(path, buffer.getvalue())
