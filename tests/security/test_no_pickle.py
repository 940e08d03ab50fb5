"""Test that no file is ever executed: no code of pixmim unpickles, and commands treat planted pickles as data.

The first half checks the source. The second half replaces each file that a command opens, and adds files next to it, by
payloads that create a marker file if they are unpickled or imported, and calls the command.
"""

import ast
import builtins
import fnmatch
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import pixmim
from helpers.cli import skip_report
from helpers.evaluated import evaluate
from helpers.interrupt import Stopped
from pixmim import cli
from pixmim.build import build_model
from pixmim.config import CheckpointConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.evaluation import embed as embedding
from pixmim.evaluation.results import save
from pixmim.evaluation.settings import KnnSettings
from pixmim.pretraining import pretrain
from pixmim.training import trainer
from pixmim.weights.detect import Weights
from pixmim.weights.load import import_weights

Make = Callable[..., PretrainConfig]
SOURCE = Path(pixmim.__file__).parent

FORBIDDEN = (
    *("pickle", "_pickle", "pickletools", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "jsonpickle"),
    *("runpy", "imp", "code", "multiprocessing.connection", "os.system", "os.popen", "ctypes.PyDLL"),
    *("torch.jit.load", "torch.package", "torch.hub", "torch.export.load", "torch.ops.load_library"),
    *("torch.utils.model_zoo", "torch.distributed.checkpoint", "torch.classes.load_library", "pandas.read_pickle"),
    *("timm.models.load_checkpoint", "timm.models.load_state_dict", "numpy.fromfile", "numpy.ctypeslib"),
    *("logging.config", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
)
FORBIDDEN = tuple(f"{name}." for name in FORBIDDEN)
"""Modules and functions that execute a file, or may; including everything below them."""

ALLOWED = (
    *("torch.distributed.checkpoint.state_dict.", "pickletools.genops.", "pickletools.markobject."),
    *("yaml.safe_load.", "yaml.YAMLError."),
)
"""Exceptions: gathers a model's state without any file; lists a pickle's opcodes without executing them; builds plain
data from YAML, without its tags."""

NEEDS = {"numpy.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
"""Required keyword of each call of a function."""


def find_faults(text: str) -> list[str]:
    """Return what in a Python source could execute another file."""
    tree, names, faults = ast.parse(text), {name: f"builtins.{name}" for name in dir(builtins)}, list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
                faults += _forbidden(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                faults += _forbidden(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            faults += _forbidden(_full_name(node, names))
        if isinstance(node, ast.Call):
            keywords = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
            name = _full_name(node.func, names)
            word, value = NEEDS.get(name, ("", None))
            if word and keywords.get(word) is not value:
                faults.append(f"{name} without {word}={value}")
            faults += [w for w in ("trust_remote_code", "allow_pickle") if keywords.get(w, False)]
            faults += ["weights_only=False"] * (not keywords.get("weights_only", True))
    return faults


def _forbidden(name: str) -> list[str]:
    prefix = f"{name}."
    return [name] * (prefix.startswith(FORBIDDEN) and not prefix.startswith(ALLOWED))


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """Return the qualified name of `a.b.c` in the source; empty for other expressions."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    parent = _full_name(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{parent}.{node.attr}" if parent else ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads as harmless",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed.checkpoint import FileSystemReader, state_dict",
        "from torch.distributed.checkpoint.state_dict_loader import load",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=safe)",
        "from torch import load as read\nread(path, weights_only=False)",
        "import torch\ntorch.jit.load(path)",
        "from torch import jit\njit.load(path)",
        "import torch.package",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from numpy import load\nload(path)",
        "import numpy as np\nnp.savez(path, allow_pickle=True)",
        "datasets.load_dataset(path, trust_remote_code=True)",
        "eval(text)",
        "run = exec",
        "__import__(name)",
        "import os\nos.system(text)",
        "import yaml\nyaml.load(text)",
        "from yaml import load\nload(text)",
        "from yaml import unsafe_load",
        "from timm.models import load_checkpoint",
    ],
)
def test_code_that_executes_files_is_detected(text: str) -> None:
    assert find_faults(text)


def test_harmless_code_is_not_detected() -> None:
    text = "import re, torch\nimport numpy as np\nfrom torch.distributed.checkpoint.state_dict import get_state_dict\n"
    text += "np.load(path, allow_pickle=False)\ntorch.load(path, weights_only=True)\nre.compile(text)\nmodel.eval()\n"
    assert find_faults(text) == []


def test_no_source_file_executes_files() -> None:
    faults = {str(path.relative_to(SOURCE)): find_faults(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert {name: found for name, found in faults.items() if found} == {}
    allowed = {"importlib": {"__init__.py", "training/trackers.py"}, "subprocess": {"evaluation/results.py"}}
    allowed["subprocess"].add("viewer/atlas.py")
    # Imports from literal tables; git in pixmim's own folder; embedding-atlas of this Python, without its own folder.
    for module, files in allowed.items():
        statements = (f"import {module}", f"from {module} import import_module")
        assert {name for name in faults if any(one in (SOURCE / name).read_text() for one in statements)} <= files


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def payloads(marker: Path) -> dict[str, bytes]:
    """Return content that creates the marker if it is unpickled or executed, by its usual suffix."""
    payload = Payload(marker)
    state = {"model": {"encoder.norm.weight": torch.zeros(3)}, "epoch": payload}
    array = np.array([payload], dtype=object)
    return {
        "pkl": pickle.dumps(state, 2),
        "pickle": pickle.dumps(payload, 4),
        "pt": saved(lambda file: torch.save(state, file)),
        "pth": saved(lambda file: torch.save(state, file, _use_new_zipfile_serialization=False)),
        "npy": saved(lambda file: np.save(file, array, allow_pickle=True)),
        "npz": saved(lambda file: np.savez(file, allow_pickle=True, index=array, cls=array, mean=array)),
        "py": f"import os\nopen({str(marker)!r}, 'w').close()\n".encode(),
    }


def test_payloads_create_the_marker_when_executed(tmp_path: Path) -> None:
    unsafe: dict[str, Callable[[io.BytesIO], object]] = {
        "pt": lambda file: torch.load(file, weights_only=False),
        "pth": lambda file: torch.load(file, weights_only=False),
        "npy": lambda file: np.load(file, allow_pickle=True),
        "npz": lambda file: np.load(file, allow_pickle=True)["mean"],
        "py": lambda file: exec(file.read()),
    }
    for suffix, content in payloads(tmp_path / "marker").items():
        unsafe.get(suffix, pickle.load)(io.BytesIO(content))
        assert (tmp_path / "marker").exists(), suffix
        (tmp_path / "marker").unlink()


@pytest.fixture(scope="module")
def home(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a read-only folder with one of everything that commands read, including the user's cache directory."""
    root = tmp_path_factory.mktemp("home")
    quiet, shapes = Console(quiet=True), "shapes:count=12,size=32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "user-cache"))
        write_images(root / "images")
        make_cache(open_dataset(str(root / "images")), root / "cache", (32, 32), per_shard=4)
        write_tar(
            root / "tars" / "0.tar", {path.name: path.read_bytes() for path in (root / "images" / "cats").iterdir()}
        )

        run = tiny_run(data=shapes, steps=4, batch_size=4, threads=1, checkpoint=CheckpointConfig(every=2))
        pretrain(run, root / "finished", console=quiet, report=False)
        (result,) = evaluate(
            str(root / "finished"), [("knn", KnnSettings(shapes, shapes))], root / "finished", device="cpu"
        )
        save(result, root / "finished")
        shutil.copytree(
            root / "finished" / "checkpoints" / "step-000000002", root / "broken/checkpoints/step-000000002"
        )
        shutil.rmtree(root / "finished" / "checkpoints" / "step-000000002")
        shutil.copy(root / "finished" / "metrics.jsonl", root / "broken")
        (root / "broken" / "config.json").write_text(to_json(run))
        (root / "run.json").write_text(to_json(run))

        import_weights(Weights(run, dict(build_model(run).state_dict()), "a test"), root / "imported")
        patch.setattr(trainer, "PreemptionHandler", Stopped)
        patch.setattr(Stopped, "after", 1)
        assert call(*commands(root / "imported", root, root)["finetune"]) == 130
        patch.setattr(embedding, "features", stopping(embedding.features))
        assert call(*commands(root / "imported", root, root)["embed"]) == 130
        assert call("stats", root / "tars") == call("stats", root / "images") == 0
    return root


def write_images(folder: Path) -> None:
    for number in range(8):
        path = folder / ("cats", "dogs")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 36, 3), np.uint8)).save(path)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its second call is interrupted."""
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return function(*args)

    return interrupted


def call(*args: object) -> int:
    """Call a command. Whatever it reads, it must end with a status instead of a traceback."""
    status = cli.main([str(arg) for arg in args])
    assert status in (0, 1, 130)
    return status


SHAPES = ("--train", "shapes:count=12,size=32", "--test", "shapes:count=12,size=32")
CPU = ("--device", "cpu", "--precision", "fp32")


def commands(run: Path, home: Path, out: Path) -> dict[str, list[object]]:
    """Return the commands that take a run or a folder of weights."""
    images = home / "images"
    init = ["pretrain", home / "run.json", "--steps", 1, "--out", out / "new", "--init", run]
    return {
        "report": ["report", run, "--out", out / "report.html"],
        "reconstruct": ["reconstruct", run, images, "--out", out / "r.png", "--count", 1],
        "attention": ["attention", run, images, "--out", out / "a.png", "--count", 1],
        "embed": ["embed", run, "--data", images, "--out", out / "e.npy", "--batch-size", 3, *CPU],
        "import": ["import", run, "--to", out / "imported"],
        "export": ["export", run, "--to", "timm", "--out", out / "exported"],
        "evaluate": ["evaluate", "knn", run, *SHAPES, "--untrained", "--out", out / "knn", *CPU],
        "finetune": ["evaluate", "finetune", run, *SHAPES, "--epochs", 1, "--batch-size", 4, "--out", run, *CPU],
        "init": init,
        "out": ["pretrain", home / "run.json", "--out", run],
        "resume": ["pretrain", "--resume", run],
    }


@pytest.fixture
def marker(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file that payloads would create. The test fails if one does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shutil.copytree(home / "user-cache", tmp_path / "user-cache")))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def without_page(patch: pytest.MonkeyPatch) -> None:
    """Skip the report at the end of commands. The command `report` itself is tested separately."""
    skip_report(patch.setattr)
    patch.setattr("pixmim.report.results_table", lambda folders, width, *_: "")


def add_payloads(folder: Path, marker: Path) -> None:
    """Add payloads to every folder, under names that libraries look for, and as a checkpoint of torch."""
    contents = payloads(marker)
    names = {
        "pkl": ("data.pkl", ".metadata", "__0_0.distcp", "optimizer.bin", "tokenizer.pkl"),
        "pt": ("model.pt", "rank-00001.safetensors", "training_args.bin"),
        "pth": ("latest.pth", "zz.pth"),
        "py": ("__init__.py", "conftest.py", "sitecustomize.py", "hubconf.py", "modeling_x.py", "torch.py", "a.pth"),
        "npy": ("labels.dat", "index.npy.bak"),
    }
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for suffix, several in names.items():
            for name in several:
                (path / name).write_bytes(contents[suffix])
        sums = {name: zlib.crc32(contents["pkl"]) for name in (".metadata", "__0_0.distcp")}
        (path / "sums.json").write_text(json.dumps(sums))


def test_additional_files_are_not_read(home: Path, tmp_path: Path, marker: Path) -> None:
    """Add payloads to the run, which is also the current folder. All commands still succeed."""
    run = Path(shutil.copytree(home / "finished", tmp_path / "run"))
    add_payloads(run, marker)
    os.chdir(run)
    for name, command in commands(run, home, tmp_path / "out").items():
        with pytest.MonkeyPatch.context() as patch:
            if name != "report":
                without_page(patch)
            assert call(*command) == 0, name


def test_checkpoints_of_torch_are_not_opened(home: Path, tmp_path: Path, marker: Path) -> None:
    """Replace a run's checkpoint by a pickle with valid checksums."""
    run = Path(shutil.copytree(home / "broken", tmp_path / "run"))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    for path in checkpoint.iterdir():
        path.unlink()
    add_payloads(run, marker)
    for name in ("reconstruct", "import", "export", "evaluate", "init", "resume"):
        assert call(*commands(run, home, tmp_path / "out")[name]) == 1, name
    assert call("report", run) == 0


_opened: set[str] | None = None


def _record_open(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.add(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_record_open)


def opened_files(folder: Path, name: str, command: list[object]) -> list[str]:
    """Call a command and return the files of a folder that it opens, by their relative paths.

    Files whose names differ only in numbers or hashes are read by the same code: one of them is returned.
    """
    global _opened
    files = {os.path.realpath(path): str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    _opened = set()
    try:
        assert tracebacks(name, "", command) == []
        opened = sorted(files[path] for path in _opened & files.keys())
    finally:
        _opened = None
    kinds = {re.sub(r"[0-9a-f]{16,}|\d+", "#", path): path for path in opened}
    return sorted(kinds.values())


def replace_each_file(
    folder: Path,
    marker: Path,
    make_commands: Callable[[Path, Path], dict[str, list[object]]],
    all_files: bool = False,
) -> dict[str, set[str]]:
    """Replace each file that a command opens by a payload, one at a time, and call the command.

    Args:
        folder: The folder. Commands are called on copies of it.
        marker: The file that payloads create.
        make_commands: Returns the commands by name for a copy of the folder and an output folder.
        all_files: Replace all files: for libraries that open files without Python, where `opened_files` is incomplete.

    Returns:
        The replaced files of each command.
    """
    contents, errors, replaced = cycle(payloads(marker).items()), list[str](), dict[str, set[str]]()
    copy, out = marker.parent / "copy" / folder.name, marker.parent / "out"
    every = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def fresh_copy() -> None:
        shutil.rmtree(copy.parent, ignore_errors=True)  # with what a command wrote next to it
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, copy)

    for name, command in make_commands(copy, out).items():
        fresh_copy()
        paths = every if all_files else [path for path in opened_files(copy, name, command) if path in every]
        replaced[name] = set(paths)
        for path in paths:
            fresh_copy()
            suffix, content = next(contents)
            (copy / path).write_bytes(content)
            errors += tracebacks(name, path, command)
            assert not marker.exists(), (path, suffix, name)
    assert errors == []
    return replaced


def tracebacks(name: str, path: str, command: list[object]) -> list[str]:
    """Call a command that reads a payload, and return the exceptions that it raises."""
    with pytest.MonkeyPatch.context() as patch:
        if name != "report":
            without_page(patch)
        try:
            call(*command)
        except Exception as error:
            return [f"{name}, {path}: {type(error).__name__}: {error}"]
    return []


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("finished", {"config.json", "metrics.jsonl", "encoder/model.safetensors", "evaluations/knn-*.json"}),
        (
            "broken",
            {"config.json", "metrics.jsonl", "checkpoints/*/checkpoint.json", "checkpoints/*/rank-*.safetensors"},
        ),
        ("imported", {"config.json", "model.safetensors", "encoder/model.safetensors", "unfinished/*/metrics.jsonl"}),
    ],
)
def test_each_file_of_a_run(folder: str, expected: set[str], home: Path, marker: Path) -> None:
    some = {"broken": ("report", "import", "evaluate", "resume"), "imported": ("embed", "import", "finetune")}

    def chosen(copy: Path, out: Path) -> dict[str, list[object]]:
        every = commands(copy, home, out)
        return {name: every[name] for name in some.get(folder, every)}

    replaced = replace_each_file(home / folder, marker, chosen)
    paths: set[str] = set().union(*replaced.values())
    assert all(fnmatch.filter(paths, pattern) for pattern in expected), paths


