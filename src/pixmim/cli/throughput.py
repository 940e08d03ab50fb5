"""pixmim bench-data: what limits the way of images to the network."""

import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from pixmim.cli.flags import absolute, checked
from pixmim.utils.console import cell, say
from pixmim.utils.validation import MAX_CHANNELS, Real, Size, Threads, Whole

if TYPE_CHECKING:
    from pixmim.data.throughput.measure import Rates


def bench_data(args: list[str]) -> int:
    """Measure what limits the data path."""

    def command(
        data: Positional[str],
        /,
        *,
        size: Size = "224",
        crop: Literal["src", "rrc", "cc"] = "src",
        channels: Annotated[int, Whole(1, MAX_CHANNELS)] = 3,
        pixels: Literal["uint8", "uint16", "float32"] = "uint8",
        pages: Literal["first", "channels"] = "first",
        threads: Threads = 0,
        eats: Annotated[float | None, Real(0, 1e9, above=True)] = None,
        seconds: Annotated[float, Real(0, 3_600, above=True)] = 1.0,
    ) -> int:
        """Measure in a minute what this machine's disk, decoding and loader do with images, and say what would help.

        Nothing is kept; caches are tried with a sample, in a temporary folder.

        Args:
            data: Images, as pretrain's --data takes them.
            size: Side of what the network will see, or HEIGHTxWIDTH.
            crop: src: simple resized crop (PixMIM). rrc: random resized crop (MAE). cc: centre crop.
            channels: Colour (3), grey (1), or as many as the files have.
            pixels: uint8, uint16: 255 or 65535 count as one. float32: floating-point values are taken as they are.
            pages: Of a TIFF with several pages: the first one, or all of them as channels.
            threads: 0: one for each core, at most 16.
            eats: Images a second that your model takes, to hear whether they come: a run's own figure without waiting.
            seconds: That each of some 35 turns takes.
        """
        from pixmim import config
        from pixmim.build import build_crop, image_form
        from pixmim.data import open_data
        from pixmim.data.dataset import COLOUR
        from pixmim.data.throughput.measure import measure
        from pixmim.data.throughput.recommend import advise

        run = config.Run(size=size, channels=channels, pixels=pixels, pages=pages, crop=config.Crop(kind=crop))
        form = image_form(run)
        source = open_data(absolute(data), form)
        larger = 2 if crop == "rrc" else 1  # a part of the picture, enlarged, needs a larger picture
        cover = run.hw[0] * larger, run.hw[1] * larger
        console = Console()
        with console.status("") as status:
            rates = measure(
                source,
                build_crop(run),
                cover,
                threads=threads,
                seconds=seconds,
                tell=lambda what: status.update(cell(f"measuring: {what}")),
            )
        console.print(_table(rates))
        side = "x".join(map(str, cover if cover[0] != cover[1] else cover[:1]))
        folder = "cached" if "jpeg" in rates.caches else "cached-raw"
        formed = f" {form.flags}" if form != COLOUR else ""
        for line in advise(rates, f"pixmim cache {shlex.quote(data)} {folder} --size {side}{formed}", eats):
            say(console, line)
        return 0

    return tyro.cli(checked(command), prog="pixmim bench-data", args=args)


def _table(rates: "Rates") -> Table:
    """What was measured, in images a second."""
    from pixmim.data.throughput.measure import MANY

    threads = f"{rates.threads} thread" + "s" * (rates.threads > 1)
    title = f"{rates.images:,} images; {rates.sample:,} of them tried, on {threads}"
    table = Table("", "images/s", "", title=title, title_justify="left", box=SIMPLE)
    table.columns[1].justify = "right"

    def row(name: str, rate: float | None, note: str = "") -> None:
        if rate is not None:
            table.add_row(name, f"{rate:,.0f}", note)

    if rates.disk is not None:
        kilo, mega = rates.disk.bytes / 1e3, rates.disk.bytes / 1e6
        row("reading from the disk", rates.disk.first, f"{rates.disk.first * mega:,.0f} MB/s, {kilo:,.0f} kB an image")
        row(f"  by {MANY} times the threads", rates.disk.many, f"{rates.disk.many * mega:,.0f} MB/s")
        row("  from memory", rates.disk.again, f"{rates.disk.again * mega:,.0f} MB/s")
    row("decoding from memory", rates.decode_all)
    for name, rate in (("  by 1 thread", rates.decode), ("crop by 1 thread", rates.crop)):
        row(name, rate, f"{1e3 / rate:.1f} ms an image" if rate else "")  # 0: no image was done in time
    row("loader, from the disk", rates.loader_first)
    row("  from memory", rates.loader)
    for kind, cached in rates.caches.items():
        name = "4:4:4" if kind == "jpeg" else kind
        note = f"{cached.bytes / 1e3:,.0f} kB an image, made at {cached.made:,.0f} images/s"
        row(f"  from a {name} cache", cached.loader, note)
    row("  kept decoded", rates.kept, f"{rates.decoded / 1e3:,.0f} kB an image")
    return table
