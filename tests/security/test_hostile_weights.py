"""Weights and configurations that strangers made: sizes are all they may decide, and they can neither hang nor fill."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers import official
from helpers.cli import say
from pixmim import build as parts
from pixmim import create_model, load_encoder, load_model
from pixmim.build import build_encoder, build_mask_sampler, build_model
from pixmim.config import PretrainConfig
from pixmim.config_io import from_json, to_json
from pixmim.evaluation.frozen_encoder import frozen_encoder_from_weights
from pixmim.models import create_encoder
from pixmim.utils.errors import UserError, shown
from pixmim.weights import load as pretrained
from pixmim.weights import safe_load as reading
from pixmim.weights.detect import Weights, read_weights
from pixmim.weights.infer_config import ModelHints
from pixmim.weights.load import resolve_model
from pixmim.weights.save import METADATA_KEY, save_tensors

Make = Callable[..., PretrainConfig]
BOTH = {"num_heads": official.HEADS, "decoder_heads": official.DECODER_HEADS}


@pytest.fixture
def hostile(tiny_run: Make, tmp_path: Path) -> Callable[..., Path]:
    """A run's product, encoder.safetensors in a folder with config.json, whose Run says other things of the model."""
    run = tiny_run()
    tensors = dict(build_encoder(run).state_dict())

    def make(model: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **fields: Any) -> Path:
        content = json.loads(to_json(run)) | fields
        if model or options:
            content["model"] |= model or {}
            content["model"]["options"] |= options or {}
        folder = tmp_path / "elsewhere"
        (folder / "encoder").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(content))
        save_file(tensors, folder / "encoder/model.safetensors", {METADATA_KEY: json.dumps(content), "step": "6"})
        return folder

    return make


# ---- sizes, and nothing else

FOREIGN: dict[str, Any] = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"},
    "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    "cache_dir": "/tmp/here",
    "checkpoint_path": "/tmp/evil.pth",
    "features_only": True,
    "feature_cls": "hook",
    "pruned": True,
    "scriptable": True,
    "exportable": True,
    "no_jit": True,
    "norm_layer": "batchnorm2d",
    "act_layer": "relu",
    "block_fn": "Block",
    "embed_layer": "PatchEmbed",
    "mlp_layer": "Mlp",
    "weight_init": "reset",
    "device": "cuda",
    "dtype": "float64",
    "dynamic_img_size": True,
    "name": "timm",
    "backbone": "hf-hub:me/evil",
    "__class__": "x",
    "embed_dim.x": 1,
}


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that reaches timm's constructors."""

    def reached(*args: object, **options: object) -> None:
        raise AssertionError(f"timm.create_model was called with {options}")

    monkeypatch.setattr(timm, "create_model", reached)


@pytest.mark.parametrize("name", FOREIGN)
def test_an_option_that_is_no_size_reaches_timm_on_no_way(
    name: str, hostile: Callable[..., Path], no_timm: None
) -> None:
    folder, named = hostile(options={name: FOREIGN[name]}), f"no option '{name}'"
    ways: list[Callable[[], object]] = [
        lambda: load_encoder(folder / "encoder/model.safetensors"),
        lambda: load_encoder(folder),
        lambda: resolve_model(str(folder), with_decoder=True),
        lambda: from_json((folder / "config.json").read_text()),
    ]
    if name not in ("name", "backbone"):
        ways += [
            lambda: create_model("mae", **{name: FOREIGN[name]}),
            lambda: create_encoder("timm", "vit_tiny_patch16_224", **{name: FOREIGN[name]}),
        ]
    for way in ways:
        with pytest.raises(UserError, match=named):
            way()


