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
class Job:
    """Work in a thread, for which the page waits.

    Attributes:
        state: "", "working", "ready", or why it failed.
    """

    state: str = field(default="", init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def error(self) -> str:
        """Reason for a failure, if it failed."""
        return "" if self.state in ("", "working", "ready") else self.state

    def start_work(self, work: Callable[[], object]) -> None:
        """Start the work, unless it is done or in progress; what failed is tried again."""
        with self._lock:
            if self.state in ("working", "ready"):
                return
            self.state = "working"
        threading.Thread(target=self.run_work, args=(work,), daemon=True).start()

    def run_work(self, work: Callable[[], object]) -> None:
        """Do the work in this thread."""
        try:
            work()
            self.state = "ready"
        except Exception as error:  # of any kind: the page would wait forever
            self.state = str(error) or type(error).__name__


@dataclass
class EncoderIndex(Job):
    """The encoder of a run and its index, which is read or computed in a thread: see `load_index`.

    Attributes:
        run: Folder of the run.
        untrained: Use the initial weights of the run.
        open_data: Opens the dataset in the format of the encoder.
        device: Device of the encoder.
        done: Progress of the computation, of `total`.
    """

    run: Path
    untrained: bool
    open_data: Callable[[ImageSpec], ImageDataset]
    device: str = "auto"
    done: int = 0
    total: int = 0
    index: Index | None = None
    encoder: FrozenEncoder | None = None

    def start(self) -> None:
        """Start to compute the index in a thread, unless it is done or in progress."""
        self.start_work(self.compute)

    def embed(self, crop: Shaped[Tensor, "1 c h w"]) -> Float[Tensor, "1 d"]:
        """Return the features of one evaluation crop. Raises UserError before the index is complete."""
        if self.encoder is None:
            raise UserError("the index is not complete yet")
        with torch.no_grad(), self.encoder.evaluating():
            return features(self.encoder.module, self.encoder.preprocess(crop)).mean.float().cpu()

    def compute(self) -> Index:
        """Read or compute the index. Raises UserError if the encoder or the data cannot be opened."""

        def advance(done: int, total: int) -> None:
            self.done, self.total = done, total

        encoder = load_frozen_encoder(str(self.run), device=self.device, untrained=self.untrained)
        index = load_index(index_file(self.run, self.untrained), encoder, self.open_data(encoder.image_spec), advance)
        self.encoder, self.index = encoder, index
        return index
