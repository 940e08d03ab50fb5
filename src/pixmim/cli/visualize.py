"""pixmim reconstruct, attention and embed: what a model makes of somebody's pictures."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import ModelFlags, checked
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, check_output
from pixmim.utils.validation import Data, Device, Integer

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixmim.weights.detect import Weights


def reconstruct(args: list[str]) -> int:
    """Draw what a model predicts of hidden patches."""

    def command(
        model: Positional[str],
        images: Positional[tuple[Path, ...]],
        /,
        *,
        out: Path = Path("reconstruction.png"),
        overwrite: bool = False,
        count: Annotated[int, Integer(1, 10_000)] = 16,
        model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
        bands: str = "",
    ) -> int:
        """Hide patches of pictures and draw what a model predicts there, beside what it saw and should have predicted.

        Args:
            model: A run, finished or not, an imported folder, or a file of weights with its decoder.
            images: Pictures, or folders of them.
            out: The PNG to write: a row for each picture.
            overwrite: Replace a file that is there.
            count: Most pictures to draw; of more, a random choice.
            model_flags: What the file does not contain.
            bands: Channels to draw as red, green and blue, counted from 1, such as 4,3,2; otherwise the run's.
        """
        from pixmim.api import reconstruct as draw
        from pixmim.report.reconstruct import COLUMNS

        _some(images)
        kind = _kind(out, overwrite)
        _save(draw(_opened(model, model_flags, with_decoder=True), images, count=count, bands=bands), out, kind)
        print_plain(Console(), "\n".join(f"{name:<12}{text}" for name, text in COLUMNS.items()))
        print_plain(Console(), f"written to {out}")
        return 0

    return tyro.cli(checked(command), prog="pixmim reconstruct", args=args)


def attention(args: list[str]) -> int:
    """Draw where the last block of a ViT looks."""

    def command(
        model: Positional[str],
        images: Positional[tuple[Path, ...]],
        /,
        *,
        out: Path = Path("attention.png"),
        overwrite: bool = False,
        count: Annotated[int, Integer(1, 10_000)] = 8,
        model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
        bands: str = "",
    ) -> int:
        """Draw the attention of the last block over pictures: of all heads together, and of each one.

        Args:
            model: A run, finished or not, an imported folder, a file of weights, or timm:NAME.
            images: Pictures, or folders of them.
            out: The PNG to write: a row for each picture.
            overwrite: Replace a file that is there.
            count: Most pictures to draw.
            model_flags: What the file does not contain.
            bands: Channels to draw as red, green and blue, counted from 1, such as 4,3,2; otherwise the run's.
        """
        from pixmim.build import image_spec
        from pixmim.data.image_folder import from_paths
        from pixmim.evaluation.visualize import labeled_grid
        from pixmim.report.attention import attention_sheet
        from pixmim.report.reconstruct import with_bands

        _some(images)
        kind = _kind(out, overwrite)
        weights = with_bands(_opened(model, model_flags), bands)
        columns, names, bad = attention_sheet(weights, from_paths(images, image_spec(weights.config)), count)
        _save(labeled_grid(columns, names), out, kind)
        for line in bad:
            print_plain(Console(stderr=True), f"left out: {line}")
        print_plain(Console(), f"written to {out}")
        return 0

    return tyro.cli(checked(command), prog="pixmim attention", args=args)


def embed(args: list[str]) -> int:
    """Write the features of a data set."""

    def command(
        model: Positional[str],
        /,
        *,
        data: Data,
        out: Path,
        overwrite: bool = False,
        kind: Annotated[Literal["cls", "mean", "both"], arg(name="features")] = "both",
        batch_size: Annotated[int, Integer(1, 1_000_000)] = 256,
        device: Device = "auto",
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
        model_flags: Annotated[ModelFlags, arg(name="")] = ModelFlags(),  # noqa: B008
    ) -> int:
        """Write the features of every image of a data set, with its file's name; goes on where it was interrupted.

        Args:
            model: A run, finished or not, an imported folder, a file of weights, or timm:NAME.
            data: Images, as pretrain's --data takes them.
            out: .npy (float32, a row for each image; names in a .csv beside it) or .parquet.
            overwrite: Replace files that are there.
            kind: cls: the global token. mean: the mean of the patch tokens. Without a global token both are the mean.
            batch_size: Images at a time.
            device: auto, cpu, cuda, cuda:1, mps.
            precision: auto: bf16 where the device computes in it.
            model_flags: What the file does not contain.
        """
        from pixmim.api import embed_to_file

        embed_to_file(
            _opened(model, model_flags),
            data,
            out,
            features=kind,
            batch_size=batch_size,
            device=device,
            precision=precision,
            overwrite=overwrite,
        )
        return 0

    return tyro.cli(checked(command), prog="pixmim embed", args=args)


def _opened(model: str, model_flags: ModelFlags, with_decoder: bool = False) -> "Weights":
    """Open a model and print how far its training is, and what was assumed of it."""
    from pixmim.weights.load import describe, resolve_model

    weights = resolve_model(model, with_decoder=with_decoder, hints=model_flags.hints)
    for line in describe(model, weights):
        print_plain(Console(), line)
    return weights


def _some(images: tuple[Path, ...]) -> None:
    if not images:
        raise UserError("which pictures? Give files, or folders of them.")


def _kind(out: Path, overwrite: bool) -> str:
    """The format of a picture to be written, by its suffix. Raises UserError or OSError now if that cannot work."""
    from PIL.Image import SAVE, registered_extensions

    kind = registered_extensions().get(out.suffix.lower(), "")
    if kind not in SAVE:
        raise UserError(f"--out ends with .png, and not with '{out.suffix}'")
    check_output(out, overwrite)
    return kind


def _save(picture: "Image", out: Path, kind: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, partial(picture.save, format=kind))
