"""Test steps against torch's AdamW, a slow LARS and timm's LAMB, skipped steps, and learning rate schedules."""

from dataclasses import replace

import pytest
import timm.optim
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from pixmim.config import OptimConfig, PretrainConfig
from pixmim.evaluation.finetune.recipes import FINETUNE_RECIPES
from pixmim.models import create_model
from pixmim.models.layer_decay import layer_ids, not_decayed
from pixmim.recipes import get_recipe
from pixmim.training.optim import LAMB, LARS, Schedule, SyncFreeOptimizer, adamw, adamw_by_layer
from pixmim.training.precision import choose_device, choose_precision
from pixmim.utils.errors import UserError

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def trained(
    steps: int, clip: float | None, scaling: bool = False, spoil: int = -1
) -> tuple[nn.Module, SyncFreeOptimizer]:
    model = network()
    sync_free = SyncFreeOptimizer(adamw(model, 0.1, (0.9, 0.95), 0.05), clip, scaling, CPU)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        x = torch.randn(16, 4, generator=generator)
        loss = model(x * (float("nan") if step == spoil else 1.0)).square().mean()
        sync_free.backward(loss)
        sync_free.step(0.01 * (step + 1))
    return model, sync_free


def reference(steps: int, clip: float | None) -> nn.Module:
    """Plain, unfused AdamW with torch's own clipping."""
    model = network()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4, generator=generator)).square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step()
    return model


@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
@pytest.mark.parametrize("scaling", [False, True])
def test_a_step_is_that_of_adamw(clip: float | None, scaling: bool) -> None:
    model, expected = trained(6, clip, scaling)[0], reference(6, clip)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("scaling", [False, True])
def test_a_bad_gradient_changes_no_weight_and_no_moment(scaling: bool) -> None:
    spoiled, sync_free = trained(4, None, scaling, spoil=3)
    clean, _ = trained(3, None, scaling)
    for a, b in zip(spoiled.parameters(), clean.parameters(), strict=True):
        assert torch.equal(a, b)
    states = list(sync_free.optimizer.state.values())
    assert all(float(state["step"]) == 3 and torch.isfinite(state["exp_avg"]).all() for state in states)
    assert sync_free.state["skipped"] == 1 and sync_free.state["streak"] == 1
    assert sync_free.state["scale"] == 2.0 ** (15 if scaling else 16)


def test_the_streak_ends_with_a_good_step() -> None:
    _, sync_free = trained(6, None, spoil=3)
    assert sync_free.state["skipped"] == 1 and sync_free.state["streak"] == 0


@pytest.mark.parametrize("scaling", [False, True])
def test_a_run_that_resumes_in_another_precision_continues_with_the_same_gradients(scaling: bool) -> None:
    """The scale of float16, in its checkpoint, must not divide gradients that are not scaled."""
    model = network()
    kinds = [SyncFreeOptimizer(adamw(model, 0.1, (0.9, 0.95), 0.05), 0.1, one, CPU) for one in (not scaling, scaling)]
    before, after = kinds
    x = torch.randn(16, 4)
    for value in after.state:
        after.state[value].copy_(before.state[value])
    norms = []
    for optimizer in kinds:
        optimizer.backward(model(x).square().mean())
        norms.append(optimizer.step(0.0))
    torch.testing.assert_close(*norms)
    assert after.state["scale"] == 2.0**16


def test_the_loss_scale_doubles_after_2000_good_steps() -> None:
    model = nn.Linear(1, 1)
    sync_free = SyncFreeOptimizer(adamw(model, 0.0, (0.9, 0.95), 0.0), None, True, CPU)
    sync_free.state["good"].fill_(1998)
    for _ in range(3):
        sync_free.backward(model(torch.zeros(1, 1)).sum())
        sync_free.step(0.0)
    assert sync_free.state["scale"] == 2.0**17 and sync_free.state["good"] == 1


def test_norms_biases_and_tokens_are_not_decayed() -> None:
    model = create_model("mae", "vit_tiny_patch16_224", img_size=32, depth=1, decoder_depth=1)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.norm.weight", "decoder.predict.bias"} <= plain
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert not {name for name in decayed | plain if "pos_embed" in name}  # fixed, not trained


