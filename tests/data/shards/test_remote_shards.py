"""Remote shards: the same images as locally, complete files within a bound, and retries."""

import dataclasses
import os
import shutil
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import equal, train
from helpers.shards import colors, keys, shard
from pixmim.config import CheckpointConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageDataset, ImageSpec, InMemoryDataset
from pixmim.data.loader import Loader
from pixmim.data.resized_cache import find_settings, open_cache
from pixmim.data.sampler import WINDOW, BatchShard
from pixmim.data.shards import fsspec_io, remote
from pixmim.data.shards.remote import RemoteShards
from pixmim.data.statistics import Stats, load_statistics, save_statistics
from pixmim.data.synthetic import SyntheticShapes
from pixmim.transforms.crops import SimpleResizedCrop
from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path

pytest.importorskip("aiohttp")
fsspec = pytest.importorskip("fsspec")

Make = Callable[..., PretrainConfig]
GIB = 2**30


class Server(ThreadingHTTPServer):
    """Serves a folder, counts requests for files and ranges, and fails as often as `failures` lists.

    The first answer to each GET request is one of the `faults`, in turn, and a repeated request succeeds. A path that
    starts as one in `always` has that fault each time.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.requests: Counter[str] = Counter()
        self.range_requests: Counter[str] = Counter()
        self.accepts_ranges = False  # like Python's own server, which sends complete files only
        self.failures: dict[str, list[int]] = {}
        self.faults: list[str] = []
        self.failed: list[tuple[str, str | None]] = []
        self.always: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        if self.fails():
            return
        name = self.path.rsplit("/", 1)[1]
        if "Range" in self.headers:
            self.server.range_requests[name] += 1
            self.send_range() if self.server.accepts_ranges else super().do_GET()
            return
        self.server.requests[name] += 1
        failures = self.server.failures.get(name, [])
        status = failures.pop(0) if failures else 200
        if status == 200:
            super().do_GET()
        elif status == 206:
            self.fail("cut")
        else:
            self.send_error(status)

    def do_HEAD(self) -> None:
        if not self.fails():
            super().do_HEAD()

    def fails(self) -> bool:
        """Answer with a fault, if one is due."""
        fault = next((fault for top, fault in self.server.always.items() if self.path.startswith(top)), "")
        request = self.path, self.headers.get("Range")
        if self.command == "GET" and not fault and self.server.faults and request not in self.server.failed:
            self.server.failed.append(request)
            fault = self.server.faults[len(self.server.failed) % len(self.server.faults)]
        if fault:
            self.fail(fault)
        return bool(fault)

    def fail(self, fault: str) -> None:
        path = Path(self.translate_path(self.path))
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())
            self.close_connection = True
        elif fault.isdigit():
            self.send_error(int(fault))
        elif not path.exists():
            self.send_error(404)
        else:
            content = path.read_bytes() if path.is_file() else b"<html>"
            ranged = self.server.accepts_ranges and "Range" in self.headers
            content = content[self.range()] if ranged else content
            half = len(content) // 2
            self.send_response(206 if ranged else 200)
            self.send_header("Content-Length", str(half if fault == "wrong length" else len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[:half])
            if self.command == "GET" and fault == "slow":
                time.sleep(0.1)
                self.wfile.write(content[half:])

    def send_range(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()[self.range()]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def range(self) -> slice:
        first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        return slice(first, last + 1)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fsspec_io, "BACKOFF_SECONDS", (0.0, 0.0, 0.0))
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def served(tmp_path: Path, server: Server) -> Path:
    """Create the server's folder, with a cache of three shards and three WebDataset tars."""
    folder = tmp_path / "served"
    make_cache(SyntheticShapes(count=18, size=24), folder / "cached", (24, 24), per_shard=6)
    for i in range(3):
        shard(folder / "shards" / f"train-{i:03d}.tar", range(4 * i, 4 * i + 4))
    return folder


def downloads(memory: Path) -> list[Path]:
    """Return the files in the disk cache, after a check that no partial download is left."""
    names = list((memory / "copies").iterdir())
    assert not [path for path in names if path.suffix == ".part"]
    return [path for path in names if not path.suffix]


