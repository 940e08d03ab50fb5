"""Recipes for one's own images on one machine, and the demo. Their settings are ours; no paper stands behind them."""

from pixmim.config import Knn, Made, Mask, Model, Optim, PretrainConfig


def pixmim_vit_small() -> PretrainConfig:
    """PixMIM with ViT-S/16 at 224 px, for some ten thousand images and one GPU; batch 512, decoder 256 wide, 4 deep.

    pixmim pretrain pixmim-vit-small --data ~/photos
    """
    return PretrainConfig(
        epochs=300,
        batch_size=512,
        model=Model(backbone="vit_small_patch16_224", decoder_dim=256, decoder_depth=4, decoder_heads=8),
        optim=Optim(base_lr=3e-4, warmup=20),
        made=Made(images=50_000, steps=300 * 50_000 // 512),
    )


def pixmim_vit_tiny() -> PretrainConfig:
    """PixMIM with ViT-Ti/16 at 224 px, for a few thousand images and a small GPU or a patient CPU.

    pixmim pretrain pixmim-vit-tiny --data ~/photos
    """
    return PretrainConfig(
        epochs=200,
        batch_size=128,
        model=Model(backbone="vit_tiny_patch16_224", decoder_dim=128, decoder_depth=2, decoder_heads=4),
        optim=Optim(base_lr=2e-3, warmup=10),
        made=Made(images=10_000, steps=200 * 10_000 // 128),
    )


def demo() -> PretrainConfig:
    """PixMIM with a ViT of 1.2 million values on drawn shapes at 48 px: learns in minutes on two CPU cores.

    make demo
    """
    return PretrainConfig(
        data="shapes:count=200000,size=48",
        steps=1200,
        batch_size=128,
        size="48",
        model=Model(
            backbone="vit_tiny_patch16_224",
            decoder_dim=64,
            decoder_depth=2,
            decoder_heads=4,
            options={"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        ),
        mask=Mask(ratio=0.6),  # of 36 patches; at 0.75 it learns more slowly
        optim=Optim(base_lr=3e-3, warmup=0.2),
        knn=Knn("shapes:count=2000,seed=201,size=48", "shapes:count=1000,seed=202,size=48", every=0.128),
        made=Made(images=200_000, steps=1200),
    )
