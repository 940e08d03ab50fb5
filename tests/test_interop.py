"""pixmim's parts in other training loops, and its MAE against Hugging Face's ViTMAE."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision

import pixmim
from pixmim.config import PretrainConfig
from pixmim.models.mae import MAE
from pixmim.weights.formats import HF_VIT

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config() -> object:
    return transformers.ViTMAEConfig(
        image_size=32, patch_size=8, norm_pix_loss=True, layer_norm_eps=1e-6,
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64,
    )  # fmt: skip


def test_huggingface_example_learns(pictures: Path) -> None:
    paths = sorted(pictures.rglob("*.jpg"))
    losses = example("huggingface").train(paths, config(), steps=12, batch=5)
    assert losses[-1] < 0.97 * losses[0]


def test_plain_loop_example_learns(pictures: Path) -> None:
    losses = example("plain_loop").train(str(pictures), steps=8, size=32, batch=5)
    assert losses[-1] < 0.9 * losses[0]


def test_too_few_images_for_a_batch_end_an_example(pictures: Path) -> None:
    with pytest.raises(SystemExit, match="has 10 images, and a batch needs 11"):
        example("plain_loop").train(str(pictures), steps=1, size=32, batch=11)


@pytest.mark.parametrize(
    ("name", "library", "options"),
    [
        ("lightning_module", "lightning", {"size": 32}),
        ("lightly_mae", "lightly", {"size": 32}),
        ("stable_pretraining_mae", "stable_pretraining", {"size": 32}),
        ("huggingface_trainer", "accelerate", {"config": config()}),
    ],
)
def test_examples_in_other_libraries_learn(
    name: str, library: str, options: dict[str, object], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library, reason=f"SKIPPED FOR WANT OF {library}: pip install {library}")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    losses = example(name).train(str(pictures), steps=8, batch=5, **options)
    assert len(losses) == 8 and losses[-1] < 0.99 * losses[0]


def test_an_encoder_is_distilled_by_lightly_train(
    tiny_run: Callable[..., PretrainConfig], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightly_train", reason="SKIPPED FOR WANT OF lightly-train: pip install lightly-train")
    monkeypatch.setenv("LIGHTLY_TRAIN_EVENTS_DISABLED", "1")
    pixmim.pretrain(tiny_run(size="224"), out=tmp_path / "run")
    weights = example("lightly_train_distillation").distill(
        str(tmp_path / "run"), str(pictures), str(tmp_path / "out"), epochs=1, batch=4
    )
    missing, unexpected = torchvision.models.resnet18().load_state_dict(
        torch.load(weights, weights_only=True), strict=False
    )
    assert not unexpected and set(missing) <= {"fc.weight", "fc.bias"}


def test_mae_equals_huggingfaces_vitmae() -> None:
    """The same weights, images and mask give the same prediction and the same loss in both libraries."""
    reference = transformers.ViTMAEForPreTraining(config()).eval()
    example("huggingface").fill_positions(reference)
    model = pixmim.create_model(
        "mae", "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    ).eval()  # fmt: skip
    assert isinstance(model, MAE)
    converted, _ = HF_VIT.to_pixmim(dict(reference.state_dict()))
    torch.testing.assert_close(converted["encoder.pos_embed"], model.encoder.pos_embed.data, atol=1e-6, rtol=0)
    torch.testing.assert_close(converted["decoder.pos_embed"], model.decoder.pos_embed.data, atol=1e-6, rtol=0)
    model.load_state_dict(converted, strict=True)

    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    output = reference(images, noise=noise)
    mask = pixmim.RandomMask(0.75).sample(noise, (4, 4))
    assert torch.equal(mask.hidden, output.mask.bool())
    prediction = model(images, mask)
    torch.testing.assert_close(prediction, output.logits, atol=1e-5, rtol=0)
    loss = pixmim.ReconstructionLoss(pixmim.Pixels())(prediction, images, mask).loss
    torch.testing.assert_close(loss, output.loss, atol=1e-5, rtol=0)


def test_public_names_exist() -> None:
    assert all(getattr(pixmim, name) is not None for name in pixmim.__all__)
    assert pixmim.__all__ == sorted(pixmim._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pixmim.nothing
