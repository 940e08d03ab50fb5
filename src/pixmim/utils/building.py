"""Build modules without their initial weights: on the meta device, or before weights are loaded."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pixmim.utils.errors import UserError, first_line

Module = TypeVar("Module", bound=nn.Module)

_RANDOM, _SCALING = {"uniform_", "normal_", "erfinv_"}, {"mul_", "add_", "clamp_", "zero_", "fill_"}


class WithoutInitialization(TorchFunctionMode):
    """Skip random initialization within a `with` statement, for modules whose weights are loaded afterwards.

    It takes most of the time of building a model, above all on the meta device, where each step of it is Python.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _RANDOM or name in _SCALING:
            tensor, *values = (*args, *kwargs.values())
            constant = all(isinstance(value, int | float | None) for value in values)
            if name in _RANDOM or (constant and isinstance(tensor, Tensor) and tensor.is_meta):
                return kwargs.get("tensor", tensor)
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], Module], name: str) -> Module:
    """Build a module on PyTorch's meta device, without memory for its weights.

    Raises:
        UserError: With the `name` of the model, if its sizes do not fit together.
    """
    with torch.device("meta"), WithoutInitialization():
        try:
            return build()
        except RuntimeError as error:
            raise UserError(f"{name} cannot be built: {first_line(error)}") from error
