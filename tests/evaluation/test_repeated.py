"""Folds, numbers of labels and blocks: against loops, other paths through the package, and scikit-learn."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import pixmim
from helpers.models import OTHERS
from pixmim.api import evaluate_to_folder
from pixmim.build import build_model
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.data import open_dataset
from pixmim.data.split import assign_folds, draw_labels
from pixmim.evaluation.attentive_probe import fit_probe
from pixmim.evaluation.classification import hold_out_rows
from pixmim.evaluation.context import EvalContext, FeatureSet, extract_block_features, extract_features
from pixmim.evaluation.evaluate import EVALUATIONS
from pixmim.evaluation.frozen_encoder import load_frozen_encoder, wrap_live_encoder
from pixmim.evaluation.knn import knn
from pixmim.evaluation.linear_probe import RATES, evaluate_probe, fit, fit_sweep, standardize
from pixmim.evaluation.patch_tokens import TokenSet, extract_tokens
from pixmim.evaluation.repeated import _summarize
from pixmim.evaluation.settings import (
    AttentiveSettings,
    EvaluateAllSettings,
    FinetuneSettings,
    KnnSettings,
    LabeledSettings,
    LinearSettings,
)
from pixmim.report import gain_lines
from pixmim.report.results import ModelResults, compare
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.weights.save import save_encoder

Make = Callable[..., PretrainConfig]
CPU = torch.device("cpu")
TRAIN, TEST = "shapes:count=60,size=32", "shapes:count=30,size=32,seed=1"


@pytest.fixture
def product(tiny_run: Make, tmp_path: Path) -> Path:
    """Make the folder of a run whose encoder differs from its start."""
    run, folder = tiny_run(seed=5), tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(run))
    save_encoder(build_model(tiny_run(seed=6)).encoder, folder / "encoder", run, step=7)
    return folder


@pytest.fixture
def context(product: Path) -> EvalContext:
    encoder = load_frozen_encoder(str(product), device="cpu", precision="fp32")
    return EvalContext(encoder, product, console=Console(file=io.StringIO(), width=300))


@pytest.fixture
def tinted(tmp_path: Path) -> Path:
    """Make class folders of 12, 12 and 5 images of noise, each class with its tint."""
    draw = np.random.default_rng(0)
    for label, (name, count) in enumerate({"a": 12, "b": 12, "c": 5}.items()):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 160, (24, 24, 3), np.uint8)
            pixels[..., label] += 40
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i:02d}.png")
    return tmp_path / "images"


def values_of(name: str, context: EvalContext, settings: LabeledSettings) -> dict[str, float]:
    return dict(EVALUATIONS[name].run(context, settings.resolved()))


def test_only_ends_of_intervals_are_left_out_of_a_mean() -> None:
    """A class may be called low."""
    runs = [
        {"top1": v, "top1/low": v - 1, "top1/high": v + 1, "recall/low": v, "recall/high": 2 * v} for v in (1.0, 3.0)
    ]
    found = dict(_summarize(runs, "fold"))
    assert found["recall/low"] == 2 and found["recall/high"] == 4 and "top1/low" not in found
    del runs[1]["recall/high"]
    found = dict(_summarize(runs, "fold"))
    assert found["recall/high"] == 2 and "recall/high/std" not in found  # one value has no deviation


def test_the_held_out_rows_are_whole_groups() -> None:
    """Without groups, they are the first of a permutation."""
    held, rest = hold_out_rows(40, None, 0.1, seed=3)
    assert np.array_equal(np.concatenate([held, rest]), rng.permutation(3, 0, 40)) and len(held) == 4
    for seed in range(20):
        groups = np.random.default_rng(seed).integers(0, 12, 60) * 7
        held, rest = hold_out_rows(60, groups, 0.25, seed)
        assert sorted([*held, *rest]) == list(range(60)) and 1 <= len(held) <= 15
        assert not set(groups[held]) & set(groups[rest])
    large = np.repeat([0, 1, 2], [30, 20, 10])
    assert {tuple(np.unique(large[hold_out_rows(60, large, 0.1, seed)[0]])) for seed in range(9)} == {(2,)}
    assert len(hold_out_rows(60, np.zeros(60, np.int64), 0.1, 0)[0]) == 6


def test_a_rate_is_not_chosen_on_images_of_known_patients(context: EvalContext, tmp_path: Path) -> None:
    """Features show the patient, whose class is random: on another image of the same patient, all is known."""
    draw = np.random.default_rng(0)
    patients, labels = np.repeat(np.arange(60), 4), np.repeat(draw.integers(0, 2, 60), 4)
    x = torch.from_numpy(np.eye(60, dtype=np.float32)[patients] + draw.normal(0, 0.01, (240, 60)).astype(np.float32))
    known = FeatureSet(x[:, None], x, torch.from_numpy(labels), ["a", "b"])
    tokens = TokenSet(x[:, None].half().numpy(), known.labels, known.classes, (1, 1), np.arange(240))
    for sets, score in (
        ((known, tokens), lambda found: found > 0.9),
        ((replace(known, groups=patients), replace(tokens, groups=patients)), lambda found: found < 0.8),
    ):
        assert score(fit_sweep(sets[0], epochs=20).held_out) and score(fit_probe(sets[1], queries=1).held_out)
    for i in range(8):
        Image.fromarray(np.full((24, 24, 3), 30 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("path,label,patient\n" + "".join(f"{i}.png,{i % 2},{i // 4}\n" for i in range(8)))
    (found,) = context.features(str(tmp_path / "t.csv"))
    with extract_tokens(context, str(tmp_path / "t.csv")) as (tokens,):
        for each in (found, tokens):
            assert each.groups is not None and len(set(each.groups[:4])) == 1
            assert np.array_equal(each.select(np.array([7, 0])).groups, each.groups[[7, 0]])


def test_the_linear_probe_approaches_scikit_learns_optimum() -> None:
    """Compare the loss of a long fit on overlapping classes with that of an unregularized logistic regression."""
    models = pytest.importorskip("sklearn.linear_model", reason="pip install scikit-learn: the probe is unchecked")
    labels = torch.arange(240) % 3
    x = standardize(torch.randn(240, 5) + torch.eye(5)[:3][labels])[0]
    (weights,) = fit(x, labels, 3, (RATES[-1],), epochs=400, batch=240, seed=0)
    logits = x @ weights[:, :-1].T + weights[:, -1]
    best = models.LogisticRegression(C=1e9, tol=1e-9, max_iter=10_000).fit(x.numpy(), labels.numpy())
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    optimum = -float(np.log(best.predict_proba(x.numpy())[np.arange(240), labels]).mean())
    assert optimum <= loss + 1e-6 and loss == pytest.approx(optimum, rel=0.01)
    agree = (logits.argmax(1).numpy() == best.predict(x.numpy())).mean()
    assert agree > 0.97


def test_folds_are_means_over_a_loop(context: EvalContext, tinted: Path) -> None:
    data = open_dataset(str(tinted))
    fold_of = assign_folds(data, 3, 2).part
    whole = extract_features(context.encoder, data)
    runs = []
    for i in range(3):
        train, test = (whole.select(np.flatnonzero(rows)) for rows in (fold_of != i, fold_of == i))
        runs.append(dict(evaluate_probe(fit_sweep(train, epochs=3), test, test.labels)))
    settings = LinearSettings(labelled=str(tinted), folds=3, split_seed=2, epochs=3)
    found = values_of("linear", context, settings)
    for key in ("top1", "balanced", "recall/a", "recall/c", "majority", "held_out"):
        values = [run[key] for run in runs]
        assert [found[f"{key}/fold/{i}"] for i in (1, 2, 3)] == pytest.approx(values)
        assert found[key] == pytest.approx(mean(values)) and found[f"{key}/std"] == pytest.approx(stdev(values))
    assert "setting/rate/fold/2" in found and "setting/rate" not in found and "top1/low" not in found
    assert context.console is not None
    assert "labeled data: 29 images of 3 classes" in context.console.file.getvalue()  # type: ignore[attr-defined]

    knn_values = values_of("knn", context, KnnSettings(labelled=str(tinted), folds=3, k=(1, 20)))
    assert {key.split("/")[0] for key in knn_values} == {"k1", "k20", "majority"}  # a limited k keeps its name
    attentive = values_of("attentive", context, AttentiveSettings(labelled=str(tinted), folds=2, epochs=1))
    assert {"top1", "top1/std", "top1/fold/2"} <= set(attentive) and context.images


def test_numbers_of_labels_are_means_over_the_same_draws(context: EvalContext, tinted: Path) -> None:
    """A class with fewer images uses all of them, and is named once."""
    settings = KnnSettings(labelled=str(tinted), split=0.5, shots="2,4,all", draws=3, k=(1, 20))
    found = values_of("knn", context, settings)
    resolved: Any = settings.resolved()
    assert not resolved.labelled
    train, test = (extract_features(context.encoder, open_dataset(source)) for source in resolved.sources)
    for count in (2, 4):
        accuracies = []
        for draw in range(3):
            chosen = train.select(draw_labels(train.labels.numpy(), count, 0, draw))
            assert np.bincount(chosen.labels).tolist() == [count, count, min(count, 3)]
            accuracies.append(dict(knn(chosen, test, (1,)))["k1/mean/top1"])
        key = f"shots/{count}/k1/mean/top1"
        assert found[key] == pytest.approx(mean(accuracies)) and found[f"{key}/draw/3"] == pytest.approx(accuracies[2])
    everything = dict(knn(train, test, (1,)))
    assert {key: found[f"shots/all/{key}"] for key in everything if key != "majority"} == pytest.approx(
        {key: value for key, value in everything.items() if key != "majority"}
    )
    assert found["majority"] == everything["majority"] and "shots/all/k1/mean/top1/low" in found
    assert context.console is not None
    text = context.console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("with 4 labels per class, 1 of 3 classes have fewer and use all: c 3") == 1
    assert "with 2 labels" not in text

    probe = values_of("linear", context, LinearSettings(TRAIN, TEST, shots="1,all", draws=2, epochs=2))
    whole = values_of("linear", context, LinearSettings(TRAIN, TEST, epochs=2))
    assert probe["shots/all/top1"] == pytest.approx(whole["top1"]) and "shots/1/top1/std" in probe


@pytest.mark.parametrize(
    ("name", "features"),
    [("vit", {"cls", "mean"}), ("swin", {"mean"}), ("convmae", {"mean"}), ("convnext", {"pooled", "mean"})],
)
def test_only_a_class_token_is_named_so(name: str, features: set[str], tiny_run: Make, tmp_path: Path) -> None:
    """The pooled vector of Swin and ConvMAE is the mean of the patch tokens; ConvNeXt pools before its norm."""
    model, side = {**OTHERS, "convnext": (ArchitectureConfig("simmim", "test_convnext"), 64)}[name]
    config = tiny_run(model=model, size=str(side))
    encoder = wrap_live_encoder(config, build_model(config).encoder, CPU, "fp32")
    values = values_of("knn", EvalContext(encoder, tmp_path), KnnSettings(TRAIN, TEST, k=(1,)))
    assert {key.split("/")[1] for key in values if key.startswith("k1/")} == features
    result = {"evaluation": "knn", "encoder": "trained", "settings": {}, "values": values}
    labels = " ".join(row.label for row in compare([ModelResults("run", [result])]).rows)
    assert ("class token" in labels, "pooled by the network" in labels) == ("cls" in features, "pooled" in features)


@pytest.mark.parametrize("name", ["vit", "beit", "convmae"])
def test_features_of_all_blocks_come_from_one_pass(name: str, tiny_run: Make, tmp_path: Path) -> None:
    """Compare each block with the encoder cut after it."""
    model, side = OTHERS[name]
    config = tiny_run(model=model, size=str(side))
    module: Any = build_model(config).encoder
    context = EvalContext(wrap_live_encoder(config, module, CPU, "fp32"), tmp_path)
    stack = "blocks3" if name == "convmae" else "blocks"
    blocks, data = getattr(module, stack), context.data("shapes:count=6,size=32")
    found = extract_block_features(context.encoder, data, range(len(blocks)))
    with extract_tokens(context, "shapes:count=6,size=32", range(len(blocks))) as tokens:
        assert len(found) == len(tokens) == len(blocks) and (len(blocks) > 1 or name == "convmae")
        for i, (features, each) in enumerate(zip(found, tokens, strict=True)):
            setattr(module, stack, blocks[: i + 1])
            cut = extract_features(context.encoder, data)
            torch.testing.assert_close(features.mean, cut.mean, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(features.vector[:, 0], cut.vector[:, -1], atol=1e-4, rtol=1e-4)
            pooled, _ = each.select(np.asarray([1, 4])).batch(np.asarray([1]), CPU)
            torch.testing.assert_close(pooled.mean(1), cut.mean[[4]], atol=5e-3, rtol=1e-2)
            setattr(module, stack, blocks)


def test_each_probe_is_evaluated_by_block(context: EvalContext) -> None:
    last = values_of("knn", context, KnnSettings(TRAIN, TEST))
    blocks = values_of("knn", context, KnnSettings(TRAIN, TEST, layers="all"))
    depth = len(context.encoder.module.blocks)  # type: ignore[arg-type]
    for key, value in last.items():
        assert blocks[key if key == "majority" else f"block/{depth}/{key}"] == pytest.approx(value)
    linear = values_of("linear", context, LinearSettings(TRAIN, TEST, layers="1", epochs=2))
    assert linear["block/1/setting/blocks"] == 1 and "block/2/top1" not in linear
    attentive = values_of("attentive", context, AttentiveSettings(TRAIN, TEST, layers=f"1,{depth}", epochs=1))
    assert {"block/1/top1", f"block/{depth}/top1"} <= set(attentive)
    assert (
        attentive[f"block/{depth}/top1"]
        == values_of("attentive", context, AttentiveSettings(TRAIN, TEST, epochs=1))["top1"]
    )


def test_a_model_is_compared_with_its_start_on_the_same_labels(product: Path, tinted: Path, tmp_path: Path) -> None:
    """Write the split, the lines and the figures; a model without a known start is evaluated alone."""
    encoder = product / "encoder"
    console = Console(file=io.StringIO(), width=200)
    folders, page = evaluate_to_folder(
        [product, encoder],
        "knn",
        tmp_path / "out",
        labelled=tinted,
        shots="2,all",
        draws=2,
        device="cpu",
        console=console,
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "without its start" in text and text.count("which image was in which part") == 2
    lines = gain_lines(folders)
    assert len(lines) == 4 and all(f" with {n}: " in "\n".join(lines) for n in ("2 labels per class", "all labels"))
    assert [" (start " in line for line in lines].count(True) == 2
    html = page.read_text()
    assert (
        lines[0] in html.replace("&#43;", "+")
        and "Accuracy against the number of labels per class, k-NN (k = 1)" in html
    )
    (split,) = (folders[0] / "evaluations").glob("split-*.csv")
    with open(split, newline="") as file:
        rows = list(csv.DictReader(file))
    for part in ("train", "test"):
        data = open_dataset(f"split:{part},share=0.8,seed=0:{tinted}")
        assert [row["path"] for row in rows if row["part"] == part] == [data.path_of(i) for i in range(len(data))]
    assert {row["class"] for row in rows} == {"a", "b", "c"} and len(rows) == 29


def test_the_python_call_splits_labeled_data(product: Path, tinted: Path) -> None:
    parts = {side: f"split:{side},share=0.5,seed=3:{tinted}" for side in ("train", "test")}
    quiet: Any = {"device": "cpu", "console": Console(quiet=True)}
    found = pixmim.evaluate(product, "knn", labelled=tinted, split=0.5, split_seed=3, **quiet)
    assert found == pixmim.evaluate(product, "knn", **parts, **quiet)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--train and --test must be given together"),
        ({"train": "a"}, "--train and --test must be given together"),
        ({"train": "a", "test": "b", "labelled": "c"}, "--train and --test must be given together"),
        ({"labelled": "a", "split": 1.0}, "--split must be a number above 0 and below 1, not 1"),
        ({"labelled": "a", "split": 0.0}, "--split must be a number above 0"),
        ({"labelled": "a", "folds": 1}, "--folds 1 .* at least 2 folds"),
        ({"train": "a", "test": "b", "folds": 5}, "--folds 5 needs --labelled"),
        ({"labelled": "a", "folds": 5, "shots": "1"}, "--shots 1 excludes --folds"),
        ({"labelled": "a", "layers": "1", "shots": "1"}, "--shots 1 excludes --layers"),
        ({"labelled": "a", "shots": "0,5"}, "--shots must be numbers of labels from 1 on, or all, not 0,5"),
        ({"labelled": "a", "shots": "ten"}, "--shots must be numbers such as 10,100,all, not 'ten'"),
        ({"labelled": "a", "layers": "last"}, "--layers must be all, or numbers of blocks"),
        ({"labelled": "a", "protocol": "mae", "folds": 2}, "--protocol mae .* leave out --folds"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LinearSettings(**settings)


def test_data_and_encoders_that_do_not_suit(context: EvalContext, tinted: Path, tiny_run: Make, tmp_path: Path) -> None:
    def refusal(name: str, settings: LabeledSettings, context: EvalContext = context) -> str:
        with pytest.raises(UserError) as caught:
            EVALUATIONS[name].check(context, settings.resolved())
        return str(caught.value)

    assert "--folds 6: class 'c'" in refusal("knn", KnnSettings(labelled=str(tinted), folds=6))
    alone = refusal("linear", LinearSettings(labelled=f"{tinted},include=a/*"))
    assert alone.startswith(f"train part of {tinted},include=a/* (share 0.8, seed 0) has a single class, 'a'")
    assert "a single class, 'a'" in refusal("linear", LinearSettings(labelled=f"{tinted},include=a/*", folds=2))
    (tinted / "l.csv").write_text("path,finding\na/00.png,x\nb/00.png,y\n")
    assert ",label=COLUMN" in refusal("finetune", FinetuneSettings(labelled=f"{tinted}/l.csv"))
    assert "leave out split:" in refusal("knn", KnnSettings(labelled=f"split:train:{tinted}"))
    assert "--labelled takes one source" in refusal("knn", KnnSettings(labelled=f"{tinted}+{tinted}"))
    depth = len(context.encoder.module.blocks)  # type: ignore[arg-type]
    assert f"blocks 1 to {depth}" in refusal("attentive", AttentiveSettings(TRAIN, TEST, layers=f"1,{depth + 1}"))
    assert f"blocks 1 to {depth}" in refusal("knn", KnnSettings(TRAIN, TEST, layers="0"))
    model, side = OTHERS["swin"]
    config = tiny_run(model=model, size=str(side))
    swin = EvalContext(wrap_live_encoder(config, build_model(config).encoder, CPU, "fp32"), tmp_path)
    assert "--layers all: the encoder has comparable features of its last block only" in refusal(
        "knn", KnnSettings(TRAIN, TEST, layers="all"), swin
    )
    with pytest.raises(UserError, match="--folds 5 excludes --finetune"):
        EvaluateAllSettings(labelled=str(tinted), folds=5, finetune=True)
    parts = EvaluateAllSettings(labelled=str(tinted), folds=5).parts()
    assert [name for name, _ in parts] == ["knn", "linear", "attentive"] and all(s.folds == 5 for _, s in parts)
