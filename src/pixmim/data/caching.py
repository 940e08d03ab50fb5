"""Where the images of a run stay once they are decoded: on the device, in memory, or nowhere.

The rule, where the user does not decide: on the device, if that is a GPU, its memory holds all images in a quarter of
it, and the crop only cuts them; else in memory, if all fit into a quarter of the machine's, which the processes of a
run share; else each is read again.
Only a cache says beforehand how large its images are, so only a cache is kept without being asked.
"""

import os
from typing import Literal

import numpy as np
import torch

from pixmim.data.dataset import ImageDataset
from pixmim.transforms.crops import Crop
from pixmim.utils.errors import UserError

Keep = Literal["auto", "gpu", "ram", "none"]
CacheLocation = Literal["gpu", "ram", "none"]

RAM_SHARE = 0.25
"""Share of a memory that decoded images may take without being asked to."""


def choose_cache_location(
    source: ImageDataset, crop: Crop, how: Keep, device: torch.device, processes: int = 1
) -> tuple[CacheLocation, str]:
    """Where decoded images stay, and why, in a line; empty where there is no choice. Raises UserError.

    processes  of the run on this machine: each keeps images of its own, and they share its memory
    """
    need = decoded_bytes(source)
    cuts = source.sizes is not None and all(
        crop.offset_without_resize((h, w), (0.0,) * crop.num_uniforms) is not None
        for h, w in np.unique(source.sizes, axis=0).tolist()
    )
    if how == "gpu" and not cuts:
        raise UserError(
            "--cache-images gpu needs a cache at --size and --crop.kind simple-resized or center: GPU crops do not "
            "resize"
        )
    if need is None:
        return ("ram", "kept in memory once decoded, however many they are") if how == "ram" else ("none", "")
    size = f"{need / 2**30:.1f} GiB decoded"
    if how == "gpu" or (how == "auto" and cuts and device.type != "cpu" and need <= RAM_SHARE * _of_device(device)):
        return "gpu", f"kept on the device, {size} (--cache-images ram or disk: not)"
    if how == "ram" or (how == "auto" and need <= RAM_SHARE * total_ram() / processes):
        return "ram", f"kept in memory once decoded, {size} (--cache-images none: not)"
    if how == "auto":
        shared = f", which {processes} processes share" * (processes > 1)
        return "none", (
            f"read from disk each time: {size} are more than a quarter of the memory{shared} (--cache-images ram: kept)"
        )
    return "none", "read from disk each time"


def decoded_bytes(source: ImageDataset) -> int | None:
    """Bytes of all images once decoded, or None where only reading them tells."""
    if source.sizes is None:
        return None
    return int(source.sizes.prod(axis=1).sum()) * source.image_spec.channels * source.image_spec.bytes


def total_ram() -> int:
    """Bytes of memory of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _of_device(device: torch.device) -> int:
    """Bytes of memory of a GPU of its own; 0 for one that shares the machine's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
