import math

import pytest
import torch

from pixmim.utils.patches import hidden_pixels, hidden_share, patchify, sincos_positions, unpatchify


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, (8, 8), 4), (3, (8, 12), 4), (13, (6, 9), 3)])
def test_patchify_orders_values_by_row_column_channel(channels: int, size: tuple[int, int], patch: int) -> None:
    h, w = size
    images = torch.randn(2, channels, h, w)
    patches = patchify(images, patch)
    for row in range(h):
        for column in range(w):
            n = (row // patch) * (w // patch) + column // patch
            first = ((row % patch) * patch + column % patch) * channels
            assert torch.equal(patches[:, n, first : first + channels], images[:, :, row, column])
    assert torch.equal(unpatchify(patches, patch, size), images)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="10x8 pixels is not divisible"):
        patchify(torch.zeros(1, 3, 10, 8), 4)
    with pytest.raises(ValueError, match="do not make an image"):
        unpatchify(torch.zeros(1, 5, 48), 4, (8, 8))


def test_sincos_positions_against_the_formula_entry_by_entry() -> None:
    width, rows, columns = 16, 3, 5
    table = sincos_positions(width, (rows, columns))
    m = width // 4
    for row in range(rows):
        for column in range(columns):
            for k in range(m):
                w = 10000 ** (-k / m)
                entry = table[row * columns + column]
                expected = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
                assert entry[[k, m + k, 2 * m + k, 3 * m + k]].tolist() == pytest.approx(expected, abs=1e-7)


def test_hidden_pixels_cover_exactly_the_hidden_patches() -> None:
    hidden = torch.rand(2, 6) < 0.5
    drawn = hidden_pixels(hidden, 4, (8, 12))
    assert torch.equal(patchify(drawn.float(), 4), hidden[:, :, None].expand(-1, -1, 16).float())


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_hidden_share_is_that_of_the_pixels(patch: int) -> None:
    hidden = torch.rand(3, 8 * 12) < 0.5
    pixels = patchify(hidden_pixels(hidden, 2, (16, 24)).float(), patch)
    assert torch.equal(hidden_share(hidden, patch, (16, 24)), pixels.mean(dim=2))
    for wrong in (3, 1):
        with pytest.raises(ValueError, match="does not match"):
            hidden_share(hidden, wrong, (16, 24))
