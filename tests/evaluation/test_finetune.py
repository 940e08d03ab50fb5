"""Test fine-tuning and MAE's probe on synthetic shapes with tiny encoders, and their bitwise resume."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

from helpers.evaluated import evaluate
from helpers.interrupt import Stopped
from helpers.models import CNNS
from pixmim import load_encoder
from pixmim.build import build_encoder, build_model
from pixmim.config import ArchitectureConfig, ModelConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.data import open_dataset
from pixmim.data.loader import Batch
from pixmim.evaluation import finetune
from pixmim.evaluation import linear_probe_mae as probe
from pixmim.evaluation import settings as settings_module
from pixmim.evaluation.classification import evaluate_classifier, open_labeled
from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.finetune.model import build, classifier_config, load_encoder_weights
from pixmim.evaluation.finetune.recipes import FINETUNE_RECIPES, Recipe, apply_overrides, choose
from pixmim.evaluation.frozen_encoder import load_frozen_encoder
from pixmim.evaluation.results import Result
from pixmim.evaluation.settings import FinetuneOverrides, FinetuneSettings, LinearSettings
from pixmim.recipes import get_recipe
from pixmim.training import trainer
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.weights.save import save_encoder

Make = Callable[..., PretrainConfig]
TRAIN, TEST = "shapes:count=60,size=32", "shapes:count=40,size=32,seed=1"
SHORT = FinetuneOverrides(epochs=1, batch_size=20, base_lr=0.01)

METHODS = {
    "mae": ArchitectureConfig(backbone="vit_tiny_patch16_224", decoder_dim=16, decoder_depth=1, decoder_heads=2),
    "convmae": ArchitectureConfig("convmae", "convmae_tiny", 16, 1, 2),
    "simmim-vit": ArchitectureConfig("simmim", "beit_base_patch16_224"),
    "simmim-swin": ArchitectureConfig("simmim", "swin_tiny_patch4_window7_224"),
    **CNNS,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mae": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "convmae": {"embed_dim": [8, 12, 24], "depth": [1, 1, 2], "num_heads": 2},
    "simmim-vit": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "simmim-swin": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
    **{name: model.options for name, model in CNNS.items()},
}


@pytest.fixture
def product(tiny_run: Make, tmp_path: Path) -> Callable[[str], Path]:
    """Make the folder of a finished run of a method, with its initial encoder."""

    def make(method: str = "mae") -> Path:
        run = tiny_run(seed=5, model=replace(METHODS[method], options=OPTIONS[method]))
        folder = tmp_path / method
        folder.mkdir()
        (folder / "config.json").write_text(to_json(run))
        save_encoder(build_model(run).encoder, folder / "encoder", run, step=7)
        return folder

    return make


def measured(folder: Path, settings: FinetuneSettings | LinearSettings, **options: Any) -> Result:
    name = "finetune" if isinstance(settings, FinetuneSettings) else "linear"
    (result,) = evaluate(str(folder), [(name, settings)], folder, device="cpu", precision="fp32", **options)
    return result


def context_of(folder: Path) -> EvalContext:
    return EvalContext(load_frozen_encoder(str(folder), device="cpu", precision="fp32"), folder)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_kind_of_encoder(product: Callable[[str], Path], method: str) -> None:
    folder = product(method)
    result = measured(folder, FinetuneSettings(TRAIN, TEST, changes=SHORT))
    names = [name for name in result.values if not name.startswith("recall/")]
    assert names == ["top1", "top1/low", "top1/high", "balanced", "top5", "loss", "majority"]
    assert result.values["top5"] >= result.values["top1"] >= result.values["top1/low"]
    assert not (folder / "unfinished").exists()  # no checkpoint remains

    with safe_open(folder / "classifier/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == open_dataset(TRAIN).classes
    context = context_of(folder)
    again = load_encoder(folder / "classifier/model.safetensors")
    data = open_labeled(context, TRAIN, TEST)
    assert dict(evaluate_classifier(context, data, context.encoder, (32, 32), again)) == pytest.approx(result.values)


def test_a_classifier_is_replaced_only_with_overwrite(
    product: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reuse the classifier of the same settings; refuse others before training, naming the difference."""
    folder, calls, really = product("mae"), list[int](), finetune.Trainer
    monkeypatch.setattr(finetune, "Trainer", lambda *a, **b: (calls.append(1), really(*a, **b))[1])
    same = FinetuneSettings(TRAIN, TEST, changes=SHORT)
    weights = folder / "classifier/model.safetensors"
    first, kept = measured(folder, same).values, weights.read_bytes()
    assert measured(folder, same).values == first and calls == [1]
    fewer = measured(folder, replace(same, test="shapes:count=30,size=32,seed=2", threads=1))
    assert calls == [1] and fewer.values["loss"] != first["loss"]  # other test data, the same classifier
    for other, words in (
        (replace(same, seed=1, changes=replace(SHORT, epochs=2)), "--epochs, --seed"),
        (replace(same, train="shapes:count=50,size=32"), "--train"),
        (replace(same, recipe="convmae-base", changes=replace(SHORT, mixup=0)), "--mixup"),
    ):
        with pytest.raises(UserError, match=f"exists, fine-tuned with another {words}: .* or add --overwrite"):
            measured(folder, other)
    assert calls == [1] and weights.read_bytes() == kept and not (folder / "unfinished").exists()
    measured(folder, replace(same, seed=1), overwrite=True)
    assert len(calls) == 2 and weights.read_bytes() != kept
    with pytest.raises(UserError, match="another --seed"):
        measured(folder, same)
    assert measured(folder, same, overwrite=True).values == first
    for _ in range(2):
        measured(folder, same, untrained=True)  # in a folder of its own
    assert len(calls) == 4
    assert {path.name for path in folder.glob("classifier*")} == {"classifier", "classifier-untrained"}


