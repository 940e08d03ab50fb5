"""Completeness of the wheel, and the package without modules that Windows lacks."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.shards import shard

ROOT = Path(__file__).parents[1]

WITHOUT_POSIX = """
import ctypes, importlib, importlib.abc, logging, os, pkgutil, signal, sys, warnings
import torch._dynamo

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {"fcntl", "grp", "pwd", "resource"}:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

for name in ("fcntl", "grp", "pwd", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocker())
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "posix_fadvise", "pread", "sched_getaffinity"):
    delattr(os, name)
del signal.SIGHUP, signal.SIGUSR1
"""

IMPORT_ALL = """
def guarded(function):
    def call(*args, **kwargs):
        caller = sys._getframe(1).f_globals["__name__"]
        assert not caller.startswith("pixmim"), f"{caller} calls {function.__qualname__}"
        return function(*args, **kwargs)
    return call

originals = warnings.filterwarnings, warnings.simplefilter, logging.Logger.addHandler, torch.manual_seed, ctypes.CDLL
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
warnings.filterwarnings, warnings.simplefilter, logging.Logger.addHandler, torch.manual_seed, ctypes.CDLL = originals
"""

IMPORT_AND_TRAIN = """
import pixmim, pixmim.data

options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
config = pixmim.get_recipe(
    "demo", data="shapes:count=8,size=32", steps=2, batch_size=4, size="32", precision="fp32", device="cpu",
    model={"backbone": "vit_tiny_patch16_224", "options": options} | decoder, knn={"every": 0},
)
result = pixmim.pretrain(config, "run", report=False)
assert result.finished and result.step == 2
assert pixmim.open_dataset("one.tar").image(0).shape[0] == 3  # reads a shard at an offset
"""


def _python(folder: Path, *args: str, **environment: str) -> str:
    """Run this environment's Python in a folder and return its output."""
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, built without network access."""
    folder = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder))
    _python(folder, "-m", "pip", "wheel", str(ROOT), *flags)
    (built,) = folder.glob("pixmim-*.whl")
    return built


def test_the_wheel_contains_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        listed = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
        entry_points = archive.read(record.replace("RECORD", "entry_points.txt")).decode()
    source = ROOT / "src"
    files = {str(path.relative_to(source)) for path in (source / "pixmim").rglob("*") if path.is_file()}
    package = {name for name in files if "__pycache__" not in name}
    assert package == {name for name in listed if ".dist-info/" not in name}
    assert "pixmim/py.typed" in package and any(name.endswith(".j2") for name in package)
    assert "pixmim = pixmim.cli:main" in entry_points


def test_the_unpacked_wheel_lists_the_recipes(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    where = _python(elsewhere, "-c", "import pixmim; print(pixmim.__file__)", PYTHONPATH=str(site))
    assert Path(where.strip()).parent == site / "pixmim"
    assert "pixmim-vit-small" in _python(elsewhere, "-m", "pixmim.cli", "list", PYTHONPATH=str(site))


def test_imports_change_nothing_and_import_and_training_need_no_posix(tmp_path: Path) -> None:
    """Importing all of pixmim and choosing a device set no filter, handler, seed or compiler option.

    Modules, functions and flags that Windows lacks are removed from a Linux process.
    """
    shard(tmp_path / "one.tar", range(1), labels=False)
    _python(tmp_path, "-c", WITHOUT_POSIX + IMPORT_ALL + IMPORT_AND_TRAIN)
