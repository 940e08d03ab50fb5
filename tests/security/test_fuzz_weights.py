"""Whatever the bytes: a configuration, and a file of weights, give a result or a UserError."""

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

FUZZ = settings(max_examples=100)

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
    """The way to every value of nested dicts and lists."""
    yield at
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths(value, (*at, key))


@st.composite
def configurations(draw: st.DrawFn, config: PretrainConfig) -> Any:
    """A run's configuration with a few values replaced, removed or added."""
    content = json.loads(to_json(config))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from([path for path in paths(content) if path]))
        inner = content
        for key in where[:-1]:
            inner = inner[key]
        how = draw(st.sampled_from(["replace", "remove", "option", "key"]))
        if how == "remove":
            del inner[where[-1]]
        elif how == "key" and isinstance(inner, dict):
            inner[draw(st.text(max_size=6))] = draw(VALUES)
        elif how == "option" and isinstance(content.get("model"), dict):
            options = content["model"].setdefault("options", {})
            if isinstance(options, dict):
                options[draw(st.sampled_from(sorted(KEYWORDS)))] = draw(VALUES)
        else:
            inner[where[-1]] = draw(VALUES)
        if not content:
            break
    return content


def opened(way: Callable[[], object]) -> None:
    try:
        way()
    except UserError as error:
        assert str(error) and len(str(error)) < 3_000


@pytest.fixture
def run(tiny_run: Callable[..., PretrainConfig]) -> PretrainConfig:
    return tiny_run()


@FUZZ
@given(data=st.data())
def test_a_configuration(data: st.DataObject, config: PretrainConfig) -> None:
    """What is read can be written, and is then the same."""
    text = json.dumps(data.draw(configurations(config)))
    try:
        found = from_json(text, "config.json")
    except UserError as error:
        assert str(error).startswith("config.json") and len(str(error)) < 3_000
    else:
        assert from_json(to_json(found)) == found


@FUZZ
@given(text=st.one_of(st.text(max_size=60), st.text('{}[]":,0123456789eE.-truefalsn\\u ', max_size=60)))
def test_any_text(text: str) -> None:
    opened(lambda: from_json(text))


@FUZZ
@given(data=st.data())
def test_the_metadata_of_a_product(data: st.DataObject, config: PretrainConfig, tmp_path: Path) -> None:
    """The whole way, from a file to an encoder."""
    tensors = dict(build_encoder(config).state_dict())
    step = data.draw(st.sampled_from(["6", "", "x", "9" * 30]) | st.text(max_size=4))
    metadata = {METADATA_KEY: json.dumps(data.draw(configurations(config))), "step": step}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata))
    opened(lambda: load_encoder(path))


@FUZZ
@given(data=st.data(), name=st.sampled_from(["own.safetensors", "mae.safetensors", "zip.pth", "plain.pth"]))
def test_bytes_of_a_file_of_weights(data: st.DataObject, name: str, config: PretrainConfig, tmp_path: Path) -> None:
    """A few bytes are changed, most of them in the header, or the end is missing."""
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save({"model": official.mae()}, path, _use_new_zipfile_serialization=name == "zip.pth")
    else:
        mine = name == "own.safetensors"
        tensors = dict(build_encoder(config).state_dict()) if mine else official.mae()
        path.write_bytes(save(tensors, {METADATA_KEY: to_json(config)} if mine else None))
    content = bytearray(path.read_bytes())
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(0, 8))):
        place = chance.choice([chance.randrange(len(content)), chance.randrange(3_000), -chance.randrange(1, 3_000)])
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: chance.randrange(len(content))] if data.draw(st.booleans()) else content)
    opened(lambda: load_encoder(path, num_heads=4))


@FUZZ
@given(
    content=st.binary(max_size=200), name=st.sampled_from(["x.safetensors", "x.pth", "model.safetensors.index.json"])
)
def test_any_bytes(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    opened(lambda: resolve_model(str(tmp_path / name)))


@FUZZ
@given(data=st.data(), kind=st.sampled_from(["mae", "convmae", "simmim_swin", "simmim_vit"]))
def test_shapes_and_names_of_a_known_project(data: st.DataObject, kind: str, tmp_path: Path) -> None:
    """Some tensors have another shape, some another name, some are missing; and a config.json says odd things."""
    tensors = getattr(official, kind)()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        how = data.draw(st.sampled_from(["shape", "name", "gone", "kind"]))
        value = tensors.pop(name)
        if how == "shape":
            value = torch.zeros(data.draw(st.lists(st.integers(0, 9), max_size=4)))
        elif how == "kind":
            value = value.to(data.draw(st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.float16])))
        elif how == "name":
            parts = name.split(".")
            parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(st.sampled_from(["0", "7", "99999", "x", ""]))
            name = ".".join(parts)
        if how != "gone":
            tensors[name] = value
    torch.save({"model": tensors, "args": data.draw(VALUES)}, tmp_path / "x.pth")
    said = {"image_size": data.draw(VALUES), "num_attention_heads": data.draw(VALUES), "mask_ratio": data.draw(VALUES)}
    (tmp_path / "config.json").write_text(json.dumps(said))
    opened(lambda: load_encoder(tmp_path / "x.pth"))
