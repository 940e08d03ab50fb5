"""Fixtures that several test packages share, and the settings of every test.

Fixtures import torch and pixmim themselves: the process that only distributes tests to others imports this file too,
and the others wait for it.
"""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

import helpers.typecheck  # noqa: F401  # before any module of pixmim

if TYPE_CHECKING:
    from pixmim.config import PretrainConfig

settings.register_profile(
    "pixmim",  # the same examples in each session, independent of the speed of the machine
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("pixmim")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may access the network
os.environ["OMP_NUM_THREADS"] = "1"  # the same sums on any machine, also in child processes

gc.disable()  # until all modules are imported: nothing of them is garbage


SLOWEST = (
    "export/test_export.py",
    "viewer/test_browser.py",
    "training/test_compile.py",
    "security/test_no_pickle.py",
    "training/test_distributed_training.py",
    "evaluation/robustness/test_robustness.py",
    "test_gpu_script.py",
    "training/test_fault_tolerance.py",
    "evaluation/test_finetune.py",
    "export/test_class_tokens_and_fusion.py",
    "test_quickstart.py",
    "cli/test_cli.py",
    "evaluation/segmentation/test_segmentation.py",
    "evaluation/test_held_out.py",
    "cli/test_slurm.py",
    "test_packaging.py",
    "utils/test_process.py",
    "test_build.py",
    "security/test_hostile_names.py",
    "evaluation/test_evaluate.py",
    "security/test_untrusted_run.py",
    "evaluation/robustness/test_corruptions.py",
    "training/test_resume.py",
    "evaluation/detection/test_detection.py",
    "security/test_hostile_images.py",
)
"""Modules that take 10 seconds or more come first, so that all processes end at the same time."""


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes: one more than there are cores, because some tests wait for time to pass."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


@pytest.fixture(scope="session", autouse=True)
def _unsynchronized() -> Iterator[None]:
    """Skip the wait for the disk in this process: only a loss of power would show it, and there are thousands."""

    def fsync(file: object) -> None:
        os.fstat(file if isinstance(file, int) else file.fileno())  # type: ignore[attr-defined]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield new cache directories."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(i) for i in itertools.count())


@pytest.fixture(autouse=True)
def _own_cache(_caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a cache directory of its own, in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(next(_caches)))


@pytest.fixture
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the datasets library a cache in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "library"))
    datasets.disable_progress_bars()


@pytest.fixture
def memory(_own_cache: None) -> Path:
    """Return pixmim's cache directory, which may not exist yet."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "pixmim"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    torch.set_num_threads(1)
    places = {Path(__file__).parent / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
                item.add_marker(pytest.mark.skip(reason="requires a CUDA device"))


def pytest_collection_finish() -> None:
    gc.freeze()  # a collection visits what tests make, instead of a million objects of imported modules
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions complain of objects that are left at the end


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the report at the end of commands, which takes much longer than a tiny run."""
    from helpers.cli import skip_report

    skip_report(monkeypatch.setattr)


@pytest.fixture
def usual_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of images on a machine with enough memory, whichever one the tests run on."""
    from pixmim.data.decode import limits

    monkeypatch.setattr(limits, "_machine_bounds", lambda: (120_000_000, 2**30))


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., "PretrainConfig"]:
    """Return a function that makes a config which trains in a second; keywords replace its fields."""
    from helpers.models import TINY
    from pixmim.config import ArchitectureConfig, OptimConfig, PretrainConfig

    def make(**changes: object) -> PretrainConfig:
        values: dict[str, object] = {
            "recipe": "tiny",
            "data": "shapes:count=40,size=32",
            "steps": 6,
            "batch_size": 8,
            "size": "32",
            "precision": "fp32",
            "device": "cpu",
            "threads": 2,
            "model": ArchitectureConfig(
                backbone="vit_tiny_patch16_224", decoder_dim=16, decoder_depth=1, decoder_heads=2, options=TINY
            ),
            "optim": OptimConfig(base_lr=0.05, warmup=0.2),
        }
        return PretrainConfig(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of two classes with five JPEGs each, of several sizes."""
    from helpers.images import write_pictures

    return write_pictures(tmp_path / "pictures")
