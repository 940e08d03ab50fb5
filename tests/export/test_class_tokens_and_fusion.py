"""Export and import of Pixio, which has several class tokens, and of MFF, which has more layers than MAE."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from helpers.runs import train
from pixmim import load_encoder, load_model
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.export import export_model
from pixmim.masking import RandomMask
from pixmim.models import features
from pixmim.weights.load import build_with_weights, import_weights, resolve_model

transformers = pytest.importorskip("transformers")

Make = Callable[..., PretrainConfig]


def make_run(tiny_run: Make, out: Path, method: str) -> Path:
    model = tiny_run().model
    train(tiny_run(model=replace(model, name=method)), out)
    return out


@pytest.fixture(scope="module")
def pixio(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_run, tmp_path_factory.mktemp("pixio") / "run", "pixio")


@pytest.fixture(scope="module")
def mff(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_run, tmp_path_factory.mktemp("mff") / "run", "mff")


def test_transformers_loads_pixio_strictly_with_equal_features(pixio: Path, tmp_path: Path) -> None:
    export_model(str(pixio), "hf", tmp_path / "hf")
    model, info = transformers.PixioModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.n_cls_tokens == 8
    images = torch.randn(2, 3, 32, 32)
    own = features(load_encoder(str(pixio)), images)
    with torch.no_grad():
        theirs = model.eval()(images)
    torch.testing.assert_close(theirs.pooler_output, own.vector[:, -1], atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.last_hidden_state[:, 8:].mT, own.map.flatten(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", ["file", "memory", "official"])
def test_pixio_is_imported_by_any_names(pixio: Path, tmp_path: Path, names: str) -> None:
    export_model(str(pixio), "hf", tmp_path / "hf")
    own, images = load_encoder(str(pixio)), torch.randn(2, 3, 32, 32)
    if names == "file":
        source = str(tmp_path / "hf")
    else:
        state = transformers.PixioModel.from_pretrained(tmp_path / "hf").state_dict()
        if names == "official":
            state = own.state_dict()
            state["cls_token"] = torch.cat([state["cls_token"], state.pop("reg_token")], dim=1)
        torch.save(state, tmp_path / "weights.pth")
        source = str(tmp_path / "weights.pth")
    other = load_encoder(source, num_heads=2)
    assert torch.allclose(features(other, images).vector, features(own, images).vector, atol=1e-5)


def test_mff_survives_mmpretrains_keys(mff: Path, tmp_path: Path) -> None:
    export_model(str(mff), "mmpretrain", tmp_path / "mm")
    state = torch.load(tmp_path / "mm/model.pth", weights_only=True)["state_dict"]
    assert state["backbone.proj_weights"].shape[1:] == (1, 1, 1) and "backbone.proj_layers.0.weight" not in state
    own = build_with_weights(resolve_model(str(mff), with_decoder=True))
    other = load_model(str(tmp_path / "mm/model.pth"))
    images, mask = torch.randn(2, 3, 32, 32), RandomMask()(2, 16)
    torch.testing.assert_close(other(images, mask), own(images, mask))


@pytest.mark.parametrize("method", ["pixio", "mff", "crossmae", "resnet10t", "convnext_atto"])
def test_the_encoder_of_a_run_is_loaded_by_timm(method: str, tiny_run: Make, tmp_path: Path) -> None:
    model = replace(tiny_run().model, name=method)
    if method in ("resnet10t", "convnext_atto"):
        options = {"depths": [1, 1, 1, 1]} if method == "convnext_atto" else {}
        model = ArchitectureConfig("simmim", method, options=options)
    train(tiny_run(model=model, size="64"), tmp_path / "run")
    own, images = load_encoder(str(tmp_path / "run")).eval(), torch.randn(2, 3, 64, 64)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'run/encoder'}", pretrained=True).eval()
    assert torch.equal(theirs.forward_features(images), own.forward_features(images))  # type: ignore[operator]
    if method in ("pixio", "mff", "resnet10t"):  # test_export.py exports a ConvNeXt, and the ViT of CrossMAE
        lines = export_model(str(tmp_path / "run"), "onnx", tmp_path / "onnx")
        assert any("checked in onnxruntime" in line for line in lines)


@pytest.mark.parametrize("method", ["mff", "crossmae"])
def test_another_decoder_is_not_exported_as_vitmae(method: str, tiny_run: Make, tmp_path: Path) -> None:
    run = make_run(tiny_run, tmp_path / "run", method)
    lines = export_model(str(run), "hf", tmp_path / "hf")
    assert any("ViTModel" in line for line in lines) and not any("ViTMAE" in line for line in lines)
    model = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        token = model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(token, features(load_encoder(str(run)), images).vector[:, -1], atol=1e-5, rtol=0)


def test_imported_weights_of_pixio_keep_their_method(pixio: Path, tmp_path: Path) -> None:
    export_model(str(pixio), "hf", tmp_path / "hf")
    import_weights(resolve_model(str(tmp_path / "hf"), hints={"num_heads": 2}), tmp_path / "imported")
    weights = resolve_model(str(tmp_path / "imported"))
    assert weights.config.model.name == "pixio" and isinstance(weights.config.model, ArchitectureConfig)
