"""Test robustness and shape bias: published normalization, layouts of the public datasets, and trained encoders."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pixmim import api
from pixmim.build import build_encoder
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.synthetic import SyntheticShapes
from pixmim.evaluation import classifiers as imagenet
from pixmim.evaluation import knn, robustness, shape_bias
from pixmim.evaluation import linear_probe as linear
from pixmim.evaluation.context import EvalContext, extract_features
from pixmim.evaluation.evaluate import check
from pixmim.evaluation.frozen_encoder import load_frozen_encoder, wrap_live_encoder
from pixmim.evaluation.linear_probe import fit_sweep
from pixmim.evaluation.robustness import ALEXNET, corruption_errors, count
from pixmim.evaluation.settings import (
    EvaluateAllSettings,
    KnnSettings,
    LinearSettings,
    RobustnessSettings,
    ShapeBiasSettings,
)
from pixmim.evaluation.shape_bias import shape_decisions
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.errors import UserError
from pixmim.weights.load import import_weights, resolve_model
from pixmim.weights.save import save_tensors

Make = Callable[..., PretrainConfig]
TRAIN, TEST = "shapes:count=400,size=32", "shapes:count=150,size=32,seed=1"


def context_of(config: PretrainConfig, folder: Path, module: nn.Module | None = None) -> EvalContext:
    module = (module or build_encoder(config)).eval()
    return EvalContext(wrap_live_encoder(config, module, torch.device("cpu"), "fp32"), folder)


def classifier(config: PretrainConfig, classes: int) -> PretrainConfig:
    return replace(config, model=replace(config.model, options={**config.model.options, "num_classes": classes}))


class AlwaysSeven(nn.Module):
    """A classifier of 1000 classes that always predicts class 7; the runner-up is four times the mean red value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red = (x[:, 0].mean(dim=(1, 2)) * 0.229 + 0.485) * 255 * 4  # undoes the normalization
        scores = -(torch.arange(1000) - red[:, None]).abs()
        scores[:, 7] = 1.0
        return scores


def write(path: Path, red: int, size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (red, 0, 0)).save(path)


def test_alexnets_own_errors_give_a_hundred() -> None:
    spread = (-0.02, -0.01, 0.0, 0.01, 0.02)
    ces, mce = corruption_errors({name: [mean + s for s in spread] for name, mean in ALEXNET.items()})
    assert mce == pytest.approx(100.0, abs=1e-9) and all(ce == pytest.approx(100.0) for ce in ces.values())
    halved = {name: [mean / 2] * 5 for name, mean in reversed(ALEXNET.items())}  # by name, in any order
    assert corruption_errors(halved)[1] == pytest.approx(50.0)
    part = corruption_errors({"snow": [0.9] * 5})
    assert part[1] is None and part[0]["snow"] == pytest.approx(100 * 0.9 / 0.866816)
    with pytest.raises(ValueError, match="five severities"):
        corruption_errors({"snow": [0.9] * 4})


def test_the_tables_of_imagenet() -> None:
    assert sum(map(len, imagenet.CATEGORIES.values())) == 207 and len(imagenet.CATEGORIES) == 16
    assert len({i for each in imagenet.CATEGORIES.values() for i in each}) == 207
    assert len(imagenet.CATEGORIES["bird"]) == 49 and len(imagenet.CATEGORIES["dog"]) == 109
    wnids = imagenet.wnids()
    assert len(wnids) == 1000 and wnids == sorted(wnids) and wnids[0] == "n01440764"
    a, r = imagenet.subset_wnids("a"), imagenet.subset_wnids("r")
    assert len(a) == len(r) == 200 and len(set(a) & set(r)) == 86 and a == sorted(a) and r == sorted(r)


