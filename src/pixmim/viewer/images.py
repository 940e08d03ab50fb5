"""The images of the page: those of a dataset by number, and uploaded ones, decoded for each run's own format."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from jaxtyping import Shaped
from torch import Tensor

from pixmim.build import image_spec
from pixmim.config import ModelConfig
from pixmim.data.dataset import BadImage, ImageDataset, ImageSpec
from pixmim.data.decode.image import decode
from pixmim.evaluation.embed import thumbnail
from pixmim.transforms.crops import CenterCrop, Crop, as_image, evaluation_crop
from pixmim.utils.console import label
from pixmim.utils.errors import UserError

MAX_UPLOAD_BYTES = 2**26
_MAX_UPLOADS = 16
_MAX_NAME = 120


class ImageStore:
    """Images by id: "d12" is number 12 of the dataset, "u3f9c0a" an upload.

    Args:
        open_data: Opens the dataset in a format. `data` is the same function, and calls it once for each format.
    """

    def __init__(self, open_data: Callable[[ImageSpec], ImageDataset]) -> None:
        self.data = lru_cache(maxsize=None)(open_data)
        self._uploads: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes, name: str, spec: ImageSpec) -> str:
        """Keep an uploaded file, of which the newest 16 are kept, and return its id.

        Raises:
            UserError: If it cannot be decoded.
        """
        try:
            decode(content, spec)
        except BadImage as error:
            raise UserError(f"{label(name)} cannot be read: {error}") from error
        key = "u" + hashlib.sha256(content).hexdigest()[:16]
        with self._lock:
            self._uploads[key] = (name[:_MAX_NAME], content)
            self._uploads.move_to_end(key)
            while len(self._uploads) > _MAX_UPLOADS:
                self._uploads.popitem(last=False)
        return key

    def name(self, key: str, spec: ImageSpec) -> str:
        """Return the path of an image of the dataset, or the name of an uploaded file."""
        if key in self._uploads:
            return self._uploads[key][0]
        return self.data(spec).path_of(self.index(key, spec))

    def index(self, key: str, spec: ImageSpec) -> int:
        """Return the number of an image of the dataset. Raises UserError for another id."""
        number = key.removeprefix("d")
        if key.startswith("d") and number.isascii() and number.isdigit() and len(number) < 16:
            if int(number) < len(self.data(spec)):
                return int(number)
            raise UserError(f"the dataset has {len(self.data(spec)):,} images, so there is no number {int(number):,}")
        raise UserError("this image is no longer in memory: choose it again")

    def read(self, key: str, spec: ImageSpec) -> Shaped[Tensor, "c h w"]:
        """Decode an image. Raises UserError if it does not exist or cannot be decoded."""
        try:
            if key in self._uploads:
                return as_image(decode(self._uploads[key][1], spec))
            return self.data(spec).image(self.index(key, spec))
        except BadImage as error:
            raise UserError(f"{label(self.name(key, spec))} cannot be read: {error}") from error

    def crop(self, key: str, config: ModelConfig, *, evaluation: bool = False) -> Shaped[Tensor, "1 c h w"]:
        """Return the center crop of an image at a run's size: that of reconstructions, or that of evaluations."""
        crop: Crop = CenterCrop(config.image_size, interpolation=config.interpolation)
        crop = evaluation_crop(config.image_size) if evaluation else crop
        return crop.crop(self.read(key, image_spec(config)))[None]

    def thumbnail(self, key: str, config: ModelConfig, side: int) -> bytes:
        """Return a JPEG of an image, at most `side` pixels wide and high."""
        return thumbnail(self.read(key, image_spec(config)), config, side)
