"""Test k-NN and the linear probe against slow implementations, and the checks of all evaluations."""

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from helpers import runs
from helpers.evaluated import evaluate, measured
from helpers.shards import write
from pixmim.build import build_model
from pixmim.config import OnlineKnnConfig, PretrainConfig
from pixmim.config_io import load_config, to_json
from pixmim.data import open_dataset
from pixmim.data.dataset import ImageDataset
from pixmim.evaluation.classification import (
    alike_classes,
    check_labeled,
    compare_held_out,
    evaluate_classifier,
    majority,
    rated,
    tally,
    wilson_interval,
)
from pixmim.evaluation.context import EvalContext, FeatureSet, Values, describe_labels, extract_features
from pixmim.evaluation.evals import EVALS
from pixmim.evaluation.evaluate import EVALUATIONS, State, digest_data, evaluate_many, online_knn
from pixmim.evaluation.frozen_encoder import FrozenEncoder, load_frozen_encoder, wrap_live_encoder
from pixmim.evaluation.knn import classify, knn
from pixmim.evaluation.linear_probe import RATES, evaluate_probe, fit, fit_sweep, standardize
from pixmim.evaluation.results import save
from pixmim.evaluation.settings import EvaluateAllSettings, FinetuneOverrides
from pixmim.report.results import ModelResults, circumstances, compare
from pixmim.training.metric_logger import read_metrics
from pixmim.training.precision import autocast
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.errors import UserError
from pixmim.weights.save import save_encoder

Make = Callable[..., PretrainConfig]
TRAIN, TEST = "shapes:count=30,size=32", "shapes:count=20,size=32,seed=1"
BOTH: tuple[State, ...] = ("untrained", "trained")


def frozen(n: int, classes: int = 3, apart: float = 0.0, seed: int = 0, names: list[str] | None = None) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = torch.eye(8)[:classes] * apart
    mean = torch.randn(n, 8, generator=generator) + centers[labels]
    return FeatureSet(mean[:, None].repeat(1, 4, 1), mean, labels, names or [f"class {i}" for i in range(classes)])


def test_knn_against_a_loop() -> None:
    """Use several k in one pass; the last exceeds the number of references."""
    train, test = frozen(60, apart=1), frozen(40, apart=1, seed=1)
    answers = classify(train.mean, train.labels, test.mean, 3, k=(1, 5, 20, 100), rows=7, block=16)
    for i in range(40):
        similar = [float(F.cosine_similarity(test.mean[i], voter, dim=0)) for voter in train.mean]
        for k, answer in answers.items():
            first = sorted(range(60), key=lambda j: -similar[j])[:k]
            votes = [sum(math.exp(similar[j] / 0.07) for j in first if train.labels[j] == c) for c in range(3)]
            assert int(answer[i]) == votes.index(max(votes))


def test_knn_of_separate_classes_is_perfect_and_of_noise_is_chance() -> None:
    apart = dict(knn(frozen(90, apart=30), frozen(60, apart=30, seed=1)))
    assert {apart[f"k{k}/{name}/top1"] for k in (1, 20) for name in ("mean", "cls")} == {100}
    noise = dict(knn(frozen(900), frozen(600, seed=1)))
    with pytest.raises(UserError, match="--k takes numbers of neighbors from 1 on, such as 1 20, not 5 0"):
        dict(knn(frozen(9), frozen(9), (5, 0)))
    assert noise["k20/mean/top1/low"] < 100 / 3 < noise["k20/mean/top1/high"]


def test_a_large_k_is_reduced_in_its_label(product: Path, sets: Callable[..., str], tiny_run: Make) -> None:
    """Label a reduced k by its actual value, in an evaluation and in training."""
    train, test = frozen(12), frozen(40, seed=1)
    values = dict(knn(train, test, (1, 20, 30)))
    assert {key.split("/")[0] for key in values} == {"k1", "k12", "majority"}
    wanted = dict(knn(train, test, (12,)))
    assert {key: values[key] for key in wanted} == wanted
    answer = classify(train.mean, train.labels, test.mean, 3, k=(12,))[12]
    assert values["k12/mean/top1"] == pytest.approx(100 * float((answer == test.labels).double().mean()))

    few, others = sets("few", a=4, b=3), sets("others", seed=1, a=3, b=3)
    line = "warning: k = 20 exceeds the 7 train images; measured with k = 7\n"
    console = Console(file=io.StringIO(), width=300)
    found = measured("knn", product, few, others, console=console)
    assert line in console.file.getvalue()  # type: ignore[attr-defined]
    assert {key.split("/")[0] for key in found.values} == {"k1", "k7", "majority"}

    console = Console(file=io.StringIO(), width=300)
    run = tiny_run(seed=5)
    watch = online_knn(replace(run, knn=replace(run.knn, every=1.0, train=few, test=others)), console)
    assert watch is not None
    twice = [watch(build_model(tiny_run(seed=5)).encoder) for _ in range(2)]
    assert {key for key in twice[1] if "top1" in key} == {f"knn/k{k}/{f}/top1" for k in (1, 7) for f in ("cls", "mean")}
    assert console.file.getvalue().count(line) == 1  # type: ignore[attr-defined]


