"""Test `--init` of published weights: the recipe `adapt` builds their model, and starts from them bitwise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from helpers import official
from helpers.models import MAE, OTHERS
from pixmim.build import build_mask_sampler, build_model
from pixmim.cli.pretrain import read_flags
from pixmim.config import ArchitectureConfig, MaskConfig, PretrainConfig, TargetConfig
from pixmim.evaluation.frozen_encoder import load_frozen_encoder
from pixmim.export import export_model
from pixmim.models import features
from pixmim.recipes import get_recipe
from pixmim.utils.errors import UserError
from pixmim.weights.detect import Weights
from pixmim.weights.load import import_weights, initialize_from, load_encoder, resolve_model

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"embed_dim": 24, "window_size": 4, "depths": [1, 1, 1, 1], "img_size": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "supervised": ("vit_tiny_patch16_224", SMALL | {"img_size": 64}, "mae"),
    "DINOv2, layer scale": ("vit_small_patch14_dinov2", SMALL | {"img_size": 56}, "mae"),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}, "mae"),
    "CLIP, norm before": ("vit_base_patch16_clip_224", SMALL | {"img_size": 64}, "mae"),
    "SigLIP, pooled by attention": ("vit_base_patch16_siglip_224", SMALL | {"img_size": 64}, "mae"),
    "mean of the tokens": ("vit_base_patch16_224", SMALL | {"img_size": 64, "global_pool": "avg"}, "mae"),
    "DeiT III": ("deit3_small_patch16_224", SMALL | {"img_size": 64}, "mae"),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, "simmim"),
    "BEiT": ("beit_base_patch16_224", SMALL | {"img_size": 64}, "simmim"),
}


def timm_folder(folder: Path, name: str, options: dict[str, Any]) -> nn.Module:
    """Write a classifier of timm with random weights in timm's layout, and return it."""
    module: nn.Module = timm.create_model(name, num_classes=7, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.1)
    data = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "input_size": (3, options["img_size"], options["img_size"]),
    }
    save_for_hf(module, str(folder), model_args=options, data_config=data, safe_serialization=True)
    return module.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_from_a_timm_model_bitwise(family: str, tmp_path: Path) -> None:
    name, options, method = FAMILIES[family]
    source = timm_folder(tmp_path, name, options)
    config = get_recipe("adapt", init=tmp_path, data="shapes:count=8,size=64")
    assert (config.model.name, config.model.backbone, config.size) == (method, name, str(options["img_size"]))
    assert config.normalization == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert config.target.kind == "low-frequency" and config.crop.kind == "simple-resized"
    assert config.optim.decoder_warmup > 0  # the file has no decoder
    model = build_model(config)
    initialize_from(model, config)
    own, expected = model.encoder.state_dict(), source.state_dict()
    assert own.keys() == {key for key in expected if not key.startswith("head.")}
    assert all(torch.equal(own[key], expected[key]) for key in own)
    images = torch.randn(2, 3, *config.image_size)
    loaded = features(load_encoder(tmp_path), images)
    assert torch.equal(features(model.encoder.eval(), images).map, loaded.map)

    prediction = model(images, build_mask_sampler(config, model.patch)(0, range(2)))
    prediction.square().mean().backward()  # with several processes, each trained parameter needs a gradient
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


BOTH = {"num_heads": 3, "decoder_heads": 4}
OFFICIAL: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "mae": (official.mae, BOTH),
    "convmae": (official.convmae, BOTH),
    "simmim_swin": (official.simmim_swin, {"img_size": [32, 32]}),
    "simmim_vit": (official.simmim_vit, {}),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_methods_own_file_continues_bitwise_with_its_decoder(name: str, tmp_path: Path) -> None:
    make, hints = OFFICIAL[name]
    save_file(make(), tmp_path / "official.safetensors")
    weights = resolve_model(str(tmp_path / "official.safetensors"), hints=hints)
    import_weights(weights, tmp_path / "start")
    config = get_recipe("adapt", init=str(tmp_path / "start"))
    model = build_model(config)
    initialize_from(model, config)
    assert (config.model, config.optim.decoder_warmup) == (weights.config.model, 0)
    own = model.state_dict()
    assert own.keys() == weights.tensors.keys()
    assert all(torch.equal(own[key], value) for key, value in weights.tensors.items())
    assert config.target.kind == "low-frequency" and config.target.distance == ("l1" if "simmim" in name else "mse")


