import inspect
import itertools
import math

import pytest
import torch

from pixmim.losses import ReconstructionLoss, normalize_patches, patch_statistics, window_statistics
from pixmim.masking import RandomMask
from pixmim.targets import ColorBins, LowFrequency, Pixels, low_pass
from pixmim.utils.patches import patchify, unpatchify


@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("normalize_patches", [True, False])
def test_loss_against_a_loop_over_hidden_patches(distance: str, normalize_patches: bool) -> None:
    images = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    prediction = torch.randn(2, 6, 48, dtype=torch.float64)
    mask = RandomMask(0.5)(2, 6)
    value = ReconstructionLoss(LowFrequency(2), normalize_patches, distance)(prediction, images, mask)
    patches = patchify(low_pass(images, 2), 4)
    losses = []
    for b, n in mask.hidden.nonzero().tolist():
        target = patches[b, n].tolist()
        if normalize_patches:
            mean = sum(target) / 48
            variance = sum((t - mean) ** 2 for t in target) / 47
            target = [(t - mean) / (variance + 1e-6) ** 0.5 for t in target]
        differences = [abs(p - t) for p, t in zip(prediction[b, n].float().tolist(), target, strict=True)]
        distances = {
            "mse": lambda g: g * g,
            "l1": lambda g: g,
            "smooth_l1": lambda g: g * g / 2 if g < 1 else g - 0.5,
        }[distance]
        losses.append(sum(map(distances, differences)) / 48)
        assert value.per_patch[b, n].item() == pytest.approx(losses[-1], rel=1e-5)
    assert value.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(("predictions", "images", "masks"), [(1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 3), (3, 2, 2)])
def test_different_batch_sizes_are_refused(predictions: int, images: int, masks: int) -> None:
    """torch would broadcast a batch of one."""
    given = torch.randn(predictions, 6, 48), torch.randn(images, 3, 12, 8), RandomMask(0.5)(masks, 6)
    forward = inspect.unwrap(ReconstructionLoss.forward)  # without the shapes that tests check
    with pytest.raises(ValueError, match=f"prediction {predictions}, images {images}, mask {masks}"):
        forward(ReconstructionLoss(Pixels()), *given)


