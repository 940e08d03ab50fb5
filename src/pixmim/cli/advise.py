"""pixmim advise."""

import json
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import command
from pixmim.utils.console import print_plain
from pixmim.utils.files import check_output, write_text_atomically
from pixmim.utils.validation import Device, Integer


@command("advise")
def advise(
    data: Positional[str],
    /,
    *,
    images: Annotated[int, Integer(1, 20_000)] = 2_000,
    list_file: Annotated[Path | None, arg(name="list", metavar="FILE.txt")] = None,
    json_file: Annotated[str, arg(name="json", metavar="FILE|-")] = "",
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None,
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
        out: Folder for a page with small images, index.html.
        overwrite: Replace an existing file of --json.
        device: Device to train on: auto, cpu, cuda, cuda:1, mps.
        trial: Measure the speed of training with a few steps.
    """
    if json_file not in ("", "-"):
        check_output(Path(json_file), overwrite)
    from pixmim.advice import advise as examine
    from pixmim.advice.page import check_page

    if out is not None:
        check_page(out)
    console = Console(stderr=json_file == "-")
    advice = examine(data, images=images, write_list=list_file, device=device, trial=trial, console=console)
    if out is not None:
        print_plain(console, f"page: {advice.write_page(out)}")
    text = json.dumps(advice.to_dict(), indent=2)
    if json_file == "-":
        print(text)
    elif json_file:
        write_text_atomically(Path(json_file), text + "\n")
    if json_file != "-":
        print_plain(console, str(advice))
    return 0