def has_downloads(memory: Path) -> bool:
    return (memory / "copies").exists()


def same(one: ImageDataset, two: ImageDataset) -> bool:
    return len(one) == len(two) and all(torch.equal(one.image(i), two.image(i)) for i in range(len(one)))


def test_a_remote_cache_equals_the_local_one(server: Server, served: Path, memory: Path) -> None:
    local, remote_data = open_dataset(str(served / "cached")), open_dataset(f"{server.url}/cached/")
    assert not any(name.endswith(".tar") for name in server.requests)
    assert same(local, remote_data) and len(downloads(memory)) == 3
    assert (
        remote_data.shard_sizes is not None
        and remote_data.shard_sizes.tolist() == [6, 6, 6]
        and local.shard_sizes is None
    )
    assert (
        local.labels is not None and (local.labels == remote_data.labels).all() and local.classes == remote_data.classes
    )
    assert local.sizes is not None and (local.sizes == remote_data.sizes).all()
    assert remote_data.path_of(7) == f"{server.url}/cached/shard-000001.tar:000000007"
    assert "at most 50 GiB (--shard-cache-gib)" in remote_data.description and str(memory) in remote_data.description
    before = Counter(server.requests)
    assert same(local, open_dataset(f"{server.url}/cached"))  # later runs find the downloads
    assert {name for name in server.requests - before} == {"settings.json", "index.json"} | {
        f"shard-{i:06d}.index" for i in range(3)
    }


def test_remote_webdataset(server: Server, served: Path) -> None:
    local = open_dataset(str(served / "shards"))
    for spec in ("shards/train-{000..002}.tar", "shards/*.tar", "shards", "shards/"):
        remote_data = open_dataset(f"{server.url}/{spec}")
        assert same(local, remote_data) and keys(local) == keys(remote_data) and remote_data.classes == local.classes
        assert remote_data.shard_sizes is not None and remote_data.shard_sizes.tolist() == [4, 4, 4]
    assert all(server.requests[f"train-{i:03d}.tar"] == 1 for i in range(3))  # downloaded once and scanned there
    (served / "shards" / "classes.txt").write_text("cat\ndog\nbird")
    assert open_dataset(f"{server.url}/shards").classes == ["cat", "dog", "bird"]
    server.failures["classes.txt"] = [403]  # as a bucket without listing answers for a missing file
    assert open_dataset(f"{server.url}/shards").classes == ["0", "1", "2"]


def test_other_file_systems(served: Path) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(served / "cached"), "/far/cached", recursive=True)
    files.put(str(served / "shards"), "/far/shards", recursive=True)
    try:
        assert same(open_dataset(str(served / "cached")), open_dataset("memory://far/cached"))
        for spec in ("shards", "shards/train-*.tar", "shards/train-{000..002}.tar"):
            assert colors(open_dataset(f"memory://far/{spec}")) == list(range(12))
        with pytest.raises(UserError, match=r"nothing matches memory://far/\*.tar"):
            open_dataset("memory://far")
    finally:
        files.rm("/far", recursive=True)


def test_temporary_errors_are_retried(server: Server, served: Path, memory: Path) -> None:
    server.failures = {
        "settings.json": [503, 500],
        "shard-000001.index": [429],
        "shard-000000.tar": [500, 206, 503],
        "shard-000001.tar": [206, 206, 206],
    }
    assert same(open_dataset(str(served / "cached")), open_dataset(f"{server.url}/cached"))
    assert len(downloads(memory)) == 3 and server.requests["shard-000000.tar"] == 4


