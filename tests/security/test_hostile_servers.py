"""Servers that are not to be trusted: redirects, endless and slow answers, listings of other places, promised sizes."""

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
from pixmim.data.shards import fsspec_io as remote
from pixmim.data.shards import http as client
from pixmim.data.shards.local import FileVersion
from pixmim.data.synthetic import SyntheticShapes
from pixmim.utils.errors import UserError

pytest.importorskip("aiohttp")
pytest.importorskip("fsspec")

yarl = pytest.importorskip("yarl")


class Handler(BaseHTTPRequestHandler):
    """Answers by the functions in `server.answers`, and with the files in `server.files`."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path in self.server.answers:
            try:
                self.server.answers[self.path](self)
            except OSError:  # the client went away, as it should
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
        self.asked: list[str] = []
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.files: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def serve(self, folder: Path, below: str) -> None:
        self.files |= {f"{below}/{path.name}": path.read_bytes() for path in folder.iterdir()}

    def redirect(self, path: str, to: str) -> None:
        self.answers[path] = lambda handler: handler.begin(302, 0, Location=to)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server]]:
    """Two hosts: another port is another host."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", (0.0, 0.0))
    found = Server(), Server()
    for server in found:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    for server in found:
        server.shutdown()
        server.server_close()


def endless(handler: Handler) -> None:
    """Send without an end, as much as the client takes."""
    handler.begin(200)
    while handler.command == "GET":
        handler.wfile.write(bytes(2**16))


def dripping(handler: Handler) -> None:
    """Send a byte now and then, of many that are promised."""
    handler.begin(200, 10_000)
    while handler.command == "GET":
        handler.wfile.write(b"x")
        time.sleep(0.05)