def test_classes_that_differ_only_in_spelling_are_named(tmp_path: Path) -> None:
    """Case, spaces, and a letter with a combining mark; names of other letters are not."""
    assert alike_classes(["cat", "car", "ß", "s", "a b", "ab"]) == []
    assert alike_classes(["10", "1", "1.5", "-1", "v1", "0"]) == []
    assert "'007' and '7' and '7.0', '0' and '00'" in alike_classes(["007", "7", "0", "70", "7.0", "00"])[0]
    (line,) = alike_classes(["Cat", "cat ", "cats", "caf\u00e9", "cafe\u0301"])
    assert line.startswith("warning: ") and "'Cat' and 'cat '" in line and "cats" not in line and line.count("caf") == 2
    for folder in ("Cat", "cat"):
        for i in range(2):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (i, 9 * len(folder), ord(folder[0]))).save(tmp_path / folder / f"{i}.png")
    console = Console(file=io.StringIO(), width=300)
    data = open_dataset(str(tmp_path))
    check_labeled(data, data, console)
    assert console.file.getvalue().count("'Cat' and 'cat'") == 1  # type: ignore[attr-defined]


def test_probe_follows_autograd() -> None:
    """Compare the explicit gradient and momentum with torch.optim.SGD on cross-entropy."""
    data = frozen(50, apart=1)
    weights = fit(data.mean, data.labels, 3, RATES[6:9], epochs=3, batch=10, seed=4)
    from pixmim.utils import rng

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


def linear(train: FeatureSet, test: FeatureSet, epochs: int) -> dict[str, float]:
    return dict(evaluate_probe(fit_sweep(train, epochs=epochs), test, test.labels))


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


