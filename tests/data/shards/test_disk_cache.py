"""The disk cache of remote shards: complete files only, one download for all processes, LRU eviction."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from pixmim.data.shards.remote import DiskCache

CONTENT = os.urandom(100_000)


def slowly(log: Path, to: Path, pieces: int = 10, pause: float = 0.02) -> None:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    with to.open("wb") as file:
        for i in range(pieces):
            file.write(CONTENT[i * len(CONTENT) // pieces : (i + 1) * len(CONTENT) // pieces])
            file.flush()
            time.sleep(pause)


def reader(folder: Path, log: Path, pause: float) -> None:
    found = DiskCache(folder, 10**6).fetch("a", len(CONTENT), lambda to: slowly(log, to, pause=pause))
    os._exit(0 if found.read(len(CONTENT), 0) == CONTENT else 1)


def start(*arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=reader, args=arguments)
    process.start()
    return process


def test_processes_download_a_file_once(tmp_path: Path) -> None:
    readers = [start(tmp_path / "copies", tmp_path / "log", 0.02) for _ in range(3)]
    for one in readers:
        one.join(30)
        assert one.exitcode == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    folder, log = tmp_path / "copies", tmp_path / "log"
    killed = start(folder, log, 5.0)
    while not list(folder.glob("*.part")):
        time.sleep(0.01)
    waiting = start(folder, log, 0.0)
    time.sleep(0.1)
    assert killed.pid is not None and not (folder / "a").exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    waiting.join(30)
    assert waiting.exitcode == 0 and (folder / "a").read_bytes() == CONTENT
    (part,) = folder.glob("*.part")
    os.utime(part, (0, 0))
    DiskCache(folder, 10**6).fetch("b", 3, lambda to: to.write_bytes(b"abc") and None)
    assert not part.exists()  # a stale partial download is removed


def fill(cache: DiskCache, names: str, keep: str = "") -> None:
    for name in names:
        cache.fetch(name, 10, lambda to: to.write_bytes(b"0123456789") and None, list(keep))


def cached(cache: DiskCache) -> str:
    return "".join(sorted(path.name for path in cache.folder.iterdir() if not path.suffix))


def test_an_evicted_file_stays_readable(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 30)
    fill(cache, "abc")
    held = cache.lookup("b", 10)
    fill(cache, "ad")
    assert cached(cache) == "abd" and held is not None
    fill(cache, "ef")
    assert cached(cache) == "def" and held.is_deleted and held.read(10, 0) == b"0123456789"
    assert not (tmp_path / "a.lock").exists()


def test_upcoming_files_are_evicted_last(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 40)
    fill(cache, "abcd")
    fill(cache, "e", keep="dba")
    assert cached(cache) == "abde"
    fill(cache, "f", keep="dba")
    assert cached(cache) == "abdf"
    fill(cache, "gh", keep="fdbag")
    assert cached(cache) == "bdfh"


def test_a_file_of_another_size_is_downloaded_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 30)
    (tmp_path / "a").write_bytes(b"01234")
    assert cache.lookup("a", 10) is None
    fill(cache, "a")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    with pytest.raises(OSError, match="gone"):
        cache.fetch("b", 10, lambda to: (_ for _ in ()).throw(OSError("gone")))
    assert cached(cache) == "a" and not list(tmp_path.glob("*.part"))


def test_links_and_pipes_in_the_folder(tmp_path: Path) -> None:
    """A pipe under a file's name is replaced, and a lock is not created through a link."""
    cache = DiskCache(tmp_path / "copies", 30)
    cache.folder.mkdir()
    os.mkfifo(cache.folder / "a")
    fill(cache, "a")
    assert (cache.folder / "a").read_bytes() == b"0123456789"
    (cache.folder / "b.lock").symlink_to(tmp_path / "victim")
    fill(cache, "b")
    assert cached(cache) == "ab" and not (tmp_path / "victim").exists()
