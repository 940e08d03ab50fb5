"""A folder of copies that processes share: whole or not there, fetched once, the least recently used deleted."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from pixmim.data.shards.disk_cache import DiskCache

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


def test_two_processes_fetch_a_copy_once(tmp_path: Path) -> None:
    readers = [start(tmp_path / "copies", tmp_path / "log", 0.02) for _ in range(3)]
    for one in readers:
        one.join(30)
        assert one.exitcode == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_process_that_is_killed_leaves_no_copy(tmp_path: Path) -> None:
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
    assert not part.exists()  # nobody has written to it for long


def fill(copies: DiskCache, names: str, keep: str = "") -> None:
    for name in names:
        copies.fetch(name, 10, lambda to: to.write_bytes(b"0123456789") and None, list(keep))


def there(copies: DiskCache) -> str:
    return "".join(sorted(path.name for path in copies.folder.iterdir() if not path.suffix))


def test_the_least_recently_used_goes_and_stays_readable(tmp_path: Path) -> None:
    copies = DiskCache(tmp_path, 30)
    fill(copies, "abc")
    held = copies.lookup("b", 10)
    fill(copies, "ad")
    assert there(copies) == "abd" and held is not None
    fill(copies, "ef")
    assert there(copies) == "def" and held.is_deleted and held.read(10, 0) == b"0123456789"
    assert not (tmp_path / "a.lock").exists()


def test_what_is_needed_soon_goes_last(tmp_path: Path) -> None:
    copies = DiskCache(tmp_path, 40)
    fill(copies, "abcd")
    fill(copies, "e", keep="dba")
    assert there(copies) == "abde"
    fill(copies, "f", keep="dba")
    assert there(copies) == "abdf"
    fill(copies, "gh", keep="fdbag")
    assert there(copies) == "bdfh"


def test_a_copy_of_another_size_is_none(tmp_path: Path) -> None:
    copies = DiskCache(tmp_path, 30)
    (tmp_path / "a").write_bytes(b"01234")
    assert copies.lookup("a", 10) is None
    fill(copies, "a")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    with pytest.raises(OSError, match="gone"):
        copies.fetch("b", 10, lambda to: (_ for _ in ()).throw(OSError("gone")))
    assert there(copies) == "a" and not list(tmp_path.glob("*.part"))


def test_links_and_pipes_among_the_copies(tmp_path: Path) -> None:
    """A pipe under a file's name is replaced, and a lock is not created through a link."""
    copies = DiskCache(tmp_path / "copies", 30)
    copies.folder.mkdir()
    os.mkfifo(copies.folder / "a")
    fill(copies, "a")
    assert (copies.folder / "a").read_bytes() == b"0123456789"
    (copies.folder / "b.lock").symlink_to(tmp_path / "victim")
    fill(copies, "b")
    assert there(copies) == "ab" and not (tmp_path / "victim").exists()
