import dataclasses
import json
from pathlib import Path

import pytest

from pixmim.build import build_model
from pixmim.cli.pretrain import read_flags
from pixmim.config import CropConfig, OptimConfig, PretrainConfig, TargetConfig
from pixmim.config_io import defaults_for, from_json, to_json
from pixmim.evaluation.settings import FinetuneSettings, KnnSettings
from pixmim.recipes import RECIPES, get_recipe
from pixmim.utils.errors import UserError
from pixmim.utils.validation import from_python


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    run = get_recipe(name)
    assert from_json(to_json(run)) == run and run.recipe == name


def test_odd_values_survive_json() -> None:
    run = PretrainConfig(
        steps=3,
        mean=(0.5, 0.1, 0.2),
        crop=CropConfig(scale=(0.3, 1)),
        target=TargetConfig(radius=7),
        optim=OptimConfig(lr=1),
    )
    assert from_json(to_json(run)) == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 3}, "unknown key 'batchsize'; did you mean 'batch_size'"),
        ({"optim": {"base_lrr": 1}}, "unknown key 'optim.base_lrr'; did you mean 'base_lr'"),
        ({"batch_size": "many"}, "--batch-size must be an integer from 1 to 1,048,576, not 'many'"),
        ({"optim": {"betas": [0.9]}}, "--optim.betas must be 2 values"),
        ({"target": {"kind": "pixel"}}, "--target.kind must be one of low-frequency, pixels, not 'pixel'"),
        ({"crop": 3}, "'crop' must be an object"),
        ({"steps": 0}, "--steps must be an integer from 1 to 999,999,999, not 0"),
        ({"shard_cache_gib": 0.0}, "--shard-cache-gib must be a number above 0 to 1e.09, not 0"),
        ({"size": "big"}, "HEIGHTxWIDTH"),
        ({"batch_size": 2, "accumulation_steps": 3}, "--accumulation-steps 3 exceeds --batch-size 2"),
        ({"mask": {"ratio": 1.0}}, "--mask.ratio must be a number above 0 and below 1, not 1.0"),
        ({"mean": [0.5]}, "1 values for 3 channels"),
        ({"optim": {"lr_drop_at": 700.0}}, "--optim.lr-drop-at must be a number from 0.2 to 1, not 700.0"),
        ({"target": {"distance": "cross_entropy"}}, "add --target.no-normalize-patches"),
        (
            {"target": {"distance": "cross_entropy", "bins": 0}},
            "--target.bins must be an integer from 2 to 4,096",
        ),
        (
            {"target": {"normalize_window": 47}},
            "--target.normalize-window replaces patches: add --target.no-normalize-patches",
        ),
        ({"crop": {"padding": 300}}, "--crop.padding 300 must be less than each side of --size 224"),
        ({"model": {"options": {"in_chans": 4}}}, "--model.options does not take in_chans: use --channels"),
        ({"target": {"normalize_window": 46}}, "--target.normalize-window must be odd and at least 3, not 46"),
    ],
)
def test_mistakes_in_a_file_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        from_json(json.dumps({"type": "pixmim.PretrainConfig", "version": 1} | change), "config.json")


def test_broken_json_names_the_file() -> None:
    with pytest.raises(UserError, match=r"mine\.json is not valid JSON"):
        from_json("{", "mine.json")


def test_learning_rate_follows_the_real_batch() -> None:
    assert get_recipe("pixmim-vit-base").lr == pytest.approx(2.4e-3)  # the paper's 1.5e-4 x 4096 / 256
    assert dataclasses.replace(get_recipe("pixmim-vit-base"), batch_size=512).lr == pytest.approx(3e-4)
    assert PretrainConfig(optim=OptimConfig(lr=0.1)).lr == 0.1


def test_first_and_last_learning_rate_follow_the_batch_as_simmims() -> None:
    """Its code scales BASE_LR, WARMUP_LR and MIN_LR, per 512 images, by the batch size."""

    def rates(config: PretrainConfig) -> tuple[float, float, float]:
        return config.lr, config.optim.warmup_start_lr, config.optim.min_lr

    name = "simmim-swin-base"
    for batch in (2048, 512, 64):
        expected = pytest.approx([value * batch / 512 for value in (2e-4, 1e-6, 1e-5)], abs=0)
        assert list(rates(get_recipe(name, batch_size=batch))) == expected
        assert list(rates(read_flags([name, "--data", "d", "--batch-size", str(batch)]).config)) == expected
    assert rates(get_recipe(name, batch_size=64, **{"optim.min_lr": 3e-6}))[2] == 3e-6
    assert rates(get_recipe(name, batch_size=64, optim={"min_lr": 3e-6}))[1:] == pytest.approx((1.25e-7, 3e-6), abs=0)
    flags = [name, "--data", "d", "--batch-size", "64", "--optim.min-lr", "3e-6"]
    assert rates(read_flags(flags).config)[2] == 3e-6
    assert get_recipe(name, batch_size=2048) == get_recipe(name)


