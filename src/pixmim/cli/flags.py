"""Flags that several commands share, and checks of flags."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from tyro.conf import Suppress, UseAppendAction, arg

from pixmim.utils.validation import Integer, Real, Settings, Sides, Text, check_value

T = TypeVar("T")


def checked(command: Callable[..., T]) -> Callable[..., T]:
    """Check the arguments of a command by the rules in its annotations, before it runs. Raises UserError."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> T:
        hints = get_type_hints(command, include_extras=True)
        for name, value in inspect.signature(command).bind(*args, **kwargs).arguments.items():
            check_value("--" + name.replace("_", "-"), value, hints[name])
        return command(*args, **kwargs)

    return run


def command(name: str, description: str | None = None) -> Callable[[Callable[..., int]], Callable[[list[str]], int]]:
    """Make a function the command `pixmim NAME`, whose flags and help are its parameters and docstring."""

    def decorate(function: Callable[..., int]) -> Callable[[list[str]], int]:
        run: Callable[..., int] = checked(function)
        return lambda args: tyro.cli(run, prog=f"pixmim {name}", description=description, args=args)

    return decorate


@dataclass(frozen=True)
class ModelFlags(Settings):
    """Properties of a model that a file of weights may lack."""

    size: Annotated[str, Sides(empty=True)] = ""
    """Image size of MODEL, if its file lacks it: side in pixels, or HEIGHTxWIDTH."""
    heads: Annotated[int | None, Integer(1, 1_024)] = None
    """Attention heads of MODEL, if its file lacks them."""
    decoder_heads: Annotated[int | None, Integer(1, 1_024)] = None
    """Attention heads of the decoder of MODEL, if its file lacks them."""
    mean: Annotated[tuple[float, ...] | None, Real(-1e9, 1e9)] = None
    """Mean of each channel that MODEL expects, where 255 counts as 1; otherwise its file's own, or ImageNet's."""
    std: Annotated[tuple[float, ...] | None, Real(0, 1e9, above=True)] = None
    """Standard deviation of each channel that MODEL expects; otherwise as the mean."""
    prefix: Annotated[str, Text("[^\\x00-\\x1f]{0,256}", "a prefix of names")] = ""
    """Prefix of the tensors of MODEL, in a file of several: teacher.backbone, student, model.encoder."""
    ema: bool = False
    """Take the averaged weights of a training checkpoint."""

    @property
    def hints(self) -> dict[str, Any]:
        """Options of `weights.load.resolve_model`."""
        values = asdict(self)
        return {**values, "num_heads": values.pop("heads")}


@dataclass(frozen=True)
class ModelFlagsWithoutSize(ModelFlags):
    """The same without --size, for commands in which it is the size to train at."""

    size: Suppress[str] = ""


_Patterns = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PATTERN")]


@dataclass(frozen=True)
class ChoiceFlags(Settings):
    """Flags that choose images of the data by the names of their files."""

    include: _Patterns = ()
    """Use only images whose file name matches this pattern, such as '*.jpg'; may be repeated. A pattern with a slash is
    compared with the path below the folder."""
    exclude: _Patterns = ()
    """Leave out images that match this pattern, such as '*_mask.png'; may be repeated."""

    def choose(self, data: str) -> str:
        """Return --data with the patterns, unless it is empty. Raises UserError if it cannot have any."""
        from pixmim.data.uri import with_patterns

        return with_patterns(data, self.include, self.exclude) if data else data


def absolute(data: str) -> str:
    """Return --data with absolute paths, so that a run finds its data from any working directory."""
    from pixmim.data.uri import absolute

    return absolute(data)