def test_every_kind_of_weights_file(home: Path, tmp_path: Path, marker: Path) -> None:
    """Read every payload under every usual name of a weights file, alone, in a folder, and next to a config.json."""
    names = ("model.safetensors", "pytorch_model.bin", "x.pth", "x.pt", "x.ckpt", "x.pkl", "x.npz", "x")
    for suffix, content in payloads(marker).items():
        for name in names:
            path = tmp_path / suffix / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            (path.parent / "config.json").write_text(
                '{"architectures": ["ViTModel"], "auto_map": {"AutoModel": "x.X"}}'
            )
            assert call("import", path) == 1
            assert call("import", path.parent) == 1
            path.unlink()
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(content)
        for name in ("attention", "embed", "export", "evaluate", "init"):
            assert call(*commands(path, home, tmp_path / "out")[name]) == 1, (suffix, name)


EXTENSIONS = ("jpg", "png", "gif", "webp", "bmp", "tif", "npy", "ppm", "eps", "pgm", "xml", "txt", "csv", "json", "tar")


def data_commands(data: Path | str, home: Path, out: Path) -> dict[str, list[object]]:
    """Return the commands that take a dataset."""
    return {
        "stats": ["stats", data, "--threads", 1],
        "cache": ["cache", data, out / "cache", "--size", 16, "--threads", 1],
        "bench-data": ["bench-data", data, "--size", 32, "--seconds", 1e-6, "--threads", 1],
        "embed": ["embed", home / "imported", "--data", data, "--out", out / "e.npy", *CPU],
        "knn": ["evaluate", "knn", home / "imported", "--train", data, "--test", data, "--out", out / "knn", *CPU],
        "pretrain": ["pretrain", home / "run.json", "--data", data, "--steps", 1, "--out", out / "run"],
        "coverage": ["coverage", data, "--size", 32, "--out", out / "coverage"],
    }


