"""One self-contained HTML page for one run or several side by side."""

import dataclasses
import json
import re
import shlex
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from rich.table import Table

from pixmim.build import image_spec
from pixmim.config import ModelConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import read_bad_images
from pixmim.data.dataset import BadImage, ImageDataset
from pixmim.data.decode.image import open_image
from pixmim.evaluation.visualize import Pixels, labeled_grid
from pixmim.report.figures import curve, png
from pixmim.report.reconstruct import COLUMNS, Reconstruction, reconstruct, with_bands
from pixmim.report.results import ModelResults, circumstances, compare, read_results, table
from pixmim.targets import resolve_radius
from pixmim.training.metric_logger import is_number, read_metrics
from pixmim.utils.console import label, printable_lines
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, check_output, read_file, write_text_atomically
from pixmim.utils.trust import inside, refusal, untrusted_references
from pixmim.utils.validation import NOT_OF_TIMM
from pixmim.weights.detect import read_config
from pixmim.weights.load import resolve_model
from pixmim.weights.save import ENCODER_FOLDER, ENCODER_WEIGHTS

_MAX_NEIGHBOURS = 8  # numbers of neighbours with a curve
_MAX_PICTURES = 100  # of one run
_MAX_PICTURE_BYTES = 2**25
_MAX_PIXELS = 2**25  # of all pictures of one run together

_MAJORITY = ", majority"
DATA_MARK = " · pixmim</title>".encode()
"""In the first lines of a page: one that pixmim wrote may be written again."""

Warn = Callable[[str], None]


@dataclass(frozen=True)
class _ReportEntry:
    """All that is known of one run, or of a model that was measured."""

    name: str
    folder: Path
    config: ModelConfig | None
    """A PretrainConfig if pixmim trained it; None for a model that was measured only."""
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]
    drawn: list[tuple[str, str]]
    """(caption, picture as a data URL) of what evaluations drew."""
    progress: str
    """How far its training is, such as "step 8 of 295"."""
    unfinished: str
    """How to go on with a run that has no encoder yet; empty if it has one."""
    pictures: Reconstruction | None
    problem: str
    """Why there are no pictures."""
    skipped: int
    warnings: list[str]
    """What of the folder could not be read."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs and values of one metric."""
        lines = [line for line in self.metrics if is_number(line.get(key))]
        return [line["epoch"] for line in lines], [line[key] for line in lines]


