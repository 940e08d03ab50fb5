"""The account of images that cannot be read: a line each in skipped.csv; too many of them end the run."""

import csv
import io
import os
from pathlib import Path
from threading import Lock

import numpy as np

from pixmim.disk import read_text
from pixmim.errors import UserError

_MAX_BYTES = 2**30
_ENOUGH = 50  # images to have seen before a share of them says something


class Skipped:
    """Safe to use from several threads. A file of an interrupted run is continued; no image stands in it twice.

    path      skipped.csv (image, reason), made when the first image is skipped; None: keep no file
    total     images in the data set
    max_share  more than this share of unreadable images raises UserError
    rule       who decided on that share, as the error says it
    """

    def __init__(self, path: Path | None, total: int, max_share: float, rule: str = "that --max-bad allows") -> None:
        self._path, self._max_share, self._rule = path, max_share, rule
        self._seen = np.zeros(total, bool)
        self._bad: dict[int, str] = {}
        self._lock = Lock()
        self._written: set[str] = set()
        if path is not None and os.path.lexists(path):
            self._written = {row[0] for row in _rows(path)}

    def __len__(self) -> int:
        return len(self._bad)

    def __contains__(self, index: int) -> bool:
        return index in self._bad

    def passed(self, index: int) -> None:
        """An image was read."""
        self._seen[index] = True

    def add(self, index: int, image: str, reason: str) -> None:
        """An image cannot be read. Raises UserError if that makes too many."""
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = f"{image}: {reason}"
            self._seen[index] = True
            if self._path is not None and image not in self._written:
                new = not self._path.exists()
                with self._path.open("a", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerows([["image", "reason"]] * new + [[image, " ".join(reason.split())]])
                self._written.add(image)
            seen = np.count_nonzero(self._seen)
            if seen >= min(_ENOUGH, len(self._seen)) and len(self._bad) > self._max_share * seen:
                raise self.too_many()

    def too_many(self) -> UserError:
        """The error that ends the run, with a few of the reasons."""
        some = "\n".join(f"  {line}" for line in list(self._bad.values())[:3])
        where = f" All are listed in {self._path}." if self._path else ""
        seen = np.count_nonzero(self._seen)
        return UserError(
            f"{len(self._bad)} of the first {seen} images cannot be read, more than the share of "
            f"{self._max_share:.0%} {self._rule}.{where}\n{some}"
        )


def gather_accounts(folder: Path) -> int:
    """Put what several processes skipped (skipped-1.csv and so on) into skipped.csv; gives how many images it names."""
    whole, parts = folder / "skipped.csv", sorted(folder.glob("skipped-*.csv"))
    rows: dict[str, list[str]] = {}
    for path in [whole, *parts]:
        if os.path.lexists(path):
            rows |= {row[0]: row for row in _rows(path)} | rows
    if parts:
        with whole.open("w", newline="") as file:
            csv.writer(file).writerows(rows.values())
        for path in parts:
            path.unlink()
    return max(0, len(rows) - 1)  # the first one is the header


def _rows(path: Path) -> list[list[str]]:
    """Read the rows of a file that may come from elsewhere, and that is appended to afterwards."""
    try:
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link: what it leads to would be changed. Remove it first")
        return [row for row in csv.reader(io.StringIO(read_text(path, _MAX_BYTES), newline="")) if row]
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}. Remove it, or move it elsewhere") from error
