"""Importing pixmim, choosing a device and building a model leave the process as it was."""

import subprocess
import sys
import warnings

import torch
import torch._dynamo

from pixmim.build import build_model
from pixmim.config import ParallelConfig, PretrainConfig
from pixmim.training.parallelize import step_context

IMPORTS = """
import ctypes, importlib, logging, pkgutil, sys, warnings
import torch._dynamo

def guarded(function):
    def call(*args, **kwargs):
        caller = sys._getframe(1).f_globals["__name__"]
        assert not caller.startswith("pixmim"), f"{caller} calls {function.__qualname__}"
        return function(*args, **kwargs)
    return call

warnings.filterwarnings, warnings.simplefilter = guarded(warnings.filterwarnings), guarded(warnings.simplefilter)
logging.Logger.addHandler, torch.manual_seed = guarded(logging.Logger.addHandler), guarded(torch.manual_seed)
limit = torch._dynamo.config.recompile_limit
import pixmim
for module in pkgutil.walk_packages(pixmim.__path__, "pixmim."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

ctypes.CDLL = guarded(ctypes.CDLL.__init__)
from pixmim.training.precision import choose_device
choose_device("cpu")
assert torch._dynamo.config.recompile_limit == limit
"""


def test_imports_and_devices_change_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_building_a_model_leaves_the_generator_alone() -> None:
    run = PretrainConfig(size="32", device="cpu")
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
