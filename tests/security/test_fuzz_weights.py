"""Fuzz configurations and checkpoint files: any content gives a result or a UserError."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from helpers import official
from pixmim import load_encoder
from pixmim.build import build_encoder
from pixmim.config import PretrainConfig
from pixmim.config_io import from_json, to_json
from pixmim.utils.errors import UserError
from pixmim.utils.validation import KEYWORDS
from pixmim.weights.load import resolve_model
from pixmim.weights.save import METADATA_KEY

FUZZ = settings(max_examples=30)

NUMBERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**63, 10**30, 1e308, -0.0, float("nan"), float("inf"), 0.5])
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["auto", "mae", "32", "simmim"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def paths(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested dicts and lists."""
    yield at
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*at, key))


@st.composite
def configurations(draw: st.DrawFn, config: PretrainConfig) -> Any:
    """Draw a run's configuration with a few values replaced, removed or added."""
    content = json.loads(to_json(config))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in paths(content) if path]))
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        change = draw(st.sampled_from(["replace", "remove", "option", "key"]))
        if change == "remove":
            del inner[path[-1]]
        elif change == "key" and isinstance(inner, dict):
            inner[draw(st.text(max_size=6))] = draw(VALUES)
        elif change == "option" and isinstance(content.get("model"), dict):
            options = content["model"].setdefault("options", {})
            if isinstance(options, dict):
                options[draw(st.sampled_from(sorted(KEYWORDS)))] = draw(VALUES)
        else:
            inner[path[-1]] = draw(VALUES)
        if not content:
            break
    return content


def check(call: Callable[[], object]) -> None:
    """Call a function, which may raise UserError only."""
    try:
        call()
    except UserError as error:
        assert str(error) and len(str(error)) < 3_000


@pytest.fixture
def config(tiny_run: Callable[..., PretrainConfig]) -> PretrainConfig:
    return tiny_run()


@FUZZ
@given(data=st.data())
def test_configurations(data: st.DataObject, config: PretrainConfig) -> None:
    """Write and read back each configuration that is read."""
    text = json.dumps(data.draw(configurations(config)))
    try:
        result = from_json(text, "config.json")
    except UserError as error:
        assert str(error).startswith("config.json") and len(str(error)) < 3_000
    else:
        assert from_json(to_json(result)) == result


@FUZZ
@given(text=st.one_of(st.text(max_size=60), st.text('{}[]":,0123456789eE.-truefalsn\\u ', max_size=60)))
def test_any_text(text: str) -> None:
    check(lambda: from_json(text))


@FUZZ
@given(data=st.data())
def test_metadata_of_an_encoder(data: st.DataObject, config: PretrainConfig, tmp_path: Path) -> None:
    tensors = dict(build_encoder(config).state_dict())
    step = data.draw(st.sampled_from(["6", "", "x", "9" * 30]) | st.text(max_size=4))
    metadata = {METADATA_KEY: json.dumps(data.draw(configurations(config))), "step": step}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata))
    check(lambda: load_encoder(path))


@FUZZ
@given(data=st.data(), name=st.sampled_from(["own.safetensors", "mae.safetensors", "zip.pth", "plain.pth"]))
def test_bytes_of_a_weights_file(data: st.DataObject, name: str, config: PretrainConfig, tmp_path: Path) -> None:
    """Change a few bytes, most of them in the header, or truncate the file."""
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save({"model": official.mae()}, path, _use_new_zipfile_serialization=name == "zip.pth")
    else:
        own = name == "own.safetensors"
        tensors = dict(build_encoder(config).state_dict()) if own else official.mae()
        path.write_bytes(save(tensors, {METADATA_KEY: to_json(config)} if own else None))
    content = bytearray(path.read_bytes())
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(0, 8))):
        position = rng.choice([rng.randrange(len(content)), rng.randrange(3_000), -rng.randrange(1, 3_000)])
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: rng.randrange(len(content))] if data.draw(st.booleans()) else content)
    check(lambda: load_encoder(path, num_heads=4))


@FUZZ
@given(
    content=st.binary(max_size=200), name=st.sampled_from(["x.safetensors", "x.pth", "model.safetensors.index.json"])
)
def test_any_bytes(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    check(lambda: resolve_model(str(tmp_path / name)))


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["mae", "convmae", "simmim_swin", "simmim_vit"]))
def test_shapes_and_names_of_a_supported_project(data: st.DataObject, kind: str, tmp_path: Path) -> None:
    """Reshape, rename, convert or remove tensors, and add a random config.json."""
    tensors = getattr(official, kind)()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        change = data.draw(st.sampled_from(["shape", "name", "remove", "kind"]))
        value = tensors.pop(name)
        if change == "shape":
            value = torch.zeros(data.draw(st.lists(st.integers(0, 9), max_size=4)))
        elif change == "kind":
            value = value.to(data.draw(st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.float16])))
        elif change == "name":
            parts = name.split(".")
            parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(st.sampled_from(["0", "7", "99999", "x", ""]))
            name = ".".join(parts)
        if change != "remove":
            tensors[name] = value
    torch.save({"model": tensors, "args": data.draw(VALUES)}, tmp_path / "x.pth")
    config = {
        "image_size": data.draw(VALUES),
        "num_attention_heads": data.draw(VALUES),
        "mask_ratio": data.draw(VALUES),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(lambda: load_encoder(tmp_path / "x.pth"))
