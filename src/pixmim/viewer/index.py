"""The index of a dataset by an encoder: features of all images, and the image nearest to each."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors.torch import save
from torch import Tensor

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset
from pixmim.evaluation.embed import embed_batches
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint, load_frozen_encoder
from pixmim.evaluation.neighbors import most_similar_pairs, nearest, nearest_others
from pixmim.models import features
from pixmim.utils.errors import UserError
from pixmim.utils.files import write_text_atomically
from pixmim.utils.trust import inside
from pixmim.weights.safe_load import read

_BATCH = 64
_TENSORS = ("features", "indices", "similarity", "nearest")


@dataclass(frozen=True)
class Index:
    """Features of n readable images by one encoder, the mean of the patch tokens.

    Attributes:
        features: A row for each image.
        indices: Dataset index of each row.
        similarity: Cosine of each row with the nearest other row.
        nearest: That other row.
    """

    features: Float[Tensor, "n d"]
    indices: Int[Tensor, " n"]
    similarity: Float[Tensor, " n"]
    nearest: Int[Tensor, " n"]

    def query(self, vector: Float[Tensor, "1 d"], count: int, without: int | None = None) -> list[tuple[int, float]]:
        """Return dataset index and cosine of the images nearest to a vector, except the image `without`."""
        cosines, rows = nearest(self.features, vector, count + 1)
        found = zip(self.indices[rows[0]].tolist(), cosines[0].tolist(), strict=True)
        return [(index, cosine) for index, cosine in found if index != without][:count]

    def duplicates(self, count: int) -> list[tuple[int, int, float]]:
        """Return the most similar pairs of images, as dataset indices and cosine."""
        pairs = most_similar_pairs(self.similarity, self.nearest, count)
        return [(int(self.indices[i]), int(self.indices[j]), cosine) for i, j, cosine in pairs]

    def outliers(self, count: int) -> list[tuple[int, float]]:
        """Return the images whose nearest other image is least similar, as dataset index and cosine."""
        rows = self.similarity.argsort(stable=True)[:count]
        return list(zip(self.indices[rows].tolist(), self.similarity[rows].tolist(), strict=True))


@dataclass
class Progress:
    """Progress of the computation of an index; `error` is the reason if it failed."""

    done: int = 0
    total: int = 0
    error: str = ""


@dataclass
class EncoderIndex:
    """An encoder and its index, which is computed in a thread, kept in a file, and renewed if the encoder changes.

    Attributes:
        model: Name of the encoder, as `load_frozen_encoder` takes it.
        untrained: Use the initial weights of the run.
        file: Where the index is kept.
        open_data: Opens the dataset in the format of the encoder.
        device: Device of the encoder.
    """

    model: str
    untrained: bool
    file: Path
    open_data: Callable[[Any], ImageDataset]
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
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            self.progress.error = str(error)

    def compute(self) -> Index:
        """Read the index from its file, or compute and save it.

        Raises:
            UserError: If the encoder or the data cannot be opened, or fewer than two images can be read.
        """
        progress = self.progress = self.progress or Progress()
        encoder = load_frozen_encoder(self.model, device=self.device, untrained=self.untrained)
        data = self.open_data(encoder.image_spec)
        identity = {"model": fingerprint(encoder), "data": data.fingerprint(), "images": str(len(data))}
        index = self._read(identity, len(data))
        if index is None:
            progress.total = 2 * len(data)
            vectors, indices = list[np.ndarray[Any, Any]](), list[np.ndarray[Any, Any]]()
            for rows, batch, end in embed_batches(encoder, data, BadImageLog(None, len(data), 1.0), _BATCH):
                vectors += [rows["mean"]] * bool(len(batch))
                indices.append(batch)
                progress.done = end
            if sum(map(len, vectors)) < 2:
                raise UserError(f"fewer than two images of {data.spec} can be read")
            rows_of = torch.from_numpy(np.concatenate(vectors))
            similarity, other = nearest_others(rows_of, lambda done: setattr(progress, "done", len(data) + done))
            index = Index(rows_of, torch.from_numpy(np.concatenate(indices)), similarity, other)
            self._save(index, identity)
        self.encoder, self.index = encoder, index
        return index

    def _read(self, identity: dict[str, str], images: int) -> Index | None:
        """Return the saved index, or None without one of this encoder and these images."""
        if not self.file.exists():
            return None
        try:
            saved = read(self.file)
        except UserError:  # damaged: compute it again
            return None
        tensors = saved.tensors
        if {name: saved.metadata.get(name) for name in identity} != identity or set(tensors) != set(_TENSORS):
            return None
        rows, indices, similarity, other = (tensors[name] for name in _TENSORS)
        n = len(rows)
        fits = rows.ndim == 2 and all(t.shape == (n,) for t in (indices, similarity, other))
        if not fits or indices.dtype != torch.int64 or other.dtype != torch.int64:
            return None
        if (
            n < 2
            or int(indices.min()) < 0
            or int(indices.max()) >= images
            or int(other.min()) < 0
            or int(other.max()) >= n
        ):
            return None
        return Index(rows.clone(), indices.clone(), similarity.clone(), other.clone())

    def _save(self, index: Index, identity: dict[str, str]) -> None:
        tensors = {name: getattr(index, name).contiguous() for name in _TENSORS}
        try:
            inside(self.file.parent, self.file.name)
            write_text_atomically(self.file, save(tensors, metadata=identity))
        except OSError:  # a folder that cannot be written: the index lives as long as the page
            pass