def test_images_of_a_folder(home: Path, tmp_path: Path, marker: Path) -> None:
    """Add every payload with every extension to a folder of images. Each counts as an unreadable image."""
    data = Path(shutil.copytree(home / "images", tmp_path / "data"))
    for suffix, content in payloads(marker).items():
        for extension in EXTENSIONS:
            (data / "cats" / f"{suffix}.{extension}").write_bytes(content)
    add_payloads(data, marker)
    for name, command in data_commands(data, home, tmp_path / "out").items():
        assert tracebacks(name, str(data), command) == []


def test_files_that_are_a_dataset(home: Path, tmp_path: Path, marker: Path) -> None:
    """Give every payload as --data: as a list of files, annotations, a tar, a table or an image."""
    for suffix, content in payloads(marker).items():
        for extension in (*EXTENSIONS, "parquet", "arrow"):
            path = tmp_path / f"x.{extension}"
            path.write_bytes(content)
            for name in ("stats", "coverage"):
                assert tracebacks(name, str(path), data_commands(path, home, tmp_path / "out")[name]) == [], suffix


@pytest.mark.parametrize("folder", ["cache", "tars"])
def test_each_file_of_a_cache_and_of_tars(folder: str, home: Path, marker: Path) -> None:
    replaced = replace_each_file(home / folder, marker, lambda copy, out: data_commands(copy, home, out))
    assert all(replaced[name] for name in ("stats", "embed", "pretrain")), replaced


