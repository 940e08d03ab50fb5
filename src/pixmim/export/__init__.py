"""Export encoders to timm, Hugging Face, mmpretrain, detectron2 and ONNX."""

import io
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.config import ModelConfig
from pixmim.evaluation.attentive_probe import load_newest_probe
from pixmim.export.attentive import write_probe
from pixmim.export.huggingface import to_hf
from pixmim.export.model_card import model_card
from pixmim.export.onnx import to_onnx
from pixmim.models.cnn import is_cnn
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.files import atomic_folder, write_text_atomically
from pixmim.weights.detect import Weights
from pixmim.weights.formats import MM, MM_CONVNEXT, MM_RESNET
from pixmim.weights.key_map import downsampling_to_previous_stage
from pixmim.weights.load import build_encoder_with_weights, describe, resolve_model
from pixmim.weights.save import save_encoder


def to_timm(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write timm's hub layout, as in a run's own encoder/."""
    if weights.config.model.name == "convmae":
        raise UserError("timm has no ConvMAE: load the encoder with pixmim.load_encoder, or use --to onnx")
    save_encoder(encoder, folder, weights.config, weights.step, weights.steps, list(weights.classes))
    return ['timm.create_model("local-dir:FOLDER", pretrained=True)']


def to_mmpretrain(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write a plain ViT, ResNet or ConvNeXt with mmpretrain's keys, and the decoder or head if there is one."""
    depth = _resnet_depth(weights)
    if depth or isinstance(encoder, ConvNeXt):
        keys, meta = MM_RESNET if depth else MM_CONVNEXT, _meta(weights, encoder)
        _write_torch(folder, {"state_dict": keys.from_pixmim(weights.tensors), "meta": meta})
        name = f"ResNet with depth={depth}" if depth else "ConvNeXt"
        return [f"init_cfg=dict(type='Pretrained', checkpoint='FOLDER/model.pth', prefix='backbone.') of {name}"]
    if type(encoder) is not VisionTransformer or weights.config.model.name in ("simmim", "pixio", "crossmae"):
        raise UserError(
            "--to mmpretrain supports ResNet-18, 34, 50, 101 and 152, ConvNeXt, and the ViTs of MAE, LSMAE and MFF only"
        )
    _write_torch(folder, {"state_dict": MM.from_pixmim(weights.tensors), "meta": _meta(weights, encoder)})
    return [
        "init_cfg=dict(type='Pretrained', checkpoint='FOLDER/model.pth', prefix='backbone.') of VisionTransformer",
        f"  with img_size={weights.config.image_size}",
    ]


def to_detectron2(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write {"model": tensors with the original code's keys}, which detectron2 matches by their suffixes.

    Those of a ResNet are detectron2's own.
    """
    depth, usage = _resnet_depth(weights), 'train.init_checkpoint = "FOLDER/model.pth"'
    if is_cnn(encoder) and not depth:
        raise UserError(
            f"detectron2 has torchvision's ResNets only, not {weights.config.model.backbone}: use --to timm or onnx"
        )
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    if isinstance(encoder, SwinTransformer):
        state = downsampling_to_previous_stage(state)
    if depth:
        state = {_detectron2_resnet(key): value for key, value in state.items()}
        usage += f" of ResNet with depth={depth}, stride_in_1x1=False and images in RGB"
    meta = _meta(weights, encoder)
    _write_torch(folder, {"model": state, "matching_heuristics": True, "__author__": "pixmim", "meta": meta})
    return [usage]


def _resnet_depth(weights: Weights) -> int:
    """Return the layers of a ResNet that torchvision, mmpretrain and detectron2 have; 0 for other models."""
    name = weights.config.model.backbone.split(".")[0]
    return next((depth for depth in (18, 34, 50, 101, 152) if name == f"resnet{depth}"), 0)


def _detectron2_resnet(key: str) -> str:
    """Return detectron2's name of a tensor of torchvision's ResNet: layer1.0.bn2.bias is res2.0.conv2.norm.bias."""
    key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
    key = re.sub(r"(^|\.)bn(\d)\.", r"\1conv\2.norm.", key)
    key = key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return key if key.startswith(("res", "fc.")) else f"stem.{key}"


FORMATS: dict[str, Callable[[Weights, nn.Module, Path], list[str]]] = {
    "timm": to_timm,
    "hf": to_hf,
    "mmpretrain": to_mmpretrain,
    "detectron2": to_detectron2,
    "onnx": to_onnx,
}
"""Functions that write a model into an empty folder. They return lines on how to load it; FOLDER is replaced."""


def export_model(
    name: str,
    to: str,
    folder: Path | None = None,
    push: str = "",
    hints: Mapping[str, Any] | None = None,
    *,
    description: str = "",
    attentive: bool = False,
) -> list[str]:
    """Write a model for another project into a new folder, with a model card: README.md.

    Args:
        name: The model: see `resolve_model`.
        to: One of `FORMATS`.
        folder: The folder. Default: MODEL-FORMAT.
        push: Repository of the Hugging Face hub to upload the folder to.
        hints: Facts that the model's file does not contain: see `resolve_model`.
        description: What the images of the training show, for the model card.
        attentive: Add the newest attentive probe of the run, as attentive.safetensors and attentive.json (timm only).

    Returns:
        Lines to print about what was written and how to load it.

    Raises:
        UserError: If the project does not support the model, or the folder cannot be written.
    """
    weights = resolve_model(name, with_decoder=True, hints=hints)
    folder = folder or Path(f"{os.path.basename(os.path.abspath(name.replace(':', '-')))}-{to}")
    if os.path.lexists(folder):
        raise UserError(f"{folder} already exists: choose another --out")
    encoder, run = build_encoder_with_weights(weights), Path(name).expanduser()
    if attentive and to != "timm":
        raise UserError(f"--attentive needs --to timm, not --to {to}")
    probe = load_newest_probe(run, weights.step) if attentive else None
    eps, stretch, notes = weights.config.model.options.get("norm_eps"), weights.config.stretch, list[str]()
    if eps is not None and to in ("timm", "mmpretrain", "detectron2"):
        notes.append(f"{to} cannot store the layer norms' epsilon of {eps:g}: its features differ by a few thousandths")
    if stretch:
        text = "map these percentiles of each channel of an image to its full range first"
        notes.append(f"--stretch {stretch} is not part of the exported model: {text}")
    try:
        with atomic_folder(folder) as temporary:
            usage = FORMATS[to](weights, encoder, temporary)
            code = [] if probe is None else write_probe(*probe, temporary, encoder)
            readable = _is_read_back(temporary, encoder, weights.config)
            card = model_card(weights, to, usage, run, description, notes, code, readable)
            write_text_atomically(temporary / "README.md", card)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    literal = json.dumps(str(folder))[1:-1].replace("'", "\\'")  # fits into a Python string with quotes of either kind
    lines = [
        *describe(name, weights),
        f"written to {folder}, with a model card to complete: README.md",
        *(f"  {line.replace('FOLDER', literal)}" for line in usage),
    ]
    lines += [f"  {note}" for note in notes]
    if probe is not None:
        lines.append(f"  attentive.safetensors, attentive.json: the attentive probe, {len(probe[1]):,} classes")
    return [*lines, _push(folder, push)] if push else lines


def _is_read_back(folder: Path, encoder: nn.Module, config: ModelConfig) -> bool:
    """Return True if pixmim reads what was written as the same encoder of the same images, without further facts."""
    try:
        found: Any = build_encoder_with_weights(resolve_model(str(folder)))
    except UserError:
        return False
    images, back = torch.rand(1, config.channels, *config.image_size, generator=torch.Generator()), found.pixmim_config
    if (back.image_size, back.channels, back.dtype) != (config.image_size, config.channels, config.dtype):
        return False
    with torch.no_grad():
        expected, features = encoder(images), found(images)
    close = expected.shape == features.shape and (features - expected).norm() < 0.02 * expected.norm()
    return close and np.allclose(back.normalization, config.normalization, rtol=1e-4)


def _push(folder: Path, repository: str) -> str:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError("--push needs huggingface_hub: pip install 'pixmim[hub]'") from error
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        url = api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{folder} was written, but not pushed to {repository}: {first_line(error)}") from error
    return f"pushed to {url}"


def _meta(weights: Weights, encoder: nn.Module) -> dict[str, Any]:
    """Return the settings that `weights.infer_config` reads from a file, in addition to its tensors."""
    mean, std = weights.config.normalization
    blocks: Any = getattr(encoder, "blocks", None)
    meta: dict[str, Any] = {"made_by": "pixmim", "dtype": weights.config.dtype}
    meta |= {"img_size": weights.config.image_size, "mean": mean, "std": std}
    if blocks is not None and hasattr(blocks[0], "attn") and hasattr(blocks[0].attn, "num_heads"):
        meta |= {"num_attention_heads": blocks[0].attn.num_heads, "layer_norm_eps": blocks[0].norm1.eps}
    if weights.has_decoder:
        meta["decoder_num_attention_heads"] = weights.config.model.decoder_heads
    return meta | {"step": weights.step, "classes": list(weights.classes)}


def _write_torch(folder: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch.save to a path does not raise OSError on a full disk
    torch.save(content, buffer)
    write_text_atomically(folder / "model.pth", buffer.getvalue())
