"""Test that official checkpoints are recognized by their keys, and predict what the official code predicts."""

import json
import pickle
import sys
import types
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from helpers import official
from helpers.models import old_swin_layout
from helpers.official import DIM, GRID, HEADS, State, linear, ln, norm, random
from pixmim import load_encoder, load_model, patchify
from pixmim.build import build_encoder, build_model
from pixmim.config import MaskConfig, PretrainConfig, TargetConfig
from pixmim.masking import Mask
from pixmim.utils.errors import UserError
from pixmim.utils.patches import interpolate_positions
from pixmim.weights.adapt import channels, relative_biases
from pixmim.weights.detect import Weights, read_weights
from pixmim.weights.formats import FORMATS
from pixmim.weights.load import import_weights, initialize_from, resolve_model

transformers = pytest.importorskip("transformers")

VIT = {"num_heads": HEADS}
BOTH = {"num_heads": HEADS, "decoder_heads": official.DECODER_HEADS}
Make = Callable[..., PretrainConfig]


def saved(path: Path, state: State, key: str = "model", **more: object) -> Path:
    torch.save({key: state, **more}, path)
    return path


def openmmlab(state: State) -> State:
    """Rename MAE's tensors to mmselfsup's keys."""
    renamed = {}
    for name, value in state.items():
        if name in ("mask_token", "decoder_pos_embed") or name.startswith("decoder_"):
            name = "neck." + name.replace("decoder_norm", "ln1")
        elif not name.startswith(("head", "probe")):
            name = "backbone." + name.replace("blocks", "layers").replace("patch_embed.proj", "patch_embed.projection")
            name = "backbone.ln1" + name.removeprefix("backbone.norm") if name.startswith("backbone.norm") else name
            name = name.replace("backbone.fc_norm", "backbone.ln2")
        for old, new in (("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")):
            name = name.replace(old, new)
        renamed[name.replace(".norm1.", ".ln1.").replace(".norm2.", ".ln2.").replace("probe.", "neck.bn.")] = value
    return {
        name.replace("head.weight", "head.fc.weight").replace("head.bias", "head.fc.bias"): v
        for name, v in renamed.items()
    }


def mm_swin(state: State) -> State:
    """Rename SimMIM's tensors to mmselfsup's keys, with merged patches in the order of nn.Unfold."""
    renamed = {}
    for name, value in state.items():
        if ".downsample." in name:
            pieces = value.chunk(4, dim=-1)  # of patches (row, column) 00, 10, 01, 11
            value = torch.stack([pieces[0], pieces[2], pieces[1], pieces[3]], dim=-1).flatten(-2)
        name = name.replace("encoder.layers", "backbone.stages").replace("encoder.norm", "encoder.norm3")
        name = name.replace("encoder.", "backbone.").replace("patch_embed.proj", "patch_embed.projection")
        name = (
            name.replace(".attn.", ".attn.w_msa.")
            .replace("mlp.fc1", "ffn.layers.0.0")
            .replace("mlp.fc2", "ffn.layers.1")
        )
        renamed[name.replace("decoder.", "neck.decoder.") if name.startswith("decoder.") else name] = value
    return renamed


Forward = Callable[[Tensor, Tensor, State], Tensor]
PRE_TRAINED: list[tuple[str, Callable[[], State], Callable[[State], State], Forward, int, int, dict[str, Any]]] = [
    ("MAE", official.mae, dict, official.mae_forward, 16, 32, BOTH),
    ("MAE", lambda: official.mae(key_bias=False), dict, official.mae_forward, 16, 32, BOTH),
    ("MAE", official.mae, lambda s: {f"module.{k}": v for k, v in s.items()}, official.mae_forward, 16, 32, BOTH),
    ("CrossMAE", official.crossmae, dict, official.crossmae_forward, 16, 32, BOTH),
    ("ConvMAE", official.convmae, dict, official.convmae_forward, 4, 32, BOTH),
    ("SimMIM on Swin", official.simmim_swin, dict, official.simmim_swin_forward, 64, 32, {"img_size": 32}),
    ("SimMIM on ViT", official.simmim_vit, dict, official.simmim_vit_forward, 16, 32, {}),
    ("mmselfsup", official.mae, openmmlab, official.mae_forward, 16, 32, BOTH),
    ("mmpretrain (Swin)", official.simmim_swin, mm_swin, official.simmim_swin_forward, 64, 32, {"img_size": 32}),
]


@pytest.mark.parametrize(("origin", "make", "rename", "forward", "n", "side", "known"), PRE_TRAINED)
def test_a_pretraining_file_predicts_what_its_own_code_predicts(
    origin: str,
    make: Callable[[], State],
    rename: Callable[[State], State],
    forward: Forward,
    n: int,
    side: int,
    known: dict[str, Any],
    tmp_path: Path,
) -> None:
    state = make()
    path = saved(tmp_path / "model.pth", rename(state))
    model = load_model(path, **known)
    assert origin in resolve_model(str(path), hints=known).format_name
    images, hidden = torch.randn(2, 3, side, side), torch.rand(2, n).argsort(dim=1) < n // 2
    with torch.no_grad():
        prediction, expected = model(images, Mask.from_hidden(hidden)), forward(images, hidden, state)
    expected = patchify(expected, model.patch) if expected.ndim == 4 else expected
    torch.testing.assert_close(prediction, expected, atol=1e-4, rtol=0)

    folder = tmp_path / "imported"
    import_weights(resolve_model(str(path), hints=known), folder)
    with torch.no_grad():
        assert torch.equal(load_model(folder)(images, Mask.from_hidden(hidden)), prediction)
    config = resolve_model(str(folder)).config
    if config.model.name != "convmae" and not (config.model.backbone.startswith("swin") and old_swin_layout()):
        timm.create_model(f"local-dir:{folder}/encoder", pretrained=True)


