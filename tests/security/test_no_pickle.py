"""Nothing of a file is ever run: no code here unpickles, and a pickle planted in any file that a command reads is data.

The first half looks at the source. The second plants, in place of each file and beside it, what would make a file
appear if it were unpickled or imported, and calls the commands that read it.
"""

import ast
import builtins
import io
import json
import os
import pickle
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
from helpers.interrupt import Stopped
from pixmim import cli
from pixmim.build import build_model
from pixmim.config import CheckpointConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.evaluation import embed as embedding
from pixmim.evaluation.evaluate import evaluate
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
"""Modules and functions that run, or may run, what a file holds; and all below them."""

ALLOWED = ("torch.distributed.checkpoint.state_dict.", "pickletools.genops.", "pickletools.markobject.")
"""Of these: what gathers a state from a model and touches no file; what lists a pickle's instructions and runs none."""

NEEDS = {"numpy.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
"""What must be said of each call of a function."""


def faults(text: str) -> list[str]:
    """Whatever in a Python file could run what another file holds."""
    tree, names, found = ast.parse(text), {name: f"builtins.{name}" for name in dir(builtins)}, list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found += _forbidden(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found += _forbidden(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            found += _forbidden(_full(node, names))
        if isinstance(node, ast.Call):
            said = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
            word, value = NEEDS.get(_full(node.func, names), ("", None))
            if word and said.get(word) is not value:
                found.append(f"{_full(node.func, names)} without {word}={value}")
            found += [f"{word}={said[word]}" for word in ("trust_remote_code", "allow_pickle") if said.get(word, False)]
            found += ["weights_only=False"] * (not said.get("weights_only", True))
    return found


def _forbidden(name: str) -> list[str]:
    below = f"{name}."
    return [name] * (below.startswith(FORBIDDEN) and not below.startswith(ALLOWED))


def _full(node: ast.expr, names: dict[str, str]) -> str:
    """The whole name of what `a.b.c` in the source means; empty for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    above = _full(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{above}.{node.attr}" if above else ""  # type: ignore[attr-defined]


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
        "from timm.models import load_checkpoint",
    ],
)
def test_what_runs_files_is_found(text: str) -> None:
    assert faults(text)


def test_what_does_not_is_not() -> None:
    text = "import re, torch\nimport numpy as np\nfrom torch.distributed.checkpoint.state_dict import get_state_dict\n"
    text += "np.load(path, allow_pickle=False)\ntorch.load(path, weights_only=True)\nre.compile(text)\nmodel.eval()\n"
    assert faults(text) == []


def test_nothing_here_runs_a_file() -> None:
    found = {str(path.relative_to(SOURCE)): faults(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    importing = {"importlib": {"__init__.py", "training/trackers.py"}, "subprocess": {"evaluation/results.py"}}
    for module, homes in importing.items():  # of our own modules by a literal table; git, of our own folder
        users = {name for name in found if f"import {module}" in (SOURCE / name).read_text()}
        users |= {name for name in found if f"from {module} import import_module" in (SOURCE / name).read_text()}
        assert users <= homes


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def plants(marker: Path) -> dict[str, bytes]:
    """What creates the marker if it is unpickled, or run, by the suffix that somebody would give it."""
    evil = Evil(marker)
    state = {"model": {"encoder.norm.weight": torch.zeros(3)}, "epoch": evil}
    array = np.array([evil], dtype=object)
    return {
        "pkl": pickle.dumps(state, 2),
        "pickle": pickle.dumps(evil, 4),
        "pt": saved(lambda file: torch.save(state, file)),
        "pth": saved(lambda file: torch.save(state, file, _use_new_zipfile_serialization=False)),
        "npy": saved(lambda file: np.save(file, array, allow_pickle=True)),
        "npz": saved(lambda file: np.savez(file, allow_pickle=True, index=array, cls=array, mean=array)),
        "py": f"import os\nopen({str(marker)!r}, 'w').close()\n".encode(),
    }


def test_what_is_planted_would_run(tmp_path: Path) -> None:
    unsafe: dict[str, Callable[[io.BytesIO], object]] = {
        "pt": lambda file: torch.load(file, weights_only=False),
        "pth": lambda file: torch.load(file, weights_only=False),
        "npy": lambda file: np.load(file, allow_pickle=True),
        "npz": lambda file: np.load(file, allow_pickle=True)["mean"],
        "py": lambda file: exec(file.read()),
    }
    for suffix, content in plants(tmp_path / "marker").items():
        unsafe.get(suffix, pickle.load)(io.BytesIO(content))
        assert (tmp_path / "marker").exists(), suffix
        (tmp_path / "marker").unlink()


@pytest.fixture(scope="module")
def home(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that a command reads, and the memory of it in the user's cache directory. Never changed."""
    root = tmp_path_factory.mktemp("home")
    quiet, shapes = Console(quiet=True), "shapes:count=12,size=32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "memory"))
        draw(root / "pictures")
        make_cache(open_dataset(str(root / "pictures")), root / "cache", (32, 32), per_shard=4)
        tar(root / "tars" / "0.tar", {path.name: path.read_bytes() for path in (root / "pictures" / "cats").iterdir()})

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
        assert call("stats", root / "tars") == call("stats", root / "pictures") == 0
    return root


def draw(folder: Path) -> None:
    for number in range(8):
        path = folder / ("cats", "dogs")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 36, 3), np.uint8)).save(path)


def tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is interrupted the second time that it is called."""
    calls: list[int] = []

    def instead(*given: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return function(*given)

    return instead


def call(*args: object) -> int:
    """Call a command. Whatever it finds, it ends with a status, and not with a traceback."""
    status = cli.main([str(arg) for arg in args])
    assert status in (0, 1, 130)
    return status


SHAPES = ("--train", "shapes:count=12,size=32", "--test", "shapes:count=12,size=32")
CPU = ("--device", "cpu", "--precision", "fp32")


def commands(run: Path, home: Path, out: Path) -> dict[str, list[object]]:
    """What takes a run or a folder of weights."""
    pictures = home / "pictures"
    begin = ["pretrain", home / "run.json", "--steps", 1, "--out", out / "begun", "--init", run]
    return {
        "report": ["report", run, "--out", out / "report.html"],
        "reconstruct": ["reconstruct", run, pictures, "--out", out / "r.png", "--count", 1],
        "attention": ["attention", run, pictures, "--out", out / "a.png", "--count", 1],
        "embed": ["embed", run, "--data", pictures, "--out", out / "e.npy", "--batch-size", 3, *CPU],
        "import": ["import", run, "--to", out / "imported"],
        "export": ["export", run, "--to", "timm", "--out", out / "exported"],
        "evaluate": ["evaluate", "knn", run, *SHAPES, "--untrained", "--out", out / "knn", *CPU],
        "finetune": ["evaluate", "finetune", run, *SHAPES, "--epochs", 1, "--batch-size", 4, "--out", run, *CPU],
        "init": begin,
        "out": ["pretrain", home / "run.json", "--out", run],
        "resume": ["pretrain", "--resume", run],
    }


@pytest.fixture
def marker(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the plants of a test would leave a file. None does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shutil.copytree(home / "memory", tmp_path / "memory")))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def without_page(patch: pytest.MonkeyPatch) -> None:
    """Commands that write a report at their end do without: `report` itself is called where it matters."""
    patch.setattr("pixmim.report.write_report", lambda folders, out, *_: out)
    patch.setattr("pixmim.report.results_table", lambda folders, width, *_: "")


def beside(folder: Path, marker: Path) -> None:
    """Plant files under names that libraries look for into every folder, and a checkpoint as torch writes it."""
    planted = plants(marker)
    names = {
        "pkl": ("data.pkl", ".metadata", "__0_0.distcp", "optimizer.bin", "tokenizer.pkl"),
        "pt": ("model.pt", "rank-00001.safetensors", "training_args.bin"),
        "pth": ("latest.pth", "zz.pth"),
        "py": ("__init__.py", "conftest.py", "sitecustomize.py", "hubconf.py", "modeling_x.py", "torch.py", "a.pth"),
        "npy": ("labels.dat", "index.npy.bak"),
    }
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for suffix, several in names.items():
            for name in several:
                (place / name).write_bytes(planted[suffix])
        sums = {name: zlib.crc32(planted["pkl"]) for name in (".metadata", "__0_0.distcp")}
        (place / "sums.json").write_text(json.dumps(sums))


def test_what_lies_beside_is_left_alone(home: Path, tmp_path: Path, marker: Path) -> None:
    """Also in the folder that the commands are called in. Everything still does its work."""
    run = Path(shutil.copytree(home / "finished", tmp_path / "run"))
    beside(run, marker)
    os.chdir(run)
    for name, command in commands(run, home, tmp_path / "out").items():
        with pytest.MonkeyPatch.context() as patch:
            if name != "report":
                without_page(patch)
            assert call(*command) == 0, name


def test_checkpoints_of_torch_are_not_opened(home: Path, tmp_path: Path, marker: Path) -> None:
    """As the attack was: a run whose checkpoint is a pickle, sums and all."""
    run = Path(shutil.copytree(home / "broken", tmp_path / "run"))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    for path in checkpoint.iterdir():
        path.unlink()
    beside(run, marker)
    for name in ("reconstruct", "import", "export", "evaluate", "init", "resume"):
        assert call(*commands(run, home, tmp_path / "out")[name]) == 1, name
    assert call("report", run) == 0


SLOW = {
    "report": ("config.json", "metrics.jsonl", "knn.json", "step-000000004/"),
    "finetune": ("unfinished/", "encoder/model.safetensors"),
    "init": ("step-000000002", "config.json", "model.safetensors"),
    "out": ("step-000000002", "config.json", "metrics.jsonl"),
    "resume": ("step-000000002", "config.json", "metrics.jsonl"),
}
"""Commands that take seconds, and what they read; all others are called whatever is planted."""


def not_read(path: str, name: str) -> bool:
    if path.startswith("unfinished/"):
        return name != "finetune"
    return name in SLOW and not any(part in path for part in SLOW[name])


def planted(
    folder: Path,
    marker: Path,
    called: Callable[[Path, Path], dict[str, list[object]]],
    skip: Callable[[str, str], bool] = lambda path, name: False,
) -> None:
    """Replace each file of a folder in turn, by another plant for each command, and call the command.

    called  of a copy of the folder, and of one for what is written: the commands by name
    skip    of a file and a command: whether that one does not read it, and takes long
    """
    kinds, raised = cycle(plants(marker).items()), list[str]()
    copy, out = marker.parent / "copy" / folder.name, marker.parent / "out"
    for path in sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()):
        for name, command in called(copy, out).items():
            if skip(path, name):
                continue
            shutil.copytree(folder, copy)
            suffix, content = next(kinds)
            (copy / path).write_bytes(content)
            raised += tracebacks(name, path, command)
            shutil.rmtree(copy.parent)  # with what the command wrote beside it
            shutil.rmtree(out, ignore_errors=True)
            assert not marker.exists(), (path, suffix, name)
    assert raised == []


def tracebacks(name: str, path: str, command: list[object]) -> list[str]:
    """Call a command that reads a planted file, and give what it raises."""
    with pytest.MonkeyPatch.context() as patch:
        if name != "report":
            without_page(patch)
        try:
            call(*command)
        except Exception as error:
            return [f"{name}, {path}: {type(error).__name__}: {error}"]
    return []


@pytest.mark.parametrize("folder", ["finished", "broken", "imported"])
def test_each_file_of_a_run(folder: str, home: Path, marker: Path) -> None:
    planted(
        home / folder,
        marker,
        lambda copy, out: commands(copy, home, out),
        not_read,
    )


def test_all_a_file_of_weights_may_be(home: Path, tmp_path: Path, marker: Path) -> None:
    """Every plant under every name that weights have, alone and in a folder, and with a config.json beside it."""
    names = ("model.safetensors", "pytorch_model.bin", "x.pth", "x.pt", "x.ckpt", "x.pkl", "x.npz", "x")
    for suffix, content in plants(marker).items():
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
    """What takes a data set."""
    return {
        "stats": ["stats", data, "--threads", 1],
        "cache": ["cache", data, out / "cache", "--size", 16, "--threads", 1],
        "bench-data": ["bench-data", data, "--size", 32, "--seconds", 1e-6, "--threads", 1],
        "embed": ["embed", home / "imported", "--data", data, "--out", out / "e.npy", *CPU],
        "knn": ["evaluate", "knn", home / "imported", "--train", data, "--test", data, "--out", out / "knn", *CPU],
        "pretrain": ["pretrain", home / "run.json", "--data", data, "--steps", 1, "--out", out / "run"],
        "coverage": ["coverage", data, "--size", 32, "--out", out / "coverage"],
    }


def test_pictures(home: Path, tmp_path: Path, marker: Path) -> None:
    """Every plant as every kind of file, among real pictures: some are bad, and nothing else happens."""
    data = Path(shutil.copytree(home / "pictures", tmp_path / "data"))
    for suffix, content in plants(marker).items():
        for extension in EXTENSIONS:
            (data / "cats" / f"{suffix}.{extension}").write_bytes(content)
    beside(data, marker)
    for name, command in data_commands(data, home, tmp_path / "out").items():
        assert tracebacks(name, str(data), command) == []


def test_files_that_are_a_data_set(home: Path, tmp_path: Path, marker: Path) -> None:
    """A list of files, boxes of objects, annotations, a tar, pictures of several kinds: each is a plant."""
    for suffix, content in plants(marker).items():
        for extension in (*EXTENSIONS, "parquet", "arrow"):
            path = tmp_path / f"x.{extension}"
            path.write_bytes(content)
            for name in ("stats", "coverage"):
                assert tracebacks(name, str(path), data_commands(path, home, tmp_path / "out")[name]) == [], suffix


@pytest.mark.parametrize("folder", ["cache", "tars"])
def test_each_file_of_a_cache_and_of_tars(folder: str, home: Path, marker: Path) -> None:
    planted(home / folder, marker, lambda copy, out: data_commands(copy, home, out))


def test_what_tars_hold(home: Path, tmp_path: Path, marker: Path) -> None:
    """Members under names that others unpickle."""
    for suffix, content in plants(marker).items():
        names = [*EXTENSIONS, "cls", "pyd", "pickle", "pkl", "pth", "ten", "npz", "mp", "cbor", "index", suffix]
        files = {f"{number:04d}.{name}": content for number, name in enumerate(names)}
        files |= {f"good.{name}": content for name in ("cls", "json", "pyd", "pickle")}
        files |= {"good.jpg": (home / "pictures" / "cats" / "0.jpg").read_bytes()}
        tar(tmp_path / "tars" / f"{suffix}.tar", files)
    data = tmp_path / "tars"
    for name, command in data_commands(data, home, tmp_path / "out").items():
        assert tracebacks(name, str(data), command) == []


def test_each_file_in_the_users_cache_directory(home: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of tars, statistics, and which runs were made here."""
    known = {path.parent.name for path in (home / "memory" / "pixmim").rglob("*") if path.is_file()}
    assert {"tars", "stats"} <= known
    monkeypatch.setenv("XDG_CACHE_HOME", str(marker.parent / "copy" / "memory"))

    def called(copy: Path, out: Path) -> dict[str, list[object]]:
        kinds = {name: data_commands(home / name, home, out) for name in ("pictures", "tars")}
        return {f"{name} {data}": kinds[data][name] for data in kinds for name in ("stats", "pretrain")}

    planted(home / "memory", marker, called)


