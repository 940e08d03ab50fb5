"""The published recipes: ViT on ImageNet-1k, batch 4096.

Hours are arithmetic, not measurements: images / (6,000 images/s for base, 3,000 for large), about 35 % of what one
H100 can multiply in bf16.
"""

from dataclasses import replace

from pixmim.config import Crop, Made, Model, Run, Target

IMAGES = 1_281_167


def mae_vit_base(epochs: int) -> Run:
    """MAE with ViT-B/16 (arXiv 2111.06377): random resized crop, pixels normalised per patch.

    pixmim pretrain mae-vit-base --data imagenet/train
    18, 47 and 95 H100-hours for 300, 800 and 1600 epochs (estimate).
    Aims at 60.8 / 65.1 / 67.1 % linear probe and 82.8 / 83.3 / 83.5 % fine-tuned (PixMIM's table 1, MAE's rows).
    """
    return Run(
        epochs=epochs,
        batch_size=4096,
        model=Model(backbone="vit_base_patch16_224"),
        crop=Crop(kind="rrc"),
        target=Target(kind="pixels"),
        made=Made(images=IMAGES, steps=epochs * IMAGES // 4096),
    )


def mae_vit_large(epochs: int) -> Run:
    """MAE with ViT-L/16; otherwise as `mae_vit_base`.

    pixmim pretrain mae-vit-large --data imagenet/train
    36, 95 and 190 H100-hours for 300, 800 and 1600 epochs (estimate).
    Aims at 75.8 % linear probe and 85.9 % fine-tuned after 1600 epochs (MAE's paper).
    """
    return replace(mae_vit_base(epochs), model=Model(backbone="vit_large_patch16_224"))


def pixmim_vit_base(epochs: int) -> Run:
    """PixMIM on MAE with ViT-B/16 (arXiv 2303.02416): simple resized crop, low frequencies up to radius 40.

    pixmim pretrain pixmim-vit-base --data imagenet/train
    18, 47 and 95 H100-hours for 300, 800 and 1600 epochs (estimate).
    Aims at 63.3 / 67.5 % linear probe and 83.1 / 83.5 % fine-tuned after 300 / 800 epochs (table 1).
    """
    return _with_pixmim(mae_vit_base(epochs))


def pixmim_vit_large(epochs: int) -> Run:
    """PixMIM on MAE with ViT-L/16; otherwise as `pixmim_vit_base`. No number has been published.

    pixmim pretrain pixmim-vit-large --data imagenet/train
    36, 95 and 190 H100-hours for 300, 800 and 1600 epochs (estimate).
    """
    return _with_pixmim(mae_vit_large(epochs))


def _with_pixmim(run: Run) -> Run:
    """PixMIM is two values of a method's four choices."""
    return replace(run, crop=Crop(kind="src"), target=Target(kind="low-frequency", radius=40.0))