def test_settings_of_a_training_file_are_used_except_its_input_size(tmp_path: Path) -> None:
    official.mae_training_file(tmp_path / "checkpoint-3.pth")
    config = resolve_model(str(tmp_path / "checkpoint-3.pth"), hints=BOTH).config
    assert config.image_size == (32, 32) and config.mask.ratio == 0.6
    assert config.target == TargetConfig("pixels", normalize_patches=False)


@pytest.mark.parametrize(("side", "radius"), [(224, 40), (224, 10), (224, 112), (32, 6), (33, 5), (32, 1)])
def test_the_radius_of_pixmim_is_that_of_the_files_filter(side: int, radius: int, tmp_path: Path) -> None:
    distance = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2).square()
    kept = (distance[:, None] + distance[None, :] <= radius**2).float().expand(3, -1, -1).clone()
    state = openmmlab(official.mae()) | {"target_generator.low_pass_filter": kept}
    weights = resolve_model(str(saved(tmp_path / "pixmim.pth", state, "state_dict", meta={})), hints=BOTH)
    assert weights.config.target == TargetConfig("low-frequency", radius=radius, variant="paper-code")
    assert list(weights.ignored_keys) == ["target_generator.low_pass_filter"]
    for unusable in (kept * 0, kept[0], kept[:0]):
        saved(tmp_path / "x.pth", state | {"target_generator.low_pass_filter": unusable})
        with pytest.raises(UserError, match="is no mask of frequencies"):
            resolve_model(str(tmp_path / "x.pth"), hints=BOTH)


def test_simmims_settings_give_the_image_size(tmp_path: Path, foreign: "Foreign") -> None:
    node = foreign("yacs.config", "CfgNode", dict)
    path = saved(tmp_path / "ckpt.pth", official.simmim_swin(), config=node(DATA=node(IMG_SIZE=32)))
    foreign.forget()
    config = resolve_model(str(path)).config
    assert config.image_size == (32, 32) and config.target.distance == "l1"
    assert config.mask == MaskConfig("blocks", 0.6, 32, True)


# ---- classifiers


def pooled(x: Tensor, p: State) -> Tensor:
    return ln(x.mean(dim=1), p, "fc_norm")


def test_fine_tuned_files_keep_their_heads(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    head = random(linear("head", DIM, 5), seed=3)

    mae = random(official.vit() | norm("fc_norm", DIM)) | head
    expected = {"mae": pooled(official.vit_tokens(images, mae)[:, 1:], mae) @ head["head.weight"].T + head["head.bias"]}
    conv = official.convmae(classes=5)
    tokens = official.run_blocks(official.convmae_stages(images, conv, None)[2], conv, "blocks3", HEADS)
    expected["conv"] = pooled(tokens, conv) @ conv["head.weight"].T + conv["head.bias"]
    beit = random(official.beit(shared=False) | norm("fc_norm", DIM)) | head
    x = torch.cat([beit["cls_token"].expand(2, -1, -1), official.embed(images, beit)], 1)

    def bias(i: int) -> Tensor:
        return official.relative_bias(beit[f"blocks.{i}.attn.relative_position_bias_table"], GRID, True)

    x = official.run_blocks(x, beit, "blocks", HEADS, bias)
    expected["beit"] = pooled(x[:, 1:], beit) @ head["head.weight"].T + head["head.bias"]
    swin = random(official.swin() | linear("head", 24, 5))
    x = official.swin_map(official.swin_embed(images, swin), swin).mean(dim=(1, 2))
    expected["swin"] = x @ swin["head.weight"].T + swin["head.bias"]

    states = {"mae": mae, "conv": conv, "beit": beit, "swin": swin, "mm": openmmlab(mae)}
    for name, state in states.items():
        path = saved(tmp_path / f"{name}.pth", state)
        encoder = load_encoder(path, **({"img_size": 32} if name == "swin" else VIT if name != "beit" else {}))
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), expected["mae" if name == "mm" else name], atol=1e-4, rtol=0)
        with pytest.raises(UserError, match="contains only an encoder"):
            load_model(path, **({"img_size": 32} if name == "swin" else VIT))


