"""Test untrusted weights and configurations: they may decide sizes only, and cannot exhaust time or memory."""

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
from pixmim import create_model, load_encoder, load_model
from pixmim.build import build_encoder, build_mask_sampler, build_model
from pixmim.config import PretrainConfig
from pixmim.config_io import from_json, to_json
from pixmim.evaluation.frozen_encoder import frozen_encoder_from_weights
from pixmim.models import create_encoder
from pixmim.utils import initialization
from pixmim.utils.errors import UserError, shown
from pixmim.weights import load, safe_load
from pixmim.weights.detect import Weights, read_weights
from pixmim.weights.infer_config import ModelHints
from pixmim.weights.load import resolve_model
from pixmim.weights.save import METADATA_KEY, save_tensors

Make = Callable[..., PretrainConfig]
BOTH = {"num_heads": official.HEADS, "decoder_heads": official.DECODER_HEADS}


@pytest.fixture
def hostile(tiny_run: Make, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run's encoder with a changed configuration."""
    config = tiny_run()
    tensors = dict(build_encoder(config).state_dict())

    def make(model: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **fields: Any) -> Path:
        content = json.loads(to_json(config)) | fields
        if model or options:
            content["model"] |= model or {}
            content["model"]["options"] |= options or {}
        folder = tmp_path / "hostile"
        (folder / "encoder").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(content))
        save_file(tensors, folder / "encoder/model.safetensors", {METADATA_KEY: json.dumps(content), "step": "6"})
        return folder

    return make


# ---- options and settings

NOT_SIZES: dict[str, Any] = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"},
    "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    "cache_dir": "/tmp/cache",
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
    """Fail if timm's constructor is called."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError(f"timm.create_model was called with {options}")

    monkeypatch.setattr(timm, "create_model", fail)


@pytest.mark.parametrize("name", NOT_SIZES)
def test_an_option_that_is_not_a_size_never_reaches_timm(
    name: str, hostile: Callable[..., Path], no_timm: None
) -> None:
    folder = hostile(options={name: NOT_SIZES[name]})
    calls: list[Callable[[], object]] = [
        lambda: load_encoder(folder / "encoder/model.safetensors"),
        lambda: load_encoder(folder),
        lambda: resolve_model(str(folder), with_decoder=True),
        lambda: from_json((folder / "config.json").read_text()),
    ]
    if name not in ("name", "backbone"):
        calls += [
            lambda: create_model("mae", **{name: NOT_SIZES[name]}),
            lambda: create_encoder("timm", "vit_tiny_patch16_224", **{name: NOT_SIZES[name]}),
        ]
    for call in calls:
        with pytest.raises(UserError, match=f"no option '{name}'"):
            call()


def test_every_command_refuses_such_an_option_in_a_run(
    hostile: Callable[..., Path],
    no_timm: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pictures: Path,
) -> None:
    folder = hostile(options={"pretrained": True, "cache_dir": str(tmp_path / "cache")})
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
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


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
def test_a_backbone_must_have_a_plain_name(name: str, hostile: Callable[..., Path], no_timm: None) -> None:
    folder = hostile(model={"backbone": name})
    for call in (
        lambda: load_encoder(folder / "encoder/model.safetensors"),
        lambda: load_encoder(folder),
        lambda: create_encoder("timm", name),
        lambda: create_model("mae", name) if name else load_encoder(folder),
        lambda: load_encoder(f"timm:{name}"),
    ):
        with pytest.raises(UserError, match="is not the plain name of a model"):
            call()


def test_a_method_must_have_a_known_name(hostile: Callable[..., Path], no_timm: None) -> None:
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
    for call in (lambda: load_encoder(folder / "encoder/model.safetensors"), lambda: create_model("mae", **options)):
        with pytest.raises(UserError, match=f"option '{name}' must be"):
            call()


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
def test_sizes_unlike_the_tensors_take_no_memory(
    options: dict[str, Any], fields: dict[str, Any], hostile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the model would raise another error, since no memory is free."""
    monkeypatch.setattr(initialization, "free_memory", lambda: 0)
    folder = hostile(options=options, **fields)
    for name in (folder, folder / "encoder/model.safetensors"):
        with pytest.raises(
            UserError,
            match=r"match: it (has|is missing)|a table of 17 positions is too|values of an im|not take img_size",
        ):
            load_encoder(name)


