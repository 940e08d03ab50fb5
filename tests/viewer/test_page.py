"""The page shows the results of the library."""

import base64
import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pixmim
from helpers.runs import train
from pixmim.build import build_loss, image_spec
from pixmim.config import ModelConfig, PretrainConfig, TargetConfig
from pixmim.evaluation.attentive_probe import AttentiveProbe, save_probe
from pixmim.evaluation.frozen_encoder import load_frozen_encoder
from pixmim.evaluation.visualize import heat_overlay, to_rgb
from pixmim.export import export_model
from pixmim.masking import Mask
from pixmim.report import write_report
from pixmim.report.reconstruct import draw
from pixmim.transforms.crops import CenterCrop, evaluation_crop, flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.viewer.images import ImageStore
from pixmim.viewer.index import EncoderIndex, Job
from pixmim.viewer.page import Page
from pixmim.viewer.runs import Run, low_passed, random_mask, read_new_metrics, target_radius
from pixmim.weights.load import build_with_weights, resolve_model

DATA = "shapes:count=30,size=32"


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_description_lists_runs_settings_and_images(page: Page) -> None:
    described = page.describe()
    assert [run["name"] for run in described["runs"]] == ["pixmim", "mae"]
    assert described["runs"][0]["grid"] == [4, 4] and described["dataset"]["count"] == 30
    assert [(run["data"], run["knn"]) for run in described["runs"]] == [(run.config.data, "") for run in page.runs]  # type: ignore[attr-defined]
    assert {"name": "target.kind", "values": ["low-frequency", "pixels"]} in described["settings"]
    assert json.dumps(described)


def test_data_of_a_run_from_elsewhere_is_not_opened(two_runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two_runs[0], tmp_path / "run")
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace('"shapes:count=40,size=32"', '"/etc"'))
    described = Page([tmp_path / "run"]).describe()
    assert "not made by you" in described["problem"] and described["dataset"]["count"] == 0
    with pytest.raises(UserError, match="not made by you"):
        Page([tmp_path / "run"]).thumbnail("d0", 32)


def test_reconstruction_under_a_painted_mask_is_that_of_the_library(page: Page, two_runs: list[Path]) -> None:
    hidden = [i % 3 > 0 for i in range(16)]
    for number, (answer, folder) in enumerate(zip(page.reconstruct("d4", hidden, [0, 1]), two_runs, strict=True)):
        weights = resolve_model(str(folder), with_decoder=True)
        crop = CenterCrop(32).crop(pixmim.open_dataset(DATA, image_spec(weights.config)).image(4))[None]
        mask = Mask.from_hidden(torch.tensor([hidden]))
        expected = draw(build_with_weights(weights), weights.config, crop, mask=mask)
        assert answer["name"] == ("pixmim", "mae")[number] and answer["step"] == 6
        for name, drawn in expected.columns.items():
            assert np.array_equal(pixels(answer["columns"][name]), drawn[0].squeeze()), name


def test_a_mask_must_hide_some_patches_but_not_all(page: Page) -> None:
    for hidden in ([True] * 16, [False] * 16):
        with pytest.raises(UserError, match="at least one"):
            page.reconstruct("d0", hidden, [0])
    assert "patches" in page.reconstruct("d0", [True, False], [0])[0]["error"]  # of another grid


def test_random_masks_have_the_ratio_and_depend_on_the_seed(page: Page) -> None:
    one, two = (page.mask(0, "random", 0.5, 8, seed)["hidden"] for seed in (0, 1))
    assert sum(one) == sum(two) == 8 and one != two and one == page.mask(0, "random", 0.5, 8, 0)["hidden"]
    blocks = np.reshape(page.mask(0, "blocks", 0.5, 16, 0)["hidden"], (2, 2, 2, 2)).transpose(0, 2, 1, 3).reshape(4, 4)
    assert blocks.sum() == 8 and set(blocks.sum(axis=1)) == {0, 4}
    with pytest.raises(UserError, match="block"):
        page.mask(0, "blocks", 0.5, 9, 0)