def test_members_of_tars(home: Path, tmp_path: Path, marker: Path) -> None:
    """Add every payload to tars, under names that other libraries unpickle."""
    for suffix, content in payloads(marker).items():
        names = [*EXTENSIONS, "cls", "pyd", "pickle", "pkl", "pth", "ten", "npz", "mp", "cbor", "index", suffix]
        files = {f"{number:04d}.{name}": content for number, name in enumerate(names)}
        files |= {f"good.{name}": content for name in ("cls", "json", "pyd", "pickle")}
        files |= {"good.jpg": (home / "images" / "cats" / "0.jpg").read_bytes()}
        write_tar(tmp_path / "tars" / f"{suffix}.tar", files)
    data = tmp_path / "tars"
    for name, command in data_commands(data, home, tmp_path / "out").items():
        assert tracebacks(name, str(data), command) == []


def test_each_file_in_the_users_cache_directory(home: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace each cached tar index and statistics file."""
    kinds = {path.parent.name for path in (home / "user-cache" / "pixmim").rglob("*") if path.is_file()}
    assert {"tars", "stats"} <= kinds
    monkeypatch.setenv("XDG_CACHE_HOME", str(marker.parent / "copy" / "user-cache"))

    def make_commands(copy: Path, out: Path) -> dict[str, list[object]]:
        available = {name: data_commands(home / name, home, out) for name in ("images", "tars")}
        return {f"{name} {data}": available[data][name] for data in available for name in ("stats", "pretrain")}

    replaced = replace_each_file(home / "user-cache", marker, make_commands)
    assert {path.split("/")[1] for path in set().union(*replaced.values())} >= {"tars", "stats"}


def test_unfinished_embeddings(home: Path, marker: Path) -> None:
    command = ["embed", home / "imported", "--data", home / "images", "--batch-size", 3, *CPU, "--out"]
    partial = home / "e.npy.partial"
    assert replace_each_file(partial, marker, lambda copy, out: {"embed": [*command, copy.with_suffix("")]})["embed"]


@pytest.mark.usefixtures("own_datasets_cache")
def test_datasets_of_hugging_face(home: Path, tmp_path: Path, marker: Path) -> None:
    """Replace each file of a dataset saved to disk and as parquet, and add scripts, pickles as images and as types."""
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in (home / "images" / "cats").iterdir()]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cats"])})
    library = datasets.Dataset.from_dict({"image": images, "label": [0] * len(images)}, features=kinds)
    library.save_to_disk(tmp_path / "set" / "saved")
    library.to_parquet(tmp_path / "set" / "tables" / "train.parquet")
    for form in ("saved", "tables"):
        folder = tmp_path / "set" / form
        replace_each_file(
            folder, marker, lambda copy, out: {"stats": data_commands(copy, home, out)["stats"]}, all_files=True
        )
    add_payloads(tmp_path / "set", marker)
    for name in ("saved", "tables", "set"):
        for folder in ("saved", "tables"):
            (tmp_path / "set" / folder / f"{name}.py").write_bytes(payloads(marker)["py"])
    for content in payloads(marker).values():
        rows = [{"bytes": content, "path": "x.jpg"}, images[0], {"bytes": content, "path": "x.npy"}]
        typed = arrow.field("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))
        extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": content}
        typed = typed.with_metadata(extension)
        table = arrow.table([rows], schema=arrow.schema([typed]))
        arrow.parquet.write_table(table, tmp_path / "typed.parquet")
        assert tracebacks("stats", "typed.parquet", ["stats", tmp_path / "typed.parquet"]) == []
    for folder in ("saved", "tables"):
        called = data_commands(tmp_path / "set" / folder, home, tmp_path / "out")
        assert tracebacks("stats", folder, called["stats"]) + tracebacks("pretrain", folder, called["pretrain"]) == []


def test_the_current_folder_does_not_configure_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")  # would call LaTeX for every label
    code = "import os, pixmim.utils.plotting as p; print(p.matplotlib.rcParams['text.usetex'], os.getcwd())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"False {tmp_path}\n"
