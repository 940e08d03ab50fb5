"""Test dataset statistics against NumPy, their storage, and runs of all formats that use them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.cli import say
from helpers.runs import train, weights
from pixmim.build import image_spec, with_dataset_stats
from pixmim.config import PretrainConfig
from pixmim.config_io import from_json
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageSpec, Subset
from pixmim.data.statistics import (
    Stats,
    choose_image_spec,
    count_formats,
    load_statistics,
    measure,
    sample_indices,
    save_statistics,
)
from pixmim.evaluation.embed import embed
from pixmim.evaluation.visualize import to_pixels, to_rgb
from pixmim.report import write_report
from pixmim.report.attention import attention_sheet
from pixmim.training.distributed import SINGLE_PROCESS
from pixmim.training.metric_logger import start_summary
from pixmim.training.optim import Schedule
from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path
from pixmim.weights.load import resolve_model

Make = Callable[..., PretrainConfig]
RNG = np.random.default_rng(0)


def bands(folder: Path, kind: type, channels: int, count: int = 12) -> Path:
    """Write .npy files, or TIFFs for uint16, of several sizes."""
    folder.mkdir()
    for i in range(count):
        shape = (40 + i, 70 - i, channels)
        smooth = np.kron(RNG.random((2, 2, channels)), np.ones((40, 40, 1)))[: shape[0], : shape[1]]
        if kind is np.uint16:
            tifffile = pytest.importorskip("tifffile")
            path = folder / f"{i}.tif"
            tifffile.imwrite(path, (smooth * 10_000).astype(kind), photometric="minisblack", planarconfig="contig")
        else:
            np.save(folder / f"{i}.npy", (smooth * 3000 - 500).astype(kind))
    return folder


@pytest.mark.parametrize("spec", [ImageSpec(), ImageSpec(1), ImageSpec(3, "uint16"), ImageSpec(3, "float32")])
def test_mean_and_std_match_numpy(pictures: Path, spec: ImageSpec) -> None:
    (pictures / "dogs" / "3.jpg").write_bytes(b"")
    data = open_dataset(str(pictures), spec)
    one = {"uint8": 255, "uint16": 65535, "float32": 1}[spec.dtype]
    images = [data.image(i).numpy().astype(np.float64) / one for i in range(10) if i != 8]
    mean = np.mean([image.mean(axis=(1, 2)) for image in images], axis=0)
    std = np.sqrt(np.mean([((image - mean[:, None, None]) ** 2).mean(axis=(1, 2)) for image in images], axis=0))
    progress: list[int] = []
    for threads in (1, 5):
        found = measure(data, sample_indices(10, 0), threads=threads, progress=progress.append)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(found.std, std, rtol=1e-12)
        np.testing.assert_allclose(found.maximum, np.max([image.max(axis=(1, 2)) for image in images], axis=0))
        np.testing.assert_allclose(found.minimum, np.min([image.min(axis=(1, 2)) for image in images], axis=0))
        assert len(found.sizes) == 9 and found.sizes[:, 0].max() == 44
        assert found.bad == {"the file is empty": (1, data.path_of(8))}
    assert progress == [*range(1, 11)] * 2


def test_images_of_one_size_give_the_statistics_of_all_pixels(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    pixels = RNG.normal(1000, 300, (6, 90, 80, 4)).astype(np.float32)
    for i, image in enumerate(pixels):
        np.save(tmp_path / "d" / f"{i}.npy", image)
    found = measure(open_dataset(str(tmp_path / "d"), ImageSpec(4, "float32")), sample_indices(6, 0))
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.astype(np.float64).std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_large_image_is_measured_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    pixels = RNG.integers(0, 256, (1300, 1700, 1), np.uint8)
    np.save(tmp_path / "d" / "0.npy", pixels)
    found = measure(open_dataset(str(tmp_path / "d"), ImageSpec(1)), [0])
    np.testing.assert_allclose([found.mean[0], found.std[0]], [pixels.mean() / 255, pixels.std() / 255], rtol=1e-12)


def test_sampled_indices_are_distributed_evenly() -> None:
    assert sample_indices(5, 0) == sample_indices(5, 9) == [0, 1, 2, 3, 4]
    for total, count in ((10, 3), (10, 9), (1000, 333), (10**9, 1000)):
        chosen = sample_indices(total, count)
        assert chosen == sample_indices(total, count) and len(set(chosen)) == count
        assert all(k * total // count <= i < (k + 1) * total // count for k, i in enumerate(chosen))


def test_the_lossless_spec_of_most_images(pictures: Path, tmp_path: Path) -> None:
    Image.new("L", (30, 30)).save(pictures / "cats" / "grey.png")
    (pictures / "cats" / "bad.png").write_bytes(b"x")
    data = open_dataset(str(pictures))
    found = count_formats(data, sample_indices(len(data), 0))
    assert found == {(3, "uint8"): 10, (1, "uint8"): 1} and choose_image_spec(found) == ImageSpec()
    deep = open_dataset(str(bands(tmp_path / "deep", np.uint16, 13)))
    assert choose_image_spec(count_formats(deep, [0, 3])) == ImageSpec(13, "uint16")
    heights = open_dataset(str(bands(tmp_path / "heights", np.int16, 1)))
    assert choose_image_spec(count_formats(heights, [0, 3])) == ImageSpec(1, "float32")
    for spec in (f"{tmp_path}/deep+{tmp_path}/deep*2", f"shapes:count=1+{tmp_path}/deep"):
        mixed = open_dataset(spec)
        last = range(len(mixed) - 4, len(mixed))
        assert choose_image_spec(count_formats(mixed, list(last))) == ImageSpec(13, "uint16")
    assert choose_image_spec(count_formats(Subset(deep, [2, 1]), [0, 1])) == ImageSpec(13, "uint16")
    shapes = open_dataset("shapes:count=4", ImageSpec(5))
    assert choose_image_spec(count_formats(shapes, [0, 3])) == ImageSpec(5)


def test_saved_statistics_are_loaded(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Stats((0.5, 0.25), (1.0, 2.0), 7, 9)
    path = save_statistics("/some/data", ImageSpec(2), saved)
    others = (ImageSpec(2, stretch="1,99"), ImageSpec(2, tiff_pages="channels"), ImageSpec(2, max_no_data=0.5))
    assert len({str(spec) for spec in (ImageSpec(2), *others)}) == 4  # each has a file of its own
    assert load_statistics("/some/data", ImageSpec(2)) == saved and path.is_relative_to(cache_path("stats", "x").parent)
    assert (
        load_statistics("/some/data", ImageSpec(2, "uint16")) is None
        and load_statistics("/other", ImageSpec(2)) is None
    )
    for damage in (
        "",
        "{}",
        '{"image_spec": 3}',
        path.read_text().replace("0.25", '"x"'),
        path.read_text().replace("0.25", "0.25, 1"),
    ):
        path.write_text(damage)
        assert load_statistics("/some/data", ImageSpec(2)) is None
    make_cache(open_dataset(str(pictures)), tmp_path / "cache", (24, 24))
    assert save_statistics(str(tmp_path / "cache"), ImageSpec(), saved) == tmp_path / "cache" / "stats.json"
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert load_statistics(str(tmp_path / "moved"), ImageSpec(2)) is None  # its statistics have three channels
    assert len(open_dataset(str(tmp_path / "moved"))) == 10
    for home, expected in (("relative", Path.home() / ".cache"), ("/else", Path("/else"))):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert cache_path("stats", "x").parent == expected / "pixmim" / "stats"


def test_a_constant_channel_has_std_one(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "0.npy", np.dstack([np.full((9, 9), 7.0), np.eye(9)]))
    found = measure(open_dataset(str(tmp_path / "d"), ImageSpec(2, "float32")), [0])
    saved = found.stats(1)
    assert saved.std[0] == 1 and saved.std[1] == found.std[1] and saved.mean[0] == 7
    with pytest.raises(UserError, match="--std must be a number from 1e-12"):
        PretrainConfig(std=(1.0, 0.0, 1.0))
    for value in range(1, 255, 37):  # the mean of 20 times k / 255 is rounded
        for i in range(20):
            np.save(tmp_path / "d" / f"{i}.npy", np.full((3, 5, 1), value, np.uint8))
        assert measure(open_dataset(str(tmp_path / "d"), ImageSpec(1)), list(range(20))).stats(20).std == (1,)


@pytest.mark.parametrize(("kind", "channels", "how"), [(np.uint16, 13, "cache"), (np.int16, 2, "random-resized")])
def test_a_run_of_any_format_from_stats_to_figures(
    kind: type, channels: int, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_run: Make
) -> None:
    data = bands(tmp_path / "bands", kind, channels)
    dtype = "uint16" if kind is np.uint16 else "float32"
    status, text = say(capsys, "stats", data)
    flags = f"--channels {channels} --dtype {dtype}"
    assert status == 0 and "height 40 to 51" in text and text.endswith(f"train with --data {data} {flags}")
    spec = data
    if how == "cache":
        spec = tmp_path / "cache"
        status, text = say(capsys, "cache", data, spec, "--size", "16x32", *flags.split())
        assert status == 1 and "pass --raw" in text and not spec.exists()
        assert say(capsys, "cache", data, spec, "--size", "16x32", "--raw", *flags.split())[0] == 0
        status, text = say(capsys, "stats", spec, "--channels", 3)
        assert status == 1 and f"images of 13 channels in uint16, not 3 channels in uint16: pass {flags}" in text
        status, text = say(capsys, "stats", spec, "--stretch", "1,99")
        assert status == 1 and "not 13 channels in uint16, percentiles 1,99 stretched" in text
        assert say(capsys, "stats", spec)[0] == 0 and (spec / "stats.json").exists()
    run = tiny_run(data=str(spec), size="16x32", channels=channels, dtype=dtype, steps=3)
    run = replace(run, crop=replace(run.crop, kind="random-resized" if how == "random-resized" else "simple-resized"))
    run = replace(run, cache_images="gpu" if how == "cache" else "auto")
    unknown = start_summary(
        replace(run, data="/other"), 12, Schedule.of(run, 12), torch.device("cpu"), "fp32", SINGLE_PROCESS, 1
    )
    assert any("mean and std are not measured" in line for line in unknown)
    run, lines = with_dataset_stats(run)
    assert lines == ["mean and std: measured on 12 images by `pixmim stats`"]
    text = train(run, tmp_path / "run")
    assert "not measured" not in text
    saved = from_json((tmp_path / "run" / "config.json").read_text())
    found = measure(open_dataset(str(spec), image_spec(run)), sample_indices(12, 0))
    assert saved.mean == tuple(found.mean) and saved.std == tuple(found.std)
    again = tmp_path / "again"  # independent of threads and of the cache
    train(replace(run, threads=1, data=str(data), cache_images="none"), again)
    one, two = weights(tmp_path / "run"), weights(again)
    assert all(bool((one[name] == two[name]).all()) for name in one)

    if how == "cache":
        return
    model = resolve_model(str(tmp_path / "run"), with_decoder=True)
    files = open_dataset(str(data), image_spec(run))
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "cannot be read" not in page and page.count("data:image/png") >= 6
    columns, names, bad = attention_sheet(model, files, 2)
    assert (
        not bad
        and names == [Path(files.path_of(i)).name for i in range(2)]
        and columns["image"].shape == (2, 16, 32, 3)
    )
    embed(resolve_model(str(tmp_path / "run")), files, tmp_path / "f.npy", device="cpu")
    rows = np.load(tmp_path / "f.npy")
    assert rows.shape == (12, 64) and np.isfinite(rows).all()


def test_pretrain_uses_the_measured_statistics(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures.parent)
    (pictures / "cats" / "0.jpg").write_bytes(b"<html>")
    status, text = say(capsys, "stats", "pictures", "--images", 5)
    assert status == 0 and "10 images; of 9 that could be read: 9 of 3 channels in uint8" in text
    assert "1 cannot be read: 1: not a" in text and "warning" not in text
    config = PretrainConfig(data=str(pictures), std=(0.1, 0.2, 0.3))
    saved, (filled, lines) = load_statistics(str(pictures), ImageSpec()), with_dataset_stats(config)
    assert lines == ["mean and std: measured on 4 of 10 images by `pixmim stats`"]
    assert saved is not None and filled == replace(config, mean=saved.mean)
    config = PretrainConfig(data=str(pictures), channels=1)
    assert with_dataset_stats(config) == (config, [])  # another format has no statistics
    for name in ("1", "2"):
        (pictures / "cats" / f"{name}.jpg").write_bytes(b"")
    assert "warning: training ends if more than 25% cannot be read" in say(capsys, "stats", "pictures")[1]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_CACHE_HOME", str(pictures / "cats" / "0.jpg"))
        status, text = say(capsys, "stats", "pictures")
    assert status == 1 and "Not a directory" in text and "measured" not in text  # checked before measuring
    for path in pictures.rglob("*.jpg"):
        path.write_bytes(b"<html>")
    status, text = say(capsys, "stats", "pictures")
    assert status == 1 and "10: not a" in text and "no image of" in text


def test_figures_use_the_range_of_image_and_target() -> None:
    run = PretrainConfig(channels=13, dtype="float32", bands="5,3,2")
    image = torch.linspace(-50, 950, 13 * 2 * 101).reshape(2, 13, 101, 1)
    shown = to_pixels({"image": image, "other": image + 1000, "target": image * 2}, run)
    assert shown["image"].shape == (2, 101, 1, 3)
    for b in range(2):
        for k, band in enumerate((4, 2, 1)):
            values = torch.cat([image, 2 * image], dim=2)[b, band, :, 0].numpy()
            low, high = np.percentile(values, (1, 99))
            expected = np.clip((values - low) / (high - low), 0, 1) * 255
            assert abs(shown["image"][b, :, 0, k] - expected[:101]).max() <= 0.51
            assert abs(shown["target"][b, :, 0, k] - expected[101:]).max() <= 0.51
    assert (shown["other"] == 255).all()
    flat = to_pixels({"image": torch.full((1, 2, 4, 4), 7.0)}, PretrainConfig(channels=2, dtype="uint16"))["image"]
    assert flat.shape == (1, 4, 4, 1) and (flat == 128).all()
    three = torch.stack([torch.full((10, 10), v) for v in (0.0, 1.0, 2.0)])[None] * 100
    together = to_pixels({"image": three}, PretrainConfig(channels=3, dtype="float32", std=(1.0, 1.0, 1.0)))["image"]
    assert together[0, 0, 0].tolist() == [0, 128, 255]
    eight = to_pixels({"image": torch.full((1, 3, 2, 2), 0.5)}, PretrainConfig())["image"]
    assert (eight == 128).all()
    ramp = torch.linspace(0, 1, 101).reshape(1, 1, 101, 1)
    for channels, pixels, most, span in (
        (1, "uint8", 1, 255),  # unchanged
        (1, "uint8", 0.5, 128),
        (1, "uint8", 16 / 255, 255),  # 12 bits in 16, read as 8
        (1, "uint16", 4095 / 65535, 255),
        (6, "uint8", 0.5, 255),  # six bands have no fixed range
        (1, "float32", 5000, 255),
    ):
        run = PretrainConfig(channels=channels, dtype=pixels)  # type: ignore[arg-type]
        image = (most * ramp).expand(1, channels, 101, 1)
        assert to_pixels({"image": image}, run)["image"].max() == span
        scale = {"uint8": 255, "uint16": 65535, "float32": 1}[pixels]
        stored = (image[0] * scale).round().to(ImageSpec(channels, pixels).torch_dtype)  # type: ignore[arg-type]
        assert to_rgb(stored, run).shape == (101, 1, 3) and abs(int(to_rgb(stored, run).max()) - span) <= 1
    for bands in ("4,5", "0", "1,2,14", "a,b,c", "1,2,-3"):
        with pytest.raises(UserError, match="--bands"):
            PretrainConfig(channels=13, bands=bands)