def test_the_batch_norm_of_a_linear_probe_is_folded_into_its_head(tmp_path: Path) -> None:
    state = random(official.vit() | norm("norm", DIM))
    head, mean, variance = random(linear("head", DIM, 5), seed=4), torch.randn(DIM), torch.rand(DIM) + 0.1
    statistics = {"running_mean": mean, "running_var": variance, "num_batches_tracked": torch.tensor(9)}
    official_file = state | {f"head.1.{k.removeprefix('head.')}": v for k, v in head.items()}
    official_file |= {f"head.0.{k}": v for k, v in statistics.items()}
    mm = openmmlab(state | head | {f"probe.{k}": v for k, v in statistics.items()})
    images = torch.randn(2, 3, 32, 32)
    x = ln(official.vit_tokens(images, state), state, "norm")[:, 0]
    expected = F.batch_norm(x, mean, variance, eps=1e-6) @ head["head.weight"].T + head["head.bias"]
    for name, file in (("mae", official_file), ("mm", mm)):
        with torch.no_grad():
            logits = load_encoder(saved(tmp_path / f"{name}.pth", file), **VIT)(images)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_probe_of_the_corner_token_of_convmae_is_ignored(tmp_path: Path) -> None:
    state = official.convmae(classes=5)
    state = {k.replace("fc_norm", "norm"): v for k, v in state.items()}
    weights = resolve_model(str(saved(tmp_path / "probe.pth", state)), hints=VIT)
    assert weights.ignored_keys.keys() == {"head.weight", "head.bias"}
    assert "first token" in weights.ignored_keys["head.bias"]
    load_encoder(tmp_path / "probe.pth", **VIT)


# ---- wrappers of training code


def under(prefix: str, state: State, shift: float = 0.0) -> State:
    return {f"{prefix}{name}": value + shift for name, value in state.items()}