def test_low_pass_splits_the_image(page: Page) -> None:
    full = page.low_pass("d3", 0, 32)
    assert full["share"] == pytest.approx(1, abs=1e-5) and set(pixels(full["removed"]).ravel()) == {128}
    half = page.low_pass("d3", 0, 4)
    run = Run.open(Path(page.runs[0].folder), "run")
    image = CenterCrop(32).crop(pixmim.open_dataset(DATA, image_spec(run.config)).image(3))[None].double() / 255
    kept = pixmim.low_pass(image, 4)
    expected = (kept.var(dim=(2, 3)) / run_std(run) ** 2).sum() / (image.var(dim=(2, 3)) / run_std(run) ** 2).sum()
    assert half["share"] == pytest.approx(float(expected), abs=1e-4)
    np.testing.assert_allclose(pixels(half["kept"]), (kept[0].permute(1, 2, 0) * 255).clip(0, 255), atol=1)


@pytest.mark.parametrize("variant", ["exact", "paper-code"])
def test_the_low_pass_of_the_targets_radius_is_the_target(variant: Any) -> None:
    target = TargetConfig(variant=variant)
    config = PretrainConfig(size="64x96", target=target, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    crop = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    found = low_passed(config, crop, target_radius(config))
    x = flip_and_normalize(crop, None, *map(torch.tensor, config.normalization))
    kept = build_loss(config).target(x)
    assert found.share == pytest.approx(float(kept.var(dim=(2, 3)).mean() / x.var(dim=(2, 3)).mean()))
    pixels = replace(config, target=TargetConfig("pixels"))
    assert low_passed(pixels, crop, 20).share == low_passed(config, crop, 20).share  # an ellipse as well


@pytest.mark.parametrize(("channels", "bands"), [(3, "3,2,1"), (5, "4,3,2"), (5, "2"), (2, ""), (1, "")])
def test_low_pass_draws_the_same_channels_on_both_sides(channels: int, bands: str) -> None:
    config = ModelConfig(channels=channels, bands=bands, size="32")
    crop = torch.randint(0, 256, (1, channels, 32, 32), dtype=torch.uint8)
    both = low_passed(config, crop, 4)
    assert both.kept.shape == both.removed.shape == (32, 32, len(config.drawn))
    (removed,) = crop.double() / 255 - pixmim.low_pass(crop.double() / 255, 4)
    span = 255 if channels in (1, 3) else int(crop.max()) - int(crop.min())  # others are shown over their own range
    expected = (128 + removed[list(config.drawn)].permute(1, 2, 0) * (255 * 255 / span)).clip(0, 255)
    np.testing.assert_allclose(both.removed, expected, atol=1)


def run_std(run: Run) -> torch.Tensor:
    return torch.tensor(run.config.normalization[1]).double()


def test_every_checkpoint_is_drawn_with_the_same_masks(page: Page) -> None:
    assert page.status(0)["steps"] == [2, 4, 6]
    sheets = [np.asarray(Image.open(io.BytesIO(page.checkpoint(0, step)))) for step in (2, 6)]
    width = sheets[0].shape[1] // 6
    assert np.array_equal(sheets[0][:, : 2 * width], sheets[1][:, : 2 * width])  # image and masked
    assert not np.array_equal(sheets[0], sheets[1])
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        page.checkpoint(0, 3)


def test_uploads_are_decoded_like_any_image(page: Page) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(buffer, "PNG")
    answer = page.upload(buffer.getvalue(), "<img src=x onerror=alert(1)>.png")
    assert set(pixels(page.low_pass(answer["image"], 0, 4)["kept"]).ravel()) == {90}
    assert page.neighbors(answer["image"], 3) == []  # without an index
    with pytest.raises(UserError, match="cannot be read"):
        page.upload(b"GIF89a not an image", "x.gif")


def test_only_the_newest_uploads_are_kept() -> None:
    store = ImageStore(lambda spec: pixmim.open_dataset(DATA, spec))
    keys = []
    for value in range(20):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
        keys.append(store.add(buffer.getvalue(), "x.png", pixmim.data.dataset.RGB))
    store.read(keys[-16], pixmim.data.dataset.RGB)
    with pytest.raises(UserError, match="choose it again"):
        store.read(keys[-17], pixmim.data.dataset.RGB)


@pytest.mark.parametrize("image", ["d30", "d-1", "d1e3", "d", "x", "../d0", "d00000000000000000000001", "d٣"])
def test_no_other_image_can_be_named(page: Page, image: str) -> None:
    with pytest.raises(UserError):
        page.thumbnail(image, 32)


def finished(page: Page, encoder: int) -> None:
    page.start_index(encoder)
    for _ in range(600):
        progress = page.indexes()[encoder]
        assert progress is not None and not progress["error"], progress
        if progress["complete"]:
            return
        time.sleep(0.05)
    raise AssertionError("the index is not complete after 30 s")


def test_neighbors_are_those_of_the_features(two_runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two_runs[0], tmp_path / "run")
    page = Page([tmp_path / "run"], DATA, "cpu")
    finished(page, 0)
    features, paths = pixmim.embed(str(tmp_path / "run"), DATA, device="cpu")
    unit = torch.nn.functional.normalize(torch.from_numpy(features).double())
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-2)
    (answer,) = page.neighbors("d7", 5)
    assert [one["image"] for one in answer["images"]] == [f"d{i}" for i in cosines[7].argsort(descending=True)[:5]]
    assert [one["cosine"] for one in answer["images"]] == pytest.approx(cosines[7].topk(5).values.tolist(), abs=1e-5)
    pair = page.listed(0, "duplicates", 1)[0]
    i, j = divmod(int(cosines.argmax()), 30)
    assert {pair["image"], pair["other"]["image"]} == {f"d{i}", f"d{j}"}
    assert page.listed(0, "outliers", 1)[0]["image"] == f"d{int(cosines.max(dim=1).values.argmin())}"
    lines = page.listed_csv(0, "outliers").splitlines()
    assert len(lines) == 31 and lines[0] == "file,cosine" and paths[0] in "".join(lines)
    with pytest.raises(UserError, match="not complete"):
        page.listed(1, "outliers")


