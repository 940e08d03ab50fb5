"""One project's way to write a model: how it is recognised, and its table of names."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from pixmim.utils.errors import UserError
from pixmim.weights.key_map import Names
from pixmim.weights.tensor_ops import Tensors

Kind = Literal["vit", "beit", "swin", "convmae"]


@dataclass(frozen=True)
class Source:
    """One project's way to write a model.

    name     of the project, as a report calls it
    kind     architecture of its encoder
    marks    keys that all stand in such a file; a source is the first whose marks do
    names    its names and pixmim's: `encoder.` and timm's names for the encoder, `decoder.` (MAE, ConvMAE) or `head.`
             and `mask_token` (SimMIM) for the rest, as in the `state_dict` of pixmim's own models
    unused   patterns of keys that no model needs, and why
    arrange  what a change of names does not do, on tensors with pixmim's names
    """

    name: str
    kind: Kind
    marks: tuple[str, ...]
    names: Names
    unused: tuple[tuple[str, str], ...] = ()
    arrange: tuple[Callable[[Tensors], Tensors], ...] = ()

    def translate(self, tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
        """Tensors with pixmim's names, and the keys left out, each with the reason.

        Raises UserError naming the keys that the table does not know.
        """
        found: Tensors = {}
        left: dict[str, str] = {}
        odd = []
        for key, value in tensors.items():
            why = next((why for pattern, why in self.unused if fnmatchcase(key, pattern)), None)
            name = self.names.ours(key)
            if why is not None:
                left[key] = why
            elif name is None:
                odd.append(key)
            else:
                found[name] = value
        if odd:
            raise UserError(f"{len(odd)} keys are none of such a file's: {', '.join(odd[:6])}")
        for step in self.arrange:
            found = step(found)
        return found, left


def rows(theirs: str, ours: str, table: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """A table of a block's parts as rows for every block under two names."""
    return [(f"{theirs}.{a}", f"{ours}.{b}") for a, b in table]


COMPUTED = (
    ("*relative_position_index", "computed anew"),
    ("*attn_mask", "computed anew"),
)
"""Buffers that older code wrote into its files."""
