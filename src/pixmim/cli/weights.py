"""pixmim import and pixmim export: how weights enter the house, and leave it."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import ModelFlags
from pixmim.utils.console import print_plain


def import_(args: list[str]) -> int:
    """Recognize a file of weights, say what is in it, and keep it as a folder that the other commands take."""

    def command(
        file: Positional[str],
        /,
        *,
        to: Path | None = None,
        model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
    ) -> int:
        """Take over weights: of MAE, LSMAE, ConvMAE, SimMIM, mmselfsup, mmpretrain, timm, Hugging Face.

        Args:
            file: A file, a folder that holds one, or timm:NAME. Nothing that is in it is run.
            to: A new folder, for the other commands; otherwise only the report is given.
            model_flags: What the file does not contain.
        """
        from pixmim.weights.load import import_weights, resolve_model

        for line in import_weights(resolve_model(file, with_decoder=True, hints=model_flags.hints), to):
            print_plain(Console(), line)
        return 0

    return tyro.cli(command, prog="pixmim import", args=args)


def export(args: list[str]) -> int:
    """Write a model as another project reads it."""

    def command(
        model: Positional[str],
        /,
        *,
        to: Literal["timm", "hf", "mmpretrain", "detectron2", "onnx"],
        out: Path | None = None,
        push: str = "",
        model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
    ) -> int:
        """Hand a backbone over.

        Args:
            model: A run, finished or not, an imported folder, a file of weights, or timm:NAME.
            to: Who is to read it. hf takes the decoder along, where transformers has the same model.
            out: A new folder; otherwise MODEL-FORMAT.
            push: Name of a repository on the Hugging Face hub, to put the folder there as well (timm, hf, onnx).
            model_flags: What the file does not contain.
        """
        from pixmim.export import export_model

        for line in export_model(model, to, out, push, model_flags.hints):
            print_plain(Console(), line)
        return 0

    return tyro.cli(command, prog="pixmim export", args=args)