def test_permanent_errors(server: Server, served: Path, memory: Path) -> None:
    data = open_dataset(f"{server.url}/cached")
    tar = "shard-000000.tar"
    for statuses, reason in {
        (500,) * 4: "cannot be read after 4 attempts: ClientResponseError: 500",
        (206,) * 4: "cannot be read after 4 attempts: Client",
        (400,): "cannot be read: ClientResponseError: 400",
        (403,): "access to .* denied: .*403",
        (404,): "no longer exists",
    }.items():
        server.failures[tar] = list(statuses)
        with pytest.raises(UserError, match=f"{server.url}/cached/{tar}.*{reason}|{reason}"):
            data.image(0)
        assert not downloads(memory)
    assert data.image(0) is not None
    with pytest.raises(UserError, match=r"train-003.tar does not exist"):
        open_dataset(f"{server.url}/shards/train-{{000..003}}.tar")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"settings.json cannot be read after 4 attempts: ClientConnectorError"):
        open_dataset(f"{server.url}/cached")


@pytest.mark.parametrize("ranges", [False, True])
def test_a_failing_server_changes_no_batch(server: Server, served: Path, memory: Path, ranges: bool) -> None:
    """Shards are fetched completely, or image by image if the disk cache is too small."""
    server.accepts_ranges = ranges

    def batches(gib: float) -> torch.Tensor:
        data = open_dataset(f"{server.url}/shards/*.tar", shard_cache_gib=gib)
        skipped = BadImageLog(None, len(data), 0.0)
        with Loader(data, SimpleResizedCrop(16), BatchShard(8), skipped=skipped, threads=2) as loader:
            return torch.cat([next(loader).images.clone() for _ in range(4)])

    expected = batches(50.0)
    shutil.rmtree(memory)
    server.faults = ["cut", "503", "wrong length", "reset", "500", "slow"]
    assert torch.equal(batches(1e-6 if ranges else 50.0), expected)
    assert len(server.failed) > (12 if ranges else 3) and bool(server.range_requests) == ranges


def test_a_folder_that_cannot_be_listed_is_not_left_out(server: Server, served: Path) -> None:
    for name in ("a", "b"):
        shard(served / "tree" / name / "x-0.tar", range(4))
    spec = f"{server.url}/tree/*/x-*.tar"
    server.faults = ["reset", "503", "cut"]
    assert len(open_dataset(spec)) == 8
    for fault in ("reset", "503", "cut"):
        server.always = {"/tree/b/": fault}
        with pytest.raises(UserError, match="/tree/b/ cannot be read after 4 attempts"):
            open_dataset(spec)
    server.always = {"/tree/b/": "403"}
    with pytest.raises(UserError, match=r"access to .*/tree/b/ denied"):
        open_dataset(spec)


def test_a_run_whose_signature_expires_ends_and_resumes(
    server: Server, served: Path, tmp_path: Path, tiny_run: Make
) -> None:
    server.accepts_ranges = True
    config = tiny_run(data=f"{server.url}/cached", shard_cache_gib=1e-6, checkpoint=CheckpointConfig(every=1))
    config = dataclasses.replace(config, steps=12, cache_images="none")  # three batches are read ahead
    train(config, tmp_path / "quiet")

    def expire(step: int) -> None:
        if step == 2:
            server.always = {"/": "403"}

    with pytest.raises(UserError, match=r"access to .*\.tar denied: .*403.* Set or renew .*--resume RUN --data URL"):
        train(config, tmp_path / "broken", on_step_end=expire)
    server.always = {}
    assert "resuming from step" in train(config, tmp_path / "broken")
    assert equal(tmp_path / "quiet", tmp_path / "broken")
    assert not (tmp_path / "broken" / "skipped.csv").exists()


def test_changes_on_the_server_are_detected(server: Server, served: Path) -> None:
    tars, cached = open_dataset(f"{server.url}/shards"), open_dataset(f"{server.url}/cached")
    fetched = sorted((cache_path("copies", "").parent).iterdir())
    for path in fetched:
        path.unlink()
    tars, again = open_dataset(f"{server.url}/shards"), open_dataset(f"{server.url}/shards")
    os.utime(shard(served / "shards" / "train-001.tar", range(20, 24)), (0, 0))  # this server's tag is the time
    assert int(tars.image(0)[0, 0, 0]) == 0
    for data in (tars, again):
        with pytest.raises(UserError, match=r"train-001.tar changed on the server"):
            data.image(5)
    assert colors(open_dataset(f"{server.url}/shards"))[4:8] == list(range(20, 24))
    tar = served / "cached" / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"shard-000002.tar has [\d,]+ bytes, but [\d,]+ in its index"):
        cached.image(17)