def test_index_of_the_page_is_kept_beside_the_run(two_runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two_runs[0], tmp_path / "run")
    first, again = (EncoderIndex(tmp_path / "run", False, partial(pixmim.open_dataset, DATA), "cpu") for _ in range(2))
    computed = first.compute()
    written = (tmp_path / "run/index.safetensors").stat().st_mtime_ns
    assert torch.equal(computed.unit, again.compute().unit)
    assert (tmp_path / "run/index.safetensors").stat().st_mtime_ns == written


def test_untrained_encoder_has_an_index_of_its_own(two_runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two_runs[0], tmp_path / "run")
    page = Page([tmp_path / "run"], DATA, "cpu")
    finished(page, 1)
    encoder = load_frozen_encoder(str(tmp_path / "run"), device="cpu", untrained=True)
    index = page._encoders[1].index
    assert index is not None and page._encoders[1].encoder is not None
    for name, value in encoder.module.state_dict().items():
        assert torch.equal(value, page._encoders[1].encoder.module.state_dict()[name])


def test_a_failing_index_says_why(two_runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two_runs[0], tmp_path / "run")
    page = Page([tmp_path / "run"], str(tmp_path / "nothing"), "cpu")
    page.start_index(0)
    for _ in range(200):
        progress = page.indexes()[0]
        if progress is not None and progress["error"]:
            break
        time.sleep(0.05)
    assert progress is not None and "nothing" in progress["error"]
    page._data = DATA
    finished(page, 0)  # the next attempt


@pytest.mark.parametrize("error", [ValueError("too few"), KeyError()])
def test_the_page_never_waits_for_what_failed(error: Exception) -> None:
    def fail() -> None:
        raise error

    job = Job()
    job.run_work(fail)
    assert job.state == job.error == (str(error) or "KeyError")
    job.run_work(lambda: None)
    assert job.state == "ready" and not job.error


