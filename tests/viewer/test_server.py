"""The page's web application: access and arguments of its requests."""

import asyncio
import io
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import pixmim
from pixmim.utils.errors import UserError
from pixmim.viewer.page import Page
from pixmim.viewer.server import build_app

pytest.importorskip("httpx2", reason="starlette's test client needs httpx2")
from starlette.testclient import TestClient

BASE = "http://127.0.0.1"


@pytest.fixture
def client(page: Page) -> TestClient:
    client = TestClient(build_app(page, "secret"), base_url=BASE)
    assert client.get("/?token=secret").status_code == 200
    return client


def addresses(page: Page) -> list[tuple[str, str]]:
    routes = build_app(page, "secret").routes
    return [(route.path, next(iter(route.methods - {"HEAD"}))) for route in routes]  # type: ignore[attr-defined]


def test_nothing_is_served_without_the_token(page: Page) -> None:
    stranger = TestClient(build_app(page, "secret"), base_url=BASE)
    asked = addresses(page)
    assert ("/", "GET") in asked and len(asked) > 15
    for path, method in asked:
        path = path.replace("{encoder:int}", "0").replace("{path:path}", "index.html")
        assert stranger.request(method, path).status_code == 403, path
    assert stranger.get("/?token=secre").status_code == 403
    assert stranger.get("/?token=ü").status_code == 403


def test_the_token_moves_from_the_address_to_a_cookie(page: Page) -> None:
    answer = TestClient(build_app(page, "secret"), base_url=BASE, follow_redirects=False).get("/?token=secret")
    assert answer.status_code == 307 and answer.headers["location"] == "/"
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=strict" in answer.headers["set-cookie"]


def test_other_host_names_and_other_sites_are_refused(client: TestClient) -> None:
    assert client.get("/api/page", headers={"host": "attacker.example"}).status_code == 400
    assert (
        client.post("/api/index", content='{"encoder": 0}', headers={"sec-fetch-site": "cross-site"}).status_code == 403
    )