def test_the_rate_is_chosen_by_balanced_accuracy_where_classes_are_unequal() -> None:
    """Compare with loops in float64; a class without images on the held-out part does not count."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 12 + [1] * 4 + [3] * 2)
    predictions = torch.randint(4, (9, 18), generator=generator)
    predictions[0] = 0  # always the largest class: 67 % accuracy, and 33 % balanced
    unequal, equal = torch.tensor([0] * 8 + [1] * 4 + [2] * 4 + [3] * 4), torch.tensor([0] * 7 + [1, 2, 3] * 4)
    for train, is_balanced in ((unequal, True), (equal, False)):
        for row, score in zip(predictions, compare_held_out(predictions, labels, train, 4), strict=True):
            hits = [int(p == t) for p, t in zip(row.tolist(), labels.tolist(), strict=True)]
            recalls = [sum(hits[:12]) / 12, sum(hits[12:16]) / 4, sum(hits[16:]) / 2]
            assert score == pytest.approx(sum(recalls) / 3 if is_balanced else sum(hits) / 18, abs=1e-12)


def test_a_probe_of_a_rare_class_does_not_give_it_up() -> None:
    """Train on 400 images, 20 of them of the second class, which a choice by accuracy could never predict."""
    rare = torch.arange(400) % 20 == 0

    def features(seed: int) -> FeatureSet:
        mean = torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)) + 1.5 * rare[:, None]
        return FeatureSet(mean[:, None], mean, rare.long(), ["common", "rare"])

    found = linear(features(0), features(1), epochs=20)
    assert found["setting/chosen_by_balanced"] == 1 and found["recall/rare"] > 50 and found["held_out"] > 60


def test_standardising_uses_the_train_sets_statistics() -> None:
    a = torch.randn(50, 3) * 7 + 2
    x, mean, deviation = standardize(a)
    torch.testing.assert_close(x, (a - a.mean(0)) / a.std(0), atol=1e-5, rtol=0)
    torch.testing.assert_close((mean, deviation), (a.mean(0), a.std(0)))


def test_interval_is_wilsons() -> None:
    """Compare with the published example 81/263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 29) == pytest.approx((0.0, 0.1170), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_classes_are_matched_by_name() -> None:
    train = frozen(60, apart=30, names=["a", "b", "c"])
    test = frozen(30, classes=2, apart=30, seed=1, names=["b", "c"])  # its class 0 looks like train's class 0, "a"
    assert dict(knn(train, test))["k20/mean/top1"] == 0
    with pytest.raises(UserError, match=r"a class 'bb', which is not one of .*; did you mean 'b'"):
        dict(knn(train, frozen(30, classes=2, names=["bb", "c"])))


def test_a_classifier_is_measured_as_scikit_learn_does(tiny_run: Make, tmp_path: Path) -> None:
    """In batches, the last one incomplete; top 5 means nothing if it holds all classes that were trained on."""
    metrics = pytest.importorskip("sklearn.metrics")
    module = build_model(tiny_run()).encoder
    context = EvalContext(wrap_live_encoder(tiny_run(), module, torch.device("cpu"), "fp32"), tmp_path)
    data, given = check_labeled(*map(open_dataset, (TRAIN, "shapes:count=300,size=32"))), list[torch.Tensor]()

    def classify(x: torch.Tensor) -> torch.Tensor:
        given.append(torch.randn(len(x), 10, generator=torch.Generator().manual_seed(len(given))))
        return given[-1]

    found = dict(evaluate_classifier(context, data, context.encoder, (32, 32), classify))
    labels, scores = data.test_labels.numpy(), torch.cat(given).softmax(dim=1).double().numpy()
    assert found["top1"] == pytest.approx(100 * metrics.accuracy_score(labels, scores.argmax(1)))
    assert found["top5"] == pytest.approx(100 * metrics.top_k_accuracy_score(labels, scores, k=5))
    assert found["balanced"] == pytest.approx(100 * metrics.balanced_accuracy_score(labels, scores.argmax(1)))
    assert found["loss"] == pytest.approx(metrics.log_loss(labels, scores / scores.sum(1, keepdims=True)), rel=1e-5)
    few = replace(data, train_labels=data.train_labels % 3)
    assert "top5" not in dict(evaluate_classifier(context, few, context.encoder, (32, 32), classify))


@pytest.mark.parametrize("named", ["train", "test", "both"])
def test_names_of_classes_without_images_change_nothing(pictures: Path, tmp_path: Path, named: str) -> None:
    """Number the classes of a tar 1 and 3, which names 0 and 2 as well, and compare it with class folders."""
    files, folder = list[tuple[str, bytes]](), tmp_path / "folder"
    for name, number in (("cats", "1"), ("dogs", "3")):
        shutil.copytree(pictures / name, folder / number)
        for file in sorted((folder / number).iterdir()):
            key = f"{number}-{file.stem}"
            files += [(f"{key}.jpg", file.read_bytes()), (f"{key}.cls", number.encode())]
    tar = open_dataset(write(tmp_path / "numbers.tar", files))
    plain = open_dataset(folder)
    assert tar.classes == ["0", "1", "2", "3"] and plain.classes == ["1", "3"]

    def check(train: ImageDataset, test: ImageDataset) -> tuple[list[str], ...]:
        out = io.StringIO()
        splits = check_labeled(train, test, Console(file=out, width=500))
        lines = [line for line in out.getvalue().splitlines() if "images of" in line and "warning" not in line]
        return lines, *([splits.classes[i] for i in labels] for labels in (splits.train_labels, splits.test_labels))

    sources = [tar if named in (part, "both") else plain for part in ("train", "test")]
    assert check(*sources) == check(plain, plain)


def test_unbalanced_data_against_loops() -> None:
    """Compare balanced accuracy, recalls and majority with sums over lists; a class without images has no recall."""
    wanted = torch.tensor([0] * 72 + [1] * 20 + [3] * 8)
    answers = torch.where(torch.arange(100) % 7 == 0, 2, torch.where(torch.arange(100) % 3 == 0, 0, wanted))
    counts = tally(answers, wanted, 4)
    found = dict(rated(counts, ["a", "b", "c", "d"], "x/"))
    pairs = list(zip(answers.tolist(), wanted.tolist(), strict=True))
    recall = {c: sum(a == w == c for a, w in pairs) / sum(w == c for _, w in pairs) for c in (0, 1, 3)}
    assert found["x/top1"] == pytest.approx(sum(a == w for a, w in pairs))
    assert {k: v for k, v in found.items() if "recall" in k} == pytest.approx(
        {f"x/recall/{'abcd'[c]}": 100 * value for c, value in recall.items()}
    )
    assert found["x/balanced"] == pytest.approx(100 * sum(recall.values()) / 3) and majority(counts) == 72
    with pytest.raises(UserError, match="a single class, 'b'"):
        dict(rated(tally(answers[72:92], wanted[72:92], 4), ["a", "b", "c", "d"]))


@pytest.fixture
def sets(tmp_path: Path) -> Callable[..., str]:
    """Make folders of classes with color noise."""

    def make(name: str, seed: int = 0, **classes: int) -> str:
        draw = np.random.default_rng(seed)
        for label, count in classes.items():
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(
                    tmp_path / name / label / f"{seed}-{i}.png"
                )
        return str(tmp_path / name)

    return make


EVERY = [
    *[("knn", {}), ("linear", {}), ("linear", {"protocol": "mae"}), ("attentive", {})],
    *[("finetune", {}), ("robustness", {})],
]


@pytest.mark.parametrize(("name", "more"), EVERY)
def test_meaningless_data_are_refused_by_every_evaluation(
    name: str, more: dict[str, str], product: Path, sets: Callable[..., str]
) -> None:
    good = sets("good", a=3, b=2)
    for train, test, words in (
        (sets("one", a=3), good, "has a single class, 'a'"),
        (good, sets("alone", seed=1, b=3), "has a single class, 'b'"),
        (sets("less", a=2, c=2), good, "a class 'b'"),
    ):
        settings = EVALS[name].settings(**{"train": train, "test": test, **more})
        with pytest.raises(UserError, match=words):
            list(evaluate(str(product), [(name, settings)], product, device="cpu"))
    if name in ("knn", "linear"):
        run, _ = load_config(product / "config.json")
        with pytest.raises(UserError, match=r"--knn\.train and --knn\.test: .* has a single class, 'b'"):
            online_knn(replace(run, knn=replace(run.knn, every=1.0, train=good, test=str(Path(good).parent / "alone"))))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("knn", {}),
        ("linear", {"protocol": "mae", "epochs": 1}),
        ("attentive", {"epochs": 1}),
        ("finetune", {"changes": FinetuneOverrides(epochs=1, batch_size=4)}),
        ("robustness", {"epochs": 1, "corruptions": ("contrast",), "severities": (1,)}),
        ("shape-bias", {"epochs": 1}),
    ],
)
def test_every_evaluation_says_how_many_images_it_skipped(
    name: str, more: dict[str, Any], product: Path, sets: Callable[..., str]
) -> None:
    train, test = sets("train", a=3, b=3), sets("test", seed=1, a=4, b=4)
    for label, other in ("ab", "ba"):
        for i in range(4):
            (Path(test) / label / f"1-{i}.png").rename(Path(test) / label / f"{label}{i}-{other}1.png")
    (Path(test) / "a" / "a2-b1.png").write_bytes(b"no picture")
    (Path(train) / "b" / "0-1.png").write_bytes(b"no picture")
    settings = EVALS[name].settings(**{"train": train, "data" if name == "shape-bias" else "test": test, **more})
    console = Console(file=io.StringIO(), width=500)
    list(evaluate(str(product), [(name, settings)], product, device="cpu", console=console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for data, count in ((train, 6), (test, 8)):
        (line,) = (line for line in lines if line.startswith(f"1 of the {count} images of {data} are skipped: 1 x"))
        assert "not an image" in line


@pytest.mark.parametrize(("patients", "narrow"), [("aabb", True), ("abcd", False), ("    ", False)])
def test_images_of_one_group_make_intervals_too_narrow(patients: str, narrow: bool, pictures: Path) -> None:
    names = [f"{kind}/{i}.jpg,{kind}" for kind in ("cats", "dogs") for i in range(2)]
    lines = [f"{name},{patient.strip()}" for name, patient in zip(names, patients, strict=True)]
    (pictures / "test.csv").write_text("\n".join(["path,label,patient", *lines]))
    console = Console(file=io.StringIO(), width=500)
    check_labeled(open_dataset(str(pictures)), open_dataset(f"{pictures}/test.csv"), console)
    assert ("those of one group make them too narrow" in console.file.getvalue()) == narrow  # type: ignore[attr-defined]


def test_classes_and_shared_images_are_printed(sets: Callable[..., str], tmp_path: Path) -> None:
    """Detect the same path, the same bytes, a symbolic link, and the same seed of synthetic shapes."""
    train, test = sets("train", a=6, b=2), sets("test", seed=1, a=3, b=1)

    def printed(train: str, test: str) -> str:
        console = Console(file=io.StringIO(), width=300)
        check_labeled(open_dataset(train), open_dataset(test), console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "train data: 8 images of 2 classes: a 75.0 %, b 25.0 %\n" in printed(train, test)
    assert "warning" not in printed(train, test)
    shutil.copy(Path(train) / "b" / "0-1.png", Path(test) / "b" / "other.png")
    (Path(test) / "a" / "link.png").symlink_to(Path(train) / "a" / "0-3.png")
    assert "warning: 2 of the 6 test images" in printed(train, test)
    assert "warning: all 8 test images" in printed(train, train)
    for again in (f"{train}+shapes:count=9", f"{train}*2"):
        assert "warning: 2 of the 6 test images" in printed(again, test)
    assert "warning: 4 of the 12 test images" in printed(train, f"{test}*2")
    assert "warning: all 2 test images" in printed(train, f"split:test:{train}")
    assert "warning: all 20 test images" in printed("shapes:count=30", "shapes:count=20")
    assert "warning: all 20 test images" in printed("shapes:count=30+shapes:count=5,seed=2", "shapes:count=20")
    assert "warning" not in printed("shapes:count=30", "shapes:count=20,seed=1")


def test_labels_have_as_many_stars_as_their_keys() -> None:
    shown = [
        item for protocol in EVALS.values() for item in [*protocol.display_names.items(), *protocol.class_names.items()]
    ]
    assert [key for key, title in shown if key.count("*") != title.count("*")] == []


def test_the_newest_of_several_results_counts_and_older_ones_say_so() -> None:
    def result(step: int, name: str = "knn", encoder: str = "trained", **values: float) -> dict[str, Any]:
        settings = {"train": "/a", "test": "/b", "k": sorted(values)}
        values = {f"{k}/mean/top1": value for k, value in values.items()}
        return {"evaluation": name, "encoder": encoder, "step": step, "settings": settings, "values": values}

    old, new, start = result(4, k1=5.0, k20=6.0), result(8, k1=8.0), result(0, encoder="untrained", k1=1.0, k20=2.0)
    for order in ([old, new, start], [new, start, old]):
        rows = {row.key: row.cells for row in compare([ModelResults("run", order)]).rows}
        assert [cell and cell.text for cell in rows["k1/mean/top1"]] == ["1.0 %", "8.0 %"]
        assert [cell and cell.text for cell in rows["k20/mean/top1"]] == ["2.0 %", None]  # not measured at step 8
    linear = result(4, "linear") | {"values": {"top1": 7.0}}
    found = {row.key: row.cells[0] for row in compare([ModelResults("run", [new, linear])]).rows}
    assert found["top1"] is not None and found["top1"].text == "7.0 % (step 4)"


def test_labels_are_part_of_what_work_is_resumed_from(pictures: Path, product: Path, tmp_path: Path) -> None:
    rows = [f"{name}/{i}.jpg,{name}" for name in ("cats", "dogs") for i in range(5)]
    texts, folders, digests = set(), set(), set()
    context = EvalContext(load_frozen_encoder(str(product), device="cpu", precision="fp32"), tmp_path)
    for labels in (rows, [row.replace("0.jpg,cats", "0.jpg,dogs") for row in rows]):
        (pictures / "labels.csv").write_text("\n".join(["path,label", *labels]))
        data = open_dataset(f"{pictures}/labels.csv")
        texts.add(describe_labels(data))
        folders.add(context.work_dir("finetune", "", describe_labels(data)))
        settings = EVALS["knn"].settings(data.spec, data.spec)
        digests.add(digest_data(replace(context, shared={}), "knn", settings))
        assert context.work_dir("finetune", "", describe_labels(data)) in folders
    assert len(texts) == len(folders) == len(digests) == 2
    context.encoder = replace(context.encoder, precision="bf16")
    assert context.work_dir("finetune", "", describe_labels(data)) not in folders


def test_images_that_become_unreadable_cost_the_measurement_and_not_the_run(
    tiny_run: Callable[..., PretrainConfig], pictures: Path, tmp_path: Path
) -> None:
    knn = OnlineKnnConfig(train=str(pictures), test=str(pictures), every=0.2)

    def remove(step: int) -> None:
        if step == 2:
            shutil.rmtree(pictures / "cats")

    text = runs.train(tiny_run(steps=6, knn=knn, hold_out=0.2), tmp_path / "run", on_step_end=remove)
    assert "warning: k-NN is not measured" in text
    measured = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "knn/images" in line]
    assert measured[0] == 0 and max(measured) <= 2 and (tmp_path / "run/encoder").is_dir()
    for path in (pictures / "dogs").iterdir():
        path.write_bytes(b"damaged")
    (pictures / "cats").mkdir()
    Image.new("RGB", (32, 32)).save(pictures / "cats/0.png")
    with pytest.raises(UserError, match=r"--knn\.train and --knn\.test: .*cannot be read"):
        runs.train(tiny_run(steps=2, knn=knn), tmp_path / "start")


def test_rows_of_other_settings_have_other_labels() -> None:
    def result(values: dict[str, float], name: str = "linear", **settings: object) -> dict[str, Any]:
        settings = {"train": "/a", "test": "/b", **settings}
        return {"evaluation": name, "encoder": "trained", "settings": settings, "values": values, "pictures": {}}

    runs = [
        result({"top1": 1.0, "majority": 9.0, "recall/a": 5.0}, epochs=10),
        result({"top1": 2.0, "majority": 9.0}, epochs=100),
        result({"top1": 3.0, "majority": 9.0}, epochs=100, train="/c"),
        result({"k1/mean/top1": 4.0, "k20/mean/top1": 5.0, "majority": 9.0}, "knn", k=[1, 20]),
        result({"k5/mean/top1": 6.0}, "knn", k=[5]),
        result({"iou/sky": 7.0}, "segmentation"),
    ]
    found = compare([ModelResults("run", runs)])
    assert [(row.label, row.cells[0].value) for row in found.rows if row.cells[0]] == [
        ("majority (always the largest class)", 9.0),
        ("k-NN (k = 1), mean of patch tokens", 4.0),
        ("k-NN (k = 20), mean of patch tokens", 5.0),
        ("k-NN (k = 5), mean of patch tokens", 6.0),
        ("linear probe, epochs 10, train /a", 1.0),
        ("linear probe, epochs 100, train /a", 2.0),
        ("linear probe, epochs 100, train /c", 3.0),
    ]
    assert circumstances(runs)[:3] == [
        "/b, epochs 10, train /a",
        "/b, epochs 100, train /a",
        "/b, epochs 100, train /c",
    ]
    assert [row.label for row in found.per_class] == ["recall, linear probe: a, epochs 10, train /a", "IoU: sky"]


def test_values_on_data_that_changed_do_not_share_a_row() -> None:
    def rows(*digests: str) -> list[tuple[str, list[float | None]]]:
        result = {"evaluation": "linear", "encoder": "trained", "settings": {"train": "/a", "test": "/b"}}
        models = [
            ModelResults(str(i), [result | {"values": {"top1": float(i)}, "data_digest": digest}])
            for i, digest in enumerate(digests)
        ]
        return [(row.label, [cell and cell.value for cell in row.cells]) for row in compare(models).rows]

    assert rows("1234abcd", "1234abcd", "") == [("linear probe", [0.0, 1.0, 2.0])]  # unknown in older results
    assert rows("1234abcd", "5678abcd", "", "1234abcd") == [
        ("linear probe, images 1234abcd", [0.0, None, None, 3.0]),
        ("linear probe, images 5678abcd", [None, 1.0, None, None]),
        ("linear probe, images unknown", [None, None, 2.0, None]),
    ]


@pytest.mark.parametrize("length", [30, 400])
def test_long_paths_that_end_alike_are_different_settings(length: int) -> None:
    models = [
        ModelResults(
            name, [{"evaluation": "linear", "encoder": "trained", "settings": settings, "values": {"top1": 9.0}}]
        )
        for name in "ab"
        for settings in [{"train": f"/{length * 'x'}/site-{name}/{length * 'y'}", "test": "/b"}]
    ]
    rows = compare(models).rows
    assert [[cell is not None for cell in row.cells] for row in rows] == [[True, False], [False, True]]
    assert (len({row.label for row in rows}) == 2) == (length == 30)


def test_rows_of_the_public_sets_are_on_these() -> None:
    values = {"imagenet_a/top1": 5.0, "imagenet_c/mce": 90.0, "in_memory/head/clean": 20.0}
    settings = {"test": "/mine", "imagenet_a": "/a", "imagenet_c": "/c"}
    result = {"evaluation": "robustness", "encoder": "trained", "settings": settings, "values": values}
    rows = compare([ModelResults("run", [result])]).rows
    assert {row.label: row.on for row in rows} == {"ImageNet-A": "/a", "ImageNet-C, mCE": "/c", "error, clean": "/mine"}


def test_each_class_has_a_row_under_its_own_name() -> None:
    values = {"recall/left_hand": 5.0, "recall/left hand": 5.0, "top1": 5.0}
    result = {"evaluation": "linear", "encoder": "trained", "settings": {"test": "/b"}, "values": values}
    labels = [row.label for row in compare([ModelResults("run", [result])]).per_class]
    assert labels == ["recall, linear probe: left_hand", "recall, linear probe: left hand"]


@pytest.fixture
def product(tiny_run: Make, tmp_path: Path) -> Path:
    """Make the folder of a run with an untrained encoder."""
    run = tiny_run(seed=5)
    (tmp_path / "config.json").write_text(to_json(run))
    save_encoder(build_model(run).encoder, tmp_path / "encoder", run, step=7)
    return tmp_path


def test_features_are_those_of_the_bare_encoder_whatever_the_batch(product: Path) -> None:
    encoder = load_frozen_encoder(str(product), device="cpu", precision="fp32")
    data = open_dataset(TEST)
    one, two = extract_features(encoder, data, batch=3), extract_features(encoder, data, batch=20)
    torch.testing.assert_close(one.vector, two.vector, atol=1e-5, rtol=0)
    with torch.no_grad(), autocast(encoder.device, "fp32"):
        image = evaluation_crop(encoder.size).crop(data.image(7))[None].float() / 255
        image = (image - encoder.mean.view(1, 3, 1, 1)) / encoder.std.view(1, 3, 1, 1)
        tokens = encoder.module.forward_features(image)[0]
    torch.testing.assert_close(two.vector[7, -1], tokens[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(two.mean[7], tokens[1:].mean(dim=0), atol=1e-5, rtol=0)
    low = extract_features(load_frozen_encoder(str(product), device="cpu", precision="bf16"), data)
    assert F.cosine_similarity(low.mean, one.mean).min() > 0.999


def test_evaluation_is_repeatable_and_saved(product: Path) -> None:
    results = [measured(name, product, TRAIN, TEST) for name in ("knn", "linear", "knn")]
    assert results[0].values == results[2].values and results[0].step == 7
    assert measured("knn", product, TRAIN, TEST, untrained=True).values == results[0].values
    path = save(results[0], product)
    assert save(results[2], product) == path and path.parent.name == "evaluations"


def test_unsuitable_models_and_data_are_refused(product: Path, tmp_path: Path, tiny_run: Make, pictures: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        measured("knn", tmp_path / "nowhere", TRAIN, TEST)
    with pytest.raises(UserError, match="did you mean 'linear'"):
        list(evaluate(str(product), [("liner", None)], product))
    with pytest.raises(UserError, match="has no labels"):
        measured("knn", product, str(pictures / "cats"), TEST)
    with pytest.raises(UserError, match=r"--knn\.train and --knn\.test"):
        online_knn(tiny_run(knn=type(tiny_run().knn)(every=1.0)))
    (product / "encoder/model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        load_frozen_encoder(str(product))
    (product / "encoder/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither a checkpoint nor encoder/model\.safetensors"):
        load_frozen_encoder(str(product))


def test_extracting_features_keeps_the_training_mode(tiny_run: Make) -> None:
    module = build_model(tiny_run()).encoder.train()
    extract_features(wrap_live_encoder(tiny_run(), module, torch.device("cpu"), "fp32"), open_dataset(TEST))
    assert module.training


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_a_class_token_that_is_not_finite_is_refused(name: str, tiny_run: Make, tmp_path: Path) -> None:
    """Its mean patch token is finite."""
    module: Any = build_model(tiny_run()).encoder
    module.norm.register_forward_hook(lambda _, __, x: x.index_fill(1, torch.tensor([0]), math.inf))
    context = EvalContext(wrap_live_encoder(tiny_run(), module, torch.device("cpu"), "fp32"), tmp_path)
    with pytest.raises(UserError, match=r"features of shapes:.* are not finite for 30 of 30 images"):
        dict(EVALUATIONS[name].run(context, EVALS[name].settings(TRAIN, TEST)))
    periodic = online_knn(tiny_run(knn=OnlineKnnConfig(TRAIN, TEST, 1.0)))
    assert periodic is not None and periodic(module) == {}


def test_all_runs_what_the_data_allow(product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return several results of one call; synthetic data add shape bias."""
    assert [name for name, _ in EvaluateAllSettings("/a", "/b").parts()] == ["knn", "linear", "attentive", "robustness"]
    more = EvaluateAllSettings("/a", "/b", stimuli="/c", finetune=True, pairs="/ade", coco="/coco").parts()
    assert [name for name, _ in more][4:] == ["shape-bias", "finetune", "segmentation", "detection"]
    assert all(name in EVALS and isinstance(s, EVALS[name].settings) for name, s in more)
    assert "attentive" not in dict(EvaluateAllSettings("/a", "/b", attentive=False).parts())
    drawn = EvaluateAllSettings(TRAIN, TEST, severities=(1,))
    probes = []
    monkeypatch.setattr(
        "pixmim.evaluation.linear_probe.fit_sweep", lambda *a, **b: (probes.append(1), fit_sweep(*a, **b))[1]
    )
    results = list(evaluate(str(product), drawn.parts(), product, device="cpu"))
    assert len(probes) == 2  # one for linear and robustness, one for shape bias
    assert [result.evaluation for result in results] == ["knn", "linear", "attentive", "robustness", "shape-bias"]
    assert results[4].settings["data"] == f"{TEST},texture=conflict"
    assert results[0].values == measured("knn", product, TRAIN, TEST).values


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"pairs": "/no/ade"}, "segmentation: .*/no/ade"),
        ({"coco": "/no/coco"}, "detection: .*/no/coco"),
        ({"stimuli": "/no/stimuli"}, "shape-bias: .*/no/stimuli"),
        ({"imagenet_c": "/no/c"}, "robustness: ImageNet-C needs a classifier"),
        ({"imagenet_sketch": "/no/sketch"}, "robustness: ImageNet-Sketch needs a classifier"),
    ],
)
@pytest.mark.parametrize("states", [("trained",), ("untrained", "trained")])
def test_all_checks_every_evaluation_before_the_first_one_starts(
    product: Path, more: dict[str, str], words: str, states: tuple[State, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse missing data of the last evaluation before anything is computed, for one model and several."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("pixmim.evaluation.context.extract_block_features", never)
    monkeypatch.setattr("pixmim.evaluation.finetune.Trainer.resume_and_fit", never)
    parts = EvaluateAllSettings(TRAIN, TEST, finetune=True, **more).parts()  # type: ignore[arg-type]
    for evaluations in (parts, sorted(parts, key=lambda part: part[0] != "finetune")):
        with pytest.raises(UserError, match=words):
            list(evaluate_many({str(product): product}, evaluations, states, device="cpu"))
    complete = EvaluateAllSettings(TRAIN, TEST, finetune=True).parts()
    with pytest.raises(AssertionError, match="computed"):
        list(evaluate_many({str(product): product}, complete, device="cpu"))


def test_every_evaluation_has_functions_and_settings() -> None:
    assert list(EVALUATIONS) == list(EVALS)


def test_an_existing_classifier_is_refused_before_other_evaluations(product: Path) -> None:
    """Check the classifier of the untrained encoder as well."""
    (product / "classifier-untrained").mkdir()
    (product / "classifier-untrained/mine.txt").write_text("mine")
    calls: list[str] = []
    parts = EvaluateAllSettings(TRAIN, TEST, finetune=True).parts()
    with pytest.raises(UserError, match="classifier-untrained exists"):
        for result, _ in evaluate_many({str(product): product}, parts, BOTH, device="cpu"):
            calls.append(result.evaluation)
    assert calls == []


def test_several_encoders_are_loaded_once_and_share_data(
    product: Path, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluate each like a single one, and the initial weights that two runs share only once."""
    folders = {str(tmp_path / name): tmp_path / name for name in ("a", "b")}
    for folder in folders.values():
        shutil.copytree(product, folder)
    calls: list[str] = []

    def run(context: EvalContext, _: object) -> Values:
        calls.append(context.encoder_state)
        yield "k1/cls/top1", 1.0

    monkeypatch.setitem(EVALUATIONS, "knn", EVALUATIONS["knn"]._replace(run=run))
    loads = list[tuple[str, bool]]()

    def load(name: str, *, untrained: bool, **options: Any) -> FrozenEncoder:
        loads.append((Path(name).name, untrained))
        return load_frozen_encoder(name, untrained=untrained, **options)

    monkeypatch.setattr("pixmim.evaluation.evaluate.load_frozen_encoder", load)
    console = Console(file=io.StringIO(), width=300)
    evaluations: list[tuple[str, Any]] = [("knn", EVALS["knn"].settings(TRAIN, TEST))]
    found = list(evaluate_many(folders, evaluations, BOTH, device="cpu", console=console))
    assert [(folder.name, Path(r.model).name, r.encoder) for r, folder in found] == [
        ("a", "a", "untrained"), ("a", "a", "trained"), ("b", "b", "untrained"), ("b", "b", "trained")
    ]  # fmt: skip
    assert calls == ["untrained", "trained", "trained"]
    assert loads == [("a", True), ("a", False), ("b", True), ("b", False)]
    assert console.file.getvalue().count("train data: 30 images") == 1  # type: ignore[attr-defined]
    (tmp_path / "b" / "config.json").write_text(to_json(tiny_run(seed=6)))
    assert len(list(evaluate_many(folders, evaluations, BOTH, device="cpu"))) == 4
    assert calls[3:] == ["untrained", "trained"] * 2
    with pytest.raises(UserError, match="/no/run"):
        list(evaluate_many({**folders, "/no/run": tmp_path}, evaluations, device="cpu"))
    assert len(calls) == 7


def test_a_result_contains_what_is_needed_to_repeat_it(product: Path) -> None:
    result = json.loads(save(measured("knn", product, TRAIN, TEST, precision="fp32"), product).read_text())
    assert {"train": TRAIN, "test": TEST, "k": [1, 20]}.items() <= result["settings"].items() and result["step"] == 7
    config = json.loads((product / "config.json").read_text())
    assert result["config"] == {key: value for key, value in config.items() if key not in ("type", "version")}
    assert result["device"] == "cpu" and result["precision"] == "fp32"
    assert {"pixmim", "torch", "timm", "python"} <= set(result["versions"])


def test_a_few_unreadable_images_are_left_out_and_too_many_end_it(product: Path, tmp_path: Path) -> None:
    """Skip 60 of 300 unreadable images, and refuse 80 of 200."""
    for readable, name in ((240, "few"), (120, "many")):
        for i in range(readable + (60 if name == "few" else 80)):
            path = tmp_path / name / str(i % 2) / f"{i * 7919 % 1000:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < readable:
                Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(path)
            else:
                path.write_bytes(b"no picture")
    settings = EVALS["knn"].settings(str(tmp_path / "few"), str(tmp_path / "few"))
    (result,) = evaluate(str(product), [("knn", settings)], product, device="cpu")
    assert result.values["k1/mean/top1"] > 0
    assert len((product / "evaluations-skipped.csv").read_text().splitlines()) == 61
    with pytest.raises(UserError, match="more than the 25% that an evaluation may leave out") as e:
        measured("knn", product, str(tmp_path / "few"), str(tmp_path / "many"))
    assert "--max-bad-fraction" not in str(e.value) and "All are listed in" in str(e.value)
