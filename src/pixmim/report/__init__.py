"""One self-contained HTML page for one run or several side by side."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from pixmim.config import Model, Run
from pixmim.data import open_data
from pixmim.engine.runlog import read_metrics
from pixmim.errors import UserError
from pixmim.models import SIMMIM_BEIT
from pixmim.parts import image_form
from pixmim.pretrained import open_model
from pixmim.report.figures import curve, png, sheet
from pixmim.report.reconstruct import COLUMNS, Reconstruction, reconstruct
from pixmim.runfile import from_json
from pixmim.targets import in_bins

_ENVIRONMENT = jinja2.Environment(loader=jinja2.PackageLoader("pixmim", "report"), autoescape=True, trim_blocks=True)


@dataclass(frozen=True)
class _Story:
    """All that is known of one run."""

    name: str
    folder: Path
    run: Run
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
    html = _ENVIRONMENT.get_template("page.html.j2").render(
        title=" and ".join(story.name for story in stories) if len(stories) < 4 else f"{len(stories)} runs",
        stories=stories,
        results=_rows(stories),
        settings=_settings(stories),
        curves=_curves(stories),
        columns=COLUMNS,
        png=png,
        spectrum=_spectrum,
        timm_options=_timm_options,
        binned=[story.name for story in stories if story.run.target.distance == "cross_entropy"],
        unnormalised=[
            story.name for story in stories if story.run.target.normalise_patches or story.run.target.normalise_window
        ],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html)
    return page


def results_table(folders: list[Path]) -> Table:
    """The evaluations of these runs as a table for a terminal."""
    stories = [_read(folder, name, draw=False) for folder, name in zip(folders, _names(folders), strict=True)]
    names = [f"{story.name}: " if len(stories) > 1 else "" for story in stories]
    table = Table("top-1 accuracy", *(name + which for name in names for which in ("untrained", "trained")), box=None)
    for row in _rows(stories):
        # Side by side, several runs leave no room for the intervals; they stand in the page.
        cells = [f"{c['text']} ({c['range']})" if len(stories) == 1 else c["text"] for c in row["cells"]]
        table.add_row(row["label"], *(text if c["text"] else "-" for text, c in zip(cells, row["cells"], strict=True)))
    return table


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, with as much of their paths as it takes to tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    short = [path.name for path in resolved]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _read(folder: Path, name: str, draw: bool = True) -> _Story:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} is not a run: it has no config.json")
    run = from_json(config.read_text(), config)
    pictures, problem = None, ""
    if draw:
        try:
            pictures = reconstruct(open_model(str(folder), whole=True), open_data(run.data, image_form(run)))
        except UserError as error:  # the data may be elsewhere by now; the rest of the page is as good
            problem = str(error)
    skipped = folder / "skipped.csv"
    return _Story(
        name,
        folder,
        run,
        list(read_metrics(folder / "metrics.jsonl")),
        [json.loads(path.read_text()) for path in sorted(folder.glob("evaluations/*.json"))],
        pictures,
        problem,
        max(0, len(skipped.read_text().splitlines()) - 1) if skipped.exists() else 0,
    )


_LABELS = {
    ("knn", "top1/mean"): "k-NN, mean of patch tokens",
    ("knn", "top1/cls"): "k-NN, class token",
    ("linear", "top1"): "linear probe",
}


def _rows(stories: list[_Story]) -> list[dict[str, Any]]:
    """One row for each measured value and test set; two cells for each run, untrained and trained."""
    tests = sorted({(r["train"], r["test"]) for story in stories for r in story.results})
    rows = []
    for train, test in tests:
        for (evaluation, key), label in _LABELS.items():
            cells: list[dict[str, Any]] = []
            for story in stories:
                for which in ("untrained", "trained"):
                    found = [
                        r["values"]
                        for r in story.results
                        if (r["evaluation"], r["encoder"], r["train"], r["test"]) == (evaluation, which, train, test)
                    ]
                    cells.append(_cell(found[0], key) if found else {"text": "", "range": "", "value": None})
            if any(cell["text"] for cell in cells):
                for cell in cells:  # marked only if no other value reaches into its interval
                    others = [c["value"] for c in cells if c is not cell and c["value"] is not None]
                    cell["best"] = bool(others) and cell["value"] is not None and cell["low"] > max(others)
                rows.append({"label": label, "train": train, "test": test, "cells": cells})
    return rows


def _cell(values: dict[str, float], key: str) -> dict[str, Any]:
    interval = f"{values[key + '/low']:.1f} to {values[key + '/high']:.1f}"
    return {"value": values[key], "low": values[key + "/low"], "text": f"{values[key]:.1f} %", "range": interval}


def _settings(stories: list[_Story]) -> list[dict[str, Any]]:
    """Every field of the configurations, those that differ between the runs first."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if dataclasses.is_dataclass(value):
            return {
                k: v
                for f in dataclasses.fields(value)
                for k, v in flat(getattr(value, f.name), f"{path}.{f.name}" if path else f.name).items()
            }
        return {path: value}

    columns = [flat(story.run) for story in stories]
    rows: list[dict[str, Any]] = [{"name": name, "values": [column[name] for column in columns]} for name in columns[0]]
    for row in rows:
        row["differs"] = len({json.dumps(value) for value in row["values"]}) > 1
    return sorted(rows, key=lambda row: not row["differs"])


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


def _spectrum(story: _Story) -> str:
    assert story.pictures is not None
    radius = in_bins(story.run.target.radius, story.run.hw)
    cut = min(radius) if isinstance(radius, tuple) else radius
    line = (cut, f"r = {cut:g}") if story.run.target.kind == "low-frequency" else None
    series = {
        name: (list(range(1, len(power))), power[1:].clip(1e-9).tolist())
        for name, power in story.pictures.spectra.items()
    }
    return curve(series, x="frequency (cycles per image)", y="power", log=True, dashed=("prediction",), line=line)
