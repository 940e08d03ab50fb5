"""What was measured of each model, as rows of values side by side, for the page and for a terminal."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pixmim.protocols import PROTOCOLS


@dataclass(frozen=True)
class Measured:
    """The results of one model: what its `evaluations/` hold."""

    name: str
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A value with the ends of its 95 % interval, where it has them."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        return f"{self.value:.1f} {self.unit}".strip()

    @property
    def range(self) -> str:
        return "" if self.low is None or self.high is None else f"{self.low:.1f} to {self.high:.1f}"


@dataclass(frozen=True)
class Row:
    """One value, of one evaluation with one set of settings, of every encoder.

    on     the data it was measured on
    cells  one for each column of the comparison; None where that was not measured
    """

    label: str
    on: str
    cells: list[Cell | None]

    def stands_out(self, cell: Cell | None) -> bool:
        """Whether no other value reaches into this one's interval."""
        others = [c.value for c in self.cells if c is not None and c is not cell]
        return cell is not None and cell.low is not None and bool(others) and cell.low > max(others)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results that a folder's `evaluations/` hold."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("evaluations/*.json"))]


@dataclass(frozen=True)
class Comparison:
    """What was measured, side by side: a column for each encoder, by name, and a row for each value."""

    columns: list[str]
    rows: list[Row]


def compare(models: list[Measured]) -> Comparison:
    """A row for each value that its protocol shows; values measured with the same settings share one.

    Encoders of which nothing was measured have no column; untrained ones with the same values throughout share one.
    """
    columns = [(model, which) for model in models for which in ("untrained", "trained")]
    found = []
    for name, protocol in PROTOCOLS.items():
        results = [(m, r) for m in models for r in m.results if r["evaluation"] == name]
        for settings in sorted({_key(r) for _, r in results}):
            mine = [(m, r) for m, r in results if _key(r) == settings]
            keys = list(dict.fromkeys(key for _, r in mine for key in r["values"]))
            for shown, label in protocol.shown.items():
                for key in [k for k in keys if _matches(k, shown)]:
                    cells = [
                        next(
                            (_cell(r, key, protocol.unit) for m, r in mine if m is model and r["encoder"] == which),
                            None,
                        )
                        for model, which in columns
                    ]
                    rest = key[len(shown) - 1 :] if shown.endswith("*") else ""
                    found.append(Row(label.replace("*", rest.replace("_", " ")), _data(json.loads(settings)), cells))
    return _narrowed(columns, found)


def _narrowed(columns: list[tuple[Measured, str]], rows: list[Row]) -> Comparison:
    """Without columns that hold nothing or repeat another untrained one, and with a name for each that stays."""
    kept: dict[int, str] = {}
    for i, (model, which) in enumerate(columns):
        cells = [row.cells[i] for row in rows]
        twins = [k for k in kept if columns[k][1] == which == "untrained" and [row.cells[k] for row in rows] == cells]
        if not any(cells):
            continue
        if twins:
            kept[twins[0]] = which
        elif len(columns) == 2:
            kept[i] = which
        else:
            kept[i] = model.name if which == "trained" else f"{model.name}, {which}"
    return Comparison(list(kept.values()), [replace(row, cells=[row.cells[i] for i in kept]) for row in rows])


def table(models: list[Measured], width: int) -> Table:
    """The comparison for a terminal of so many columns: with intervals where they fit; they stand in the page too."""
    comparison = compare(models)
    whole = _table(comparison, intervals=True)
    wants = Console(width=10_000).measure(whole).maximum  # a narrow one would not tell
    return whole if wants <= width else _table(comparison, intervals=False)


def _table(comparison: Comparison, *, intervals: bool) -> Table:
    result = Table("", *comparison.columns, box=None)
    several = len({row.on for row in comparison.rows}) > 1
    if several:
        result.add_column("on")
    before = ""
    for row in comparison.rows:
        texts = ["-" if c is None else f"{c.text} ({c.range})" if intervals and c.range else c.text for c in row.cells]
        result.add_row(row.label, *texts, *["" if row.on == before else row.on] * several)
        before = row.on
    return result


def _key(result: dict[str, Any]) -> str:
    return json.dumps(result["settings"], sort_keys=True)


def _matches(key: str, shown: str) -> bool:
    if shown.endswith("*"):
        return key.startswith(shown[:-1]) and not key.endswith(("/low", "/high"))
    return key == shown


def _cell(result: dict[str, Any], key: str, unit: str) -> Cell | None:
    values = result["values"]
    if values.get(key) is None:
        return None
    return Cell(values[key], unit, values.get(key + "/low"), values.get(key + "/high"))


def _data(settings: dict[str, Any]) -> str:
    """What was measured on, in a few words: the test data, or the only data."""
    return str(settings.get("test") or settings.get("data") or "")
