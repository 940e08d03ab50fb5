"""Counting the memory of tensors, from each one's birth to its end."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """In a `with` statement: counts the bytes of the tensors that are made in it, gradients of a backward pass too.

    Each piece of memory counts once, however many tensors look at it, until the last of them is gone. What a kernel
    takes for itself is not seen, and compiled code runs as if it were not.

    known  tensors that are there already, and do not count when something is written into them
    """

    now = 0
    """Bytes that are taken."""
    peak = 0
    """The most that were."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._end, key, size)
        self.peak = max(self.peak, self.now)
        return made

    def _end(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size
