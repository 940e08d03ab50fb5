"""Image datasets. `open_dataset` opens any source, `create_loader` yields batches of its images."""

import os
from pathlib import Path

from pixmim.data.caching import create_loader
from pixmim.data.dataset import RGB, ConcatDataset, ImageDataset, ImageSpec
from pixmim.data.huggingface import is_arrow_dataset, open_huggingface
from pixmim.data.image_folder import from_folder, from_list_file
from pixmim.data.resized_cache import open_cache, read_settings
from pixmim.data.shards.fsspec_io import is_url
from pixmim.data.shards.webdataset import find_tars, is_tar, open_webdataset
from pixmim.data.synthetic import SyntheticShapes
from pixmim.data.uri import Part, read_parts, split_key, split_root
from pixmim.utils.errors import UserError

__all__ = ["create_loader", "open_dataset"]


def open_dataset(spec: str, image_spec: ImageSpec = RGB, shard_cache_gib: float = 50.0) -> ImageDataset:
    """Open a dataset.

    Args:
        spec: A folder, a .txt list of images, a resized cache, tars, a Hugging Face dataset (`hf:NAME`, or a folder
            or file of parquet or Arrow), `shapes:` with options, or several with weights, `a*3+b`. A cache and tars
            can be at a URL.
        image_spec: Channels and dtype that images are converted to.
        shard_cache_gib: Bound of the disk cache for remote shards, in GiB.

    Returns:
        The dataset.

    Raises:
        UserError: If there is no such dataset, it has no images, or it is damaged.
    """
    if not spec:
        raise UserError("no data given: pass --data FOLDER, or --data shapes: for the built-in synthetic dataset")
    parts = read_parts(spec)
    if parts == [Part(spec)]:
        return _open_part(spec, image_spec, shard_cache_gib)
    return ConcatDataset(spec, [(_open_part(part.source, image_spec, shard_cache_gib), part.weight) for part in parts])


def _open_part(spec: str, image_spec: ImageSpec, shard_cache_gib: float) -> ImageDataset:
    if spec.startswith("shapes:"):
        return SyntheticShapes.from_spec(spec, image_spec)
    if spec.startswith("hf:") and not is_url(spec):
        return open_huggingface(spec, image_spec)
    bare, last_dot = split_key(spec)
    location, root = split_root(bare)
    location = location.rstrip("/") if is_url(location) else os.path.expanduser(location)
    path = Path(location)
    if root is not None and not root.is_dir():
        raise UserError(f"no folder {root}, which '{spec}' names as root=")
    if root is None:
        is_remote_tar = is_url(location) and is_tar(location)
        if not is_remote_tar and not last_dot and read_settings(location) is not None:
            return open_cache(location, image_spec, shard_cache_gib)
        if (tars := find_tars(location)) is not None:
            return open_webdataset(spec, tars, image_spec, shard_cache_gib, last_dot)
    if last_dot:
        raise UserError(f"key=last-dot applies to tars only, and {location} is not a tar")
    if path.is_file() and path.suffix == ".txt":
        return from_list_file(spec, image_spec)
    if is_arrow_dataset(path):
        return open_huggingface(spec, image_spec)
    if root is not None:
        raise UserError(f"root= applies to .txt lists and tables only, and {location} is neither")
    return from_folder(spec, image_spec)
