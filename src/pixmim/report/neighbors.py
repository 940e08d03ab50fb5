"""Sheets of the images nearest to a few random ones, and of the pairs most alike, by the encoder of a run."""

import base64
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from pixmim.config import ModelConfig
from pixmim.data.dataset import BadImage, ImageDataset
from pixmim.evaluation.embed import file_columns, thumbnail
from pixmim.evaluation.frozen_encoder import load_frozen_encoder
from pixmim.evaluation.neighbors import index_file, load_index
from pixmim.utils import rng
from pixmim.utils.console import label

_QUERIES, _NEIGHBORS, _PAIRS = 20, 6, 20
_SIDE = 120  # pixels of a thumbnail


@dataclass(frozen=True)
class Thumbnail:
    """An image of a sheet: a data URL (empty if it cannot be read any more), and what to write below it."""

    url: str
    caption: str


@dataclass(frozen=True)
class NeighborSheet:
    """The neighbors of some images, by one encoder."""

    rows: list[list[Thumbnail]]  # random images, each followed by those most similar to it
    pairs: list[tuple[Thumbnail, Thumbnail]]  # the pairs most alike, the most similar first
    images: int  # that can be read
    typical: float  # median cosine of a random image and any other


def draw_neighbors(
    run: Path, config: ModelConfig, data: ImageDataset, seed: int = 0, console: Console | None = None
) -> NeighborSheet:
    """Draw 20 random images with the 6 nearest to each, and the 20 pairs most alike, by the encoder of a run.

    The features of all images are read from the run's folder, or computed and kept there: see `load_index`. Raises
    UserError if the run has no encoder yet, or fewer than two images can be read.
    """
    index = load_index(index_file(run), load_frozen_encoder(str(run.absolute())), data, console=console)

    def draw(number: int, cosine: float | None = None) -> Thumbnail:
        columns = file_columns(data, [number])
        texts = [label(columns["file"][0].rpartition("/")[2], 24), *columns.get("class", [])]
        texts += [] if cosine is None else [f"cosine {cosine:.6f}"]
        try:
            jpeg = thumbnail(data.image(number), config, _SIDE)
        except BadImage:
            return Thumbnail("", ", ".join(filter(None, texts)))
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        return Thumbnail(url, ", ".join(filter(None, texts)))

    count = len(index.indices)
    chosen = rng.shuffled(seed, "neighbors", 0, count, list(range(min(_QUERIES, count)))).tolist()
    queries = [(int(index.indices[row]), index.unit[row : row + 1]) for row in chosen]
    rows = [
        [draw(number), *[draw(*found) for found in index.query(vector, _NEIGHBORS, without=number)]]
        for number, vector in queries
    ]
    pairs = [(draw(i), draw(j, cosine)) for i, j, cosine in index.duplicates(_PAIRS)]
    cosines = index.unit[chosen] @ index.unit.T
    cosines[range(len(chosen)), chosen] = torch.nan  # with itself
    return NeighborSheet(rows, pairs, count, float(cosines.nanmedian()))
