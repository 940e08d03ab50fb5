"""From how many images fit at once to a batch, to its parts, and to a sentence for a person."""

import torch

from pixmim.engine.memory.footprint import Footprint, in_eights, in_gib
from pixmim.errors import UserError


def parts_for(batch: int, fitting: int) -> int:
    """The smallest number of equal parts of a batch that are of at most `fitting` images (at least 1)."""
    return next(parts for parts in range(-(-batch // fitting), batch + 1) if batch % parts == 0)


def largest_batch(fitting: int, batch: int, images: int, ranks: int = 1) -> tuple[int, str]:
    """What `--batch-size auto` means: the largest batch that is computed at once, and a line that says why.

    fitting  images that fit at once, on each of `ranks` devices
    batch    the recipe's own, which is not exceeded
    images   in the data set, which are not exceeded either

    Each process gets a multiple of 8, but for the recipe's own batch and less than 8. Raises UserError.
    """
    limit = min(batch, images) // ranks
    each = min(fitting, limit)
    if each < 1:
        raise UserError(f"{images:,} images in batches of {batch:,} are too few for {ranks} processes")
    if each * ranks == batch:
        return batch, f"batch size {batch:,} (auto): the recipe's own, which fits at once"
    each = in_eights(each)
    says = f"batch size {each * ranks:,} (auto): "
    if fitting >= limit:
        return each * ranks, says + (
            f"the data set has {images:,} images"
            if images < batch
            else f"what {ranks} processes can share of {batch:,}"
        )
    says += f"{each:,} images fit at once" + (f" on each of {ranks} devices" if ranks > 1 else "")
    if batch % ranks == 0:
        parts = parts_for(batch // ranks, fitting)
        says += f"; for the recipe's own: --batch-size {batch} --accumulate {parts}"
    return each * ranks, says


def advice(footprint: Footprint, device: torch.device, batch: int, accumulate: int = 1, ranks: int = 1) -> str:
    """What to say of a batch whose parts do not fit: what they need, what there is, and which flags would fit."""
    share = batch // ranks
    part = share // accumulate
    fitting = footprint.fitting(part - 1) if part > 1 else 0
    where = f" on each of {ranks} devices" if ranks > 1 else ""
    says = (
        f"a batch of {batch:,} in parts of {part:,} images{where} needs about {in_gib(footprint.needs(part))} GiB, and "
        f"{device} has {in_gib(footprint.room)}"
    )
    if not fitting:
        return f"{says}: fewer images do not fit either. Choose a smaller model or a smaller --size."
    parts = parts_for(share, fitting)
    return (
        f"{says}: --accumulate {parts} computes it in parts of {share // parts:,}, which fit; --batch-size auto takes "
        "the largest batch that fits at once"
    )
