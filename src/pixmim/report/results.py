"""What was measured of each model, as rows of values side by side, for the page and for a terminal."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pixmim.protocols import PROTOCOLS

WHICH = ("untrained", "trained")


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
    """One value, of one evaluation with one set of settings, of every model.

    on     the data it was measured on
    cells  for each model two, untrained and trained; None where that was not measured
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


def rows(models: list[Measured]) -> list[Row]:
    """A row for each value that its protocol shows; values measured with the same settings share one."""
    found = []
    for name, protocol in PROTOCOLS.items():
        results = [(m, r) for m in models for r in m.results if r["evaluation"] == name]
        for settings in sorted({_key(r) for _, r in results}):
            mine = [(m, r) for m, r in results if _key(r) == settings]
            keys = list(dict.fromkeys(key for _, r in mine for key in r["values"]))
            for shown, label in protocol.shown.items():
                for key in [k for k in keys if _matches(k, shown)]:
                    cells = [
                        next((_cell(r, key, protocol.unit) for m, r in mine if (m.name, r["encoder"]) == column), None)
                        for column in ((model.name, which) for model in models for which in WHICH)
                    ]
                    rest = key[len(shown) - 1 :] if shown.endswith("*") else ""
                    found.append(Row(label.replace("*", rest.replace("_", " ")), _data(json.loads(settings)), cells))
    return found


def table(models: list[Measured]) -> Table:
    """The rows for a terminal: columns that hold nothing are left out."""
    lines = rows(models)
    names = [f"{model.name}: {which}" if len(models) > 1 else which for model in models for which in WHICH]
    full = [i for i in range(len(names)) if any(line.cells[i] for line in lines)]
    many = len(full) > 2 or len({line.on for line in lines}) > 1  # no room for intervals; they stand in the page
    result = Table("", *(names[i] for i in full), box=None)
    if len({line.on for line in lines}) > 1:
        result.add_column("on")
    for line in lines:
        cells = [line.cells[i] for i in full]
        texts = ["-" if c is None else c.text if many or not c.range else f"{c.text} ({c.range})" for c in cells]
        result.add_row(line.label, *texts, *([line.on] if len(result.columns) > len(full) + 1 else []))
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
