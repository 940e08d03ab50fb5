"""The account of images that cannot be read: a line each in skipped.csv; too many of them end the run."""

import csv
import io
from collections import Counter
from pathlib import Path
from threading import Lock

import numpy as np

from pixmim.utils.console import csv_cell
from pixmim.utils.errors import UserError
from pixmim.utils.files import append, read_text

_ENOUGH = 50  # images to have seen before a share of them says something

_MAX_BYTES = 2**28

_HEADER = ["image", "reason"]


class BadImageLog:
    """Safe to use from several threads. A file of an interrupted run is continued; no image stands in it twice.

    path      skipped.csv (image, reason), made when the first image is skipped; None: keep no file
    total     images in the data set
    max_share  more than this share of unreadable images raises UserError
    rule       who decided on that share, as the error says it
    """

    def __init__(
        self, path: Path | None, total: int, max_share: float, rule: str = "that --max-bad-fraction allows"
    ) -> None:
        self._path, self._max_share, self._rule = path, max_share, rule
        self._seen = np.zeros(total, bool)
        self._count = 0  # of them
        self._bad: dict[int, str] = {}
        self._kinds: Counter[str] = Counter()
        self._lock = Lock()
        self._written: set[str] = set()
        if path is not None and path.exists():
            self._written = {row[0] for row in read_bad_images(path)[0]}

    def __len__(self) -> int:
        return len(self._bad)

    def __contains__(self, index: int) -> bool:
        return index in self._bad

    def mark_ok(self, index: int) -> None:
        """An image was read. Raises UserError as `add` does: threads may come to the unreadable ones first."""
        if not self._seen[index]:
            with self._lock:
                self._see(index)

    def record(self, index: int, image: str, reason: str) -> None:
        """An image cannot be read. Raises UserError if that makes too many."""
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = f"{image}: {reason}"
            self._kinds[reason.split(": ")[0]] += 1
            if self._path is not None and csv_cell(image) not in self._written:
                _append(self._path, [[image, " ".join(reason.split())]])
                self._written.add(csv_cell(image))
            self._see(index)

    def _see(self, index: int) -> None:
        self._count += not self._seen[index]
        self._seen[index] = True
        if self._count >= min(_ENOUGH, len(self._seen)) and len(self._bad) > self._max_share * self._count:
            raise self.error()

    @property
    def reasons(self) -> str:
        """Reasons with how many images each has, in a line: what stands before the first colon of each."""
        return "; ".join(f"{count:,} x {kind}" for kind, count in self._kinds.most_common(20))

    def error(self) -> UserError:
        """The error that ends the run, with a few of the reasons."""
        some = "\n".join(f"  {line}" for line in list(self._bad.values())[:3])
        where = f" All are listed in {self._path}." if self._path else ""
        return UserError(
            f"{len(self._bad)} of the first {self._count} images cannot be read, more than the share of "
            f"{self._max_share:.0%} {self._rule}.{where}\n{some}"
        )


def read_bad_images(path: Path) -> tuple[list[list[str]], str]:
    """Read the rows of a skipped.csv without its header, and what is wrong with the file; empty if nothing is.

    Lines that are not CSV are left out.
    """
    try:
        reader = csv.reader(io.StringIO(read_text(path, _MAX_BYTES), newline=""))
    except OSError as error:
        return [], f"{path} cannot be read: {error.strerror}"
    rows, problem = list[list[str]](), ""
    while True:
        try:
            rows += [row for row in [next(reader)] if row and row != _HEADER]
        except StopIteration:
            return rows, problem
        except csv.Error as error:
            problem = problem or f"{path}, line {reader.line_num}: {error}"


def merge_logs(folder: Path) -> int:
    """Put what several processes skipped (skipped-1.csv and so on) into skipped.csv; gives how many images it names."""
    whole = folder / "skipped.csv"
    named = {row[0] for row in read_bad_images(whole)[0]} if whole.exists() else set()
    for path in sorted(folder.glob("skipped-*.csv")):
        found, problem = read_bad_images(path)
        rows = {row[0]: row for row in found if row[0] not in named}
        if rows:
            _append(whole, list(rows.values()))
        named |= rows.keys()
        if not problem:
            path.unlink()
    return len(named)


def _append(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    cells = [[csv_cell(cell) for cell in row] for row in ([] if path.exists() else [_HEADER]) + rows]
    csv.writer(text).writerows(cells)
    path.parent.mkdir(parents=True, exist_ok=True)  # the first line may come before any result
    append(path, text.getvalue())