def test_a_scanned_tar_is_not_downloaded_again(server: Server, served: Path, memory: Path) -> None:
    open_dataset(f"{server.url}/shards")
    shutil.rmtree(memory / "copies")
    data = open_dataset(f"{server.url}/shards")
    assert server.requests["train-000.tar"] == 1 and not (memory / "copies").exists()
    assert colors(data) == list(range(12)) and server.requests["train-000.tar"] == 2


def test_damaged_remote_tars_and_caches(server: Server, served: Path) -> None:
    tar = served / "shards" / "train-001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(UserError, match=rf"{server.url}/shards/train-001.tar is truncated"):
        open_dataset(f"{server.url}/shards")
    index = served / "cached" / "shard-000001.index"
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"shard-000001.tar is missing, truncated"):
        open_dataset(f"{server.url}/cached")
    (served / "cached" / "index.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        open_dataset(f"{server.url}/cached")
    (served / "empty").mkdir()
    with pytest.raises(UserError, match=r"nothing matches .*/empty/\*.tar, or the server does not list"):
        open_dataset(f"{server.url}/empty")


def test_the_disk_cache_stays_within_its_bound(server: Server, served: Path, memory: Path) -> None:
    size = max(path.stat().st_size for path in (served / "shards").iterdir())
    open_dataset(f"{server.url}/shards")
    shutil.rmtree(memory / "copies")
    data: Any = open_dataset(f"{server.url}/shards", shard_cache_gib=2 * size / GIB)
    server.requests.clear()
    for index in (0, 5, 9, 1, 4, 5, 8, 0, 11, 6, 2):
        assert int(data.image(index)[0, 0, 0]) == index
        assert sum(path.stat().st_size for path in downloads(memory)) <= 2 * size
        assert isinstance(data._store, RemoteShards) and len(data._store._open_files) <= 2
    # Shards 0 1 2 0 1 1 2 0 2 1 0: a cache of two shards hits only at the second of 1 1 and of 2 0 2.
    assert server.requests == {"train-000.tar": 4, "train-001.tar": 3, "train-002.tar": 2}
    assert int(data.image(3)[0, 0, 0]) == 3 and int(data.image(7)[0, 0, 0]) == 7  # 0 and 1 were used last
    assert sum(server.requests.values()) == 9


def test_a_bound_below_one_shard(server: Server, served: Path, memory: Path) -> None:
    data = open_dataset(f"{server.url}/shards", shard_cache_gib=1e-6)
    assert colors(data) == list(range(12)) and len(downloads(memory)) == 1


def test_only_prefetched_shards_are_downloaded(server: Server, served: Path, memory: Path) -> None:
    """Single images are read by range requests if the server supports them."""
    server.accepts_ranges = True
    data, local = open_dataset(f"{server.url}/cached"), open_dataset(str(served / "cached"))
    assert torch.equal(data.image(8), local.image(8)) and torch.equal(data.image(9), local.image(9))
    assert not has_downloads(memory) and server.range_requests == {"shard-000001.tar": 2}
    data.prefetch([1])
    assert torch.equal(data.image(10), local.image(10)) and len(downloads(memory)) == 1
    again = open_dataset(f"{server.url}/cached")
    assert torch.equal(again.image(7), local.image(7))  # from the disk cache
    assert server.range_requests == {"shard-000001.tar": 2} and server.requests["shard-000001.tar"] == 1
    (served / "cached" / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar no longer exists"):
        data.image(17)


class Slow:
    """A remote file system whose downloads wait for their gates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[int] = []
        self.gates = [threading.Event() for _ in range(100)]
        self._copy, self._lock = fsspec_io.download, threading.Lock()
        monkeypatch.setattr(fsspec_io, "download", self.copy)

    def copy(self, url: str, to: Path, wanted: object) -> None:
        number = int(url.rsplit("-", 1)[1].removesuffix(".tar"))
        with self._lock:
            self.started.append(number)
        assert self.gates[number].wait(20)
        self._copy(url, to, wanted)

    def wait(self, count: int) -> list[int]:
        """Wait for `count` downloads to start; return those started shortly after."""
        until = time.monotonic() + 20
        while len(self.started) < count and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.05)
        return self.started


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Slow, int]]:
    """Yield the URL of a cache of 40 equal shards, its slow file system, and the bytes of a shard."""
    files = fsspec.filesystem("memory")
    folder = Path(str(cache_path("made", ""))) / "many"
    make_cache(SyntheticShapes(count=80, size=16, seed=3), folder, (16, 16), per_shard=2, kind="raw")
    files.put(str(folder), "/many", recursive=True)
    yield "memory://many", Slow(monkeypatch), (folder / "shard-000000.tar").stat().st_size
    files.rm("/many", recursive=True)


def test_prefetch_downloads_in_order_in_the_background(many: tuple[str, Slow, int]) -> None:
    url, slow, _ = many
    data = open_cache(url)
    data.prefetch([5, 3, 9, 7, 1, 2])
    assert sorted(slow.wait(4)) == [3, 5, 7, 9]
    results: list[int] = []
    readers = [threading.Thread(target=lambda: results.append(data.image(10).numel())) for _ in range(3)]
    for reader in readers:
        reader.start()
    slow.gates[5].set()
    for reader in readers:
        reader.join()
    assert len(results) == 3 and slow.wait(5).count(5) == 1  # a running download is awaited, not repeated
    assert slow.started[4:] == [1]
    data.prefetch([8, 1])  # 2 is no longer needed
    for gate in slow.gates:
        gate.set()
    assert slow.wait(6)[5:] == [8]
    assert data.image(4).shape[0] == 3 and len(slow.started) == 6  # other shards are read by range


def test_prefetch_stays_within_the_bound(
    many: tuple[str, Slow, int], memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, slow, size = many
    for gate in slow.gates:
        gate.set()
    data = open_cache(url, shard_cache_gib=3.9 * size / GIB)
    data.prefetch([0, 1, 2, 3, 4, 5])
    assert sorted(slow.wait(3)) == [0, 1, 2]
    data.prefetch([1, 2, 3, 4, 5])
    assert slow.wait(4)[3:] == [3]  # in place of 0
    data.image(2), data.image(4), data.image(6)
    assert len(slow.started) == 4 and len(downloads(memory)) == 3 and not capsys.readouterr().err
    data.image(10), data.image(11)  # by range, because 1, 2 and 3 are needed first
    assert capsys.readouterr().err.count("is below the") == 1
    data.image(2), data.image(4)
    assert len(slow.started) == 4 and len(downloads(memory)) == 3


def test_a_failed_prefetch_is_raised_by_the_reader(
    many: tuple[str, Slow, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, _ = many
    data = open_cache(url)
    failed = threading.Event()

    def fail(url: str, to: Path, wanted: object) -> None:
        failed.set()
        raise UserError("down")

    working = fsspec_io.download
    monkeypatch.setattr(fsspec_io, "download", fail)
    data.prefetch([1])
    assert failed.wait(10)
    with pytest.raises(UserError, match="down"):
        data.image(2)
    monkeypatch.setattr(
        fsspec_io, "download", lambda url, to, wanted: fsspec_io._filesystem(url)[0].get_file(url, str(to))
    )
    assert data.image(2).shape[0] == 3
    monkeypatch.setattr(fsspec_io, "download", working)


@pytest.mark.parametrize("shards", [100, 2.5])
def test_batches_do_not_depend_on_the_bound(many: tuple[str, Slow, int], shards: float, memory: Path) -> None:
    """A bound below one window of shards changes the speed only."""
    url, slow, size = many
    for gate in slow.gates:
        gate.set()

    def batches(source: ImageDataset) -> torch.Tensor:
        crop, shard = SimpleResizedCrop(16), BatchShard(10, 0)
        with Loader(source, crop, shard, skipped=BadImageLog(None, len(source), 0.5), threads=3) as loader:
            return torch.cat([next(loader).images.clone() for _ in range(9)])

    local = open_cache(cache_path("made", "") / "many")
    expected = {local.image(i)[:, :16, :16].numpy().tobytes() for i in range(80)}
    first = batches(open_cache(url, shard_cache_gib=shards * size / GIB))
    assert torch.equal(first, batches(open_cache(url)))
    assert len(expected) == 80 and len(downloads(memory)) > WINDOW


def test_sequential_reads_prefetch(many: tuple[str, Slow, int], tmp_path: Path) -> None:
    url, slow, _ = many
    source = open_cache(url)
    # Eight images are read ahead: four shards, fewer than are prefetched.
    making = threading.Thread(target=make_cache, args=(source, tmp_path / "again", (16, 16)), kwargs={"per_shard": 8})
    making.start()
    assert {0, 1, 2, 3} <= set(slow.wait(4))  # others download while the first is awaited
    for gate in slow.gates:
        gate.set()
    making.join()
    assert len(open_cache(tmp_path / "again")) == 80 and len(slow.started) == 40


def test_images_in_memory_are_not_downloaded_again(many: tuple[str, Slow, int], memory: Path) -> None:
    url, slow, size = many
    for gate in slow.gates:
        gate.set()
    kept = InMemoryDataset(open_cache(url, shard_cache_gib=2 * size / GIB))
    kept.prefetch([1, 0])
    for index in (2, 3, 0):  # all of shard 1, and half of 0
        kept.image(index)
    kept.prefetch([0, 5])
    assert slow.wait(3)[2:] == [5]  # in place of 1
    kept.prefetch([1, 0, 6])
    assert slow.wait(4)[3:] == [6] and len(downloads(memory)) == 2


def test_a_run_from_a_url(server: Server, served: Path, tmp_path: Path, tiny_run: Make) -> None:
    train(tiny_run(data=f"{server.url}/cached", steps=3), tmp_path / "run")
    assert (tmp_path / "run" / "encoder/model.safetensors").exists()


def test_statistics_of_a_remote_cache(server: Server, served: Path) -> None:
    assert (
        load_statistics(f"{server.url}/cached", ImageSpec()) is None
        and load_statistics(f"{server.url}/shards/*.tar", ImageSpec()) is None
    )
    stats = Stats((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 18, 18)
    save_statistics(str(served / "cached"), ImageSpec(), stats)
    assert load_statistics(f"{server.url}/cached/", ImageSpec()) == stats
    server.always["/cached/stats.json"] = "403"  # what some storages answer for a missing file
    assert load_statistics(f"{server.url}/cached/", ImageSpec()) is None


@pytest.mark.parametrize("name", ["x.zip", "x.zip?signature=1", "x.zip,include=*.png", "x.tar?signature=1", "*.tar*2"])
def test_nothing_is_requested_below_an_archive(server: Server, name: str) -> None:
    server.always["/"] = "403"
    assert find_settings(f"{server.url}/{name}") is None
    assert load_statistics(f"{server.url}/{name}", ImageSpec()) is None
    assert load_statistics(f"{server.url}/{name}+{server.url}/{name}", ImageSpec()) is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="s3fs"):
        open_dataset("s3://bucket/cached")
    monkeypatch.delitem(sys.modules, "pixmim.data.shards.http", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"pip install 'pixmim\[remote\]'"):
        open_dataset("https://host/cached")
    with pytest.raises(UserError, match="nosuch"):
        open_dataset("nosuch://bucket/cached")


def test_local_and_remote_shards_do_not_mix(served: Path, server: Server) -> None:
    with pytest.raises(UserError, match="1 of 2 shards are remote"):
        open_dataset(f"{{{served}/shards/train-000.tar,{server.url}/shards/train-001.tar}}")


def test_few_files_stay_open(server: Server, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_OPEN_FILES", 2)
    data: Any = open_dataset(f"{server.url}/shards")
    assert colors(data) == list(range(12)) and len(data._store._open_files) == 2
