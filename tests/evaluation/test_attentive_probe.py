"""Test the attentive probe against loops in float64, and its patch tokens against the bare encoders."""

import io
import math
import shutil
from collections import namedtuple
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

from helpers.models import OTHERS, TINY
from pixmim.build import build_model
from pixmim.config import PretrainConfig
from pixmim.evaluation.attentive_probe import RATES, AttentiveProbe, fit, fit_probe, load_probe, predict, usable_queries
from pixmim.evaluation.context import EvalContext, FeatureSet
from pixmim.evaluation.evals import EVALS
from pixmim.evaluation.evaluate import EVALUATIONS
from pixmim.evaluation.frozen_encoder import wrap_live_encoder
from pixmim.evaluation.linear_probe import evaluate_probe, fit_sweep
from pixmim.evaluation.patch_tokens import TokenSet, extract_tokens
from pixmim.evaluation.settings import AttentiveSettings
from pixmim.models.convmae import ConvMAEEncoder
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.utils.initialization import seeded

Make = Callable[..., PretrainConfig]
TRAIN, TEST = "shapes:count=30,size=32", "shapes:count=20,size=32,seed=1"
CPU = torch.device("cpu")

NO_TOKEN: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
VIT = OTHERS["vit"][0]
ENCODERS = {**OTHERS, "vit without class token": (replace(VIT, options={**TINY, **NO_TOKEN}), 32)}


def tokens_of(images: int, seed: int, classes: int = 4, patches: int = 9, width: int = 16) -> TokenSet:
    """Make tokens of which one, at any position and with a mark, shows the class; the others show random classes."""
    draw = np.random.default_rng(seed)
    shown = draw.integers(0, classes, (images, patches))
    place = draw.integers(0, patches, images)
    x = 0.3 * draw.standard_normal((images, patches, width)) + 3 * np.eye(width)[shown]
    x[np.arange(images), place, classes] += 3
    labels = torch.from_numpy(shown[np.arange(images), place])
    names = [f"class {i}" for i in range(classes)]
    return TokenSet(x.astype(np.float16), labels, names, (3, patches // 3), np.arange(images))


def context_of(config: PretrainConfig, folder: Path, **options: Any) -> EvalContext:
    encoder = wrap_live_encoder(config, build_model(config).encoder, CPU, "fp32")
    return EvalContext(encoder, folder, **options)


@pytest.fixture
def context(tiny_run: Make, tmp_path: Path) -> EvalContext:
    return context_of(tiny_run(seed=5), tmp_path, console=Console(file=io.StringIO(), width=300))


def test_probe_against_loops() -> None:
    """Attend, multiply by the full W and split its channels, in float64, token by token."""
    width, queries, classes = 12, 4, 3
    with seeded(1):
        probe = AttentiveProbe(width, classes, queries).double()
        probe.norm.running_mean.normal_()  # type: ignore[union-attr, operator]
        probe.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        x = 3 * torch.randn(2, 5, width, dtype=torch.float64)
    found = probe.requires_grad_(False).eval()(x)
    weight = torch.cat(list(probe.values), dim=1)  # W, (d d): one block of columns for each query
    for i in range(2):
        pooled = []
        for q in range(queries):
            scores = [math.exp(float(x[i, n] @ probe.queries[q]) / math.sqrt(width)) for n in range(5)]
            for channel in range(q * width // queries, (q + 1) * width // queries):
                values = [sum(float(x[i, n, k] * weight[k, channel]) for k in range(width)) for n in range(5)]
                pooled.append(sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores))
        mean, variance = probe.norm.running_mean, probe.norm.running_var
        normed = [(p - float(mean[k])) / math.sqrt(float(variance[k]) + 1e-5) for k, p in enumerate(pooled)]  # type: ignore[index]
        for c in range(classes):
            logit = sum(float(w) * v for w, v in zip(probe.head.weight[c], normed, strict=True))
            assert float(found[i, c]) == pytest.approx(logit + float(probe.head.bias[c]), abs=1e-10)


def test_each_learning_rate_is_fitted_as_if_alone() -> None:
    """Compare with one AdamW and its own schedule per rate; 20 rows make one step of 16 and parts of the next ones."""
    data, rows = tokens_of(40, seed=0), np.arange(3, 23)
    found = fit(data, rows, RATES[1:3], queries=4, epochs=4, seed=7)
    order = np.concatenate([rows[rng.permutation(7, 1 + epoch, 20)] for epoch in range(4)])
    for probe, rate in zip(found, RATES[1:3], strict=True):
        with seeded(7):
            alone = AttentiveProbe(16, 4, 4)
        optimizer = torch.optim.AdamW(alone.parameters(), weight_decay=0.01)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 5))
            selected = torch.from_numpy(order[16 * step : 16 * step + 16])
            optimizer.zero_grad()
            F.cross_entropy(alone(torch.from_numpy(data.tokens).float()[selected]), data.labels[selected]).backward()
            optimizer.step()
        for one, other in zip(probe.state_dict().values(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_it_finds_a_class_that_one_patch_shows_where_the_linear_probe_does_not() -> None:
    train, test = tokens_of(300, seed=0), tokens_of(200, seed=1)
    probe = fit_probe(train, queries=4, epochs=20)
    (predicted,) = predict([probe.module], test, np.arange(200))
    attentive = 100 * float((predicted == test.labels).double().mean())

    def features(data: TokenSet) -> FeatureSet:
        mean = torch.from_numpy(data.tokens).float().mean(dim=1)
        return FeatureSet(mean[:, None], mean, data.labels, data.classes)

    linear = dict(evaluate_probe(fit_sweep(features(train), epochs=20), features(test), test.labels))
    assert attentive > 90 and probe.held_out > 0.9
    assert linear["top1"] < 60


def test_the_rate_is_chosen_on_the_images_that_the_linear_probe_holds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], int]] = []

    def record(data: TokenSet, rows: np.ndarray, rates: tuple[float, ...], **options: Any) -> list[AttentiveProbe]:
        seen.append((rows.tolist(), len(rates)))
        return fit(data, rows, rates, **options)

    monkeypatch.setattr("pixmim.evaluation.attentive_probe.fit", record)
    probe = fit_probe(tokens_of(30, seed=0), queries=4, epochs=1, seed=3)
    held_out = set(rng.permutation(3, 0, 30)[:3].tolist())
    assert seen == [(sorted(set(range(30)) - held_out), len(RATES)), (list(range(30)), 1)]
    assert not probe.module.training and probe.held_out in (0, 1 / 3, 2 / 3, 1)