def test_other_files_in_the_folder_are_refused(product: Callable[[str], Path]) -> None:
    folder, settings = product("mae"), FinetuneSettings(TRAIN, TEST, changes=SHORT)
    classifier = folder / "classifier"
    classifier.mkdir()
    measured(folder, settings)  # an empty folder is free
    plain = (folder / "encoder/model.safetensors").read_bytes()
    for name, content, words in (
        ("notes.txt", b"mine", "is not a finished classifier"),
        ("config.json", b"{}", "is not a finished classifier"),
        ("model.safetensors", plain, "does not contain how it was fine-tuned"),
        ("model.safetensors", b"?", "cannot be read.* exists"),
    ):
        shutil.rmtree(classifier)
        classifier.mkdir()
        (classifier / name).write_bytes(content)
        with pytest.raises(UserError, match=f"(?s){words}.*--overwrite"):
            measured(folder, settings)
        assert [(path.name, path.read_bytes()) for path in classifier.iterdir()] == [(name, content)]
    work = finetune.check_finetune(replace(context_of(folder), overwrite=True), settings).work
    shutil.rmtree(classifier)
    classifier.mkdir()
    (classifier / "config.json").write_text("{}")
    work.mkdir(parents=True)  # interrupted after config.json, before the weights
    assert measured(folder, settings).values and (classifier / "model.safetensors").is_file()


def test_timm_loads_the_classifier_strictly(product: Callable[[str], Path]) -> None:
    folder = product("mae")
    measured(folder, FinetuneSettings(TRAIN, TEST, changes=SHORT))
    model: Any = timm.create_model(f"local-dir:{folder}/classifier", pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), load_encoder(folder / "classifier")(x))
    assert model.pretrained_cfg["label_names"] == open_dataset(TRAIN).classes


def test_a_trained_classifier_beats_chance(product: Callable[[str], Path], tmp_path: Path) -> None:
    """Learn three colors in seconds by fine-tuning and MAE's probe, with all augmentation that keeps colors."""
    for part, seed in (("train", 0), ("test", 1)):
        drawn = open_dataset(f"shapes:count=60,size=32,seed={seed}")
        for index in range(len(drawn)):
            color = index % 3
            pixels = drawn.image(index).float()
            pixels[[c for c in range(3) if c != color]] *= 0.5
            folder = tmp_path / part / ("red", "green", "blue")[color]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(pixels.to(torch.uint8)).save(folder / f"{index}.png")
    sets = str(tmp_path / "train"), str(tmp_path / "test")
    folder = product("mae")
    changes = FinetuneOverrides(epochs=15, batch_size=12, base_lr=0.04, augment="none")
    tuned = measured(folder, FinetuneSettings(*sets, changes=changes)).values
    assert tuned["top1/low"] > 60 and "top5" not in tuned
    probe = LinearSettings(*sets, protocol="mae", epochs=25, batch_size=12, base_lr=20.0, feature="mean")
    assert measured(folder, probe).values["mae/top1/low"] > 100 / 3


