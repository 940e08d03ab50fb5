"""Test the public API, as a notebook uses it."""

import importlib
import inspect
import io
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from jaxtyping import TypeCheckError
from PIL import Image
from rich.console import Console

import pixmim
from pixmim import api
from pixmim.config import ModelConfig, OnlineKnnConfig, OptimConfig, PretrainConfig
from pixmim.config_io import from_json, to_json
from pixmim.data.dataset import RGB
from pixmim.run_folder import finish_run
from pixmim.utils.errors import UserError
from pixmim.weights.detect import Weights
from pixmim.weights.load import import_weights

Make = Callable[..., PretrainConfig]
QUIET = Console(quiet=True)
LABELLED = {"train": "shapes:count=30,size=32", "test": "shapes:count=20,size=32,seed=1"}


@pytest.fixture(scope="module")
def result(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> pixmim.PretrainResult:
    out = tmp_path_factory.mktemp("api") / "run"
    return pixmim.pretrain(tiny_run(log_every=2), out, console=QUIET)


def test_no_module_has_a_public_name() -> None:
    """Importing a module would replace the public function of its name."""
    assert not {one.name for one in pkgutil.iter_modules(pixmim.__path__)} & set(pixmim.__all__)


def test_every_public_name_is_documented() -> None:
    for name in pixmim.__all__:
        assert getattr(pixmim, name).__doc__, name


def test_a_recipe_takes_dotted_and_nested_overrides() -> None:
    config = pixmim.get_recipe(
        "demo", data=Path("photos"), epochs=3, optim={"base_lr": 1e-3}, mean=[0.1, 0.2, 0.3], **{"crop.flip": 0.0}
    )
    base = pixmim.get_recipe("demo")
    assert config == replace(
        base,
        data="photos",
        epochs=3.0,
        steps=None,
        mean=(0.1, 0.2, 0.3),
        optim=replace(base.optim, base_lr=1e-3),
        crop=replace(base.crop, flip=0.0),
    )
    assert pixmim.get_recipe("demo", model={"options": {"depth": 2}}).model.options == base.model.options | {"depth": 2}
    assert pixmim.get_recipe("demo", knn={"train": Path("a")}).knn.train == "a"
    assert pixmim.get_recipe("demo", channels=4, mean=(0.5,) * 4).channels == 4  # checked together


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batchsize": 3}, "did you mean 'batch_size'"),
        ({"optim.base_lrr": 3}, "optim.base_lrr.*did you mean 'base_lr'"),
        ({"optim": 3}, "'optim' must be an object"),
        ({"steps": 3, "epochs": 3}, "not both"),
    ],
)
def test_a_mistake_in_an_override_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pixmim.get_recipe("demo", **overrides)