@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_are_those_of_the_bare_encoder(name: str, tiny_run: Make, tmp_path: Path) -> None:
    """Compare with `forward_features`, without prefix tokens, in batches of another size; no file is left."""
    model, side = ENCODERS[name]
    context = context_of(tiny_run(model=model, size=str(side)), tmp_path)
    encoder, data = context.encoder, context.data(TEST)
    with extract_tokens(context, TEST, batch=7) as (found,), torch.no_grad():
        images = torch.stack([evaluation_crop(encoder.size).crop(data.image(i)) for i in range(20)])
        module: Any = encoder.module.eval()
        if isinstance(module, ConvMAEEncoder):
            expected = module.norm(module.blocks3(module.stages(encoder.preprocess(images))[-1]))
        else:
            expected = module.forward_features(encoder.preprocess(images))
            expected = expected.flatten(1, 2) if expected.ndim == 4 else expected[:, module.num_prefix_tokens :]
        assert found.tokens.dtype == np.float16 and math.prod(found.grid) == found.tokens.shape[1]
        tokens, _ = found.batch(np.arange(20), CPU)
        torch.testing.assert_close(tokens, expected, atol=3e-3, rtol=1e-3)
        assert found.labels.tolist() == np.asarray(data.labels).tolist() and found.indices.tolist() == list(range(20))
        if "without" in name:
            assert module.cls_token is None
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_yields_metrics_and_draws_queries(context: EvalContext) -> None:
    settings = AttentiveSettings(TRAIN, TEST, queries=5, epochs=2)
    context.encoder.module.train()
    found = dict(EVALUATIONS["attentive"].run(context, settings))
    assert context.encoder.module.training
    names = {"top1", "top1/low", "top1/high", "balanced", "majority", "held_out", "setting/rate", "setting/queries"}
    names.add("setting/chosen_by_balanced")
    assert {name for name in found if not name.startswith("recall/")} == names
    assert found["top1/low"] <= found["top1"] <= found["top1/high"]
    assert found["majority"] == 100 * np.bincount(np.asarray(context.data(TEST).labels)).max() / 20
    assert found["setting/queries"] == 4 and found["setting/rate"] in RATES
    assert "4 queries: 5 do not divide the width of 32" in context.console.file.getvalue()  # type: ignore[union-attr]
    (sheet,) = context.images.values()
    assert sheet.width > 5 * 112 and sheet.height > 6 * 112  # the image and four queries, of six images
    (file,) = (path for path in context.folder.rglob("*") if path.is_file())  # no tokens
    assert load_probe(file)[1] == context.data(TRAIN).classes
    assert dict(EVALUATIONS["attentive"].run(context, settings)) == found


def test_unreadable_images_are_left_out_and_classes_matched_by_name(context: EvalContext, tmp_path: Path) -> None:
    """Skip one image; the test data lack a class, so that their labels have other numbers."""
    for name, classes in (("train", "abc"), ("test", "bc")):
        for i in range(8):
            path = tmp_path / "data" / name / classes[i % len(classes)] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i * 30, 255 - i * 30, 0)).save(path)
    (tmp_path / "data/test/b/0.png").write_bytes(b"no picture")
    data = [str(tmp_path / "data" / name) for name in ("train", "test")]
    found = dict(EVALUATIONS["attentive"].run(context, AttentiveSettings(data[0], data[1], epochs=1)))
    assert {name for name in found if name.startswith("recall/")} == {"recall/b", "recall/c"}
    assert found["majority"] == pytest.approx(100 * 4 / 7)
    assert "0.png" in (tmp_path / "evaluations-skipped.csv").read_text()


def test_what_cannot_be_fitted_is_refused_before_the_work(
    context: EvalContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = EVALUATIONS["attentive"].check
    for name in "ab":
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "two" / name / "1.png")
    with pytest.raises(UserError, match="at least 3 train images"):
        check(context, AttentiveSettings(str(tmp_path / "two"), str(tmp_path / "two")))
    with pytest.raises(UserError, match="--queries"):
        EVALS["attentive"].settings(TRAIN, TEST, queries=0)
    usage = namedtuple("usage", ["total", "used", "free"])
    needed = 50 * 16 * 32 * 2  # images, patches, width, bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    check(context, AttentiveSettings(TRAIN, TEST))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(UserError, match=r"50 images need .*--out.*--no-attentive"):
        check(context, AttentiveSettings(TRAIN, TEST))


def test_tokens_beyond_float16_are_refused(context: EvalContext, tmp_path: Path) -> None:
    module: Any = context.encoder.module
    module.norm.weight.data.fill_(1e6)
    with pytest.raises(UserError, match=r"patch tokens of .* are not finite"), extract_tokens(context, TRAIN):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("queries", "width", "used"), [(32, 768, 32), (32, 100, 25), (5, 32, 4), (64, 24, 24)])
def test_queries_divide_the_width(queries: int, width: int, used: int) -> None:
    assert usable_queries(queries, width) == used
