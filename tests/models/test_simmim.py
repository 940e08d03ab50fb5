"""SimMIM against its published figures, and its loss against the paper's formula on pixels."""

import pytest
import torch
from torch import Tensor

from pixmim import BlockwiseRandomMask, Mask, Pixels, RandomMask, ReconstructionLoss, create_model
from pixmim.models import features
from pixmim.models.simmim import SimMIM
from pixmim.utils.errors import UserError
from pixmim.utils.patches import hidden_pixels, unpatchify

SWIN = {"backbone": "swin_tiny_patch4_window7_224", "embed_dim": 24, "window_size": 4, "img_size": (64, 96)}
BEIT = {"backbone": "beit_base_patch16_224", "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (32, 48)}
VIT = {"backbone": "vit_tiny_patch16_224", "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (32, 48)}
KINDS = pytest.mark.parametrize("options", [SWIN, BEIT, VIT], ids=["swin", "beit", "vit"])


def make(options: dict[str, object], **more: object) -> SimMIM:
    model = create_model("simmim", **options, **more)
    assert isinstance(model, SimMIM)
    return model.eval()


def masks(model: SimMIM, size: tuple[int, int], batch: int = 2) -> Mask:
    return BlockwiseRandomMask(0.5, 16 // model.patch, whole_blocks=True)(
        batch, (size[0] // model.patch, size[1] // model.patch)
    )


@pytest.mark.parametrize(
    ("backbone", "options", "millions"),
    [
        ("swin_base_patch4_window7_224", {"img_size": 192, "window_size": 6}, 89.874),
        ("swin_large_patch4_window12_384", {"img_size": 192, "window_size": 12}, 199.881),
        ("beit_base_patch16_224", {}, 86.257),
    ],
)
def test_official_number_of_parameters(backbone: str, options: dict[str, object], millions: float) -> None:
    with torch.device("meta"):
        model = create_model("simmim", backbone, **options)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)


@KINDS
def test_without_hidden_patches_it_is_the_plain_encoder(options: dict[str, object]) -> None:
    """Without replaced patches, the map equals timm's own forward pass."""
    model = make(options)
    h, w = model.encoder.patch_embed.img_size
    images = torch.randn(2, 3, h, w)
    maps: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    nothing = torch.zeros(2, (h // model.patch) * (w // model.patch), dtype=torch.bool)
    model(images, Mask(nothing, None, None))
    tokens = model.encoder.forward_features(images)
    expected = tokens.permute(0, 3, 1, 2) if options is SWIN else tokens[:, 1:].transpose(1, 2).view_as(maps[0])
    torch.testing.assert_close(maps[0], expected, atol=1e-5, rtol=0)
    assert features(model.encoder, images).mean.shape == (2, model.encoder.num_features)


@KINDS
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_hidden_pixels_change_nothing(options: dict[str, object], head: str) -> None:
    model = make(options, head=head, in_chans=4)
    size = model.encoder.patch_embed.img_size
    images, mask = torch.randn(2, 4, *size), masks(model, size)
    other = torch.where(hidden_pixels(mask.hidden, model.patch, size), torch.randn_like(images), images)
    assert torch.equal(model(images, mask), model(other, mask))


@KINDS
def test_loss_equals_the_papers(options: dict[str, object]) -> None:
    """sum(|x - prediction| * mask) / (sum(mask) + 1e-5) / channels, over the pixels of full images."""
    model = make(options)
    size = model.encoder.patch_embed.img_size
    images, mask = torch.randn(2, 3, *size), masks(model, size)
    prediction = model(images, mask)
    loss = ReconstructionLoss(Pixels(), normalize_patches=False, distance="l1")(prediction, images, mask).loss
    pixels = hidden_pixels(mask.hidden, model.patch, size).float()
    gap = (images - unpatchify(prediction, model.patch, size)).abs() * pixels
    assert loss.item() == pytest.approx((gap.sum() / (pixels.sum() + 1e-5) / 3).item(), rel=1e-5)


def test_head_lays_values_out_as_channel_row_column() -> None:
    """SimMIM's order, unlike MAE's: value k of the head is channel k // stride^2 of its pixels."""
    model = make(VIT)
    torch.nn.init.zeros_(model.head[-1].weight)
    model.head[-1].bias.data = torch.arange(768.0)
    image = unpatchify(model(torch.zeros(1, 3, 32, 48), masks(model, (32, 48), 1)), 16, (32, 48))[0]
    for channel, y, x in ((0, 0, 0), (1, 3, 5), (2, 15, 15)):
        assert image[channel, 16 + y, 32 + x] == channel * 256 + y * 16 + x


@KINDS
def test_scores_of_bins_are_last(options: dict[str, object]) -> None:
    """Value k of the head is score (k // stride^2) % bins of channel k // stride^2 // bins, at one pixel."""
    model = make(options, outputs=5)
    size = options["img_size"]
    torch.nn.init.zeros_(model.head[-1].weight)
    model.head[-1].bias.data = torch.arange(float(model.stride**2 * 15))
    scores = unpatchify(model(torch.zeros(1, 3, *size), masks(model, size, 1)), model.patch, size)
    assert scores.shape == (1, 15, *size)
    for channel, bin_, y, x in ((0, 0, 0, 0), (1, 4, 3, 5), (2, 1, 15, 15)):
        expected = (channel * 5 + bin_) * model.stride**2 + y * model.stride + x
        assert scores[0, channel * 5 + bin_, y, model.stride + x] == expected


def test_rows_may_hide_different_numbers() -> None:
    model = make(VIT)
    hidden = torch.tensor([[True, False, False, False, False, False], [True, True, True, False, False, False]])
    assert model(torch.randn(2, 3, 32, 48), Mask.from_hidden(hidden)).shape == (2, 6, 768)


def test_initial_weights_of_a_vit_follow_the_paper() -> None:
    model = make(BEIT)
    for number, block in enumerate(model.encoder.blocks, start=1):
        assert block.attn.qkv.weight.abs().max() <= 0.02
        for last in (block.attn.proj, block.mlp.fc2):
            assert last.weight.abs().max() <= 0.02 / (2 * number) ** 0.5
            assert last.weight.abs().max() > 0.018 / (2 * number) ** 0.5
    embedding = model.encoder.patch_embed.proj
    assert 0.0199 < embedding.weight.abs().max() <= 0.02 and not embedding.bias.any()
    assert model.encoder.pos_embed is None and model.encoder.rel_pos_bias is not None


@pytest.mark.parametrize(("options", "deviation"), [(SWIN, 0.02), (BEIT, 0.0108)], ids=["swin", "beit"])
def test_the_first_mask_token_is_cut_at_its_deviation_on_a_vit_only(
    options: dict[str, object], deviation: float
) -> None:
    """A normal distribution that is cut at its deviation of 0.02 has a deviation of 0.0108."""
    model = make(options | {"embed_dim": 384, "num_heads": (8, 8, 8, 8) if options is SWIN else 8})
    assert model.mask_token.std().item() == pytest.approx(deviation, rel=0.15)


@pytest.mark.parametrize("size", [72, 100, (80, 112)])
def test_a_size_that_the_last_stage_cannot_cover_is_refused(size: object) -> None:
    with pytest.raises(UserError, match="choose multiples of 32"):
        create_model("simmim", "swin_tiny_patch4_window7_224", embed_dim=24, window_size=4, img_size=size)


def test_invalid_options_are_named() -> None:
    with pytest.raises(UserError, match="'linear', 'mlp', not 'deep'"):
        create_model("simmim", **VIT, head="deep")
    with pytest.raises(UserError, match="takes a Swin, Beit, ViT or convolutional network"):
        create_model("simmim", "pit_ti_224")
    with pytest.raises(UserError, match="multiples of 16"):
        create_model("simmim", **VIT | {"img_size": 40})
    with pytest.raises(ValueError, match="hide the same number"):
        hidden = torch.tensor([[True, False, False, False], [True, True, False, False]])
        mae = create_model("mae", "vit_tiny_patch16_224", img_size=32, depth=1, decoder_depth=1)
        mae(torch.zeros(2, 3, 32, 32), Mask.from_hidden(hidden))
    assert RandomMask()(1, 8).ids_keep is not None
