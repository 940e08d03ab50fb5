"""Test every combination of crop, mask, model and target: it works, or is refused with the reason."""

import itertools
from dataclasses import replace

import pytest
import torch

from pixmim.build import build_crop, build_loss, build_mask_sampler, build_model
from pixmim.config import ArchitectureConfig, CropConfig, MaskConfig, PretrainConfig, TargetConfig
from pixmim.data.synthetic import SyntheticShapes
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.utils.initialization import WithoutInitialization, build_on_meta

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}
THIN = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
MODELS = {
    "mae": ArchitectureConfig("mae", "vit_tiny_patch16_224", **THIN, options=dict(SMALL)),
    "lsmae": ArchitectureConfig("lsmae", "vit_tiny_patch16_224", **THIN, options=dict(SMALL)),
    "lsmae-coarser": ArchitectureConfig("lsmae", "vit_tiny_patch16_224", **THIN, decoder_stride=2, options=dict(SMALL)),
    "lsmae-larger": ArchitectureConfig(
        "lsmae", "vit_tiny_patch16_224", **THIN, decoder_stride=2, predict_patch=32, options=dict(SMALL)
    ),
    "mff": ArchitectureConfig("mff", "vit_tiny_patch16_224", **THIN, options=SMALL | {"depth": 3}),
    "pixio": ArchitectureConfig("pixio", "vit_tiny_patch16_224", **THIN, options=dict(SMALL)),
    "crossmae": ArchitectureConfig("crossmae", "vit_tiny_patch16_224", **THIN, options=SMALL | {"depth": 2}),
    "convmae": ArchitectureConfig("convmae", "convmae_tiny", **THIN, options={"depth": [1, 1, 1]}),
    "simmim-vit": ArchitectureConfig("simmim", "vit_tiny_patch16_224", options=dict(SMALL)),
    "simmim-beit": ArchitectureConfig("simmim", "beit_base_patch16_224", head="mlp", options=dict(SMALL)),
    "simmim-cnn": ArchitectureConfig("simmim", "convnext_atto", options={"depths": [1, 1, 1, 1]}),
    "simmim-swin": ArchitectureConfig(
        "simmim",
        "swin_tiny_patch4_window7_224",
        options={"embed_dim": 24, "window_size": 4, "depths": [2, 1, 1, 1]},
    ),
}
MASKS = [
    MaskConfig("random", 0.5),
    MaskConfig("blocks", 0.5, block_size=32),
    MaskConfig("blocks", 0.5, block_size=32, whole_blocks=True),
    MaskConfig("square", 0.3),
    MaskConfig("moving-square", 0.3),
    MaskConfig("beit-blocks", 0.6),
    MaskConfig("green-noise", 0.5),
]
TARGETS = [
    TargetConfig(kind, normalize_patches=normalize, normalize_window=window, distance=distance)
    for kind, (normalize, window), distance in itertools.product(
        ("low-frequency", "pixels"), ((True, 0), (False, 0), (False, 9)), ("mse", "l1", "smooth_l1")
    )
]
BINNED = [
    TargetConfig(kind, normalize_patches=False, distance="cross_entropy", bins=3)
    for kind in ("low-frequency", "pixels")
]
CROPS = [CropConfig(kind) for kind in ("simple-resized", "random-resized", "center")]


def test_every_combination_is_a_configuration() -> None:
    for mask, crop, target in itertools.product(MASKS, CROPS, TARGETS + BINNED):
        config = PretrainConfig(size="96x64", batch_size=3, mask=mask, crop=crop, target=target)
        assert (config.mask, config.crop, config.target) == (mask, crop, target)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [TARGETS, BINNED], ids=["values", "bins"])
def test_every_combination(name: str, targets: list[TargetConfig]) -> None:
    """96 x 64 pixels, with three synthetic images through each crop, mask and target."""
    base = PretrainConfig(model=MODELS[name], size="96x64", batch_size=3, target=targets[0])
    model = build_model(base)
    mean, std = (torch.tensor(v) for v in base.normalization)
    shapes = [SyntheticShapes(size=64).image(i) for i in range(3)]
    losses = [build_loss(replace(base, target=target)) for target in targets]
    batches = []
    for crop in CROPS:
        transform = build_crop(replace(base, crop=crop))
        cropped = [transform.crop(image, [0.3] * transform.num_uniforms) for image in shapes]
        batches.append(flip_and_normalize(torch.stack(cropped), None, mean, std))
    refused = []
    for mask_config in MASKS:
        try:
            masks = build_mask_sampler(replace(base, mask=mask_config), model.patch)
        except UserError as error:
            refused.append((mask_config.kind, str(error)))
            continue
        mask = masks(0, range(3))
        for crop, images in zip(CROPS, batches, strict=True):
            prediction = model(images, mask)
            for target, compute_loss in zip(targets, losses, strict=True):
                loss = compute_loss(prediction, images, mask).loss
                assert torch.isfinite(loss), (mask_config, crop, target)
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, missing
    kinds = [kind for kind, _ in refused]
    assert kinds == ([] if "simmim" in name else ["beit-blocks"])
    assert all("drops hidden patches" in reason for _, reason in refused)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MaskConfig("blocks", 0.5, block_size=24), "not a multiple of the model's 16-pixel patches"),
        (MaskConfig("blocks", 0.95, block_size=32, whole_blocks=True), "hides all 6 blocks"),
        (MaskConfig("random", 0.99), "leaves 0 visible"),
        (MaskConfig("blocks", 0.5, block_size=64, whole_blocks=True), "same number"),
    ],
)
def test_masks_that_fail_in_training_are_refused(mask: MaskConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_mask_sampler(PretrainConfig(size="96x64", mask=mask), 16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ArchitectureConfig("mae", decoder_stride=5), "does not divide the encoder's 6x4 patches"),
        (ArchitectureConfig("mae", predict_patch=32), "choose 16"),
        (ArchitectureConfig("simmim", "vit_tiny_patch16_224", decoder_stride=2), "has no decoder"),
        (ArchitectureConfig("simmim", "vit_tiny_patch16_224", predict_patch=32), "has no decoder"),
    ],
)
def test_models_that_cannot_be_built_are_refused(model: ArchitectureConfig, message: str) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_model(PretrainConfig(size="96x64", model=model))


@pytest.mark.parametrize(("low", "high"), [(-0.02, 0.02), (-2.0, 2.0), (0.02, 0.04)])
def test_a_truncated_normal_without_initialization_ends(low: float, high: float) -> None:
    """torch draws until all values are within the bounds: those of memory that was in use would never be."""
    weight = torch.full((4, 4), 1e9)
    with WithoutInitialization():
        torch.nn.init.trunc_normal_(weight, std=0.02, a=low, b=high)
    assert weight.abs().max() <= 2


@pytest.mark.parametrize("name", MODELS)
def test_what_is_built_without_initialization_differs_in_nothing_that_is_not_loaded(name: str) -> None:
    """Compare parameters and all buffers, also those that no file contains, after loading the same weights."""
    config = PretrainConfig(model=MODELS[name], size="64")
    expected, on_meta = build_model(config), build_on_meta(lambda: build_model(config), name)
    with WithoutInitialization():
        built = build_model(config)
    built.load_state_dict(expected.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        one, two, three = (dict(getattr(model, kind)()) for model in (expected, built, on_meta))
        assert one.keys() == two.keys() == three.keys()
        assert all(torch.equal(value, two[key]) and three[key].shape == value.shape for key, value in one.items())