def test_attention_is_that_of_its_image_under_concurrent_requests(page: Page) -> None:
    """The attention of one image could be recorded while that of another is computed."""
    images = [f"d{i}" for i in range(8)] * 6
    expected = {image: page.attention(image, 0) for image in images[:8]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: page.attention(image, 0), images))
    assert all(answer == expected[image] for image, answer in zip(images, answers, strict=True))


def test_new_metrics_are_read_as_they_are_written(tmp_path: Path) -> None:
    assert read_new_metrics(tmp_path).records == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.1, "loss": 2.0}\n{"step": 2, "ep')
    first = read_new_metrics(tmp_path)
    assert [record["step"] for record in first.records] == [1] and not first.restarted and first.broken == 0
    with path.open("a") as file:
        file.write('och": 0.2}\nnot json\n{"step": -1, "epoch": 0}\n[]\n')
    second = read_new_metrics(tmp_path, first.position)
    assert [record["step"] for record in second.records] == [2] and second.broken == 3 and not second.restarted
    assert read_new_metrics(tmp_path, second.position) == replace(second, records=[], broken=0)


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.1}\n{"step": 2, "epoch": 0.2}\n')
    before = read_new_metrics(tmp_path)
    other = tmp_path / "other"  # as a resumed run writes it: a new file of the same length
    other.write_text('{"step": 1, "epoch": 0.1}\n{"step": 3, "epoch": 0.3}\n')
    other.replace(path)
    after = read_new_metrics(tmp_path, before.position)
    assert after.restarted and [record["step"] for record in after.records] == [1, 3]
    for position in ("", "x", "1:-5", "0:99999999999", f"{path.stat().st_ino}:999999", ":", "²:²"):
        assert [record["step"] for record in read_new_metrics(tmp_path, position).records] == [1, 3]


def test_metrics_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_text('{"step": 1, "epoch": 1}\n')
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out"):
        read_new_metrics(tmp_path / "run")


def test_masks_as_in_training_are_those_of_the_run(page: Page) -> None:
    run = page.runs[0]
    assert run.config.mask is not None
    hidden = random_mask(run, "as-trained", 0.1, 8, 5).hidden
    assert int(hidden.sum()) == 16 - int(16 * (1 - run.config.mask.ratio))


def test_attention_is_that_of_the_queries_of_a_probe_of_these_weights(two_runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_runs[0], run)
    page = Page([run], DATA, "cpu")
    last_block = page.attention("d3", 0)
    assert list(last_block["columns"]) == ["all heads"] and "last block" in last_block["about"]
    (run / "evaluations").mkdir(exist_ok=True)
    encoder = load_frozen_encoder(str(run), device="cpu")
    torch.manual_seed(0)
    probe = AttentiveProbe(32, 2, 4).eval()
    save_probe(probe, ["a", "b"], encoder.step, run / "evaluations/attentive-trained-zz.safetensors")
    drawn = page.attention("d3", 0)
    assert "2 classes" in drawn["about"] and len(drawn["columns"]) == 4
    crop = evaluation_crop(encoder.size).crop(pixmim.open_dataset(DATA, encoder.image_spec).image(3))
    module: Any = encoder.module
    with torch.no_grad():
        tokens = module.forward_features(encoder.preprocess(crop[None]))[0, 1:].double()
    for name, url in drawn["columns"].items():  # a loop in float64
        query = probe.queries[int(name.removeprefix("query ")) - 1].detach().double()
        scores = [float(query @ token) / 32**0.5 for token in tokens]
        share = torch.tensor(scores).double().softmax(0).reshape(1, 1, 4, 4)
        heat = torch.nn.functional.interpolate(share, size=(32, 32), mode="bilinear")[0, 0]
        expected = heat_overlay(to_rgb(crop, encoder.config)[None], heat[None])[0]
        np.testing.assert_allclose(pixels(url).astype(int), expected, atol=3)
    save_probe(probe, ["a", "b"], encoder.step + 1, run / "evaluations/attentive-trained-zzz.safetensors")
    assert page.attention("d3", 0) == last_block  # of other weights


