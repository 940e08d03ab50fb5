"""k-NN, the linear probe and their numbers against slow forms and closed ones."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pixmim.config import Run
from pixmim.data import open_data
from pixmim.engine.device import autocast
from pixmim.errors import UserError
from pixmim.evaluate import EVALUATIONS, evaluate, knn_watch, side_by_side
from pixmim.evaluate.encoder import in_training, of_model
from pixmim.evaluate.features import Frozen, freeze
from pixmim.evaluate.knn import classify, knn
from pixmim.evaluate.linear import RATES, choose, fit, graded, standardise
from pixmim.evaluate.results import Result, save
from pixmim.metrics import wilson_interval
from pixmim.parts import build_model
from pixmim.protocols import PROTOCOLS, All
from pixmim.runfile import to_json
from pixmim.transforms import evaluation_crop
from pixmim.weights.own import save_encoder

Make = Callable[..., Run]
TRAIN, TEST = "shapes:count=30,size=32", "shapes:count=20,size=32,seed=1"


def frozen(n: int, classes: int = 3, apart: float = 0.0, seed: int = 0, names: list[str] | None = None) -> Frozen:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.eye(8)[:classes] * apart
    mean = torch.randn(n, 8, generator=generator) + centres[labels]
    return Frozen(mean[:, None].repeat(1, 4, 1), mean, labels, names or [f"class {i}" for i in range(classes)])


@pytest.mark.parametrize("k", [1, 5, 20, 100])
def test_knn_against_a_loop(k: int) -> None:
    train, test = frozen(60, apart=1), frozen(40, apart=1, seed=1)
    answers = classify(train.mean, train.labels, test.mean, 3, k=k, rows=7, block=16)
    for i in range(40):
        similar = [float(F.cosine_similarity(test.mean[i], voter, dim=0)) for voter in train.mean]
        first = sorted(range(60), key=lambda j: -similar[j])[:k]
        votes = [sum(math.exp(similar[j] / 0.07) for j in first if train.labels[j] == c) for c in range(3)]
        assert int(answers[i]) == votes.index(max(votes))


def test_knn_of_separate_classes_is_perfect_and_of_noise_is_chance() -> None:
    apart = dict(knn(frozen(90, apart=30), frozen(60, apart=30, seed=1)))
    assert apart["top1/mean"] == apart["top1/cls"] == 100
    noise = dict(knn(frozen(900), frozen(600, seed=1)))
    assert noise["top1/mean/low"] < 100 / 3 < noise["top1/mean/high"]


def test_probe_follows_autograd() -> None:
    """The written-out gradient and momentum against torch.optim.SGD on cross-entropy, for every rate of the sweep."""
    data = frozen(50, apart=1)
    weights = fit(data.mean, data.labels, 3, RATES[6:9], epochs=3, batch=10, seed=4)
    from pixmim import rng

    order = torch.cat([torch.from_numpy(rng.permutation(4, 1 + e, 50)) for e in range(3)])
    for row, rate in enumerate(RATES[6:9]):
        layer = torch.nn.Linear(8, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
        for step in range(15):
            optimizer.param_groups[0]["lr"] = rate * 10 / 256 * 0.5 * (1 + math.cos(math.pi * step / 15))
            optimizer.zero_grad()
            rows = order[step * 10 : step * 10 + 10]
            F.cross_entropy(layer(data.mean[rows]), data.labels[rows]).backward()
            optimizer.step()
        torch.testing.assert_close(weights[row], torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach())


def linear(train: Frozen, test: Frozen, epochs: int) -> dict[str, float]:
    return dict(graded(choose(train, epochs=epochs), test, test.labels))


def test_probe_separates_what_a_line_separates() -> None:
    found = linear(frozen(300, apart=12), frozen(90, apart=12, seed=1), epochs=20)
    assert found["top1"] == 100 and found["held_out"] == 100
    assert found["setting/rate"] in RATES and found["setting/blocks"] in (1, 4)


def test_probe_does_not_look_at_the_test_set_to_choose() -> None:
    train = frozen(300, apart=2)
    chosen = [
        {
            k: v
            for k, v in linear(train, frozen(50, apart=apart, seed=9), epochs=5).items()
            if k.startswith(("setting", "held"))
        }
        for apart in (0.0, 30.0)
    ]
    assert chosen[0] == chosen[1]


def test_standardising_uses_the_train_sets_statistics() -> None:
    a, b = torch.randn(50, 3) * 7 + 2, torch.randn(20, 3)
    x, y = standardise(a, b)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y, (b - a.mean(0)) / a.std(0), atol=1e-5, rtol=0)


def test_interval_is_wilsons() -> None:
    """Published example: 95 % of 81/263 is 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 29) == pytest.approx((0.0, 0.1170), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_classes_are_matched_by_name() -> None:
    train = frozen(60, apart=30, names=["a", "b", "c"])
    test = frozen(30, classes=2, apart=30, seed=1, names=["b", "c"])  # its class 0 looks like train's class 0, "a"
    assert dict(knn(train, test))["top1/mean"] == 0
    with pytest.raises(UserError, match="a class 'bb' that the train data lack; did you mean 'b'"):
        dict(knn(train, frozen(30, classes=2, names=["bb", "c"])))


def measured(name: str, folder: Path, train: str, test: str, **options: object) -> Result:
    """One evaluation of the encoder in a folder, on the CPU."""
    settings = PROTOCOLS[name].settings(train, test)
    (result,) = evaluate(str(folder), [(name, settings)], folder, device="cpu", **options)  # type: ignore[arg-type]
    return result


@pytest.fixture
def product(tiny_run: Make, tmp_path: Path) -> Path:
    """A run's folder with an encoder that was not trained at all, but says so in no way."""
    run = tiny_run(seed=5)
    (tmp_path / "config.json").write_text(to_json(run))
    save_encoder(build_model(run).encoder, tmp_path / "encoder", run, step=7)
    return tmp_path


def test_features_are_those_of_the_bare_encoder_whatever_the_batch(product: Path) -> None:
    encoder = of_model(str(product), device="cpu", precision="fp32")
    data = open_data(TEST)
    one, two = freeze(encoder, data, batch=3), freeze(encoder, data, batch=20)
    torch.testing.assert_close(one.vector, two.vector, atol=1e-5, rtol=0)
    with torch.no_grad(), autocast(encoder.device, "fp32"):
        image = evaluation_crop(encoder.size).crop(data.image(7))[None].float() / 255
        image = (image - encoder.mean.view(1, 3, 1, 1)) / encoder.std.view(1, 3, 1, 1)
        tokens = encoder.module.forward_features(image)[0]
    torch.testing.assert_close(two.vector[7, -1], tokens[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(two.mean[7], tokens[1:].mean(dim=0), atol=1e-5, rtol=0)
    low = freeze(of_model(str(product), device="cpu", precision="bf16"), data)
    assert F.cosine_similarity(low.mean, one.mean).min() > 0.999


def test_evaluation_is_repeatable_and_kept(product: Path) -> None:
    results = [measured(name, product, TRAIN, TEST) for name in ("knn", "linear", "knn")]
    assert results[0].values == results[2].values and results[0].step == 7
    assert measured("knn", product, TRAIN, TEST, untrained=True).values == results[0].values
    path = save(results[0], product)
    assert save(results[2], product) == path and path.parent.name == "evaluations"


def test_what_cannot_be_evaluated_is_named(product: Path, tmp_path: Path, tiny_run: Make, pictures: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        measured("knn", tmp_path / "nowhere", TRAIN, TEST)
    with pytest.raises(UserError, match="did you mean 'linear'"):
        list(evaluate(str(product), [("liner", None)], product))
    with pytest.raises(UserError, match="has no labels"):
        measured("knn", product, str(pictures / "cats"), TEST)
    with pytest.raises(UserError, match=r"--knn\.train and --knn\.test"):
        knn_watch(tiny_run(knn=type(tiny_run().knn)(every=1.0)))
    (product / "encoder/model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        of_model(str(product))
    (product / "encoder/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither a checkpoint nor encoder/model\.safetensors"):
        of_model(str(product))


def test_looking_at_an_encoder_in_training_leaves_it_in_training(tiny_run: Make) -> None:
    module = build_model(tiny_run()).encoder.train()
    freeze(in_training(tiny_run(), module, torch.device("cpu"), "fp32"), open_data(TEST))
    assert module.training


def test_all_stands_for_what_the_data_allow(product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call, several results; on drawn data shape is set against texture by itself."""
    assert [name for name, _ in All("/a", "/b").parts()] == ["knn", "linear", "robustness"]
    more = All("/a", "/b", stimuli="/c", finetune=True, pairs="/ade", coco="/coco").parts()
    assert [name for name, _ in more][3:] == ["shape-bias", "finetune", "segmentation", "detection"]
    assert all(name in PROTOCOLS and isinstance(s, PROTOCOLS[name].settings) for name, s in more)
    drawn = All(TRAIN, TEST, severities=(1,))
    probes = []
    monkeypatch.setattr("pixmim.evaluate.linear.choose", lambda *a, **b: (probes.append(1), choose(*a, **b))[1])
    results = list(evaluate(str(product), drawn.parts(), product, device="cpu"))
    assert len(probes) == 2  # of clean pictures, for linear and robustness; and of those for shape bias
    assert [result.evaluation for result in results] == ["knn", "linear", "robustness", "shape-bias"]
    assert results[3].settings["data"] == f"{TEST},texture=conflict"
    assert results[0].values == measured("knn", product, TRAIN, TEST).values


def test_several_encoders_side_by_side(
    product: Path, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is measured as by itself; what two runs of the same beginning were before training, once."""
    folders = {str(tmp_path / name): tmp_path / name for name in ("a", "b")}
    for folder in folders.values():
        shutil.copytree(product, folder)
    calls = []
    monkeypatch.setitem(EVALUATIONS, "knn", lambda bench, _: (calls.append(bench.which), iter([("top1/cls", 1.0)]))[1])
    ways = [("knn", PROTOCOLS["knn"].settings(TRAIN, TEST))]
    found = list(side_by_side(folders, ways, untrained=True, device="cpu"))
    assert [(folder.name, Path(r.model).name, r.encoder) for r, folder in found] == [
        ("a", "a", "untrained"), ("a", "a", "trained"), ("b", "b", "untrained"), ("b", "b", "trained")
    ]  # fmt: skip
    assert calls == ["untrained", "trained", "trained"]
    (tmp_path / "b" / "config.json").write_text(to_json(tiny_run(seed=6)))
    assert len(list(side_by_side(folders, ways, untrained=True, device="cpu"))) == 4
    assert calls[3:] == ["untrained", "trained"] * 2
    with pytest.raises(UserError, match="there is no"):
        list(side_by_side({**folders, "/no/run": tmp_path}, ways, device="cpu"))
    assert len(calls) == 7  # it was said before anything was measured


def test_a_result_says_what_it_takes_to_repeat_it(product: Path) -> None:
    result = json.loads(save(measured("knn", product, TRAIN, TEST, precision="fp32"), product).read_text())
    assert result["settings"] == {"train": TRAIN, "test": TEST, "k": 20} and result["step"] == 7
    assert result["config"] == json.loads((product / "config.json").read_text())
    assert result["device"] == "cpu" and result["precision"] == "fp32"
    assert {"pixmim", "torch", "timm", "python"} <= set(result["versions"])


def test_a_few_unreadable_images_are_left_out_and_too_many_end_it(product: Path, tmp_path: Path) -> None:
    """A share counts and not a number: 60 of 300 are few, and 80 of 200 are not."""
    for readable, name in ((240, "few"), (120, "many")):
        for i in range(readable + (60 if name == "few" else 80)):
            path = tmp_path / name / str(i % 2) / f"{i * 7919 % 1000:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < readable:
                Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(path)
            else:
                path.write_bytes(b"no picture")
    settings = PROTOCOLS["knn"].settings(str(tmp_path / "few"), str(tmp_path / "few"))
    (result,) = evaluate(str(product), [("knn", settings)], product, device="cpu")
    assert result.values["top1/mean"] > 0
    assert len((product / "evaluations-skipped.csv").read_text().splitlines()) == 61
    with pytest.raises(UserError, match="the share of 25% that an evaluation may leave out: mend or remove them") as e:
        measured("knn", product, TRAIN, str(tmp_path / "many"))
    assert "--max-bad" not in str(e.value) and "All are listed in" in str(e.value)