def test_a_redirect_to_another_host_is_refused_before_it_is_asked(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = servers
    make_cache(SyntheticShapes(count=4, size=16), tmp_path / "cached", (16, 16))
    there.serve(tmp_path / "cached", "/c")
    for name in there.files:
        here.redirect(name, there.url + name)
    for spec in (f"{here.url}/c", f"{here.url}/c/shard-000000.tar"):
        with pytest.raises(UserError, match=rf"another host, 127.0.0.1:{there.server_port}.*PIXMIM_REDIRECT_HOSTS"):
            open_dataset(spec)
    assert not there.asked
    monkeypatch.setenv(client.REDIRECT_HOSTS, "example.org, 127.0.0.1")
    data = open_dataset(f"{here.url}/c")
    assert len(data) == 4 and data.image(0).shape[0] == 3 and there.asked


def test_every_kind_of_request_is_held_to_its_host(servers: tuple[Server, Server], tmp_path: Path) -> None:
    here, there = servers
    there.files["/x"] = bytes(100)
    here.redirect("/x", there.url + "/x")
    here.redirect("/list/", there.url + "/x")
    for ask in (
        lambda: remote.read_small_file(f"{here.url}/x"),
        lambda: remote.file_version(f"{here.url}/x"),
        lambda: remote.read_range(f"{here.url}/x", 10, 10),
        lambda: remote.download(f"{here.url}/x", tmp_path / "x", FileVersion(100)),
        lambda: remote.find_matching(f"{here.url}/list/*.tar"),
    ):
        with pytest.raises(UserError, match="redirects to another host"):
            ask()
    assert not there.asked and not (tmp_path / "x").exists()
    here.redirect("/file", "file:///etc/passwd")
    with pytest.raises(UserError, match="not an http"):
        remote.read_small_file(f"{here.url}/file")
    here.redirect("/a", "/b")
    here.files["/b"] = b"here"
    assert remote.read_small_file(f"{here.url}/a") == b"here"
    here.redirect("/loop", "/loop")
    with pytest.raises(UserError, match="TooManyRedirects"):
        remote.read_small_file(f"{here.url}/loop")


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
def test_where_a_server_may_redirect(origin: str, target: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.REDIRECT_HOSTS, "named.org")
    if not message:
        client.check_redirect(yarl.URL(origin), yarl.URL(target))
        return
    with pytest.raises(UserError, match=message):
        client.check_redirect(yarl.URL(origin), yarl.URL(target))


def test_an_answer_without_an_end_is_not_read(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = servers
    monkeypatch.setattr(client, "MAX_LISTING_BYTES", 10**6)
    here.answers = {"/c/settings.json": endless, "/x": endless, "/list/": endless, "/list": endless}
    with pytest.raises(UserError, match=r"settings.json is larger than the [\d,]+ bytes allowed"):
        open_dataset(f"{here.url}/c")
    with pytest.raises(UserError, match=r"larger than the 100 bytes allowed"):
        remote.read_small_file(f"{here.url}/x", 100)
    with pytest.raises(UserError, match="lists more than 1,000,000 bytes"):
        remote.find_matching(f"{here.url}/list/*.tar")
    monkeypatch.setattr(remote, "file_version", lambda url: FileVersion(10**6))
    with pytest.raises(UserError, match="more than the 1,000,000 bytes"):
        remote.download(f"{here.url}/x", tmp_path / "x", FileVersion(10**6))
    assert (tmp_path / "x").stat().st_size < 10**7
    here.answers["/x"] = lambda handler: handler.begin(206) or [handler.wfile.write(bytes(2**16)) for _ in range(10**6)]
    with pytest.raises(UserError, match="of 10 bytes"):
        remote.read_range(f"{here.url}/x", 5, 10)


def test_a_server_that_drips_is_left(
    servers: tuple[Server, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = servers
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    here.answers = {"/x": dripping}
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot be read: FSTimeoutError"):
        remote.read_small_file(f"{here.url}/x")
    monkeypatch.setattr(remote, "file_version", lambda url: FileVersion(10_000))
    with pytest.raises(UserError, match=r"is too slow: .* bytes"):
        remote.download(f"{here.url}/x", tmp_path / "x", FileVersion(10_000))
    assert time.monotonic() - began < 20


def test_a_listing_leads_nowhere_else(servers: tuple[Server, Server], tmp_path: Path) -> None:
    here, there = servers
    names = ["a.tar", "../up.tar", "/root.tar", f"{there.url}/b.tar", "//evil/c.tar", "..", "../../d.tar", "sub/e.tar"]
    here.files["/list/"] = "".join(f'<a href="{name}">x</a>' for name in names).encode()
    here.answers["/list/"] = lambda handler: (
        handler.begin(200, len(here.files["/list/"]), Content_Type="text/html"),
        handler.wfile.write(here.files["/list/"]),
    )
    assert list(remote.find_matching(f"{here.url}/list/*.tar")) == [f"{here.url}/list/a.tar"]
    assert all(".." not in name for name in remote.find_matching(f"{here.url}/list/**/*.tar"))
    assert not there.asked


def test_a_copy_larger_than_the_disk_is_refused_at_once(servers: tuple[Server, Server], tmp_path: Path) -> None:
    here, _ = servers
    here.answers["/x"] = lambda handler: handler.begin(200, 10**17)
    with pytest.raises(UserError, match="no space to cache"):
        remote.download(f"{here.url}/x", tmp_path / "x", FileVersion(10**17))


def test_what_a_far_cache_promises_is_checked(servers: tuple[Server, Server], tmp_path: Path) -> None:
    here, _ = servers
    make_cache(SyntheticShapes(count=4, size=16), tmp_path / "cached", (16, 16))
    here.serve(tmp_path / "cached", "/c")
    settings = json.loads(here.files["/c/settings.json"])
    here.files["/c/settings.json"] = json.dumps(settings | {"images": 10**12}).encode()
    with pytest.raises(UserError, match="images"):
        open_dataset(f"{here.url}/c")
    shard(tmp_path / "one.tar", range(2))
    content = (tmp_path / "one.tar").read_bytes()
    here.answers["/one.tar"] = lambda handler: (handler.begin(200, len(content)), handler.wfile.write(content[:1000]))
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(f"{here.url}/one.tar")
