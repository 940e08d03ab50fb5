"""One self-contained HTML page for one run, or for several side by side."""

import base64
import dataclasses
import io
import json
import re
import shlex
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from rich.console import Console
from rich.table import Table

from pixmim.build import image_spec
from pixmim.config import ModelConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import read_bad_images
from pixmim.data.dataset import BadImage, ImageDataset
from pixmim.data.decode.image import open_image
from pixmim.evaluation.visualize import Pixels, labeled_grid, to_image
from pixmim.report.gain import answers, figures, verdict
from pixmim.report.neighbors import NeighborSheet, draw_neighbors
from pixmim.report.reconstruct import COLUMNS, Reconstruction, reconstruct, with_bands
from pixmim.report.results import ModelResults, circumstances, compare, read_results, table
from pixmim.targets import resolve_radius
from pixmim.training.metric_logger import is_number, read_metrics
from pixmim.utils.console import label, printable_lines
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, check_output, read_file, readable, write_text_atomically
from pixmim.utils.plotting import plot_curves
from pixmim.utils.trust import inside, refusal, untrusted_references
from pixmim.utils.validation import NOT_OF_TIMM
from pixmim.weights.detect import read_config
from pixmim.weights.load import resolve_model
from pixmim.weights.save import ENCODER_FOLDER, ENCODER_WEIGHTS

_MAX_CURVES = 8  # values of k in the figure of periodic k-NN
_MAX_DRAWINGS = 100  # of one run
_MAX_FILE_BYTES = 2**25  # of a drawing
_MAX_PIXELS = 2**25  # of all drawings of one run
_FIRST = 6  # images on the first screen
_MIN_SIDE, _MAX_SIDE = 160, 240  # height of a reconstruction on the page
_MAJORITY, _START, _HELD_OUT = ", majority", ", start", ", held out"
DATA_MARK = " · pixmim</title>".encode()  # in the first lines of a page: a file with this mark may be overwritten

Warn = Callable[[str], None]


