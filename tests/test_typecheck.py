"""Annotations of pixmim are checked at each call, with and without shapes."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from helpers.typecheck import jaxtyped
from pixmim import low_pass
from pixmim.data.dataset import ImageSpec
from pixmim.evaluation.context import FeatureSet
from pixmim.utils.patches import grid_of


def test_shapes_are_compared() -> None:
    with pytest.raises(TypeCheckError):
        low_pass(torch.rand(3, 8, 8), 2)
    features = FeatureSet(torch.rand(4, 1, 8), torch.rand(4, 8), torch.zeros(4, dtype=torch.int64), ["a"])
    with pytest.raises(TypeCheckError):
        replace(features, labels=torch.zeros(5, dtype=torch.int64))


def test_other_types_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        grid_of((8, 8), "4")  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        ImageSpec(channels=1.5)  # type: ignore[arg-type]


def test_results_are_checked_and_defaults_are_kept() -> None:
    def plain(x: float, /, *more: int, by: int = 2, **names: str) -> int:
        return x * by  # type: ignore[return-value]

    double = jaxtyped(plain, typechecker=None)
    assert double(3) == 6 and double(3, 1, by=3, name="a") == 9
    with pytest.raises(TypeCheckError):
        double(1.5)
    for args, names in (((1, "a"), {}), ((1,), {"by": "a"}), ((1,), {"name": 1})):
        with pytest.raises(TypeCheckError):
            double(*args, **names)


def test_functions_of_one_def_with_other_annotations_have_other_checks() -> None:
    def make(kind: type) -> Callable[[object], object]:
        def inner(x: kind) -> object:  # type: ignore[valid-type]
            return x

        checked: Callable[[object], object] = jaxtyped(inner, typechecker=None)
        return checked

    assert make(int)(1) == 1 and make(str)("a") == "a"
    with pytest.raises(TypeCheckError):
        make(int)("a")


def test_a_generator_yields() -> None:
    def plain(n: int) -> Iterator[int]:
        yield from range(n)

    count = jaxtyped(plain, typechecker=None)
    assert list(count(3)) == [0, 1, 2]
    with pytest.raises(TypeCheckError):
        count(np.float32(2))