def test_larger_patches_are_weighted_by_their_hidden_fraction() -> None:
    """A loop over the hidden pixels: each contributes the mean distance of its predicted patch."""
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    prediction = torch.randn(2, 6, 48, dtype=torch.float64)
    mask = RandomMask(0.6)(2, (4, 6))  # patches of 2 pixels; those of the prediction have 4
    value = ReconstructionLoss(Pixels(), False, "l1")(prediction, images, mask)
    total = count = 0.0
    for b, y, x in itertools.product(range(2), range(8), range(12)):
        if mask.hidden[b, y // 2 * 6 + x // 2]:
            top, left = y // 4 * 4, x // 4 * 4
            predicted = prediction[b, top // 4 * 3 + left // 4].float().tolist()
            places = itertools.product(range(top, top + 4), range(left, left + 4), range(3))
            differences = [abs(p - images[b, c, i, j].item()) for p, (i, j, c) in zip(predicted, places, strict=True)]
            total, count = total + sum(differences) / 48, count + 1
    assert value.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert value.per_patch.shape == (2, 6)


def test_statistics_against_a_loop_over_seen_pixels() -> None:
    images, seen = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.rand(2, 1, 4, 8) < 0.5
    seen[0, 0, :, :4] = False
    mean, scale = patch_statistics(images, 4, seen)
    all_pixels = patch_statistics(images, 4)
    for b, left in itertools.product(range(2), (0, 4)):
        block, chosen = images[b, :, :, left : left + 4], seen[b, :, :, left : left + 4].expand(3, -1, -1)
        for (m, s), values in (((mean, scale), block[chosen].tolist()), (all_pixels, block.flatten().tolist())):
            average = sum(values) / max(len(values), 1)
            variance = sum((v - average) ** 2 for v in values) / max(len(values) - 1, 1)
            torch.testing.assert_close(m[b, :, :, left : left + 4], torch.full_like(block, average))
            torch.testing.assert_close(s[b, :, :, left : left + 4], torch.full_like(block, (variance + 1e-6) ** 0.5))
    normalized = unpatchify(normalize_patches(patchify(images, 4)), 4, (4, 8))
    torch.testing.assert_close(normalized * all_pixels[1] + all_pixels[0], images)


@pytest.mark.parametrize("window", [3, 7, 47])
def test_window_normalization_against_a_loop(window: int) -> None:
    """Windows end at the border; the largest covers the full image from any pixel."""
    images, seen = 100 + torch.randn(2, 3, 8, 12, dtype=torch.float64), torch.rand(2, 1, 8, 12) < 0.5
    targets = ReconstructionLoss(Pixels(), False, "l1", window).targets(images, 1).view(2, 8, 12, 3)
    all_of, seen_of = window_statistics(images, window), window_statistics(images, window, seen)
    reach = window // 2
    for b, c, y, x in itertools.product(range(2), range(3), range(8), range(12)):
        rows, columns = slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1)
        block, chosen = images[b, c, rows, columns], seen[b, 0, rows, columns]
        for (mean, scale), values in ((all_of, block.flatten().tolist()), (seen_of, block[chosen].tolist())):
            if values:
                average = sum(values) / len(values)
                variance = sum((v - average) ** 2 for v in values) / max(len(values) - 1, 1)
                assert mean[b, c, y, x].item() == pytest.approx(average, rel=1e-9)
                assert scale[b, c, y, x].item() == pytest.approx((variance + 1e-6) ** 0.5, rel=1e-6)
        mean, scale = (s[b, c, y, x].item() for s in all_of)
        assert targets[b, y, x, c].item() == pytest.approx((images[b, c, y, x].item() - mean) / scale, abs=1e-6)


def test_window_normalization_of_a_flat_image_is_zero() -> None:
    flat = torch.full((1, 3, 32, 32), 2.2)
    assert ReconstructionLoss(Pixels(), False, normalize_window=9).targets(flat, 16).abs().max() < 1e-3


def test_cross_entropy_against_a_loop_over_hidden_values() -> None:
    bins, mean, std = 5, (0.4, 0.5), (0.2, 0.3)
    pixels, mask = torch.rand(2, 2, 8, 12, dtype=torch.float64), RandomMask(0.5)(2, 6)
    images = (pixels - torch.tensor(mean).view(1, 2, 1, 1)) / torch.tensor(std).view(1, 2, 1, 1)
    scores = torch.randn(2, 6, 4 * 4 * 2 * bins)  # row, column, channel, bin
    value = ReconstructionLoss(ColorBins(bins, Pixels(), mean, std), False, "cross_entropy")(scores, images, mask)
    total, count = 0.0, 0
    for b, c, y, x in itertools.product(range(2), range(2), range(8), range(12)):
        n = y // 4 * 3 + x // 4
        if mask.hidden[b, n]:
            first = ((y % 4 * 4 + x % 4) * 2 + c) * bins
            each = [math.exp(v) for v in scores[b, n, first : first + bins].tolist()]
            total -= math.log(each[int(pixels[b, c, y, x] * bins)] / sum(each))
            count += 1
    assert value.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_incompatible_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="require each other"):
        ReconstructionLoss(Pixels(), False, "cross_entropy")
    with pytest.raises(ValueError, match="require each other"):
        ReconstructionLoss(ColorBins(8), False, "l1")
    with pytest.raises(ValueError, match="pass normalize_patches=False"):
        ReconstructionLoss(ColorBins(8), distance="cross_entropy")
    with pytest.raises(ValueError, match="and no normalize_window"):
        ReconstructionLoss(ColorBins(8), False, "cross_entropy", normalize_window=47)
    with pytest.raises(ValueError, match="normalize_window replaces normalize_patches: pass normalize_patches=False"):
        ReconstructionLoss(Pixels(), normalize_window=47)
    for side in (1, 46, -3):
        with pytest.raises(ValueError, match=f"odd and at least 3, not {side}"):
            ReconstructionLoss(Pixels(), False, normalize_window=side)
    with pytest.raises(ValueError, match="does not cover images of 3x8x8 with 8 bins"):
        ReconstructionLoss(ColorBins(8), False, "cross_entropy")(
            torch.zeros(1, 4, 48), torch.zeros(1, 3, 8, 8), RandomMask(0.5)(1, 4)
        )


def test_predictions_of_visible_patches_do_not_count() -> None:
    images, prediction, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 48), RandomMask(0.5)(2, 4)
    loss = ReconstructionLoss(Pixels())
    other = torch.where(mask.hidden[..., None], prediction, torch.randn_like(prediction))
    assert torch.equal(loss(prediction, images, mask).loss, loss(other, images, mask).loss)


def test_no_gradient_flows_into_the_target() -> None:
    images, prediction = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(1, 4, 48, requires_grad=True)
    ReconstructionLoss(LowFrequency(2))(prediction, images, RandomMask(0.5)(1, 4)).loss.backward()
    assert images.grad is None and prediction.grad is not None


def test_a_prediction_that_does_not_cover_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="does not cover images of 3x8x8"):
        ReconstructionLoss(Pixels())(torch.zeros(1, 5, 48), torch.zeros(1, 3, 8, 8), RandomMask(0.5)(1, 5))
    with pytest.raises(ValueError, match="a mask of 4 patches over 8x8 pixels does not match patches of 2x2"):
        ReconstructionLoss(Pixels())(torch.zeros(1, 16, 12), torch.zeros(1, 3, 8, 8), RandomMask(0.5)(1, 4))
