"""ConvMAE against its published figures; hidden pixels must not influence visible latents."""

import pytest
import torch

from pixmim import RandomMask, create_model
from pixmim.models import features
from pixmim.models.convmae import ConvMAE, ConvMAEEncoder
from pixmim.models.feature_maps import maps
from pixmim.utils.errors import UserError
from pixmim.utils.patches import hidden_pixels

SMALL = {"embed_dim": (8, 16, 32), "depth": (2, 2, 2), "num_heads": 4}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def make(**options: object) -> ConvMAE:
    model = create_model("convmae", **SMALL | DECODER | options)
    assert isinstance(model, ConvMAE)
    return model


def test_base_has_the_official_number_of_parameters() -> None:
    with torch.device("meta"):
        model = create_model("convmae")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(115.041, abs=6e-4)
    assert sum(p.numel() for p in model.encoder.parameters()) / 1e6 == pytest.approx(84.606, abs=6e-4)


def test_only_the_third_patch_embedding_has_xavier_weights() -> None:
    """As in the official code; the others keep PyTorch's, uniform up to 1 / sqrt(fan-in)."""
    model = make()
    fan_in = {"patch_embed1": 3 * 16, "patch_embed2": 8 * 4, "patch_embed3": 16 * 4}
    limits = {name: number**-0.5 for name, number in fan_in.items()} | {"patch_embed3": (6 / (32 + 64)) ** 0.5}
    for name, limit in limits.items():
        largest = getattr(model.encoder, name).proj.weight.abs().max().item()
        assert 0.95 * limit < largest <= limit, name


@pytest.mark.parametrize(("size", "channels"), [((64, 64), 3), ((48, 80), 5)])
def test_hidden_pixels_change_visible_latents_by_exactly_zero(size: tuple[int, int], channels: int) -> None:
    model = make(img_size=size, in_chans=channels)
    n = size[0] * size[1] // 256
    images, mask = torch.randn(3, channels, *size), RandomMask(0.6)(3, n)
    hidden = hidden_pixels(mask.hidden, 16, size)
    other = torch.where(hidden, torch.randn_like(images) * 100, images)
    assert torch.equal(model.encode(images, mask), model.encode(other, mask))
    seen = torch.where(hidden, images, images + 1)
    assert not torch.equal(model.encode(images, mask), model.encode(seen, mask))
    assert model(images, mask).shape == (3, n, 256 * channels)


def test_a_coarser_decoder_predicts_patches_of_either_size() -> None:
    images, mask = torch.randn(2, 3, 32, 64), RandomMask(0.5)(2, 8)
    for patch, shape in ((16, (2, 8, 768)), (32, (2, 2, 3072))):
        model = make(img_size=(32, 64), decoder_stride=2, predict_patch=patch)
        assert model(images, mask).shape == shape
        assert model.decoder.pos_embed.shape == (1, 2, 16)


def test_visible_latents_against_a_masked_image() -> None:
    """A slow form without gather: set hidden pixels to zero before each depthwise convolution, by index arithmetic."""
    model = make(img_size=32).double()
    images, mask = torch.randn(1, 3, 32, 32, dtype=torch.float64), RandomMask(0.5)(1, 4)
    encoder = model.encoder

    def block(layer: torch.nn.Module, x: torch.Tensor, stride: int) -> torch.Tensor:
        y = layer.conv1(layer.norm1(x)).clone()
        for n, hidden in enumerate(mask.hidden[0].tolist()):
            if hidden:
                top, left = n // 2 * 16 // stride, n % 2 * 16 // stride
                y[:, :, top : top + 16 // stride, left : left + 16 // stride] = 0
        x = x + layer.conv2(layer.attn(y))
        return x + layer.mlp(layer.norm2(x))

    first = encoder.patch_embed1(images)
    for layer in encoder.blocks1:
        first = block(layer, first, 4)
    second = encoder.patch_embed2(first)
    for layer in encoder.blocks2:
        second = block(layer, second, 8)
    third = encoder.patch_embed4(encoder.patch_embed3(second).flatten(2).transpose(1, 2)) + encoder.pos_embed
    visible = (~mask.hidden[0]).nonzero()[:, 0]
    fine = [
        layer(stage).flatten(2).transpose(1, 2)[:, visible]
        for layer, stage in ((model.stage1_output_decode, first), (model.stage2_output_decode, second))
    ]
    expected = encoder.norm(encoder.blocks3(third[:, visible]) + sum(fine))
    torch.testing.assert_close(model.encode(images, mask), expected, atol=1e-12, rtol=0)


def test_an_unmasked_encoder_returns_features_or_logits() -> None:
    images = torch.randn(2, 3, 32, 64)
    encoder = ConvMAEEncoder(img_size=(32, 64), **SMALL).eval()
    output = features(encoder, images, blocks=2)
    assert output.vector.shape == (2, 2, 32) and output.map.shape == (2, 32, 2, 4)
    torch.testing.assert_close(output.mean, encoder(images))
    larger = torch.randn(2, 3, 64, 128)  # of the same proportions
    torch.testing.assert_close(features(encoder, larger).mean, encoder(larger))
    assert maps(encoder, larger)[2].shape == (2, 32, 4, 8)
    classifier = ConvMAEEncoder(img_size=(32, 64), num_classes=7, **SMALL)
    assert classifier(images).shape == (2, 7)
    assert {"fc_norm.weight", "head.weight"} <= set(classifier.state_dict()) and "norm.weight" not in dict(
        classifier.named_parameters()
    )


def test_invalid_options_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'convmae_base'"):
        create_model("convmae", "convmae_bas")
    with pytest.raises(UserError, match="multiples of 16"):
        make(img_size=40)
    with pytest.raises(UserError, match="did you mean 'embed_dim'"):
        make(embed_dims=3)
    with pytest.raises(UserError, match="cannot be built with these options"):
        make(depths=3)
    with pytest.raises(ValueError, match="made for"):
        make(img_size=32)(torch.zeros(1, 3, 48, 64), RandomMask()(1, 12))
