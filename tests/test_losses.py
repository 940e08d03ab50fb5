import pytest
import torch

from pixmim.grid import patchify
from pixmim.losses import Objective
from pixmim.masking import RandomMask
from pixmim.targets import LowFrequency, Pixels, low_pass


@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("normalise", [True, False])
def test_loss_against_a_loop_over_hidden_patches(distance: str, normalise: bool) -> None:
    images = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    prediction = torch.randn(2, 6, 48, dtype=torch.float64)
    mask = RandomMask(0.5)(2, 6)
    value = Objective(LowFrequency(2), normalise, distance)(prediction, images, mask)
    patches = patchify(low_pass(images, 2), 4)
    losses = []
    for b, n in mask.hidden.nonzero().tolist():
        target = patches[b, n].tolist()
        if normalise:
            mean = sum(target) / 48
            variance = sum((t - mean) ** 2 for t in target) / 47
            target = [(t - mean) / (variance + 1e-6) ** 0.5 for t in target]
        gaps = [abs(p - t) for p, t in zip(prediction[b, n].float().tolist(), target, strict=True)]
        apart = {
            "mse": lambda g: g * g,
            "l1": lambda g: g,
            "smooth_l1": lambda g: g * g / 2 if g < 1 else g - 0.5,
        }[distance]
        losses.append(sum(map(apart, gaps)) / 48)
        assert value.per_patch[b, n].item() == pytest.approx(losses[-1], rel=1e-5)
    assert value.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_what_is_predicted_for_visible_patches_does_not_count() -> None:
    images, prediction, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 48), RandomMask(0.5)(2, 4)
    objective = Objective(Pixels())
    other = torch.where(mask.hidden[..., None], prediction, torch.randn_like(prediction))
    assert torch.equal(objective(prediction, images, mask).loss, objective(other, images, mask).loss)


def test_no_gradient_flows_into_the_target() -> None:
    images, prediction = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(1, 4, 48, requires_grad=True)
    Objective(LowFrequency(2))(prediction, images, RandomMask(0.5)(1, 4)).loss.backward()
    assert images.grad is None and prediction.grad is not None


def test_a_prediction_that_does_not_cover_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="does not cover images of 3x8x8"):
        Objective(Pixels())(torch.zeros(1, 5, 48), torch.zeros(1, 3, 8, 8), RandomMask(0.5)(1, 5))
