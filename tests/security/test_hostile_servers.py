"""Untrusted servers: redirects, endless and slow responses, listings of other folders, false sizes."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers.shards import shard
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.shards import fsspec_io, http
from pixmim.data.shards.local import FileVersion
from pixmim.data.synthetic import SyntheticShapes
from pixmim.utils.errors import UserError

pytest.importorskip("aiohttp")
pytest.importorskip("fsspec")

yarl = pytest.importorskip("yarl")


class Handler(BaseHTTPRequestHandler):
    """Responds with the functions in `server.responses`, or with the files in `server.files`."""

    server: Any

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path in self.server.responses:
            try:
                self.server.responses[self.path](self)
            except OSError:  # the client disconnected, as it should
                self.close_connection = True
            return
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.begin(200, len(content))
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def begin(self, status: int, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.responses: dict[str, Callable[[Handler], None]] = {}
        self.files: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def serve(self, folder: Path, below: str) -> None:
        self.files |= {f"{below}/{path.name}": path.read_bytes() for path in folder.iterdir()}

    def redirect(self, path: str, to: str) -> None:
        self.responses[path] = lambda handler: handler.begin(302, 0, Location=to)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server]]:
    """Start two hosts; another port is another host."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(fsspec_io, "BACKOFF_SECONDS", (0.0, 0.0))
    pair = Server(), Server()
    for server in pair:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield pair
    for server in pair:
        server.shutdown()
        server.server_close()


def endless(handler: Handler) -> None:
    """Send as much as the client takes."""
    handler.begin(200)
    while handler.command == "GET":
        handler.wfile.write(bytes(2**16))


def dripping(handler: Handler) -> None:
    """Send a byte at a time, of a long response."""
    handler.begin(200, 10_000)
    while handler.command == "GET":
        handler.wfile.write(b"x")
        time.sleep(0.05)


