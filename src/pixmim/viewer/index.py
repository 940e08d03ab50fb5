"""The indexes of the page: computed in a thread, while the page shows their progress."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pixmim.data.dataset import ImageDataset, ImageSpec
from pixmim.evaluation.frozen_encoder import FrozenEncoder, load_frozen_encoder
from pixmim.evaluation.neighbors import Index, index_file, load_index
from pixmim.models import features
from pixmim.utils.errors import UserError


@dataclass
class Progress:
    """Progress of the computation of an index; `error` is the reason if it failed."""

    done: int = 0
    total: int = 0
    error: str = ""


@dataclass
class EncoderIndex:
    """The encoder of a run and its index, which is read or computed in a thread: see `load_index`.

    Attributes:
        run: Folder of the run.
        untrained: Use the initial weights of the run.
        open_data: Opens the dataset in the format of the encoder.
        device: Device of the encoder.
    """

    run: Path
    untrained: bool
    open_data: Callable[[ImageSpec], ImageDataset]
    device: str = "auto"
    progress: Progress | None = None
    index: Index | None = None
    encoder: FrozenEncoder | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Start to compute the index in a thread, unless it is done or in progress."""
        with self._lock:
            if self.index is not None or (self.progress is not None and not self.progress.error):
                return
            self.progress = Progress()
        threading.Thread(target=self._run, name="pixmim-index", daemon=True).start()

    def embed(self, crop: Shaped[Tensor, "1 c h w"]) -> Float[Tensor, "1 d"]:
        """Return the features of one evaluation crop. Raises UserError before the index is complete."""
        if self.encoder is None:
            raise UserError("the index is not complete yet")
        with torch.no_grad(), self.encoder.evaluating():
            return features(self.encoder.module, self.encoder.preprocess(crop)).mean.float().cpu()

    def _run(self) -> None:
        assert self.progress is not None
        try:
            self.compute()
        except Exception as error:  # of any kind: the page waits for the end
            self.progress.error = str(error) or type(error).__name__

    def compute(self) -> Index:
        """Read or compute the index. Raises UserError if the encoder or the data cannot be opened."""
        progress = self.progress = self.progress or Progress()

        def advance(done: int, total: int) -> None:
            progress.done, progress.total = done, total

        encoder = load_frozen_encoder(str(self.run), device=self.device, untrained=self.untrained)
        index = load_index(index_file(self.run, self.untrained), encoder, self.open_data(encoder.image_spec), advance)
        self.encoder, self.index = encoder, index
        return index