def test_the_result_holds_encoder_and_metrics(result: pixmim.PretrainResult) -> None:
    assert result.finished and result.step == 6 and (result.folder / "report.html").exists()
    assert [line["step"] for line in result.metrics] == [2, 4, 6]
    encoder = result.encoder
    assert not encoder.training and encoder is result.encoder
    data = timm.data.resolve_model_data_config(encoder)
    assert data["input_size"] == (3, 32, 32) and data["mean"] == (0.485, 0.456, 0.406)
    again = timm.create_model(f"local-dir:{result.folder}/encoder", pretrained=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_callbacks_see_each_step_and_each_record(tiny_run: Make, tmp_path: Path) -> None:
    records, steps = list[dict[str, Any]](), list[int]()
    run = tiny_run(log_every=3, knn=OnlineKnnConfig(**LABELLED, every=0.6))
    done = pixmim.pretrain(run, tmp_path, on_log=records.append, on_step_end=steps.append, console=QUIET, report=False)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert records == done.metrics and sum("knn/k1/mean/top1" in record for record in records) == 3


def test_another_runs_folder_is_refused(result: pixmim.PretrainResult, tiny_run: Make) -> None:
    before = (result.folder / "config.json").read_text()
    for changes in (
        {"seed": 1},
        {"data": "shapes:count=41,size=32"},
        {"steps": 9},
        {"optim": OptimConfig(base_lr=0.1)},
    ):
        with pytest.raises(UserError, match=f"holds a run with another --{next(iter(changes))}"):
            pixmim.pretrain(tiny_run(**changes), result.folder, console=QUIET)
    with pytest.raises(UserError, match="--seed cannot change"):
        pixmim.pretrain(tiny_run(seed=1), result.folder, resume=True, console=QUIET)
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        pixmim.pretrain(tiny_run(), result.folder / "new", resume=True, console=QUIET)
    assert (result.folder / "config.json").read_text() == before and not (result.folder / "new").exists()


def test_python_and_the_command_line_make_the_same_folder(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixmim import cli

    timed = {"images_per_s", "data_wait_fraction"}

    def content(folder: Path) -> dict[str, Any]:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        lines = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
        page = files.pop("report.html")  # its curve of images/s is a measurement
        assert b"pixmim" in page
        return files | {"metrics": [{k: v for k, v in line.items() if k not in timed} for line in lines]}

    run = tiny_run(steps=2, knn=OnlineKnnConfig(**LABELLED), checkpoint=replace(tiny_run().checkpoint, every=1))
    for name in ("python", "cli"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "python":
            pixmim.pretrain(run, "run", console=QUIET)
        else:
            Path("run.json").write_text(to_json(run))
            assert cli.main(["pretrain", "run.json", "--out", "run"]) == 0
    python, command = content(tmp_path / "python" / "run"), content(tmp_path / "cli" / "run")
    assert python.keys() == command.keys()
    different = {name for name in python if python[name] != command[name]}
    assert not different


def test_an_encoder_is_evaluated_from_memory_as_from_its_folder(result: pixmim.PretrainResult, tmp_path: Path) -> None:
    result.encoder.train()
    scores = pixmim.evaluate(result.encoder, "knn", **LABELLED, device="cpu", console=QUIET)
    assert result.encoder.training
    result.encoder.eval()
    same = pixmim.evaluate(result, "knn", **LABELLED, device="cpu", out=tmp_path, console=QUIET)
    assert scores == same and 0 <= scores["k20/mean/top1"] <= 100
    assert list((tmp_path / "evaluations").glob("knn-*.json"))
    for name, settings in (("kn", LABELLED), ("knn", LABELLED | {"tets": ""})):
        with pytest.raises(UserError, match="did you mean"):
            pixmim.evaluate(result, name, **settings)
        with pytest.raises(UserError, match="did you mean"):
            pixmim.evaluate_to_folder([result.folder], name, tmp_path, **settings)
    with pytest.raises(UserError, match="no evaluation 'all'"):
        pixmim.evaluate(result, "all", **LABELLED)


def test_a_timm_model_is_evaluated(result: pixmim.PretrainResult) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=0)
    assert "k20/mean/top1" in pixmim.evaluate(model, "knn", **LABELLED, device="cpu", console=QUIET)
    data = "shapes:count=3,size=32"
    expected = pixmim.embed(model, data, device="cpu", console=QUIET)[0]
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model), torch.compile(torch.nn.DataParallel(model))):
        assert np.array_equal(pixmim.embed(wrapped, data, device="cpu", console=QUIET)[0], expected)
    with pytest.raises(UserError, match="not a timm model"):
        pixmim.evaluate(torch.nn.Linear(2, 2), "knn", **LABELLED)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto"])
def test_a_timm_model_of_other_channels_or_precision_is_evaluated(name: str) -> None:
    options: Any = {"img_size": 32} if name.startswith("vit") else {}
    module: Any = timm.create_model(name, in_chans=2, num_classes=0, **options)
    rows, _ = pixmim.embed(module.half(), "shapes:count=3,size=32", device="cpu", precision="fp32", console=QUIET)
    expected, _ = pixmim.embed(module.float(), "shapes:count=3,size=32", device="cpu", precision="fp32", console=QUIET)
    assert rows.shape == (3, module.num_features) and np.array_equal(rows, expected)


@pytest.mark.parametrize("setting", ["no_grad", "inference_mode", "autocast", "dtype", "device"])
def test_torchs_settings_of_a_notebook_change_no_result(
    setting: str, result: pixmim.PretrainResult, tiny_run: Make, tmp_path: Path
) -> None:
    contexts: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "dtype": torch_dtype(torch.float64),
        "device": torch.device("meta"),
    }
    with contexts[setting]:
        run = pixmim.pretrain(tiny_run(log_every=2), tmp_path, console=QUIET, report=False)
        rows, _ = pixmim.embed(result.encoder, "shapes:count=3,size=32", console=QUIET)
        encoder = run.encoder
        assert torch.get_default_dtype() == (torch.float64 if setting == "dtype" else torch.float32)
        assert torch.is_autocast_enabled("cpu") == (setting == "autocast")
        assert torch.is_grad_enabled() == (setting not in ("no_grad", "inference_mode"))
        assert torch.get_default_device().type == ("meta" if setting == "device" else "cpu")
    names = ("step", "loss", "grad_norm")
    assert [[line[n] for n in names] for line in run.metrics] == [[line[n] for n in names] for line in result.metrics]
    assert np.array_equal(rows, pixmim.embed(result, "shapes:count=3,size=32", console=QUIET)[0])
    encoder(torch.rand(1, 3, 32, 32)).sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in encoder.blocks.parameters())  # type: ignore


