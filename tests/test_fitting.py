"""From what fits to a batch, its parts, and a sentence."""

import pytest
import torch

from pixmim.engine.memory.fitting import advice, largest_batch, parts_for
from pixmim.engine.memory.footprint import Footprint
from pixmim.errors import UserError

GIB = 2**30


def test_parts_against_trying_all() -> None:
    for batch in range(1, 60):
        for fitting in range(1, 70):
            parts = parts_for(batch, fitting)
            assert batch % parts == 0 and batch // parts <= fitting
            assert not any(batch % fewer == 0 and batch // fewer <= fitting for fewer in range(1, parts))


@pytest.mark.parametrize(
    ("fitting", "batch", "images", "ranks", "chosen", "because"),
    [
        (520, 4096, 10**6, 1, 520, "520 images fit at once; for the recipe's own: --batch-size 4096 --accumulate 8"),
        (64, 4096, 10**6, 8, 512, "64 images fit at once on each of 8 devices"),
        (5000, 4096, 10**6, 1, 4096, "the recipe's own, which fits at once"),
        (256, 4096, 10**6, 16, 4096, "the recipe's own"),
        (100, 100, 10**6, 1, 100, "the recipe's own"),
        (520, 4096, 300, 1, 296, "the data set has 300 images"),
        (5, 4096, 10**6, 1, 5, "5 images fit at once"),
        (520, 4096, 10**6, 3, 1560, "520 images fit at once on each of 3 devices"),
        (520, 128, 10**6, 3, 120, "what 3 processes can share of 128"),
    ],
)
def test_the_largest_batch(fitting: int, batch: int, images: int, ranks: int, chosen: int, because: str) -> None:
    found, line = largest_batch(fitting, batch, images, ranks)
    assert found == chosen and because in line and f"batch size {chosen:,} (auto)" in line


def test_fewer_images_than_processes() -> None:
    with pytest.raises(UserError, match="too few for 8 processes"):
        largest_batch(64, 4096, 5, 8)


def test_advice_names_flags_that_fit() -> None:
    found = Footprint(4 * GIB, 0.075 * GIB, 79 * GIB, margin=0.08)
    assert advice(found, torch.device("cuda"), 4096) == (
        "a batch of 4,096 in parts of 4,096 images needs about 311 GiB, and cuda has 79: --accumulate 8 computes it in "
        "parts of 512, which fit; --batch-size auto takes the largest batch that fits at once"
    )
    said = advice(found, torch.device("cuda"), 8192, accumulate=2, ranks=2)
    assert "in parts of 2,048 images on each of 2 devices needs about 158 GiB" in said and "--accumulate 8 " in said


def test_advice_after_a_step_that_should_have_fitted_asks_for_less() -> None:
    found = Footprint(0.0, GIB / 16, 10 * GIB)
    assert "--accumulate 2 computes it in parts of 64" in advice(found, torch.device("cpu"), 128)
    assert "a smaller model" in advice(found, torch.device("cpu"), 1)
    assert "a smaller model" in advice(Footprint(11 * GIB, GIB, 10 * GIB), torch.device("cpu"), 128)
