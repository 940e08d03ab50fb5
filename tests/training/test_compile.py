"""Test that a training step of each model, and each block, compiles to one graph with the same loss and gradients."""

from pathlib import Path

from helpers import compile_worker
from helpers.commands import Started


def test_every_model_compiles_in_full_and_block_by_block(tmp_path: Path) -> None:
    text = Started(tmp_path / "output.txt", compile_worker.main).end()
    assert [line.split(":")[0] for line in text.splitlines()] == list(compile_worker.CASES)
