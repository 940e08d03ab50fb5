"""Building and compiling a model leave the process as it was."""

import warnings

import torch
import torch._dynamo

from helpers.models import MAE
from pixmim.build import build_model
from pixmim.config import ParallelConfig, PretrainConfig
from pixmim.training.parallelize import step_context


def test_building_a_model_leaves_the_generator_alone() -> None:
    run = PretrainConfig(size="32", device="cpu", model=MAE)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = build_model(run)
    assert torch.equal(torch.rand(4), expected) and torch.initial_seed() == 3
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), build_model(run).parameters(), strict=True))


def test_steps_restore_settings_of_the_compiler_and_filters_of_warnings() -> None:
    before = torch._dynamo.config.recompile_limit, list(warnings.filters)
    with step_context(ParallelConfig(compile="blocks")):
        assert (torch._dynamo.config.recompile_limit, list(warnings.filters)) != before
    assert (torch._dynamo.config.recompile_limit, list(warnings.filters)) == before