def write_report(
    folders: list[Path], page: Path, data: str | None = None, warn: Warn = lambda text: None, bands: str = ""
) -> Path:
    """Write the page of these runs; their reconstructions are drawn anew, and kept beside them as PNG.

    Args:
        folders: Runs, or folders with evaluations.
        page: The HTML file.
        data: Images to draw reconstructions of. Otherwise those of each run, if this user made it on this machine: a
            folder from elsewhere may name any file or URL.
        warn: Called with a line for everything that is left out.
        bands: The channels to draw as red, green and blue, such as "4,3,2"; otherwise those of each run.

    Raises:
        UserError: If a folder holds no run, or the page is a file that pixmim did not write.
        OSError: If the page cannot be written.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a run: there is no such folder")
    check_output(page, mark=DATA_MARK)
    stories = [_read(folder, name, data, warn, bands) for folder, name in zip(folders, _names(folders), strict=True)]
    for story in stories:
        for line in [*story.warnings, *[f"no reconstructions: {story.problem}"] * bool(story.problem)]:
            warn(line)
        if story.pictures is not None:
            folder = inside(story.folder, "reconstructions")
            folder.mkdir(exist_ok=True)
            picture = labeled_grid(story.pictures.columns, story.pictures.names)
            atomic_write(folder / f"step-{story.pictures.step:09d}.png", partial(picture.save, format="PNG"))
    trained = [story for story in stories if story.config is not None]
    targets = [(s.name, s.config.target) for s in stories if s.config is not None and s.config.target is not None]
    html = _ENVIRONMENT.get_template("page.html.j2").render(
        title=" and ".join(story.name for story in stories) if len(stories) < 4 else f"{len(stories)} runs",
        stories=stories,
        trained=trained,
        results=compare([ModelResults(story.name, story.results) for story in stories]),
        drawn=[drawn for story in stories for drawn in story.drawn],
        settings=_settings([story.config for story in stories if story.config is not None]),
        curves=_curves(stories),
        columns=COLUMNS,
        png=png,
        label=label,
        spectrum=_spectrum,
        usage=_usage,
        binned=[name for name, target in targets if target.distance == "cross_entropy"],
        unnormalized=[name for name, target in targets if target.normalize_patches or target.normalize_window],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(page, html)
    return page


def results_table(folders: list[Path], width: int) -> Table:
    """What was measured of these models, as a table for a terminal of so many columns."""
    return table([ModelResults(name, read_results(f)) for f, name in zip(folders, _names(folders), strict=True)], width)


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, with as much of their paths as it takes to tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    short = [path.name for path in resolved]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _read(folder: Path, name: str, data: str | None, warn: Warn, bands: str = "") -> _ReportEntry:
    """Read what there is in a folder: what cannot be read costs a warning, and the rest of the page is as good."""
    warnings: list[str] = []
    run, config, pictures, problem, progress, unfinished = None, "", None, "", "", ""
    try:
        found = read_config(folder)
        if found is not None:
            run, config = found
    except (UserError, OSError) as error:
        warnings.append(str(error))
    results = read_results(folder, warnings.append)
    metrics = _metrics(folder, warnings.append)
    if run is None and not results:
        reason = warnings[0] if warnings else f"{folder} is not a run, and holds no evaluations: it has no config.json"
        raise UserError(reason)
    if run is not None:
        try:
            weights = with_bands(resolve_model(str(folder.absolute()), with_decoder=True), bands)
            progress = weights.progress
            pictures = reconstruct(weights, _data(folder, run, config, data))
        except (UserError, OSError) as error:  # the data may be elsewhere by now
            problem = "; ".join(str(error).splitlines())
        if not (folder / ENCODER_WEIGHTS).is_file():
            resume = f"pixmim pretrain --resume {shlex.quote(str(folder))}"
            unfinished = f"{resume} goes on with it; with --finish it ends now, with its encoder"
            warn(f"{name} is unfinished{': ' * bool(progress)}{progress}")
    skipped = _skipped(folder, warnings.append)
    drawn = list(_drawn(folder, name, results, warnings.append))
    return _ReportEntry(
        name, folder, run, metrics, results, drawn, progress, unfinished, pictures, problem, skipped, warnings
    )


def _data(folder: Path, run: ModelConfig, config: str, data: str | None) -> ImageDataset:
    """The images to draw. Raises UserError where nobody has said that they may be opened."""
    named = run.data if isinstance(run, PretrainConfig) else ""
    strange = untrusted_references(config, {"--data": named})
    if data is None and strange:
        raise UserError(
            f"{refusal(folder, strange)}. `pixmim report {shlex.quote(str(folder))} --data DATA` draws them"
        )
    trusted = [run.shard_cache_gib] if isinstance(run, PretrainConfig) and not strange else []
    return open_dataset(named if data is None else data, image_spec(run), *trusted)


def _metrics(folder: Path, warn: Warn) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    try:
        return read_metrics(inside(folder, path.name), warn)
    except UserError as error:
        warn(str(error))
    except OSError as error:
        warn(f"{path} cannot be read: {error.strerror}")
    return []


def _skipped(folder: Path, warn: Warn) -> int:
    """How many images skipped.csv names."""
    try:
        path = inside(folder, "skipped.csv")
    except UserError as error:
        warn(str(error))
        return 0
    rows, problem = read_bad_images(path) if path.exists() else ([], "")
    if problem:
        warn(problem)
    return len(rows)


def _settings(runs: list[ModelConfig]) -> list[dict[str, Any]]:
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
    names = dict.fromkeys(name for column in columns for name in column)
    fields: list[dict[str, Any]] = [
        {"name": name, "values": [column.get(name, "unknown") for column in columns]} for name in names
    ]
    for field in fields:
        field["differs"] = len({json.dumps(value) for value in field["values"]}) > 1
    return sorted(fields, key=lambda field: not field["differs"])


def _usage(story: _ReportEntry) -> str:
    """The Python line that opens a run's encoder. Its folder is a literal: no name can end the string."""
    run, folder = story.config, str(story.folder / ENCODER_FOLDER)
    assert run is not None
    if run.model.name == "convmae" or any(name in run.model.options for name in NOT_OF_TIMM):
        return f"encoder = pixmim.load_encoder({folder!r})"
    return f"encoder = timm.create_model({'local-dir:' + folder!r}, pretrained=True)"


