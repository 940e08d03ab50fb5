"""Every field of every settings class refuses invalid values, naming its flag."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import pytest

from pixmim import cli
from pixmim.cli.pretrain import read_flags
from pixmim.cli.slurm import Job
from pixmim.config import CropConfig, MaskConfig, ModelConfig, PretrainConfig, TargetConfig
from pixmim.config_io import from_json
from pixmim.evaluation.evals import EVALS
from pixmim.evaluation.settings import EvaluateAllSettings
from pixmim.recipes import RECIPES, get_recipe
from pixmim.utils.errors import UserError
from pixmim.utils.validation import Rule, hints_of

SETTINGS = {"pretrain": PretrainConfig, "slurm": Job, "all": EvaluateAllSettings} | {
    name: entry.settings for name, entry in EVALS.items()
}

NUMBERS = [math.nan, math.inf, -math.inf, -1e30, 1e30, -(10**40), 10**40]
ABSURD: dict[Any, list[Any]] = {
    int: [*NUMBERS, 0.5, True, "3", b"3", [], {}],
    float: [*NUMBERS, True, "0.5", [], 1j],
    bool: [0, 1, "true", None, math.nan],
    str: [0, None, math.nan, b"x", [], "a\0b"],
    tuple: [1, 0.5, "1", None, [1], (None,), ({},)],
}


def walk(cls: type[Any], prefix: str = "--") -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield the path of names, the flag, and the type with its rules of each field."""
    for name, hint in hints_of(cls).items():
        inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        inner = inner if isinstance(inner, type) else get_origin(inner) or inner  # of a generic class
        flag = prefix + name.replace("_", "-")
        if is_dataclass(inner):
            flat = any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))
            for path, nested, kind in walk(inner, prefix=prefix if flat else f"{flag}."):  # type: ignore[arg-type]
                yield (name, *path), nested, kind
        else:
            yield (name,), flag, hint


def absurd(hint: Any) -> list[Any]:
    """Return invalid values for any field of this type."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(plain) is Literal:
        return ["nonsense", "", 3, None, math.nan, ["mae"]]
    unset = {type(None), *(one for one in get_args(plain) if isinstance(one, TypeVar))}
    kinds = [one for one in get_args(plain) if one not in unset] if get_args(plain) else [plain]
    if get_origin(plain) is tuple:
        inside = absurd(get_args(plain)[0])
        pair = len(get_args(plain)) == 2 and get_args(plain)[1] is not Ellipsis
        values = ABSURD[tuple] + [(one,) * 2 for one in inside] + ([(0.5,), (0.1,) * 3] if pair else [])
        return values if get_args(plain)[0] is str else [*values, ("a",)]
    if get_origin(plain) is dict:
        return [{"weights": "x"}, {"depth": 10**9}, {"depth": math.nan}, {"drop_rate": "1"}]
    first = kinds[0]
    values = absurd(first) if get_args(first) else ABSURD[first]
    optional = bool(unset & set(get_args(plain)))
    return [value for value in values if not (optional and value is None)] + ([] if optional else [None])


def changed(settings: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return settings with another value, bypassing the type checker of tests in `__init__`."""
    name, *more = path
    result = copy.copy(settings)
    object.__setattr__(result, name, changed(getattr(settings, name), tuple(more), value) if more else value)
    return result


def default(cls: type[Any]) -> Any:
    required = {one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING}
    return cls(**dict.fromkeys(required | ({"train", "test"} & {one.name for one in fields(cls)}), "x"))


@pytest.mark.parametrize("command", SETTINGS)
def test_absurd_values_are_refused_by_their_flags(command: str) -> None:
    settings, count = default(SETTINGS[command]), 0
    for path, flag, hint in walk(SETTINGS[command]):
        for value in absurd(hint):
            with pytest.raises(UserError) as raised:
                changed(settings, path, value).__post_init__()
            text = str(raised.value)
            assert flag in text or path[-1] in ("options", "backbone"), f"{flag} {value!r}: {text}"
            assert "\n" not in text and len(text) < 400
            count += 1
    assert count > 20


def test_a_part_of_another_type_is_refused() -> None:
    for wrong in (None, "center", CropConfig, MaskConfig(), {"flip": 0}):
        with pytest.raises(UserError, match="--crop must be of type CropConfig, not"):
            changed(PretrainConfig(), ("crop",), wrong).__post_init__()
    with pytest.raises(UserError, match="--mask must be of type MaskConfig or nothing, not"):
        changed(ModelConfig(), ("mask",), TargetConfig()).__post_init__()