MFF = replace(MAE, name="mff")


@pytest.mark.parametrize(
    ("name", "model", "size"), [("mae", MAE, 32), ("mff", MFF, 32), *((n, *values) for n, values in OTHERS.items())]
)
def test_a_run_with_its_decoder_continues_bitwise(
    name: str, model: ArchitectureConfig, size: int, tmp_path: Path
) -> None:
    mask = MaskConfig(ratio=0.6)
    run = PretrainConfig(data="shapes:", size=str(size), seed=3, model=model, mask=mask, target=TargetConfig("pixels"))
    trained = build_model(run)
    for value in trained.state_dict().values():
        value.add_(1)  # unlike any initialization
    import_weights(Weights(run, dict(trained.state_dict()), "a test"), tmp_path / "start")
    config = get_recipe("adapt", init=str(tmp_path / "start"), data="shapes:")
    assert config.model == model and config.mask == mask and config.optim.decoder_warmup == 0
    assert config.target == replace(run.target, kind="low-frequency")
    continued = build_model(config)
    initialize_from(continued, config)
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), continued.state_dict().values(), strict=True)
    )


def test_the_user_can_replace_what_the_weights_decide(tmp_path: Path) -> None:
    timm_folder(tmp_path, *FAMILIES["supervised"][:2])
    changes: dict[str, Any] = {"size": "96", "target.kind": "pixels", "crop.kind": "random-resized", "epochs": 3}
    config = get_recipe("adapt", init=str(tmp_path), **changes)
    assert (config.size, config.target.kind, config.crop.kind, config.epochs) == ("96", "pixels", "random-resized", 3)
    model = build_model(config)
    assert any("positions interpolated from 4x4 to 6x6" in line for line in initialize_from(model, config))


def test_images_are_prepared_as_those_of_the_weights_unless_they_are_others(tmp_path: Path) -> None:
    run = PretrainConfig(
        *(MAE, "32"), data="shapes:", stretch="1,99", max_no_data=0.3, bands="2", mean=(0.1, 0.2, 0.3), std=(1.0,) * 3
    )
    import_weights(Weights(run, dict(build_model(run).state_dict()), "a test"), tmp_path / "start")
    start = str(tmp_path / "start")
    config = get_recipe("adapt", init=start)
    for name in ("stretch", "max_no_data", "bands", "mean", "std", "dtype", "tiff_pages"):
        assert getattr(config, name) == getattr(run, name), name
    gray = get_recipe("adapt", init=start, channels=1)
    assert (gray.mean, gray.std, gray.bands, gray.stretch) == (None, None, "", "1,99")
    assert read_flags(["adapt", "--init", start, "--data", "shapes:", "--channels", "1"]).config == replace(
        gray, data="shapes:"
    )
    assert get_recipe("adapt", init=start, stretch="2,98").mean is None  # of other values
    assert get_recipe("adapt", init=start, channels=1, mean=(0.5,)).mean == (0.5,)
    encoder: Any = load_encoder(start, in_chans=1)
    assert encoder.pixmim_config.normalization == ((0.449,), (0.226,))


def test_weights_with_other_attention_heads_are_refused_or_their_decoder_is(tmp_path: Path) -> None:
    """The shapes of the tensors are the same."""
    run = PretrainConfig(data="shapes:", size="32", model=MAE)
    import_weights(Weights(run, dict(build_model(run).state_dict()), "a test"), tmp_path / "start")
    start = str(tmp_path / "start")
    other = replace(MAE, options=MAE.options | {"num_heads": 4})
    config = PretrainConfig(data="shapes:", size="32", model=other, init=start)
    with pytest.raises(UserError, match=r"encoder\.blocks\.0\.attn has 2 attention heads, expected 4"):
        initialize_from(build_model(config), config)
    config = PretrainConfig(data="shapes:", size="32", model=replace(MAE, decoder_heads=4), init=start)
    lines = "\n".join(initialize_from(build_model(config), config))
    assert "initialized randomly (it differs in the heads of decoder.blocks.0.attn)" in lines
    export_model(start, "hf", tmp_path / "hf")
    with pytest.raises(UserError, match="has 2 attention heads, expected 4"):
        initialize_from(build_model(config := replace(config, model=other, init=str(tmp_path / "hf"))), config)