def _curves(stories: list[_ReportEntry]) -> list[tuple[str, str]]:
    """(caption, SVG) of each curve that has something to show. What was measured on other data has its own figure."""
    compares = "Losses compare only between runs with the same target and normalization."
    kinds: list[tuple[dict[str, str], str, str, Callable[[PretrainConfig], str]]] = [
        ({"loss": ""}, "loss", f"Training loss. {compares}", lambda run: run.data),
        (_knn("top1", stories), "k-NN top-1 (%)", "k-NN accuracy while training, mean of patch tokens.", _measured_on),
        (
            _knn("balanced", stories),
            "k-NN balanced (%)",
            "k-NN accuracy while training, each class counting the same.",
            _measured_on,
        ),
        ({"lr": ""}, "learning rate", "Learning rate.", lambda run: ""),
        ({"images_per_s": ""}, "images/s", "Throughput.", lambda run: ""),
    ]
    figures = []
    for keys, axis, caption, on in kinds:
        groups: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for story in stories:
            for key, mark in keys.items():
                found = story.series(key)
                if isinstance(story.config, PretrainConfig) and len(found[0]) > 1:
                    groups.setdefault(on(story.config), {})[story.name + mark] = found
        for data, series in groups.items():
            said = f" Measured on {label(data, 120)}." if data else ""
            marker, dashed = "o" if "k-NN" in axis else "", [name for name in series if name.endswith(_MAJORITY)]
            figures.append((caption + said, curve(series, x="epoch", y=axis, marker=marker, dashed=dashed)))
    return figures


def _knn(value: str, stories: list[_ReportEntry]) -> dict[str, str]:
    """The keys of a value of periodic k-NN, with what each adds to a run's name; top-1 has a baseline."""
    logged = {key for story in stories for line in story.metrics for key in line}
    found = filter(None, (re.fullmatch(f"knn/k([0-9]{{1,9}})/mean/{value}", key) for key in logged))
    ordered = sorted(found, key=lambda each: int(each[1]))[:_MAX_NEIGHBOURS]
    keys = {each[0]: f", k = {each[1]}" for each in ordered}
    return keys | ({"knn/majority": _MAJORITY} if value == "top1" else {})


def _measured_on(config: PretrainConfig) -> str:
    return f"{config.knn.test} (train {config.knn.train})"


def _drawn(folder: Path, name: str, results: list[dict[str, Any]], warn: Warn) -> Iterator[tuple[str, str]]:
    """(caption, picture as a data URL) of what evaluations drew."""
    named = [
        (result["encoder"], where, *item)
        for result, where in zip(results, circumstances(results), strict=True)
        for item in result["pictures"].items()
    ]
    left, count = _MAX_PIXELS, Counter((encoder, caption) for encoder, _, caption, _ in named)
    for encoder, where, caption, file in named[:_MAX_PICTURES]:
        try:
            if Path(file).name != file:
                raise UserError(f"'{file}' is not the name of a file in {folder / 'evaluations'}")
            path = inside(folder, f"evaluations/{file}")
            if path.exists():
                picture = _picture(path, left)
                left -= picture.shape[0] * picture.shape[1]
                yield (
                    f"{name}, {encoder}: {caption}{f' ({where})' if count[encoder, caption] > 1 else ''}",
                    png(picture),
                )
        except (UserError, OSError, BadImage) as error:
            warn(f"a picture of {name} is left out: {error}")
    if len(named) > _MAX_PICTURES:
        warn(f"only the first {_MAX_PICTURES} of the {len(named):,} pictures of {name} are shown")


def _picture(path: Path, most: int) -> Pixels:
    """Read a PNG of a run, of so many pixels at most. Raises OSError or BadImage."""
    image = open_image(read_file(path, _MAX_PICTURE_BYTES), ("PNG",))
    if image.width * image.height > most:
        raise BadImage(f"{path} has {image.width * image.height:,} pixels, and {most:,} more are shown")
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise BadImage(f"{path} is damaged: {error}") from error


def _spectrum(story: _ReportEntry) -> str:
    assert story.pictures is not None and story.config is not None
    line = None
    if story.config.target is not None and story.config.target.kind == "low-frequency":
        radius = resolve_radius(story.config.target.radius, story.config.image_size)
        cut = min(radius) if isinstance(radius, tuple) else radius
        line = cut, f"r = {cut:g}"
    series = {
        name: (list(range(1, len(power))), power[1:].clip(1e-9).tolist())
        for name, power in story.pictures.spectra.items()
    }
    return curve(series, x="frequency (cycles per image)", y="power", log=True, dashed=("prediction",), line=line)


def _shown(value: Any) -> Any:
    """Anything that the page shows as plain text, whatever characters it holds."""
    return value if isinstance(value, Markup) else printable_lines(str(value))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("pixmim", "report"), autoescape=True, trim_blocks=True, finalize=_shown
)
