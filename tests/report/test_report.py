"""The page of runs: its contents, its table, and its reconstructions."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pixmim
from helpers.cli import say
from helpers.evaluated import measured
from helpers.runs import train
from pixmim.build import build_model
from pixmim.config import PretrainConfig, TargetConfig
from pixmim.config_io import load_config
from pixmim.data import open_dataset
from pixmim.evaluation.results import save
from pixmim.evaluation.visualize import hatch
from pixmim.models.mae import MAE
from pixmim.report import results_table, write_report
from pixmim.report.neighbors import draw_neighbors
from pixmim.report.reconstruct import draw, radial_spectrum, reconstruct
from pixmim.targets import low_pass
from pixmim.transforms.crops import CenterCrop
from pixmim.utils.errors import UserError
from pixmim.weights.load import resolve_model

Make = Callable[..., PretrainConfig]
LABELLED = ("shapes:count=30,size=32", "shapes:count=20,size=32,seed=1")


@pytest.fixture(scope="module")
def evaluated(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two runs with results. Do not change them."""
    root = tmp_path_factory.mktemp("report")
    train(tiny_run(log_every=1), root / "one")
    bins = TargetConfig(kind="pixels", normalize_patches=False, distance="cross_entropy")
    train(tiny_run(log_every=1, seed=3, target=bins), root / "two")
    for name in ("knn", "linear"):
        save(measured(name, root / "one", *LABELLED), root / "one")
    save(measured("knn", root / "two", *LABELLED, untrained=True), root / "two")
    return [root / "one", root / "two"]


@pytest.fixture
def runs(evaluated: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in evaluated]


