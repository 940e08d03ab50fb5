"""pixmim reconstruct, attention, embed and view."""

import io
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import ChoiceFlags, ModelFlags, checked, command
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.files import atomic_write, check_output
from pixmim.utils.validation import Data, Device, Integer

if TYPE_CHECKING:
    from pixmim.data.dataset import ImageDataset
    from pixmim.evaluation.visualize import Pixels
    from pixmim.weights.detect import Weights

Sheet: TypeAlias = "tuple[dict[str, Pixels], list[str], list[str]]"
"""Images by column, the names of the rows, and a line for each unreadable image."""


def reconstruct(args: list[str]) -> int:
    """Draw what a model predicts of hidden patches."""

    def draw(weights: "Weights", data: "ImageDataset", count: int) -> Sheet:
        from pixmim.report.reconstruct import COLUMNS, reconstruct

        drawing = reconstruct(weights, data, count)
        print_plain(Console(), "\n".join(f"{name:<12}{text}" for name, text in COLUMNS.items()))
        return drawing.columns, drawing.names, drawing.errors

    about = (
        "Hide patches of images, and draw the prediction with the input and the target. The model needs its decoder."
    )
    return _draw_command(args, "pixmim reconstruct", about, Path("reconstruction.png"), 16, draw)


def attention(args: list[str]) -> int:
    """Draw the attention of the last block of a ViT."""

    def draw(weights: "Weights", data: "ImageDataset", count: int) -> Sheet:
        from pixmim.report.attention import attention_sheet

        return attention_sheet(weights, data, count)

    about = "Draw the attention of a ViT's last block over images: the mean of all heads, and each head."
    return _draw_command(args, "pixmim attention", about, Path("attention.png"), 8, draw)


def _draw_command(
    args: list[str], prog: str, about: str, default_out: Path, default_count: int, draw: Callable[..., Sheet]
) -> int:
    def run(
        model: Positional[str],
        images: Positional[tuple[Path, ...]],
        /,
        *,
        out: Path = default_out,
        overwrite: bool = False,
        count: Annotated[int, Integer(1, 10_000)] = default_count,
        model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
        bands: str = "",
    ) -> int:
        """Draw images.

        Args:
            model: A run, finished or not, an imported folder, a weights file, or timm:NAME (without a decoder).
            images: Images, or folders of them.
            out: The PNG file, with a row per image.
            overwrite: Replace an existing file.
            count: Maximum number of images; `reconstruct` makes a random choice of more.
            model_flags: Values that the weights file lacks.
            bands: Channels to draw as red, green and blue, counted from 1, such as 4,3,2; by default the run's.
        """
        if not images:
            raise UserError("no images given: add image files or folders after MODEL")
        kind = image_format(out)
        check_output(out, overwrite)
        from pixmim.build import image_spec
        from pixmim.data.image_folder import from_paths
        from pixmim.evaluation.visualize import labeled_grid
        from pixmim.report.reconstruct import with_bands

        weights = with_bands(_open_model(model, model_flags, with_decoder=prog == "pixmim reconstruct"), bands)
        columns, names, errors = draw(weights, from_paths(images, image_spec(weights.config)), count)
        for line in errors:
            print_plain(Console(stderr=True), f"left out: {line}")
        image = labeled_grid(columns, names)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            atomic_write(out, partial(image.save, format=kind))
        except (OSError, ValueError, OverflowError, RuntimeError, struct.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk; the others mean that the drawing is too large for the format
            raise UserError(f"{out} cannot be written: {first_line(error)}. Pass a .png, or less --count") from None
        print_plain(Console(), f"written to {out}")
        return 0

    return tyro.cli(checked(run), prog=prog, description=about, args=args)


@command("embed")
def embed(
    model: Positional[str],
    /,
    *,
    data: Data,
    choice: Annotated[ChoiceFlags, arg(name="")] = ChoiceFlags(),  # noqa: B008
    out: Path,
    thumbnails: bool = False,
    overwrite: bool = False,
    kind: Annotated[Literal["cls", "mean", "both"], arg(name="features")] = "both",
    batch_size: Annotated[int, Integer(1, 1_000_000)] = 256,
    device: Device = "auto",
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
) -> int:
    """Write the features of every image of a dataset, with its file name. Resumes an interrupted run.

    Args:
        model: A run, finished or not, an imported folder, a weights file, timm:NAME or hf:NAME.
        data: Images, in the syntax of pretrain's --data.
        choice: Images to choose by their names.
        out: .npy (float32, a row per image, file names in a .csv of the same name) or .parquet.
        thumbnails: Add thumbnails and, with umap-learn, a projection x and y to .parquet, for embedding-atlas.
        overwrite: Replace existing files.
        kind: cls: the class token, or without one the vector that the network pools (column pooled). mean: the mean of
            the patch tokens.
        batch_size: Images per forward pass.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto: bf16 where the device supports it.
        model_flags: Values that the weights file lacks.
    """
    from pixmim.api import embed_to_file

    weights = _open_model(model, model_flags)
    options = {"batch_size": batch_size, "device": device, "precision": precision, "overwrite": overwrite}
    options["thumbnails"] = thumbnails
    embed_to_file(weights, choice.choose(data), out, features=kind, **options)  # type: ignore[arg-type]
    return 0


@command("view", "Look at runs in the browser.")
def view(
    runs: Positional[tuple[str, ...]],
    /,
    *,
    data: Data | None = None,
    host: str = "127.0.0.1",
    port: Annotated[int, Integer(0, 65_535)] = 0,
    browser: Annotated[bool, arg(name="browser")] = True,
    device: Device = "auto",
) -> int:
    """Open a page with curves, reconstructions and neighbors in the browser, while a run trains or afterwards.

    Args:
        runs: Folders of runs, or of imported weights.
        data: Images to choose from, in the syntax of pretrain's --data; by default those of the first run.
        host: Address to listen on. 0.0.0.0 lets other machines open the page, if they know its token.
        port: Port to listen on; 0: a free one.
        browser: Open the browser.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    from pixmim.viewer import view as open_page

    open_page(runs, data=data, host=host, port=port, open_browser=browser, device=device)
    return 0


def _open_model(model: str, model_flags: ModelFlags, with_decoder: bool = False) -> "Weights":
    """Open a model, and print the progress of its training and the values assumed."""
    from pixmim.weights.load import describe, resolve_model

    weights = resolve_model(model, with_decoder=with_decoder, hints=model_flags.hints)
    for line in describe(model, weights):
        print_plain(Console(), line)
    return weights


def image_format(out: Path) -> str:
    """Return Pillow's format for the suffix of a file. Raises UserError for one that cannot hold a color drawing."""
    from PIL import Image

    kind = Image.registered_extensions().get(out.suffix.lower(), "")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError, RuntimeError):  # an unknown format, or one that lacks a writer or color
        kind = ""
    if kind in ("", "ICO", "ICNS"):  # icons are small
        raise UserError(f"--out {out} is not the name of an image file: pass one such as {out.stem}.png")
    return kind