def test_every_answer_has_a_policy_that_allows_no_other_host(client: TestClient) -> None:
    for path in ("/", "/static/page.js", "/api/page", "/api/thumbnail?image=d0&side=32"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and policy.startswith("default-src 'none'") and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    text = "".join(client.get(path).text for path in ("/", "/static/page.js", "/static/page.css"))
    assert "innerHTML" not in text and "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


def test_an_address_of_ipv6_is_served(page: Page) -> None:
    client = TestClient(build_app(page, "secret", "::1"), base_url="http://[::1]:8765")
    assert client.get("/?token=secret").status_code == 200
    assert client.get("/api/page", headers={"host": "attacker.example"}).status_code == 400


def test_names_in_no_encoding_and_numbers_that_json_lacks_are_shown(client: TestClient, two_runs: list[Path]) -> None:
    name = b"M\xfcller.jpg"
    with open(two_runs[0] / "skipped.csv", "wb") as file:
        file.write(b"image,reason\n" + name + b",damaged\n")
    with open(two_runs[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epoch": 1.0, "loss": NaN, "lr": 0.5}\n{"step": 10, "epoch": 1.1, "loss": 1e999}\n')
    status = client.get("/api/status?run=0")
    assert status.status_code == 200 and "ller.jpg" in str(status.json()["skipped"][0])
    records = client.get("/api/metrics?run=0&position=").json()["records"]
    assert records[-2] == {"step": 9, "epoch": 1.0, "lr": 0.5} and records[-1] == {"step": 10, "epoch": 1.1}


def test_answers_are_those_of_the_page(client: TestClient, page: Page) -> None:
    assert client.get("/api/page").json() == json.loads(json.dumps(page.describe()))
    thumbnail = Image.open(io.BytesIO(client.get("/api/thumbnail?image=d2&side=20").content))
    assert thumbnail.format == "JPEG" and max(thumbnail.size) == 20
    hidden = [0, 1] * 8
    answer = client.post("/api/reconstruct", json={"image": "d1", "hidden": hidden, "runs": [1]})
    assert answer.json() == page.reconstruct("d1", [bool(one) for one in hidden], [1])
    assert client.get("/api/metrics?run=0&position=").json()["records"][0]["step"] == 1


@pytest.mark.parametrize(
    "path",
    [
        "/api/thumbnail",  # nothing given
        "/api/thumbnail?image=d0",  # no side
        "/api/thumbnail?image=d0&side=x",
        "/api/thumbnail?image=d0&side=1e400",
        "/api/thumbnail?image=d0&side=nan",
        "/api/thumbnail?image=d0&side=0",
        "/api/thumbnail?image=d0&side=100000",
        "/api/thumbnail?image=..%2F..%2Fetc%2Fpasswd&side=32",
        "/api/thumbnail?image=d0&side=32&path=/etc/passwd",  # an unknown parameter
        "/api/metrics?run=7&position=",
        "/api/metrics?run=-1&position=",
        "/api/low-pass?image=d0&run=0&radius=-1",
        "/api/low-pass?image=d0&run=0&radius=nan",
        "/api/mask?run=0&kind=random&ratio=2&block_size=8&seed=0",
        "/api/mask?run=0&kind=random&ratio=nan&block_size=8&seed=0",
        "/api/mask?run=0&kind=other&ratio=0.5&block_size=8&seed=0",
        "/api/mask?run=0&kind=blocks&ratio=0.5&block_size=0&seed=0",
        "/api/neighbors?image=d0&count=-3",
        "/api/list?encoder=0&kind=other",
        "/api/checkpoint?run=0&step=-5",
    ],
)
def test_other_arguments_are_refused(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 400 and answer.json()["error"], answer.text


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{", '{"encoder": "0"', '{"encoder": null}', '{"encoder": true}', '{"encoder": [0]}', "[" * 100_000],
)
def test_other_bodies_are_refused(client: TestClient, body: str) -> None:
    assert client.post("/api/index", content=body).status_code == 400


@pytest.mark.parametrize(
    "path", ["/static/../page.py", "/static/%2e%2e/page.py", "/page.py", "/map/0/../../etc/passwd"]
)
def test_no_other_file_can_be_read(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404
    assert client.get("/static/page.css?text=/etc/passwd").status_code == 400


def test_uploads_are_bounded_and_decoded_with_guards(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(buffer, "PNG")
    answer = client.post("/api/upload?name=<b>.png", content=buffer.getvalue())
    assert answer.status_code == 200 and answer.json()["image"].startswith("u")
    assert client.post("/api/upload?name=x", content=b"no image").status_code == 400
    monkeypatch.setattr("pixmim.viewer.server.MAX_UPLOAD_BYTES", 50)
    assert "MiB" in client.post("/api/upload?name=x", content=b"x" * 51).json()["error"]


def test_a_map_is_served_from_its_folder_only(client: TestClient, page: Page, tmp_path: Path) -> None:
    assert client.get("/map/0/").status_code == 404
    folder = page._maps[0].folder
    folder.mkdir()
    (folder / "index.html").write_text("the map")
    (folder.parent / "images.parquet").write_text("secret")
    page._maps[0].state = "ready"
    assert client.get("/map/0/").text == "the map"
    for path in ("/map/0/../images.parquet", "/map/0/%2e%2e/images.parquet", "/map/0/..%2fimages.parquet", "/map/9/"):
        assert client.get(path).status_code == 404, path


def test_view_refuses_what_it_cannot_open(
    two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Console(quiet=True)
    for runs in ([tmp_path], tmp_path, str(tmp_path)):
        with pytest.raises(UserError, match=f"{tmp_path} is not a run"):
            pixmim.view(runs, console=quiet)
    with pytest.raises(UserError, match="no run given"):
        pixmim.view([], console=quiet)
    opened: list[str | None] = []
    monkeypatch.setattr("pixmim.viewer.page.Page", lambda runs, data, device: opened.append(data))
    with pytest.raises(UserError, match="--host"):
        pixmim.view(two_runs, data=tmp_path, host="203.0.113.7", console=quiet, open_browser=False)
    assert opened == [str(tmp_path)]
    monkeypatch.undo()
    with pytest.raises(UserError, match="--host"):
        pixmim.view(two_runs, data="shapes:count=3,size=32", host="203.0.113.7", console=quiet, open_browser=False)


def test_a_page_opens_in_a_notebook(two_runs: list[Path]) -> None:
    """A notebook runs cells within an event loop."""
    lines, statuses = io.StringIO(), list[int]()

    def use() -> None:
        for _ in range(300):
            if "Ctrl-C" in lines.getvalue():
                break
            time.sleep(0.1)
        try:
            urllib.request.urlopen(lines.getvalue().split()[0], timeout=20)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)
        signal.raise_signal(signal.SIGINT)  # as the notebook's button

    async def cell() -> None:
        threading.Thread(target=use, daemon=True).start()
        pixmim.view(two_runs[0], console=Console(file=lines, width=200), open_browser=False)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(cell())
    loop.close()
    assert statuses == [403]  # the token moves to a cookie, which urllib does not keep
