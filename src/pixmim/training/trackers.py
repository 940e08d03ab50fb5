"""Experiment trackers: pass the records of metrics.jsonl, the configuration and images to other libraries."""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from pixmim.config_io import flatten
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, did_you_mean, first_line
from pixmim.utils.files import read_text, write_text_atomically
from pixmim.utils.trust import inside

if TYPE_CHECKING:
    from PIL.Image import Image

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

PROJECT = "pixmim"
"""Default project, or MLflow experiment; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME override it."""

ID_FILE = "tracking_id"


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = start + 1 if start else 0  # readers drop earlier events of this step and later ones
        self._writer = SummaryWriter(str(inside(folder, "tensorboard")), purge_step=purge_step)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: "Image") -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, with its files in the run's folder. WANDB_MODE=offline needs no account."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int, run_id: str) -> None:
        self._wandb: Any = import_module("wandb")
        inside(folder, "wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.absolute().name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
            reinit="create_new",  # leaves a run of the caller open
            settings=self._wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own step cannot decrease, unlike that of a resumed run

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def log_image(self, step: int, name: str, image: "Image") -> None:
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of an MLflow experiment, at MLFLOW_TRACKING_URI or in the current folder."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int, run_id: str) -> None:
        mlflow: Any = import_module("mlflow")
        self._metric: Any = import_module("mlflow.entities").Metric
        self._client, self._pending = mlflow.MlflowClient(), list[Any]()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self._client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`pixmim.id` = '{run_id}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            name, tags = folder.absolute().name, {"pixmim.id": run_id}
            self._id = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
            for key, value in flatten(config):  # cannot be changed later
                self._client.log_param(self._id, key, value)
        self._client.log_dict(self._id, config, "config.json")

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._pending.append(self._client.log_batch(self._id, metrics=metrics, synchronous=False))

    def log_image(self, step: int, name: str, image: "Image") -> None:
        self._client.log_image(self._id, image, artifact_file=f"{name}.png")

    def close(self) -> None:
        for operation in self._pending:
            operation.wait()
        self._client.set_terminated(self._id)


class Trackio:
    """A run of Trackio, on this machine or in the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: Path, config: dict[str, Any], start: int, run_id: str) -> None:
        self._trackio: Any = import_module("trackio")
        name = f"{folder.absolute().name}-{run_id}"  # Trackio resumes a run by its name
        self._run = self._trackio.init(project=PROJECT, name=name, config=config, resume="allow", embed=False)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_image(self, step: int, name: str, image: "Image") -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


Tracker = TensorBoard | WandB | MLflow | Trackio
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
"""Made with the folder of a run, the content of its config.json, the steps done before this process started (later ones
may be logged a second time), and an id that stays the same when the run is resumed. Any method may raise anything."""


class Trackers:
    """The trackers of a run. A tracker that fails is dropped with a warning, and never ends the run.

    Raises:
        UserError: If a tracker is unknown, or its library is not installed.
    """

    def __init__(self, names: Sequence[str], console: Console) -> None:
        self._names = dict.fromkeys((names,) if isinstance(names, str) else names)
        self._console, self._open = console, dict[str, Tracker]()
        for name in self._names:
            if name not in TRACKERS:
                raise UserError(
                    f"unknown tracker '{name}'{did_you_mean(name, TRACKERS)}; choose from {', '.join(TRACKERS)}"
                )
            if find_spec(name) is None:
                raise UserError(f"--track {name} needs another package: pip install 'pixmim[{name}]'")

    def open(self, folder: Path, config: dict[str, Any], start: int) -> None:
        """Open all trackers for a run that starts at step `start`."""
        for name in self._names:
            with self._guarded(name):
                self._open[name] = TRACKERS[name](folder, config, start, _run_id(folder))

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl."""
        values = {name: value for name, value in record.items() if name != "step"}
        self._for_each(lambda tracker: tracker.log(record["step"], values))

    def log_image(self, step: int, name: str, draw: "Callable[[], Image]") -> None:
        """Log an image, which is drawn only if a tracker is open. A UserError or OSError becomes a warning."""
        if self._open:
            try:
                image = draw()
            except (UserError, OSError) as error:
                self._warn(f"{name} are not sent to the trackers: {error}")
            else:
                self._for_each(lambda tracker: tracker.log_image(step, name, image))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self._for_each(lambda tracker: tracker.close())
        self._open.clear()

    def _for_each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                action(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Drop a tracker that fails, with a warning."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._warn(f"{name} failed, and receives no more records: {reason}")

    def _warn(self, text: str) -> None:
        print_plain(self._console, f"warning: {text}")


def _run_id(folder: Path) -> str:
    """Return the id of the run in a folder. The first call creates it."""
    path = inside(folder, ID_FILE)
    if not path.exists():
        write_text_atomically(path, secrets.token_hex(4))
    text = read_text(path, 100)
    if not re.fullmatch("[0-9a-f]{8}", text):
        raise UserError(f"{path} is not an id of eight hexadecimal digits: remove it to track a new run")
    return text