def test_a_redirect_is_refused_before_the_other_host_is_contacted(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = servers
    make_cache(SyntheticShapes(count=4, size=16), tmp_path / "cached", (16, 16))
    other.serve(tmp_path / "cached", "/c")
    for name in other.files:
        server.redirect(name, other.url + name)
    for spec in (f"{server.url}/c", f"{server.url}/c/shard-000000.tar"):
        with pytest.raises(UserError, match=rf"another host, 127.0.0.1:{other.server_port}.*PIXMIM_REDIRECT_HOSTS"):
            open_dataset(spec)
    assert not other.requests
    monkeypatch.setenv(http.REDIRECT_HOSTS, "example.org, 127.0.0.1")
    data = open_dataset(f"{server.url}/c")
    assert len(data) == 4 and data.image(0).shape[0] == 3 and other.requests


def test_every_request_stays_on_its_host(servers: tuple[Server, Server], tmp_path: Path) -> None:
    server, other = servers
    other.files["/x"] = bytes(100)
    server.redirect("/x", other.url + "/x")
    server.redirect("/list/", other.url + "/x")
    for request in (
        lambda: fsspec_io.read_small_file(f"{server.url}/x"),
        lambda: fsspec_io.file_version(f"{server.url}/x"),
        lambda: fsspec_io.read_range(f"{server.url}/x", 10, 10),
        lambda: fsspec_io.download(f"{server.url}/x", tmp_path / "x", FileVersion(100)),
        lambda: fsspec_io.find_matching(f"{server.url}/list/*.tar"),
    ):
        with pytest.raises(UserError, match="redirects to another host"):
            request()
    assert not other.requests and not (tmp_path / "x").exists()
    server.redirect("/file", "file:///etc/passwd")
    with pytest.raises(UserError, match="not an http"):
        fsspec_io.read_small_file(f"{server.url}/file")
    server.redirect("/a", "/b")
    server.files["/b"] = b"here"
    assert fsspec_io.read_small_file(f"{server.url}/a") == b"here"
    server.redirect("/loop", "/loop")
    with pytest.raises(UserError, match="TooManyRedirects"):
        fsspec_io.read_small_file(f"{server.url}/loop")


@pytest.mark.parametrize(
    ("origin", "target", "message"),
    [
        ("http://a/x", "http://a/y", ""),
        ("http://a/x", "https://a/x", ""),
        ("https://a/x", "https://named.org:99/x", ""),
        ("https://a/x", "http://a/x", "from https to http"),
        ("https://a/x", "http://named.org/x", "from https to http"),
        ("http://a/x", "http://a:8080/x", "another host, a:8080"),
        ("http://a:81/x", "https://a/x", "another host"),
        ("http://a/x", "http://b/x", "another host, b: .*PIXMIM_REDIRECT_HOSTS=named.org,b"),
        ("http://a/x", "http://localhost/x", "another host"),
        ("http://a/x", "http://169.254.169.254/latest", "another host"),
        ("http://a/x", "ftp://a/x", "not an http"),
    ],
)
def test_check_redirect(origin: str, target: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(http.REDIRECT_HOSTS, "named.org")
    if not message:
        http.check_redirect(yarl.URL(origin), yarl.URL(target))
        return
    with pytest.raises(UserError, match=message):
        http.check_redirect(yarl.URL(origin), yarl.URL(target))


def test_endless_responses_are_bounded(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = servers
    monkeypatch.setattr(http, "MAX_LISTING_BYTES", 10**6)
    server.responses = {"/c/settings.json": endless, "/x": endless, "/list/": endless, "/list": endless}
    with pytest.raises(UserError, match=r"settings.json is larger than the [\d,]+ bytes allowed"):
        open_dataset(f"{server.url}/c")
    with pytest.raises(UserError, match=r"larger than the 100 bytes allowed"):
        fsspec_io.read_small_file(f"{server.url}/x", 100)
    with pytest.raises(UserError, match="lists more than 1,000,000 bytes"):
        fsspec_io.find_matching(f"{server.url}/list/*.tar")
    monkeypatch.setattr(fsspec_io, "file_version", lambda url: FileVersion(10**6))
    with pytest.raises(UserError, match="more than the 1,000,000 bytes"):
        fsspec_io.download(f"{server.url}/x", tmp_path / "x", FileVersion(10**6))
    assert (tmp_path / "x").stat().st_size < 10**7
    server.responses["/x"] = lambda handler: (
        handler.begin(206) or [handler.wfile.write(bytes(2**16)) for _ in range(10**6)]
    )
    with pytest.raises(UserError, match="of 10 bytes"):
        fsspec_io.read_range(f"{server.url}/x", 5, 10)


def test_slow_servers_are_abandoned(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = servers
    monkeypatch.setattr(fsspec_io, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(fsspec_io, "RETRY_SECONDS", 0.3)
    server.responses = {"/x": dripping}
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot be read: FSTimeoutError"):
        fsspec_io.read_small_file(f"{server.url}/x")
    monkeypatch.setattr(fsspec_io, "file_version", lambda url: FileVersion(10_000))
    with pytest.raises(UserError, match=r"is too slow: .* bytes"):
        fsspec_io.download(f"{server.url}/x", tmp_path / "x", FileVersion(10_000))
    assert time.monotonic() - began < 20


def test_a_listing_stays_in_its_folder(servers: tuple[Server, Server], tmp_path: Path) -> None:
    server, other = servers
    names = ["a.tar", "../up.tar", "/root.tar", f"{other.url}/b.tar", "//evil/c.tar", "..", "../../d.tar", "sub/e.tar"]
    server.files["/list/"] = "".join(f'<a href="{name}">x</a>' for name in names).encode()
    server.responses["/list/"] = lambda handler: (
        handler.begin(200, len(server.files["/list/"]), Content_Type="text/html"),
        handler.wfile.write(server.files["/list/"]),
    )
    assert list(fsspec_io.find_matching(f"{server.url}/list/*.tar")) == [f"{server.url}/list/a.tar"]
    assert all(".." not in name for name in fsspec_io.find_matching(f"{server.url}/list/**/*.tar"))
    assert not other.requests


def test_a_download_larger_than_the_disk_is_refused(servers: tuple[Server, Server], tmp_path: Path) -> None:
    server, _ = servers
    server.responses["/x"] = lambda handler: handler.begin(200, 10**17)
    with pytest.raises(UserError, match="no space to cache"):
        fsspec_io.download(f"{server.url}/x", tmp_path / "x", FileVersion(10**17))


def test_claims_of_a_remote_cache_are_checked(servers: tuple[Server, Server], tmp_path: Path) -> None:
    server, _ = servers
    make_cache(SyntheticShapes(count=4, size=16), tmp_path / "cached", (16, 16))
    server.serve(tmp_path / "cached", "/c")
    settings = json.loads(server.files["/c/settings.json"])
    server.files["/c/settings.json"] = json.dumps(settings | {"images": 10**12}).encode()
    with pytest.raises(UserError, match="images"):
        open_dataset(f"{server.url}/c")
    shard(tmp_path / "one.tar", range(2))
    content = (tmp_path / "one.tar").read_bytes()
    server.responses["/one.tar"] = lambda handler: (
        handler.begin(200, len(content)),
        handler.wfile.write(content[:1000]),
    )
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(f"{server.url}/one.tar")
