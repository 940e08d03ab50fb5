"""Compare results of models in rows of values, for the page and for a terminal."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pixmim.data.uri import describe_split
from pixmim.evaluation.evals import EVALS, MAJORITY, Eval, labels_per_class
from pixmim.utils.console import cell, label
from pixmim.utils.errors import UserError
from pixmim.utils.files import parse_json, read_text, readable
from pixmim.utils.trust import inside

_MAX_FILES = 1000
_MAX_BYTES = 16 * 2**20  # of one file
_MAX_VALUES = 200_000  # of all files
_MAX_VALUE = 1e15
_MAX_LABEL = 300  # characters
_MAX_EACH = 10  # values of repetitions in a cell
_PART = re.compile(r"(.+)/(?:low|high|std|(?:fold|draw)/\d+)", re.DOTALL)  # belongs to another value
_REPEATED = re.compile(r"(shots|block)/([^/]+)/")
_ERROR = re.compile(r"in_memory/(?:head|probe)/clean")  # the values with an interval of which less is better
_IN_LABEL = ("changes", "shots", "layers")  # settings that need no mention, because labels show them


@dataclass(frozen=True)
class ModelResults:
    """The results of one model, as `read_results` returns them."""

    name: str
    results: list[dict[str, Any]]


_Measured = tuple[ModelResults, dict[str, Any]]  # a model, and one of its results


@dataclass(frozen=True)
class Cell:
    """A value and the ends of its 95 % interval, or the mean of `each` value with their standard deviation."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    each: tuple[float, ...] = ()
    older_step: int | None = None  # training step of the weights, if other values are of a later one

    @property
    def text(self) -> str:
        deviation = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        step = "" if self.older_step is None else f" (step {self.older_step:,})"
        return f"{self.value:.1f}{deviation} {self.unit}".strip() + step

    @property
    def range(self) -> str:
        if self.each and len(self.each) <= _MAX_EACH:
            return ", ".join(f"{value:.1f}" for value in self.each)
        low, high = (min(self.each), max(self.each)) if self.each else (self.low, self.high)
        return "" if low is None or high is None else f"{low:.1f} to {high:.1f}"

    @property
    def band(self) -> tuple[float, float]:
        """The 95 % interval, or one standard deviation to either side."""
        deviation = self.deviation or 0.0
        low, high = self.value - deviation, self.value + deviation
        return low if self.low is None else self.low, high if self.high is None else self.high


@dataclass(frozen=True)
class Row:
    """One value of one evaluation with one set of settings, for every encoder."""

    label: str
    on: str  # data that it was measured on
    cells: list[Cell | None]  # one per column; None if it was not measured
    per_class: bool = False  # True for the value of a single class
    key: str = ""  # name of the value in the JSON

    def is_significant(self, cell: Cell | None) -> bool:
        """Return True if all other values are worse than this cell's interval."""
        others = [c.value for c in self.cells if c is not None and c is not cell]
        if cell is None or cell.low is None or cell.high is None or not others:
            return False
        return cell.high < min(others) if _ERROR.fullmatch(self.key) else cell.low > max(others)


@dataclass(frozen=True)
class Comparison:
    """Results of several encoders: names of the columns, rows of values, and rows of values of single classes."""

    columns: list[str]
    rows: list[Row]
    per_class: list[Row]
    pairs: list[tuple[int | None, int | None]]  # columns of each model, trained and initial; None if not measured