ENCODER = random(official.vit() | norm("norm", DIM))
HEAD: State = {"projector.0.weight": torch.ones(3, 3), "criterion.center": torch.ones(1, 3)}
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "Lightning": ({"state_dict": under("model.backbone.", ENCODER) | HEAD}, {}, 0),
    "Lightning, compiled": ({"state_dict": under("_orig_mod.module.model.encoder.", ENCODER) | HEAD}, {}, 0),
    "DDP": ({"model": under("module.", ENCODER)}, {}, 0),
    "solo-learn": (
        {"state_dict": under("momentum_backbone.", ENCODER, 1) | under("backbone.", ENCODER) | HEAD}, {}, 0
    ),
    "solo-learn's average": (
        {"state_dict": under("momentum_backbone.", ENCODER, 1) | under("backbone.", ENCODER) | HEAD},
        {"prefix": "momentum_backbone."}, 1,
    ),
    "lightly's DINO": (
        {"state_dict": under("student_backbone.", ENCODER) | under("teacher_backbone.vit.", ENCODER, 1) | HEAD},
        {"prefix": "teacher_backbone"}, 1,
    ),
    "DINO": (
        {"student": under("module.backbone.", ENCODER), "teacher": under("backbone.", ENCODER, 1) | HEAD}, {}, 1
    ),
    "DINO's student": (
        {"student": under("module.backbone.", ENCODER), "teacher": under("backbone.", ENCODER, 1)},
        {"prefix": "student"}, 0,
    ),
    "DINO's student by its full name": (
        {"student": under("module.backbone.", ENCODER), "teacher": under("backbone.", ENCODER, 1)},
        {"prefix": "student.module.backbone"}, 0,
    ),
    "MoCo v3": (
        {"state_dict": under("module.momentum_encoder.", ENCODER, 1) | under("module.base_encoder.", ENCODER)}, {}, 0
    ),
    "I-JEPA": ({"encoder": under("module.", ENCODER), "target_encoder": under("module.", ENCODER, 1)}, {}, 1),
    "timm": ({"state_dict": ENCODER, "state_dict_ema": under("", ENCODER, 1), "epoch": 3}, {}, 0),
    "timm's average": ({"state_dict": ENCODER, "state_dict_ema": under("", ENCODER, 1)}, {"ema": True}, 1),
    "DeiT's average": ({"model": ENCODER, "model_ema": under("module.", ENCODER, 1)}, {"ema": True}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_is_found_in_wrappers_of_training_code(name: str, tmp_path: Path) -> None:
    content, known, shift = WRAPPED[name]
    torch.save(content, tmp_path / "x.ckpt")
    weights = resolve_model(str(tmp_path / "x.ckpt"), hints={**VIT, **known})
    assert weights.encoder.keys() == ENCODER.keys()
    assert all(torch.equal(weights.encoder[key], ENCODER[key] + shift) for key in ENCODER)
    noted = ("solo-learn", "DINO", "I-JEPA", "MoCo v3", "timm", "timm's average", "DeiT's average")
    assert name not in noted or any("using " in note for note in weights.notes)
    load_encoder(tmp_path / "x.ckpt", **VIT, **known)


def test_official_prefixes_are_no_wrappers_and_a_wrong_prefix_is_named(tmp_path: Path) -> None:
    """Read keys of SimMIM, which start with encoder., and of mmselfsup, which start with backbone., in a wrapper."""
    for state in (official.simmim_vit(), openmmlab(official.mae())):
        path = saved(tmp_path / "x.pth", under("model.", state), "state_dict")
        assert resolve_model(str(path), hints=BOTH).has_decoder
    with pytest.raises(UserError, match=r"--prefix teacher matches no tensor; their names start with .model"):
        resolve_model(str(path), hints={**BOTH, "prefix": "teacher"})
    with pytest.raises(UserError, match=r"--ema: .* contains no average"):
        resolve_model(str(path), hints={**BOTH, "ema": True})


@pytest.mark.parametrize(
    ("key", "shape", "named"),
    [
        ("layers.0.blocks.0.attn.logit_scale", (3, 1, 1), "a Swin V2"),
        ("blocks.0.ls1.gamma", (DIM,), "a ViT with layer scale, such as DINOv2's"),
        ("encoder.layer.0.layer_scale1.lambda1", (DIM,), "a ViT with layer scale"),
        ("blocks.0.mlp.w12.weight", (8, 8), "a ViT with SwiGLU"),
        ("rope_embed.periods", (4,), "a ViT with rotary positions"),
        ("dist_token", (1, 1, DIM), "a DeiT with a distillation token"),
        ("stages.0.blocks.0.conv_dw.weight", (4, 1, 7, 7), "a convolutional network"),
        ("layer1.0.conv1.weight", (4, 4, 3, 3), "a convolutional network"),
    ],
)
def test_an_unsupported_model_is_named(key: str, shape: tuple[int, ...], named: str, tmp_path: Path) -> None:
    """Name the kind of model also below a prefix, and if all other keys are supported."""
    for prefix, rest in (
        (("", {}), ("model.backbone.", {})) if "convol" in named else (("", ENCODER), ("module.", ENCODER))
    ):
        path = saved(tmp_path / "x.pth", under(prefix, {**rest, key: torch.ones(shape)}))
        with pytest.raises(UserError, match=f"{named}.* is not supported"):
            resolve_model(str(path), hints=VIT)


# ---- sizes, normalization, and what is assumed


def test_positions_are_interpolated_to_another_grid_of_the_same_length(tiny_run: Make, tmp_path: Path) -> None:
    """Interpolate from 6x6 to 4x9 patches, which are both 36."""
    state = random(official.vit() | norm("norm", DIM))
    state["pos_embed"] = torch.randn(1, 37, DIM)
    path = saved(tmp_path / "x.pth", state)
    encoder = load_encoder(path, **VIT, img_size=(32, 72))
    expected = interpolate_positions(state["pos_embed"], (6, 6), (4, 9))
    assert torch.equal(encoder.pos_embed, expected) and not torch.equal(expected, state["pos_embed"])
    unchanged = load_encoder(path, **VIT, size="32x72", img_size=(32, 72))
    assert torch.equal(unchanged.pos_embed, state["pos_embed"])
    assert resolve_model(str(path), hints={**VIT, "size": "32x72"}).config.image_size == (32, 72)
    with pytest.raises(UserError, match="64x144 makes 8x18 patches of 8 pixels, but it has a table of 36 positions"):
        resolve_model(str(path), hints={**VIT, "size": "64x144"})
    (note,) = resolve_model(str(path), hints=VIT).notes
    assert note.endswith("--size 48x48 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225")
    with pytest.warns(UserWarning, match="assumed, .*: --size 48x48 --mean 0.485"):
        load_encoder(path, **VIT)
    with warnings.catch_warnings(action="error"):
        told: Any = load_encoder(path, **VIT, size="32x72", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert told.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and told.pixmim_config.std == (0.4, 0.5, 0.6)

    run = tiny_run(size="32x48", model=replace(tiny_run().model, name="simmim", backbone="beit_base_patch16_224"))
    beit: Any = build_encoder(run)
    import_weights(Weights(run, under("encoder.", dict(beit.state_dict())), "a test"), tmp_path / "beit")
    again: Any = load_encoder(tmp_path / "beit", img_size=(48, 32))
    table, old = (module.rel_pos_bias.relative_position_bias_table for module in (again, beit))
    assert torch.equal(table, relative_biases(old, (4, 6), (6, 4)))


def test_mean_and_std_of_the_caller_take_precedence(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", ENCODER)
    hints = {**VIT, "size": "32", "mean": (0.1, 0.2, 0.3), "std": (0.1, 0.2, 0.3)}
    weights = resolve_model(str(path), hints=hints)
    assert weights.config.normalization == (hints["mean"], hints["std"]) and not weights.notes
    import_weights(weights, tmp_path / "imported")
    assert resolve_model(str(tmp_path / "imported")).config.normalization == (hints["mean"], hints["std"])
    assert resolve_model(str(tmp_path / "imported"), hints={"mean": (0.5, 0.5, 0.5)}).config.mean == (0.5, 0.5, 0.5)
    (tmp_path / "timm" / "config.json").parent.mkdir()
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path / "timm")
    for name in ("imported", "imported/encoder", "imported/encoder/model.safetensors", "timm"):
        for hint, value in (("size", "64"), ("num_heads", 7), ("decoder_heads", 7), ("prefix", "teacher")):
            with pytest.raises(UserError, match=r"is known to be .*: omit --(size|heads|decoder-heads|prefix)$"):
                resolve_model(str(tmp_path / name), hints={hint: value})


@pytest.mark.parametrize(("windows", "size"), [((12, 12, 12, 12), 384), ((12, 12, 12, 6), 192), ((4, 4, 4, 2), 64)])
def test_the_windows_of_a_swin_give_its_size(windows: tuple[int, ...], size: int, tmp_path: Path) -> None:
    """A window is cut to its stage's map: timm's Swin of that size and window has these tables."""
    options = {"embed_dim": 12, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=size, window_size=windows[0], **options
    )
    tables = [stage.blocks[0].attn.relative_position_bias_table for stage in swin.layers]
    assert [len(table) for table in tables] == [(2 * window - 1) ** 2 for window in windows]
    path = saved(tmp_path / "swin.pth", swin.state_dict())
    assert resolve_model(str(path)).config.image_size == (size, size)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(load_encoder(path)(images), swin.eval()(images))


def test_a_swin_is_interpolated_to_windows_cut_in_one_direction(tmp_path: Path) -> None:
    """At 64x96 pixels, the last maps have 2x3 patches, and a window of 4 becomes 2x3."""
    options = {"embed_dim": 12, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "window_size": 4, "num_classes": 0}
    source: Any = timm.create_model("swin_tiny_patch4_window7_224", img_size=128, **options)
    for stage in source.layers:
        torch.nn.init.normal_(stage.blocks[0].attn.relative_position_bias_table)
    path = saved(tmp_path / "swin.pth", source.state_dict())
    oblong: Any = load_encoder(path, img_size=(64, 96))
    tables, old = ([s.blocks[0].attn.relative_position_bias_table for s in one.layers] for one in (oblong, source))
    assert oblong.layers[3].blocks[0].window_size == (2, 3)
    assert torch.equal(tables[3], relative_biases(old[3], (4, 4), (2, 3))) and torch.equal(tables[1], old[1])
    import_weights(Weights(oblong.pixmim_config, under("encoder.", oblong.state_dict()), "a test"), tmp_path / "oblong")
    back: Any = load_encoder(tmp_path / "oblong", img_size=(128, 128))
    table = back.layers[3].blocks[0].attn.relative_position_bias_table
    assert torch.equal(table, relative_biases(tables[3], (2, 3), (4, 4)))


@pytest.mark.parametrize("size", [48, (32, 48)])
def test_positions_may_leave_out_the_class_token(size: Any, tmp_path: Path) -> None:
    """As those of FlexiViT, in timm's keyword no_embed_class."""
    options = {"img_size": size, "num_classes": 0, "depth": 1}
    source = timm.create_model("flexivit_small", **options)
    path = saved(tmp_path / "x.pth", source.state_dict())
    encoder: Any = load_encoder(path, **({} if size == 48 else {"size": "32x48"}))
    images = torch.randn(1, 3, *encoder.pixmim_config.image_size)
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(images), source.eval().forward_features(images))


@pytest.mark.parametrize("mean", [[123.0, 116.0, 103.0], 0.5, "imagenet", [0.5, "x", 1], []])
def test_the_callers_mean_replaces_an_unusable_one_of_the_file(mean: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", ENCODER, args=Namespace(mean=mean))
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path / "timm")
    content = json.loads((tmp_path / "timm" / "config.json").read_text())
    content["pretrained_cfg"]["mean"] = mean
    (tmp_path / "timm" / "config.json").write_text(json.dumps(content))
    for name, hints in ((path, VIT), (tmp_path / "timm", {})):
        with pytest.raises(UserError, match=r"--mean"):
            resolve_model(str(name), hints=hints)
        assert resolve_model(str(name), hints={**hints, "mean": (0.1, 0.2, 0.3)}).config.mean == (0.1, 0.2, 0.3)


def test_a_mask_of_another_grid_is_refused_by_name(tiny_run: Make) -> None:
    for model in (tiny_run().model, replace(tiny_run().model, name="simmim")):
        module = build_model(tiny_run(model=model))
        with pytest.raises(ValueError, match="32x32"):
            module(torch.randn(2, 3, 32, 32), Mask.from_hidden(torch.arange(18).reshape(2, 9) % 2 == 0, 4))


SIZES = {
    "image_size": 32, "patch_size": 8, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": 4 * DIM, "num_labels": 5,
}  # fmt: skip
SWIN_SIZES = {
    "image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4,
    "num_labels": 5,
}  # fmt: skip


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("ViT", SIZES),
        ("Beit", SIZES | {"use_relative_position_bias": True, "use_mean_pooling": True}),
        ("Beit", SIZES | {"use_absolute_position_embeddings": True, "use_mean_pooling": False}),
        ("Swin", SWIN_SIZES),
    ],
)
def test_hugging_face_classifiers_with_their_norms(
    kind: str, sizes: dict[str, Any], eps: float, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{kind}Config")(**sizes, layer_norm_eps=eps)
    reference = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    for parameter in reference.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    reference.save_pretrained(tmp_path)
    preprocessor = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.2, 0.3, 1],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(tmp_path)(images), reference(images).logits, atol=6e-6, rtol=0)
    weights = resolve_model(str(tmp_path))
    assert weights.config.normalization == ((0.1, 0.2, 0.3), (0.2, 0.3, 1.0)) and weights.notes == ()
    other = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "quick_gelu"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="hidden_act 'quick_gelu', but only gelu"):
        resolve_model(str(tmp_path))