@pytest.mark.parametrize(
    ("settings", "after"),
    [
        (
            FinetuneSettings(
                TRAIN, TEST, accumulation_steps=2, changes=replace(SHORT, epochs=3, average=0.9, drop_path=0.3)
            ),
            4,
        ),
        (FinetuneSettings(TRAIN, TEST, from_scratch=True, changes=replace(SHORT, epochs=3)), 4),
        (LinearSettings(TRAIN, TEST, protocol="mae", epochs=3, batch_size=20), 4),
    ],
)
def test_an_interrupted_training_resumes_bitwise(
    product: Callable[[str], Path], tmp_path: Path, settings: Any, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume past an epoch with drop path, mixup, erasing, EMA, AdamW, LAMB and LARS."""
    folder = product("mae")
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    complete = measured(folder, settings)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PreemptionHandler", Stopped)
        patch.setattr(Stopped, "after", after)
        with pytest.raises(KeyboardInterrupt):
            measured(broken, settings)
    (checkpoint,) = (broken / "unfinished").glob("*/checkpoints/step-*")
    assert 3 < int(checkpoint.name.removeprefix("step-")) < 9
    assert measured(broken, settings).values == complete.values
    for path in folder.glob("classifier/model.safetensors"):
        state, resumed = load_file(path), load_file(broken / path.relative_to(folder))
        assert all(torch.equal(state[name], resumed[name]) for name in state)


def test_the_loss_by_hand(product: Callable[[str], Path]) -> None:
    """Compare with smoothed cross-entropy without mixup; with mixup, the loss is a function of (seed, number)."""
    context = context_of(product("mae"))
    settings = FinetuneSettings(TRAIN, TEST, accumulation_steps=1)
    data = open_labeled(context, TRAIN, TEST)
    plain = replace(FINETUNE_RECIPES["mae-vit-base"], mixup=0, cutmix=0, erase=0, batch_size=8, drop_path=0)
    model = build(classifier_config(context.encoder.config, context.encoder.module, 10, "mean", ""), 0.0, 0.02, seed=0)

    def loss(batch: Batch, number: int, recipe: Recipe = plain) -> torch.Tensor:
        return finetune.compute_loss(model, batch, number, context.encoder, recipe, data, settings.seed)

    with finetune.open_loader(context, settings, plain, data.train, (32, 32), 2) as loader:
        batch = next(loader)
        x = flip_and_normalize(batch.images, batch.flip, context.encoder.mean, context.encoder.std)
        labels = torch.from_numpy(data.train.labels)[batch.indices]  # type: ignore[arg-type]
        expected = F.cross_entropy(model(x), labels, label_smoothing=0.1)
        torch.testing.assert_close(loss(batch, 2), expected)
        copy = Batch(batch.images.clone(), batch.flip.clone(), batch.indices.clone())
    mixed = replace(plain, mixup=0.8, cutmix=1.0, erase=0.5)
    assert torch.equal(loss(copy, 2, mixed), loss(copy, 2, mixed))
    assert not torch.equal(loss(copy, 2, mixed), loss(copy, 3, mixed))


def test_binary_cross_entropy_counts_every_class_present() -> None:
    scores, targets = torch.randn(2, 3), torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    present = [[1, 1, 0], [0, 0, 1]]
    slow = -sum(
        float(F.logsigmoid(s if y else -s)) for ss, ys in zip(scores, present, strict=True)
        for s, y in zip(ss, ys, strict=True)
    )  # fmt: skip
    assert float(finetune.classification_loss(scores, targets, "bce")) == pytest.approx(slow / 6)


def test_the_average_follows_the_weights() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    averaged = finetune.Averaged(model, 0.75)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        averaged.update()
    assert averaged.result.weight.tolist() == [[0.25 * 0.75 + 0.5] * 2]  # type: ignore[union-attr, operator]
    assert finetune.Averaged(model, 0.0).result is model

    norm = nn.BatchNorm1d(1, momentum=1.0)  # its running mean is that of the last batch
    averaged = finetune.Averaged(norm, 0.75)
    for value in (1.0, 2.0):
        norm(torch.full((4, 1), value))
        averaged.update()
    assert averaged.result.running_mean.item() == 0.25 * 0.75 + 0.5  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_classifier_is_initialized_from_the_encoder(product: Callable[[str], Path], method: str) -> None:
    encoder = load_frozen_encoder(str(product(method)), device="cpu", precision="fp32")
    run = classifier_config(encoder.config, encoder.module, 10, "mean", "")
    classifier = build(run, 0.1, 2e-5, seed=0)
    assert load_encoder_weights(classifier, run, encoder.module, encoder.config) == []
    source, state = encoder.module.state_dict(), classifier.state_dict()
    new = {name for name in state if name not in source}
    tables = {name for name in new if "relative_position_bias_table" in name}
    prefixes = {"resnet": "fc.", "convnext": "head.fc."}.get(method, ("head.", "fc_norm."))
    assert all(name.startswith(prefixes) for name in new - tables)
    assert all(torch.equal(state[name], source[name]) for name in state.keys() & source.keys())
    if method == "simmim-vit":  # the shared table, once for each block
        assert len(tables) == 2
        shared = source["rel_pos_bias.relative_position_bias_table"]
        assert all(torch.equal(state[name], shared) for name in tables)
    head = next(value for name, value in state.items() if name.startswith(prefixes) and value.ndim == 2)
    assert 1e-5 < head.std() < 3e-5 and all(p.requires_grad for p in classifier.parameters())
    drops = [m.drop_prob for m in classifier.modules() if type(m).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(0.1)


@pytest.mark.parametrize("method", list(METHODS))
def test_another_size(product: Callable[[str], Path], method: str) -> None:
    encoder = load_frozen_encoder(str(product(method)), device="cpu", precision="fp32")
    run = classifier_config(encoder.config, encoder.module, 10, "mean", "64")
    classifier = build(run, 0.0, 2e-5, seed=0)
    lines = load_encoder_weights(classifier, run, encoder.module, encoder.config)
    assert any("interpolated" in line for line in lines) == (method not in CNNS)
    assert classifier(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    if method == "simmim-swin":
        assert run.model.options["window_size"] == 8


def test_pooling_the_class_token(product: Callable[[str], Path]) -> None:
    vit, swin = (load_frozen_encoder(str(product(m)), device="cpu") for m in ("mae", "simmim-swin"))
    run = classifier_config(vit.config, vit.module, 10, "cls", "")
    classifier = build(run, 0.0, 2e-5, seed=0)
    load_encoder_weights(classifier, run, vit.module, vit.config)
    assert torch.equal(classifier.norm.weight, vit.module.norm.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(UserError, match="no class token"):
        classifier_config(swin.config, swin.module, 10, "cls", "")


def test_from_scratch_is_deit_threes_with_either_crop(product: Callable[[str], Path]) -> None:
    folder = product("mae")
    found = [
        measured(
            folder, FinetuneSettings(TRAIN, TEST, from_scratch=True, changes=replace(SHORT, crop=crop)), overwrite=True
        )
        for crop in ("random-resized", "simple-resized")
    ]
    assert found[0].values != found[1].values
    assert (folder / "classifier-from-scratch/model.safetensors").exists() and not (
        folder / "classifier/model.safetensors"
    ).exists()


def test_overrides_replace_the_values_of_a_recipe() -> None:
    assert all(value is not None for recipe in FINETUNE_RECIPES.values() for value in vars(recipe).values())
    assert all(name in Path(settings_module.__file__).read_text() for name in FINETUNE_RECIPES)  # the help of --recipe
    changed = apply_overrides(FINETUNE_RECIPES["mae-vit-base"], FinetuneOverrides(epochs=3, clip=1.0))
    assert (changed.epochs, changed.clip, changed.layer_decay) == (3, 1.0, 0.65)
    with pytest.raises(UserError, match=r"--layer-decay must be a number from 0.001 to 1, not 2"):
        FinetuneOverrides(layer_decay=2)
    with pytest.raises(UserError, match="add --smoothing 0"):
        apply_overrides(changed, FinetuneOverrides(loss="bce"))
    with pytest.raises(UserError, match="--scale is two shares"):
        apply_overrides(changed, FinetuneOverrides(scale=(1.0, 0.5)))


def test_published_numbers() -> None:
    peak = {name: r.base_lr * r.batch_size / 256 for name, r in FINETUNE_RECIPES.items()}
    assert peak["mae-vit-base"] == 2e-3 and peak["simmim-vit-base"] == 5e-3 and peak["deit3-vit-base"] == 3e-3
    table = {name: (r.epochs, r.warmup, r.layer_decay, r.drop_path, r.clip) for name, r in FINETUNE_RECIPES.items()}
    assert table == {
        "mae-vit-base": (100, 5, 0.65, 0.1, 0),
        "mae-vit-large": (50, 5, 0.75, 0.2, 0),
        "mae-vit-huge": (50, 5, 0.75, 0.3, 0),
        "convmae-base": (100, 5, 0.65, 0.1, 0),
        "simmim-swin-base-100": (100, 20, 0.9, 0.1, 5),
        "simmim-swin-base-800": (100, 20, 0.8, 0.1, 5),
        "simmim-swin-large": (100, 20, 0.7, 0.2, 5),
        "simmim-vit-base": (100, 20, 0.65, 0.1, 5),
        "a2mim-resnet": (300, 5, 1, 0.05, 1),
        "a2mim-convnext-tiny": (400, 5, 0.7, 0.1, 0),
        "a2mim-convnext-small": (300, 5, 1, 0.4, 0),
        "a2mim-convnext-base": (300, 5, 1, 0.5, 0),
        "deit3-vit-base": (800, 5, 1, 0.2, 1),
    }
    decays = {"a2mim-resnet": 0.02, "a2mim-convnext-tiny": 0.01}
    assert {name: r.weight_decay for name, r in FINETUNE_RECIPES.items() if r.weight_decay != 0.05} == decays
    rates = {"a2mim-resnet": 5e-3, "a2mim-convnext-tiny": 4e-4, "a2mim-convnext-base": 4e-3}
    assert {name: peak[name] for name in rates} == pytest.approx(rates)


@pytest.mark.parametrize(
    ("recipe", "tuning"),
    [
        ("pixmim-vit-base-300", "mae-vit-base"),
        ("mae-vit-large", "mae-vit-large"),
        ("convmae-base", "convmae-base"),
        ("simmim-swin-base", "simmim-swin-base-100"),
        ("pixmim-simmim-swin-base-800", "simmim-swin-base-800"),
        ("simmim-swin-large-800", "simmim-swin-large"),
        ("simmim-vit-base", "simmim-vit-base"),
        ("simmim-resnet50", "a2mim-resnet"),
        ("simmim-convnext-base", "a2mim-convnext-base"),
    ],
)
def test_auto_goes_by_method_and_backbone(recipe: str, tuning: str) -> None:
    run = get_recipe(recipe)
    with torch.device("meta"):
        encoder = build_encoder(run)
    assert choose("auto", run, encoder, from_scratch=False) == tuning
    from_scratch = tuning if tuning.startswith("a2mim") else "deit3-vit-base"
    assert choose("auto", run, encoder, from_scratch=True) == from_scratch
    assert choose("mae-vit-huge", run, encoder, from_scratch=True) == "mae-vit-huge"
    with pytest.raises(UserError, match="did you mean 'convmae-base'"):
        choose("convmae", run, encoder, from_scratch=False)


def test_a_swin_of_unknown_training_needs_a_recipe() -> None:
    recipe = get_recipe("simmim-swin-base")
    config = ModelConfig(model=recipe.model, size=recipe.size)
    with torch.device("meta"):
        encoder = build_encoder(config)
    with pytest.raises(UserError, match="--recipe simmim-swin-base-800"):
        choose("auto", config, encoder, from_scratch=False)
    assert choose("simmim-swin-base-800", config, encoder, from_scratch=False) == "simmim-swin-base-800"


def test_unsuitable_data_are_refused(product: Callable[[str], Path], pictures: Path) -> None:
    folder = product("mae")

    def run(train: Path, test: Path, **changes: Any) -> None:
        measured(folder, FinetuneSettings(str(train), str(test), **changes))

    less, more = Path(shutil.copytree(pictures, folder / "less")), Path(shutil.copytree(pictures, folder / "more"))
    shutil.rmtree(less / "dogs")
    shutil.copytree(more / "dogs", more / "cows")
    with pytest.raises(UserError, match="a class 'cows', which is not one of"):
        run(pictures, more)
    with pytest.raises(UserError, match="a single class, 'cats'"):
        run(less, less)
    with pytest.raises(UserError, match="has no labels"):
        run(pictures / "cats", pictures)
    with pytest.raises(UserError, match="does not divide into --accumulation-steps 3 equal parts"):
        run(pictures, pictures, accumulation_steps=3)
    with pytest.raises(UserError, match="36x36"):
        run(pictures, pictures, size="36")
    measured(
        folder, LinearSettings(str(pictures), str(pictures), protocol="mae", epochs=1)
    )  # a batch is cut to 10 images
    with pytest.raises(UserError, match="--batch-size must be an integer from 2"):
        measured(folder, LinearSettings(str(pictures), str(pictures), protocol="mae", batch_size=1))


def test_the_probe_uses_the_final_norm_of_the_frozen_encoder(product: Callable[[str], Path]) -> None:
    context = context_of(product("mae"))
    x = torch.randn(3, 3, 32, 32)
    tokens = context.encoder.module.forward_features(x)  # type: ignore[operator]
    for kind, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(dim=1))):
        feature = probe.frozen_feature(context.encoder, kind, x)
        torch.testing.assert_close(feature, expected)
        assert not feature.requires_grad
    assert (
        probe.split_batch(16384) == (512, 32)
        and probe.split_batch(300) == (300, 1)
        and probe.split_batch(1500) == (512, 2)
    )
    with pytest.raises(UserError, match="no class token"):
        probe.feature_kind(load_frozen_encoder(str(product("convmae")), device="cpu").module, "cls")
