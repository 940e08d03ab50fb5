"""The suite's run-time type checker: beartype, which accepts an int for a float as PEP 484 does.

jaxtyping's import hook decorates every function with `jaxtyping.jaxtyped`. `jaxtyped` here takes its place: functions
whose annotations have shapes still get jaxtyping's checks. All others have no dimensions to compare, so beartype alone
checks them, in a tenth of the time. Checks are compiled at a function's first call, and once for all functions that the
same `def` makes.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf
from beartype import beartype as _beartype

check = _beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))

_jaxtyped = jaxtyping.jaxtyped
_checks: dict[CodeType, "_Checks"] = {}


class _Checks:
    """Checks of the functions of one `def`, compiled at the first call of one of them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.annotations = dict(function.__annotations__)
        self.compiled = self.has_shapes = False
        self.parameters: Callable[..., object] | None = None
        self.result: Callable[[object], object] | None = None

    def compile(self, function: Callable[..., Any]) -> None:
        hints = {name: _resolved(hint, function) for name, hint in self.annotations.items()}
        self.compiled, self.has_shapes = True, any(map(_has_shape, hints.values()))
        if self.has_shapes:
            return
        if "return" in hints:
            self.result = _checker("(result)", "return result", {"return": hints.pop("return")}, {})
        if hints:
            signature = inspect.signature(function)
            parameters = signature.parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            plain = [
                p.replace(annotation=p.empty, default=_Default(p.name) if p.name in defaults else p.empty)
                for p in parameters
            ]
            self.parameters = _checker(str(inspect.Signature(plain)), "pass", hints, defaults)


class _Default(str):
    """The name of a parameter, shown as an expression for its default value."""

    def __repr__(self) -> str:
        return f"_defaults[{str(self)!r}]"


def _checker(parameters: str, body: str, hints: dict[str, Any], defaults: dict[str, Any]) -> Callable[..., object]:
    """Return a function whose arguments and result are checked, and which does nothing else."""
    names: dict[str, Any] = {"_defaults": defaults}
    exec(f"def checker{parameters}: {body}", names)
    names["checker"].__annotations__ = hints
    checker: Callable[..., object] = check(names["checker"])
    return checker


def _resolved(hint: Any, function: Callable[..., Any]) -> Any:
    """Return the type that an annotation names; Any if its name is unknown at run time."""

    def one() -> None: ...

    one.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(one, function.__globals__, include_extras=True)["hint"]
    except Exception:
        return Any


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, list | tuple):
        return any(map(_has_shape, hint))
    return (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)) or _has_shape(get_args(hint))


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """Check the arguments and results of a function, or the fields of a dataclass, at each call."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if isinstance(function, type):
        if dataclasses.is_dataclass(function) and not hasattr(function.__init__, "__wrapped__"):
            function.__init__ = jaxtyped(function.__init__, typechecker=typechecker)
        return function
    if not inspect.isfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    checks = _checks.setdefault(function.__code__, _Checks(function))
    if checks.annotations != function.__annotations__:
        checks = _Checks(function)
    with_shapes: Callable[..., Any] | None = None

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal with_shapes
        if not checks.compiled:
            checks.compile(function)
        if checks.has_shapes:
            if with_shapes is None:
                with_shapes = _jaxtyped(function, typechecker=typechecker)
            return with_shapes(*args, **kwargs)
        if checks.parameters is not None:
            checks.parameters(*args, **kwargs)
        result = function(*args, **kwargs)
        if checks.result is not None:
            checks.result(result)
        return result

    return checked


jaxtyping.jaxtyped = jaxtyped
