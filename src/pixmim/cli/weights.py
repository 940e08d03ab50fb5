"""`pixmim import` and `pixmim export`."""

from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import ModelFlags, command
from pixmim.utils.console import print_plain


@command("import")
def import_(
    file: Positional[str],
    /,
    *,
    to: Path | None = None,
    model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
) -> int:
    """Import weights of the methods' own code, OpenMMLab, OpenMixup, timm, torchvision or Hugging Face.

    Args:
        file: A checkpoint file, a folder that contains one, timm:NAME or hf:NAME. It is read as data.
        to: New folder for the model, which all other commands accept. Without it, only the report is printed.
        model_flags: Facts that the file does not contain.
    """
    from pixmim.weights.load import import_weights, resolve_model

    for line in import_weights(resolve_model(file, with_decoder=True, hints=model_flags.hints), to):
        print_plain(Console(), line)
    return 0


@command("export")
def export(
    model: Positional[str],
    /,
    *,
    to: Literal["timm", "hf", "mmpretrain", "detectron2", "onnx"],
    out: Path | None = None,
    push: str = "",
    description: str = "",
    attentive: bool = False,
    model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
) -> int:
    """Export a model for another project, with a model card (README.md).

    Args:
        model: A run, finished or not, an imported folder, a checkpoint file, timm:NAME or hf:NAME.
        to: The project. hf includes the decoder if transformers has the same model.
        out: New folder. Default: MODEL-FORMAT.
        push: Repository of the Hugging Face hub to upload the folder to (timm, hf, onnx).
        description: What the images of the training show and where they are from, for the model card.
        attentive: Add the run's newest attentive probe, a classifier (timm).
        model_flags: Facts that the file does not contain.
    """
    from pixmim.export import export_model

    hints = model_flags.hints
    for line in export_model(model, to, out, push, hints, description=description, attentive=attentive):
        print_plain(Console(), line)
    return 0
