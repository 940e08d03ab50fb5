"""Files for timm, mmpretrain and detectron2."""

from pathlib import Path
from typing import Any

from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.errors import UserError
from pixmim.handover.files import named, write_json, write_tensors, write_torch
from pixmim.weights.arrange import move_downsampling_back
from pixmim.weights.openmmlab import MM
from pixmim.weights.recognise import Weights


def to_timm(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """timm's hub layout: config.json with the architecture and its keywords, model.safetensors."""
    run = weights.run
    if run.model.name == "convmae":
        raise UserError("timm has no ConvMAE: its encoder is pixmim's own (pixmim.load_encoder, or --to onnx)")
    mean, std = run.statistics
    classes = int(run.model.options.get("num_classes", 0))  # type: ignore[arg-type]
    options = {key: value for key, value in run.model.options.items() if key != "num_classes"}
    pool = run.model.options.get("global_pool", getattr(encoder, "global_pool", ""))
    config = {
        "architecture": run.model.backbone.split(".")[0],
        "num_classes": classes,
        "num_features": int(encoder.num_features),  # type: ignore[arg-type]
        "global_pool": pool,
        "model_args": {**_made(encoder, run.hw), **options},
        "pretrained_cfg": {
            "tag": "pixmim",
            "custom_load": False,
            "input_size": [run.channels, *run.hw],
            "fixed_input_size": True,
            "interpolation": run.crop.interpolation,
            "crop_pct": 0.875,
            "mean": mean,
            "std": std,
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc" if isinstance(encoder, SwinTransformer) else "head",
        },
    }
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", dict(encoder.state_dict()))
    return ['timm.create_model("local-dir:FOLDER", pretrained=True)']


def _made(encoder: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Keywords of timm's that a method sets without saying so in a run's options."""
    made: dict[str, Any] = {"img_size": list(size)}
    if isinstance(encoder, Beit):
        shared = encoder.rel_pos_bias is not None
        made["global_pool"] = encoder.global_pool
        made |= {"use_shared_rel_pos_bias": shared, "use_abs_pos_emb": encoder.pos_embed is not None}
        block: Any = encoder.blocks[0]
        made["use_rel_pos_bias"] = block.attn.relative_position_bias_table is not None
        made["init_values"] = 0.1 if block.gamma_1 is not None else 0
    return made


def to_mmpretrain(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """mmpretrain's names for a plain ViT, with MAE's decoder where there is one."""
    if type(encoder) is not VisionTransformer or weights.run.model.name == "simmim":
        raise UserError("for mmpretrain pixmim writes plain ViTs (MAE, LSMAE)")
    mean, std = weights.run.statistics
    state = named(MM, weights.tensors)
    meta = {"made_by": "pixmim", "img_size": weights.run.hw, "mean": mean, "std": std, "step": weights.step}
    write_torch(folder / "model.pth", {"state_dict": state, "meta": meta})
    return [
        "init_cfg=dict(type='Pretrained', checkpoint='FOLDER/model.pth', prefix='backbone.') of VisionTransformer",
        f"  with img_size={weights.run.hw}",
    ]


def to_detectron2(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """{"model": names of the encoder's own code}, which detectron2 matches by their ends without being asked to."""
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    if isinstance(encoder, SwinTransformer):
        state = move_downsampling_back(state)
    write_torch(folder / "model.pth", {"model": state, "matching_heuristics": True, "__author__": "pixmim"})
    return ['train.init_checkpoint = "FOLDER/model.pth"']