def test_a_model_larger_than_memory_is_refused_before_it_is_built(
    tiny_run: Make, hostile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile()
    monkeypatch.setattr(initialization, "free_memory", lambda: 1000)
    for build_any in (build_model, build_encoder):
        with pytest.raises(UserError, match=r"vit_tiny_patch16_224 needs .* GiB"):
            build_any(tiny_run())
    monkeypatch.setattr(load, "free_memory", lambda: 1000)
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
def test_incompatible_options_are_one_error(options: dict[str, Any], hostile: Callable[..., Path]) -> None:
    folder = hostile(options=options)
    config = from_json((folder / "config.json").read_text())
    for call in (lambda: load_encoder(folder), lambda: build_model(config)):
        with pytest.raises(UserError):
            call()


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
        ({"max_bad_fraction": float("nan")}, "--max-bad-fraction must be a number from 0 to 1, not nan"),
        ({"shard_cache_gib": float("inf")}, "--shard-cache-gib"),
        ({"shard_cache_gib": 10**400}, "--shard-cache-gib"),
        ({"crop": {"padding": 10**9}}, "--crop.padding"),
        ({"crop": {"scale": [0.0, 1.0]}}, "--crop.scale"),
        ({"target": {"radius": -1e9}}, "--target.radius"),
        ({"target": {"normalize_window": 10**9 + 1, "normalize_patches": False}}, "--target.normalize-window"),
        ({"target": {"bins": 10**9}}, "--target.bins"),
        ({"optim": {"betas": [0.9, 2.0]}}, "--optim.betas"),
        ({"mean": [0.5] * 10**5}, "--mean has 100000 values"),
        ({"data": "x" * 10**5}, "--data must be"),
        ({"data": "a\0b"}, "--data must be"),
        ({"out": "\ud800"}, "--out must be"),
        ({"batch_size": True}, "--batch-size must be an integer"),
        ({"optim": [1]}, "'optim' must be an object"),
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
def test_malformed_configurations_are_one_error(text: str, named: str, tmp_path: Path, tiny_run: Make) -> None:
    for call in (lambda: from_json(text, "x"), lambda: read_weights(tmp_path / "x.safetensors")):
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {METADATA_KEY: text})
        with pytest.raises(UserError, match=named):
            call()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1]", "5", "null", "{", "\xff"),
        '{"type": "pixmim.PretrainConfig", "version": 1, "recipe": 1}',
        '{"type": "pixmim.ModelConfig"}',
    ],
)
def test_a_folder_with_another_config_is_one_error(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    for words in (["import", tmp_path], ["pretrain", "--resume", tmp_path]):
        status, text = say(capsys, *words)
        assert status == 1 and text.startswith("error: ") and "Traceback" not in text


# ---- files


@pytest.mark.parametrize("step", ["x", "-1", "1e9", "9" * 50, "", "٣"])
def test_an_invalid_step_is_named(step: str, hostile: Callable[..., Path], tiny_run: Make) -> None:
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
def test_a_config_next_to_the_weights_is_checked(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
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
        (["--prefix", "no.such"], "--prefix no.such matches no tensor"),
        (["--ema"], "--ema"),
    ],
)
def test_flags_pass_the_same_checks(words: list[str], named: str, tmp_path: Path, capsys: Any) -> None:
    torch.save({"model": official.mae()}, tmp_path / "mae.pth")
    flags = ["--heads", "3", "--decoder-heads", "4", *words]
    status, text = say(capsys, "import", tmp_path / "mae.pth", *flags)
    assert status == 1 and named in text and "Traceback" not in text


