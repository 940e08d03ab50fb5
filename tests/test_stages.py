"""Runs whose images grow: the same positions, masks and relative cut-off at each size, and exact resumption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pixmim.build import build_mask_sampler, build_model
from pixmim.config import ArchitectureConfig, CheckpointConfig, MaskConfig, PretrainConfig, TargetConfig
from pixmim.data import create_loader, open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.loader_chain import LoaderChain
from pixmim.data.sampler import BatchShard
from pixmim.pretraining import pretrain
from pixmim.stages import build_stages
from pixmim.targets import LowFrequency
from pixmim.training.checkpoint import CheckpointManager
from pixmim.utils.errors import UserError
from pixmim.utils.patches import interpolate_positions

Make = Callable[..., PretrainConfig]
CPU = torch.device("cpu")
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def architecture(name: str, backbone: str = "vit_tiny_patch16_224", **changes: Any) -> ArchitectureConfig:
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
    return ArchitectureConfig(name, backbone, **{**SMALL, "options": options, **changes})


MODELS = {
    **{name: architecture(name) for name in ("mae", "mff", "crossmae", "pixio")},
    "lsmae": architecture("lsmae", decoder_stride=2),
    "convmae": architecture(
        "convmae", "convmae_tiny", options={"embed_dim": [16] * 3, "depth": [1] * 3, "num_heads": 2}
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_predicts_smaller_images_as_one_made_for_them(name: str, tiny_run: Make) -> None:
    size = (64, 96) if name == "convmae" else (32, 48)
    config = tiny_run(size=f"{2 * size[0]}x{2 * size[1]}", model=MODELS[name])
    small_config = replace(config, size=f"{size[0]}x{size[1]}")
    model, small = build_model(config).eval(), build_model(small_config).eval()
    weights = {}
    for key, value in model.state_dict().items():
        if key.endswith("pos_embed"):
            stride = 2 if name == "lsmae" and key.startswith("decoder.") else 1
            old, new = (
                (c.image_size[0] // model.patch // stride, c.image_size[1] // model.patch // stride)
                for c in (config, small_config)
            )
            value = interpolate_positions(value, old, new)
            assert value.shape == small.state_dict()[key].shape != model.state_dict()[key].shape
        weights[key] = value
    small.load_state_dict(weights)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    mask = build_mask_sampler(small_config, model.patch)(0, range(3))
    assert torch.equal(model(images, mask), small(images, mask))


def test_a_run_is_divided_into_equal_parts_with_the_same_relative_cut_off(tiny_run: Make) -> None:
    config = tiny_run(size="32x64", first_sizes="16x32,24x48", target=TargetConfig(radius=8))
    model = build_model(config)
    stages = build_stages(config, model, 10)
    assert [(stage.end, stage.size) for stage in stages] == [(3, (16, 32)), (6, (24, 48)), (10, (32, 64))]
    for stage, radius in zip(stages, (4, 6, 8), strict=True):
        assert stage.crop.shape == stage.size
        assert stage.masks(0, [0]).hidden.shape[1] * model.patch**2 == stage.size[0] * stage.size[1]
        assert isinstance(stage.loss.target, LowFrequency)
        assert stage.loss.target.radius == radius


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_sizes": "32"}, "32: must be smaller"),
        ({"first_sizes": "16,64"}, "64: must be smaller"),
        ({"first_sizes": "16x24"}, "proportions"),
        ({"first_sizes": "99999999"}, "first-sizes 99999999: "),
        ({"first_sizes": "20"}, "20: .*divisible"),
        ({"first_sizes": "8", "mask": MaskConfig(ratio=0.75)}, "8: .*visible"),
        ({"first_sizes": "24", "model": architecture("mae", decoder_stride=2)}, "24: .*divisible"),
        ({"first_sizes": "16", "model": architecture("simmim")}, "one size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tiny_run: Make) -> None:
    changes = {"model": architecture("mae")} | changes
    config = tiny_run(**changes)
    with pytest.raises(UserError, match=message):
        build_stages(config, build_model(config), 10)


@pytest.mark.parametrize("words", ["small", "16,,24", "1" * 60 + "!"])  # the last in no time, though it is long
def test_what_is_no_list_of_sizes_is_refused(words: str, tiny_run: Make) -> None:
    with pytest.raises(UserError, match="first-sizes"):
        tiny_run(first_sizes=words)


@pytest.mark.parametrize(("start", "parts"), [(0, 1), (2, 1), (5, 1), (1, 2)])
def test_a_chain_yields_the_batches_of_each_parts_own_loader(
    start: int, parts: int, tiny_run: Make, tmp_path: Path
) -> None:
    config = tiny_run(first_sizes="16")
    model, data = build_model(config), open_dataset(config.data)
    stages = build_stages(config, model, 6)

    def open_loader(number: int, part: int) -> Any:
        return create_loader(
            data,
            stages[number].crop,
            BatchShard(8, part // parts * 8, 0, 1, parts),
            "none",
            skipped=BadImageLog(tmp_path / "skipped.csv", len(data), 0.5),
            seed=3,
            masks=stages[number].masks.at,
            threads=1,
        )

    with LoaderChain(open_loader, [stage.end * parts for stage in stages], start * parts) as chain:
        for position in range(start * parts, 6 * parts):
            one = next(chain)
            number = int(position >= 3 * parts)
            with open_loader(number, position // parts * parts) as alone:
                for _ in range(position % parts + 1):
                    other = next(alone)
            assert one.images.shape[-2:] == ((16, 16), (32, 32))[number]
            assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)
            assert one.mask is not None and other.mask is not None
            assert torch.equal(one.mask.hidden, other.mask.hidden)
        assert chain.wait_seconds > 0


def test_a_run_that_is_stopped_in_any_part_ends_bitwise_the_same(tiny_run: Make, tmp_path: Path) -> None:
    config = tiny_run(first_sizes="16,24", steps=9, model=architecture("mae"), checkpoint=CheckpointConfig(every=1))
    quiet = Console(quiet=True)
    whole = pretrain(config, tmp_path / "whole", console=quiet, report=False)
    for stop in (2, 3, 7):

        def interrupt(step: int, at: int = stop) -> None:
            if step == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pretrain(config, tmp_path / "broken", console=quiet, report=False, on_step_end=interrupt)
    broken = pretrain(config, tmp_path / "broken", console=quiet, report=False)
    states = []
    for result in (whole, broken):
        model = build_model(config)
        CheckpointManager(result.folder / "checkpoints").load_model(model)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
