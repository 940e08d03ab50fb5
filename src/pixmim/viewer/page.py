"""Contents of the page, as plain data and images. `server` gives each method an address."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixmim.build import image_spec
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import read_bad_images
from pixmim.data.dataset import ImageDataset, ImageSpec
from pixmim.evaluation.attentive_probe import load_newest_probe
from pixmim.evaluation.visualize import labeled_grid
from pixmim.masking import Mask
from pixmim.report.attention import draw_attention, draw_query_attention
from pixmim.report.page import compare_settings, data_url, knn_data, open_run_data, png, unique_names
from pixmim.report.reconstruct import COLUMNS, choose_crops
from pixmim.utils.console import csv_cell, label, printable
from pixmim.utils.errors import UserError
from pixmim.utils.trust import inside
from pixmim.viewer.atlas import Atlas
from pixmim.viewer.images import ImageStore
from pixmim.viewer.index import EncoderIndex
from pixmim.viewer.runs import Models, Run, low_passed, painted_mask, random_mask, read_new_metrics, target_radius

_MAX_ROWS = 200  # of skipped images, duplicates and outliers on the page; the CSV has all
_SHEET = 6  # images in the reconstruction of a checkpoint


class Page:
    """The contents of the page.

    Args:
        folders: Runs, finished or not, or imported weights. The first gives size and format of the images.
        data: Images to choose from, in the syntax of --data; None: those of the first run, if this user made it on this
            machine.
        device: Device of encoders in the index.

    Raises:
        UserError: If a folder is not a run.
    """

    def __init__(self, folders: Sequence[Path], data: str | None = None, device: str = "auto") -> None:
        if not folders:
            raise UserError("no run given: pass the folder of one or more runs")
        self.runs = [Run.open(folder, name) for folder, name in zip(folders, unique_names(list(folders)), strict=True)]
        self._data, self._spec = data, image_spec(self.runs[0].config)
        self._images, self._models = ImageStore(self._open_data), Models(self.runs)
        self._encoders = [
            EncoderIndex(run.folder, untrained, self._images.data, device)
            for run in self.runs
            for untrained in (False, True)
        ]
        self._maps = [Atlas() for _ in self._encoders]

    def _open_data(self, spec: ImageSpec) -> ImageDataset:
        if self._data is not None:
            return open_dataset(self._data, spec)
        run = self.runs[0]
        return open_run_data(run.folder, run.config, run.text, None, "view")

    def describe(self) -> dict[str, Any]:
        """Return everything about the runs and the dataset that stays while the page is open."""
        dataset, problem = {"count": 0, "name": "", "labeled": False}, ""
        try:
            data = self._images.data(self._spec)
            dataset = {"count": len(data), "name": printable(data.spec), "labeled": data.labels is not None}
        except (UserError, OSError) as error:
            problem = str(error)
        settings = [row for row in compare_settings([run.config for run in self.runs]) if row["differs"]]
        return {
            "runs": [self._describe(run) for run in self.runs],
            "dataset": dataset,
            "problem": problem,
            "columns": COLUMNS,
            "encoders": [f"{run.name}{', untrained' * untrained}" for run in self.runs for untrained in (False, True)],
            "settings": [{"name": row["name"], "values": [str(v) for v in row["values"]]} for row in settings],
        }

    def _describe(self, run: Run) -> dict[str, Any]:
        config, (rows, columns), (h, w) = run.config, run.grid, run.config.image_size
        target, mask = config.target, config.mask
        run_config = config if isinstance(config, PretrainConfig) else None
        return {
            "name": run.name,
            "about": f"{config.model.name} on {config.model.backbone}, {h} × {w} px",
            "size": [h, w],
            "grid": [rows, columns],
            "patch": h // rows,
            "ratio": mask.ratio if mask is not None else 0.75,
            "radius": target_radius(config),
            "target": target.kind if target is not None else "unknown",
            "data": label(run_config.data) if run_config else "",  # of the loss
            "knn": label(knn_data(run_config)) if run_config and run_config.knn.test else "",
        }

    def status(self, run: int) -> dict[str, Any]:
        """Return what changes while a run trains, apart from its metrics: checkpoints, skipped images and its state."""
        one = self._run(run)
        path = inside(one.folder, "skipped.csv")
        rows, problem = read_bad_images(path) if path.exists() else ([], "")
        skipped = {"skipped": rows[:_MAX_ROWS], "count": len(rows), "problem": problem}
        return {"steps": one.steps(), "unfinished": one.unfinished(), **skipped}

    def metrics(self, run: int, position: str) -> dict[str, Any]:
        """Return new records of a run: see `read_new_metrics`."""
        return asdict(read_new_metrics(self._run(run).folder, position))

    def checkpoint(self, run: int, step: int) -> bytes:
        """Return a PNG of the reconstructions by a checkpoint; images and masks are the same for all checkpoints."""
        config = self._run(run).config
        crops, names, _ = choose_crops(config, self._images.data(image_spec(config)), _SHEET)
        drawn = self._models.checkpoint(run, step, crops, names)
        return png(labeled_grid(drawn.columns, drawn.names, 176))

    def upload(self, content: bytes, name: str) -> dict[str, str]:
        """Keep an uploaded image; return its id and name. Raises UserError if it cannot be decoded."""
        return {"image": self._images.add(content, name, self._spec), "name": label(name)}

    def image(self, image: str) -> dict[str, Any]:
        """Return the name and class of an image. Raises UserError if it does not exist."""
        return {"image": image, "name": label(self._images.name(image, self._spec), 80), "class": self._class_of(image)}

    def _class_of(self, image: str) -> str:
        data = self._images.data(self._spec)
        if not image.startswith("d") or data.labels is None:
            return ""
        number = int(data.labels[self._images.index(image, self._spec)])
        return label(data.classes[number]) if number >= 0 else ""

    def thumbnail(self, image: str, side: int) -> bytes:
        """Return a JPEG of an image, at most `side` pixels wide and high: 16 to 1,024."""
        _check_range("side", side, 16, 1024)
        return self._images.thumbnail(image, self.runs[0].config, side)

    def mask(self, run: int, kind: str, ratio: float, block_size: int, seed: int) -> dict[str, Any]:
        """Return the hidden patches of a random mask, row by row: see `random_mask`."""
        _check_range("block_size", block_size, 1, 4096)
        mask = random_mask(self._run(run), kind, ratio, block_size, seed)
        return {"hidden": mask.hidden[0].int().tolist(), "grid": self._run(run).grid}

    def reconstruct(self, image: str, hidden: Sequence[bool], runs: Sequence[int]) -> list[dict[str, Any]]:
        """Return the drawings of an image by several runs, each as data URLs by column, or with an "error".

        A "note" names the checkpoint in use if the newest one is damaged.
        """
        mask: Mask = painted_mask(hidden)
        results = list[dict[str, Any]]()
        for run in runs:
            one = self._run(run)
            try:
                drawn = self._models.reconstruct(run, self._images.crop(image, one.config), mask)
            except UserError as error:
                results.append({"name": one.name, "error": str(error)})
                continue
            columns = {name: data_url(pixels[0], optimize=False) for name, pixels in drawn.columns.items()}
            note = self._models.notes[run]
            results.append({"name": one.name, "step": drawn.step, "columns": columns, "note": note})
        return results

    def low_pass(self, image: str, run: int, radius: float) -> dict[str, Any]:
        """Return what a low-pass of this radius keeps and removes, as data URLs, with its spectrum."""
        _check_range("radius", radius, 0, 4096)
        result = low_passed(self._run(run).config, self._images.crop(image, self._run(run).config), radius)
        kept, removed = (data_url(pixels, optimize=False) for pixels in (result.kept, result.removed))
        return {"kept": kept, "removed": removed, "share": result.share, "spectrum": result.spectrum}

    def attention(self, image: str, run: int) -> dict[str, Any]:
        """Return attention over an image as data URLs by column: of the queries of a run's attentive probe.

        Without a probe of the newest weights it is that of the last block. Raises UserError if it has no maps either.
        """
        config = self._run(run).config
        with self._models.encoder(run) as (encoder, step):
            try:
                probe, classes = load_newest_probe(self._run(run).folder, step)
                crop = self._images.crop(image, config, evaluation=True)
                drawn = draw_query_attention(encoder, config, crop, probe)
                about = f"queries of its attentive probe of {len(classes):,} classes, those of the largest weight"
            except (UserError, OSError):  # as a rule there is no probe
                maps = draw_attention(encoder, config, self._images.crop(image, config))
                drawn, about = {"all heads": maps["all heads"]}, "last block, mean of all heads"
        columns = {name: data_url(pixels[0], optimize=False) for name, pixels in drawn.items()}
        note = self._models.notes[run]
        return {"about": f"{about}. {note}" if note else about, "columns": columns}

    def start_index(self, encoder: int) -> None:
        """Start to compute the index of an encoder, unless it exists."""
        self._encoder(encoder).start()

    def indexes(self) -> list[dict[str, Any] | None]:
        """Return the progress of each encoder's index: done, total, error and complete; None before its start."""
        return [
            {"done": e.done, "total": e.total, "error": e.error, "complete": e.state == "ready"} if e.state else None
            for e in self._encoders
        ]

    def start_map(self, encoder: int) -> None:
        """Start to write the map of an encoder's index, unless it exists. Raises UserError before the index does."""
        chosen = self._encoder(encoder)
        if chosen.index is None or chosen.encoder is None:
            raise UserError("the index is not complete yet")
        config = chosen.encoder.config
        self._maps[encoder].start(chosen.index, self._images.data(image_spec(config)), config)

    def maps(self) -> list[str]:
        """Return the state of each encoder's map: see `Atlas.state`."""
        return [one.state for one in self._maps]

    def map_folder(self, encoder: int) -> Path:
        """Return the folder of a map. Raises UserError if it does not exist."""
        self._encoder(encoder)
        if self._maps[encoder].state != "ready":
            raise UserError("there is no map of this encoder yet")
        return self._maps[encoder].folder

    def neighbors(self, image: str, count: int) -> list[dict[str, Any]]:
        """Return the `count` images nearest to an image, by each encoder with a complete index."""
        _check_range("count", count, 1, _MAX_ROWS)
        result = []
        for number, encoder in enumerate(self._encoders):
            if encoder.index is None or encoder.encoder is None:
                continue
            crop = self._images.crop(image, encoder.encoder.config, evaluation=True)
            own = self._images.index(image, encoder.encoder.image_spec) if image.startswith("d") else None
            found = encoder.index.query(encoder.embed(crop), count, own)
            result.append({"encoder": number, "images": [self._found(index, cosine) for index, cosine in found]})
        return result

    def listed(self, encoder: int, kind: str, count: int = _MAX_ROWS) -> list[dict[str, Any]]:
        """Return near-duplicates ("duplicates"), or the images least like any other ("outliers").

        Raises:
            UserError: If the index is not complete.
        """
        index = self._encoder(encoder).index
        if kind not in ("duplicates", "outliers"):
            raise UserError(f"there is no list '{kind[:20]}'")
        if index is None:
            raise UserError("the index is not complete yet")
        if kind == "duplicates":
            return [
                self._found(i, cosine) | {"other": self._found(j, cosine)} for i, j, cosine in index.duplicates(count)
            ]
        return [self._found(i, cosine) for i, cosine in index.outliers(count)]

    def listed_csv(self, encoder: int, kind: str) -> str:
        """Return `listed` for all images as CSV."""
        rows = self.listed(encoder, kind, 10**9)
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(["file", "nearest", "cosine"] if kind == "duplicates" else ["file", "cosine"])
        for row in rows:
            others = [csv_cell(self._path(row["other"]["image"]))] if kind == "duplicates" else []
            writer.writerow([csv_cell(self._path(row["image"])), *others, f"{row['cosine']:.6f}"])
        return buffer.getvalue()

    def _path(self, image: str) -> str:
        return self._images.name(image, self._spec)

    def _found(self, index: int, cosine: float) -> dict[str, Any]:
        image = f"d{index}"
        return {"image": image, "name": label(self._path(image), 80), "class": self._class_of(image), "cosine": cosine}

    def _run(self, run: int) -> Run:
        if not 0 <= run < len(self.runs):
            raise UserError(f"there is no run {run}")
        return self.runs[run]

    def _encoder(self, encoder: int) -> EncoderIndex:
        if not 0 <= encoder < len(self._encoders):
            raise UserError(f"there is no encoder {encoder}")
        return self._encoders[encoder]


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} must be between {low:,} and {high:,}, not {value:g}")