def test_a_decoder_that_no_longer_fits_is_reported_with_the_flag(tmp_path: Path) -> None:
    run = PretrainConfig(data="shapes:", size="32", model=MAE)
    import_weights(Weights(run, dict(build_model(run).state_dict()), "a test"), tmp_path / "start")
    config = get_recipe("adapt", init=str(tmp_path / "start"), channels=1, mean=[0.5], std=[0.5])
    assert "--optim.decoder-warmup" in "\n".join(initialize_from(build_model(config), config))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("timm:vit_small_patch16_dinov3", r"vit_small_patch16_dinov3 .*rotary positions \(timm's Eva\)"),
        ("timm:eva02_tiny_patch14_224", "eva02_tiny_patch14_224 .*rotary positions"),
        ("timm:deit_tiny_distilled_patch16_224", "'deit_tiny_distilled_patch16_224' is not a plain VisionTransformer"),
        ("timm:mixer_s16_224", "mixer_s16_224"),
        ("timm:vit_tiny_patch16_223", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_small_patch16_224.dyno", r"no pretrained weights .*did you mean 'vit_small_patch16_224\.dino'"),
        ("timm:../secret", "plain name of a model"),
        ("hf:../secret", "a name on the hub"),
        ("hf:a/b/c", "a name on the hub"),
        ("nowhere", "nowhere does not exist"),
    ],
)
def test_other_starts_are_refused_by_name_without_a_download(
    init: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=f"--init {init}.*{message}"):
        get_recipe("adapt", init=init)


def test_rotary_models_in_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    timm_folder(tmp_path, "vit_small_patch16_rope_224", SMALL | {"img_size": 64})
    with pytest.raises(UserError, match=r"vit_small_patch16_rope_224 .*rotary positions"):
        get_recipe("adapt", init=str(tmp_path))


def test_timm_names_need_no_network_to_be_configured() -> None:
    config = get_recipe("adapt", init="timm:vit_base_patch16_clip_224.openai")
    assert config.normalization[0][0] == pytest.approx(0.48145466) and config.model.decoder_dim == 512
    assert get_recipe("adapt", init="timm:vit_small_patch14_reg4_dinov2").size == "518"


def test_timm_models_are_downloaded_by_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    monkeypatch.setattr("pixmim.weights.published.create_pretrained", lambda *_: module)
    config = get_recipe("adapt", init="timm:vit_tiny_patch16_224")
    model = build_model(config)
    initialize_from(model, config)
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.encoder.state_dict().items())


def test_hub_names_are_downloaded_and_read_like_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first kind of weights that exists is asked for."""
    source, asked = timm_folder(tmp_path, *FAMILIES["DINOv2, registers"][:2]), []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "model.safetensors" in allow_patterns, "pytorch_model.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    weights = resolve_model("hf:someone/dinov2")
    assert torch.equal(weights.encoder["reg_token"], source.state_dict()["reg_token"])
    assert load_frozen_encoder("hf:someone/dinov2", device="cpu").size == (56, 56)
    assert asked == [("someone/dinov2", True, False)] * 2
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="hf:someone/dinov2 contains no weights"):
        resolve_model("hf:someone/dinov2")
    assert asked[-1] == ("someone/dinov2", False, True)

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"hf:someone/dinov2 cannot be loaded: no network$"):
        resolve_model("hf:someone/dinov2")


def test_a_file_that_lacks_facts_names_the_command_that_takes_them(tmp_path: Path) -> None:
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL, img_size=64)
    save_file({name: value.clone() for name, value in module.state_dict().items()}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"--heads .*`pixmim import .*odd\.safetensors --to FOLDER`"):
        get_recipe("adapt", init=str(tmp_path / "odd.safetensors"))
