"""Where images come from, and how they reach the loop."""

import os
from pathlib import Path
from typing import Any, Unpack

from pixmim.data.caching import CacheLocation
from pixmim.data.dataset import RGB, ImageDataset, ImageSpec
from pixmim.data.gpu_loader import GpuLoader
from pixmim.data.huggingface import is_arrow_dataset, open_huggingface
from pixmim.data.image_folder import from_folder, from_list_file
from pixmim.data.loader import Batch, BatchLoader, Loader, LoaderOptions
from pixmim.data.resized_cache import open_cache, read_settings
from pixmim.data.sampler import BatchShard
from pixmim.data.shards.fsspec_io import is_url
from pixmim.data.shards.webdataset import find_tars, is_tar, open_webdataset
from pixmim.data.synthetic import SyntheticShapes
from pixmim.data.uri import Part, read_parts, split_key, split_root
from pixmim.data.wrappers import ConcatDataset, InMemoryDataset
from pixmim.transforms.crops import Crop
from pixmim.utils.errors import UserError


def open_dataset(spec: str, form: ImageSpec = RGB, shard_cache_gib: float = 50.0) -> ImageDataset:
    """The data set that `spec` names: a folder, a cache, tars, a .txt that names images, a Hugging Face data set
    (`hf:NAME`, or a folder or file of parquet or Arrow), `shapes:` with options, or several of these with weights,
    `a*3+b`. A cache and tars can also be far away, at a URL.

    form        what its images are brought into
    shard_cache_gib  GiB that copies of far shards may take on this machine

    Raises UserError if there is none.
    """
    if not spec:
        raise UserError("which images? Give a folder, or shapes: for drawn ones")
    parts = read_parts(spec)
    if parts == [Part(spec)]:
        return _open_one(spec, form, shard_cache_gib)
    return ConcatDataset(spec, [(_open_one(part.source, form, shard_cache_gib), part.weight) for part in parts])


def _open_one(spec: str, form: ImageSpec, shard_cache_gib: float) -> ImageDataset:
    if spec.startswith("shapes:"):
        return SyntheticShapes.from_spec(spec, form)
    if spec.startswith("hf:") and not is_url(spec):
        return open_huggingface(spec, form)
    bare, last_dot = split_key(spec)
    path, root = split_root(bare)
    place = path.rstrip("/") if is_url(path) else os.path.expanduser(path)
    if root is not None and not root.is_dir():
        raise UserError(f"there is no folder {root}, which '{spec}' names as root=")
    if root is None and not (is_url(place) and is_tar(place)) and read_settings(place) is not None and not last_dot:
        return open_cache(place, form, shard_cache_gib)
    tars = find_tars(place) if root is None else None
    if tars is not None:
        return open_webdataset(spec, tars, form, shard_cache_gib, last_dot)
    if last_dot:
        raise UserError(f"key=last-dot is for tars, and {place} is none")
    file = Path(place)
    if file.is_file() and file.suffix == ".txt":
        return from_list_file(spec, form)
    if is_arrow_dataset(file):
        return open_huggingface(spec, form)
    if root is not None:
        raise UserError(f"root= is for a .txt that names images and for tables, and {place} is neither")
    return from_folder(spec, form)


def create_loader(
    source: ImageDataset,
    crop: Crop,
    shard: BatchShard,
    place: CacheLocation,
    **options: Unpack[LoaderOptions],
) -> BatchLoader[Any, Batch]:
    """Create the loader for a place to cache decoded images, as `caching.choose_cache_location` returns it.

    Args:
        source: The images.
        crop: What the network sees of an image.
        shard: Positions of this rank.
        place: Where decoded images are cached.
        options: See `BatchLoader`.
    """
    if place == "gpu":
        return GpuLoader(source, crop, shard, **options)
    return Loader(InMemoryDataset(source) if place == "ram" else source, crop, shard, **options)
