"""Measure the speed of training, without data."""

from time import perf_counter

import numpy as np
import torch

from pixmim.build import build_loss, build_mask_sampler, build_model
from pixmim.config import PretrainConfig
from pixmim.models.layer_decay import not_decayed
from pixmim.pretraining import compute_loss
from pixmim.training.find_batch_size import images_at_once, out_of_memory_hint
from pixmim.training.optim import adamw
from pixmim.training.precision import choose_attention, choose_precision

_MAX_IMAGES, _STEPS = 256, 3


def measure_speed(config: PretrainConfig, device: torch.device) -> float:
    """Measure how many images per second a device trains on: the fastest of three steps on noise.

    Args:
        config: Configuration of a run.
        device: The device.

    Returns:
        Images per second, on one device, if data are not the limit.

    Raises:
        UserError: If the model cannot be built, or 256 images do not fit in memory.
    """
    precision = choose_precision(config.precision, device)
    model, criterion = build_model(config), build_loss(config).to(device)
    choose_attention(model, device, precision)
    model = model.to(device)
    count = min(config.batch_size, _MAX_IMAGES)
    if device.type == "cpu":
        width = int(model.encoder.num_features)  # type: ignore[arg-type]
        count = min(count, images_at_once(config.image_size[0] * config.image_size[1], width))
    mask = build_mask_sampler(config, model.patch)(0, np.arange(count))
    noise = torch.randn(count, config.channels, *config.image_size, generator=torch.Generator().manual_seed(0))
    images = noise.to(device)
    optimizer = adamw(model, 0.0, config.optim.betas, config.optim.weight_decay, not_decayed(model.encoder))
    gradients, updates = [], []
    with out_of_memory_hint(count, 1):
        for _ in range(_STEPS):
            start = perf_counter()
            loss = compute_loss(model, criterion, images, mask, precision)
            loss.backward()
            loss.item()  # waits for the device
            middle = perf_counter()
            optimizer.step()
            next(model.parameters()).sum().item()
            gradients.append(middle - start)
            updates.append(perf_counter() - middle)
    return 1 / (min(gradients) / count + min(updates) / config.batch_size)