def test_pixio_does_not_flip_images_and_mae_does() -> None:
    assert get_recipe("pixio-vit-huge").crop == CropConfig(kind="random-resized", flip=0)
    assert get_recipe("mae-vit-large").crop == CropConfig(kind="random-resized", flip=0.5)


def test_pixmim_is_two_values_of_mae() -> None:
    mae, pixmim = get_recipe("mae-vit-base"), get_recipe("pixmim-vit-base")
    changed = [f.name for f in dataclasses.fields(PretrainConfig) if getattr(mae, f.name) != getattr(pixmim, f.name)]
    assert sorted(changed) == ["crop", "recipe", "target"]
    assert (pixmim.crop.kind, pixmim.target.kind, pixmim.target.radius) == ("simple-resized", "low-frequency", "auto")
    assert (mae.crop.kind, mae.crop.scale, mae.target.kind, mae.target.normalize_patches) == (
        "random-resized",
        (0.2, 1),
        "pixels",
        True,
    )


def test_size_and_statistics() -> None:
    assert PretrainConfig(size="192x384").image_size == (192, 384) and PretrainConfig(size="96").image_size == (96, 96)
    assert PretrainConfig(channels=1).normalization == ((0.449,), (0.226,))
    assert PretrainConfig(mean=(0.1, 0.2, 0.3)).normalization == ((0.1, 0.2, 0.3), (0.229, 0.224, 0.225))


def test_mean_std_and_bands_belong_to_channels_dtype_and_stretch(tmp_path: Path) -> None:
    values = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "bands": "3,2,1", "stretch": "1,99"}
    config = get_recipe("pixmim-vit-tiny", data="d", **values)
    assert defaults_for(config, {"channels": "3", "dtype": "uint8", "stretch": "1,99", "size": "96"}) == config
    for other in ({"channels": 4}, {"channels": "4"}, {"dtype": "uint16"}, {"stretch": ""}):
        assert defaults_for(config, other) == dataclasses.replace(config, mean=None, std=None, bands="")
    (tmp_path / "run.json").write_text(to_json(config))
    for flags, mean in (
        (["--stretch", "1,99"], values["mean"]),
        (["--stretch", ""], None),
        (["--channels=3", "--channels=4"], None),  # the last one counts
    ):
        read = read_flags([str(tmp_path / "run.json"), "--data", "d", *flags]).config
        assert read.mean == read.std == mean or (read.mean, read.std) == (mean, values["std"])


def test_sizes_and_lists_of_python_are_taken() -> None:
    for size, text in ((96, "96"), ((96, 128), "96x128"), ([64, 96], "64x96")):
        assert get_recipe("pixmim-vit-small", data="d", size=size).size == text
    assert from_python(KnnSettings, {"train": "a", "k": [5, 20]}) == {"train": "a", "k": (5, 20)}
    assert from_python(FinetuneSettings, {"size": (64, 96)}) == {"size": "64x96"}
    for wrong in (0, (96,), (1, 2, 3), 96.0, True, ("96", "96")):
        with pytest.raises(UserError, match="--size must be a number of pixels"):
            get_recipe("pixmim-vit-small", data="d", size=wrong)


def test_the_absolute_value_of_measurements_is_refused() -> None:
    values = {"data": "d", "channels": 1, "dtype": "float32", "mean": (0.0,), "std": (400.0,)}
    with pytest.raises(UserError, match=r"paper-code would mirror negative .*--target\.variant exact"):
        get_recipe("pixmim-vit-base", **values)
    assert get_recipe("pixmim-vit-base", **values, **{"target.variant": "exact"}).dtype == "float32"


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'pixmim-vit-small'"):
        get_recipe("pixmim-vit-smal")


@pytest.mark.parametrize(("name", "patches", "steps"), [("64", 64, 15_625), ("96", 144, 15_625)])
def test_recipes_for_few_images_have_small_patches(name: str, patches: int, steps: int) -> None:
    config = get_recipe(f"pixmim-vit-tiny-{name}")
    model = build_model(config)
    assert model.patch == 8 and (int(name) // model.patch) ** 2 == patches
    assert config.target.kind == "low-frequency" and config.crop.kind == "simple-resized"
    assert config.recipe_info.steps == steps
