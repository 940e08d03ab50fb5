"""MFF, CrossMAE and Pixio: MAE with another input of the decoder, another decoder, or other positions and tokens."""

import pytest
import torch
from torch.nn import functional as F

from pixmim import RandomMask, create_model
from pixmim.masking import BlockwiseRandomMask, Mask
from pixmim.models import create_encoder, features
from pixmim.models.mae import MAE
from pixmim.utils.errors import UserError

TINY = {"backbone": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 32, "num_heads": 2, "img_size": 16}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.mark.parametrize(("depth", "levels"), [(12, [0, 2, 4, 6, 8, 11]), (3, [0, 2]), (2, [1]), (1, [0])])
def test_mff_fuses_every_second_block_and_the_last(depth: int, levels: list[int]) -> None:
    """Compare with a sum over hooked outputs of the blocks, in float64. Of 12, mmpretrain's configs name the blocks."""
    model = create_model("mff", **TINY, **DECODER, depth=depth).double()
    assert isinstance(model, MAE) and model.fusion is not None and list(model.fusion.levels) == levels
    with torch.no_grad():
        model.fusion.weights.copy_(torch.randn_like(model.fusion.weights))
    outputs: list[torch.Tensor] = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images, mask = torch.randn(3, 3, 16, 16, dtype=torch.float64), RandomMask()(3, 16)
    prediction = model(images, mask)
    share = [w.exp() / sum(v.exp() for v in model.fusion.weights.flatten()) for w in model.fusion.weights.flatten()]
    fused = share[-1] * outputs[levels[-1]]
    for layer, level, weight in zip(model.fusion.projections, levels, share, strict=False):
        fused = fused + weight * F.linear(outputs[level], layer.weight, layer.bias)
    expected = model.decoder(model.encoder.norm(fused), mask)
    torch.testing.assert_close(prediction, expected, atol=1e-12, rtol=0)


def test_mff_adds_the_published_layers_to_mae_and_none_to_its_encoder() -> None:
    with torch.device("meta"):
        model, mae = (create_model(name, "vit_base_patch16_224") for name in ("mff", "mae"))
    counts = [sum(p.numel() for p in one.parameters()) for one in (model, mae)]
    assert counts[0] - counts[1] == 5 * (768 * 768 + 768) + 6
    assert model.encoder.state_dict().keys() == mae.encoder.state_dict().keys()


def test_weights_of_mff_are_equal_at_first_and_its_maps_xavier() -> None:
    model = create_model("mff", **TINY, **DECODER, depth=4)
    assert isinstance(model, MAE) and model.fusion is not None
    (layer,) = model.fusion.projections
    limit = (6 / (32 + 32)) ** 0.5
    assert 0.95 * limit < layer.weight.abs().max() <= limit and not layer.bias.any()
    assert model.fusion.weights.softmax(dim=0).flatten().tolist() == [0.5, 0.5]


def test_crossmae_has_the_published_layers() -> None:
    with torch.device("meta"):
        model = create_model("crossmae", "vit_base_patch16_224")
    block = 2 * 768 + 4 * 512 + 2 * (512 + 1) * 512 + (768 + 1) * 1024 + (512 + 1) * 2048 + (2048 + 1) * 512
    others = 13 * 12 + 512 + 197 * 512 + 2 * 512 + (512 + 1) * 768  # mixes, mask token, positions, norm, prediction
    assert sum(p.numel() for p in model.parameters()) == 85_798_656 + 12 * block + others == 127_287_964


def test_crossmae_predicts_hidden_patches_alone_in_training_and_all_later() -> None:
    model = create_model("crossmae", **TINY, **DECODER, depth=2).double()
    images, mask = torch.randn(3, 3, 16, 16, dtype=torch.float64), RandomMask(0.6)(3, 16)
    trained, complete = model(images, mask), model.eval()(images, mask)
    assert (trained[~mask.hidden] == 0).all() and (complete[~mask.hidden] != 0).all()
    torch.testing.assert_close(trained[mask.hidden], complete[mask.hidden], atol=1e-12, rtol=0)
    other = Mask.from_hidden(mask.hidden.flip(1))
    assert not torch.allclose(model(images, other), complete)


def test_each_patch_of_crossmae_is_predicted_on_its_own() -> None:
    """With one more patch hidden, which no other patch reads, only what is visible changes the predictions."""
    model = create_model("crossmae", **TINY, **DECODER, depth=2).double().eval()
    images, hidden = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.arange(16)[None] % 4 > 0
    changed = images.clone()
    changed[..., 4:8] += 1  # a column of patches that is hidden
    mask = Mask.from_hidden(hidden)
    assert torch.equal(model(images, mask), model(changed, mask))
    changed[..., :4] += 1
    assert not torch.allclose(model(images, mask), model(changed, mask))


@pytest.mark.parametrize("option", [{"decoder_stride": 2}, {"decoder_stride": 2, "predict_patch": 8}])
def test_crossmae_refuses_a_coarser_decoder(option: dict[str, int]) -> None:
    with pytest.raises(UserError, match="stride"):
        create_model("crossmae", **TINY, **DECODER, **option)


def test_pixio_has_the_published_sizes() -> None:
    """631 and 128 million are the figures of the released ViT-H: encoder and decoder."""
    with torch.device("meta"):
        model = create_model("pixio", "vit_huge_patch14_224", patch_size=16)
    assert model.encoder.pos_embed.shape == (1, 8 + 256, 1280) and model.decoder.pos_embed.shape == (1, 8 + 256, 512)
    assert len(model.encoder.blocks) == len(model.decoder.blocks) == 32 and model.encoder.pos_embed.requires_grad
    tokens, positions = 8 * 1280, (8 + 256) * 1280
    block = 12 * 1280**2 + 13 * 1280  # weights, biases and norms of a block of MLP ratio 4
    expected = 32 * block + 2 * 1280 + tokens + positions + (3 * 256 + 1) * 1280
    assert sum(p.numel() for p in model.encoder.parameters()) == expected


def test_pixio_begins_with_normal_positions() -> None:
    model = create_model("pixio", **(TINY | {"img_size": 64}), **DECODER, depth=1)
    for positions in (model.encoder.pos_embed, model.decoder.pos_embed):
        assert positions.std().item() == pytest.approx(0.02, rel=0.1) and positions.requires_grad


def test_the_feature_of_pixio_is_the_mean_of_its_class_tokens() -> None:
    images = torch.randn(2, 3, 16, 16)
    for name, count in (("pixio", 8), ("mae", 1)):
        encoder = create_encoder(name, TINY["backbone"], **{k: v for k, v in TINY.items() if k != "backbone"}, depth=2)
        tokens = encoder.eval().forward_features(images)
        expected = tokens[:, :count].mean(dim=1) if count > 1 else tokens[:, 0]
        torch.testing.assert_close(features(encoder, images).vector[:, 0], expected)


def test_pixio_sees_blocks_of_sixteen_patches() -> None:
    model = create_model("pixio", **(TINY | {"img_size": 64}), **DECODER, depth=1)
    mask = BlockwiseRandomMask(0.75, 4)(5, (16, 16))
    assert ((~mask.hidden).sum(dim=1) == 64).all()
    blocks = mask.hidden.view(5, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(blocks.all(dim=3), blocks.any(dim=3))
    assert model(torch.randn(5, 3, 64, 64), mask).shape == (5, 256, 48)