PARTS = [*safe_load.PARTS, "config.json"]


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
@pytest.mark.parametrize("name", [*PARTS, "x.pth"])
def test_only_regular_files_are_read(name: str, kind: str, tmp_path: Path) -> None:
    """Refuse FIFOs, which block forever, and /dev/zero, which never ends."""
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    if name == "config.json":
        torch.save({"model": official.mae()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"not a regular file|contains no weights"):
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
def test_an_index_lists_only_files_in_its_folder(parts: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(official.mae(), tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    content = {"weight_map": {str(i): part for i, part in enumerate(parts)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        read_weights(folder, ModelHints(**BOTH))


def test_an_index_is_read_in_the_cache_of_the_hub_where_all_files_are_links(tmp_path: Path) -> None:
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
    save_file(tensors, tmp_path / "complete.safetensors")
    complete = read_weights(tmp_path / "complete.safetensors", ModelHints(**BOTH))
    assert read_weights(folder, ModelHints(**BOTH)).tensors.keys() == complete.tensors.keys()


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
def test_damaged_headers_are_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_weights(path)


@pytest.mark.parametrize("shape", [(), (0,), (48, 0, 8, 8), (0, 3, 8, 8), (48, 3, 8), (48, 3, 0, 0), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["mae", "convmae", "simmim_vit", "simmim_swin", "beit"])
def test_impossible_shapes_are_one_error(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = official.random(official.beit(shared=False)) if kind == "beit" else getattr(official, kind)()
    for name in ("patch_embed.proj.weight", "patch_embed1.proj.weight", "pos_embed", "decoder_embed.weight"):
        for one in (name, f"encoder.{name}"):
            if one in tensors:
                save_file({**tensors, one: torch.zeros(shape)}, tmp_path / "x.safetensors")
                with pytest.raises(UserError):
                    load_encoder(tmp_path / "x.safetensors", num_heads=4)


@pytest.mark.parametrize("number", ["999999999", "9" * 5000, "²"])
def test_block_numbers_are_bounded(number: str, tmp_path: Path) -> None:
    for tensors, name in (
        (official.mae(), f"blocks.{number}.norm1.weight"),
        (official.simmim_swin(), f"encoder.layers.{number}.blocks.0.norm1.weight"),
        (official.simmim_swin(), f"encoder.layers.0.blocks.{number}.norm1.weight"),
    ):
        torch.save({"model": tensors | {name: torch.zeros(1)}}, tmp_path / "x.pth")
        with pytest.raises(UserError):
            load_encoder(tmp_path / "x.pth", num_heads=4)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class Calls:
    """Pickles as a call of a function by name."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


@pytest.mark.parametrize("plain", [False, True], ids=["zip", "before 1.6"])
def test_numpy_objects_are_never_unpickled(plain: bool, tmp_path: Path) -> None:
    """Replace object arrays, and scalars that contain a pickle, by placeholders."""
    inner = pickle.dumps(Evil(tmp_path / "ran"), protocol=2)
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    objects = [
        Calls(scalar, np.dtype("O"), inner),
        Calls(scalar, Calls(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 63)), inner),
        Calls(array, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, inner)),
        Calls(array, np.ndarray, (10**15,), b"b"),
        np.array([None], dtype=object),
        np.float64(3),
    ]
    path = tmp_path / "x.pth"
    torch.save({"model": official.mae(), "more": objects}, path, _use_new_zipfile_serialization=not plain)
    assert load_model(path, **BOTH) is not None
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("plain", [False, True], ids=["zip", "before 1.6"])
def test_the_memory_of_a_pickle_is_bounded(plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    huge = torch.zeros(1).expand(1 << 40)
    looped = Namespace(mask_ratio=0.6)
    looped.args = looped
    shared: dict[str, Any] = {}
    for _ in range(60):
        shared = {"a": shared, "b": shared}

    def write(content: Any) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=not plain)

    write({"model": official.mae(), "more": Calls(bytearray, 1 << 40)})
    with pytest.raises(UserError, match="refers to bytearray"):
        read_weights(path)
    write({"model": official.mae() | {"pos_embed": huge}})
    with pytest.raises(UserError, match="bytes in a file of"):
        read_weights(path)
    write({"model": {f"blocks.{i}.norm1.weight": huge[:1000] for i in range(1000)}})
    with pytest.raises(UserError, match="bytes in a file of"):
        read_weights(path)
    write({"model": official.mae(), "args": looped, "config": shared})
    assert read_weights(path, ModelHints(**BOTH)).config.mask.ratio == 0.6
    write({"model": official.mae() | {"pos_embed": torch.zeros(1, 17, 48, device="meta")}})
    with pytest.raises(UserError, match=r"not a plain tensor|damaged"):
        read_weights(path)
    write({"model": official.mae() | {"pos_embed": torch.zeros(4, 4).to_sparse()}})
    with pytest.raises(UserError, match=r"not a plain tensor|damaged"):
        read_weights(path)
    monkeypatch.setattr(safe_load, "MAX_PICKLE_BYTES", 10_000)
    monkeypatch.setattr(safe_load._CountedBytes, "_remaining", 10_000)
    write({"model": official.mae()})  # its tensors are larger than that
    assert read_weights(path, ModelHints(**BOTH)).has_decoder
    write({"model": official.mae(), "more": [[] for _ in range(20_000)]})
    with pytest.raises(UserError, match="of more than 10,000 bytes"):
        read_weights(path)


@pytest.mark.parametrize("kind", ["compressed", "claimed", "claimed-compressed"])
def test_a_zip_bomb_is_refused(kind: str, tmp_path: Path) -> None:
    torch.save({"model": official.mae()}, tmp_path / "valid.pth")
    with zipfile.ZipFile(tmp_path / "valid.pth") as valid, zipfile.ZipFile(tmp_path / "x.pth", "w") as bomb:
        for entry in valid.infolist():
            compressed = kind == "compressed" and "/data/" in entry.filename
            method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            bomb.writestr(entry.filename, valid.read(entry), method)
        if kind == "compressed":
            bomb.writestr("valid/data/99", bytes(10**8), zipfile.ZIP_DEFLATED)
    if kind != "compressed":  # the central directory claims an entry larger than the file
        content = bytearray((tmp_path / "x.pth").read_bytes())
        last = content.rindex(b"PK\x01\x02")
        fields = 2 if kind == "claimed" else 1  # compressed and unpacked size, or the former only
        content[last + 20 : last + 20 + 4 * fields] = (2**31).to_bytes(4, "little") * fields
        (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match="would unpack to"):
        read_weights(tmp_path / "x.pth")


def test_a_zip_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": official.mae()}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_model(tmp_path / "x.pth", **BOTH) is not None


def test_the_central_directory_of_a_zip_is_bounded(tmp_path: Path) -> None:
    """Refuse a sparse file of 4 GiB that claims to be one central directory."""
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
def test_weights_survive_truncation_of_their_file(name: str, tmp_path: Path) -> None:
    """Copy memory-mapped tensors, whose truncated file would end the process with a signal."""
    path = tmp_path / name
    torch.save({"model": official.mae()}, path) if name == "x.pth" else save_file(official.mae(), path)
    weights = resolve_model(str(path), hints=BOTH)
    os.truncate(path, 0)
    assert all(torch.isfinite(value).all() for value in weights.tensors.values())


def test_the_number_of_tensors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_load, "MAX_TENSORS", 10)
    torch.save({"model": official.mae()}, tmp_path / "x.pth")
    save_file(official.mae(), tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(UserError, match="at most 10"):
            read_weights(tmp_path / name)


# ---- metadata


def test_metadata_contain_no_path_of_this_machine(tiny_run: Make, tmp_path: Path) -> None:
    config = from_json(
        json.dumps(
            json.loads(to_json(tiny_run(out="/home/me/run", data="/home/me/data", init="/home/me/w.pth")))
            | {"knn": {"train": "/home/me/train", "test": "http://me.example/test", "every": 1.0}}
        )
    )
    save_tensors(dict(build_encoder(config).state_dict()), tmp_path / "e.safetensors", config, 3)
    content = (tmp_path / "e.safetensors").read_bytes()
    assert b"/home" not in content and b"me.example" not in content
    assert resolve_model(str(tmp_path / "e.safetensors")).config.model == config.model
    save_tensors({}, tmp_path / "e.safetensors", tiny_run(init="timm:vit_tiny_patch16_224"), 3)
    assert b"timm:vit_tiny_patch16_224" in (tmp_path / "e.safetensors").read_bytes()


@pytest.mark.parametrize("plain", [True, False])
def test_an_exponentially_nested_tuple_is_never_hashed(plain: bool, tmp_path: Path) -> None:
    """Refuse a key whose hash takes 2^60 steps inside compiled code, which no signal interrupts."""
    nested: tuple[Any, ...] = ()
    for _ in range(60):
        nested = (nested, nested)

    class Key:
        def __reduce__(self) -> tuple[Any, ...]:
            return OrderedDict, ([[nested, 1]],)

    torch.save({"model": official.mae(), "more": Key()}, tmp_path / "x.pth", _use_new_zipfile_serialization=not plain)
    with pytest.raises(UserError, match="a tuple of more than 1,000,000 parts"):
        read_weights(tmp_path / "x.pth", ModelHints(**BOTH))


def test_nested_values_are_abbreviated_by_depth() -> None:
    code = "from pixmim.utils.errors import shown; x = []; [x := [x, x] for _ in range(60)]; print(len(shown(x)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) <= 80  # in full, 2^60 brackets
    assert len(shown("x" * 1000)) <= 80 and shown([1, "a", None]) == "[1, 'a', None]"


def test_zips_that_torch_could_read_differently_are_refused(tmp_path: Path) -> None:
    torch.save({"model": official.mae()}, tmp_path / "valid.pth")
    content = (tmp_path / "valid.pth").read_bytes()
    for number, changed in enumerate(
        (
            content.replace(b"valid/data.pkl", b"valid/DATA.PKL"),
            content + b"x",
            b"x" + content,
            content[:-22] + b"between" + content[-22:],
        )
    ):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(changed)
        with pytest.raises(UserError, match="cannot be read"):
            read_weights(path, ModelHints(**BOTH))
    assert read_weights(tmp_path / "valid.pth", ModelHints(**BOTH)).has_decoder


def test_a_batch_larger_than_memory_is_refused_before_it_is_allocated(
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