def test_every_number_has_a_rule() -> None:
    for cls in SETTINGS.values():
        for _, flag, hint in walk(cls):
            numbers = {int, float} & {hint, *get_args(hint), *(x for one in get_args(hint) for x in get_args(one))}
            ruled = any(isinstance(mark, Rule) for mark in getattr(hint, "__metadata__", ()))
            assert ruled or not numbers, f"{cls.__name__}: {flag} {hint}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_the_rules(name: str) -> None:
    assert get_recipe(name).recipe == name


@pytest.mark.parametrize(
    "word",
    [
        "--epochs=nan",
        "--steps=0",
        "--batch-size=99999999999999999999",
        "--seed=-1",
        "--channels=0",
        "--device=gpu",
        "--optim.lr=1e400",
        "--mask.ratio=1",
        "--target.radius=-1",
        "--model.decoder-dim=0",
        "--checkpoint.keep-last=0",
    ],
)
def test_absurd_values_on_the_command_line(word: str) -> None:
    with pytest.raises(UserError, match=f"^{word.split('=')[0]} must be .*, not "):
        read_flags(["demo", word])


def test_a_word_that_is_not_a_number_is_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_flags(["demo", "--batch-size=1e3"])
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["pretrain", "demo", "--mean", "123.675", "116.28", "103.53"],
        ["pretrain", "demo", "--size", "224x"],
        ["evaluate", "knn", "run", "--train", "", "--test", "x"],
        ["evaluate", "finetune", "run", "--train", "a", "--test", "b", "--drop-path", "1"],
        ["evaluate", "robustness", "run", "--severities", "6"],
        ["evaluate", "knn", "run", "--train", "a", "--test", "b", "--device", "gpu"],
        ["cache", "a", "b", "--quality", "101"],
        ["cache", "a", "b", "--threads", "-1"],
        ["stats", "a", "--images", "-5"],
        ["bench-data", "a", "--seconds", "nan"],
        ["coverage", "a", "--mask-ratio", "1"],
        ["reconstruct", "run", "a.png", "--count", "0"],
        ["embed", "run", "--data", "a", "--out", "b.npy", "--batch-size", "0"],
        ["slurm", "demo", "--data", "shapes:", "--hours", "inf"],
    ],
)
def test_commands_name_the_flag(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 1
    text = " ".join(capsys.readouterr().err.split())
    flag = next((word for word in args if text.startswith(f"error: {word} ")), "")
    assert flag.startswith("--") and "must be" in text


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-1e999", "1" * 400, "null", "[]", "{}", "true", '""', '"\\ud800"', "[[1]]", "0.5"]
)
def test_a_file_with_absurd_values_is_refused_by_its_keys(text: str) -> None:
    for path, _, hint in walk(PretrainConfig):
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if plain is int or (plain is float and text not in ("0.5",)):
            nested = text
            for name in reversed(path):
                nested = json.dumps({name: "HERE"}).replace('"HERE"', nested)
            with pytest.raises(UserError) as raised:
                from_json('{"type": "pixmim.PretrainConfig", "version": 1, ' + nested[1:], "config.json")
            named = (".".join(path), "--" + ".".join(path).replace("_", "-"), "config.json")
            assert any(name in str(raised.value) for name in named)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, "for values of 0 to 255: --mean 0.485 0.456 0.406"),
        ({"std": (58.4, 57.1, 57.4)}, "for values of 0 to 255: --std 0.229 0.2239 0.2251"),
        ({"dtype": "uint16", "channels": 1, "mean": (30_000.0,)}, "for values of 0 to 65535: --mean 0.4578"),
        ({"mean": (-1.0, 0.0, 0.0)}, "--mean -1 0 0 must be from 0 to 1, as pixels are (--dtype uint8)"),
        ({"std": (0.2, 0.2, 0.0)}, "--std must be a number from 1e-12"),
        ({"mean": (0.5,)}, "--mean has 1 values for 3 channels"),
    ],
)
def test_statistics_are_in_units_of_the_largest_pixel_value(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        PretrainConfig(**given)
    assert expected in str(raised.value)


def test_float_images_have_any_mean() -> None:
    assert PretrainConfig(dtype="float32", channels=1, mean=(-40.0,), std=(273.0,)).normalization == (
        (-40.0,),
        (273.0,),
    )