# ---- Hugging Face


def test_hugging_face_vitmae_saved_and_as_a_state_dict(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=4 * DIM, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
        decoder_intermediate_size=96, norm_pix_loss=True, mask_ratio=0.5, layer_norm_eps=1e-4,
    )  # fmt: skip
    reference = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in reference.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        output = reference(images, noise=noise)
    reference.save_pretrained(tmp_path / "saved")
    torch.save(reference.state_dict(), tmp_path / "state.bin")
    for path in (tmp_path / "saved", tmp_path / "state.bin"):
        model = load_model(path, **({} if path.is_dir() else {**BOTH, "norm_eps": 1e-4}))
        with torch.no_grad():
            prediction = model(images, Mask.from_hidden(output.mask.bool()))
        torch.testing.assert_close(prediction, output.logits, atol=1e-4, rtol=0)
    config = resolve_model(str(tmp_path / "saved")).config
    assert config.mask.ratio == 0.5 and config.target.normalize_patches


# ---- untrusted and damaged files


class Foreign:
    """Defines classes in modules that are not installed, while a file is written."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.classes: dict[str, type] = {}

    def __call__(self, module: str, name: str, base: type = object) -> type:
        for parent in (module.rsplit(".", i)[0] for i in reversed(range(module.count(".") + 1))):
            if parent not in sys.modules:
                sys.modules[parent] = types.ModuleType(parent)
                self.modules.append(parent)
        key = f"{module}.{name}"
        self.classes.setdefault(key, type(name, (base,), {"__module__": module}))
        setattr(sys.modules[module], name, self.classes[key])
        return self.classes[key]

    def forget(self) -> None:
        for module in self.modules:
            sys.modules.pop(module, None)


@pytest.fixture
def foreign() -> Any:
    maker = Foreign()
    yield maker
    maker.forget()


def test_harmless_objects_are_read_without_their_projects(tmp_path: Path, foreign: Foreign) -> None:
    buffer = foreign("mmengine.logging.history_buffer", "HistoryBuffer")()
    buffer.history, buffer.last = torch.ones(3).numpy(), torch.ones(()).numpy()[()]
    hyper_parameters = foreign("lightning.fabric.utilities.data", "AttributeDict", dict)(lr=0.1)
    more = {"message_hub": {"loss": buffer}, "hyper_parameters": hyper_parameters}
    path = saved(tmp_path / "epoch_1.pth", openmmlab(official.mae()), "state_dict", **more)
    foreign.forget()
    assert resolve_model(str(path), hints=BOTH).has_decoder


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('this code ran')",)


def test_a_pickle_that_refers_to_other_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    saved(tmp_path / "zip.pth", official.mae(), args=Evil())
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    for name in ("zip.pth", "bare.pth"):
        with pytest.raises(UserError, match=r"refers to exec, which could run any code"):
            read_weights(tmp_path / name)


def test_other_files_are_named(tmp_path: Path) -> None:
    complete = saved(tmp_path / "complete.pth", official.mae()).read_bytes()
    contents = {
        "cut.pth": (complete[: len(complete) // 2], "damaged"),
        "empty.pth": (b"", "empty"),
        "page.pth": (b"<!DOCTYPE html><html></html>", "web page"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        "text.pth": (b"hello, this is text", "not a weights file"),
        "cut.safetensors": (b"\x00" * 40, "cannot be read"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="contains no weights"):
        read_weights(tmp_path / "folder")
    with pytest.raises(UserError, match=r"contains no model: found .*'epoch'"):
        read_weights(saved(tmp_path / "none.pth", {}, "optimizer", epoch=3))
    with pytest.raises(UserError, match="a convolutional network"):
        read_weights(saved(tmp_path / "resnet.pth", random(official.conv("conv1", 3, 4, 7))))


@pytest.mark.parametrize("name", ["model.bin", "model.pth", "model.SAFETENSORS", "model"])
def test_safetensors_are_read_under_any_name(name: str, tmp_path: Path) -> None:
    save_file(ENCODER, tmp_path / name)
    assert resolve_model(str(tmp_path / name), hints=VIT).encoder.keys() == ENCODER.keys()


@pytest.mark.parametrize(
    ("value", "found"), [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (None, "torch.int8")]
)
def test_values_that_are_no_weights_are_refused(
    value: float | None, found: str, tiny_run: Make, tmp_path: Path
) -> None:
    """Quantized weights and those of a diverged training would give features without meaning."""
    run, key = tiny_run(), "blocks.1.mlp.fc1.weight"
    state = {name: tensor.clone() for name, tensor in build_encoder(run).state_dict().items()}
    if value is None:
        state[key] = (100 * state[key]).to(torch.int8)
    else:
        state[key][0, 0] = value
    path = saved(tmp_path / "x.pth", state)
    message = rf"holds {found}.* in 'blocks\.1\.mlp\.fc1\.weight'"
    with pytest.raises(UserError, match=message):
        load_encoder(path, num_heads=2)
    with pytest.raises(UserError, match=message):
        initialize_from(build_model(run), replace(run, init=str(path)))


def test_missing_and_unexpected_keys_are_named_as_in_the_file(tmp_path: Path) -> None:
    mm = openmmlab(official.mae())
    without = {k: v for k, v in mm.items() if k != "backbone.layers.1.ffn.layers.1.bias"}
    with pytest.raises(UserError, match=r"is missing 'backbone\.layers\.1\.ffn\.layers\.1\.bias'"):
        load_model(saved(tmp_path / "without.pth", without), **BOTH)
    with pytest.raises(UserError, match=r"1 unexpected keys: backbone\.extra"):
        load_model(saved(tmp_path / "odd.pth", mm | {"backbone.extra": torch.zeros(2)}), **BOTH)
    with pytest.raises(UserError, match=r"contains 'blocks\.0\.extra'"):
        load_model(saved(tmp_path / "extra.pth", official.mae() | {"blocks.0.extra": torch.ones(DIM)}), **BOTH)
    thin = official.mae() | {"decoder_norm.weight": torch.ones(7)}
    with pytest.raises(UserError, match=r"has 7 for 'decoder_norm\.weight': expected 24"):
        load_model(saved(tmp_path / "thin.pth", thin), **BOTH)
    with pytest.raises(UserError, match="for a width of 48 cannot be inferred: give --heads"):
        load_model(saved(tmp_path / "heads.pth", official.mae()))
    lacking = {k: v for k, v in official.mae().items() if k != "pos_embed"} | {"pos_embed": torch.zeros(1, 15, DIM)}
    with pytest.raises(UserError, match=r"a table of 14 positions, .*: give --size HEIGHTxWIDTH"):
        load_model(saved(tmp_path / "oblong.pth", lacking), **BOTH)


def test_every_key_map_is_its_own_inverse() -> None:
    for checkpoint_format in FORMATS:
        keys = checkpoint_format.keys
        for name in ("encoder.cls_token", "encoder.blocks.3.norm1.weight", "decoder.blocks.0.mlp.fc1.bias"):
            key = keys.from_pixmim(name)
            assert key is None or keys.to_pixmim(key) == name, (checkpoint_format.name, name)


# ---- other sizes, other channels


def test_positions_are_interpolated_by_the_rule_of_mae() -> None:
    """Compare with the cubic kernel (a = -0.75) in float64. Rows of prefix tokens are kept."""

    def kernel(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def matrix(old: int, new: int) -> Tensor:
        m = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            x = (i + 0.5) * old / new - 0.5
            for k in range(int(x // 1) - 1, int(x // 1) + 3):
                m[i, min(max(k, 0), old - 1)] += kernel(x - k)
        return m

    table = torch.randn(1, 1 + 4 * 4, 6)
    grid = table[0, 1:].view(4, 4, 6).double()
    expected = torch.einsum("ay,bx,yxd->abd", matrix(4, 3), matrix(4, 6), grid).flatten(0, 1)
    interpolated = interpolate_positions(table, (4, 4), (3, 6))
    assert torch.equal(interpolated[:, 0], table[:, 0])
    torch.testing.assert_close(interpolated[0, 1:].double(), expected, atol=1e-5, rtol=0)
    assert interpolate_positions(table, (4, 4), (4, 4)) is table


def test_relative_biases_are_interpolated_by_the_rule_of_simmim() -> None:
    """Compare with the official code (SciPy 1.13) for sin(0.3 dy) + cos(0.2 dx), from windows of 6 to 7 and to 4."""
    d = torch.arange(-5, 6, dtype=torch.float64)
    table = ((0.3 * d).sin()[:, None] + (0.2 * d).cos()[None, :]).reshape(-1, 1).float()
    grown = relative_biases(table, (6, 6), (7, 7)).view(13, 13)
    shrunk = relative_biases(table, (6, 6), (4, 4)).view(7, 7)
    golden = {
        "grown": ([-0.45719, -0.34574, -0.24081, -0.14716], [-0.42093, -0.33637, -0.1984]),
        "shrunk": ([0.05082, 0.144, 0.20224, 0.22218], [0.26644, 0.53312, 0.82864]),
    }
    for name, result in (("grown", grown), ("shrunk", shrunk)):
        row, column = golden[name]
        torch.testing.assert_close(result[0, :4], torch.tensor(row), atol=1e-4, rtol=0)
        torch.testing.assert_close(result[1:4, 0], torch.tensor(column), atol=1e-4, rtol=0)
    tail = torch.cat([table, torch.tensor([[7.0], [8.0], [9.0]])])  # Beit's entries of the class token are kept
    assert relative_biases(tail, (6, 6), (7, 7))[-3:, 0].tolist() == [7, 8, 9]


def test_channels_are_adapted() -> None:
    """Sum for one channel, as if a gray image were copied to three; keep the scale for others."""
    weight, gray = torch.randn(4, 3, 2, 2), torch.randn(1, 1, 2, 2)
    expected = F.conv2d(gray.expand(1, 3, 2, 2), weight)
    torch.testing.assert_close(F.conv2d(gray, channels(weight, 1)), expected)
    assert channels(weight, 3) is weight
    torch.testing.assert_close(channels(weight, 6)[:, 3:] * 2, weight)
    torch.testing.assert_close(channels(weight, 4)[:, 3], weight[:, 0] * 3 / 4)


def test_a_model_of_another_size(tmp_path: Path) -> None:
    path = saved(tmp_path / "mae.pth", official.mae())
    model = load_model(path, img_size=(32, 64), **BOTH)
    images = torch.randn(1, 3, 32, 64)
    assert model(images, Mask.from_hidden(torch.arange(32)[None] % 2 == 0)).shape == (1, 32, 192)
    beit = saved(tmp_path / "beit.pth", official.simmim_vit())
    assert load_encoder(beit, img_size=(32, 64))(torch.randn(1, 3, 32, 64)).shape == (1, DIM)
    swin = saved(tmp_path / "swin.pth", official.simmim_swin())
    assert load_encoder(swin, img_size=64, window_size=8)(torch.randn(1, 3, 64, 64)).shape == (1, 24)


# ---- --init


def save_model(model: torch.nn.Module, config: PretrainConfig, folder: Path) -> None:
    import_weights(Weights(config, dict(model.state_dict()), "a test"), folder)


def test_a_run_is_initialized_exactly_from_the_same_model(tiny_run: Make, tmp_path: Path) -> None:
    trained = build_model(tiny_run(seed=3))
    save_model(trained, tiny_run(seed=3), tmp_path / "imported")
    model = build_model(tiny_run(seed=4))
    lines = initialize_from(model, tiny_run(seed=4, init=str(tmp_path / "imported")))
    for (name, a), b in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any("decoder: " in line for line in lines)


def test_what_does_not_match_is_adapted_or_initialized_randomly_and_reported(tiny_run: Make, tmp_path: Path) -> None:
    base = tiny_run(seed=3)
    save_model(build_model(base), base, tmp_path / "imported")
    init = str(tmp_path / "imported")
    oblong = tiny_run(size="32x64", channels=1, init=init)
    model = build_model(oblong)
    lines = "\n".join(initialize_from(model, oblong))
    assert "positions interpolated from 4x4 to 4x8 patches" in lines and "from 3 to 1 channels" in lines
    assert "decoder: initialized randomly (it differs in 'decoder.predict.bias')" in lines

    model = build_model(replace(base, model=replace(base.model, decoder_dim=32)))
    assert "initialized randomly" in "\n".join(initialize_from(model, replace(base, init=init)))
    wider = replace(base, model=replace(base.model, options=dict(base.model.options) | {"embed_dim": 64}), init=init)
    with pytest.raises(UserError, match=r"'.*' has shape 32, expected 64"):
        initialize_from(build_model(wider), wider)
    flatter = replace(base, model=replace(base.model, options=dict(base.model.options) | {"depth": 1}), init=init)
    with pytest.raises(UserError, match=r"does not match vit_tiny_patch16_224: unexpected blocks\.1\."):
        initialize_from(build_model(flatter), flatter)
    deeper = replace(base, model=replace(base.model, options=dict(base.model.options) | {"depth": 3}), init=init)
    with pytest.raises(UserError, match=r"missing encoder\.blocks\.2"):
        initialize_from(build_model(deeper), deeper)


def test_init_reports_how_to_use_another_model_of_a_file(tiny_run: Make, tmp_path: Path) -> None:
    """Recommend `pixmim import --prefix` for a file of teacher and student, and for one of unknown names."""
    run = tiny_run()
    state = build_model(run).encoder.state_dict()
    both = {f"{role}.{name}": value for role in ("teacher", "student") for name, value in state.items()}
    file, strange = tmp_path / "my both.safetensors", tmp_path / "strange.safetensors"
    save_file({name: value.contiguous().clone() for name, value in both.items()}, file)
    save_file({"a.b": torch.zeros(2)}, strange)
    command = f"`pixmim import '{file}' --prefix NAME --to FOLDER` (or --ema), then --init FOLDER"
    assert command in "\n".join(initialize_from(build_model(run), replace(run, init=str(file))))
    with pytest.raises(UserError, match=r"no supported project .*--prefix NAME --to FOLDER.* then --init FOLDER"):
        initialize_from(build_model(run), replace(run, init=str(strange)))


def test_a_run_is_initialized_from_an_encoder_alone_and_from_a_classifier(tiny_run: Make, tmp_path: Path) -> None:
    run = tiny_run()
    encoder = build_encoder(run)
    state = dict(encoder.state_dict())
    classifier = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in state.items()}
    classifier |= random(linear("head", 32, 4))
    for name, file, line in (("encoder", state, "only an encoder"), ("classifier", classifier, "encoder.norm.weight")):
        path = saved(tmp_path / f"{name}.pth", file)
        model = build_model(run)
        lines = initialize_from(model, replace(run, init=str(path)))
        assert line in "\n".join(lines)
        assert torch.equal(model.state_dict()["encoder.blocks.1.mlp.fc2.weight"], state["blocks.1.mlp.fc2.weight"])