class RunnerUp(nn.Module):
    """A classifier of ImageNet that predicts class `first`; the runner-up is encoded in the image's red and green."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.head, self.first = nn.Linear(1, 1000), first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, green = (x[:, 0].mean(dim=(1, 2)) * 0.229 + 0.485) * 255, (x[:, 1].mean(dim=(1, 2)) * 0.224 + 0.456) * 255
        scores = torch.zeros(len(x), 1000)
        scores[torch.arange(len(x)), (red.round() * 4 + (green / 60).round()).long()] = 1.0
        scores[:, self.first] = 2.0
        return scores


@pytest.mark.parametrize("name", ["a", "r"])
def test_outputs_of_other_classes_are_removed_before_the_argmax(name: str, tiny_run: Make, tmp_path: Path) -> None:
    """Predict a class outside the 200 first, and the correct class second for three quarters of the images."""
    part, every = imagenet.subset_wnids(name), imagenet.wnids()
    first = next(i for i, wnid in enumerate(every) if wnid not in part)
    for i, wnid in enumerate(part):
        encoded = every.index(part[i - 1] if i % 4 == 0 else wnid)
        path = tmp_path / name / wnid / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (encoded // 4, encoded % 4 * 60, 0)).save(path)
    context = context_of(tiny_run(), tmp_path, RunnerUp(first))
    settings = RobustnessSettings(**{f"imagenet_{name}": str(tmp_path / name)})
    found = dict(robustness.evaluate_robustness(context, settings))
    assert found[f"imagenet_{name}/top1"] == 75
    (tmp_path / name / part[3] / "1.png").unlink()
    context = context_of(tiny_run(), tmp_path, RunnerUp(first))
    with pytest.raises(UserError, match=f"lacks 1 of the 200 class folders of ImageNet-{name.upper()}"):
        dict(robustness.evaluate_robustness(context, settings))


def test_imagenet_c_trees(tiny_run: Make, tmp_path: Path) -> None:
    context, every = context_of(tiny_run(), tmp_path, AlwaysSeven()), imagenet.wnids()
    for severity in (1, 2, 3, 4, 5):
        write(tmp_path / f"c/snow/{severity}/{every[7]}/1.png", 10)
        write(tmp_path / f"c/snow/{severity}/{every[8]}/1.png", 20)
    with pytest.raises(
        UserError, match=r"lacks 70 of 75 parts of ImageNet-C: gaussian_noise/1, .* select a part, which has no mCE"
    ):
        dict(robustness.evaluate_robustness(context, RobustnessSettings(imagenet_c=str(tmp_path / "c"))))
    some = dict(
        robustness.evaluate_robustness(
            context, RobustnessSettings(imagenet_c=str(tmp_path / "c"), corruptions=("snow",))
        )
    )
    assert some["imagenet_c/error"] == some["imagenet_c/severity/snow/4"] == 50  # all predictions are class 7
    assert not any("ce" in key.split("/") or "mce" in key for key in some)  # two classes are not a thousand
    write(tmp_path / "c/snow/5/unknown/1.png", 10)
    with pytest.raises(UserError, match="a class 'unknown', which is not one of the 1000"):
        dict(
            robustness.evaluate_robustness(
                context, RobustnessSettings(imagenet_c=str(tmp_path / "c"), corruptions=("snow",))
            )
        )


def test_complete_imagenet_c_of_one_corruption_has_a_ce_and_no_mce(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "wnids", lambda: [f"n{i}" for i in range(4)])
    for severity in (1, 2, 3, 4, 5):
        for i in range(4):
            write(tmp_path / f"c/fog/{severity}/n{i}/1.png", 0)
    found = dict(
        robustness.evaluate_robustness(
            context_of(tiny_run(), tmp_path, AlwaysSeven()),
            RobustnessSettings(imagenet_c=str(tmp_path / "c"), corruptions=("fog",)),
        )
    )
    assert "imagenet_c/mce" not in found
    assert found["imagenet_c/ce/fog"] == pytest.approx(100 / 0.819324)


@pytest.mark.parametrize("name", ["imagenet_c", "imagenet_a", "imagenet_r", "imagenet_sketch"])
def test_public_sets_need_a_classifier_of_imagenet(name: str, tiny_run: Make, tmp_path: Path) -> None:
    for run in (tiny_run(), classifier(tiny_run(), 10)):
        with pytest.raises(UserError, match=r"1000 classes, and this encoder has (none|one of 10)"):
            dict(robustness.evaluate_robustness(context_of(run, tmp_path), RobustnessSettings(**{name: str(tmp_path)})))


TINY_CONVMAE = PretrainConfig(
    size="32",
    model=ArchitectureConfig(
        "convmae",
        "convmae_tiny",
        options={"embed_dim": [24, 48, 64], "depth": [1, 1, 1], "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 10},
    ),
)


@pytest.fixture(scope="module")
def texture_classifier() -> nn.Module:
    """A tiny classifier of textures, trained in seconds; convolutions learn them faster than a ViT."""
    torch.manual_seed(0)
    data, crop = SyntheticShapes(count=2000, size=32), evaluation_crop(32)
    images = torch.stack([crop.crop(data.image(i)) for i in range(len(data))]).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in TINY_CONVMAE.normalization)
    images, labels = (images - mean) / std, torch.from_numpy(data.texture_labels)
    module = build_encoder(TINY_CONVMAE)
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    for step in range(300):
        rows = torch.from_numpy(np.random.default_rng(step).integers(0, len(data), 64))
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 300)
        F.cross_entropy(module(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval()


def test_a_trained_encoder_beats_an_untrained_one(texture_classifier: nn.Module, tmp_path: Path) -> None:
    data = [f"shapes:count={count},size=32,seed={seed},texture=match" for count, seed in ((600, 2), (500, 3))]
    found = []
    for module in (texture_classifier, None):
        context = context_of(TINY_CONVMAE, tmp_path, module)
        found.append(
            dict(knn.evaluate_knn(context, KnnSettings(*data)))
            | dict(linear.evaluate_linear(context, LinearSettings(*data, epochs=20)))
        )
    for name in ("k20/mean/top1", "top1"):  # their intervals do not touch
        assert found[0][f"{name}/low"] > found[1][f"{name}/high"]


def test_more_corruption_costs_more(texture_classifier: nn.Module, tmp_path: Path) -> None:
    """Classify by texture, which noise and blur destroy, with the encoder's head and with a probe."""
    context = context_of(TINY_CONVMAE, tmp_path, texture_classifier)
    data = "shapes:count=200,size=32,seed=1,texture=match"  # shape and texture have the same number
    some = ("gaussian_noise", "defocus_blur", "contrast")
    settings = RobustnessSettings(test=data, corruptions=some)
    found = dict(robustness.evaluate_robustness(context, settings))
    assert found["in_memory/head/clean"] < 75
    for name in some:
        one, five = (found[f"in_memory/head/severity/{name}/{s}"] for s in (1, 5))
        assert found["in_memory/head/clean"] - 3 <= one < five
        mean = sum(found[f"in_memory/head/severity/{name}/{s}"] for s in (1, 2, 3, 4, 5)) / 5
        assert found[f"in_memory/head/corruption/{name}"] == pytest.approx(mean)
    error = sum(found[f"in_memory/head/corruption/{name}"] for name in some) / 3
    assert found["in_memory/head/error"] == pytest.approx(error)
    assert found["in_memory/head/lost"] == pytest.approx(error - found["in_memory/head/clean"])
    assert found["in_memory/head/times"] == pytest.approx(error / found["in_memory/head/clean"])

    train = "shapes:count=300,size=32,texture=match"
    both = replace(settings, train=train, severities=(1, 5), epochs=20)
    found = dict(robustness.evaluate_robustness(context, both))
    assert found["in_memory/probe/clean"] < 80 and found["in_memory/probe/lost"] > 3
    assert "in_memory/probe/severity/contrast/3" not in found
    assert dict(robustness.evaluate_robustness(context, both)) == found
    other = dict(robustness.evaluate_robustness(context, replace(both, corruptions=("contrast",))))
    assert other["in_memory/probe/corruption/contrast"] == found["in_memory/probe/corruption/contrast"]


