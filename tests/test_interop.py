"""pixmim's parts in other people's loops, and Hugging Face's ViTMAE as a second opinion on our MAE."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pixmim
from pixmim.models.mae import MAE

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


def translate(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Their names and split q, k, v to ours."""
    found: dict[str, torch.Tensor] = {}
    state = theirs.state_dict()
    rename = {
        "vit.embeddings.cls_token": "encoder.cls_token",
        "vit.embeddings.position_embeddings": "encoder.pos_embed",
        "vit.embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
        "vit.layers.": "encoder.blocks.",
        "vit.layernorm.": "encoder.norm.",
        "decoder.decoder_layers.": "decoder.blocks.",
        "decoder.decoder_pred.": "decoder.predict.",
        "decoder.decoder_": "decoder.",
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }
    for name, tensor in state.items():
        new = name
        for theirs_part, ours in rename.items():
            new = new.replace(theirs_part, ours)
        if ".attention.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            found[new.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "_proj." not in name or "o_proj" in name:
            found[new] = tensor
    return found


def test_our_mae_is_huggingfaces_vitmae() -> None:
    """The same weights, images and mask give the same prediction and the same loss in both libraries."""
    theirs = transformers.ViTMAEForPreTraining(config()).eval()
    example("huggingface").fill_positions(theirs)
    ours = pixmim.create_model(
        "mae", "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2,
    ).eval()  # fmt: skip
    assert isinstance(ours, MAE)
    found = translate(theirs)
    torch.testing.assert_close(found["encoder.pos_embed"], ours.encoder.pos_embed.data, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["decoder.pos_embed"], ours.decoder.pos_embed.data, atol=1e-6, rtol=0)
    ours.load_state_dict(found, strict=True)

    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    output = theirs(images, noise=noise)
    mask = pixmim.RandomMask(0.75).sample(noise, (4, 4))
    assert torch.equal(mask.hidden, output.mask.bool())
    prediction = ours(images, mask)
    torch.testing.assert_close(prediction, output.logits, atol=1e-5, rtol=0)
    loss = pixmim.ReconstructionLoss(pixmim.Pixels())(prediction, images, mask).loss
    torch.testing.assert_close(loss, output.loss, atol=1e-5, rtol=0)


def test_public_names_are_there_and_light() -> None:
    assert all(getattr(pixmim, name) is not None for name in pixmim.__all__)
    assert pixmim.__all__ == sorted(pixmim._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pixmim.nothing