def test_every_command_refuses_a_run_folder_with_such_an_option(
    hostile: Callable[..., Path],
    no_timm: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pictures: Path,
) -> None:
    folder = hostile(options={"pretrained": True, "cache_dir": str(tmp_path / "there")})
    shapes = "shapes:count=8,size=32"
    for words in (
        ["import", folder],
        ["export", folder, "--to", "timm", "--out", tmp_path / "out"],
        ["reconstruct", folder, pictures],
        ["attention", folder, pictures],
        ["embed", folder, "--data", shapes, "--out", tmp_path / "out.npz"],
        ["evaluate", "knn", folder, "--train", shapes, "--test", shapes],
        ["evaluate", "knn", folder, "--train", shapes, "--test", shapes, "--untrained"],
        ["pretrain", "--resume", folder],
        ["pretrain", folder / "config.json", "--data", shapes, "--out", tmp_path / "run"],
        ["pretrain", "demo", "--init", folder, "--out", tmp_path / "run", "--model.options", "cache_dir", "/tmp/x"],
        ["slurm", "demo", "--out", tmp_path / "run", "--model.options", "cache_dir", "/tmp/x"],
    ):
        status, text = say(capsys, *words)
        assert status == 1 and "no option" in text and "Traceback" not in text, words
    assert not (tmp_path / "there").exists() and not (tmp_path / "out").exists()


NAMES = [
    "hf-hub:timm/resnet18",
    "hf_hub:timm/x",
    "local-dir:/tmp/x",
    "../x",
    "/tmp/x",
    "http://127.0.0.1/x",
    "",
    "a.b.c",
]


@pytest.mark.parametrize("name", [*NAMES, "vit_tiny_patch16_224\n", "vit tiny", "ＶＩＴ", "x" * 1000])
def test_a_backbone_has_a_plain_name(name: str, hostile: Callable[..., Path], no_timm: None) -> None:
    folder = hostile(model={"backbone": name})
    for way in (
        lambda: load_encoder(folder / "encoder/model.safetensors"),
        lambda: load_encoder(folder),
        lambda: create_encoder("timm", name),
        lambda: create_model("mae", name) if name else load_encoder(folder),
        lambda: load_encoder(f"timm:{name}"),
    ):
        with pytest.raises(UserError, match="is not the plain name of a model"):
            way()


def test_a_method_has_a_known_name(hostile: Callable[..., Path], no_timm: None) -> None:
    for name in ("tim", "", "__class__"):
        with pytest.raises(UserError, match="there is no model '"):
            load_encoder(hostile(model={"name": name}))
    with pytest.raises(UserError, match="there is no model 'timm'"):
        create_model("timm")


ABSURD: list[dict[str, Any]] = [
    {"embed_dim": 1_000_000},
    {"embed_dim": -32},
    {"embed_dim": 0},
    {"embed_dim": True},
    {"embed_dim": 32.0},
    {"embed_dim": "32"},
    {"embed_dim": [32] * 9},
    {"embed_dim": []},
    {"embed_dim": [[32]]},
    {"embed_dim": None},
    {"embed_dim": {"x": 1}},
    {"depth": 10**9},
    {"depth": 10**4000},
    {"depths": [90, 90, 90, 90]},
    {"num_heads": 10**6},
    {"img_size": [10**5, 10**5]},
    {"img_size": [32, 32, 32]},
    {"in_chans": 10**9},
    {"patch_size": 0},
    {"mlp_ratio": 1e300},
    {"mlp_ratio": 0},
    {"mlp_ratio": float("nan")},
    {"mlp_ratio": float("inf")},
    {"init_values": float("-inf")},
    {"window_size": 10**7},
    {"num_classes": 10**12},
    {"reg_tokens": 10**9},
    {"qkv_bias": 1},
    {"class_token": "no"},
    {"global_pool": "x"},
    {"pos_embed": True},
    {"decoder_dim": 10**9},
    {"decoder_depth": 10**9},
    {"outputs": 10**9},
    {"predict_patch": 10**9},
]


