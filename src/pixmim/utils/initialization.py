"""Build modules with seeded weights, without initial weights, or without memory for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pixmim.utils.errors import UserError, first_line
from pixmim.utils.memory import free_memory, in_gib

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within a `with` statement, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class WithoutInitialization(TorchFunctionMode):
    """Skip random initialization within a `with` statement, for modules whose weights are loaded afterwards.

    It takes most of the time of building a model, above all on the meta device, where each step of it is Python. The
    first parameter of a distribution, its mean or lower end, takes the place of random values: torch repeats draws of a
    truncated normal until all are within its bounds, which those of unused memory may never be.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _RANDOM or name in _SCALING:
            tensor, *values = [*args, *kwargs.values()]
            constant = all(isinstance(value, int | float | None) for value in values)
            if name in _RANDOM and not tensor.is_meta:
                with torch.no_grad():
                    return tensor.fill_(next((value for value in values if isinstance(value, int | float)), 0))
            if name in _RANDOM or (constant and isinstance(tensor, Tensor) and tensor.is_meta):
                return tensor
        return func(*args, **kwargs)


_RANDOM, _SCALING = {"uniform_", "normal_", "erfinv_"}, {"mul_", "add_", "clamp_", "zero_", "fill_"}


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


def check_memory(build: Callable[[], nn.Module], name: str) -> None:
    """Raise UserError if the weights of a module do not fit in free memory. Allocates none."""
    if torch.empty(0).device.type == "meta":  # the caller allocates none either
        return
    module = build_on_meta(build, name)
    size = sum(value.nbytes for value in [*module.parameters(), *module.buffers()])
    free = free_memory()
    if free is not None and size > free:
        raise UserError(f"{name} needs {in_gib(size)} GiB for its weights, but only {in_gib(free)} GiB are free")
