"""What was measured of each model, as rows of values side by side, for the page and for a terminal."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pixmim.disk import parse_json, read_text
from pixmim.errors import UserError
from pixmim.protocols import PROTOCOLS
from pixmim.terminal import cell, label
from pixmim.trust import inside

_MAX_FILES = 1000
_MAX_BYTES = 4 * 2**20  # of one file
_MAX_VALUES = 50_000  # of all files together
_LARGEST = 1e15
_LONGEST = 300  # characters of a name that stands in every row


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


def read_results(folder: Path, warn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """The results that a folder's `evaluations/` hold, as far as they can be read.

    warn  called with each file that cannot, and with what of a file is left out
    """
    paths, found, count = sorted(folder.glob("evaluations/*.json")), list[dict[str, Any]](), 0
    for path in paths[:_MAX_FILES]:
        try:
            text = read_text(inside(folder, f"evaluations/{path.name}"), _MAX_BYTES)
            result, bad = _checked(parse_json(text, str(path)))
        except UserError as error:
            warn(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        except OSError as error:
            warn(f"{path} cannot be read: {error.strerror}")
            continue
        if count + len(result["values"]) > _MAX_VALUES:
            warn(f"{folder / 'evaluations'}: after {_MAX_VALUES:,} values, the rest is left out from {path.name} on")
            break
        count += len(result["values"])
        if bad:
            warn(f"{path}: {bad[0]}" + (f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""))
        found.append(result)
    if len(paths) > _MAX_FILES:
        warn(f"{folder / 'evaluations'}: only the first {_MAX_FILES:,} of {len(paths):,} files are read")
    return found


def _checked(content: Any) -> tuple[dict[str, Any], list[str]]:
    """A result with only what the page can show, and what was left out of it. Raises UserError."""
    if not isinstance(content, dict):
        raise UserError("it is not an object")
    name, encoder = content.get("evaluation"), content.get("encoder")
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise UserError(f"its evaluation is {str(name)[:40]!r}, and not one of {', '.join(PROTOCOLS)}")
    if encoder not in ("trained", "untrained"):
        raise UserError(f"its encoder is {str(encoder)[:40]!r}, and not trained or untrained")
    parts = {key: content.get(key, {}) for key in ("settings", "values", "pictures")}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise UserError(f"its {key} are not an object")
    good = {"evaluation": name, "encoder": encoder, "settings": parts["settings"]}
    bad, kinds = list[str](), {"values": _is_value, "pictures": lambda value: isinstance(value, str)}
    for part, fits in kinds.items():
        good[part] = {key: value for key, value in parts[part].items() if fits(value)}
        bad += [f"{part} '{key[:40]}' is {str(value)[:40]!r}" for key, value in parts[part].items() if not fits(value)]
    return good, bad


def _is_value(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < _LARGEST)


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
        groups: dict[str, list[tuple[Measured, dict[str, Any]]]] = {}
        for m in models:
            for r in (r for r in m.results if r["evaluation"] == name):
                groups.setdefault(_key(r), []).append((m, r))
        for settings, mine in sorted(groups.items(), key=lambda group: group[0]):
            keys = list(dict.fromkeys(key for _, r in mine for key in r["values"]))
            on = label(_data(json.loads(settings)), _LONGEST)
            for shown, title in protocol.shown.items():
                for key in [k for k in keys if _matches(k, shown)]:
                    cells = [
                        next(
                            (_cell(r, key, protocol.unit) for m, r in mine if m is model and r["encoder"] == which),
                            None,
                        )
                        for model, which in columns
                    ]
                    rest = label(key[len(shown) - 1 :], _LONGEST) if shown.endswith("*") else ""
                    found.append(Row(title.replace("*", rest.replace("_", " ")), on, cells))
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
    result = Table("", box=None)
    for name in comparison.columns:
        result.add_column(cell(name))
    several = len({row.on for row in comparison.rows}) > 1
    if several:
        result.add_column("on")
    before = ""
    for row in comparison.rows:
        texts = ["-" if c is None else f"{c.text} ({c.range})" if intervals and c.range else c.text for c in row.cells]
        on = "" if row.on == before else row.on
        result.add_row(cell(row.label), *texts, *[cell(on)] * several)
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
