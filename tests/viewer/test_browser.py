"""The page in a real browser: it shows the results of the library, and contacts no other host.

The screenshots in docs/ are made by the last test, of better runs than its own:

    export PIXMIM_SCREENSHOTS=docs/images PIXMIM_SCREENSHOT_RUNS=runs/demo,runs/demo-mae
    pytest tests/viewer/test_browser.py -k screenshots
"""

import base64
import importlib.util
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.runs import train
from pixmim.config import PretrainConfig
from pixmim.evaluation.attentive_probe import AttentiveProbe, save_probe
from pixmim.utils.errors import UserError
from pixmim.viewer import _listen
from pixmim.viewer.page import Page
from pixmim.viewer.server import build_app

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="the browser tests need chromium: apt-get install chromium")

DATA = "shapes:count=30,size=32"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def runs(two_runs: list[Path], tmp_path: Path, request: pytest.FixtureRequest) -> list[Path]:
    if "screenshots" in request.node.name and (names := os.environ.get("PIXMIM_SCREENSHOT_RUNS")):
        two_runs = [Path(name) for name in names.split(",")]
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in two_runs]


@pytest.fixture
def served(runs: list[Path]) -> Iterator[tuple[str, Page]]:
    """Yield the address of a page, and its contents."""
    import uvicorn

    page = Page(runs, DATA, "cpu")
    with _listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(build_app(page, "secret"), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/?token=secret", page
        server.should_exit = True
        thread.join()


@pytest.fixture
def tab(browser: Any, served: tuple[str, Page]) -> Iterator[Any]:
    """Yield an open page, and check at the end that it had no error and contacted no other host."""
    context, problems, hosts = browser.new_context(viewport={"width": 1280, "height": 900}), list[str](), set[str]()
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    harmless = ("400", "WebGPU")  # refused requests; what embedding-atlas lacks in a browser without a GPU
    tab.on(
        "console",
        lambda line: (
            problems.append(line.text) if line.type == "error" and not any(x in line.text for x in harmless) else None
        ),
    )
    tab.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    tab.goto(served[0])
    tab.wait_for_selector("#charts svg")
    yield tab
    context.close()
    assert not problems and hosts == {served[0].split("/")[2]}


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition. The page's policy forbids playwright's own way, which evaluates a string."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def picture(tab: Any, selector: str) -> np.ndarray:
    url = tab.get_attribute(selector, "src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def drawn(page: Page, image: str, hidden: list[bool], run: int, column: str) -> np.ndarray:
    url = page.reconstruct(image, hidden, [run])[0]["columns"][column]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def open_reconstruct(tab: Any) -> None:
    tab.click("#tab-reconstruct")
    tab.wait_for_selector("#predictions figure")
    tab.wait_for_selector("#low-pass figure")


def test_training_shows_curves_checkpoints_and_settings(tab: Any) -> None:
    assert "pixmim: step 6" in tab.inner_text("#live") and "mae: step 6" in tab.inner_text("#live")
    titles = tab.locator("#charts h3").all_inner_texts()
    assert {"Loss", "Learning rate", "Images per second"} <= set(titles)
    assert tab.locator("#charts figure").first.locator("polyline").count() == 2
    assert "target.kind" in tab.inner_text("#settings")
    tab.wait_for_selector("#checkpoint-image")
    assert "step 6 (3 of 3)" in tab.inner_text("#checkpoint-label")
    tab.focus("#checkpoint-step")
    tab.keyboard.press("ArrowLeft")
    assert "step 4 (2 of 3)" in tab.inner_text("#checkpoint-label")
    assert tab.get_attribute("#checkpoint-image", "src").endswith("step=4")


def test_curves_grow_while_a_run_trains(tab: Any, runs: list[Path], tiny_run: Callable[..., PretrainConfig]) -> None:
    assert "training" not in tab.inner_text("#live")
    train(tiny_run(log_every=1, steps=9), runs[0], resume=True)
    until(lambda: "step 9" in tab.inner_text("#live"))
    assert "pixmim: step 9, epoch 1.8 · training" in tab.inner_text("#live")
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('broken\n{"step": 7, "epoch": 1.4, "loss": 0.5}\n{"step": 8')
    until(lambda: "1 lines of metrics.jsonl" in tab.inner_text("#live"))
    assert "mae: step 7" in tab.inner_text("#live")


def test_a_painted_mask_is_predicted_as_by_the_library(tab: Any, served: tuple[str, Page]) -> None:
    open_reconstruct(tab)
    before = picture(tab, "#predictions img >> nth=1")
    hidden = np.reshape(served[1].mask(0, "as-trained", 0.75, 16, 0)["hidden"], (4, 4)).astype(bool)
    assert np.array_equal(before, drawn(served[1], "d0", hidden.ravel().tolist(), 0, "masked"))
    box = tab.locator("#painter-canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] / 8)  # drag along the first row
    tab.mouse.down()
    tab.mouse.move(box["x"] + 7 * box["width"] / 8, box["y"] + box["height"] / 8, steps=12)
    tab.mouse.up()
    hidden[0] = not hidden[0, 0]
    expected = drawn(served[1], "d0", hidden.ravel().tolist(), 1, "prediction")
    until(lambda: np.array_equal(picture(tab, "#predictions img >> nth=8"), expected))  # of the second model
    assert f"{int(hidden.sum())} of 16 patches hidden" in tab.inner_text("#painter-state")


def test_a_mask_is_painted_with_the_keyboard(tab: Any) -> None:
    open_reconstruct(tab)
    tab.click("#mask-clear")
    tab.focus("#painter")
    for key in ("ArrowRight", "ArrowDown", "Space"):
        tab.keyboard.press(key)
    assert "row 2, column 2: hidden. 2 of 16 patches hidden" in tab.inner_text("#painter-state")


def test_an_own_image_is_uploaded_and_reconstructed(tab: Any, served: tuple[str, Page], tmp_path: Path) -> None:
    open_reconstruct(tab)
    name = "<img src=x onerror=document.title=1>.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / name)
    tab.set_input_files("#reconstruct .file input", tmp_path / name)
    until(lambda: "onerror" in tab.inner_text("#reconstruct .name"))
    key = served[1].upload((tmp_path / name).read_bytes(), name)["image"]
    hidden = [bool(one) for one in served[1].mask(0, "as-trained", 0.75, 16, 0)["hidden"]]
    expected = drawn(served[1], key, hidden, 0, "image")
    until(lambda: np.array_equal(picture(tab, "#predictions img >> nth=0"), expected))
    assert tab.title() != "1" and tab.locator("img[src=x]").count() == 0
    (tmp_path / "bad.png").write_bytes(b"no image")
    tab.set_input_files("#reconstruct .file input", tmp_path / "bad.png")
    tab.wait_for_selector("#message:not([hidden])")
    assert "bad.png cannot be read" in tab.inner_text("#message")
    before = picture(tab, "#predictions img >> nth=1")
    tab.click("#mask-next")
    until(lambda: not np.array_equal(picture(tab, "#predictions img >> nth=1"), before))
    assert "bad.png cannot be read" in tab.inner_text("#message")  # what succeeds does not hide what failed
    tab.locator("#reconstruct .thumbnails button").nth(1).click()
    tab.wait_for_selector("#message", state="hidden")


def test_the_radius_moves_the_low_pass(tab: Any, served: tuple[str, Page]) -> None:
    open_reconstruct(tab)
    tab.focus("#radius")
    tab.keyboard.press("Home")
    until(lambda: tab.locator("#low-pass svg text", has_text="r = 1").count() and tab.locator("#low-pass img").count())
    expected = served[1].low_pass("d0", 0, 1)
    assert f"{100 * expected['share']:.1f} % of the variance" in tab.inner_text("#low-pass")
    assert tab.get_attribute("#low-pass img >> nth=0", "src") == expected["kept"]


def test_neighbors_beside_those_of_the_untrained_encoder(tab: Any, served: tuple[str, Page]) -> None:
    tab.click("#tab-neighbors")
    for box in (0, 1):
        tab.locator("#encoders input").nth(box).check()
        until(lambda: tab.locator("#found h3").count() == box + 1)  # noqa: B023
    answers = served[1].neighbors("d0", 10)
    shown = tab.locator("#found .neighbor button").evaluate_all("all => all.map(one => one.dataset.image)")
    assert shown == ["d0", *(one["image"] for answer in answers for one in answer["images"])]
    until(lambda: tab.locator("#lists h2").count() == 4)
    with tab.expect_download() as download:
        tab.click("#lists a >> nth=0")
    assert Path(download.value.path()).read_text().startswith("file,nearest,cosine")
    tab.locator("#found .neighbor button").nth(3).click()  # a neighbor becomes the query
    until(lambda: tab.get_attribute("#found button >> nth=0", "data-image") == shown[3])


def test_attention_of_a_probe_is_shown(tab: Any, served: tuple[str, Page], runs: list[Path]) -> None:
    (runs[1] / "evaluations").mkdir()
    with torch.random.fork_rng(devices=[]):
        probe = AttentiveProbe(32, 2, 4)
    save_probe(probe, ["a", "b"], 6, runs[1] / "evaluations/attentive-trained-x.safetensors")
    tab.click("#tab-neighbors")
    tab.wait_for_selector("#attention img")
    first, second = tab.locator("#attention h3").all_inner_texts()
    assert "last block" in first and "queries of its attentive probe of 2 classes" in second
    answer = served[1].attention("d0", 1)["columns"]
    assert tab.locator("#attention figcaption").all_inner_texts() == ["all heads", *answer]
    assert tab.get_attribute("#attention img >> nth=1", "src") == next(iter(answer.values()))


def test_a_run_that_was_killed_is_named_as_unfinished(tab: Any, runs: list[Path]) -> None:
    assert not tab.inner_text("#unfinished")
    shutil.rmtree(runs[0] / "encoder")
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epoch": 1.4, "loss": 0.5}\n')
    os.utime(runs[0] / "metrics.jsonl", (0, time.time() - 3 * 3600))
    until(lambda: "pixmim is not finished: last logged 3 hours ago" in tab.inner_text("#unfinished"))
    assert f"pixmim pretrain --resume {runs[0]}" in tab.inner_text("#unfinished")


def test_the_map_is_drawn_by_the_program_that_is_asked_to(tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page in the place of embedding-atlas's."""

    def export(table: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "index.html").write_text(f"<p id=points>{table.read_text()}</p>")

    written = lambda out, index, data, config: out.write_text(f"{len(index.unit)} points")  # noqa: E731
    monkeypatch.setattr("pixmim.viewer.atlas.write_table", written)
    monkeypatch.setattr("pixmim.viewer.atlas.export_page", export)
    tab.click("#tab-map")
    tab.click("#map-start")
    tab.wait_for_selector("#map-frame:not([hidden])")
    assert tab.frame_locator("#map-frame").locator("#points").inner_text() == "30 points"
    assert tab.inner_text("#map-state") == ""


def test_the_map_names_what_it_needs(tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise UserError("the map needs embedding-atlas: pip install 'pixmim[map]'")

    monkeypatch.setattr("pixmim.viewer.atlas.write_table", missing)
    tab.click("#tab-map")
    tab.click("#map-start")
    until(lambda: "pip install 'pixmim[map]'" in tab.inner_text("#map-state"))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("embedding_atlas", "umap")),
    reason="the real map needs embedding-atlas and umap-learn: pip install 'pixmim[map]'",
)
def test_the_map_of_embedding_atlas_loads_from_this_machine_alone(tab: Any) -> None:
    tab.set_default_timeout(300_000)
    tab.click("#tab-map")
    tab.click("#map-start")
    tab.wait_for_selector("#map-frame:not([hidden])")
    frame = tab.frame_locator("#map-frame")
    frame.get_by_text("30 points").first.wait_for()  # counted by its database, which runs in the browser
    frame.locator("img[src^='data:image']").first.wait_for()  # a thumbnail in the table
    text = frame.locator("body").inner_text()
    assert "class" in text and f"{DATA.split(':')[0]}:count=30" in text and "FILE_NAME" not in text


def test_two_tabs_do_not_disturb_each_other(tab: Any, served: tuple[str, Page]) -> None:
    other = tab.context.new_page()
    other.goto(served[0].partition("?")[0] + "#reconstruct")
    open_reconstruct(tab)
    other.wait_for_selector("#predictions figure")
    other.fill("#reconstruct .number input", "5")
    other.keyboard.press("Enter")
    first = picture(tab, "#predictions img >> nth=0")
    until(lambda: not np.array_equal(first, picture(other, "#predictions img >> nth=0")))
    assert np.array_equal(first, picture(tab, "#predictions img >> nth=0"))


def test_tabs_are_chosen_with_the_keyboard_on_a_narrow_screen_too(tab: Any) -> None:
    tab.set_viewport_size({"width": 400, "height": 800})
    tab.focus("#tab-training")
    for panel in ("reconstruct", "neighbors", "map", "training"):
        tab.keyboard.press("ArrowRight")
        assert tab.is_visible(f"#{panel}") and tab.locator('[role="tabpanel"]:visible').count() == 1
        wide = tab.evaluate(
            "[...document.querySelectorAll('main *')].filter(one => one.getBoundingClientRect().right > 400)"
            ".filter(one => !one.closest('.thumbnails')).map(one => one.outerHTML.slice(0, 80))"
        )
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400, (panel, wide)
    assert tab.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
    ends = tab.evaluate("[...document.querySelectorAll('[role=tab]')].map(one => one.getBoundingClientRect().right)")
    assert max(ends) <= 400  # no tab has to be scrolled to
    tab.click("#tab-neighbors")
    tab.locator("#encoders input").first.check()
    tab.wait_for_selector("#lists .pair")
    sides = (
        tab.locator("#found .strip").nth(1).locator(".neighbor").evaluate_all("all => all.map(one => one.offsetTop)")
    )
    assert sides.count(sides[0]) == 3  # neighbors in a row
    tab.click("#tab-training")
    tab.wait_for_selector("#checkpoint-image")
    assert tab.locator("#checkpoint-image").bounding_box()["width"] > 700  # it scrolls, so that it can be read
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots_of_every_tab(tab: Any, tmp_path: Path, scheme: str) -> None:
    folder = Path(os.environ.get("PIXMIM_SCREENSHOTS", tmp_path))
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 1280, "height": 860})
    backgrounds = set()
    for panel, ready in (
        ("training", "#checkpoint-image"),
        ("reconstruct", "#low-pass img"),
        ("neighbors", "#lists img"),
    ):
        tab.click(f"#tab-{panel}")
        if panel == "neighbors" and scheme == "light":
            for box in (0, 1):
                tab.locator("#encoders input").nth(box).check()
        elif panel == "neighbors":
            tab.locator("#encoders input").first.check()
        tab.wait_for_selector(ready)
        until(
            lambda: tab.evaluate(
                "[...document.images].filter(i => i.offsetParent && i.getBoundingClientRect().top < innerHeight)"
                ".every(i => i.complete)"
            )
        )
        image = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        image.quantize(256).save(folder / f"view-{panel}{'-dark' * (scheme == 'dark')}.png", optimize=True)
        backgrounds.add(image.getpixel((2, 2)))
        assert len(image.getcolors(2**20) or []) > 100, panel  # not an empty page
    assert len(backgrounds) == 1 and (sum(backgrounds.pop()) > 384) == (scheme == "light")
