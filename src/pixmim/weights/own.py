"""pixmim's own files: encoder.safetensors, in timm's names, and model.safetensors, a whole model in pre-training.

Both carry the Run that they came from in their metadata, so that each is enough by itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from pixmim.config import Run
from pixmim.disk import write_whole
from pixmim.runfile import portable, to_json

KEY = "pixmim"
"""Where the metadata hold the Run, as JSON."""


def save_tensors(
    tensors: dict[str, Tensor], path: Path, run: Run, step: int, more: Mapping[str, str] | None = None
) -> None:
    """Write tensors with what a reader must know to feed them, whole or not at all.

    timm's `checkpoint_path` takes an encoder's file. The metadata are words: the Run, its main points by themselves
    for other programs, and `more` (a classifier's classes). They name nothing of the machine they are written on.
    """
    mean, std = run.statistics
    metadata = {
        "format": "pt",
        "method": f"{run.model.name} with {run.target.kind} target and {run.crop.kind} crop",
        "backbone": run.model.backbone,
        "img_size": json.dumps(run.hw),
        "in_chans": str(run.channels),
        "pixels": run.pixels,
        "options": json.dumps(run.model.options),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "step": str(step),
        KEY: to_json(portable(run)),
        **(more or {}),
    }
    write_whole(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=metadata))
