"""Concurrent reads of one file: with pread, or with seek and read under a lock (Windows)."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pixmim.data.shards import local
from pixmim.data.shards.local import OpenFile


@pytest.mark.parametrize("has_pread", [True, False])
def test_threads_read_their_own_bytes(has_pread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_HAS_PREAD", has_pread)
    content = os.urandom(100_000)
    (tmp_path / "x").write_bytes(content)
    file = OpenFile(tmp_path / "x")
    with ThreadPoolExecutor(8) as pool:
        offsets = range(0, len(content), 97)
        assert all(
            data == content[at : at + 97]
            for at, data in zip(offsets, pool.map(lambda at: file.read(97, at), offsets), strict=True)
        )
    assert file.read(10, len(content) - 3) == content[-3:] and file.read(10, len(content)) == b""
