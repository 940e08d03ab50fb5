"""pixmim reconstruct, attention and embed."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import pixmim.evaluation.embed as embedding
from helpers.cli import say
from pixmim.build import build_encoder, build_model
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.image_folder import from_paths
from pixmim.models import features
from pixmim.report.attention import attention_maps
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.errors import UserError
from pixmim.weights.detect import Weights
from pixmim.weights.load import import_weights, resolve_model

Make = Callable[..., PretrainConfig]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture
def model(tiny_run: Make, tmp_path: Path) -> str:
    """Write a folder with a random model and its decoder."""
    run = tiny_run(seed=2)
    import_weights(Weights(run, dict(build_model(run).state_dict()), "a test"), tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("vit_tiny_patch16_224", SMALL),
        ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 3, "qk_norm": True}),
        ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}),
        ("beit_base_patch16_224", SMALL),
        ("beit_base_patch16_224", SMALL | {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    ],
)
def test_attention_equals_its_definition(backbone: str, options: dict[str, object]) -> None:
    """Compare with softmax(q k / sqrt(d) + bias), computed from the input of the last attention."""
    encoder = timm.create_model(backbone, num_classes=0, img_size=(32, 48), **options).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    images = torch.randn(2, 3, 32, 48)
    layer, inputs = encoder.blocks[-1].attn, list[torch.Tensor]()
    with torch.no_grad():
        maps = attention_maps(encoder, images)
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        encoder(images)
        bias = layer.qkv.bias
        if backbone.startswith("beit"):
            bias = torch.cat([layer.q_bias, torch.zeros_like(layer.q_bias), layer.v_bias])
        q, k, _ = nn.functional.linear(inputs[0], layer.qkv.weight, bias).unflatten(2, (3, 2, 16)).unbind(2)
        q, k = (x.transpose(1, 2) for x in (q, k))
        if options.get("qk_norm"):
            q, k = layer.q_norm(q), layer.k_norm(k)
        scores = q @ k.transpose(-1, -2) / 4
        if backbone.startswith("beit"):
            shared = encoder.rel_pos_bias
            scores = scores + (layer._get_rel_pos_bias() if shared is None else shared())
    weights = scores.softmax(dim=-1)
    prefix = weights.shape[-1] - 24
    rows = weights[:, :, :1] if options.get("class_token", True) else weights[:, :, prefix:]
    expected = rows[..., prefix:].mean(dim=2)
    torch.testing.assert_close(maps.flatten(2), expected / expected.sum(-1, keepdim=True), atol=1e-5, rtol=0)
    assert maps.shape == (2, 2, 4, 6) and layer.fused_attn == encoder.blocks[0].attn.fused_attn


def test_attention_of_convmae_and_without_attention(tiny_run: Make) -> None:
    run = tiny_run(model=ArchitectureConfig("convmae", "convmae_tiny"))
    assert attention_maps(build_encoder(run), torch.randn(1, 3, 32, 32)).shape == (1, 3, 2, 2)
    with pytest.raises(UserError, match="no block with global attention"):
        attention_maps(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 8, 8))


def test_drawings_of_files_and_folders(
    model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cats" / "bad.jpg").write_bytes(b"no")
    one = str(pictures / "cats" / "0.jpg")
    out = tmp_path / "new" / "r.png"
    status, text = say(capsys, "reconstruct", model, one, pictures / "dogs", "--out", out)
    assert status == 0 and "unaided" in text
    assert Image.open(out).size == (6 * (128 + 4) - 4, 6 * (128 + 18 + 4) - 4 + 18)  # 32 px enlarged four times
    assert "already" in say(capsys, "attention", model, one, "--out", out)[1]
    assert "Not a directory" in say(capsys, "attention", model, one, "--out", out / "a.png")[1]
    assert say(capsys, "attention", model, one, "--out", out, "--overwrite")[0] == 0
    status, text = say(capsys, "attention", model, pictures, "--out", tmp_path / "a.png", "--count", 3)
    assert status == 0 and Image.open(tmp_path / "a.png").size[0] == 4 * (128 + 4) - 4
    status, text = say(capsys, "attention", model, pictures / "cats" / "bad.jpg")
    assert status == 1 and "no image of" in text
    status, text = say(capsys, "reconstruct", model, pictures / "nothing.jpg")
    assert status == 1 and "nothing.jpg" in text
    assert "no images given" in say(capsys, "reconstruct", model)[1]
    (Path(model) / "model.safetensors").unlink()
    assert say(capsys, "reconstruct", model, one)[0] == 1


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_embeddings_are_features_with_file_names(
    model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cats" / "2.jpg").write_bytes(b"broken")
    args = ["embed", model, "--data", pictures, "--batch-size", 3, "--device", "cpu", "--precision", "fp32"]
    status, text = say(capsys, *args, "--out", tmp_path / "f.npy")
    assert status == 0 and "9 rows" in text and "1 images could not be read" in text
    array, rows = np.load(tmp_path / "f.npy"), rows_of(tmp_path / "f.csv")
    assert array.shape == (9, 64) and array.dtype == np.float32
    assert [row["class"] for row in rows] == ["cats"] * 4 + ["dogs"] * 5
    weights = resolve_model(model)
    encoder = build_encoder(weights.config).eval()
    encoder.load_state_dict(weights.encoder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in weights.config.normalization)
    for row in (0, 2, 8):
        data = from_paths([rows[row]["file"]])
        image = (evaluation_crop((32, 32)).crop(data.image(0)).float() / 255 - mean) / std
        with torch.no_grad():
            expected = features(encoder, image[None])
        both = torch.cat([expected.vector[0, -1], expected.mean[0]])
        torch.testing.assert_close(torch.from_numpy(array[row]), both, atol=1e-5, rtol=0)

    for name in ("g.npy", "g.csv", "g.npy.skipped.csv", "g.npy.partial/mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        assert "already" in say(capsys, *args, "--out", tmp_path / "g.npy")[1]
        assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "g.npy.partial/lock").exists()
        (tmp_path / name).unlink()
    assert "already" in say(capsys, *args, "--out", tmp_path / "f.npy")[1]
    assert say(capsys, *args, "--out", tmp_path / "f.npy", "--overwrite", "--features", "cls")[0] == 0
    assert np.array_equal(np.load(tmp_path / "f.npy"), array[:, :32]) and len(rows_of(tmp_path / "f.csv")) == 9
    assert ".npy or .parquet" in say(capsys, *args, "--out", tmp_path / "f.csv")[1]

    parquet = pytest.importorskip("pyarrow.parquet")
    assert say(capsys, *args, "--out", tmp_path / "f.parquet", "--features", "mean")[0] == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["file", "class", "mean"] and table["file"].to_pylist() == [r["file"] for r in rows]
    assert np.array_equal(np.stack(table["mean"].to_numpy()), array[:, 32:])


def test_embedding_resumes(model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, data, out = resolve_model(model), open_dataset(str(pictures)), tmp_path / "f.npy"

    def run(weights: Weights = weights, path: Path = out) -> None:
        embedding.embed(weights, data, path, batch=3, device="cpu", precision="fp32")

    run(path=tmp_path / "uninterrupted.npy")
    calls: list[int] = []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return features(*args)  # type: ignore[arg-type]

    (pictures / "cats/0.jpg").write_bytes(b"damaged")
    monkeypatch.setattr(embedding, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not out.exists() and len(list((tmp_path / "f.npy.partial").glob("*.safetensors"))) == 2
    with pytest.raises(UserError, match="unfinished work of another model"):
        run(replace(weights, tensors={key: value + 1 for key, value in weights.tensors.items()}))
    with pytest.raises(UserError, match="other images, --features or --precision"):
        embedding.embed(weights, data, out, batch=3, device="cpu", precision="bf16")
    lines = embedding.embed(weights, data, out, batch=3, device="cpu", precision="fp32")
    assert lines[1].startswith("1 images could not be read")  # before the interruption
    assert len(calls) == 3 + 2  # two of the four batches were done before
    assert np.array_equal(np.load(out), np.load(tmp_path / "uninterrupted.npy")[1:])
    assert not (tmp_path / "f.npy.partial").exists()


@pytest.mark.parametrize("data", ["TABLE", "TABLE*2", "split:test:TABLE", "split:train:shapes:count=40+TABLE"])
def test_the_data_themselves_are_never_replaced(model: str, pictures: Path, data: str) -> None:
    table = pictures / "mine.csv"
    table.write_text("path,label\n" + "".join(f"{name}/{i}.jpg,{name}\n" for name in ("cats", "dogs") for i in (0, 1)))
    weights, dataset = resolve_model(model), open_dataset(data.replace("TABLE", str(table)))
    for overwrite in (False, True):
        with pytest.raises(UserError, match="would replace the data themselves"):
            embedding.embed(
                weights, dataset, pictures / "mine.npy", device="cpu", precision="fp32", overwrite=overwrite
            )
    assert table.read_text().startswith("path,label")


def test_a_drawing_that_a_format_cannot_hold_is_refused(
    model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = say(capsys, "reconstruct", model, *[pictures] * 11, "--count", 110, "--out", tmp_path / "a.webp")
    assert status == 1 and "Pass a .png" in text and not (tmp_path / "a.webp").exists()
    for suffix in (".jpg", ".sgi"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pixmim.evaluation.visualize.labeled_grid", lambda *_: Image.new("RGB", (1, 70_000)))
            status, text = say(capsys, "attention", model, pictures, "--out", tmp_path / f"a{suffix}")
        assert status == 1 and "Pass a .png" in text
    for suffix in (".ico", ".grib", ".xbm", ".txt", ""):  # of icons, without a writer, of two colors, and no format
        out = tmp_path / f"b{suffix}"
        assert "not the name of an image file" in say(capsys, "reconstruct", model, pictures, "--out", out)[1]
    assert not list(tmp_path.glob("[ab]*"))