@pytest.mark.parametrize("options", ABSURD, ids=str)
def test_absurd_options_are_named(options: dict[str, Any], hostile: Callable[..., Path], no_timm: None) -> None:
    (name,) = options
    folder = hostile(options=options)
    for way in (lambda: load_encoder(folder / "encoder/model.safetensors"), lambda: create_model("mae", **options)):
        with pytest.raises(UserError, match=f"option '{name}' must be"):
            way()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"embed_dim": 16_384, "depth": 96, "num_heads": 8}, {}),
        ({}, {"size": "16384x16384", "channels": 1, "mean": None, "std": None}),
        ({"img_size": [8192, 8192]}, {}),
        ({"reg_tokens": 1024}, {}),
        ({"num_classes": 1_000_000}, {}),
        ({"mlp_ratio": 64}, {}),
    ],
)
def test_sizes_that_the_tensors_do_not_have_take_no_memory(
    options: dict[str, Any], fields: dict[str, Any], hostile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the model would be refused with other words, for want of memory."""
    monkeypatch.setattr(parts, "free_memory", lambda: 0)
    folder = hostile(options=options, **fields)
    for name in (folder, folder / "encoder/model.safetensors"):
        with pytest.raises(
            UserError, match=r"fit: it (has|lacks)|a table of 17 positions does not|values of an im|no img_size"
        ):
            load_encoder(name)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(
    tiny_run: Make, hostile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile()
    monkeypatch.setattr(parts, "free_memory", lambda: 1000)
    for build in (build_model, build_encoder):
        with pytest.raises(UserError, match=r"vit_tiny_patch16_224 needs .* GiB"):
            build(tiny_run())
    monkeypatch.setattr(pretrained, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"the weights \(pixmim\) take .* GiB"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 30},
        {"num_heads": 3},
        {"patch_size": [8, 4]},
        {"depth": [1, 1]},
        {"window_size": 4},
        {"class_token": False},
        {"pos_embed": "none"},
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_one_line(options: dict[str, Any], hostile: Callable[..., Path]) -> None:
    folder = hostile(options=options)
    run = from_json((folder / "config.json").read_text())
    for way in (lambda: load_encoder(folder), lambda: build_model(run)):
        with pytest.raises(UserError):
            way()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"size": "100000x100000"}, "--size"),
        ({"size": "²"}, "--size"),
        ({"size": "9" * 5000}, "--size"),
        ({"size": "16384", "channels": 4096, "mean": None, "std": None}, "--size 16384 with --channels 4096"),
        ({"channels": 10**9}, "--channels"),
        ({"batch_size": 2**40}, "--batch-size"),
        ({"steps": 10**30}, "--steps"),
        ({"epochs": 1e300, "steps": None}, "--epochs"),
        ({"seed": 2**70}, "--seed"),
        ({"threads": 10**6}, "--threads"),
        ({"max_bad_fraction": float("nan")}, "'max_bad_fraction' cannot be NaN"),
        ({"shard_cache_gib": float("inf")}, "'shard_cache_gib' cannot be Infinity"),
        ({"shard_cache_gib": 10**400}, "'shard_cache_gib' cannot be 1000"),
        ({"crop": {"padding": 10**9}}, "--crop.padding"),
        ({"crop": {"scale": [0.0, 1.0]}}, "--crop.scale"),
        ({"target": {"radius": -1e9}}, "--target.radius"),
        ({"target": {"normalize_window": 10**9 + 1, "normalize_patches": False}}, "--target.normalize-window"),
        ({"target": {"bins": 10**9}}, "--target.bins"),
        ({"optim": {"betas": [0.9, 2.0]}}, "--optim.betas"),
        ({"mean": [0.5] * 10**5}, "--mean has 100000 values"),
        ({"data": "x" * 10**5}, "'data' cannot be"),
        ({"data": "a\0b"}, "'data' cannot be"),
        ({"out": "\ud800"}, "'out' cannot be"),
        ({"batch_size": True}, "'batch_size' cannot be true"),
        ({"optim": [1]}, "'optim.' must be an object"),
        ({"x" * 10**5: 1}, "unknown key 'xxx"),
    ],
)
def test_absurd_settings_are_named(fields: dict[str, Any], named: str, hostile: Callable[..., Path]) -> None:
    folder = hostile(**fields)
    for path in (folder / "encoder/model.safetensors", folder):
        with pytest.raises(UserError) as caught:
            load_encoder(path)
        assert named in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model": ' + '{"options": ' * 100 + "1" + "}" * 101, "nested too deep"),
        ('{"batch_size": 8, "batch_size": 9}', "duplicate key 'batch_size'"),
        ('{"model": {"options": {"depth": 1, "depth": 2}}}', "duplicate key 'depth'"),
        ("1" * 5000, "not valid JSON"),
        ("3", '"type" must be one of'),
        ("null", '"type" must be one of'),
        ('{"data": "' + "x" * 2**20 + '"}', "longer than"),
    ],
)
def test_malformed_configurations_are_one_line(text: str, named: str, tmp_path: Path, tiny_run: Make) -> None:
    for way in (lambda: from_json(text, "x"), lambda: read_weights(tmp_path / "x.safetensors")):
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {METADATA_KEY: text})
        with pytest.raises(UserError, match=named):
            way()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1]", "5", "null", "{", "\xff"),
        '{"type": "pixmim.PretrainConfig", "version": 1, "recipe": 1}',
        '{"type": "pixmim.ModelConfig"}',
    ],
)
def test_a_folder_whose_config_is_no_runs_is_one_line(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    for words in (["import", tmp_path], ["pretrain", "--resume", tmp_path]):
        status, said = say(capsys, *words)
        assert status == 1 and said.startswith("error: ") and "Traceback" not in said


# ---- what is read


@pytest.mark.parametrize("step", ["x", "-1", "1e9", "9" * 50, "", "٣"])
def test_a_step_that_is_none_is_named(step: str, hostile: Callable[..., Path], tiny_run: Make) -> None:
    path = hostile() / "encoder/model.safetensors"
    save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: to_json(tiny_run()), "step": step})
    with pytest.raises(UserError, match="'step' is"):
        read_weights(path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mask_ratio": "x"}, "mask_ratio"),
        ({"mask_ratio": -1.0}, "mask_ratio"),
        ({"mask_ratio": True}, "mask_ratio"),
        ({"mask_ratio": [0.5]}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"image_size": -5}, "img_size"),
        ({"image_size": [32, 64]}, "--size HEIGHTxWIDTH"),
        ({"layer_norm_eps": 1.0}, "norm_eps"),
        ({"mean": ["x"]}, "mean"),
        ({"mean": [float("inf")] * 3}, "mean"),
        ({"std": [0, 1, 1]}, "std"),
        ({"architecture": "local-dir:/etc", "pretrained_cfg": {}}, "plain name"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "x"}}, "no option"),
        ({"architecture": "vit_tiny_patch16_224", "input_size": [3, -1, 10**9]}, "img_size"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": 3}, "must be objects"),
        ({"image_size": 10**12}, "img_size"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_attention_heads": 10**9}, "num_heads"),
        ({"decoder_num_attention_heads": -1}, "decoder_heads"),
    ],
)
def test_what_a_config_beside_says_is_checked(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    torch.save(official.mae(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=named):
        load_model(tmp_path, **({} if "heads" in named else BOTH))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--size", "-1"], "--size must be"),
        (["--size", "8x8x8"], "--size must be"),
        (["--size", "32x64"], "--size HEIGHTxWIDTH"),
        (["--decoder-heads", "1000000000"], "--decoder-heads must be"),
        (["--heads", "0"], "--heads must be"),
        (["--mean", "1", "--std", "1"], "--mean has 1 values for 3 channels"),
        (["--mean", "nan", "0", "0"], "--mean must be a number"),
        (["--std", "0", "1", "1"], "--std"),
        (["--prefix", "no.such"], "--prefix no.such: no tensor's name begins so"),
        (["--ema"], "--ema"),
    ],
)
def test_what_is_typed_passes_the_same_gate(words: list[str], named: str, tmp_path: Path, capsys: Any) -> None:
    torch.save({"model": official.mae()}, tmp_path / "mae.pth")
    known = ["--heads", "3", "--decoder-heads", "4", *words]
    status, text = say(capsys, "import", tmp_path / "mae.pth", *known)
    assert status == 1 and named in text and "Traceback" not in text


PARTS = [*reading.PARTS, "config.json"]


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
@pytest.mark.parametrize("name", [*PARTS, "x.pth"])
def test_only_regular_files_are_read(name: str, kind: str, tmp_path: Path) -> None:
    """Reading a FIFO would wait for ever, and /dev/zero has no end."""
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    if name == "config.json":
        torch.save({"model": official.mae()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"not a regular file|holds no weights"):
        resolve_model(str(path if name == "x.pth" else tmp_path))


@pytest.mark.parametrize(
    "parts",
    [
        ["../secret.safetensors"],
        ["/etc/passwd"],
        ["sub/x.safetensors"],
        ["model.safetensors.index.json"],
        ["pytorch_model.bin.index.json"],
        ["link.safetensors"],
        [f"{i}.safetensors" for i in range(10_000)],
        [],
        [None],
        [["x"]],
        [{}],
        [5],
        ["a\0b.safetensors"],
        ["absent.safetensors"],
    ],
    ids=lambda parts: str(parts)[:40],
)
def test_an_index_names_files_beside_it(parts: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(official.mae(), tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    content = {"weight_map": {str(i): part for i, part in enumerate(parts)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        read_weights(folder, ModelHints(**BOTH))


def test_parts_are_found_in_the_hubs_cache_where_all_files_are_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "1"
    folder.mkdir(parents=True)
    tensors = official.mae()
    half = len(tensors) // 2
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        save_file({name: tensors[name] for name in names}, tmp_path / "blobs" / str(number))
        (folder / f"{number}.safetensors").symlink_to(f"../../blobs/{number}")
    index = {"weight_map": {name: f"{int(i >= half)}.safetensors" for i, name in enumerate(tensors)}}
    (tmp_path / "blobs" / "index").write_text(json.dumps(index))
    (folder / "model.safetensors.index.json").symlink_to("../../blobs/index")
    assert (
        read_weights(folder, ModelHints(**BOTH)).tensors.keys()
        == read_weights(folder, ModelHints(**BOTH)).tensors.keys()
    )


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        (10**9).to_bytes(8, "little"),
        header(a=F32),
        header(a={**F32, "data_offsets": [-4, 0]}) + b"1234",
        header(a={**F32, "data_offsets": [0, 2**60]}) + b"1234",
        header(a=F32, b=F32) + b"1234",
        header(a={**F32, "shape": [2**62, 2**62]}) + b"1234",
        header(a={**F32, "shape": [-1]}) + b"1234",
        header(a={**F32, "dtype": "EVIL"}) + b"1234",
        header(a={"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}) + b"1234",
        header(a={"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}) + b"12345678",
        header(__metadata__={"pixmim": 5}, a=F32) + b"1234",
        header(__metadata__=[], a=F32) + b"1234",
        header(__metadata__={"pixmim": "{}" * 10}, a=F32) + b"1234",
        header(**{"patch_embed.proj.weight": {"dtype": "F32", "shape": [0, 10**15], "data_offsets": [0, 0]}}),
        header(**{"x" * 1000: F32}) + b"1234",
        header(),
    ],
)
def test_damaged_headers_are_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_weights(path)


@pytest.mark.parametrize("shape", [(), (0,), (48, 0, 8, 8), (0, 3, 8, 8), (48, 3, 8), (48, 3, 0, 0), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["mae", "convmae", "simmim_vit", "simmim_swin", "beit"])
def test_tensors_of_shapes_that_no_model_has_are_one_line(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = official.random(official.beit(shared=False)) if kind == "beit" else getattr(official, kind)()
    for name in ("patch_embed.proj.weight", "patch_embed1.proj.weight", "pos_embed", "decoder_embed.weight"):
        for one in (name, f"encoder.{name}"):
            if one in tensors:
                save_file({**tensors, one: torch.zeros(shape)}, tmp_path / "x.safetensors")
                with pytest.raises(UserError):
                    load_encoder(tmp_path / "x.safetensors", num_heads=4)


@pytest.mark.parametrize("number", ["999999999", "9" * 5000, "²"])
def test_blocks_are_not_counted_to_a_billion(number: str, tmp_path: Path) -> None:
    for tensors, name in (
        (official.mae(), f"blocks.{number}.norm1.weight"),
        (official.simmim_swin(), f"encoder.layers.{number}.blocks.0.norm1.weight"),
        (official.simmim_swin(), f"encoder.layers.0.blocks.{number}.norm1.weight"),
    ):
        torch.save({"model": tensors | {name: torch.zeros(1)}}, tmp_path / "x.pth")
        with pytest.raises(UserError):
            load_encoder(tmp_path / "x.pth", num_heads=4)


class Evil:
    """Code that leaves a file where it ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class Calls:
    """A pickle's call of a function by its name."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


@pytest.mark.parametrize("plain", [False, True], ids=["zip", "before 1.6"])
def test_numpys_numbers_are_never_unpickled(plain: bool, tmp_path: Path) -> None:
    """Whoever asks for an object array, or for a scalar that holds a pickle, gets an empty stand-in."""
    inner = pickle.dumps(Evil(tmp_path / "ran"), protocol=2)
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    odd = [
        Calls(scalar, np.dtype("O"), inner),
        Calls(scalar, Calls(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 63)), inner),
        Calls(array, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, inner)),
        Calls(array, np.ndarray, (10**15,), b"b"),
        np.array([None], dtype=object),
        np.float64(3),
    ]
    path = tmp_path / "x.pth"
    torch.save({"model": official.mae(), "more": odd}, path, _use_new_zipfile_serialization=not plain)
    assert load_model(path, **BOTH) is not None
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("plain", [False, True], ids=["zip", "before 1.6"])
def test_a_pickle_takes_no_more_memory_than_it_has(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pth"
    huge = torch.zeros(1).expand(1 << 40)
    looped = Namespace(mask_ratio=0.6)
    looped.args = looped
    shared: dict[str, Any] = {}
    for _ in range(60):
        shared = {"a": shared, "b": shared}

    def written(content: Any) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=not plain)

    written({"model": official.mae(), "more": Calls(bytearray, 1 << 40)})
    with pytest.raises(UserError, match="asks for bytearray"):
        read_weights(path)
    written({"model": official.mae() | {"pos_embed": huge}})
    with pytest.raises(UserError, match="bytes in a file of"):
        read_weights(path)
    written({"model": {f"blocks.{i}.norm1.weight": huge[:1000] for i in range(1000)}})
    with pytest.raises(UserError, match="bytes in a file of"):
        read_weights(path)
    written({"model": official.mae(), "args": looped, "config": shared})
    assert read_weights(path, ModelHints(**BOTH)).config.mask.ratio == 0.6
    written({"model": official.mae() | {"pos_embed": torch.zeros(1, 17, 48, device="meta")}})
    with pytest.raises(UserError, match=r"no plain tensor|damaged"):
        read_weights(path)
    written({"model": official.mae() | {"pos_embed": torch.zeros(4, 4).to_sparse()}})
    with pytest.raises(UserError, match=r"no plain tensor|damaged"):
        read_weights(path)
    monkeypatch.setattr(reading, "MAX_PICKLE_BYTES", 10_000)
    monkeypatch.setattr(reading._Counted, "_left", 10_000)
    written({"model": official.mae()})  # its tensors are larger than that
    assert load_model(path, **BOTH) is not None
    written({"model": official.mae(), "more": [[] for _ in range(20_000)]})
    with pytest.raises(UserError, match="of more than 10,000 bytes"):
        read_weights(path)


@pytest.mark.parametrize("how", ["packed", "claimed"])
def test_a_zip_unpacks_to_no_more_than_it_holds(how: str, tmp_path: Path) -> None:
    torch.save({"model": official.mae()}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "x.pth", "w") as bomb:
        for entry in whole.infolist():
            packed = how == "packed" and "/data/" in entry.filename
            bomb.writestr(entry.filename, whole.read(entry), zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
        if how == "packed":
            bomb.writestr("whole/data/99", bytes(10**8), zipfile.ZIP_DEFLATED)
    if how == "claimed":  # the table at the end says that a part is larger than the file
        content = bytearray((tmp_path / "x.pth").read_bytes())
        last = content.rindex(b"PK\x01\x02")
        content[last + 20 : last + 28] = (2**31).to_bytes(4, "little") * 2
        (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match="would unpack to"):
        read_weights(tmp_path / "x.pth")


def test_a_zip_without_sums_is_read(tmp_path: Path) -> None:
    """torch can be told to leave them out."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": official.mae()}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_model(tmp_path / "x.pth", **BOTH) is not None


