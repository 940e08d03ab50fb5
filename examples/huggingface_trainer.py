"""PixMIM in the Trainer of transformers, with its ViTMAE: the loss is computed from the model's outputs.

python examples/huggingface_trainer.py FOLDER_OF_CLASS_FOLDERS
"""

import sys
import tempfile
from typing import Any

import torch
from huggingface import SMALL, fill_positions
from plain_loop import load_images
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

import pixmim


class PixMIMTrainer(Trainer):
    """A Trainer whose loss is PixMIM's."""

    loss_fn = pixmim.ReconstructionLoss(pixmim.LowFrequency(radius="auto"))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the loss of a batch, and the model's outputs if they are wanted."""
        outputs = model(**inputs)
        mask = pixmim.Mask.from_hidden(outputs.mask.bool())
        loss = self.loss_fn(outputs.logits, inputs["pixel_values"], mask).loss
        return (loss, outputs) if return_outputs else loss


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    """Return a batch of images without their labels."""
    return {"pixel_values": torch.stack([image for image, _ in samples])}


def train(folder: str, steps: int, config: ViTMAEConfig = SMALL, batch: int = 8) -> list[float]:
    """Train for some steps; return the loss of each."""
    model = ViTMAEForPreTraining(config)
    fill_positions(model)
    images = load_images(folder, config.image_size, batch).dataset  # with pixmim.SimpleResizedCrop
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-3, logging_steps=1,
            report_to=[], save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = PixMIMTrainer(model, arguments, train_dataset=images, data_collator=collate)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    for number, value in enumerate(train(sys.argv[1], steps=20), start=1):
        print(f"step {number}: loss {value:.4f}")