def test_an_interrupted_evaluation_resumes(
    texture_classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(TINY_CONVMAE, tmp_path, texture_classifier)
    settings = RobustnessSettings(test="shapes:count=300,size=32", corruptions=("contrast", "fog"), severities=(2,))
    complete = dict(robustness.evaluate_robustness(context, settings))
    seen = []

    def failing(*args: object) -> Iterator[object]:
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return made(*args)  # type: ignore[arg-type]

    made = count.corrupted
    monkeypatch.setattr(count, "corrupted", failing)
    with pytest.raises(KeyboardInterrupt):
        dict(robustness.evaluate_robustness(context, settings))
    assert len(list(tmp_path.rglob("counts.json"))) == 1
    monkeypatch.setattr(count, "corrupted", lambda images, *rest: (seen.append(len(images)), made(images, *rest))[1])
    assert dict(robustness.evaluate_robustness(context, settings)) == complete
    assert seen[1:] == [44] and not list(tmp_path.rglob("counts.json"))


def test_unsuitable_settings_are_refused(tiny_run: Make, tmp_path: Path) -> None:
    context = context_of(tiny_run(), tmp_path)
    for settings, message in (
        (RobustnessSettings(), "no data given"),
        (RobustnessSettings(test=TEST), "has no classifier: pass --train"),
        (RobustnessSettings(test=TEST, classifier="probe"), "--train"),
        (RobustnessSettings(test=TEST, train=TRAIN, corruptions=("frosst",)), "did you mean 'frost'"),
        (RobustnessSettings(test=TEST, train=TRAIN, severities=()), "--severities takes some of"),
    ):
        with pytest.raises(UserError, match=message):
            dict(robustness.evaluate_robustness(context, settings))


@pytest.mark.parametrize(("channels", "dtype"), [(2, "uint8"), (3, "uint16"), (1, "float32")])
def test_all_leaves_corruptions_out_where_they_mean_nothing(
    channels: int, dtype: str, tiny_run: Make, tmp_path: Path
) -> None:
    run = tiny_run(channels=channels, dtype=dtype, mean=(0.5,) * channels, std=(0.2,) * channels)
    for label in "ab":
        for i in range(2):
            (tmp_path / label).mkdir(exist_ok=True)
            np.save(tmp_path / label / f"{i}.npy", np.full((32, 32, channels), i, dtype))
    context, data = context_of(run, tmp_path), str(tmp_path)
    with pytest.raises(UserError, match=rf"reads {channels} of {dtype}: leave them out of .* --no-corruptions"):
        check(context, EvaluateAllSettings(data, data, attentive=False).parts())
    parts = EvaluateAllSettings(data, data, attentive=False, corruptions=False).parts()
    check(context, parts)
    assert [name for name, _ in parts] == ["knn", "linear"]


def test_a_classifiers_own_names_decide(tiny_run: Make, tmp_path: Path) -> None:
    """Match outputs by name in any order, also after an import; refuse a folder that is not a class."""
    run, names = classifier(tiny_run(), 3), ["c", "a", "b"]
    module = build_encoder(run)
    module.head.weight.data.normal_(std=1.0)  # type: ignore[union-attr, operator]
    found = []
    draw = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "test" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8) // (1 + i % 4)).save(path)
    settings = RobustnessSettings(test=str(tmp_path / "test"), corruptions=("contrast",), severities=(1,))

    def measured(file: Path, test: str = settings.test) -> dict[str, float]:
        encoder = load_frozen_encoder(str(file), device="cpu", precision="fp32")
        return dict(robustness.evaluate_robustness(EvalContext(encoder, tmp_path), replace(settings, test=test)))

    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        state = module.state_dict() | {f"head.{k}": v[order] for k, v in module.head.state_dict().items()}  # type: ignore[union-attr]
        file = tmp_path / f"{order}.safetensors"
        save_tensors(state, file, run, 3, 3, {"classes": json.dumps([names[i] for i in order])})
        found.append(measured(file))
    import_weights(resolve_model(str(file)), tmp_path / "imported")
    found.append(measured(tmp_path / "imported"))
    more = shutil.copytree(tmp_path / "test", tmp_path / "more")
    (more / "bee").mkdir()
    (more / "bee" / "broken.png").write_bytes(b"")
    make_cache(open_dataset(more), tmp_path / "cache", (32, 32), kind="raw")
    assert open_dataset(tmp_path / "cache").classes == ["a", "b", "bee", "c"]  # one of them without an image
    found.append(measured(file, str(tmp_path / "cache")))
    assert all(other == pytest.approx(found[0]) for other in found)
    answers = module(load_frozen_encoder(str(file), device="cpu").preprocess(torch.stack([
        evaluation_crop((32, 32)).crop(image) for image in map(open_dataset(settings.test).image, range(24))
    ]))).argmax(dim=1)  # fmt: skip
    wanted = torch.from_numpy(open_dataset(settings.test).labels)
    right = sum(names[a] == "abc"[w] for a, w in zip(answers.tolist(), wanted.tolist(), strict=True))
    assert found[0]["in_memory/head/clean"] == pytest.approx(100 - 100 * right / 24)
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "bee")
    with pytest.raises(UserError, match="a class 'bee', which is not one of the 3"):
        measured(file)
    save_tensors(module.state_dict(), file, run, 3, 3, {"classes": '["a", "b"]'})
    with pytest.raises(UserError, match="names 2 classes, and its classifier has 3"):
        load_frozen_encoder(str(file), device="cpu")


