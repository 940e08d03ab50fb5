"""A checkpoint format: how one project writes a model, and its table of names."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from pixmim.utils.errors import UserError
from pixmim.weights.key_map import KeyMap
from pixmim.weights.tensor_ops import Tensors

Kind = Literal["vit", "beit", "swin", "convmae"]


@dataclass(frozen=True)
class CheckpointFormat:
    """One project's way to write a model.

    Attributes:
        name: The project, as messages call it.
        kind: Architecture of the encoder.
        marks: Keys that all occur in such a file; the first format whose marks do is taken.
        names: Its names and pixmim's, which are those of the `state_dict` of pixmim's models: `encoder.` and timm's
            names for the encoder, `decoder.` (MAE, ConvMAE) or `head.` and `mask_token` (SimMIM) for the rest.
        unused: Patterns of keys that no model needs, and why.
        arrange: What renaming does not do, applied in order to tensors with pixmim's names.
        restore: The inverse, applied in order before tensors get the project's names.
    """

    name: str
    kind: Kind
    marks: tuple[str, ...]
    names: KeyMap
    unused: tuple[tuple[str, str], ...] = ()
    arrange: tuple[Callable[[Tensors], Tensors], ...] = ()
    restore: tuple[Callable[[Tensors], Tensors], ...] = ()

    def translate(self, tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
        """Convert tensors to pixmim's names.

        Returns:
            The tensors, and the keys left out, each with the reason.

        Raises:
            UserError: If the table does not know a key.
        """
        result: Tensors = {}
        unused: dict[str, str] = {}
        unknown = []
        for key, value in tensors.items():
            reason = next((why for pattern, why in self.unused if fnmatchcase(key, pattern)), None)
            name = self.names.ours(key)
            if reason is not None:
                unused[key] = reason
            elif name is None:
                unknown.append(key)
            else:
                result[name] = value
        if unknown:
            raise UserError(f"{len(unknown)} keys do not belong to such a file: {', '.join(unknown[:6])}")
        for step in self.arrange:
            result = step(result)
        return result, unused

    def translate_back(self, tensors: Tensors) -> Tensors:
        """Convert tensors with pixmim's names to the project's. Raises UserError if the table does not know a key."""
        for step in self.restore:
            tensors = step(tensors)
        result: Tensors = {}
        for key, value in tensors.items():
            name = self.names.theirs(key)
            if name is None:
                raise UserError(f"{self.name} has no place for {key}")
            result[name] = value.detach().clone().contiguous()
        return result


def rows(theirs: str, ours: str, table: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """Prepend the names of a block to each row of a table of its parts."""
    return [(f"{theirs}.{a}", f"{ours}.{b}") for a, b in table]


COMPUTED = (
    ("*relative_position_index", "computed when the model is built"),
    ("*attn_mask", "computed when the model is built"),
)
"""Buffers that older code wrote into its files."""