def test_simmim_decays_the_bias_tables_of_its_vit_and_not_those_of_a_swin() -> None:
    small = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
    swin = create_model("simmim", "swin_tiny_patch4_window7_224", **small)
    beit = create_model("simmim", "beit_base_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=1)
    for model, decays in ((swin, False), (beit, True)):
        optimizer = adamw(model, 1e-3, (0.9, 0.999), 0.05, not_decayed(model.encoder))
        decay = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
        tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
        assert tables and all(decay[id(p)] is decays for p in tables)


@pytest.mark.parametrize("prefix", [False, True])
def test_cosine_equals_timms_with_and_without_warmup_prefix(prefix: bool) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    timms = CosineLRScheduler(
        optimizer, 100, lr_min=0.01, warmup_t=20, warmup_lr_init=0.002, warmup_prefix=prefix, t_in_epochs=False
    )
    # timm's cycle ends after t_initial steps of cosine, with a prefix 20 steps later.
    ours = Schedule(steps=100 + 20 * prefix, warmup=20, peak=0.5, final=0.01, first=0.002, warmup_prefix=prefix)
    for step in range(100 + 20 * prefix):
        timms.step_update(step)
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_simmims_cosine_is_below_its_peak_when_the_warmup_ends() -> None:
    schedule, epoch = Schedule.of(get_recipe("simmim-swin-base"), 1_281_167), 1_281_167 / 2048
    assert schedule.lr(schedule.warmup) == pytest.approx(4e-5 + 7.6e-4 * 0.97553, rel=1e-3)  # (1 + cos(pi / 10)) / 2
    assert schedule.lr(round(50 * epoch)) == pytest.approx(4.2e-4, rel=1e-3)
    tuning = FINETUNE_RECIPES["simmim-swin-base-100"]
    assert not tuning.warmup_prefix and (tuning.epochs, tuning.warmup) == (100, 20)
    finetune = Schedule(1000, 200, 1.0, 0.0, warmup_prefix=tuning.warmup_prefix)
    assert finetune.lr(200) == pytest.approx(0.9045, abs=1e-4)
    assert all(FINETUNE_RECIPES[name].warmup_prefix == name.startswith(("mae", "convmae")) for name in FINETUNE_RECIPES)


def test_schedule_is_linear_then_cosine() -> None:
    schedule = Schedule(steps=110, warmup=10, peak=1.0, final=0.0)
    assert [schedule.lr(s) for s in (0, 5, 10, 60)] == pytest.approx([0, 0.5, 1.0, 0.5])
    assert 0 < schedule.lr(109) < 1e-3


def test_schedule_is_linear_then_constant_then_a_tenth() -> None:
    schedule = Schedule(steps=80, warmup=10, peak=1.0, final=0.3, first=0.2, drop=70)
    assert [schedule.lr(s) for s in (0, 5, 10, 40, 69)] == pytest.approx([0.2, 0.6, 1.0, 1.0, 1.0])
    assert [schedule.lr(s) for s in (70, 79)] == pytest.approx([0.1, 0.1])


def test_simmims_800_epochs_as_published() -> None:
    """1e-4 per 512 images at batch 2048, from 2e-6 over 10 epochs, and a tenth at epoch 700 of 800."""
    for name in ("simmim-swin-base-800", "simmim-swin-large-800", "simmim-vit-base"):
        schedule, epoch = Schedule.of(get_recipe(name), 1_281_167), 1_281_167 / 2048
        assert schedule.lr(0) == 2e-6 and schedule.lr(round(10 * epoch)) == pytest.approx(4e-4)
        assert schedule.lr(round(5 * epoch)) == pytest.approx((2e-6 + 4e-4) / 2, rel=1e-3)
        assert [schedule.lr(round(e * epoch)) for e in (699.99, 700.01)] == pytest.approx([4e-4, 4e-5])
        assert get_recipe(f"pixmim-{name}").optim == get_recipe(name).optim


@pytest.mark.parametrize("length", [{"epochs": 20}, {"epochs": 1600}, {"steps": 16}, {"steps": 1}])
def test_a_run_of_another_length_drops_after_the_same_fraction(length: dict[str, int]) -> None:
    run = replace(get_recipe("simmim-swin-base-800"), **length)
    schedule = Schedule.of(run, 100 * 2048)
    assert schedule.drop == round(7 / 8 * schedule.steps) and schedule.warmup <= schedule.steps / 5 <= schedule.drop
    low = [schedule.lr(s) for s in range(schedule.drop, schedule.steps)]
    assert low == [pytest.approx(4e-5)] * (schedule.steps - schedule.drop)


def test_schedule_of_the_published_recipe() -> None:
    schedule = Schedule.of(get_recipe("pixmim-vit-base-300"), 1_281_167)
    assert (schedule.steps, schedule.warmup) == (93_835, 12_511)  # 300 and 40 epochs of 312.78 batches
    assert Schedule.of(get_recipe("demo"), 20_000).warmup <= 1200 // 5


def test_devices_and_precisions() -> None:
    assert choose_precision("fp32", CPU) == "fp32" and choose_precision("auto", CPU) in ("bf16", "fp32")
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        choose_precision("fp16", CPU)
    with pytest.raises(UserError, match="--device cuda:77"):
        choose_device("cuda:77")
    with pytest.raises(UserError, match="--device gpu"):
        choose_device("gpu")


def test_rates_of_an_encoder_decay_by_layer_below_its_decoder_and_start_after_it() -> None:
    """The rate of a step, for each parameter, against explicit products."""
    model = create_model("mae", "vit_tiny_patch16_224", img_size=32, depth=2, decoder_depth=1)
    layers = layer_ids(model.encoder)
    optimizer = adamw_by_layer(model, layers, 1.0, OptimConfig(layer_decay=0.5, weight_decay=0.1), decoder_steps=3)
    names = {id(p): name for name, p in model.named_parameters()}
    sync_free = SyncFreeOptimizer(optimizer, None, False, CPU)
    for number in (0, 2, 3, 9):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        sync_free.step(0.01, number)
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, rate in rates.items():
            layers_below = {"patch_embed": 4, "cls_token": 4, "blocks.0": 3, "blocks.1": 2, "norm": 1}
            part = name.removeprefix("encoder.")
            below = 0 if part == name else next(n for start, n in layers_below.items() if part.startswith(start))
            frozen = part != name and number < 3
            assert rate == pytest.approx(0.0 if frozen else 0.01 * 0.5**below), name
            moved = not torch.equal(before[name], dict(model.named_parameters())[name])
            assert moved == (rate > 0), name
    plain = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert "encoder.cls_token" in plain and "encoder.blocks.1.mlp.fc1.weight" not in plain


def test_without_decay_and_warm_up_the_groups_are_those_of_adamw() -> None:
    model = create_model("mae", "vit_tiny_patch16_224", img_size=32, depth=1, decoder_depth=1)
    one = adamw_by_layer(model, layer_ids(model.encoder), 1.0, OptimConfig())
    two = adamw(model, 1.0, (0.9, 0.95), 0.05)
    ids = [[[id(p) for p in group["params"]] for group in each.param_groups] for each in (one, two)]
    assert ids[0] == ids[1]


def test_the_schedule_follows_the_warm_up_of_the_decoder() -> None:
    config = PretrainConfig(batch_size=10, steps=100, optim=OptimConfig(lr=1.0, warmup=1, decoder_warmup=1))
    schedule = Schedule.of(config, images=100)
    assert (schedule.decoder, schedule.warmup) == (10, 10)
    assert [schedule.lr(step) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]
    rest = Schedule(90, 10, 1.0, 0.0)
    assert [schedule.lr(step + 10) for step in range(90)] == [rest.lr(step) for step in range(90)]
    assert Schedule.of(replace(config, steps=20), images=100).decoder == 4  # at most a fifth
    dropped = Schedule.of(replace(config, optim=replace(config.optim, schedule="step", lr_drop_at=0.5)), images=100)
    assert [dropped.lr(step) for step in (54, 55)] == [1.0, 0.1]


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def trained_by(kind: type, steps: int, scaling: bool = False, spoil: int = -1, **options: object) -> nn.Module:
    model = network()
    optimizer = SyncFreeOptimizer(kind(model.parameters(), lr=1.0, **options), None, scaling, CPU)
    for step in range(steps):
        x = batch(step) * (float("nan") if step == spoil else 1.0)
        optimizer.backward(model(x).square().mean())
        optimizer.step(0.5 * (step + 1))
    return model


@pytest.mark.parametrize("scaling", [False, True])
def test_lars_by_hand(scaling: bool) -> None:
    """Matrices take a step of 0.001 times their norm, with momentum; biases and norms take the plain gradient."""
    model = network().double()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(6):
        model.zero_grad()
        model(batch(step).double()).square().mean().backward()
        for p, v in zip(model.parameters(), velocity, strict=True):
            assert p.grad is not None
            g = p.grad.clone()
            if p.ndim == 2:
                g *= 0.001 * sum(float(x) ** 2 for x in p.detach().flatten()) ** 0.5
                g /= sum(float(x) ** 2 for x in p.grad.flatten()) ** 0.5
            v.mul_(0.9).add_(g)
            p.data -= 0.5 * (step + 1) * v
    for p, expected in zip(trained_by(LARS, 6, scaling).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scaling", [False, True])
def test_lamb_is_timms(scaling: bool) -> None:
    def groups(model: nn.Module) -> list[dict[str, object]]:
        decayed, plain = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        return [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]

    model, reference = network(), network()
    optimizer = SyncFreeOptimizer(LAMB(groups(model), lr=1.0), None, scaling, CPU)
    other = timm.optim.Lamb(groups(reference), lr=1.0, eps=1e-8, max_grad_norm=None)
    for step in range(6):
        optimizer.backward(model(batch(step)).square().mean())
        optimizer.step(0.01)
        other.zero_grad()
        reference(batch(step)).square().mean().backward()
        for group in other.param_groups:
            group["lr"] = 0.01
        other.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_lars_and_lamb_skip_a_bad_gradient(optimizer: type) -> None:
    for a, b in zip(trained_by(optimizer, 4, spoil=3).parameters(), trained_by(optimizer, 3).parameters(), strict=True):
        assert torch.equal(a, b)
