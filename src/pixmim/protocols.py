"""How a backbone is measured: the settings of each evaluation, as frozen data, and what of its values is shown.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once. The text under each field is its help. The code
of each evaluation stands under its name in `evaluate/`.
"""

from dataclasses import dataclass, field
from typing import Any

DATA = ("train", "test", "data")
"""Names of settings that hold data, as --data takes them."""


@dataclass(frozen=True)
class Knn:
    """k nearest neighbours vote, as in DINO: cosine similarity of frozen features, votes weighted exp(s / 0.07)."""

    train: str
    """Labelled data that vote: a folder with one subfolder for each class, or whatever else --data takes."""
    test: str
    """Labelled data to be measured on."""
    k: int = 20
    """Neighbours that vote."""


@dataclass(frozen=True)
class Linear:
    """A linear probe on frozen features: DINOv2's sweep, its setting chosen on a part held out from train."""

    train: str
    """Labelled data to learn from."""
    test: str
    """Labelled data to be measured on."""
    epochs: int = 100
    """Passes over the train data for each member of the sweep."""
    seed: int = 0
    """Decides the part held out, and the order."""


@dataclass(frozen=True)
class Protocol:
    """An evaluation: its settings, and what a reader is shown of its values.

    shown  labels of values by their keys; a key that ends with * stands for all that begin so, and in its label * is
           the rest. `KEY/low` and `KEY/high`, where given, are the ends of its 95 % interval.
    needs  what a user must have
    """

    settings: type[Any]
    needs: str
    shown: dict[str, str] = field(default_factory=dict)
    unit: str = "%"


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(
        Knn,
        "labelled images: --train, --test",
        {"top1/mean": "k-NN, mean of patch tokens", "top1/cls": "k-NN, class token"},
    ),
    "linear": Protocol(Linear, "labelled images: --train, --test", {"top1": "linear probe"}),
}
