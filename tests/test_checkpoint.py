"""Which checkpoints stay, and what becomes of one that cannot be written."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pixmim.engine.checkpoint import Checkpoints, milestone
from pixmim.engine.optim import Updater, adamw
from pixmim.errors import UserError


def network() -> tuple[nn.Module, Updater]:
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    return model, Updater(adamw(model, 0.1, (0.9, 0.95), 0.05), None, False, torch.device("cpu"))


def learn(model: nn.Module, updater: Updater) -> None:
    updater.backward(model(torch.ones(2, 4)).square().sum())
    updater.step(0.1)


@pytest.mark.parametrize("every", [1.0, 3.0, 2.5, 7.8125, 0.4])
def test_milestones_are_the_multiples(every: float) -> None:
    expected = {max(1, round(k * every)) for k in range(1, round(100 / every) + 1)}
    assert {step for step in range(1, 101) if milestone(step, every)} == {step for step in expected if step <= 100}


def test_no_milestones() -> None:
    assert not any(milestone(step, 0.0) for step in range(1, 100))


def test_the_last_ones_and_the_milestones_stay(tmp_path: Path) -> None:
    model, updater = network()
    weights = {}
    with Checkpoints(tmp_path, last=2, stays=lambda step: milestone(step, 4)) as checkpoints:
        for step in range(1, 12):
            learn(model, updater)
            checkpoints.save(step, model, updater, images=7)  # while the next step changes the weights
            weights[step] = model.weight.detach().clone()
    assert checkpoints.steps() == [4, 8, 10, 11]
    other, _ = network()
    assert checkpoints.load_model(other) == 11 and torch.equal(other.weight, weights[11])
    for step in (11, 10, 8):
        assert checkpoints.load(other, network_of(other), images=7) == step
        assert torch.equal(other.weight, weights[step])  # as it was then, whatever came after
        (tmp_path / f"step-{step:09d}").rename(tmp_path / f"gone-{step}")


def network_of(model: nn.Module) -> Updater:
    return Updater(adamw(model, 0.1, (0.9, 0.95), 0.05), None, False, torch.device("cpu"))


def test_what_cannot_be_written_is_said_and_tried_again(tmp_path: Path) -> None:
    model, updater = network()
    said: list[str] = []
    folder = tmp_path / "checkpoints"
    folder.write_text("a file in the way")
    with Checkpoints(folder, say=said.append) as checkpoints:
        checkpoints.save(1, model, updater, images=7)
        checkpoints.save(2, model, updater, images=7)  # hears of the first
        assert len(said) == 1 and "could not be written" in said[0] and "training goes on" in said[0]
        with pytest.raises(UserError, match="could not be written"):
            checkpoints.save(3, model, updater, images=7, wait=True)
        folder.unlink()
        checkpoints.save(4, model, updater, images=7, wait=True)
        assert checkpoints.steps() == [4]


def test_other_data_or_another_model_are_refused(tmp_path: Path) -> None:
    model, updater = network()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, updater, images=7, wait=True)
    with pytest.raises(UserError, match="began with 7 images, and there are 8 now"):
        Checkpoints(tmp_path).load(model, updater, images=8)
    wide = nn.Linear(5, 3)
    with pytest.raises(UserError, match="does not fit this run"):
        Checkpoints(tmp_path).load(wide, network_of(wide), images=7)
    with pytest.raises(UserError, match="holds another model"):
        Checkpoints(tmp_path).load_model(wide)


def test_nothing_whole_is_no_fresh_start(tmp_path: Path) -> None:
    model, updater = network()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, updater, images=7, wait=True)
    (tmp_path / "step-000000001" / "sums.json").write_text("{")
    said: list[str] = []
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        Checkpoints(tmp_path, say=said.append).load(model, updater, images=7)
    assert len(said) == 1 and "is damaged" in said[0]
