"""Layer ids against explicit tables, and parameter groups of layer-wise decay."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from pixmim.models import create_encoder
from pixmim.models.layer_decay import layer_ids
from pixmim.training.optim import layer_decay_param_groups
from pixmim.utils.errors import UserError


def vit(**options: object) -> nn.Module:
    return create_encoder(
        "mae", "vit_base_patch16_224", num_classes=5, global_pool="avg", embed_dim=24, num_heads=2, **options
    )


def swin() -> nn.Module:
    return create_encoder(
        "simmim", "swin_base_patch4_window7_224", num_classes=5, embed_dim=8, num_heads=[1, 2, 4, 8], img_size=64,
        window_size=2,
    )  # fmt: skip


def ids_by_part(model: nn.Module) -> dict[str, set[int]]:
    """Return the layer ids of each part: the first words of parameter names, up to the block number."""
    ids: dict[str, set[int]] = {}
    for name, layer in layer_ids(model).items():
        words = name.split(".")
        last = max((i for i, word in enumerate(words) if word.isdigit()), default=0)
        ids.setdefault(".".join(words[: last + 1]), set()).add(layer)
    return ids


def test_twelve_blocks_of_a_vit() -> None:
    expected = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "fc_norm": 13, "head": 13}
    expected |= {f"blocks.{i}": i + 1 for i in range(12)}
    assert ids_by_part(vit()) == {name: {layer} for name, layer in expected.items()}
    tokens = create_encoder("mae", "vit_base_patch16_224", num_classes=5, embed_dim=24, num_heads=2, reg_tokens=2)
    assert ids_by_part(tokens)["norm"] == {13} and ids_by_part(tokens)["reg_token"] == {0}


def test_swin_two_two_eighteen_two() -> None:
    ids = ids_by_part(swin())
    blocks = {}
    for stage, (first, depth) in enumerate([(1, 2), (3, 2), (5, 18), (23, 2)]):
        blocks |= {f"layers.{stage}.blocks.{i}": {first + i} for i in range(depth)}
    # timm's downsampling opens a stage, SimMIM's closes the one before: it counts as that one's last block.
    down = {"layers.1": {2}, "layers.2": {4}, "layers.3": {22}}
    assert ids == {"patch_embed": {0}, "norm": {25}, "head": {25}, **blocks, **down}


def test_convmae() -> None:
    model = create_encoder("convmae", "convmae_base", num_classes=5, embed_dim=[8, 12, 24], num_heads=2, img_size=32)
    expected = {f"patch_embed{i}": 0 for i in (1, 2, 3, 4)} | {"pos_embed": 0, "fc_norm": 12, "head": 12}
    expected |= {f"blocks{s}.{i}": 0 for s in (1, 2) for i in range(2)}
    expected |= {f"blocks3.{i}": i + 1 for i in range(11)}
    assert ids_by_part(model) == {name: {layer} for name, layer in expected.items()}


def test_simmims_vit() -> None:
    options = {"embed_dim": 24, "num_heads": 2, "num_classes": 5, "global_pool": "avg"}
    shared = create_encoder("simmim", "beit_base_patch16_224", **options)
    assert ids_by_part(shared)["rel_pos_bias"] == {13} and ids_by_part(shared)["cls_token"] == {0}
    own = create_encoder(
        "simmim", "beit_base_patch16_224", **options, use_shared_rel_pos_bias=False, use_rel_pos_bias=True
    )
    assert layer_ids(own)["blocks.4.attn.relative_position_bias_table"] == 5
    with pytest.raises(UserError, match="Linear"):
        layer_ids(nn.Linear(2, 2))


def test_scales_of_published_vit_base() -> None:
    model = vit()
    groups = layer_decay_param_groups(model, layer_ids(model), 0.65, 0.05)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["pos_embed"])] == pytest.approx(0.003697, abs=1e-6)
    assert scale[id(named["blocks.11.norm1.weight"])] == pytest.approx(0.65)
    assert scale[id(named["head.weight"])] == 1
    assert len(scale) == len(named)  # each once


def test_groups_are_timms_for_a_vit_that_averages() -> None:
    model = vit()
    reference = param_groups_layer_decay(model, 0.05, no_weight_decay_list=["pos_embed", "cls_token"], layer_decay=0.75)
    expected = {id(p): (g["lr_scale"], g["weight_decay"]) for g in reference for p in g["params"]}
    groups = layer_decay_param_groups(model, layer_ids(model), 0.75, 0.05)
    ids = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert ids.keys() == expected.keys()
    for name, p in model.named_parameters():
        assert ids[id(p)] == pytest.approx(expected[id(p)]), name


def test_what_is_not_decayed() -> None:
    model = swin()
    groups = layer_decay_param_groups(model, layer_ids(model), 0.9, 0.05, ("relative_position_bias_table",))
    plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in plain) == (name.endswith("bias") or "norm" in name or "relative_position" in name), name


def test_fixed_parameters_are_left_out() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3, global_pool="avg")
    model.pos_embed.requires_grad_(False)
    groups = layer_decay_param_groups(model, layer_ids(model), 0.5, 0.1)
    assert not any(p is model.pos_embed for group in groups for p in group["params"])
    assert [group["scale"] for group in groups][-1] == 1 and torch.is_tensor(groups[0]["params"][0])
