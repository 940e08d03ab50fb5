"""pixmim advise."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import checked
from pixmim.cli.visualize import image_format
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, check_output, write_text_atomically
from pixmim.utils.validation import Device, Integer


def advise(args: list[str]) -> int:
    """Run `pixmim advise`."""

    def command(
        data: Positional[str],
        /,
        *,
        images: Annotated[int, Integer(1, 20_000)] = 2_000,
        list_file: Annotated[Path | None, arg(name="list", metavar="FILE.txt")] = None,
        json_file: Annotated[str, arg(name="json", metavar="FILE|-")] = "",
        out: Annotated[Path | None, arg(metavar="FILE.png")] = None,
        overwrite: bool = False,
        device: Device = "auto",
        trial: bool = True,
    ) -> int:
        """Examine a dataset, suggest settings with their reasons, and print the commands to type.

        Args:
            data: Images: anything that --data of pretrain accepts.
            images: Images to examine, evenly distributed and always the same.
            list_file: Write a list of the images without masks, for --data.
            json_file: Write everything as JSON to a file, or to the standard output (-) instead of the text.
            out: Draw the power spectrum of the images.
            overwrite: Replace existing files of --json and --out.
            device: Device to train on: auto, cpu, cuda, cuda:1, mps.
            trial: Measure the speed of training with a few steps.
        """
        kind = "" if out is None else image_format(out)
        for file in (out, None if json_file in ("", "-") else Path(json_file)):
            if file is not None:
                check_output(file, overwrite)
        from pixmim.advice import advise
        from pixmim.report.spectrum import draw_spectrum

        console = Console(stderr=json_file == "-")
        advice = advise(data, images=images, write_list=list_file, device=device, trial=trial, console=console)
        if out is not None:
            if advice.survey.spectrum is None:
                raise UserError(f"--out {out}: there is no spectrum, because no image has any contrast")
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(out, partial(draw_spectrum(advice.survey.spectrum).save, format=kind))
        text = json.dumps(advice.to_dict(), indent=2)
        if json_file == "-":
            print(text)
        elif json_file:
            write_text_atomically(Path(json_file), text + "\n")
        if json_file != "-":
            print_plain(console, str(advice))
        return 0

    return tyro.cli(checked(command), prog="pixmim advise", args=args)
