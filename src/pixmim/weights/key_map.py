"""Tables of names: what one project calls a tensor, and what pixmim calls it, read in either direction."""

import re
from collections.abc import Sequence


class KeyMap:
    """A table of pairs (theirs, ours). `*` stands for one part of a dotted name, `**` for any number of them.

    The stars of the two sides stand for the same texts, in order; the first pair that fits decides.
    """

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._to_ours = [(_pattern(theirs), _template(ours)) for theirs, ours in pairs]
        self._to_theirs = [(_pattern(ours), _template(theirs)) for theirs, ours in pairs]

    def ours(self, theirs: str) -> str | None:
        """What pixmim calls the tensor, or None if the table does not know it."""
        return _translate(self._to_ours, theirs)

    def theirs(self, ours: str) -> str | None:
        """What the other project calls the tensor, or None if the table does not know it."""
        return _translate(self._to_theirs, ours)


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)")
    return re.compile(escaped)


def _template(name: str) -> Sequence[str]:
    return re.split(r"\*\*|\*", name)


def _translate(table: list[tuple[re.Pattern[str], Sequence[str]]], name: str) -> str | None:
    for pattern, template in table:
        match = pattern.fullmatch(name)
        if match:
            return template[0] + "".join(a + b for a, b in zip(match.groups(), template[1:], strict=True))
    return None
