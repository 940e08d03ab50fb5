"""Settings of what measures an encoder as it is."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pixmim.utils.validation import Data, LearningRate, Seed, Settings, Threads, Whole


@dataclass(frozen=True)
class Knn(Settings):
    """k nearest neighbours vote, as in DINO: cosine similarity of frozen features, votes weighted exp(s / 0.07)."""

    train: Data
    """Labelled data that vote: a folder with one subfolder for each class, or whatever else --data takes."""
    test: Data
    """Labelled data to be measured on."""
    k: Annotated[tuple[int, ...], Whole(1, 999_999_999)] = (1, 20)
    """Neighbours that vote; each number is a measure of its own."""


@dataclass(frozen=True)
class Linear(Settings):
    """A linear probe on the frozen encoder: DINOv2's sweep, its best chosen on a part held out; or MAE's protocol."""

    train: Data
    """Labelled data to learn from."""
    test: Data
    """Labelled data to be measured on."""
    protocol: Literal["sweep", "mae"] = "sweep"
    """sweep: many rates on features computed once. mae: LARS and BatchNorm on augmented images, as published."""
    epochs: Annotated[int | None, Whole(1, 1_000_000)] = None
    """Passes over the train data, for each member of the sweep 100; mae: 90."""
    seed: Seed = 0
    """Decides the part held out, the order, and the crops."""
    batch_size: Annotated[int, Whole(2, 999_999_999)] = 16384
    """mae: images in an update, cut to what the data have."""
    base_lr: LearningRate = 0.1
    """mae: learning rate per 256 images of a batch."""
    feature: Literal["auto", "cls", "mean"] = "auto"
    """mae: class token after the final norm, or mean of the patch tokens; auto: the token where there is one."""
    threads: Threads = 0
    """mae: threads that read and decode images; 0: one for each core, at most 16."""
