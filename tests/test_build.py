"""Every combination of the four choices works, or is refused with the reason."""

import itertools
from dataclasses import replace

import pytest
import torch

from pixmim.build import build_crop, build_mask_sampler, build_model, build_objective
from pixmim.config import Crop, Mask, Model, PretrainConfig, Target
from pixmim.data.synthetic import Shapes
from pixmim.transforms.crops import finish
from pixmim.utils.errors import UserError

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}
THIN = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
MODELS = {
    "mae": Model("mae", "vit_tiny_patch16_224", **THIN, options=dict(SMALL)),
    "lsmae": Model("lsmae", "vit_tiny_patch16_224", **THIN, options=dict(SMALL)),
    "lsmae-coarser": Model("lsmae", "vit_tiny_patch16_224", **THIN, decoder_stride=2, options=dict(SMALL)),
    "lsmae-larger": Model(
        "lsmae", "vit_tiny_patch16_224", **THIN, decoder_stride=2, predict_patch=32, options=dict(SMALL)
    ),
    "convmae": Model("convmae", "convmae_tiny", **THIN),
    "simmim-vit": Model("simmim", "vit_tiny_patch16_224", options=dict(SMALL)),
    "simmim-beit": Model("simmim", "beit_base_patch16_224", head="mlp", options=dict(SMALL)),
    "simmim-swin": Model("simmim", "swin_tiny_patch4_window7_224", options={"embed_dim": 24, "window_size": 4}),
}
MASKS = [
    Mask("random", 0.5),
    Mask("units", 0.5, unit=32),
    Mask("units", 0.5, unit=32, whole_units=True),
    Mask("square", 0.3),
    Mask("moving-square", 0.3),
    Mask("blocks", 0.6),
]
TARGETS = [
    Target(kind, normalise_patches=normalise, normalise_window=window, distance=distance)
    for kind, (normalise, window), distance in itertools.product(
        ("low-frequency", "pixels"), ((True, 0), (False, 0), (False, 47)), ("mse", "l1", "smooth_l1")
    )
]
BINNED = [
    Target(kind, normalise_patches=False, distance="cross_entropy", bins=3) for kind in ("low-frequency", "pixels")
]
CROPS = [Crop(kind) for kind in ("src", "rrc", "cc")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [TARGETS, BINNED], ids=["values", "bins"])
def test_the_grid(name: str, targets: list[Target]) -> None:
    """96 x 64 pixels; one drawn image through each crop, one mask of each kind, one loss of each target."""
    base = PretrainConfig(model=MODELS[name], size="96x64", batch_size=3, target=targets[0])
    model = build_model(base)
    mean, std = (torch.tensor(v) for v in base.statistics)
    drawn = [Shapes(size=64).image(i) for i in range(3)]
    refused = []
    for mask_choice in MASKS:
        run = replace(base, mask=mask_choice)
        try:
            masks = build_mask_sampler(run, model.patch)
        except UserError as error:
            refused.append((mask_choice.kind, str(error)))
            continue
        mask = masks(0, range(3))
        for crop in CROPS:
            cut = build_crop(replace(run, crop=crop))
            images = finish(torch.stack([cut.crop(image, [0.3] * cut.draws) for image in drawn]), None, mean, std)
            prediction = model(images, mask)
            for target in targets:
                loss = build_objective(replace(run, target=target))(prediction, images, mask).loss
                assert torch.isfinite(loss), (mask_choice, crop, target)
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, missing
    kinds = [kind for kind, _ in refused]
    assert kinds == ([] if "simmim" in name else ["blocks"])
    assert all("drops hidden patches" in reason for _, reason in refused)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask("units", 0.5, unit=24), "no multiple of the model's patches of 16"),
        (Mask("units", 0.95, unit=32, whole_units=True), "hides all 6 units"),
        (Mask("random", 0.99), "leaves 0 visible"),
        (Mask("units", 0.5, unit=64, whole_units=True), "same number"),
    ],
)
def test_masks_that_a_run_would_stumble_over_are_refused_before_it(mask: Mask, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_mask_sampler(PretrainConfig(size="96x64", mask=mask), 16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model("mae", decoder_stride=5), "does not divide the encoder's 6x4 patches"),
        (Model("mae", predict_patch=32), "goes with 16"),
        (Model("simmim", "vit_tiny_patch16_224", decoder_stride=2), "has no decoder"),
        (Model("simmim", "vit_tiny_patch16_224", predict_patch=32), "has no decoder"),
    ],
)
def test_models_that_cannot_be_built_are_refused(model: Model, message: str) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_model(PretrainConfig(size="96x64", model=model))
