"""What the commands share: flags of a model, full paths of data, and flags that are checked."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

from tyro.conf import Suppress

from pixmim.utils.validation import Integer, Real, Settings, Sides, Text, check_value

T = TypeVar("T")


def checked(command: Callable[..., T]) -> Callable[..., T]:
    """Let a command check its flags by the rules that annotate them, before anything else. It raises UserError."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> T:
        hints = get_type_hints(command, include_extras=True)
        for name, value in inspect.signature(command).bind(*args, **kwargs).arguments.items():
            check_value("--" + name.replace("_", "-"), value, hints[name])
        return command(*args, **kwargs)

    return run


@dataclass(frozen=True)
class ModelFlags(Settings):
    """What a file of weights does not say of its model."""

    size: Annotated[str, Sides(empty=True)] = ""
    """Of MODEL, where its file does not say it: side in pixels, or HEIGHTxWIDTH, that its weights were made for."""
    heads: Annotated[int | None, Integer(1, 1_024)] = None
    """Attention heads of MODEL, likewise."""
    decoder_heads: Annotated[int | None, Integer(1, 1_024)] = None
    """Attention heads of its decoder, likewise."""
    mean: Annotated[tuple[float, ...] | None, Real(-1e9, 1e9)] = None
    """Mean of each channel that MODEL expects, where 255 counts as one: instead of its file's own, or ImageNet's."""
    std: Annotated[tuple[float, ...] | None, Real(0, 1e9, above=True)] = None
    """Standard deviation of each channel, likewise."""
    prefix: Annotated[str, Text("[^\\x00-\\x1f]{0,256}", "the beginning of names")] = ""
    """What the names of MODEL's tensors begin with in a file of several: teacher.backbone, student, model.encoder."""
    ema: bool = False
    """Of a training file, take the average of the weights instead of the weights."""

    @property
    def hints(self) -> dict[str, Any]:
        """What was said, as `weights.load.resolve_model` takes it."""
        values = asdict(self)
        return {**values, "num_heads": values.pop("heads")}


@dataclass(frozen=True)
class ModelFlagsWithoutSize(ModelFlags):
    """The same where --size is another thing: the size that a model is trained further at."""

    size: Suppress[str] = ""


def absolute(data: str) -> str:
    """Whole paths instead of relative ones, so that a run finds its data from wherever it is resumed or reported on."""
    from pixmim.data.uri import absolute as whole

    return whole(data)
