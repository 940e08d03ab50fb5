import inspect
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from pixmim import mask_patterns
from pixmim.mask_patterns import BeitBlockMask, GreenNoiseMask, SquareMask
from pixmim.masking import BlockwiseRandomMask, Mask, MaskGenerator, MaskSampler, RandomMask
from pixmim.utils import rng
from pixmim.utils.patches import hidden_pixels


@pytest.mark.parametrize(("patches", "visible"), [(196, 49), (256, 64), (784, 196), (36, 9)])
def test_random_mask_keeps_the_published_counts(patches: int, visible: int) -> None:
    mask = RandomMask(0.75)(5, patches)
    assert mask.ids_keep.shape == (5, visible)
    assert ((~mask.hidden).sum(dim=1) == visible).all()


def test_tables_agree_with_hidden() -> None:
    mask = RandomMask(0.6)(3, 20)
    tokens = torch.arange(20).expand(3, -1)
    for row in range(3):
        seen = tokens[row][~mask.hidden[row]]
        assert torch.equal(tokens[row][mask.ids_keep[row]], seen)
        rebuilt = torch.cat([seen, tokens[row][mask.hidden[row]]])[mask.ids_restore[row]]
        assert torch.equal(rebuilt, tokens[row])


def test_from_hidden_gives_the_same_mask() -> None:
    mask = RandomMask(0.75)(4, 16)
    again = Mask.from_hidden(mask.hidden)
    assert torch.equal(again.ids_keep, mask.ids_keep) and torch.equal(again.ids_restore, mask.ids_restore)


def test_every_patch_is_hidden_equally_often() -> None:
    hidden = RandomMask(0.75)(4000, 16, torch.Generator().manual_seed(1)).hidden
    assert (hidden.float().mean(dim=0) - 0.75).abs().max() < 0.03  # four standard errors


def test_the_generator_decides() -> None:
    one, two = (RandomMask()(2, 64, torch.Generator().manual_seed(3)).hidden for _ in range(2))
    assert torch.equal(one, two)


