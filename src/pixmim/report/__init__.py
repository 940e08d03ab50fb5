"""One self-contained HTML page for one run or several side by side."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.table import Table

from pixmim.config import Model, Run
from pixmim.data import open_data
from pixmim.data.pictures.decode import open_image
from pixmim.disk import read_file
from pixmim.engine.runlog import read_metrics
from pixmim.errors import UserError
from pixmim.models import SIMMIM_BEIT
from pixmim.parts import image_form
from pixmim.pretrained import open_model
from pixmim.report.figures import curve, png, sheet
from pixmim.report.reconstruct import COLUMNS, Reconstruction, reconstruct
from pixmim.report.results import Measured, compare, read_results, table
from pixmim.runfile import from_json
from pixmim.targets import in_bins

_ENVIRONMENT = jinja2.Environment(loader=jinja2.PackageLoader("pixmim", "report"), autoescape=True, trim_blocks=True)


@dataclass(frozen=True)
class _Story:
    """All that is known of one run, or of a model that was measured."""

    name: str
    folder: Path
    run: Run | None
    """None for a model that was measured only."""
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]
    pictures: Reconstruction | None
    problem: str
    skipped: int

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs and values of one metric."""
        lines = [line for line in self.metrics if key in line]
        return [line["epoch"] for line in lines], [line[key] for line in lines]


def write_report(folders: list[Path], page: Path) -> Path:
    """Write the page of these runs; their reconstructions are drawn anew, and kept beside them as PNG.

    Raises UserError if a folder holds no run.
    """
    stories = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    for story in stories:
        if story.pictures is not None:
            folder = story.folder / "reconstructions"
            folder.mkdir(exist_ok=True)
            sheet(story.pictures.columns).save(folder / f"step-{story.pictures.step:09d}.png")
    trained = [story for story in stories if story.run is not None]
    targets = [(story.name, story.run.target) for story in stories if story.run is not None]
    html = _ENVIRONMENT.get_template("page.html.j2").render(
        title=" and ".join(story.name for story in stories) if len(stories) < 4 else f"{len(stories)} runs",
        stories=stories,
        trained=trained,
        results=compare([Measured(story.name, story.results) for story in stories]),
        drawn=_drawn(stories),
        settings=_settings([story.run for story in stories if story.run is not None]),
        curves=_curves(stories),
        columns=COLUMNS,
        png=png,
        spectrum=_spectrum,
        timm_options=_timm_options,
        binned=[name for name, target in targets if target.distance == "cross_entropy"],
        unnormalised=[name for name, target in targets if target.normalise_patches or target.normalise_window],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html)
    return page


def results_table(folders: list[Path], width: int) -> Table:
    """What was measured of these models, as a table for a terminal of so many columns."""
    return table([Measured(name, read_results(f)) for f, name in zip(folders, _names(folders), strict=True)], width)


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, with as much of their paths as it takes to tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    short = [path.name for path in resolved]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> _Story:
    config = folder / "config.json"
    results, pictures, problem, run = read_results(folder), None, "", None
    if config.is_file():
        run = from_json(config.read_text(), config)
        try:
            pictures = reconstruct(
                open_model(str(folder), whole=True), open_data(run.data, image_form(run), run.local_copy)
            )
        except UserError as error:  # the data may be elsewhere by now; the rest of the page is as good
            problem = str(error)
    elif not results:
        raise UserError(f"{folder} is not a run, and holds no evaluations: it has no config.json")
    skipped = folder / "skipped.csv"
    return _Story(
        name,
        folder,
        run,
        list(read_metrics(folder / "metrics.jsonl")),
        results,
        pictures,
        problem,
        max(0, len(skipped.read_text().splitlines()) - 1) if skipped.exists() else 0,
    )


def _settings(runs: list[Run]) -> list[dict[str, Any]]:
    """Every field of the configurations, those that differ between the runs first."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if dataclasses.is_dataclass(value):
            return {
                k: v
                for f in dataclasses.fields(value)
                for k, v in flat(getattr(value, f.name), f"{path}.{f.name}" if path else f.name).items()
            }
        return {path: value}

    columns = [flat(run) for run in runs]
    names = columns[0] if columns else {}
    fields: list[dict[str, Any]] = [{"name": name, "values": [column[name] for column in columns]} for name in names]
    for field in fields:
        field["differs"] = len({json.dumps(value) for value in field["values"]}) > 1
    return sorted(fields, key=lambda field: not field["differs"])


def _timm_options(model: Model) -> dict[str, Any]:
    """What timm must be told to make this backbone, besides its name, size and channels."""
    if model.name == "simmim" and model.backbone.startswith("beit"):
        return {**SIMMIM_BEIT, **model.options}
    return model.options


def _curves(stories: list[_Story]) -> list[tuple[str, str]]:
    """(caption, SVG) of each curve that has something to show."""
    kinds = [
        ("loss", "loss", "Training loss. Losses compare only between runs with the same target and normalisation."),
        ("knn/top1/mean", "k-NN top-1 (%)", "k-NN accuracy while training, mean of patch tokens."),
        ("lr", "learning rate", "Learning rate."),
        ("images_per_s", "images/s", "Throughput."),
    ]
    figures = []
    for key, label, caption in kinds:
        series = {story.name: story.series(key) for story in stories}
        series = {name: xy for name, xy in series.items() if len(xy[0]) > 1}
        if series:
            figures.append((caption, curve(series, x="epoch", y=label, marker="o" if key.startswith("knn") else "")))
    return figures


def _drawn(stories: list[_Story]) -> list[tuple[str, str]]:
    """(caption, picture as a data URL) of what evaluations drew."""
    return [
        (f"{story.name}, {result['encoder']}: {caption}", png(np.asarray(open_image(read_file(path), ("PNG",)))))
        for story in stories
        for result in story.results
        for caption, name in result.get("pictures", {}).items()
        if (path := story.folder / "evaluations" / name).is_file()
    ]


def _spectrum(story: _Story) -> str:
    assert story.pictures is not None and story.run is not None
    radius = in_bins(story.run.target.radius, story.run.hw)
    cut = min(radius) if isinstance(radius, tuple) else radius
    line = (cut, f"r = {cut:g}") if story.run.target.kind == "low-frequency" else None
    series = {
        name: (list(range(1, len(power))), power[1:].clip(1e-9).tolist())
        for name, power in story.pictures.spectra.items()
    }
    return curve(series, x="frequency (cycles per image)", y="power", log=True, dashed=("prediction",), line=line)
