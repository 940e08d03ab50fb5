"""Trackers, with the real libraries in their local and offline modes; what they wrote is read back."""

import importlib
import importlib.util
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import pixmim
from pixmim.config import OnlineKnnConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.training import trackers
from pixmim.training.trackers import TRACKERS, Trackers
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]
Scalars = dict[tuple[int, str], float]
INSTALLED = tuple(name for name in TRACKERS if importlib.util.find_spec(name))
KNN = OnlineKnnConfig(train="shapes:count=30,size=32", test="shapes:count=20,size=32,seed=1", every=0.6)


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"SKIPPED FOR WANT OF {name}: pip install 'pixmim[{name}]'")


def train(make: Make, out: Path, track: tuple[str, ...]) -> pixmim.PretrainResult:
    """Train four steps, and resume for two more."""
    config, console = make(log_every=2, knn=KNN, steps=4), Console(quiet=True)
    pixmim.pretrain(config, out, track=track, report=False, console=console)
    return pixmim.pretrain(replace(config, steps=6), out, resume=True, track=track, report=False, console=console)


@pytest.fixture(scope="module")
def tracked(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pixmim.PretrainResult]:
    """A run with each tracker that is installed."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("DO_NOT_TRACK", "true")  # the libraries' own telemetry
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.chdir(folder)
        yield train(tiny_run, folder / "photos", INSTALLED)


def expected(result: pixmim.PretrainResult) -> Scalars:
    return {(line["step"], name): value for line in result.metrics for name, value in line.items() if name != "step"}


def is_sheet(image: Image.Image) -> bool:
    return min(image.size) > 600  # six rows and six columns


@needs("tensorboard")
def test_tensorboard(tracked: pixmim.PretrainResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags: dict[str, Any] = events.Tags()
    found = {(each.step, tag): each.value for tag in tags["scalars"] for each in events.Scalars(tag)}
    assert found == pytest.approx(expected(tracked), rel=1e-6)  # TensorBoard keeps float32
    (text,) = {each.tensor_proto.string_val[0] for each in events.Tensors("config/text_summary")[-1:]}
    assert json.loads(text.decode().strip("`")) == json.loads(to_json(tracked.config))
    images = events.Images("reconstructions")
    assert [each.step for each in images] == [4, 6]
    assert is_sheet(Image.open(io.BytesIO(images[-1].encoded_image_string)))


@needs("wandb")
def test_wandb(tracked: pixmim.PretrainResult) -> None:
    record_type: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record

    found, ids, images, config = Scalars(), set[str](), list[int](), dict[str, Any]()
    for file in sorted(tracked.folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = record_type.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert (record.run.project, record.run.display_name) == ("pixmim", "photos")
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for name, text in items.items():
                value, step = json.loads(text), json.loads(items.get("step", "0"))
                if name.startswith("reconstructions/"):
                    images += [step] * name.endswith("/path")
                elif name != "step" and not name.startswith("_"):
                    found[step, name] = value
    assert found == expected(tracked) and images == [4, 6]
    assert ids == {(tracked.folder / "tracking_id").read_text()}
    wanted = json.loads(to_json(tracked.config))
    assert {name: config[name] for name in wanted} == wanted
    for file in tracked.folder.glob("wandb/offline-run-*/files/media/images/*.png"):
        assert is_sheet(Image.open(file))


@needs("mlflow")
def test_mlflow(tracked: pixmim.PretrainResult) -> None:
    from mlflow import MlflowClient

    client: Any = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("pixmim").experiment_id])
    assert run.info.run_name == "photos" and run.info.status == "FINISHED"
    history = [each for name in run.data.metrics for each in client.get_metric_history(run.info.run_id, name)]
    assert {(each.step, each.key): each.value for each in history} == expected(tracked)
    assert run.data.params["optim.base_lr"] == str(tracked.config.optim.base_lr)
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((artifacts / "config.json").read_text()) == json.loads(to_json(tracked.config))
    assert is_sheet(Image.open(artifacts / "reconstructions.png"))


@needs("trackio")
def test_trackio(tracked: pixmim.PretrainResult) -> None:
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs("pixmim")
    name = f"photos-{(tracked.folder / 'tracking_id').read_text()}"
    assert run.name == name and run.config is not None and run.config["optim"]["base_lr"] == 0.05
    found, images = Scalars(), list[int]()
    for entry in SQLiteStorage.get_logs("pixmim", name):
        for key, value in entry.items():
            if key == "reconstructions":
                images.append(entry["step"])
            elif key not in ("step", "timestamp"):
                found[entry["step"], key] = value
    assert found == expected(tracked) and images == [4, 6]


def test_tracking_changes_no_result(tracked: pixmim.PretrainResult, tiny_run: Make, tmp_path: Path) -> None:
    plain = train(tiny_run, tmp_path / "photos", ())
    weights = tracked.encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.encoder.state_dict().items())
    assert [line.get("loss") for line in plain.metrics] == [line.get("loss") for line in tracked.metrics]
    assert not (plain.folder / "tracking_id").exists()


class Failing:
    """Fails in one of its methods."""

    def __init__(self, at: str) -> None:
        self.calls, self._at = list[str](), at
        self._call("open")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._at:
            raise ConnectionError("no route\nto the server")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._call("log")

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self._call("log_image")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("at", ["open", "log", "log_image", "close"])
def test_a_tracker_that_fails_costs_one_warning(at: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = list[Failing]()

    def open_one(which: str) -> Callable[..., Failing]:
        return lambda *_: opened.append(one := Failing(which)) or one  # type: ignore[func-returns-value]

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setitem(TRACKERS, "wandb", open_one(at))
    monkeypatch.setitem(TRACKERS, "mlflow", open_one(""))
    console = Console(file=io.StringIO(), width=200)
    with Trackers(("wandb", "mlflow"), console) as both:
        both.open(tmp_path, {}, 0)
        for step in (1, 2):
            both.log({"step": step, "loss": math.nan})
        both.log_image(2, "reconstructions", lambda: Image.new("RGB", (4, 4)))
    warnings = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(warnings) == 1 and "wandb" in warnings[0] and "ConnectionError: no route" in warnings[0]
    assert opened[-1].calls == ["open", "log", "log", "log_image", "close"]


@pytest.mark.parametrize(("name", "match"), [("wandbb", "did you mean 'wandb'"), ("wandb", r"pixmim\[wandb\]")])
def test_a_tracker_that_cannot_be_is_refused_before_the_run(
    name: str, match: str, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=match):
        pixmim.pretrain(tiny_run(), tmp_path / "run", track=name, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@needs("tensorboard")
def test_trackers_write_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "elsewhere")
    console = Console(file=io.StringIO(), width=300)
    with Trackers(("tensorboard",), console) as one:
        one.open(tmp_path / "run", {}, 0)
        one.log({"step": 1, "loss": 1.0})
    assert "warning: tensorboard" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not any((tmp_path / "elsewhere").iterdir())


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, as W&B writes it: blocks of 32 KiB with a file header."""
    at, whole, size = 7, b"", 2**15
    while at < len(data):
        if size - at % size < 7:  # a header does not fit: the block ends here
            at += size - at % size
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield whole
            whole = b""
