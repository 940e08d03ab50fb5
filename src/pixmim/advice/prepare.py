"""Commands that prepare a dataset for pre-training, and the list of its images without masks."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixmim.build import image_spec
from pixmim.config import PretrainConfig
from pixmim.data.dataset import RGB, ImageDataset
from pixmim.data.image_folder import ImageFolder
from pixmim.data.survey import MAX_SAMPLE, Survey
from pixmim.data.uri import split_options
from pixmim.utils.errors import UserError, shown
from pixmim.utils.files import check_output, write_csv, write_text_atomically


def prepare_list(dataset: ImageDataset, found: Survey) -> tuple[list[str], str]:
    """Return the command that lists the images without masks, if that is possible, and the --data that results."""
    if not found.masks or not can_list(dataset):
        return [], found.data
    file = Path(f"{_name(found.data)}-images.txt")
    return [shlex.join(["pixmim", "advise", found.data, "--list", str(file)])], _list_spec(dataset, file)


def can_list(dataset: ImageDataset) -> bool:
    """Return True if each image is a file of its own, unlike those of a .zip or with channels in separate files."""
    return type(dataset) is ImageFolder


def prepare_cache(found: Survey, config: PretrainConfig, *, cached: bool) -> tuple[list[str], str]:
    """Return the commands that resize images and measure mean and std, as far as needed, and the --data that results.

    Args:
        found: The survey.
        config: Configuration of the run, with its --data.
        cached: Whether to resize the images into a cache.
    """
    commands, source = list[str](), config.data
    spec = image_spec(config)
    flags = [] if spec == RGB else spec.flags.split()
    if cached:
        raw = [] if spec.dtype == "uint8" and spec.channels in (1, 3) else ["--raw"]
        cache = f"{_name(found.data)}-{config.size}"
        commands.append(shlex.join(["pixmim", "cache", source, cache, "--size", config.size, *flags, *raw]))
        source = cache
    if flags:
        commands.append(shlex.join(["pixmim", "stats", source, *flags]))
    return commands, source


def check_list(dataset: ImageDataset, images: int, examined: int, file: Path, overwrite: bool = False) -> None:
    """Check that the `images` of a dataset can be listed in a file.

    Raises:
        UserError: If the dataset has no files, the list has another suffix or exists (unless it is to be replaced),
            or some images will not be examined, of which a .csv would lack the duplicates.
    """
    if file.suffix not in (".txt", ".csv"):
        raise UserError(f"--list {file} is not the name of a list: it must end in .txt or .csv")
    if not can_list(dataset):
        raise UserError(f"--list {file} needs a folder of images, which {dataset.spec} is not")
    if file.suffix == ".csv" and examined < images:
        raise UserError(
            f"--list {file} names near-duplicates, for which all {images:,} images must be examined: "
            + (f"add --images {images}" if images <= MAX_SAMPLE else f"at most {MAX_SAMPLE:,} can be; use a .txt list")
        )
    if os.path.realpath(file) == os.path.realpath(split_options(dataset.spec)[0]):
        raise UserError(f"--list {file} would replace the list that is examined: choose another name")
    check_output(file, overwrite)


def write_image_list(dataset: ImageDataset, images: npt.NDArray[np.int64], found: Survey, file: Path) -> str:
    """Write a list for --data: a .txt of paths, or a .csv of path, label and group.

    Duplicates of one image are a group, which --labelled does not split. The label is the dataset's class; without
    classes there is no such column.

    Args:
        dataset: A folder or a list of images.
        images: Indices of the images to list.
        found: The survey of all of them.
        file: A new file, see `check_list`.

    Returns:
        The --data that reads the list.

    Raises:
        UserError: If a list cannot contain the name of an image, or the file cannot be written.
    """
    root, folder = _root(dataset), os.path.abspath(file.parent)
    paths = [os.path.abspath(dataset.path_of(int(index))) for index in images]
    for path in paths:
        if path.strip() != path or "\n" in path:
            raise UserError(f"--list cannot contain the name {shown(path)}, which has line breaks or blanks at its end")
    if Path(root).is_relative_to(folder):
        paths = [os.path.relpath(path, folder) for path in paths]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".txt":
        write_text_atomically(file, "\n".join(paths) + "\n")
        return _list_spec(dataset, file)
    columns, labels = {"path": paths}, dataset.labels
    if labels is not None:
        columns["label"] = [dataset.classes[label] if label >= 0 else "" for label in labels[images]]
    group_of = {path: f"near-duplicates {i}" for i, group in enumerate(found.duplicates, 1) for path in group}
    columns["group"] = [group_of.get(dataset.path_of(int(index)), "") for index in images]
    write_csv(file, [columns, *zip(*columns.values(), strict=True)])
    return _list_spec(dataset, file)


def _name(data: str) -> str:
    """Return a name for files made of a dataset."""
    name = re.sub(r"[.](txt|csv)$", "", Path(data.split(",")[0]).name)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "images"


def _list_spec(dataset: ImageDataset, file: Path) -> str:
    """Return the --data that reads a list of the dataset's files, which must be below the list's folder or root=."""
    root = _root(dataset)
    return str(file) if Path(root).is_relative_to(os.path.abspath(file.parent)) else f"{file},root={root}"


def _root(dataset: ImageDataset) -> str:
    """Return the folder that contains all files."""
    folders = {os.path.dirname(os.path.abspath(dataset.path_of(index))) for index in range(len(dataset))}
    return os.path.commonpath(folders)
