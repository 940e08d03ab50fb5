"""A whole training step of each model is one graph, and so is each block: no break, the same loss and gradients."""

import subprocess
import sys

from helpers import compile_worker


def test_every_model_compiles_whole_and_block_by_block() -> None:
    done = subprocess.run([sys.executable, compile_worker.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(compiled.CASES)
