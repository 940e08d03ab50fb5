"""pixmim bench-data: throughput of the data pipeline."""

import shlex
from typing import Annotated, Literal

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from pixmim.cli.flags import absolute, checked
from pixmim.utils.console import cell, print_plain
from pixmim.utils.validation import MAX_CHANNELS, Integer, Real, Size, Threads


def bench_data(args: list[str]) -> int:
    """Run `pixmim bench-data`."""

    def command(
        data: Positional[str],
        /,
        *,
        size: Size = "224",
        crop: Literal["simple-resized", "random-resized", "center"] = "simple-resized",
        channels: Annotated[int, Integer(1, MAX_CHANNELS)] = 3,
        dtype: Literal["uint8", "uint16", "float32"] = "uint8",
        tiff_pages: Literal["first", "channels"] = "first",
        threads: Threads = 0,
        target_rate: Annotated[float | None, Real(0, 1e9, above=True)] = None,
        seconds: Annotated[float, Real(0, 3_600, above=True)] = 1.0,
    ) -> int:
        """Measure how many images per second this machine loads, and what would make it faster. Takes half a minute.

        Nothing is kept: caches are tried with a sample, in a temporary folder.

        Args:
            data: Images, as pretrain's --data takes them.
            size: Side of what the network will see, or HEIGHTxWIDTH.
            crop: simple-resized (PixMIM), random-resized (MAE) or center.
            channels: Color (3), grey (1), or as many as the files have.
            dtype: uint8, uint16: 255 or 65535 count as one. float32: floating-point values are taken as they are.
            tiff_pages: Of a TIFF with several pages: the first one, or all of them as channels.
            threads: 0: one for each core, at most 16.
            target_rate: Throughput your model needs, in images/s; reports whether the data pipeline keeps up.
            seconds: Length of each of some 15 turns.
        """
        from pixmim import config
        from pixmim.build import build_crop, image_spec
        from pixmim.data import open_dataset
        from pixmim.data.dataset import RGB
        from pixmim.data.throughput import measure, recommend

        run = config.PretrainConfig(
            size=size, channels=channels, dtype=dtype, tiff_pages=tiff_pages, crop=config.CropConfig(kind=crop)
        )
        form = image_spec(run)
        source = open_dataset(absolute(data), form)
        larger = 2 if crop == "random-resized" else 1  # a part of the image is enlarged, so it needs a larger image
        cover = run.image_size[0] * larger, run.image_size[1] * larger
        side = "x".join(map(str, cover if cover[0] != cover[1] else cover[:1]))
        flags = f" {form.flags}" if form != RGB else ""
        console = Console()
        with console.status("") as status:
            report = measure(
                source,
                build_crop(run),
                cover,
                command=f"pixmim cache {shlex.quote(data)} cached --size {side}{flags}",
                threads=threads,
                seconds=seconds,
                on_start=lambda what: status.update(cell(f"measuring: {what}")),
            )
        title = f"{len(source):,} images; measured with {report.sampled:,} of them"
        table = Table("", "images/s", "kB an image", title=title, title_justify="left", box=SIMPLE)
        for row in report.rows:
            table.add_row(row.name, f"{row.rate:,.0f}", f"{row.bytes / 1e3:,.0f}" if row.bytes else "")
        console.print(table)
        for line in recommend(report, target_rate):
            print_plain(console, line)
        return 0

    return tyro.cli(checked(command), prog="pixmim bench-data", args=args)
