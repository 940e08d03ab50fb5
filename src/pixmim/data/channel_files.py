"""Images whose channels are in separate files, grouped by a pattern of their names."""

import io
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from pixmim.data.dataset import RGB, BadImage, Extent, ImageSpec
from pixmim.data.decode.channels import convert
from pixmim.data.decode.image import ALL_BITS, read
from pixmim.data.decode.limits import check_bytes, max_bytes
from pixmim.data.image_folder import ImageFolder, Listing, from_folder, open_listing
from pixmim.data.uri import read_options
from pixmim.transforms.crops import Array
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_file


class ChannelFiles(ImageFolder):
    """Samples whose channels are in several files, given by the name of each sample, which is its path here."""

    def __init__(self, files: Mapping[str, list[str]], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._files = files

    def extents(self, index: int) -> list[Extent]:
        """Return the files of a sample's channels."""
        return [(path, 0, 0) for path in self._files[self._paths[index]]]

    def read(self, index: int) -> bytes:
        """Return a sample with all bits of its files, as an .npy file. Raises BadImage."""
        file = io.BytesIO()
        np.save(file, self._read_channels(index, replace(ALL_BITS, tiff_pages=self.image_spec.tiff_pages)))
        return file.getvalue()

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        return convert(self._read_channels(index, self.image_spec), self.image_spec)

    def _read_channels(self, index: int, image_spec: ImageSpec) -> Array:
        arrays: list[Array] = []
        for path in self._files[self._paths[index]]:
            try:
                arrays.append(read(read_file(path, max_bytes()), image_spec))
            except (OSError, BadImage) as error:
                reason = getattr(error, "strerror", None) or error
                raise BadImage(f"{os.path.basename(path)}: {reason}") from None
            check_bytes(sum(array.nbytes for array in arrays))
            first, last = ((*array.shape[:2], str(array.dtype)) for array in (arrays[0], arrays[-1]))
            if first != last:
                name = os.path.basename(path)
                raise BadImage(
                    "its files differ: {2} of {1}x{0} pixels, but {5} of {4}x{3} in {6}".format(*first, *last, name)
                )
        return np.concatenate(arrays, axis=2)


def open_channel_files(spec: str, image_spec: ImageSpec = RGB) -> ImageFolder:
    """Open a folder whose files hold one channel of an image each, as in `cells,channels={sample}_c{channel}.tif`.

    A pattern with a slash starts at the folder; otherwise it is that of a file's name, in any subfolder. A sample
    without all channels is left out and counted. Channels are sorted by name, numbers by their value.

    Raises:
        UserError: If the folder cannot be read, or no sample is complete.
    """
    folder, options = read_options(spec, "a folder of images", ("channels", "include", "exclude"))
    pattern = options.pop("channels")[0]
    if Path(os.path.expanduser(folder)).is_file():
        raise UserError(
            f"channels= needs a folder of images, and {folder} is a file: unpack it, or leave the option out"
        )
    parts = {"{sample}": "(?P<sample>.+)", "{channel}": "(?P<channel>[^/]+?)"}
    if any(pattern.count(name) != 1 for name in parts):
        raise UserError(f"channels={pattern} must contain {{sample}} and {{channel}} once: {{sample}}_c{{channel}}.tif")
    words = re.split(r"(\{sample\}|\{channel\})", pattern)
    start = "(?P<folder>)" if "/" in pattern else "(?P<folder>(?:.*/)?)"
    expression = re.compile(start + "".join(parts.get(word) or re.escape(word) for word in words))
    files = from_folder(
        ",".join([folder, *(f"{name}={value}" for name in options for value in options[name])]), image_spec
    )
    root = os.path.expanduser(folder)
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    for path in map(files.path_of, range(len(files))):
        if match := expression.fullmatch(os.path.relpath(path, root)):
            samples[match["folder"] + match["sample"]][match["channel"]] = path
    names = sorted({name for sample in samples.values() for name in sample}, key=_natural)
    complete = {key: [sample[name] for name in names] for key, sample in samples.items() if len(sample) == len(names)}
    found = f"{', '.join(names[:20])} in {len(samples):,} samples"
    if not complete:
        raise UserError(f"no sample in {root} has all channels of channels={pattern} ({found})")
    notes = [f"{len(names)} channels of files: {', '.join(names[:20])}"]
    if rest := len(samples) - len(complete):
        notes.append(f"{rest:,} samples without all of them are left out")
    if other := len(files) - sum(map(len, samples.values())):
        notes.append(f"{other:,} other images are left out")
    listing = Listing(sorted(map(os.fsencode, complete)))
    data = open_listing(root, listing, {}, lambda *rest: ChannelFiles(complete, spec, Path(root), *rest), image_spec)
    data.left_out = data.description = "; ".join([*notes, *filter(None, [files.left_out])])
    return data


def _natural(name: str) -> list[str | int]:
    """Return a key that sorts numbers in names by their value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]
