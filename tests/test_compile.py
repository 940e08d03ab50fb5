"""A whole training step of each model is one graph, and so is each block: no break, the same loss and gradients."""

import subprocess
import sys

import compiled


def test_every_model_compiles_whole_and_block_by_block() -> None:
    done = subprocess.run([sys.executable, compiled.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(compiled.CASES)
