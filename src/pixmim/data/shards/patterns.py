"""Names of many files in few words: `train-{000000..000146}.tar`, `{a,b}/*.tar`."""

import itertools
import re
from collections.abc import Iterator

from pixmim.utils.errors import UserError

MOST = 1_000_000
"""More names than this are a slip of the pen."""

_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?", re.ASCII)


def expand(pattern: str) -> list[str]:
    """All names that a pattern with braces stands for, in order, as a shell would write them.

    {a,b} are alternatives, which may hold braces themselves; {08..11} counts, with leading zeros if the first or the
    last number has some; {0..10..2} counts in steps. Braces that hold neither stay as they are. Raises UserError for
    more than MOST names.
    """
    try:
        found = list(itertools.islice(_expand(pattern), MOST + 1))
    except RecursionError:
        raise UserError(f"{pattern[:200]}... has too many braces") from None
    if len(found) > MOST:
        raise _too_many(pattern)
    return found


def _expand(pattern: str) -> Iterator[str]:
    for start, end, commas in _braces(pattern):
        inside = pattern[start + 1 : end]
        counted = _RANGE.fullmatch(inside)
        if not commas and not counted:
            continue
        before, after = pattern[:start], pattern[end + 1 :]
        if counted:
            middles = _count(*counted.groups())
        else:
            borders = [start, *commas, end]
            parts = [pattern[a + 1 : b] for a, b in itertools.pairwise(borders)]
            middles = itertools.chain.from_iterable(map(_expand, parts))
        for middle in middles:
            for rest in _expand(after):
                yield before + middle + rest
        return
    yield pattern


def _braces(pattern: str) -> Iterator[tuple[int, int, list[int]]]:
    """Each pair of braces, the outer before the inner: where it opens and closes, and the commas right inside."""
    for start in (i for i, character in enumerate(pattern) if character == "{"):
        depth, commas = 0, []
        for i in range(start, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[i], 0)
            if pattern[i] == "," and depth == 1:
                commas.append(i)
            if depth == 0:
                yield start, i, commas
                break


def _count(first: str, last: str, step: str | None) -> Iterator[str]:
    padded = any(len(number.lstrip("-")) > 1 and number.lstrip("-").startswith("0") for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    a, b = int(first), int(last)
    by = max(1, abs(int(step or 1)))
    numbers = range(a, b + 1, by) if a <= b else range(a, b - 1, -by)
    if len(numbers) > MOST:  # not only found out after as many names
        raise _too_many(f"{{{first}..{last}}}")
    for number in numbers:
        yield f"{number:0{width}d}"


def _too_many(pattern: str) -> UserError:
    return UserError(f"{pattern} stands for more than {MOST:,} files")
