"""What the tests share: small pictures, a tiny run, and a loud skip where a GPU is missing."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from helpers.tiny import TINY
from pixmim.config import ArchitectureConfig, OptimConfig, PretrainConfig
from pixmim.data.decode import limits

settings.register_profile(
    "pixmim",  # the same examples each time, and nothing that measures the machine
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("pixmim")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ["OMP_NUM_THREADS"] = "1"  # the same sums on any machine, here and in the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees, or leaves, anything in the user's cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the datasets library a cache in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "library"))
    datasets.disable_progress_bars()


@pytest.fixture
def memory(_own_cache: None) -> Path:
    """What pixmim remembers."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "pixmim"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="SKIPPED FOR WANT OF A CUDA DEVICE: run `make test` on a GPU"))


@pytest.fixture
def usual_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of images on a machine with enough memory, whichever one the tests run on."""
    monkeypatch.setattr(limits, "_machine_bounds", lambda: (120_000_000, 2**30))


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., PretrainConfig]:
    """A Run that trains in a second; keywords replace its fields."""

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
                backbone="vit_tiny_patch16_224", decoder_dim=16, decoder_depth=1, decoder_heads=2, options=dict(TINY)
            ),
            "optim": OptimConfig(base_lr=0.05, warmup=0.2),
        }
        return PretrainConfig(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes, five readable JPEGs each, of several sizes."""
    generator = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            pixels = generator.integers(0, 255, (40 + i, 56 - i, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg", quality=90)
    return root
