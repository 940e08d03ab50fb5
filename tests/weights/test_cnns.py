"""Test weights of CNNs: OpenMixup's keys of A2MIM, timm's and torchvision's ResNet, and runs that start from them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional as F

from helpers.models import CNNS
from pixmim import RandomMask, load_encoder, load_model
from pixmim.build import build_mask_sampler, build_model
from pixmim.config import PretrainConfig
from pixmim.export import export_model
from pixmim.models import features
from pixmim.recipes import get_recipe
from pixmim.utils.errors import UserError
from pixmim.weights.load import import_weights, initialize_from, resolve_model
from pixmim.weights.start import continue_from

Make = Callable[..., PretrainConfig]
State = dict[str, Tensor]
DIMS, DEPTHS = (8, 12, 16, 24), (1, 2, 1, 1)


def shown(images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return images with the mean color in hidden blocks of 32 px, and the mask on their pixels."""
    mask = F.interpolate(hidden.double().view(len(images), 1, images.shape[2] // 32, -1), scale_factor=32)
    return images * (1 - mask) + images.mean(dim=(2, 3), keepdim=True) * mask, mask


def token(x: Tensor, mask: Tensor, state: State) -> Tensor:
    m = F.interpolate(mask, size=x.shape[2:])
    scale = state.get("backbone.mask_gamma", torch.ones(1, 1, 1, 1, dtype=x.dtype))
    return x * (1 - m) + x * m * scale + state["backbone.mask_token"] * m


def neck(x: Tensor, state: State) -> Tensor:
    """Return the predicted images (b 3 h w)."""
    name = "neck.decoder_pred.0" if "neck.decoder_pred.0.weight" in state else "neck.decoder.0"
    return F.pixel_shuffle(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"]), 32)


def heads(width: int, final: int) -> State:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.mask_token": (1, width, 1, 1),
        "backbone.mask_gamma": (1, width, 1, 1),
    }
    shapes |= {"neck.decoder_pred.0.weight": (3072, final, 1, 1), "neck.decoder_pred.0.bias": (3072,)}
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}


def resnet() -> State:
    """A2MIM's ResNet-18, whose backbone has torchvision's keys."""
    model = torchvision.models.resnet18()
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            offset = 1.0 if name.endswith(("var", "bn1.weight", "bn2.weight")) else 0.0
            value.copy_(torch.randn(value.shape, generator=generator).abs() * 0.05 + offset)
    return {f"backbone.{k}": v for k, v in model.state_dict().items() if not k.startswith("fc.")} | heads(256, 512)


def predict_resnet(state: State, images: Tensor, hidden: Tensor) -> Tensor:
    """Predict with torchvision's modules."""
    model = torchvision.models.resnet18().double().eval()
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    model.load_state_dict({k: v for k, v in backbone.items() if "mask_" not in k}, strict=False)
    x, mask = shown(images, hidden)
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    x = token(model.layer3(model.layer2(model.layer1(x))), mask, state)
    return neck(model.layer4(x), state)


def convnext() -> State:
    """A2MIM's ConvNeXt, small."""
    shapes: dict[str, tuple[int, ...]] = {"downsample_layers.0.0.weight": (DIMS[0], 3, 4, 4)}
    shapes |= {"downsample_layers.0.0.bias": DIMS[:1]}
    shapes |= {f"downsample_layers.0.1.{part}": DIMS[:1] for part in ("weight", "bias")}
    for i, (d, depth) in enumerate(zip(DIMS, DEPTHS, strict=True)):
        if i:
            shapes |= {f"downsample_layers.{i}.0.{part}": (DIMS[i - 1],) for part in ("weight", "bias")}
            shapes |= {f"downsample_layers.{i}.1.weight": (d, DIMS[i - 1], 2, 2), f"downsample_layers.{i}.1.bias": (d,)}
        for j in range(depth):
            block = {"depthwise_conv.weight": (d, 1, 7, 7), "depthwise_conv.bias": (d,), "gamma": (d,)}
            block |= {"norm.weight": (d,), "norm.bias": (d,)}
            block |= {"pointwise_conv1.weight": (4 * d, d), "pointwise_conv1.bias": (4 * d,)}
            block |= {"pointwise_conv2.weight": (d, 4 * d), "pointwise_conv2.bias": (d,)}
            shapes |= {f"stages.{i}.{j}.{name}": shape for name, shape in block.items()}
    shapes |= {f"norm3.{part}": DIMS[-1:] for part in ("weight", "bias")}
    generator = torch.Generator().manual_seed(0)
    state = {f"backbone.{key}": torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}
    return state | heads(DIMS[3], DIMS[3])


def predict_convnext(state: State, images: Tensor, hidden: Tensor) -> Tensor:
    """Predict by the functions of torch, with the keys of the file."""
    w = {key.removeprefix("backbone."): value for key, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
        return x.permute(0, 3, 1, 2)

    x, mask = shown(images, hidden)
    x = norm(
        F.conv2d(x, w["downsample_layers.0.0.weight"], w["downsample_layers.0.0.bias"], 4), "downsample_layers.0.1"
    )
    for i, depth in enumerate(DEPTHS):
        if i:
            name = f"downsample_layers.{i}"
            x = F.conv2d(norm(x, f"{name}.0"), w[f"{name}.1.weight"], w[f"{name}.1.bias"], 2)
        if i == 3:
            x = token(x, mask, state)
        for j in range(depth):
            name = f"stages.{i}.{j}"
            y = F.conv2d(x, w[f"{name}.depthwise_conv.weight"], w[f"{name}.depthwise_conv.bias"], 1, 3, 1, x.shape[1])
            y = norm(y, f"{name}.norm").permute(0, 2, 3, 1)
            y = F.gelu(F.linear(y, w[f"{name}.pointwise_conv1.weight"], w[f"{name}.pointwise_conv1.bias"]))
            y = F.linear(y, w[f"{name}.pointwise_conv2.weight"], w[f"{name}.pointwise_conv2.bias"]) * w[f"{name}.gamma"]
            x = x + y.permute(0, 3, 1, 2)
    return neck(norm(x, "norm3"), state)


A2MIM: dict[str, tuple[Callable[[], State], Callable[[State, Tensor, Tensor], Tensor]]] = {
    "resnet": (resnet, predict_resnet),
    "convnext": (convnext, predict_convnext),
}


def saved(path: Path, state: State) -> str:
    torch.save({"state_dict": state, "meta": {"epoch": 300}}, path)
    return str(path)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of imported weights, by name."""
    root = tmp_path_factory.mktemp("a2mim")
    for name, (make, _) in A2MIM.items():
        import_weights(resolve_model(saved(root / f"{name}.pth", make())), root / name)
    return {name: root / name for name in A2MIM}


@pytest.mark.parametrize(("name", "scaled"), [("resnet", True), ("convnext", True), ("convnext", False)])
def test_a2mim_predicts_what_its_code_predicts(name: str, scaled: bool, tmp_path: Path) -> None:
    make, predict = A2MIM[name]
    state = make()
    if not scaled:  # an option of its code: the token is added to the features
        del state["backbone.mask_gamma"]
    source = saved(tmp_path / "a2mim.pth", state | {"ema_backbone_conv1_weight": torch.ones(2)})
    images, mask = torch.randn(2, 3, 64, 96, dtype=torch.float64), RandomMask(0.5)(2, (2, 3))
    prediction = load_model(source, img_size=(64, 96)).double()(images, mask)  # (row, column, channel) of each patch
    tiles = prediction.detach().view(2, 2, 3, 32, 32, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 64, 96)
    state = {key: value.double() for key, value in state.items()}
    torch.testing.assert_close(tiles, predict(state, images, mask.hidden).detach(), atol=1e-9, rtol=1e-9)
    lines = import_weights(resolve_model(source), None)
    assert "OpenMixup (A2MIM)" in lines[0] and any("a moving average" in line for line in lines)


@pytest.mark.parametrize("name", A2MIM)
def test_a_token_of_the_first_stage_leaves_an_encoder(name: str, tmp_path: Path) -> None:
    """OpenMixup's SimMIM has its token in front of the first stage."""
    state = A2MIM[name][0]()
    del state["backbone.mask_gamma"]
    state["backbone.mask_token"] = torch.zeros(1, 7, 1, 1)
    for part in ("weight", "bias"):
        state[f"neck.decoder.0.{part}"] = state.pop(f"neck.decoder_pred.0.{part}")
    lines = import_weights(resolve_model(saved(tmp_path / "simmim.pth", state)), None)
    assert any("no decoder" in line for line in lines)
    assert any("not used (of a token in front of the first stage" in line and "and 2 more" in line for line in lines)


@pytest.mark.parametrize("name", A2MIM)
def test_the_backbone_alone_and_a_classifier_are_read(name: str, tmp_path: Path) -> None:
    """Read what A2MIM's tool extracts, and what its fine-tuning saves."""
    state, images = A2MIM[name][0](), torch.randn(1, 3, 64, 64)
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    encoder = load_encoder(saved(tmp_path / "backbone.pth", backbone), img_size=64)
    assert torch.equal(
        features(encoder, images).map, features(load_encoder(saved(tmp_path / "x.pth", state)), images).map
    )
    width = features(encoder, images).vector.shape[-1]
    head = {"head.fc.weight": torch.randn(5, width), "head.fc.bias": torch.randn(5)}
    tuned = {key: value for key, value in state.items() if "mask_" not in key and "neck" not in key} | head
    classifier = load_encoder(saved(tmp_path / "tuned.pth", tuned), img_size=64)
    expected = F.linear(features(encoder, images).vector[:, 0], head["head.fc.weight"], head["head.fc.bias"])
    torch.testing.assert_close(classifier(images), expected)


@pytest.mark.parametrize("name", A2MIM)
def test_mmpretrains_keys_are_those_of_the_file(name: str, imported: dict[str, Path], tmp_path: Path) -> None:
    export_model(str(imported[name]), "mmpretrain", tmp_path / "out")
    state = torch.load(tmp_path / "out/model.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(state[key], value) for key, value in A2MIM[name][0]().items())


def test_detectron2_has_its_own_names_of_a_resnet(imported: dict[str, Path], tmp_path: Path) -> None:
    lines = export_model(str(imported["resnet"]), "detectron2", tmp_path / "out")
    state, own = torch.load(tmp_path / "out/model.pth", weights_only=True)["model"], resnet()
    for theirs, ours in (
        ("stem.conv1.weight", "conv1.weight"),
        ("stem.conv1.norm.running_var", "bn1.running_var"),
        ("res2.0.conv2.norm.bias", "layer1.0.bn2.bias"),
        ("res5.0.shortcut.weight", "layer4.0.downsample.0.weight"),
        ("res5.0.shortcut.norm.weight", "layer4.0.downsample.1.weight"),
    ):
        assert torch.equal(state[theirs], own[f"backbone.{ours}"])
    assert len(state) == len([key for key in own if "mask_" not in key and "neck" not in key])
    assert any("depth=18" in line and "stride_in_1x1=False" in line for line in lines)
    with pytest.raises(UserError, match="ResNets only, not convnext_tiny"):
        export_model(str(imported["convnext"]), "detectron2", tmp_path / "out2")


# ---- runs that start from weights


@pytest.mark.parametrize("layout", ["folder of timm", "bare file"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_adapt_starts_from_a_classifier_bitwise(name: str, layout: str, tmp_path: Path) -> None:
    source: Any = timm.create_model(name, num_classes=7)
    if layout == "bare file":
        init = str(tmp_path / "model.safetensors")
        save_file(source.state_dict(), init)
    else:
        init = str(tmp_path / "timm")
        data = {"input_size": (3, 80, 80), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        save_for_hf(source, init, data_config=data, safe_serialization=True)
    config = get_recipe("adapt", data="shapes:", init=init)
    assert config.model.name == "simmim" and config.mask.kind == "blocks" and config.target.kind == "low-frequency"
    assert config.size == ("224" if layout == "bare file" else "64")  # a multiple of 32
    model = build_model(config)
    build_mask_sampler(config, model.patch)
    lines = initialize_from(model, config)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.encoder.state_dict().items())
    assert any("not used: " in line and "fc" in line for line in lines)


def test_adapt_describes_timms_cnns_without_their_weights() -> None:
    config = get_recipe("adapt", data="shapes:", init="timm:resnet50")
    assert (config.model.name, config.size, config.model.options) == ("simmim", "224", {})
    assert continue_from(config, "timm:efficientnet_b1.ft_in1k").size == "224"  # of 240


def test_the_first_convolution_of_a_cnn_is_adapted_to_the_channels(tiny_run: Make, tmp_path: Path) -> None:
    for name, key in (("resnet18", "conv1.weight"), ("convnext_atto", "stem.0.weight")):
        source: Any = timm.create_model(name, num_classes=0)
        save_file(source.state_dict(), str(tmp_path / f"{name}.safetensors"))
        model = replace(CNNS["resnet"], backbone=name)
        config = tiny_run(size="64", channels=1, model=model, init=str(tmp_path / f"{name}.safetensors"))
        module = build_model(config)
        lines = initialize_from(module, config)
        assert torch.equal(module.encoder.state_dict()[key], source.state_dict()[key].sum(dim=1, keepdim=True))
        assert any("adapted from 3 to 1 channels" in line for line in lines)


def test_other_cnns_are_named_with_what_takes_them(tmp_path: Path) -> None:
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match=r"a convolutional network .* is not supported.*timm:NAME"):
        resolve_model(str(tmp_path / "x.safetensors"))