@contextmanager
def torch_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_result_is_a_path_from_any_folder(tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = pixmim.pretrain(
        tiny_run(steps=2, log_every=1), "run", console=QUIET, on_step_end=lambda step: os.chdir(tmp_path / "elsewhere")
    )
    assert run.finished and run.config.out == "run" and not list(Path().iterdir())
    assert os.fspath(run) == str(tmp_path / "run") and [line["step"] for line in run.metrics] == [1, 2]
    expected = run.encoder.state_dict()
    for module in (pixmim.load_encoder(run), pixmim.load_model(run).encoder):
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    monkeypatch.chdir(tmp_path)
    (folder,), _ = pixmim.evaluate_to_folder(run, "knn", console=QUIET, **LABELLED)
    (file,) = (tmp_path / "run" / "evaluations").glob("knn-*.json")
    assert folder == Path("run") and json.loads(file.read_text())["model"] == "run"  # as from the command line
    assert pixmim.get_recipe("demo", init=run).init == str(tmp_path / "run")


def test_numbers_are_those_of_any_library() -> None:
    plain: Any = {"batch_size": 16, "size": "32x64", "std": (0.25, 0.5, 0.25), "model": {"options": {"depth": 3}}}
    expected = pixmim.get_recipe("demo", **plain)
    std, options = np.array([0.25, 0.5, 0.25], np.float32), {"depth": np.int8(3)}
    for changes in (
        {"batch_size": np.int64(16), "size": np.array([32, 64]), "std": std, "model": {"options": options}},
        {"batch_size": torch.tensor(16), "size": [np.int64(32), 64], "std": [*std], "model.options": options},
    ):
        assert pixmim.get_recipe("demo", **changes) == expected
    settings = {"labelled": "a", "k": np.array([1, 5]), "shots": [2, "all"], "split": np.float32(0.5)}
    ((_, found),) = api._evaluations("knn", settings)
    assert (found.k, found.shots, found.split) == ((1, 5), "2,all", 0.5)
    ((_, found),) = api._evaluations("knn", {**LABELLED, "k": 5, "layers": range(1, 3)})
    assert (found.k, found.layers) == ((5,), "1,2")
    assert pixmim.get_recipe("demo", stretch=(1, 99), bands=1, first_sizes=[8, 16]).first_sizes == "8,16"
    sizes = {"img_size": np.int64(32), "depth": np.int64(1), "decoder_depth": 1}
    model = pixmim.create_model("mae", "vit_tiny_patch16_224", **sizes)
    assert len(model.encoder.blocks) == 1  # type: ignore[arg-type]


def test_what_is_assumed_and_skipped_is_printed(result: pixmim.PretrainResult, pictures: Path) -> None:
    (pictures / "cats" / "0.jpg").write_bytes(b"")
    files, known = sorted(pictures.rglob("*.jpg")), f"{result.folder}: step 6 of 6"
    for model in (result, str(result.folder), result.encoder):
        console = Console(file=io.StringIO(), width=200)
        _, paths = pixmim.embed(model, (file for file in files), console=console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert len(paths) == 9 and (known in text) == (model is not result.encoder)
        first = " ".join(map(str, files[:3]))
        assert f"1 of the 10 images of {first} and 7 more are skipped: 1 x " in text
    console = Console(file=io.StringIO(), width=200)
    pixmim.evaluate(result, "knn", console=console, **LABELLED)
    assert known in console.file.getvalue()  # type: ignore[attr-defined]


def test_wrong_values_are_refused_as_by_the_command(result: pixmim.PretrainResult, tmp_path: Path) -> None:
    folder, data = str(result.folder), "shapes:count=4,size=32"
    calls: list[tuple[str, Callable[[], object]]] = [
        ("features must be one of", lambda: pixmim.embed(folder, data, features="Mean")),  # type: ignore[arg-type]
        ("precision must be one of", lambda: pixmim.embed(folder, data, precision="float32")),  # type: ignore[arg-type]
        ("batch_size must be", lambda: pixmim.embed(folder, data, batch_size=0)),
        ("count must be", lambda: pixmim.reconstruct(folder, data, count=0)),
        ("--images must be", lambda: pixmim.advise(data, images=0)),
        ("no model is given", lambda: pixmim.evaluate_to_folder([], "knn", **LABELLED)),
        ("no images given", lambda: pixmim.embed(result, [], console=QUIET)),
        ("not a module", lambda: pixmim.reconstruct(result.encoder, data)),  # type: ignore[arg-type]
    ]
    (tmp_path / "f.csv").write_text("mine")
    file = tmp_path / "f.csv"
    calls.append(("is not a folder", lambda: pixmim.evaluate(folder, "knn", out=file, **LABELLED)))
    calls.append(("did you mean 'epochs'", lambda: pixmim.evaluate(folder, "finetune", epoch=1, **LABELLED)))
    for message, call in calls:
        with pytest.raises((UserError, TypeCheckError), match=f"{message}|violates type hint"):
            call()


def test_values_of_wrong_types_are_refused(result: pixmim.PretrainResult) -> None:
    dataset = pixmim.open_dataset("shapes:count=4")
    images = [None, np.zeros((2, 8, 8, 3), np.uint8), torch.zeros(2, 3, 8, 8), Image.new("RGB", (8, 8)), dataset]
    calls: list[tuple[str, Callable[..., Any], Any]] = [
        *(("a model is a module", api._file, each) for each in (None, 3, b"a", ["a"], result.encoder.state_dict())),
        *(("images are given as", partial(untyped(api._open), spec=RGB, console=QUIET), each) for each in images),
        *(("data are one folder", untyped(pixmim.open_dataset), each) for each in (None, b"a", ["a", "b"])),
        ("data are one folder", untyped(pixmim.advise), ["a"]),
        *(("needs a PretrainConfig", untyped(pixmim.pretrain), each) for each in ("demo", ModelConfig(), {})),
        *(("there is no recipe", untyped(pixmim.get_recipe), each) for each in (None, 3)),
    ]
    for message, call, value in calls:
        with pytest.raises(UserError, match=message):
            call(value)


def untyped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function without the type checks of tests, which users do not have."""
    return inspect.unwrap(function)


def test_settings_of_python_are_those_of_the_command() -> None:
    for settings in ({"epochs": 3, "mixup": 0.5}, {"changes": {"epochs": 3, "mixup": 0.5}}):
        ((name, found),) = api._evaluations("finetune", {**LABELLED, **settings, "size": 48})
        assert name == "finetune" and (found.changes.epochs, found.changes.mixup, found.size) == (3, 0.5, "48")
    ((_, found),) = api._evaluations("knn", {**LABELLED, "k": [1, 5]})
    assert found.k == (1, 5)
    names = {name: settings for name, settings in api._evaluations("all", {"labelled": "shapes:count=40,size=32"})}
    assert names["shape-bias"].train.startswith("split:train") and names["shape-bias"].train.endswith("texture=match")
    mixed = {"train": "shapes:+shapes:seed=3*2", "test": "shapes:seed=1"}
    ((_, bias),) = [one for one in api._evaluations("all", mixed) if one[0] == "shape-bias"]
    assert (bias.train, bias.data) == (
        "shapes:texture=match+shapes:seed=3,texture=match*2",
        "shapes:seed=1,texture=conflict",
    )


def test_each_model_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["runs/模型一", "runs/模型二", "m_1", "m-1", "runs/a b", "runs/a-b", "runs/a/b", "..", "läuf/ä", "läuf/ö"]
    folders = api._result_folders(names, tmp_path)
    assert len({*folders.values()}) == len(names) and all(folder.parent == tmp_path for folder in folders.values())
    assert folders["runs/模型一"].name == "runs-模型一" and tmp_path not in folders.values()
    monkeypatch.chdir(tmp_path)
    first = api._result_folders(["w_1.pth"], None)["w_1.pth"]
    assert first == Path("evaluations/w_1.pth")
    (first / "evaluations").mkdir(parents=True)
    (first / "evaluations/knn.json").write_text('{"model": "w_1.pth"}')
    assert api._result_folders(["w_1.pth"], None)["w_1.pth"] == first
    assert api._result_folders(["/w_1.pth"], None)["/w_1.pth"] != first  # in a call of its own


def test_one_model_is_a_list_of_one_and_a_home_folder_is_found(
    result: pixmim.PretrainResult, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folders, page = pixmim.evaluate_to_folder(result.folder, "knn", "~/knn", console=QUIET, **LABELLED)
    assert (folders, page) == ([tmp_path / "knn"], tmp_path / "knn/report.html")
    pixmim.evaluate(result, "knn", out="~/one", console=QUIET, **LABELLED)
    pixmim.embed_to_file(result, "shapes:count=2,size=32", "~/x.npy", console=QUIET)
    run = pixmim.pretrain(tiny_run(steps=1), "~/run", console=QUIET, report=False)
    assert run.folder == tmp_path / "run" and finish_run("~/run", console=QUIET).folder == run.folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["knn", "one", "run", "x.csv", "x.npy"]


def test_embed_returns_a_row_for_each_readable_image(
    result: pixmim.PretrainResult, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "cats" / "0.jpg").write_bytes(b"")
    features, paths = pixmim.embed(result.encoder, pictures, device="cpu", batch_size=4, console=QUIET)
    assert features.shape == (9, 32) and features.dtype == np.float32
    assert [Path(path).name for path in paths] == [f"{i}.jpg" for i in (1, 2, 3, 4, 0, 1, 2, 3, 4)]
    both, _ = pixmim.embed(result, [*map(Path, paths)], features="both", device="cpu", console=QUIET)
    np.testing.assert_allclose(both[:, 32:], features, atol=1e-5)


def test_embed_to_file_writes_the_rows_of_embed(result: pixmim.PretrainResult, pictures: Path, tmp_path: Path) -> None:
    rows, _ = pixmim.embed(result, pictures, device="cpu", console=QUIET)
    pixmim.embed_to_file(result, pictures, tmp_path / "f.npy", features="mean", device="cpu", console=QUIET)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), rows, atol=1e-6)
    with pytest.raises(UserError, match="--overwrite"):
        pixmim.embed_to_file(result, pictures, tmp_path / "f.npy", device="cpu", console=QUIET)


def test_reconstruct_returns_an_image(result: pixmim.PretrainResult, pictures: Path) -> None:
    two, one = (pixmim.reconstruct(result, pictures, count=count) for count in (2, 1))
    assert isinstance(two, Image.Image) and two.height > one.height


def test_a_configuration_carries_its_version() -> None:
    content = json.loads(to_json(PretrainConfig()))
    assert (content["type"], content["version"]) == ("pixmim.PretrainConfig", 1)
    for change in ({"version": 2}, {"version": True}, {"version": None}):
        with pytest.raises(UserError, match="version"):
            from_json(json.dumps(content | change))
    with pytest.raises(UserError, match='"type"'):
        from_json(json.dumps({"architectures": ["ViT"]}))


def test_a_model_config_states_no_training() -> None:
    config = ModelConfig()
    text = to_json(config)
    assert from_json(text) == config and type(from_json(text)) is ModelConfig
    assert not {"epochs", "batch_size", "optim", "data"} & json.loads(text).keys()


def test_imported_weights_state_no_training(result: pixmim.PretrainResult, tmp_path: Path) -> None:
    config = ModelConfig(model=result.config.model, size="32")
    tensors = {f"encoder.{name}": value for name, value in result.encoder.state_dict().items()}
    import_weights(Weights(config, tensors, "a test"), tmp_path / "back")
    pixmim.evaluate(tmp_path / "back", "knn", **LABELLED, device="cpu", out=tmp_path, console=QUIET)
    (kept,) = (tmp_path / "evaluations").glob("*.json")
    for known in (json.loads((tmp_path / "back" / "config.json").read_text()), json.loads(kept.read_text())["config"]):
        assert not {"epochs", "batch_size", "optim", "recipe"} & known.keys() and known["target"] is None
    with pytest.raises(UserError, match="imported weights"):
        pixmim.pretrain(result.config, tmp_path / "back", resume=True, console=QUIET)


def test_the_package_imports_without_torch() -> None:
    code = "import sys, pixmim; assert not {'torch', 'numpy'} & set(sys.modules); pixmim.get_recipe('demo')"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)
    assert importlib.import_module("pixmim.pretraining").pretrain is pixmim.pretrain
