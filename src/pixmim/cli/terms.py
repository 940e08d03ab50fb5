"""What the commands share: whole paths of data, and flags that are checked."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TypeVar, get_type_hints

from pixmim.options import check_value

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


def absolute(data: str) -> str:
    """Whole paths instead of relative ones, so that a run finds its data from wherever it is resumed or reported on."""
    from pixmim.data.spec import absolute as whole

    return whole(data)