def test_page_is_complete_and_self_contained(runs: list[Path], tmp_path: Path) -> None:
    html = write_report(runs, tmp_path / "page.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', html) and "<script" not in html
    assert html.count("data:image/png;base64,") == 2 * 6 * 6 + 12  # runs, images, columns, and the first screen
    for text in (
        "linear probe",
        "k-NN (k = 20), mean of patch tokens",
        "95 % interval",
        "target.kind",
        "Training loss",
        "one normalizes",
        "two predicts the probabilities of color bins",
    ):
        assert text in html
    assert "two normalize" not in html  # its target is not normalized
    sheet = Image.open(next((runs[0] / "reconstructions").glob("step-*.png")))
    assert sheet.size == (6 * 132 - 4, 6 * 150 - 4 + 18)


def test_table_of_results(runs: list[Path]) -> None:
    for width, interval in ((200, True), (60, False)):
        table = results_table(runs, width)
        assert [str(column.header) for column in table.columns] == ["", "one", "two, untrained"]
        cells = [list(map(str, column.cells)) for column in table.columns]
        knn = [f"k-NN (k = {k}), {what}" for what in ("mean of patch tokens", "class token") for k in (1, 20)]
        knn = [name + more for i in (0, 2) for more in ("", ", balanced") for name in knn[i : i + 2]]
        assert cells[0] == ["majority (always the largest class)", *knn, "linear probe", "linear probe, balanced"]
        assert "-" not in cells[1] and [text == "-" for text in cells[2]] == [False] * 9 + [True] * 2
        top1 = [
            text for name, text in zip(cells[0], cells[1], strict=True) if not name.endswith(("balanced", "class)"))
        ]
        assert len(top1) == 5 and all((" to " in text) == interval for text in top1)  # if it fits


def test_curves_of_different_data_have_separate_figures(runs: list[Path], tmp_path: Path) -> None:
    for run, test, value in ((runs[0], "first", 10.0), (runs[1], "second", 20.0)):
        config = json.loads((run / "config.json").read_text())
        config["knn"] |= {"train": "labeled", "test": test}
        (run / "config.json").write_text(json.dumps(config))
        keys = {f"knn/k{k}/mean/{name}": value + k for k in (1, 7) for name in ("top1", "balanced")}
        lines = [json.dumps({"step": i, "epoch": i, **keys, "knn/majority": 72.4}) + "\n" for i in (1, 2)]
        (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "".join(lines))
    html = write_report(runs, tmp_path / "page.html").read_text()
    for caption in ("mean of patch tokens. Measured on", "all classes count equally. Measured on"):
        assert [html.count(f"{caption} {test} (train labeled).") for test in ("first", "second")] == [1, 1]
    assert all(html.count(f">one, {mark}<") == count for mark, count in (("k = 1", 2), ("k = 7", 2), ("majority", 1)))
    assert html.count("Training loss.") == 1  # one figure for the same data


def test_equal_untrained_encoders_share_a_column(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "three")
    three = [*runs, tmp_path / "three"]
    for name in ("one", "three"):
        save(measured("knn", runs[0], *LABELLED, untrained=True), tmp_path / name)
    headers = [str(column.header) for column in results_table(three, 200).columns]
    assert headers == ["", "untrained", "one", "two, untrained", "three"]


def test_reconstructions_use_predictions_only_where_hidden(runs: list[Path], tiny_run: Make) -> None:
    result = reconstruct(resolve_model(str(runs[0]), with_decoder=True), open_dataset(tiny_run().data))
    c = {name: pixels.astype(int) for name, pixels in result.columns.items()}
    blank = hatch(32, 32)
    hidden = (c["masked"] == blank).all(axis=-1)
    assert 0.7 < hidden.mean() < 0.8
    assert (c["masked"][~hidden] == c["image"][~hidden]).all()  # visible patches are not changed
    for name in ("pasted", "unaided"):
        assert (c[name][~hidden] == c["image"][~hidden]).all()  # and never come from the prediction
    assert (c["prediction"][hidden] == c["pasted"][hidden]).all()
    assert (c["prediction"] == blank)[~hidden].all()
    # Each hidden patch of "prediction" has the target's mean, up to rounding and clipping.
    patches = {n: c[n].reshape(6, 4, 8, 4, 8, 3).mean(axis=(2, 4, 5)) for n in ("prediction", "target", "unaided")}
    dark = hidden.reshape(6, 4, 8, 4, 8).all(axis=(2, 4))
    assert np.abs(patches["prediction"] - patches["target"])[dark].mean() < 16
    assert (
        np.abs(patches["prediction"] - patches["target"])[dark].mean()
        < np.abs(patches["unaided"] - patches["target"])[dark].mean()
    )


def draw_zeros(config: PretrainConfig) -> dict[str, np.ndarray]:
    """Draw a model that predicts zeros, so that everything else comes from the target."""
    model = build_model(config).eval()
    layer = model.decoder.predict if isinstance(model, MAE) else model.head[-1]  # type: ignore[index]
    torch.nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    crop, data = CenterCrop(config.image_size), open_dataset(config.data)
    return draw(model, config, torch.stack([crop.crop(data.image(i)) for i in range(6)])).columns


def test_larger_predicted_patches_are_drawn_in_hidden_pixels(tiny_run: Make) -> None:
    """Hide patches of 8 pixels, predict 16: means come from the larger patches; "unaided" has one per image."""
    model = replace(tiny_run().model, decoder_stride=2, predict_patch=16)
    c = draw_zeros(tiny_run(model=model, size="32x48", target=TargetConfig(kind="pixels")))
    mean, std = np.asarray([0.485, 0.456, 0.406]), np.asarray([0.229, 0.224, 0.225])
    hidden = (c["masked"] == hatch(32, 48)).all(axis=-1)
    for i in range(6):
        image = (c["image"][i] / 255 - mean) / std
        blocks = image.reshape(2, 16, 3, 16, 3).mean(axis=(1, 3, 4)).repeat(16, 0).repeat(16, 1)
        for name, value in (("pasted", blocks[hidden[i]]), ("unaided", image[~hidden[i]].mean())):
            drawn = (c[name][i][hidden[i]] / 255 - mean) / std
            assert np.abs(drawn - np.broadcast_to(np.asarray(value)[..., None], drawn.shape)).max() < 0.02
            assert (c[name][i][~hidden[i]] == c["image"][i][~hidden[i]]).all()


def test_window_means_are_added_per_pixel(tiny_run: Make) -> None:
    """A prediction of zeros shows the means of windows, and in "unaided" the mean over visible pixels."""
    target = TargetConfig(kind="pixels", normalize_patches=False, normalize_window=15)
    c = draw_zeros(tiny_run(target=target))
    hidden = (c["masked"] == hatch(32, 32)).all(axis=-1)
    for image, pasted, unaided, dark in zip(c["image"], c["pasted"], c["unaided"], hidden, strict=True):
        around = [np.s_[max(0, y - 7) : y + 8, max(0, x - 7) : x + 8] for y, x in np.ndindex(32, 32)]
        means = np.asarray([image[window].mean(axis=(0, 1)) for window in around]).reshape(32, 32, 3)
        assert np.abs(pasted - means)[dark].max() < 1.5
        visible = [image[w][~dark[w]].mean(axis=0) for w, d in zip(around, dark.flat, strict=True) if not d]
        assert np.abs(unaided[dark] - np.mean(visible, axis=0)).max() < 1.5


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_color_bins_are_drawn_as_the_expected_color(name: str, tiny_run: Make) -> None:
    """Equal scores give the middle of [0, 1]; the target has four values."""
    target = TargetConfig(kind="pixels", normalize_patches=False, distance="cross_entropy", bins=4)
    c = draw_zeros(tiny_run(target=target, model=replace(tiny_run().model, name=name)))
    hidden = (c["masked"] != c["image"]).any(axis=-1)
    assert (np.abs(c["prediction"][hidden] - 127.5) <= 1).all() and (c["unaided"] == c["pasted"]).all()
    assert set(np.unique(c["target"])) <= {32, 96, 159, 223} and len(np.unique(c["target"])) == 4
    assert (np.abs(c["target"].astype(int) - c["image"]) <= 33).all()


def test_radial_spectrum_of_one_wave() -> None:
    x = torch.arange(32)
    wave = torch.cos(2 * torch.pi * 5 / 32 * x).expand(2, 3, 32, 32)
    power = radial_spectrum(wave)
    assert len(power) == 17 and power.argmax() == 5
    assert power[np.arange(17) != 5].max() < 1e-9 < power[5]
    noise = radial_spectrum(torch.randn(50, 3, 32, 32))
    assert np.abs(noise - 1).max() < 0.1  # the power of white noise of variance one


@pytest.mark.parametrize("size", [(32, 72), (72, 32), (32, 32)])
def test_the_spectrum_of_a_target_ends_at_its_cut_off(size: tuple[int, int]) -> None:
    """The cut-off of a shape that is not square has the same cycles per pixel in both directions."""
    power = radial_spectrum(low_pass(torch.randn(8, 3, *size), "auto"))
    assert len(power) == 17 and power[:6].min() > 0.3 and power[8:].max() < 1e-9


@pytest.mark.parametrize("command", [True, False])
def test_unreadable_images_of_a_reconstruction_are_named(
    command: bool, runs: list[Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = pictures / "bad.png"
    bad.write_bytes(b"no")
    files = [bad, pictures / "cats" / "0.jpg"]
    if command:
        status, text = say(capsys, "reconstruct", runs[0], *files, "--out", tmp_path / "r.png")
        assert status == 0 and f"left out: {bad}: " in text
    else:
        with pytest.warns(UserWarning, match="left out: .*bad.png: "):
            pixmim.reconstruct(str(runs[0]), files)


def test_all_parts_of_the_page_draw_the_bands(runs: list[Path], tmp_path: Path) -> None:
    html = write_report(runs[:1], tmp_path / "page.html", neighbors=True, bands="2").read_text()
    urls = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    assert len(urls) > 150
    for image in (np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls):
        assert image.ndim == 2 or not np.ptp(image, axis=2).any()  # one channel, in gray


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        write_report([tmp_path], tmp_path / "page.html")


def test_a_run_whose_data_moved_still_has_a_page(tiny_run: Make, tmp_path: Path, pictures: Path) -> None:
    train(tiny_run(data=str(pictures)), tmp_path / "run")
    pictures.rename(tmp_path / "moved")
    assert "does not exist" in write_report([tmp_path / "run"], tmp_path / "p.html").read_text()


def test_neighbors_are_added_and_kept_beside_the_run(runs: list[Path], tmp_path: Path) -> None:
    assert "Pairs most alike" not in write_report(runs[:1], tmp_path / "page.html").read_text()
    html = write_report(runs[:1], tmp_path / "page.html", neighbors=True).read_text()
    assert html.count("data:image/jpeg;base64,") == 20 * 7 + 20 * 2 and "cosine 0." in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    unit = load_file(runs[0] / "index.safetensors")["unit"].double()
    cosines = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    typical = float(re.search(r"two random images have\s+(\d\.\d{4}) \(median\)", html)[1])  # type: ignore[index]
    assert cosines.quantile(0.3) < typical < cosines.quantile(0.7)  # of 20 of them with all


def test_two_random_images_are_never_the_same(runs: list[Path]) -> None:
    config = load_config(runs[0] / "config.json")[0]
    sheet = draw_neighbors(runs[0], config, open_dataset("shapes:count=3,size=32"))
    unit = load_file(runs[0] / "index.safetensors")["unit"].double()
    cosines = [float(unit[i] @ unit[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert sheet.typical == pytest.approx(sorted(cosines)[1], abs=1e-6) and sheet.images == 3


def test_neighbors_of_one_image_are_a_warning(tiny_run: Make, tmp_path: Path) -> None:
    train(tiny_run(), tmp_path / "run")
    warnings: list[str] = []
    write_report([tmp_path / "run"], tmp_path / "p.html", "shapes:count=1,size=32", warnings.append, neighbors=True)
    assert any("no neighbors" in line and "fewer than two" in line for line in warnings)
