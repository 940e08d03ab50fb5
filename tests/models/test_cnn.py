"""SimMIM on networks of convolutions, compared with a slow form that hooks into timm's own forward pass."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim import RandomMask, create_model
from pixmim.masking import Mask
from pixmim.models import features
from pixmim.models.cnn import CNNSimMIM
from pixmim.models.feature_maps import maps, widths
from pixmim.models.layer_decay import layer_ids
from pixmim.utils.errors import UserError

BEFORE_LAST = {"resnet10t": "layer3", "convnext_atto": "stages.3.downsample", "efficientnet_b0": "blocks.4"}


def slow_forward(model: CNNSimMIM, name: str, images: Tensor, mask: Mask) -> Tensor:
    """Predict image by image: timm's forward pass, with the token added by a hook before the last stage."""
    predictions = []
    for image, hidden in zip(images, mask.hidden, strict=True):
        rows, columns = image.shape[1] // 32, image.shape[2] // 32
        seen = image.clone()
        for i in hidden.nonzero().flatten().tolist():
            y, x = i // columns * 32, i % columns * 32
            seen[:, y : y + 32, x : x + 32] = image.mean(dim=(1, 2))[:, None, None]

        def mark(module: nn.Module, inputs: object, output: Tensor, hidden: Tensor = hidden) -> Tensor:
            marked, step = output.clone(), output.shape[2] // rows  # noqa: B023
            for i in hidden.nonzero().flatten().tolist():
                y, x = i // columns * step, i % columns * step  # noqa: B023
                part = marked[:, :, y : y + step, x : x + step]
                marked[:, :, y : y + step, x : x + step] = part * model.mask_scale + model.mask_token
            return marked

        handle = model.encoder.get_submodule(BEFORE_LAST[name]).register_forward_hook(mark)
        final = model.encoder.forward_features(seen[None])  # type: ignore[operator]
        handle.remove()
        if name == "convnext_atto":  # timm has the final norm in its head
            norm = model.encoder.head.norm  # type: ignore[union-attr]
            final = F.layer_norm(final.permute(0, 2, 3, 1), final.shape[1:2], norm.weight, norm.bias, 1e-6)
            final = final.permute(0, 3, 1, 2)
        for y in range(rows):
            for x in range(columns):
                values = F.conv2d(final[:, :, y : y + 1, x : x + 1], model.head[0].weight, model.head[0].bias).view(
                    3, 32, 32
                )
                predictions.append(values.permute(1, 2, 0).flatten())
    return torch.stack(predictions).view(len(images), -1, 32 * 32 * 3)


def test_head_and_token_begin_as_a2mims() -> None:
    """Weights normal with a deviation of 0.02, biases zero."""
    model = create_model("simmim", "resnet10t", img_size=64, head="mlp")
    for values in (model.mask_token, model.head[0].weight, model.head[2].weight):
        assert values.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.head[0].bias.any() and not model.head[2].bias.any()


@pytest.mark.parametrize("name", BEFORE_LAST)
def test_forward_is_the_slow_form(name: str) -> None:
    model = create_model("simmim", name, img_size=(64, 96)).double().eval()
    assert isinstance(model, CNNSimMIM) and model.patch == 32
    with torch.no_grad():
        model.mask_scale.copy_(torch.rand_like(model.mask_scale))
        images, mask = torch.randn(2, 3, 64, 96, dtype=torch.float64), RandomMask(0.5)(2, (2, 3))
        torch.testing.assert_close(model(images, mask), slow_forward(model, name, images, mask), atol=1e-9, rtol=0)


def test_hidden_pixels_have_no_effect_except_their_mean() -> None:
    model = create_model("simmim", "resnet10t", img_size=64).eval()
    images, mask = torch.randn(2, 3, 64, 64), RandomMask(0.5)(2, (2, 2))
    hidden = mask.hidden.view(2, 1, 2, 1, 2, 1).expand(2, 3, 2, 32, 2, 32).reshape(2, 3, 64, 64)
    mirrored = torch.where(hidden, images.flip(2).flip(3), images)
    pairs = hidden & hidden.flip(2).flip(3)
    other = torch.where(pairs, mirrored, images)  # pixels of hidden patches change places, so the mean stays
    torch.testing.assert_close(model(other, mask), model(images, mask), atol=1e-5, rtol=0)
    visible = torch.where(hidden, images, images.flip(2))
    assert not torch.allclose(model(visible, mask), model(images, mask), atol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnety_002", "mobilenetv3_small_050", "densenet121"])
def test_encoders_are_timms_and_all_but_their_classifier_learn(name: str) -> None:
    model = create_model("simmim", name, img_size=64, in_chans=4)
    images = torch.randn(2, 4, 64, 64)
    model(images, RandomMask(0.5)(2, (2, 2))).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    encoder = timm.create_model(name, in_chans=4, num_classes=0)
    encoder.load_state_dict(model.encoder.state_dict())  # with the statistics of batch norms
    result = features(model.encoder.eval(), images)
    last = encoder.eval().forward_features(images)
    expected = encoder.head.norm(last) if name == "convnext_atto" else last
    assert torch.equal(result.map, expected) and result.vector.shape[:2] == (2, 1)
    assert [one.shape[1] for one in maps(model.encoder, images)] == widths(model.encoder) and len(widths(encoder)) == 4
    ids = layer_ids(model.encoder)
    assert ids.keys() == dict(model.encoder.named_parameters()).keys() and min(ids.values()) == 0


def test_stages_decay_one_by_one() -> None:
    ids = layer_ids(timm.create_model("resnet18", num_classes=0))
    assert {name.partition(".")[0]: layer for name, layer in ids.items()} == {
        "conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4
    }  # fmt: skip


def test_convnext_decays_by_the_groups_of_its_code() -> None:
    """Three blocks of the third stage are a layer; a downsampling is in the layer of the blocks after it."""
    with torch.device("meta"):
        base, tiny = (layer_ids(timm.create_model(f"convnext_{name}", num_classes=2)) for name in ("base", "tiny"))
    assert [base[f"stages.2.blocks.{block}.gamma"] for block in (0, 2, 3, 26)] == [3, 3, 4, 11]
    names = ("stem.0.weight", "stages.0.blocks.1.gamma", "stages.1.downsample.1.weight", "stages.2.downsample.1.weight")
    assert [base[name] for name in names] == [0, 1, 2, 3]
    names = ("stages.3.downsample.1.weight", "stages.3.blocks.2.gamma", "head.norm.weight", "head.fc.weight")
    assert [base[name] for name in names] == [12, 12, 13, 13] and [tiny[name] for name in names] == [6, 6, 7, 7]


def test_a_network_that_is_no_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="VGG cannot be masked"):
        create_model("simmim", "vgg11", img_size=64)
    with pytest.raises(UserError, match="multiples of 32"):
        create_model("simmim", "resnet18", img_size=80)