def test_shape_decisions_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    predictions, shapes, textures = (torch.from_numpy(generator.integers(0, 4, 200)) for _ in range(3))
    rows = [
        (a, s, t) for a, s, t in zip(predictions.tolist(), shapes.tolist(), textures.tolist(), strict=True) if s != t
    ]
    by_shape, by_texture = sum(a == s for a, s, _ in rows), sum(a == t for a, _, t in rows)
    found = shape_decisions(predictions, shapes, textures)
    assert found == pytest.approx((by_shape / len(rows), by_texture / len(rows), by_shape / (by_shape + by_texture)))
    three, four = torch.tensor([3, 3]), torch.tensor([0, 1])
    assert math.isnan(shape_decisions(three, four, four.flip(0))[2])
    assert all(map(math.isnan, shape_decisions(four, three, three)))


def test_scores_that_are_not_finite_are_no_decisions(tiny_run: Make, tmp_path: Path) -> None:
    class Overflowing(Reds):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).index_fill(1, torch.tensor([9]), math.nan)

    for name in (
        "cues/cat/cat1-elephant2",
        "cues/dog/dog1-elephant2",
        *(f"c/contrast/1/{i}/a" for i in imagenet.wnids()[:2]),
    ):
        write(tmp_path / f"{name}.png", 250)
    context = context_of(tiny_run(), tmp_path, Overflowing())
    with pytest.raises(UserError, match="scores of the classifier are not finite for 2 of 2 images"):
        dict(shape_bias.evaluate_shape_bias(context, ShapeBiasSettings(str(tmp_path / "cues"))))
    settings = RobustnessSettings(str(tmp_path / "c"), corruptions=("contrast",), severities=(1,))
    with pytest.raises(UserError, match="scores of the classifier are not finite for 2 of 2 images"):
        dict(robustness.evaluate_robustness(context, settings))


