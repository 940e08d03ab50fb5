"""pixmim cache: pictures resized once, for all epochs to come. pixmim coverage: what crops keep of objects."""

from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from pixmim.cli.terms import absolute, say


def cache(args: list[str]) -> int:
    """Make a cache, or go on with one."""

    def command(
        data: Positional[str],
        out: Positional[Path],
        /,
        *,
        size: str = "224",
        quality: int = 95,
        chroma: Literal["444", "420"] = "444",
        raw: bool = False,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        channels: int = 3,
        per_shard: int = 2000,
        threads: int = 0,
    ) -> int:
        """Resize pictures once and keep them in indexed tar shards (WebDataset), for --data of the other commands.

        PixMIM's crop begins with a resize that is the same in every epoch; a cache pays it once. Interrupt it as you
        like and run it again: finished shards stay. Under torchrun or in a Slurm array each process makes its part.

        Args:
            data: Images, as pretrain's --data takes them.
            out: The folder of the cache.
            size: Side of what the network will see, or HEIGHTxWIDTH: images just cover it, aspect kept.
            quality: Of the JPEGs.
            chroma: 444 keeps colours at full resolution; 420 is smaller and faster, and disturbs the target more.
            raw: Pixels instead of JPEGs: no decoding later, four times the space.
            interpolation: Resampling, always with antialias; the crop's of the run to come.
            channels: Colour (3) or grey (1).
            per_shard: Images in a tar.
            threads: 0: one for each core, at most 16.
        """
        from pixmim.config import Run
        from pixmim.data import open_data
        from pixmim.data.cache import make_cache
        from pixmim.data.source import Form
        from pixmim.evaluate.features import progress

        console = Console()
        source = open_data(absolute(data), Form(channels))
        with progress(f"caching {data}", len(source), console) as advance:
            made = make_cache(
                source,
                out,
                Run(size=size).hw,
                interpolation=interpolation,
                kind="raw" if raw else "jpeg",
                quality=quality,
                chroma=chroma,
                per_shard=per_shard,
                threads=threads,
                progress=advance,
            )
        if made.images:
            rate = f"{made.seconds:.0f} s, {made.images / made.seconds:.0f} images/s"
            say(console, f"{made.images:,} images written in {rate}; {made.bytes / 1e6:,.0f} MB")
        elif not made.skipped:
            say(console, "nothing was left to do")
        if made.skipped:
            say(console, f"{made.skipped} could not be read: see {out}/skipped*.csv")
        say(console, f"whole: train with --data {out}" if made.whole else "not whole yet: other parts are to come")
        return 0

    return tyro.cli(command, prog="pixmim cache", args=args)


def coverage(args: list[str]) -> int:
    """Say how much of the objects the crops keep."""

    def command(
        data: Positional[str],
        /,
        *,
        size: str = "224",
        mask_ratio: float = 0.75,
        boxes: bool = False,
        simulate: int = 0,
        seed: int = 0,
        out: Path = Path("coverage"),
    ) -> int:
        """Object coverage: which share of an object RRC, SRC and CC keep, and what masking leaves of it.

        From sizes and boxes alone; no model and no pixels are needed. Writes a table of all objects, the means, and a
        figure against the objects' size.

        Args:
            data: A .csv (width,height,x,y,w,h[,image]), COCO's .json, a folder of VOC's .xml or of masks, or shapes:.
            size: Side of the crop, or HEIGHTxWIDTH.
            mask_ratio: Share of the patches that is hidden.
            boxes: Of masks: count their boxes instead.
            simulate: Crops to draw for each object, as a check on the expectation; 0: none.
            seed: Of these.
            out: Folder for coverage.csv, coverage.json and coverage.png.
        """
        from pixmim.config import Run
        from pixmim.evaluate.coverage import measure

        console = Console()
        report = measure(data, Run(size=size).hw, mask_ratio, boxes=boxes, draws=simulate, seed=seed, console=console)
        console.print(report.table())
        if report.outside:
            say(console, f"{report.outside} objects have no pixel inside their image, and were left out")
        say(console, "written: " + ", ".join(map(str, report.save(out))))
        return 0

    return tyro.cli(command, prog="pixmim coverage", args=args)