def test_a_zips_table_of_contents_is_not_read_beyond_a_bound(tmp_path: Path) -> None:
    """The file has a hole of 4 GiB, said to be the table."""
    size = 4 * 2**30
    end = b"PK\x05\x06" + bytes(8) + (size - 64).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(2)
    with (tmp_path / "x.pth").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size)
        file.seek(size)
        file.write(end)
    with pytest.raises(UserError, match=r"x\.pth cannot be read"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_weights_stay_when_their_file_is_cut(name: str, tmp_path: Path) -> None:
    """Bytes mapped from a file that is gone would end the process with a signal."""
    path = tmp_path / name
    torch.save({"model": official.mae()}, path) if name == "x.pth" else save_file(official.mae(), path)
    weights = resolve_model(str(path), hints=BOTH)
    os.truncate(path, 0)
    assert all(torch.isfinite(value).all() for value in weights.tensors.values())


def test_thousands_of_tensors_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_TENSORS", 10)
    torch.save({"model": official.mae()}, tmp_path / "x.pth")
    save_file(official.mae(), tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(UserError, match="at most 10"):
            read_weights(tmp_path / name)


# ---- what goes out


def test_a_products_metadata_name_nothing_of_this_machine(tiny_run: Make, tmp_path: Path) -> None:
    run = from_json(
        json.dumps(
            json.loads(to_json(tiny_run(out="/home/me/run", data="/home/me/data", init="/home/me/w.pth")))
            | {"knn": {"train": "/home/me/train", "test": "http://me.example/test", "every": 1.0}}
        )
    )
    save_tensors(dict(build_encoder(run).state_dict()), tmp_path / "e.safetensors", run, 3)
    content = (tmp_path / "e.safetensors").read_bytes()
    assert b"/home" not in content and b"me.example" not in content
    assert resolve_model(str(tmp_path / "e.safetensors")).config.model == run.model
    save_tensors({}, tmp_path / "e.safetensors", tiny_run(init="timm:vit_tiny_patch16_224"), 3)
    assert b"timm:vit_tiny_patch16_224" in (tmp_path / "e.safetensors").read_bytes()


@pytest.mark.parametrize("plain", [True, False])
def test_a_tuple_nested_without_end_is_never_hashed(plain: bool, tmp_path: Path) -> None:
    """As a key it would take 2^60 steps inside of compiled code, which no signal interrupts."""
    nested: tuple[Any, ...] = ()
    for _ in range(60):
        nested = (nested, nested)

    class Key:
        def __reduce__(self) -> tuple[Any, ...]:
            return OrderedDict, ([[nested, 1]],)

    torch.save({"model": official.mae(), "more": Key()}, tmp_path / "x.pth", _use_new_zipfile_serialization=not plain)
    with pytest.raises(UserError, match="a tuple of more than 1,000,000 parts"):
        read_weights(tmp_path / "x.pth", ModelHints(**BOTH))


def test_nested_values_are_cut_by_depth_before_they_are_written_out() -> None:
    code = "from pixmim.utils.errors import shown; x = []; [x := [x, x] for _ in range(60)]; print(len(shown(x)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) <= 80  # written out, it would be 2^60 brackets
    assert len(shown("x" * 1000)) <= 80 and shown([1, "a", None]) == "[1, 'a', None]"


def test_zips_that_torch_could_read_otherwise_are_refused(tmp_path: Path) -> None:
    torch.save({"model": official.mae()}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for number, changed in enumerate(
        (
            content.replace(b"whole/data.pkl", b"whole/DATA.PKL"),
            content + b"x",
            b"x" + content,
            content[:-22] + b"between" + content[-22:],
        )
    ):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(changed)
        with pytest.raises(UserError, match="cannot be read"):
            read_weights(path, ModelHints(**BOTH))
    assert read_weights(tmp_path / "whole.pth", ModelHints(**BOTH)).has_decoder


def test_an_image_without_end_is_refused_before_a_batch_is_made(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"encoder.{name}": value for name, value in build_encoder(tiny_run()).state_dict().items()}
    encoder = frozen_encoder_from_weights(Weights(tiny_run(), tensors, "x"), device="cpu")
    monkeypatch.setattr("pixmim.evaluation.frozen_encoder.free_memory", lambda: 10 * 32 * 32 * 3 * 5)
    encoder.check_batch(10)
    with pytest.raises(UserError, match="a batch of 11 images of 32x32 pixels"):
        encoder.check_batch(11)
    with pytest.raises(UserError, match="more than the 262,144 allowed"):
        build_mask_sampler(tiny_run(size="4096"), 4)
