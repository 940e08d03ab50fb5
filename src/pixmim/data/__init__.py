"""Image datasets. `open_dataset` opens any source, `create_loader` yields batches of its images."""

import os
from pathlib import Path

from pixmim.data.caching import create_loader
from pixmim.data.channel_files import open_channel_files
from pixmim.data.dataset import RGB, ConcatDataset, ImageDataset, ImageSpec
from pixmim.data.huggingface import is_arrow_dataset, open_huggingface
from pixmim.data.image_folder import from_folder
from pixmim.data.label_table import is_label_table, open_label_table, open_list
from pixmim.data.resized_cache import open_cache, read_settings
from pixmim.data.shards.fsspec_io import is_url
from pixmim.data.shards.webdataset import find_tars, open_webdataset
from pixmim.data.split import split_dataset
from pixmim.data.synthetic import SyntheticShapes
from pixmim.data.uri import Part, SplitSpec, read_options, read_parts, spec_text, split_options
from pixmim.data.zip_archive import is_zip, open_zip
from pixmim.utils.errors import UserError

__all__ = ["create_loader", "open_dataset"]


def open_dataset(
    spec: str | os.PathLike[str], image_spec: ImageSpec = RGB, shard_cache_gib: float = 50.0
) -> ImageDataset:
    """Open a dataset.

    Args:
        spec: A folder, a .txt list of images (and classes), a .csv, .tsv or .parquet table of paths and labels, a
            resized cache, a .zip, tars, a Hugging Face dataset (`hf:NAME`, or a folder or file of parquet or Arrow),
            `shapes:`, or several with weights, `a*3+b`. A cache, a .zip and tars can be at a URL. Options follow after
            commas, such as `photos,exclude=*_mask.png` or `cells,channels={sample}_c{channel}.tif`; `split:train:`
            before all of it chooses a part: see `SplitSpec`.
        image_spec: Channels and dtype that images are converted to.
        shard_cache_gib: Bound of the disk cache for remote shards, in GiB.

    Returns:
        The dataset.

    Raises:
        UserError: If there is no such dataset, it has no images, or it is damaged.
    """
    if not (spec := spec_text(spec)):
        raise UserError("no data given: pass --data FOLDER, or --data shapes: for the built-in synthetic dataset")
    parts, (split, source) = read_parts(spec), SplitSpec.read(spec)

    def open_part(part: Part) -> ImageDataset:
        data = _open_part(part.source, image_spec, shard_cache_gib)
        return data if split is None else split_dataset(data, split)

    if parts == [Part(source)]:
        return open_part(parts[0])
    return ConcatDataset(spec, [(open_part(part), part.weight) for part in parts])


def _open_part(spec: str, image_spec: ImageSpec, shard_cache_gib: float) -> ImageDataset:
    if spec.startswith("shapes:"):
        return SyntheticShapes.from_spec(spec, image_spec)
    if spec.startswith("hf:") and not is_url(spec):
        return open_huggingface(spec, image_spec)
    location, options = split_options(spec)
    location = location.rstrip("/") if is_url(location) else os.path.expanduser(location)
    path = Path(location)
    if "channels" in options:
        return open_channel_files(spec, image_spec)
    if is_zip(location):
        return open_zip(spec, image_spec, shard_cache_gib)
    if read_settings(location) is not None:
        read_options(spec, "a resized cache", ())
        return open_cache(location, image_spec, shard_cache_gib)
    if (tars := find_tars(location)) is not None:
        read_options(spec, "of tars", ("key",))
        if (key := options.get("key", ["last-dot"])[0]) != "last-dot":
            raise UserError(f"key={key} in '{spec}' is not supported: use key=last-dot, or leave it out")
        return open_webdataset(spec, tars, image_spec, shard_cache_gib, last_dot="key" in options)
    if is_label_table(path, options):
        return open_label_table(spec, image_spec)
    if path.is_file() and path.suffix.lower() == ".txt":
        return open_list(spec, image_spec)
    if is_arrow_dataset(path):
        return open_huggingface(spec, image_spec)
    return from_folder(spec, image_spec)