@dataclass
class ReportEntry:
    """One run, or one model that was only evaluated."""

    name: str
    folder: Path
    config: ModelConfig | None = None  # a PretrainConfig for a run of pixmim; None for a model that was only evaluated
    metrics: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl
    results: list[dict[str, Any]] = field(default_factory=list)
    drawings: list[tuple[str, str]] = field(default_factory=list)  # (caption, data URL) of the drawings of evaluations
    progress: str = ""  # progress of the training, such as "step 8 of 295"
    how_to_finish: str = ""  # command that finishes the run; empty if the encoder exists
    reconstruction: Reconstruction | None = None
    problem: str = ""  # why there is no reconstruction
    neighbors: NeighborSheet | None = None  # similar images, if they are wanted
    skipped: int = 0  # number of unreadable images
    warnings: list[str] = field(default_factory=list)  # a line for each file that cannot be read

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return epochs and values of one metric."""
        lines = [line for line in self.metrics if is_number(line.get(key))]
        return [line["epoch"] for line in lines], [line[key] for line in lines]


def write_report(
    folders: list[Path],
    page: Path,
    data: str | None = None,
    warn: Warn = lambda text: None,
    bands: str = "",
    neighbors: bool = False,
    console: Console | None = None,
) -> Path:
    """Write the page of runs, and their reconstructions as PNG files into the run folders.

    Without `data`, the images to reconstruct are those of each run made by this user on this machine; a run from
    elsewhere may name any file or URL. `bands` are the channels to draw as red, green and blue, such as "4,3,2"; by
    default those of each run. `warn` is called with a line for everything that is left out. Raises UserError if a
    folder is not a run, or the page is a file that pixmim did not write; OSError if the page cannot be written.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a run: there is no such folder")
    try:
        check_output(page, mark=DATA_MARK)
    except PermissionError as error:
        raise UserError(f"{page} cannot be written: {error.strerror}. Pass another file: --out FILE.html") from error
    entries = [
        read_entry(folder, name, data, warn, bands) for folder, name in zip(folders, unique_names(folders), strict=True)
    ]
    for entry in entries:
        if neighbors and entry.config is not None:
            with _warning(entry.warnings, "no neighbors: "):
                images = open_run_data(entry.folder, entry.config, (read_config(entry.folder) or ("", ""))[1], data)
                config = dataclasses.replace(entry.config, bands=bands or entry.config.bands)
                entry.neighbors = draw_neighbors(entry.folder, config, images, console=console)
        for line in [*entry.warnings, *[f"no reconstructions: {entry.problem}"] * bool(entry.problem)]:
            warn(line)
        if entry.reconstruction is not None:
            _save_reconstruction(entry.folder, entry.reconstruction, warn)
    configs = [(entry.name, entry.config) for entry in entries if entry.config is not None]
    targets = [(name, config.target) for name, config in configs if config.target is not None]
    results = compare([ModelResults(entry.name, entry.results) for entry in entries])
    html = ENVIRONMENT.get_template("page.html.j2").render(
        title=" and ".join(entry.name for entry in entries) if len(entries) < 4 else f"{len(entries)} runs",
        entries=entries,
        trained=[entry for entry in entries if entry.config is not None],
        results=results,
        answers=answers(results),
        repeated=figures(results),
        drawings=[drawing for entry in entries for drawing in entry.drawings],
        settings=compare_settings([config for _, config in configs]),
        verdicts=[(e, verdict(e.config, e.metrics, results, i, e.folder)) for i, e in enumerate(entries)],
        curves=_curves(entries),
        first=_first_images(entries),
        columns=COLUMNS,
        shown=_shown,
        data_url=data_url,
        label=label,
        spectrum=_spectrum,
        load_line=load_line,
        binned=[name for name, target in targets if target.distance == "cross_entropy"],
        normalized=[name for name, target in targets if target.normalize_patches or target.normalize_window],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(page, html)
    return page


def _save_reconstruction(run: Path, reconstruction: Reconstruction, warn: Warn) -> None:
    """Write a reconstruction as PNG into the folder of a run, or a warning if that cannot be written to."""
    folder = inside(run, "reconstructions")
    grid = labeled_grid(reconstruction.columns, reconstruction.names)
    try:
        folder.mkdir(exist_ok=True)
        atomic_write(folder / f"step-{reconstruction.step:09d}.png", partial(grid.save, format="PNG"))
    except OSError as error:
        warn(f"{folder} has no copy of the reconstructions on the page: {error.strerror}")


def results_table(folders: list[Path], width: int) -> Table:
    """Return the results of these folders as a table for a terminal of `width` columns."""
    return table(_read_all(folders), width)


def gain_lines(folders: list[Path]) -> list[str]:
    """Return what encoders gained over their start, by number of labels: see `gain.answers`."""
    return answers(compare(_read_all(folders)))


def _read_all(folders: list[Path]) -> list[ModelResults]:
    return [ModelResults(name, read_results(f)) for f, name in zip(folders, unique_names(folders), strict=True)]


def unique_names(folders: list[Path]) -> list[str]:
    """Return the names of the folders, or their paths if names are not unique."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


@contextmanager
def _warning(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Turn the error of a file, which may be untrusted, into a warning."""
    try:
        yield
    except (UserError, OSError, BadImage) as error:
        problems.append(f"{prefix}{'; '.join(str(error).splitlines())}" if prefix else str(error))


def read_entry(folder: Path, name: str, data: str | None, warn: Warn, bands: str = "") -> ReportEntry:
    """Read a folder; each unreadable file costs a warning. Raises UserError if it has neither a run nor results."""
    entry = ReportEntry(name, folder)
    text, problems = "", entry.warnings
    with _warning(problems):
        entry.config, text = read_config(folder) or (None, "")
    entry.results = read_results(folder, problems.append)
    with _warning(problems), readable(folder / "metrics.jsonl"):
        entry.metrics = read_metrics(inside(folder, "metrics.jsonl"), problems.append)
    if entry.config is None and not entry.results:
        raise UserError(problems[0] if problems else f"{folder} is not a run: it has no config.json and no evaluations")
    if entry.config is not None:
        try:
            weights = with_bands(resolve_model(str(folder.absolute()), with_decoder=True), bands)
            entry.progress = weights.progress
            problems += [note.removeprefix("warning: ") for note in weights.notes]
            entry.reconstruction = reconstruct(weights, open_run_data(folder, entry.config, text, data))
        except (UserError, OSError) as error:  # the data may have been moved
            entry.problem = "; ".join(str(error).splitlines())
        if not (folder / ENCODER_WEIGHTS).is_file():
            resume = f"pixmim pretrain --resume {shlex.quote(str(folder))}"
            entry.how_to_finish = f"{resume} resumes it, and with --finish writes its encoder at once"
            warn(f"{name} is unfinished{': ' * bool(entry.progress)}{entry.progress}")
    with _warning(problems):
        path = inside(folder, "skipped.csv")
        rows, problem = read_bad_images(path) if path.exists() else ([], "")
        entry.skipped = len(rows)
        problems += [problem] * bool(problem)
    entry.drawings = list(_read_drawings(entry))
    return entry


def open_run_data(
    folder: Path, config: ModelConfig, text: str, data: str | None, command: str = "report"
) -> ImageDataset:
    """Open the images to reconstruct.

    Raises:
        UserError: For data named by a run from elsewhere, or that do not exist. It names the flag of the `command`.
    """
    own = config.data if isinstance(config, PretrainConfig) else ""
    untrusted = untrusted_references(text, {"--data": own})
    command = f"pixmim {command} {shlex.quote(str(folder))} --data DATA"
    if data is None and untrusted:
        raise UserError(f"{refusal(folder, untrusted)}. Add data that you trust: `{command}`")
    cache = [config.shard_cache_gib] if isinstance(config, PretrainConfig) and not untrusted else []
    try:
        return open_dataset(own if data is None else data, image_spec(config), *cache)
    except UserError as error:
        if data is not None or not own:
            raise
        raise UserError(f"the images of {folder}: {error}. If they have moved: `{command}`") from error


def _first_images(entries: list[ReportEntry]) -> list[tuple[str, str, Pixels, Pixels]]:
    """Return run, name, masked image and reconstruction of six images; of several runs, of fewer images of each."""
    drawn = [(entry.name, entry.reconstruction) for entry in entries if entry.reconstruction is not None]
    count = max(1, _FIRST // max(1, len(drawn)))
    return [
        (run, name, r.columns["masked"][i], r.columns["pasted"][i])
        for run, r in drawn[:_FIRST]
        for i, name in enumerate(r.names[:count])
    ]


def _shown(pixels: Pixels) -> str:
    """Return the attributes of an <img>: enlarged by an integer factor if it is small, and at most 240 pixels high."""
    h, w = pixels.shape[:2]
    factor = -(-_MIN_SIDE // h)
    exact = factor * h <= _MAX_SIDE
    height = factor * h if exact else min(h, _MAX_SIDE)
    return Markup(f'width="{round(w * height / h)}" height="{height}"' + ' class="pixels"' * (exact and factor > 1))


def _read_drawings(entry: ReportEntry) -> Iterator[tuple[str, str]]:
    """Yield (caption, data URL) of the drawings of evaluations."""
    listed = [
        (f"{entry.name}, {result['encoder']}: {caption}", circumstance, file)
        for result, circumstance in zip(entry.results, circumstances(entry.results), strict=True)
        for caption, file in result["pictures"].items()
    ]
    left, count = _MAX_PIXELS, Counter(caption for caption, _, _ in listed)
    for caption, circumstance, file in listed[:_MAX_DRAWINGS]:
        with _warning(entry.warnings, f"an image of {entry.name} is left out: "):
            if Path(file).name != file:
                raise UserError(f"'{file}' is not the name of a file in {entry.folder / 'evaluations'}")
            path = inside(entry.folder, f"evaluations/{file}")
            if path.exists():
                pixels = _read_png(path, left)
                left -= pixels.shape[0] * pixels.shape[1]
                yield caption + f" ({circumstance})" * (count[caption] > 1), data_url(pixels)
    if len(listed) > _MAX_DRAWINGS:
        line = f"only the first {_MAX_DRAWINGS} of the {len(listed):,} images of {entry.name} are shown"
        entry.warnings.append(line)


def _read_png(path: Path, max_pixels: int) -> Pixels:
    """Read an untrusted PNG file. Raises OSError or BadImage."""
    image = open_image(read_file(path, _MAX_FILE_BYTES), ("PNG",))
    if image.width * image.height > max_pixels:
        raise BadImage(f"{path} has {image.width * image.height:,} pixels, more than the {max_pixels:,} left")
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise BadImage(f"{path} is damaged: {error}") from error


def png(image: Image.Image, *, optimize: bool = False) -> bytes:
    """Encode an image as a PNG; with `optimize` slower, and smaller."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def data_url(pixels: Pixels, *, optimize: bool = True) -> str:
    """Return an image (h w c) as the data URL of a PNG, as `png`."""
    return "data:image/png;base64," + base64.b64encode(png(to_image(pixels), optimize=optimize)).decode()


def compare_settings(configs: list[ModelConfig]) -> list[dict[str, Any]]:
    """Return name and values of every config field, those that differ first."""

    def flatten(value: Any, prefix: str) -> dict[str, Any]:
        if not dataclasses.is_dataclass(value):
            return {prefix[:-1]: value}
        parts = [flatten(getattr(value, f.name), f"{prefix}{f.name}.") for f in dataclasses.fields(value)]
        return {name: leaf for part in parts for name, leaf in part.items()}

    columns = [flatten(config, "") for config in configs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows: list[dict[str, Any]] = [{"name": n, "values": [c.get(n, "unknown") for c in columns]} for n in names]
    for row in rows:
        row["differs"] = len({json.dumps(value) for value in row["values"]}) > 1
    return sorted(rows, key=lambda row: not row["differs"])


def load_line(entry: ReportEntry) -> str:
    """Return the Python line that loads a run's encoder; the folder is a literal, safe for any name."""
    assert entry.config is not None
    model, folder = entry.config.model, str(entry.folder / ENCODER_FOLDER)
    if model.name == "convmae" or any(name in model.options for name in NOT_OF_TIMM):
        return f"encoder = pixmim.load_encoder({folder!r})"
    return f"encoder = timm.create_model({'local-dir:' + folder!r}, pretrained=True)"


def _curves(entries: list[ReportEntry]) -> list[tuple[str, str]]:
    """Return (caption, SVG) of each figure with values. Metrics of different data have separate figures."""
    loss = "Training loss. Losses compare only between runs with the same target and normalization."
    held_out = "Dashed: center crops of held-out images, with fixed masks; that it rises shows over-fitting."
    loss += f" {held_out}" * any("held_out_loss" in line for entry in entries for line in entry.metrics)
    rank = "Effective rank (RankMe) of the features of held-out images; at most the number of these, and the width of "
    rank += "the encoder."
    top1, balanced = "k-NN accuracy during training, mean of patch tokens", "k-NN accuracy during training, balanced"
    kinds: list[tuple[dict[str, str], str, str, Callable[[PretrainConfig], str]]] = [
        ({"loss": "", "held_out_loss": _HELD_OUT}, "loss", loss, lambda config: config.data),
        ({"rankme": ""}, "effective rank", rank, lambda config: config.data),
        (_knn_keys("top1", entries) | {"knn/majority": _MAJORITY}, "k-NN top-1 (%)", f"{top1}.", knn_data),
        (_knn_keys("balanced", entries), "k-NN balanced (%)", f"{balanced}: all classes count equally.", knn_data),
        ({"lr": ""}, "learning rate", "Learning rate.", lambda config: ""),
        ({"images_per_s": ""}, "images/s", "Throughput.", lambda config: ""),
    ]
    figures = []
    for keys, axis, caption, data_of in kinds:
        groups: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for entry in entries:
            for key, suffix in keys.items():
                series = entry.series(key)
                if isinstance(entry.config, PretrainConfig) and len(series[0]) > 1:
                    group = groups.setdefault(data_of(entry.config), {})
                    group[entry.name + suffix] = series
                    x, y = series
                    if entry.config.init and "k-NN" in axis and suffix != _MAJORITY and not x[0]:
                        group[entry.name + suffix + _START] = [x[0], x[-1]], [y[0], y[0]]
        for data, group in groups.items():
            measured_on = f" Measured on {label(data, 120)}." if data else ""
            marker = "o" if "k-NN" in axis else ""
            dashed = [name for name in group if name.endswith((_MAJORITY, _START, _HELD_OUT))]
            figures.append((caption + measured_on, plot_curves(group, x="epoch", y=axis, marker=marker, dashed=dashed)))
    return figures


def knn_data(config: PretrainConfig) -> str:
    """Return the labeled data of periodic k-NN."""
    return f"{config.knn.test} (train {config.knn.train})"


def _knn_keys(value: str, entries: list[ReportEntry]) -> dict[str, str]:
    """Return the metrics of periodic k-NN, with the suffix of each to a run's name."""
    logged = {key for entry in entries for line in entry.metrics for key in line}
    matches = filter(None, (re.fullmatch(f"knn/k([0-9]{{1,9}})/mean/{value}", key) for key in logged))
    return {m[0]: f", k = {m[1]}" for m in sorted(matches, key=lambda m: int(m[1]))[:_MAX_CURVES]}


def _spectrum(entry: ReportEntry) -> str:
    assert entry.reconstruction is not None and entry.config is not None
    target, line = entry.config.target, None
    if target is not None and target.kind == "low-frequency":
        radius = resolve_radius(target.radius, entry.config.image_size)
        cutoff = min(radius) if isinstance(radius, tuple) else radius
        line = cutoff, f"r = {cutoff:g}"
    series = {
        name: (list(range(1, len(power))), power[1:].clip(1e-9).tolist())
        for name, power in entry.reconstruction.spectra.items()
    }
    x = "frequency (cycles per shorter side)"
    return plot_curves(series, x=x, y="power", log=True, dashed=("prediction",), line=line)


def _printable(value: Any) -> Any:
    """Escape control characters in everything that the page shows as text."""
    return value if isinstance(value, Markup) else printable_lines(str(value))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("pixmim", "report"), autoescape=True, trim_blocks=True, finalize=_printable
)
"""Templates of pages. Everything they show is escaped."""
