"""Distill an encoder that pixmim trained into a ResNet, with lightly-train (AGPL; it sends usage events by default).

python examples/lightly_train_distillation.py RUN FOLDER_OF_IMAGES OUT
"""

import sys

import lightly_train

import pixmim


def distill(run: str, folder: str, out: str, epochs: int, batch: int = 64) -> str:
    """Train a student; return the path of its weights, which torchvision's resnet18 loads."""
    teacher = pixmim.load_encoder(run)  # a timm module
    lightly_train.pretrain(
        out=out,
        data=folder,
        model="torchvision/resnet18",
        method="distillation",
        method_args={"teacher": teacher},
        epochs=epochs,
        batch_size=batch,
        num_workers=0,
        accelerator="auto",
    )
    return f"{out}/exported_models/exported_last.pt"


if __name__ == "__main__":
    print(distill(*sys.argv[1:4], epochs=100))
