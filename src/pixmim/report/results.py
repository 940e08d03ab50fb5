"""What was measured of each model, as rows of values side by side, for the page and for a terminal."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pixmim.evaluation.evals import EVALS, MAJORITY, Eval
from pixmim.utils.console import cell, label
from pixmim.utils.errors import UserError
from pixmim.utils.files import parse_json, read_text
from pixmim.utils.trust import inside

_MAX_FILES = 1000
_MAX_BYTES = 16 * 2**20  # of one file
_MAX_VALUES = 200_000  # of all files together
_LARGEST = 1e15
_LONGEST = 300  # characters of a name that stands in every row


@dataclass(frozen=True)
class ModelResults:
    """The results of one model: what its `evaluations/` hold."""

    name: str
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A value, with the ends of its 95 % interval if it has one."""

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
    each   whether it is the value of one class
    """

    label: str
    on: str
    cells: list[Cell | None]
    each: bool = False

    def is_significant(self, cell: Cell | None) -> bool:
        """Return True if no other value reaches into this one's interval."""
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
    """Return a result reduced to what the page can show, and what was left out. Raises UserError."""
    if not isinstance(content, dict):
        raise UserError("it is not an object")
    name, encoder = content.get("evaluation"), content.get("encoder")
    if not isinstance(name, str) or name not in EVALS:
        raise UserError(f"its evaluation is {str(name)[:40]!r}, and not one of {', '.join(EVALS)}")
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
    """What was measured, side by side: a column for each encoder, by name, and a row for each value.

    each  the values of each class
    """

    columns: list[str]
    rows: list[Row]
    each: list[Row]


def compare(models: list[ModelResults]) -> Comparison:
    """Build a row for each value that its evaluation shows; values measured with the same settings share one.

    Rows of different settings have different labels. A baseline that several evaluations give has one row. Encoders
    without results have no column; untrained ones with the same values throughout share one.
    """
    columns = [(model, which) for model in models for which in ("untrained", "trained")]
    merged: dict[tuple[str, str, bool], list[Row]] = {}
    for name, evaluation in EVALS.items():
        groups: dict[str, list[tuple[ModelResults, dict[str, Any]]]] = {}
        for model in models:
            for result in model.results:
                if result["evaluation"] == name:
                    groups.setdefault(_key(result), []).append((model, result))
        settings = [json.loads(key) for key in sorted(groups)]
        for key, on, mark in zip(sorted(groups), map(_data, settings), _marks(settings), strict=True):
            for row in _rows(evaluation, groups[key], columns, label(on, _LONGEST), mark):
                _merge(row, merged.setdefault((row.label, row.on, row.each), []))
    return _narrowed(columns, [row for rows in merged.values() for row in rows])


def _rows(
    evaluation: Eval,
    results: list[tuple[ModelResults, dict[str, Any]]],
    columns: list[tuple[ModelResults, str]],
    on: str,
    mark: str,
) -> Iterator[Row]:
    """Yield the rows of results that have the same settings. `mark` is what tells these from others."""
    keys = list(dict.fromkeys(key for _, result in results for key in result["values"]))

    def find_cell(model: ModelResults, which: str, key: str) -> Cell | None:
        mine = [result for m, result in results if m is model and result["encoder"] == which]
        cells = (_cell(result, key, evaluation.unit) for result in mine)
        return next((cell for cell in cells if cell is not None), None)

    for pattern, title in [*evaluation.display_names.items(), *evaluation.class_names.items()]:
        for key in keys:
            words = _matched(key, pattern)
            if words is not None:
                text = label(_filled(title, words) + mark * (MAJORITY not in title), _LONGEST)
                cells = [find_cell(model, which, key) for model, which in columns]
                yield Row(text, on, cells, pattern in evaluation.class_names)


def _merge(row: Row, rows: list[Row]) -> None:
    """Fill a row's cells into the first of the rows that it does not contradict, or append it."""
    for i, other in enumerate(rows):
        if all(a is None or b is None or a == b for a, b in zip(row.cells, other.cells, strict=True)):
            rows[i] = replace(row, cells=[a or b for a, b in zip(row.cells, other.cells, strict=True)])
            return
    rows.append(row)


def circumstances(results: list[dict[str, Any]]) -> list[str]:
    """Return what each result was measured on, and what tells its settings from others of the same evaluation."""
    found = [""] * len(results)
    for name in {result["evaluation"] for result in results}:
        mine = [i for i, result in enumerate(results) if result["evaluation"] == name]
        for i, mark in zip(mine, _marks([results[i]["settings"] for i in mine]), strict=True):
            found[i] = label(_data(results[i]["settings"]) + mark, _LONGEST)
    return found


def _marks(settings: list[dict[str, Any]]) -> list[str]:
    """Describe how each of several settings differs from the others of the same test data."""
    alike: dict[str, list[dict[str, Any]]] = {}
    flat = [{**each, **(each["changes"] if isinstance(each.get("changes"), dict) else {})} for each in settings]
    for each in flat:
        alike.setdefault(_data(each), []).append(each)
    marks = []
    for each in flat:
        names = [
            n for n in sorted(each) if n != "changes" and any(other.get(n) != each[n] for other in alike[_data(each)])
        ]
        marks.append("".join(f", {n} {label(str(each[n]))}" for n in names if each[n] not in (None, "", [])))
    return marks


def _filled(title: str, words: tuple[str, ...]) -> str:
    """Replace the stars of a title, in order."""
    first, *rest = title.split("*")
    return first + "".join(word.replace("_", " ") + part for word, part in zip(words, rest, strict=True))


def _narrowed(columns: list[tuple[ModelResults, str]], rows: list[Row]) -> Comparison:
    """Drop columns that are empty or repeat another untrained one, and name the others."""
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
    rows = [replace(row, cells=[row.cells[i] for i in kept]) for row in rows]
    return Comparison(list(kept.values()), [r for r in rows if not r.each], [r for r in rows if r.each])


def table(models: list[ModelResults], width: int) -> Table:
    """Return the comparison as a table for a terminal of that width, with intervals if they fit."""
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
    """Return what must be equal for values to share a row. The names of k-NN's values contain k."""
    return json.dumps({name: value for name, value in result["settings"].items() if name != "k"}, sort_keys=True)


def _matched(key: str, shown: str) -> tuple[str, ...] | None:
    """Return what the stars of a pattern match in a key; None if it does not match."""
    found = _pattern(shown).fullmatch(key)
    return found.groups() if found else None


@cache
def _pattern(shown: str) -> re.Pattern[str]:
    return re.compile("(.+?)".join(map(re.escape, shown.split("*"))), re.DOTALL)


def _cell(result: dict[str, Any], key: str, unit: str) -> Cell | None:
    values = result["values"]
    if values.get(key) is None:
        return None
    return Cell(values[key], unit, values.get(key + "/low"), values.get(key + "/high"))


def _data(settings: dict[str, Any]) -> str:
    """Return the test data, or the only data."""
    return str(settings.get("test") or settings.get("data") or "")