def test_a_damaged_checkpoint_is_named_wherever_its_run_is_used(two_runs: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(two_runs[0], tmp_path / "run"))
    file = run / "checkpoints/step-000000006/rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert resolve_model(str(run)).step == 6  # the encoder of the finished run
    line = f"using the checkpoint of step 4, since the checkpoint {file.parent} is damaged"

    def mentions(*texts: str) -> bool:
        return all(line in text.replace("&#39;", "'") for text in texts)

    page = Page([run], DATA, "cpu")
    hidden = [True, *[False] * 15]
    (drawn,) = page.reconstruct("d0", hidden, [0])
    assert drawn["step"] == 4 and mentions(drawn["note"])
    shutil.rmtree(run / "encoder")
    assert mentions(page.attention("d0", 0)["about"], write_report([run], tmp_path / "r.html", DATA).read_text())
    assert mentions("".join(load_frozen_encoder(str(run), device="cpu").notes))
    assert mentions("".join(export_model(str(run), "timm", tmp_path / "out")))
    with pytest.warns(UserWarning, match="using the checkpoint of step 4"):
        pixmim.load_encoder(run)


def test_a_run_that_was_stopped_says_so_and_how_to_resume_it(two_runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "my run"
    shutil.copytree(two_runs[0], run)
    page = Page([run], DATA, "cpu")
    assert page.status(0)["unfinished"] == ""
    shutil.rmtree(run / "encoder")
    os.utime(run / "metrics.jsonl", (0, time.time() - 3 * 3600))
    assert page.status(0)["unfinished"].startswith("last logged 3 hours ago; ")
    assert f"`pixmim pretrain --resume '{run}'`" in page.status(0)["unfinished"]
    os.utime(run / "metrics.jsonl")
    assert "--resume" not in page.status(0)["unfinished"]  # it trains
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    assert "nothing logged yet" in page.status(0)["unfinished"] and page.status(0)["steps"] == []
    assert "neither a checkpoint nor" in page.reconstruct("d0", [True] + [False] * 15, [0])[0]["error"]


def test_images_that_have_moved_are_asked_for(
    tiny_run: Callable[..., PretrainConfig], tmp_path: Path, pictures: Path
) -> None:
    train(tiny_run(data=str(pictures), steps=1), tmp_path / "run")
    assert Page([tmp_path / "run"]).describe()["problem"] == ""
    pictures.rename(tmp_path / "elsewhere")
    page = Page([tmp_path / "run"])
    problem = page.describe()["problem"]
    assert f"the folder {pictures} does not exist" in problem and f"pixmim view {tmp_path}/run --data DATA" in problem
    assert page.metrics(0, "")["records"] and page.status(0)["steps"]
    warnings: list[str] = []
    write_report([tmp_path / "run"], tmp_path / "page.html", warn=warnings.append)
    assert "does not exist" in warnings[0] and f"pixmim report {tmp_path}/run --data DATA" in warnings[0]
    assert "does not exist" in (tmp_path / "page.html").read_text()


def test_a_folder_that_cannot_be_written_to_is_read(
    two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal of the system is simulated."""
    run, real = tmp_path / "run", os.open
    shutil.copytree(two_runs[0], run)

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(run)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    page = Page([run], DATA, "cpu")
    finished(page, 0)
    assert page.neighbors("d0", 3)[0]["images"] and not (run / "index.safetensors").exists()
    warnings: list[str] = []
    write_report([run], tmp_path / "page.html", DATA, warnings.append)
    assert "Permission denied" in warnings[0] and (tmp_path / "page.html").stat().st_size > 10_000
    with pytest.raises(UserError, match=r"report\.html cannot be written: Permission denied.*--out"):
        write_report([run], run / "report.html", DATA)
