"""Millions of paths in little memory."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import overload

import numpy as np

END = b"\0"
"""What ends a name: the one byte that no name can hold."""


class Paths(Sequence[str]):
    """Paths in a given order, decoded when they are asked for, as the file system spells them (surrogateescape).

    A path takes its name's bytes and five more, and its folder is held once for a run of names; a list of str takes
    some 100 bytes for each. Safe to use from several threads.
    """

    def __init__(self, runs: Iterable[tuple[bytes, bytes]]) -> None:
        """runs  (folder, names): the folder is empty or ends with a slash, and END stands after each name"""
        parts = [(folder, names) for folder, names in runs if names]
        self._folders = [folder for folder, _ in parts]
        self._names = b"".join(names for _, names in parts)
        self._firsts = [0, *accumulate(names.count(END) for _, names in parts)]
        ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == END[0])
        self._ends = ends.astype(np.min_scalar_type(len(self._names)))

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Paths":
        """From whole paths, in their order."""
        return cls([(b"", b"".join(os.fsencode(path) + END for path in paths))])

    @classmethod
    def from_lines(cls, text: bytes) -> "Paths":
        """One from each line of a text that is not blank, whichever system wrote it."""
        lines = text.replace(b"\r\n", b"\n").split(b"\n")
        return cls([(b"", b"".join(line + END for line in lines if line.strip()))])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) + 1 if index else 0
        folder = self._folders[bisect_right(self._firsts, index) - 1]
        return os.fsdecode(folder + self._names[start : int(self._ends[index])])

    def runs(self) -> Iterator[tuple[str, int]]:
        """Folders in the order of the paths, each with the number of paths that follow one another in it."""
        for folder, (first, after) in zip(self._folders, pairwise(self._firsts), strict=True):
            yield os.fsdecode(folder), after - first
