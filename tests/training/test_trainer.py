"""Test the training loop: interrupts, repeated bad gradients, and the state of the caller's generator."""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pixmim.config import CheckpointConfig, OptimConfig
from pixmim.training.metric_logger import read_metrics
from pixmim.training.optim import SyncFreeOptimizer, adamw_by_layer
from pixmim.training.trainer import Trainer
from pixmim.utils.errors import UserError


class Net(nn.Module):
    """A network whose forward pass changes its state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).square().mean()


class Ready(list[Tensor]):
    """A loader that is always ready."""

    ready = True

    def __next__(self) -> Tensor:
        return self.pop(0)


class EncoderAndHead(nn.Module):
    """An encoder and what is trained before it, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.encoder(x)) - x).square().mean()


def trainer_of(
    model: nn.Module,
    folder: Path,
    accumulation_steps: int = 1,
    steps: int = 4,
    optimizer: torch.optim.Optimizer | None = None,
) -> Trainer:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), fused=True)
    sync_free = SyncFreeOptimizer(optimizer, None, scaling=False, device=torch.device("cpu"))
    return Trainer(
        model,
        sync_free,
        lambda _: 0.1,
        steps,
        folder,
        images=8,
        batch_size=8,
        accumulation_steps=accumulation_steps,
        checkpoint=CheckpointConfig(every=1, keep_last=99),
    )


def parts(first: int = 0) -> Iterator[Tensor]:
    number = first
    while True:
        yield torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        number += 1


def test_an_interrupted_step_is_finished_if_its_data_are_ready(tmp_path: Path) -> None:
    net, computed = nn.Linear(4, 1), list[int]()

    def compute_loss(x: Tensor, number: int) -> Tensor:
        computed.append(number)
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return net(x).mean()

    with trainer_of(net, tmp_path, accumulation_steps=3) as trainer:
        step = trainer.fit(Ready(torch.ones(9, 2, 4)), compute_loss)  # type: ignore[type-var]
    assert step == 2 and computed == [0, 1, 2, 3, 4, 5] and trainer.checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("stopped", [0, 4, 5])  # number of the part that is waited for
def test_an_interrupt_while_waiting_for_data_saves_the_last_complete_step(stopped: int, tmp_path: Path) -> None:
    def run(stop: int, folder: Path) -> tuple[int, dict[str, Tensor]]:
        net = Net()

        def loader() -> Iterator[Tensor]:
            for number, part in enumerate(parts()):
                if number == stop:
                    signal.raise_signal(signal.SIGTERM)
                yield part

        with trainer_of(net, folder, accumulation_steps=2) as trainer:
            step = trainer.fit(loader(), lambda x, _: net(x))
        other = Net()
        if step:
            assert trainer.checkpoints.load_model(other)[0] == step and trainer.checkpoints.steps()[-1] == step
        return step, dict(other.state_dict())

    step, state = run(stopped, tmp_path / "cut")
    assert step == stopped // 2
    if step:
        _, expected = run(2 * step, tmp_path / "between")  # stopped between two steps
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_resumed_training_is_bitwise_the_same_and_restores_the_generator(tmp_path: Path) -> None:
    initial = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def train(folder: Path, stop: int = -1) -> dict[str, Tensor]:
        net = deepcopy(initial)

        def compute_loss(x: Tensor, number: int) -> Tensor:
            if number == stop:
                signal.raise_signal(signal.SIGTERM)
            torch.manual_seed(number)
            return net(x).square().mean()

        trainer = trainer_of(net, folder, accumulation_steps=2)
        torch.manual_seed(7)
        try:
            trainer.resume_and_fit(lambda first: nullcontext(parts(first)), compute_loss)
        finally:
            assert torch.initial_seed() == 7
        return dict(net.state_dict())

    expected = train(tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=3)
    resumed = train(tmp_path / "cut")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


@pytest.mark.parametrize("steps", [2, 3])
def test_the_statistics_of_a_frozen_encoder_stay(steps: int, tmp_path: Path) -> None:
    net = EncoderAndHead()
    adam = adamw_by_layer(net, {"weight": 0, "bias": 0}, 0.1, OptimConfig(), decoder_steps=2)
    before = deepcopy(net.state_dict())
    with trainer_of(net, tmp_path, accumulation_steps=2, steps=steps, optimizer=adam) as trainer:
        trainer.fit(parts(), lambda x, _: net(x))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if steps > 2 or name.startswith("head")}


def test_repeated_bad_gradients_end_the_training(tmp_path: Path) -> None:
    net = nn.Linear(4, 1)
    trainer = trainer_of(net, tmp_path, steps=100)
    with pytest.raises(UserError, match=r"last 20 steps \(up to step 20\).*--optim.clip"), trainer:
        trainer.fit(parts(), lambda x, number: net(x).mean() * float("nan"))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 19
