"""Test that a training step of each model, and each block, compiles to one graph with the same loss and gradients."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import compile_worker
from helpers.commands import Started
from helpers.runs import equal, train
from pixmim.config import ParallelConfig, PretrainConfig
from pixmim.training.parallelize import choose_compilation


def test_every_model_compiles_in_full_and_block_by_block(tmp_path: Path) -> None:
    text = Started(tmp_path / "output.txt", compile_worker.main).end()
    assert [line.split(":")[0] for line in text.splitlines()] == list(compile_worker.CASES)


def test_without_a_compiler_a_run_is_eager(
    tiny_run: Callable[..., PretrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nin any folder")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    train(tiny_run(steps=2), tmp_path / "eager")
    text = train(tiny_run(steps=2, parallel=ParallelConfig(compile="blocks")), tmp_path / "run")
    assert len([line for line in text.splitlines() if "no C++ compiler" in line and "in any" not in line]) == 1
    assert equal(tmp_path / "eager", tmp_path / "run")


def test_compiled_code_is_kept_in_the_cache_directory(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    model, cpu, none = nn.Linear(1, 1), torch.device("cpu"), ParallelConfig(compile="none")
    assert choose_compilation(none, model, cpu) == (none, "")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    choose_compilation(ParallelConfig(compile="full"), model, cpu)
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == memory / "compiled"
