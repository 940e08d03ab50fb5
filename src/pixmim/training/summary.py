"""What a run says before it begins and when it has ended, and what it warns about."""

import shlex
from pathlib import Path

import torch

from pixmim.config import PretrainConfig
from pixmim.targets import resolve_radius
from pixmim.training.distributed import Distributed
from pixmim.training.metric_logger import DATA_BOUND
from pixmim.training.parallelize import parallel_mode
from pixmim.training.schedule import Schedule


def start_summary(
    config: PretrainConfig,
    images: int,
    schedule: Schedule,
    device: torch.device,
    precision: str,
    world: Distributed,
    parts: int,
) -> list[str]:
    """Lines for a terminal, as plain text. `images` is the size of the data set."""
    radius = resolve_radius(config.target.radius, config.image_size)
    target = f"low frequencies up to radius {radius}" if config.target.kind == "low-frequency" else "pixels"
    if config.target.distance == "cross_entropy":
        target += f" in {config.target.bins} bins"
    height, width = config.image_size
    drop = f", and a tenth of it from update {schedule.drop:,} on" if schedule.drop is not None else ""
    lines = [
        f"{config.model.name} on {config.model.backbone} at {height}x{width}, predicting {target}, "
        f"crop {config.crop.kind}",
        f"{images:,} images; {schedule.steps:,} updates of {config.batch_size:,} images = "
        f"{schedule.steps * config.batch_size / images:,.1f} epochs; "
        f"learning rate {config.lr:.3g} after {schedule.warmup:,} updates of warm-up{drop}",
        f"{_machines(config, device, world, parts)} in {precision}, seed {config.seed}",
    ]
    warnings = []
    if config.recipe_info.steps and schedule.steps < config.recipe_info.steps / 10:
        warnings.append(
            f"{schedule.steps:,} steps are few: this recipe was made for {config.recipe_info.steps:,}. Less than "
            "a tenth of them teaches little; more --epochs or a smaller --batch-size give more."
        )
    if config.optim.lr is not None and not 0.25 < config.lr / (config.optim.base_lr * config.batch_size / 256) < 4:
        warnings.append(
            f"a learning rate of {config.lr:.3g} suits another batch than {config.batch_size:,}: "
            f"the rule gives {config.optim.base_lr * config.batch_size / 256:.3g}. Leave --optim.lr out to follow it."
        )
    usual = config.dtype == "uint8" and config.channels in (1, 3)
    if not usual and (config.mean is None or config.std is None):
        warnings.append("mean and std are not measured, so those of photographs stand in: pixmim stats DATA")
    if images < config.batch_size:
        warnings.append(f"a batch of {config.batch_size:,} holds each of the {images:,} images more than once")
    return lines + [f"warning: {text}" for text in warnings]


def end_summary(
    config: PretrainConfig, out: Path, step: int, *, lost: int, bad: int, images: int, waited: float
) -> list[str]:
    """What a finished run says of itself, as plain lines: updates lost, bad images, a share of its time waited."""
    lines = []
    if waited > DATA_BOUND:
        command = f"pixmim bench-data {shlex.quote(config.data)}"
        lines.append(f"the run waited for data {waited:.0%} of its time: `{command}` says what helps")
    if lost:
        lines.append(f"{lost} of {step} updates were skipped because their gradient was not finite")
    if bad:
        lines.append(f"{bad} of {images} images could not be read: see {out}/skipped.csv")
    return lines


def _machines(config: PretrainConfig, device: torch.device, world: Distributed, parts: int) -> str:
    """Describe what computes, such as "8 processes on cuda (ddp), each 64 images of a batch in 2 parts of 32,"."""
    images = config.batch_size // world.size
    cut = f" in {parts} parts of {'' if images % parts == 0 else 'up to '}{-(-images // parts):,}" if parts > 1 else ""
    if world.size == 1:
        return f"{device}, each batch{cut}," if cut else str(device)
    share = f"{images:,} images of a batch"
    return f"{world.size} processes on {device.type} ({parallel_mode(config.parallel, world)}), each {share}{cut},"