def read_results(folder: Path, warn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Read the results in `evaluations/` of an untrusted folder; `warn` gets a line for each file or value left out."""
    paths, results, total = sorted(folder.glob("evaluations/*.json")), list[dict[str, Any]](), 0
    for path in paths[:_MAX_FILES]:
        try:
            with readable(path):
                text = read_text(inside(folder, f"evaluations/{path.name}"), _MAX_BYTES)
            result, bad = _validate(parse_json(text, str(path)))
        except UserError as error:
            warn(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        total += len(result["values"])
        if total > _MAX_VALUES:
            warn(f"{folder / 'evaluations'}: more than {_MAX_VALUES:,} values; left out from {path.name} on")
            break
        if bad:
            warn(f"{path}: {bad[0]}" + f", and {len(bad) - 1:,} more" * (len(bad) > 1))
        results.append(result)
    if len(paths) > _MAX_FILES:
        warn(f"{folder / 'evaluations'}: only the first {_MAX_FILES:,} of {len(paths):,} files are read")
    return results


def _validate(content: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the parts of a result that the page shows, and what was left out. Raises UserError."""
    if not isinstance(content, dict):
        raise UserError("not a JSON object")
    name, encoder = content.get("evaluation"), content.get("encoder")
    if not isinstance(name, str) or name not in EVALS:
        raise UserError(f"unknown evaluation {str(name)[:40]!r}; expected one of {', '.join(EVALS)}")
    if encoder not in ("trained", "untrained"):
        raise UserError(f"unknown encoder {str(encoder)[:40]!r}; expected trained or untrained")
    parts = {key: content.get(key, {}) for key in ("settings", "values", "pictures")}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise UserError(f"its {key} are not an object")
    step, digest = content.get("step"), content.get("data_digest")
    step = step if type(step) is int and 0 <= step < _MAX_VALUE else 0
    digest = digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{8}", digest) else ""
    result: dict[str, Any] = {"evaluation": name, "encoder": encoder, "step": step, "data_digest": digest}
    result["settings"], bad = parts["settings"], list[str]()
    for key, is_valid in (("values", _is_value), ("pictures", lambda value: isinstance(value, str))):
        result[key] = {name: value for name, value in parts[key].items() if is_valid(value)}
        bad += [f"{key} '{n[:40]}' is {str(v)[:40]!r}" for n, v in parts[key].items() if not is_valid(v)]
    return result, bad


def _is_value(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < _MAX_VALUE)


def compare(models: list[ModelResults]) -> Comparison:
    """Build a row for each value that its evaluation displays.

    Values measured with the same settings, on the same images and labels, share a row; rows of different ones have
    different labels. A baseline of several evaluations has one row. Rows of one probe are in the order of labels per
    class, or of blocks. Encoders without results have no column, and untrained ones with equal values share one. Of
    several results with the same settings, that of the latest step counts; the step is shown where others are of a
    later one.
    """
    columns = [(model, state) for model in models for state in ("untrained", "trained")]
    merged: dict[tuple[str, ...], list[Row]] = {}
    for name, evaluation in EVALS.items():
        groups: dict[str, list[_Measured]] = {}
        for model in models:
            for result in model.results:
                if result["evaluation"] == name:  # k is part of the names of k-NN's values
                    key = json.dumps({n: v for n, v in result["settings"].items() if n != "k"}, sort_keys=True)
                    groups.setdefault(key, []).append((model, result))
        groups = dict(_by_data(groups))
        settings = [json.loads(key) for key in sorted(groups)]
        for key, each, suffix in zip(sorted(groups), settings, _differences(settings), strict=True):
            same = json.dumps({n: v for n, v in each.items() if n not in ("shots", "layers")})  # which the label has
            for row in _rows(evaluation, groups[key], columns, each, suffix):
                shared = (row.on,) if MAJORITY in row.label else (same, row.key)
                _merge(row, merged.setdefault((row.label, *shared), []))
    return _drop_columns(columns, _in_order([row for rows in merged.values() for row in rows]))


def _by_data(groups: dict[str, list[_Measured]]) -> Iterator[tuple[str, list[_Measured]]]:
    """Yield groups of results with the same settings; those of several data, which changed meanwhile, one by one.

    A digest of the data is then one of the settings. It is unknown for results of older versions.
    """
    for key, group in groups.items():
        digests = list(dict.fromkeys(result.get("data_digest", "") for _, result in group))
        if len([digest for digest in digests if digest]) < 2:
            yield key, group
            continue
        for digest in digests:
            settings = json.loads(key) | {"images": digest or "unknown"}
            same = [each for each in group if each[1].get("data_digest", "") == digest]
            yield json.dumps(settings, sort_keys=True), same


def _in_order(rows: list[Row]) -> list[Row]:
    """Sort the values of one probe by labels per class, or by block: several results may have measured them."""
    first: dict[tuple[str, str, str], int] = {}

    def position(item: tuple[int, Row]) -> tuple[int, float]:
        i, row = item
        match = _REPEATED.match(row.key)
        if match is None:
            return i, 0.0
        number = float(match[2]) if match[2].isascii() and match[2].isdigit() else float("inf")  # "all"
        return first.setdefault((match[1], row.label.partition(": ")[2], row.on), i), number

    return [row for _, row in sorted(enumerate(rows), key=position)]


def _rows(
    evaluation: Eval,
    results: list[_Measured],
    columns: list[tuple[ModelResults, str]],
    settings: dict[str, Any],
    suffix: str,
) -> Iterator[Row]:
    """Yield the rows of results with the same settings; labels end with the suffix."""
    every = dict.fromkeys(key for _, result in results for key in result["values"])
    parts = {key: match[1] for key in every if (match := _PART.fullmatch(key))}
    keys = [key for key in every if parts.get(key) not in every]

    # Of each column: values, and their step if others are of a later one.
    latest = list[tuple[list[dict[str, Any]], int | None]]()
    for model, state in columns:
        own = [result for owner, result in results if owner is model and result["encoder"] == state]
        step = max((result.get("step", 0) for result in own), default=0)
        newest = max((each.get("step", 0) for each in model.results if each["encoder"] == state), default=0)
        chosen = [result["values"] for result in own if result.get("step", 0) == step]
        latest.append((chosen, step if step < newest else None))

    def find_cell(each_values: list[dict[str, Any]], older: int | None, key: str) -> Cell | None:
        for values in each_values:
            if values.get(key) is not None:
                low, high, deviation = (values.get(f"{key}/{end}") for end in ("low", "high", "std"))
                numbered = (map(values.get, (f"{key}/{part}/{i}" for i in count(1))) for part in ("fold", "draw"))
                each: list[Any] = [
                    value for part in numbered for value in takewhile(lambda value: value is not None, part)
                ]
                return Cell(values[key], evaluation.unit, low, high, deviation, tuple(each), older)
        return None

    for pattern, title in [*evaluation.display_names.items(), *evaluation.class_names.items()]:
        for key in keys:
            match = _pattern(pattern).fullmatch(key)
            if match is not None:
                first, *rest = (*match.groups(), "")
                words = iter([labels_per_class(first) if key.startswith("shots/") else first, *rest])
                name = re.sub(r"\*", lambda _, words=words: next(words), title)  # type: ignore[misc]
                if pattern not in evaluation.class_names:  # names of corruptions
                    name = name.replace("_", " ")
                text = label(name + suffix * (MAJORITY not in title), _MAX_LABEL)
                cells = [find_cell(values, older, key) for values, older in latest]
                on = label(_data(settings, key), _MAX_LABEL)
                yield Row(text, on, cells, pattern in evaluation.class_names, key)


@cache
def _pattern(key: str) -> re.Pattern[str]:
    """Compile a key in which each star matches any text."""
    return re.compile("(.+?)".join(map(re.escape, key.split("*"))), re.DOTALL)


def _merge(row: Row, rows: list[Row]) -> None:
    """Fill a row's cells into the first row that does not contradict it, or append it."""
    for i, other in enumerate(rows):
        if all(a is None or b is None or a == b for a, b in zip(row.cells, other.cells, strict=True)):
            rows[i] = replace(row, cells=[a or b for a, b in zip(row.cells, other.cells, strict=True)])
            return
    rows.append(row)


def circumstances(results: list[dict[str, Any]]) -> list[str]:
    """Return the data of each result, and how its settings differ from others of the same evaluation."""
    texts = [""] * len(results)
    for name in {result["evaluation"] for result in results}:
        same = [i for i, result in enumerate(results) if result["evaluation"] == name]
        for i, suffix in zip(same, _differences([results[i]["settings"] for i in same]), strict=True):
            texts[i] = label(_data(results[i]["settings"]) + suffix, _MAX_LABEL)
    return texts


def _differences(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Describe how each of several settings differs from the others with the same test data."""
    groups: dict[str, list[dict[str, Any]]] = {}
    flat = [{**each, **(each["changes"] if isinstance(each.get("changes"), dict) else {})} for each in settings]
    for each in flat:
        groups.setdefault(_data(each), []).append(each)
    texts = []
    for each in flat:
        group = groups[_data(each)]
        names = [n for n in sorted(each) if n not in _IN_LABEL and any(other.get(n) != each[n] for other in group)]
        values = {n: [describe_split(str(other.get(n))) for other in (each, *group)] for n in names}
        texts.append("".join(f", {n} {_short(*values[n])}" for n in names if each[n] not in (None, "", [])))
    return texts


def _short(text: str, *others: str) -> str:
    """Return a label of a text, a longer one if another text has the same label."""
    short = label(text)
    alike = any(label(other) == short for other in others if other != text)
    return label(text, _MAX_LABEL) if alike else short


def _drop_columns(columns: list[tuple[ModelResults, str]], rows: list[Row]) -> Comparison:
    """Drop columns that are empty or repeat another untrained one, and name the others."""
    names, shown_as = dict[int, str](), dict[int, int]()
    for i, (model, state) in enumerate(columns):
        cells = [row.cells[i] for row in rows]
        twins = [k for k in names if columns[k][1] == state == "untrained" and [row.cells[k] for row in rows] == cells]
        if not any(cells):
            continue
        shown_as[i] = twins[0] if twins else i
        if twins:
            names[twins[0]] = state
        elif len(columns) == 2:
            names[i] = state
        else:
            names[i] = model.name if state == "trained" else f"{model.name}, {state}"
    number = {i: list(names).index(k) for i, k in shown_as.items()}
    pairs = [(number.get(i + 1), number.get(i)) for i in range(0, len(columns), 2)]
    rows = [replace(row, cells=[row.cells[i] for i in names]) for row in rows]
    per_class = [row for row in rows if row.per_class]
    return Comparison(list(names.values()), [row for row in rows if not row.per_class], per_class, pairs)


def _data(settings: dict[str, Any], key: str = "") -> str:
    """Return the test data, or the only data; of the value `key` of ImageNet-C, -A, -R or -Sketch these."""
    if key.startswith("imagenet_"):
        return str(settings.get(key.partition("/")[0]) or "")
    return describe_split(str(settings.get("test") or settings.get("labelled") or settings.get("data") or ""))


def table(models: list[ModelResults], width: int) -> Table:
    """Return the comparison as a table for a terminal of `width` columns, with intervals if they fit."""
    comparison = compare(models)
    full = _build_table(comparison, intervals=True)
    needed = Console(width=10_000).measure(full).maximum  # a narrow console would limit it
    return full if needed <= width else _build_table(comparison, intervals=False)


def _build_table(comparison: Comparison, *, intervals: bool) -> Table:
    result = Table("", box=None)
    for name in comparison.columns:
        result.add_column(cell(name))
    several = len({row.on for row in comparison.rows}) > 1
    if several:
        result.add_column("on")
    previous = ""
    for row in comparison.rows:
        texts = ["-" if c is None else f"{c.text} ({c.range})" if intervals and c.range else c.text for c in row.cells]
        on = "" if row.on == previous else row.on
        result.add_row(cell(row.label), *texts, *[cell(on)] * several)
        previous = row.on
    return result