def test_categories_take_the_mean_of_probabilities() -> None:
    scores = torch.randn(5, 1000)
    groups = list(imagenet.CATEGORIES.values())
    found = shape_bias.categories(scores, groups)
    wanted = scores.double().exp() / scores.double().exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(found[:, 10], wanted[:, list(groups[10])].mean(dim=1).float(), atol=1e-6, rtol=1e-4)


class Reds(nn.Module):
    """A classifier of ImageNet for which dark red is an elephant (385) and bright red a tabby cat (281)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(len(x), 1000)
        bright = x[:, 0].mean(dim=(1, 2)) > 0
        scores[:, 385], scores[:, 281] = (~bright) * 20.0, bright * 20.0
        return scores


def test_cue_conflict_folders(tiny_run: Make, tmp_path: Path) -> None:
    root = tmp_path / "stimuli"
    write(root / "cat/cat1-elephant2.png", 250)  # shape
    write(root / "cat/cat2-elephant1.png", 5)  # texture
    write(root / "cat/cat4-cat1.png", 5)  # no conflict: left out
    write(root / "elephant/elephant1-dog3.png", 5)  # shape
    write(root / "truck/truck2-dog3.png", 5)  # neither
    context = context_of(tiny_run(), tmp_path, Reds())
    found = dict(shape_bias.evaluate_shape_bias(context, ShapeBiasSettings(str(root))))
    assert found["head/stimuli"] == 4
    assert found["head/shape_bias"] == pytest.approx(200 / 3)
    assert found["head/shape"] == 50 and found["head/texture"] == 25
    assert found["head/category/cat/shape_bias"] == 50 and found["head/category/elephant/shape_bias"] == 100
    assert math.isnan(found["head/category/truck/shape_bias"])
    order = torch.arange(1000).flip(0)

    class Flipped(Reds):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[:, order]

    flipped = context_of(tiny_run(), tmp_path, Flipped())
    flipped.encoder = replace(flipped.encoder, names=tuple(reversed(imagenet.wnids())))  # its outputs, by its own names
    assert dict(shape_bias.evaluate_shape_bias(flipped, ShapeBiasSettings(str(root)))) == pytest.approx(
        found, nan_ok=True
    )
    flipped.encoder = replace(flipped.encoder, names=tuple(f"class {i}" for i in range(1000)))
    with pytest.raises(UserError, match="ImageNet's WordNet ids, and this one has 'class 0'"):
        dict(shape_bias.evaluate_shape_bias(flipped, ShapeBiasSettings(str(root))))
    (picture,) = context.images.values()
    assert picture.width > 300
    for name in ("cat/cat1-zebra2.png", "cat/dog1-cat2.png", "cat/photo.png"):
        write(root / name, 5)
        with pytest.raises(UserError, match=rf"{name}: a stimulus of the shape cat is named cat1-TEXTURE2\.png"):
            dict(shape_bias.evaluate_shape_bias(context_of(tiny_run(), tmp_path, Reds()), ShapeBiasSettings(str(root))))
        (root / name).unlink()
    with pytest.raises(UserError, match=r"1000 classes, and this encoder has none"):
        dict(shape_bias.evaluate_shape_bias(context_of(tiny_run(), tmp_path), ShapeBiasSettings(str(root))))


def test_stimuli_of_any_class_names(tmp_path: Path) -> None:
    """Names with capitals, digits, hyphens, spaces, and one that begins like another."""
    names = ["Cat", "cat fish", "n01", "n0144", "T-shirt"]
    expected = {}
    for shape in names:
        for texture, number in zip(names, ("", "1", "22", "3", ""), strict=True):
            path = tmp_path / shape / f"{shape.lower()}{number}-{texture}{number}.png"
            write(path, 5)
            expected[str(path)] = names.index(shape), names.index(texture)
    data = open_dataset(str(tmp_path))
    found = zip(*(cue.tolist() for cue in shape_bias.cues(data, names)), strict=True)
    assert {data.path_of(i): pair for i, pair in enumerate(found)} == expected


def test_cues_of_parts_and_mixtures_of_shapes() -> None:
    spec = "shapes:count=30,size=32,texture=conflict"
    alone = open_dataset(spec)
    assert isinstance(alone, SyntheticShapes)
    wanted = list(zip(alone.labels.tolist(), alone.texture_labels.tolist(), strict=True))
    for other, length in ((f"split:test:{spec}", None), (f"{spec}+shapes:count=5,size=32,seed=3,texture=conflict", 30)):
        data = open_dataset(other)
        pairs = list(zip(*(cue.tolist() for cue in shape_bias.cues(data, alone.classes)), strict=True))
        indices = [int(data.path_of(i).split("#")[1]) for i in range(len(data))][:length]
        assert indices and pairs[: len(indices)] == [wanted[index] for index in indices]
    settings = api._evaluations("all", {"labelled": "shapes:count=40,size=32"})
    assert shape_bias.cues(open_dataset(dict(settings)["shape-bias"].data), alone.classes)


def test_shapes_in_conflict(texture_classifier: nn.Module, tmp_path: Path) -> None:
    """On an encoder of textures, a probe decides by texture; fitted to textures, its shape bias is lower still."""
    settings = ShapeBiasSettings(
        "shapes:count=200,size=32,texture=conflict,seed=2", "shapes:count=300,size=32,texture=match", epochs=20
    )
    context = context_of(TINY_CONVMAE, tmp_path, texture_classifier)
    textural = dict(shape_bias.evaluate_shape_bias(context, settings))
    assert textural["probe/shape_bias"] < 40 and textural["probe/texture"] > 20
    assert context.images
    each = [value for name, value in textural.items() if name.endswith("/shape_bias") and "/category/" in name]
    known = [value for value in each if value == value]  # NaN without a decision
    assert textural["probe/balanced"] == pytest.approx(sum(known) / len(known))

    train = open_dataset("shapes:count=500,size=32")
    stimuli = open_dataset("shapes:count=200,size=32,texture=conflict,seed=2")
    assert isinstance(train, SyntheticShapes) and isinstance(stimuli, SyntheticShapes)
    references, queries = extract_features(context.encoder, train), extract_features(context.encoder, stimuli)
    shapes, textures = shape_bias.cues(stimuli, references.classes)
    assert textural["probe/majority"] == pytest.approx(100 * max(torch.bincount(shapes).tolist()) / 200)
    biases = [
        shape_decisions(
            fit_sweep(replace(references, labels=labels), epochs=20).scores(queries).argmax(dim=1), shapes, textures
        )[2]
        for labels in (references.labels, torch.from_numpy(train.texture_labels))
    ]
    assert biases[0] > biases[1] + 0.2

    with pytest.raises(UserError, match="agree in every stimulus"):
        dict(shape_bias.evaluate_shape_bias(context, replace(settings, data=settings.train)))


def test_classifiers_keep_their_heads(tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    from pixmim.weights.save import save_tensors

    run = classifier(tiny_run(), 10)
    module = build_encoder(run)
    save_tensors(module.state_dict(), tmp_path / "fine-tuned.safetensors", run, 3)
    assert load_frozen_encoder(str(tmp_path / "fine-tuned.safetensors"), device="cpu").classes == 10
    assert context_of(tiny_run(), tmp_path).encoder.classes == 0

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: create(name, pretrained=False, **rest))
    name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert load_frozen_encoder(name, device="cpu").classes == 1000
    assert "encoder.head.weight" not in resolve_model(name).tensors
