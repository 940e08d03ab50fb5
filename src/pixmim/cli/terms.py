"""What the commands share: flags of a model, and full paths of data."""

from dataclasses import asdict, dataclass
from typing import Any

from tyro.conf import Suppress


@dataclass(frozen=True)
class Said:
    """What a file of weights does not say of its model."""

    size: str = ""
    """Of MODEL, where its file does not say it: side in pixels, or HEIGHTxWIDTH, that its weights were made for."""
    heads: int | None = None
    """Attention heads of MODEL, likewise."""
    decoder_heads: int | None = None
    """Attention heads of its decoder, likewise."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel that MODEL expects, where 255 counts as one: instead of its file's own, or ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""
    prefix: str = ""
    """What the names of MODEL's tensors begin with in a file of several: teacher.backbone, student, model.encoder."""
    ema: bool = False
    """Of a training file, take the average of the weights instead of the weights."""

    @property
    def known(self) -> dict[str, Any]:
        """What was said, as `pretrained.open_model` takes it."""
        values = asdict(self)
        return {**values, "num_heads": values.pop("heads")}


@dataclass(frozen=True)
class SaidButSize(Said):
    """The same where --size is another thing: the size that a model is trained further at."""

    size: Suppress[str] = ""


def absolute(data: str) -> str:
    """Whole paths instead of relative ones, so that a run finds its data from wherever it is resumed or reported on."""
    from pixmim.data.spec import absolute as whole

    return whole(data)
