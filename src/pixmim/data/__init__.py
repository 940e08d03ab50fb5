"""Where images come from, and how they reach the loop."""

from collections.abc import Callable
from pathlib import Path

import torch

from pixmim.data.batches import Batches, Portion
from pixmim.data.files import below, listed
from pixmim.data.keep import Place
from pixmim.data.kept import Kept
from pixmim.data.loader import Loader
from pixmim.data.resident import Resident
from pixmim.data.shapes import Shapes
from pixmim.data.shards import Shards, read_settings
from pixmim.data.skipped import Skipped
from pixmim.data.source import COLOUR, Form, Source
from pixmim.errors import UserError
from pixmim.transforms import Crop


def open_data(spec: str, form: Form = COLOUR) -> Source:
    """The data set that `spec` names: a folder, a cache, a .txt that names images, or `shapes:` with options.

    form  what its images are brought into

    Raises UserError if there is none.
    """
    if not spec:
        raise UserError("which images? Give a folder, or shapes: for drawn ones")
    if form.channels not in (1, 3):
        raise UserError(f"images are read in 3 channels or 1, not in {form.channels}")
    if spec.startswith("shapes:"):
        return Shapes.from_spec(spec, form)
    path = Path(spec).expanduser()
    if read_settings(path) is not None:
        return Shards(spec, form)
    if path.is_file() and path.suffix == ".txt":
        return listed(spec, form)
    return below(spec, form)


def open_batches(
    source: Source,
    crop: Crop,
    portion: Portion,
    place: Place,
    device: torch.device,
    *,
    skipped: Skipped,
    flip: float,
    seed: int,
    threads: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Batches:
    """The batches of a run (see `Loader`), from where its decoded images stay (see `keep.choose_place`)."""
    if place == "device":
        return Resident(
            source, crop, portion, device, skipped=skipped, flip=flip, seed=seed, threads=threads, progress=progress
        )
    kept = Kept(source) if place == "memory" else source
    pin = device.type == "cuda"
    return Loader(kept, crop, portion, skipped=skipped, flip=flip, seed=seed, threads=threads, pin=pin)
