"""pixmim coverage: what crops keep of objects."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional

from pixmim.cli.flags import checked
from pixmim.utils.console import print_plain
from pixmim.utils.files import check_output
from pixmim.utils.validation import Integer, Real, Seed, Size


def coverage(args: list[str]) -> int:
    """Say how much of the objects the crops keep."""

    def command(
        data: Positional[str],
        /,
        *,
        size: Size = "224",
        mask_ratio: Annotated[float, Real(0, 1, below=True)] = 0.75,
        boxes: bool = False,
        simulate: Annotated[int, Integer(0, 1_000_000)] = 0,
        seed: Seed = 0,
        out: Path = Path("coverage"),
        overwrite: bool = False,
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
            overwrite: Replace those that are there.
        """
        from pixmim.config import PretrainConfig
        from pixmim.evaluation.object_coverage import measure_coverage

        for end in ("json", "csv", "png"):
            check_output(out / f"coverage.{end}", overwrite)
        console = Console()
        report = measure_coverage(
            data,
            PretrainConfig(size=size).image_size,
            mask_ratio,
            boxes=boxes,
            draws=simulate,
            seed=seed,
            console=console,
        )
        console.print(report.table())
        if report.outside:
            print_plain(console, f"{report.outside} objects have no pixel inside their image, and were left out")
        print_plain(console, "written: " + ", ".join(map(str, report.save(out))))
        return 0

    return tyro.cli(checked(command), prog="pixmim coverage", args=args)