def test_unfinished_embeddings(home: Path, marker: Path) -> None:
    """Kept beside the file to come, from a command that was interrupted."""
    command = ["embed", home / "imported", "--data", home / "pictures", "--batch-size", 3, *CPU, "--out"]
    planted(home / "e.npy.partial", marker, lambda copy, out: {"embed": [*command, copy.with_suffix("")]})


def test_data_sets_of_hugging_face(home: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved to disk and as parquet: each file in turn, scripts beside them, pickles as pictures and as types."""
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "library"))
    datasets.disable_progress_bars()
    pictures = [{"bytes": path.read_bytes(), "path": path.name} for path in (home / "pictures" / "cats").iterdir()]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cats"])})
    library = datasets.Dataset.from_dict({"image": pictures, "label": [0] * len(pictures)}, features=kinds)
    library.save_to_disk(tmp_path / "set" / "saved")
    library.to_parquet(tmp_path / "set" / "tables" / "train.parquet")
    for form in ("saved", "tables"):
        planted(tmp_path / "set" / form, marker, lambda copy, out: {"stats": data_commands(copy, home, out)["stats"]})
    beside(tmp_path / "set", marker)
    for name in ("saved", "tables", "set"):
        for folder in ("saved", "tables"):
            (tmp_path / "set" / folder / f"{name}.py").write_bytes(plants(marker)["py"])
    for content in plants(marker).values():
        rows = [{"bytes": content, "path": "x.jpg"}, pictures[0], {"bytes": content, "path": "x.npy"}]
        typed = arrow.field("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))
        typed = typed.with_metadata(
            {
                "ARROW:extension:name": "arrow.py_extension_type",
                "ARROW:extension:metadata": content,
            }
        )
        table = arrow.table([rows], schema=arrow.schema([typed]))
        arrow.parquet.write_table(table, tmp_path / "typed.parquet")
        assert tracebacks("stats", "typed.parquet", ["stats", tmp_path / "typed.parquet"]) == []
    for folder in ("saved", "tables"):
        called = data_commands(tmp_path / "set" / folder, home, tmp_path / "out")
        assert tracebacks("stats", folder, called["stats"]) + tracebacks("pretrain", folder, called["pretrain"]) == []


def test_the_current_folder_does_not_configure_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")  # would run LaTeX for every label
    code = "import os, pixmim.utils.plotting as p; print(p.matplotlib.rcParams['text.usetex'], os.getcwd())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"False {tmp_path}\n"
