"""Log of unreadable images: a line each in skipped.csv. Too many of them end the run."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np

from pixmim.data.dataset import BadImage, ImageDataset
from pixmim.utils.console import csv_cell
from pixmim.utils.errors import UserError
from pixmim.utils.files import append, read_text

_MIN_IMAGES = 50  # read before the fraction of unreadable ones is judged
_MAX_BYTES = 2**28
_HEADER = ["image", "reason"]


class BadImageLog:
    """Unreadable images of a dataset. Safe to use from several threads.

    Args:
        path: skipped.csv, created for the first unreadable image; None for no file. An existing file is continued,
            without repeating images.
        total: Images in the dataset.
        max_fraction: Largest fraction of unreadable images, among those read so far.
        rule: Source of that bound, for the error.
    """

    def __init__(
        self, path: Path | None, total: int, max_fraction: float, rule: str = "that --max-bad-fraction allows"
    ) -> None:
        self._path, self._max_fraction, self._rule = path, max_fraction, rule
        self._seen, self._num_seen = np.zeros(total, bool), 0
        self._bad: dict[int, str] = {}
        self._reasons: Counter[str] = Counter()
        self._lock = Lock()
        exists = path is not None and path.exists()
        self._written = {row[0] for row in read_bad_images(path)[0]} if path is not None and exists else set[str]()

    def __len__(self) -> int:
        return len(self._bad)

    def __contains__(self, index: int) -> bool:
        return index in self._bad

    @contextmanager
    def attempt(self, dataset: ImageDataset, index: int) -> Iterator[None]:
        """Record whether an image can be read within a `with` statement, which a BadImage ends without an error.

        Raises:
            UserError: If too many are unreadable.
        """
        try:
            yield
        except BadImage as error:
            self.record(index, dataset.path_of(index), str(error))
        else:
            self.mark_ok(index)

    def mark_ok(self, index: int) -> None:
        """Record that an image was read. Raises UserError as `record`: threads may have read unreadable ones first."""
        if not self._seen[index]:
            with self._lock:
                self._see(index)

    def record(self, index: int, image: str, reason: str) -> None:
        """Record that an image cannot be read. Raises UserError if too many are unreadable."""
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = f"{image}: {reason}"
            self._reasons[reason.split(": ")[0]] += 1
            if self._path is not None and csv_cell(image) not in self._written:
                _append(self._path, [[image, " ".join(reason.split())]])
                self._written.add(csv_cell(image))
            self._see(index)

    def _see(self, index: int) -> None:
        self._num_seen += not self._seen[index]
        self._seen[index] = True
        self.check()

    def check(self) -> None:
        """Raise UserError if too many of the images read so far are unreadable."""
        enough = self._num_seen >= min(_MIN_IMAGES, len(self._seen))
        if enough and len(self._bad) > self._max_fraction * self._num_seen:
            raise self.error()

    @property
    def reasons(self) -> str:
        """Number of images by reason, in a line. A reason is the message up to its first colon."""
        return "; ".join(f"{count:,} x {reason}" for reason, count in self._reasons.most_common(20))

    def summary(self, dataset: ImageDataset) -> str:
        """Return a line on how many images are skipped, and why; "" if none is."""
        if not self._bad:
            return ""
        return f"{len(self):,} of the {len(dataset):,} images of {dataset.spec} are skipped: {self.reasons}"

    def error(self) -> UserError:
        """Return the error that ends a run, with three of the unreadable images."""
        examples = "\n".join(f"  {line}" for line in list(self._bad.values())[:3])
        path = f" All are listed in {self._path}." if self._path else ""
        return UserError(
            f"{len(self._bad)} of the first {self._num_seen} images cannot be read, more than the "
            f"{self._max_fraction:.0%} {self._rule}.{path}\n{examples}"
        )


def read_bad_images(path: Path) -> tuple[list[list[str]], str]:
    """Return the valid rows of a skipped.csv without the header, and its first problem; "" if there is none."""
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
    """Merge the logs of all ranks (skipped-1.csv and so on) into skipped.csv; return the number of images in it."""
    merged = folder / "skipped.csv"
    names = {row[0] for row in read_bad_images(merged)[0]} if merged.exists() else set()
    for path in sorted(folder.glob("skipped-*.csv")):
        all_rows, problem = read_bad_images(path)
        rows = {row[0]: row for row in all_rows if row[0] not in names}
        if rows:
            _append(merged, list(rows.values()))
        names |= rows.keys()
        if not problem:
            path.unlink()
    return len(names)


def _append(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    header = [] if path.exists() else [_HEADER]
    csv.writer(text).writerows([[csv_cell(cell) for cell in row] for row in header + rows])
    path.parent.mkdir(parents=True, exist_ok=True)  # a run's folder may not exist before its first result
    append(path, text.getvalue())
