"""Export encoders to timm, Hugging Face, mmpretrain, detectron2 and ONNX."""

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.evaluation.attentive_probe import AttentiveProbe, load_probe
from pixmim.export.huggingface import to_hf
from pixmim.export.model_card import model_card
from pixmim.export.onnx import to_onnx
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.files import atomic_folder, write_json, write_text_atomically
from pixmim.utils.trust import inside
from pixmim.weights.detect import Weights
from pixmim.weights.formats import MM
from pixmim.weights.key_map import downsampling_to_previous_stage
from pixmim.weights.load import build_encoder_with_weights, describe, resolve_model
from pixmim.weights.save import save_encoder

_PROBE_CODE = """\
import json
import timm
import torch
from safetensors.torch import load_file

encoder = timm.create_model("local-dir:.", pretrained=True).eval()
probe = load_file("attentive.safetensors")
with open("attentive.json") as file:
    classes = json.load(file)["classes"]

@torch.no_grad()
def classify(images):  # normalized, (b c h w)
    x = encoder.forward_features(images){tokens}  # patch tokens (b n d)
    attention = (probe["queries"] @ x.transpose(1, 2) / x.shape[-1] ** 0.5).softmax(dim=-1)
    pooled = torch.einsum("bqd,qdv->bqv", attention @ x, probe["values"]).flatten(1)
    pooled = (pooled - probe["norm.running_mean"]) / (probe["norm.running_var"] + {eps}).sqrt()
    return pooled @ probe["head.weight"].T + probe["head.bias"]  # logits (b classes)"""
"""Python that classifies with an exported attentive probe, by torch and timm only."""


def to_timm(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write timm's hub layout, as in a run's own encoder/."""
    if weights.config.model.name == "convmae":
        raise UserError("timm has no ConvMAE: load the encoder with pixmim.load_encoder, or use --to onnx")
    save_encoder(encoder, folder, weights.config, weights.step, weights.steps)
    return ['timm.create_model("local-dir:FOLDER", pretrained=True)']


def to_mmpretrain(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write a plain ViT with mmpretrain's keys, and MAE's decoder if there is one."""
    if type(encoder) is not VisionTransformer or weights.config.model.name in ("simmim", "pixio"):
        raise UserError("--to mmpretrain supports plain ViTs only, with one class token (MAE, LSMAE, MFF)")
    _write_torch(folder, {"state_dict": MM.from_pixmim(weights.tensors), "meta": _meta(weights, encoder)})
    return [
        "init_cfg=dict(type='Pretrained', checkpoint='FOLDER/model.pth', prefix='backbone.') of VisionTransformer",
        f"  with img_size={weights.config.image_size}",
    ]


def to_detectron2(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write {"model": tensors with the original code's keys}, which detectron2 matches by their suffixes."""
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    if isinstance(encoder, SwinTransformer):
        state = downsampling_to_previous_stage(state)
    meta = _meta(weights, encoder)
    _write_torch(folder, {"model": state, "matching_heuristics": True, "__author__": "pixmim", "meta": meta})
    return ['train.init_checkpoint = "FOLDER/model.pth"']


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
    """Write a model for another project into a new folder, by default MODEL-FORMAT, with a model card: README.md.

    See `resolve_model` for `name` and `hints`. `to` is one of `FORMATS`, `push` a repository of the Hugging Face hub
    to upload the folder to, and `description` what the images of the training show. With `attentive`, the newest
    attentive probe of the run is added as attentive.safetensors and attentive.json (timm only). Returns lines about
    what was written and how to load it. Raises UserError if the project does not support the model, or the folder
    cannot be written.
    """
    weights = resolve_model(name, with_decoder=True, hints=hints)
    folder = folder or Path(f"{Path(name.replace(':', '-')).name}-{to}")
    if os.path.lexists(folder):
        raise UserError(f"{folder} already exists: choose another --out")
    encoder, run = build_encoder_with_weights(weights), Path(name).expanduser()
    probe = _find_probe(run, weights, to) if attentive else None
    eps, stretch, notes = weights.config.model.options.get("norm_eps"), weights.config.stretch, list[str]()
    if eps is not None and to in ("timm", "mmpretrain", "detectron2"):
        notes.append(f"{to} cannot store the layer norms' epsilon of {eps:g}: its features differ by a few thousandths")
    if stretch:
        text = "map these percentiles of each channel of an image to its full range first"
        notes.append(f"{to} cannot store --stretch {stretch}: {text}")
    try:
        with atomic_folder(folder) as temporary:
            usage = FORMATS[to](weights, encoder, temporary)
            code = [] if probe is None else _write_probe(*probe, temporary, is_map=isinstance(encoder, SwinTransformer))
            card = model_card(weights, to, usage, run, description, notes, code)
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


def _write_probe(probe: AttentiveProbe, classes: list[str], folder: Path, *, is_map: bool) -> list[str]:
    """Write attentive.safetensors and attentive.json into the folder of an encoder exported to timm.

    Returns lines of Python that classify with them; `is_map` if the encoder returns a map (b h w d), as a Swin.
    """
    tensors = {name: value.contiguous() for name, value in probe.state_dict().items()}
    write_text_atomically(folder / "attentive.safetensors", save(tensors, {"format": "pt"}))
    write_json(folder / "attentive.json", {"classes": classes, "queries": len(probe.queries)})
    tokens = ".flatten(1, 2)" if is_map else "[:, encoder.num_prefix_tokens :]"
    return _PROBE_CODE.format(tokens=tokens, eps=probe.norm.eps).splitlines()


def _find_probe(run: Path, weights: Weights, to: str) -> tuple[AttentiveProbe, list[str]]:
    """Return the newest attentive probe of a run, and its classes. Raises UserError if none fits the weights."""
    if to != "timm":
        raise UserError(f"--attentive needs --to timm, not --to {to}")
    files = sorted(inside(run, "evaluations").glob("attentive-trained-*.safetensors"), key=lambda f: f.lstat().st_mtime)
    if not files:
        raise UserError(f"{run} has no attentive probe: run `pixmim evaluate attentive` with it as MODEL first")
    probe, classes, step = load_probe(inside(run, f"evaluations/{files[-1].name}"))
    if step != weights.step:
        raise UserError(f"the probe is of step {step:,}, the encoder of {weights.step:,}: repeat the evaluation")
    return probe, classes


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
    meta: dict[str, Any] = {"made_by": "pixmim", "img_size": weights.config.image_size, "mean": mean, "std": std}
    if blocks is not None and hasattr(blocks[0].attn, "num_heads"):
        meta |= {"num_attention_heads": blocks[0].attn.num_heads, "layer_norm_eps": blocks[0].norm1.eps}
    if weights.has_decoder:
        meta["decoder_num_attention_heads"] = weights.config.model.decoder_heads
    return meta | {"step": weights.step}


def _write_torch(folder: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch.save to a path does not raise OSError on a full disk
    torch.save(content, buffer)
    write_text_atomically(folder / "model.pth", buffer.getvalue())
