"""pixmim import and pixmim export: how weights enter the house, and leave it."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from pixmim.config import OPTIONS, Option
from pixmim.errors import UserError, nearest
from pixmim.terminal import say


def import_(args: list[str]) -> int:
    """Recognise a file of weights, say what is in it, and keep it as a folder that the other commands take."""

    def command(
        file: Positional[str],
        /,
        *,
        to: Path | None = None,
        known: Annotated[dict[str, Option], OPTIONS] = {},  # noqa: B006
    ) -> int:
        """Take over weights: of MAE, LSMAE, ConvMAE, SimMIM, mmselfsup, mmpretrain, timm, Hugging Face.

        Args:
            file: A file, a folder that holds one, or timm:NAME. Nothing that is in it is run.
            to: A new folder, for the other commands; otherwise only the report is given.
            known: What shapes do not tell, such as: num_heads 6 decoder_heads 8 img_size 64.
        """
        from pixmim.pretrained import adopt, open_model
        from pixmim.weights.recognise import KNOWN

        for name in known:
            if name not in KNOWN:
                raise UserError(f"--known takes {', '.join(KNOWN)}, and not '{name}'{nearest(name, KNOWN)}")
        for line in adopt(open_model(file, whole=True, known=known), to):
            say(Console(), line)
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
    ) -> int:
        """Hand a backbone over.

        Args:
            model: A run, an imported folder, a file of weights, or timm:NAME.
            to: Who is to read it. hf takes the decoder along, where transformers has the same model.
            out: A new folder; otherwise MODEL-FORMAT.
            push: Name of a repository on the Hugging Face hub, to put the folder there as well (timm, hf, onnx).
        """
        from pixmim.handover import hand_over

        for line in hand_over(model, to, out, push):
            say(Console(), line)
        return 0

    return tyro.cli(command, prog="pixmim export", args=args)