def test_masks_that_hide_nothing_all_or_unequal_numbers_are_refused() -> None:
    uneven = Mask.from_hidden(torch.tensor([[True, False, False], [True, True, False]]))
    with pytest.raises(ValueError, match="hide the same number"):
        _ = uneven.indices
    with pytest.raises(ValueError, match="hidden and visible patches"):
        Mask.from_hidden(torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="leaves 0 visible"):
        RandomMask(0.9)(1, 4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        RandomMask(1.0)
    for generator in (BlockwiseRandomMask(0.75, 2), SquareMask(0.5), BeitBlockMask(), GreenNoiseMask()):
        with pytest.raises(ValueError, match=r"needs a grid of \(rows, columns\), not 196 patches"):
            generator(2, 196)


def test_lsmae_keeps_the_published_count_in_complete_blocks() -> None:
    hidden = BlockwiseRandomMask(0.75, 2)(6, (28, 28)).hidden.view(6, 14, 2, 14, 2)
    assert (~hidden).sum(dim=(1, 2, 3, 4)).tolist() == [196] * 6
    complete = hidden.all(dim=4).all(dim=2)
    assert torch.equal(complete, hidden.any(dim=4).any(dim=2)) and ((~complete).sum(dim=(1, 2)) == 49).all()


def test_lsmae_blocks_against_a_loop() -> None:
    """Blocks in random order, each expanded column by column, patches outside the grid dropped, the first kept."""
    grid, d, ratio = (5, 7), 2, 0.6
    generator = BlockwiseRandomMask(ratio, d)
    u = torch.rand(8, generator.num_uniforms(grid))
    hidden = generator.sample(u, grid).hidden.view(8, *grid)
    for row in range(8):
        order = [
            (y, x)
            for block in u[row].argsort().tolist()
            for x in range(block % 4 * d, block % 4 * d + d)
            for y in range(block // 4 * d, block // 4 * d + d)
            if y < grid[0] and x < grid[1]
        ]
        visible = set(order[: int(35 * (1 - ratio))])
        assert {(y, x) for y in range(5) for x in range(7) if not hidden[row, y, x]} == visible


@pytest.mark.parametrize(("size", "count", "hidden"), [(192, 36, 22), (224, 49, 30)])
def test_simmim_hides_complete_blocks_by_the_ceiling(size: int, count: int, hidden: int) -> None:
    mask = BlockwiseRandomMask(0.6, 8, whole_blocks=True)(4, (size // 4, size // 4))
    side = size // 32
    blocks = mask.hidden.view(4, side, 8, side, 8)
    assert torch.equal(blocks.all(dim=4).all(dim=2), blocks.any(dim=4).any(dim=2))
    assert (blocks.all(dim=4).all(dim=2).sum(dim=(1, 2)) == hidden).all() and side**2 == count


def test_blocks_that_would_hide_everything_are_refused() -> None:
    """64-px blocks at 192 px with ratio 0.9."""
    with pytest.raises(ValueError, match="hides all 9 blocks"):
        BlockwiseRandomMask(0.9, 16, whole_blocks=True)(1, (48, 48))


def test_squares_are_centered_or_move() -> None:
    centered = SquareMask(0.5)(3, (14, 14)).hidden.view(3, 14, 14)
    assert centered.sum(dim=(1, 2)).tolist() == [100] * 3 and centered[:, 2:12, 2:12].all()
    sampler = MaskSampler(SquareMask(0.25, moving=True), (12, 14), seed=0, batch_size=4096)
    assert sampler(530, [3426]).hidden.sum() == 36  # one of its numbers is 1 when rounded to float32
    squares = SquareMask(0.25, moving=True)(400, (12, 14)).hidden.view(400, 12, 14)
    assert (squares.sum(dim=(1, 2)) == 36).all()
    tops = squares.any(dim=2).int().argmax(dim=1)
    assert set(tops.tolist()) == set(range(7))
    with pytest.raises(ValueError, match="hides all"):
        SquareMask(0.95)(1, (3, 3))


def test_blocks_follow_beit() -> None:
    """200 draws of at most 75 of 196 patches fell between 68 and 75 with BEiT's own generator."""
    mask = BeitBlockMask(75.5 / 196)(200, (14, 14))
    counts = mask.hidden.sum(dim=1)
    assert counts.max() == 75 and counts.min() >= 60 and (counts >= 68).float().mean() > 0.97
    assert mask.ids_keep is None
    with pytest.raises(ValueError, match="hide the same number"):
        _ = mask.indices
    again = BeitBlockMask(75.5 / 196)(200, (14, 14), torch.Generator().manual_seed(1)).hidden
    assert torch.equal(again, BeitBlockMask(75.5 / 196)(200, (14, 14), torch.Generator().manual_seed(1)).hidden)


@pytest.mark.parametrize(
    "generator",
    [
        RandomMask(),
        BlockwiseRandomMask(0.6, 2),
        BlockwiseRandomMask(0.6, 2, True),
        SquareMask(0.3, True),
        BeitBlockMask(),
        GreenNoiseMask(),
    ],
)
def test_a_row_depends_on_its_own_numbers_only(generator: MaskGenerator) -> None:
    u = torch.rand(6, generator.num_uniforms((10, 12)))
    batch = generator.sample(u, (10, 12)).hidden
    for row in range(6):
        assert torch.equal(generator.sample(u[row : row + 1], (10, 12)).hidden[0], batch[row])


@pytest.mark.parametrize(("block", "ratio", "distance"), [(32, 0.6, 15.5), (16, 0.6, 7.4), (8, 0.8, 6.0)])
def test_average_distance_is_simmims(block: int, ratio: float, distance: float) -> None:
    """AvgDist, section 4.2: the mean distance in pixels from a hidden pixel to the nearest visible one."""
    hidden = BlockwiseRandomMask(ratio, block // 4, whole_blocks=True)(
        40, (48, 48), torch.Generator().manual_seed(1)
    ).hidden
    pixels = hidden_pixels(hidden, 4, (192, 192))[:, 0].numpy()
    average = np.concatenate([ndimage.distance_transform_edt(image)[image] for image in pixels]).mean()
    assert average == pytest.approx(distance, abs=0.4)


def test_blocks_on_grids_too_small_for_them() -> None:
    for grid in ((2, 50), (1, 9), (3, 3), (4, 6)):
        hidden = BeitBlockMask(0.4)(100, grid).hidden
        counts = hidden.sum(dim=1)
        assert counts.min() >= 1 and counts.max() <= max(1, int(grid[0] * grid[1] * 0.4))
    with pytest.raises(ValueError, match="hides no patch"):
        BeitBlockMask(0.1)(1, (3, 3))


def test_green_noise_is_the_difference_of_two_gaussian_blurs() -> None:
    """Compare one pattern with a periodic convolution of the same white noise, value by value, in float64."""
    side, count = 32, mask_patterns._BANK_VALUES // 32**2
    u = rng.uniform(0, "green noise", 0, np.arange(count * side), 2 * side)[:side]
    white = np.sqrt(-2 * np.log(1 - u[:, :side])) * np.cos(2 * math.pi * u[:, side:])
    offsets = np.arange(-3 * side, 3 * side + 1)  # the kernel, summed over its periodic images

    def kernel(sigma: float) -> np.ndarray:
        line = np.zeros(side)
        np.add.at(line, offsets % side, np.exp(-(offsets**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)))
        return np.outer(line, line)

    wide, narrow = kernel(2.0), kernel(0.5)
    band = narrow / narrow.sum() - wide / wide.sum()
    ys, xs = np.indices((side, side))
    expected = [[(white * band[(y - ys) % side, (x - xs) % side]).sum() for x in range(4)] for y in range(4)]
    # A sampled Gaussian of sigma 0.5 is not band-limited: its spectrum differs from the continuous one by 2 %.
    assert np.corrcoef(np.ravel(expected), mask_patterns._green_noise(side)[0, :4, :4].numpy().ravel())[0, 1] > 0.99


def test_green_noise_hides_clumps_of_the_largest_power_at_middle_frequencies() -> None:
    mask = GreenNoiseMask(0.75)(300, (32, 32), torch.Generator().manual_seed(0))
    assert ((~mask.hidden).sum(dim=1) == 256).all() and mask.ids_keep is not None
    hidden = mask.hidden.view(300, 32, 32).double()
    power = np.asarray(torch.fft.fft2(hidden - 0.75).abs().square().mean(dim=0))
    f = np.fft.fftfreq(32)
    radius = np.sqrt(f[:, None] ** 2 + f[None, :] ** 2)
    low, middle, high = (power[(radius > a) & (radius <= b)].mean() for a, b in ((0, 0.06), (0.12, 0.25), (0.42, 0.6)))
    assert middle > 2 * low and middle > 2 * high  # of random patches all three are equal
    assert abs(float(hidden.mean(dim=0).std()) - math.sqrt(0.75 * 0.25 / 300)) < 0.005  # no place is preferred


def test_windows_of_green_noise_are_flipped_and_shifted() -> None:
    generator, grid = GreenNoiseMask(), (6, 9)
    u = torch.tensor([[0.3, 0.25, 0.5, 0.0, 0.0]])
    plain = generator.sample(u, grid).hidden.view(6, 9)
    bank = mask_patterns._green_noise(128)
    window = bank[int(0.3 * len(bank)), 32:38, 64:73]
    assert torch.equal(plain, window <= window.flatten().sort(descending=True).values[13])
    for column, axis in ((3, 0), (4, 1)):
        flipped = u.clone()
        flipped[0, column] = 0.9
        assert torch.equal(generator.sample(flipped, grid).hidden.view(6, 9), plain.flip(axis))
    assert generator.sample(torch.ones(1, 5), (200, 3)).hidden.shape == (1, 600)  # float32 may round up to 1


def test_hidden_patches_are_bool() -> None:
    from_hidden, hidden = inspect.unwrap(Mask.from_hidden), torch.tensor([[1, 1, 0, 0]])  # without checks of types
    for wrong in (hidden, hidden.byte(), hidden.float(), hidden[None].bool(), hidden[0].bool(), hidden.bool().numpy()):
        for visible in (None, 2):
            with pytest.raises(ValueError, match=r"must be bool of shape \(b, n\)"):
                from_hidden(wrong, visible)
