"""pixmim evaluate, report and coverage."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, Suppress, arg

from pixmim.cli.flags import ChoiceFlags, ModelFlags, ModelFlagsWithoutSize, absolute, checked, command
from pixmim.evaluation.evals import EVALS
from pixmim.evaluation.settings import EvaluateAllSettings
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import check_output
from pixmim.utils.validation import Device, Integer, Real, Seed, Size


def evaluate(args: list[str]) -> int:
    """Evaluate encoders, and save the results."""
    if not args or args[0] in ("list", "-h", "--help"):
        print(_overview())
        return 0
    name, known = args[0], [*EVALS, "all", "list"]
    if name not in known:
        raise UserError(f"there is no evaluation '{name}'{did_you_mean(name, known)}\n\n{_overview()}")
    settings_type = EvaluateAllSettings if name == "all" else EVALS[name].settings
    overwrite_type = bool if name in ("finetune", "all") else Suppress[bool]
    flags_type = ModelFlagsWithoutSize if any(f.name == "size" for f in fields(settings_type)) else ModelFlags

    def run(
        models: Positional[tuple[str, ...]],
        /,
        *,
        settings: Annotated[settings_type, arg(name="")],  # type: ignore[valid-type]
        choice: Annotated[ChoiceFlags, arg(name="")] = ChoiceFlags(),  # noqa: B008
        untrained: bool = False,
        overwrite: overwrite_type = False,  # type: ignore[valid-type]
        out: Path | None = None,
        device: Device = "auto",
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
        model_flags: Annotated[flags_type, arg(name="")] = flags_type(),  # type: ignore[valid-type]  # noqa: B008
    ) -> int:
        """Evaluate an encoder, or several side by side.

        Args:
            models: Runs, finished or not, imported folders, files of weights, timm:NAME or hf:NAME.
            settings: Settings.
            choice: Images to choose by their names, of the labeled data, or of shape-bias's --data.
            untrained: Evaluate the initial weights of runs as well, for comparison.
            overwrite: Replace a classifier that was fine-tuned with other settings; train one of the same again.
            out: Folder for results and report. Default: the run, or evaluations/MODEL; the report of several models is
                report.html.
            device: auto, cpu, cuda, cuda:1, mps.
            precision: auto: bf16 if the device supports it.
            model_flags: What the file does not contain.
        """
        if not models:
            raise UserError(f"no model given: pixmim evaluate {name} MODEL [MODEL ...]")
        from pixmim.api import evaluate_to_folder

        console = Console()
        options: dict[str, Any] = {"untrained": untrained, "overwrite": overwrite, "console": console}
        options |= {"device": device, "precision": precision, "hints": model_flags.hints}  # type: ignore[attr-defined]
        _show(*evaluate_to_folder(models, name, out, **options, **_chosen(name, vars(settings), choice)), console)
        return 0

    about = str(settings_type.__doc__) + (f" Needs {EVALS[name].needs}." if name in EVALS else "")
    return tyro.cli(checked(run), prog=f"pixmim evaluate {name}", description=about, args=args[1:])


def _chosen(evaluation: str, settings: Mapping[str, Any], choice: ChoiceFlags) -> dict[str, Any]:
    """Return settings with the patterns of `choice` in their data. Raises UserError if these cannot have any."""
    if choice == ChoiceFlags():
        return dict(settings)
    if evaluation in ("segmentation", "detection"):
        raise UserError(f"{evaluation} takes no --include and --exclude: its masks or boxes choose the images")
    names = [name for name in ("train", "test", "labelled", "data") if settings.get(name)]
    if not names:
        raise UserError("--include and --exclude choose labeled images: pass --train and --test, or --labelled")
    return {**settings} | {name: choice.choose(settings[name]) for name in names}


def _overview() -> str:
    width = max(map(len, EVALS))
    about = {name: str(evaluation.settings.__doc__).splitlines()[0] for name, evaluation in EVALS.items()}
    about["all"] = str(EvaluateAllSettings.__doc__)
    names = "\n".join(f"  {name:<{width}}  {line}" for name, line in about.items())
    needs = "\n".join(f"  {name:<{width}}  {evaluation.needs}" for name, evaluation in EVALS.items())
    return (
        f"usage: pixmim evaluate NAME MODEL [MODEL ...] [--untrained] ...\n\n{names}\n\nWhat each needs:\n\n{needs}\n\n"
        "MODEL is a run, an imported folder, a file of weights, timm:NAME or hf:NAME; several share one table.\n"
        "`pixmim evaluate NAME --help` explains every flag."
    )


def _show(folders: list[Path], page: Path, console: Console) -> None:
    from pixmim.report import gain_lines, results_table

    console.print(results_table(folders, console.width))
    for line in [*gain_lines(folders), f"report: {page}"]:
        print_plain(console, line)


@command("report")
def report(
    runs: Positional[tuple[Path, ...]],
    /,
    *,
    data: str | None = None,
    out: Path | None = None,
    bands: str = "",
    neighbors: bool = False,
) -> int:
    """Write one self-contained HTML page.

    Args:
        runs: Folders of runs, side by side on the page.
        data: Images to reconstruct, as pretrain's --data takes them. Default: each run's own, unless the run is
            from elsewhere.
        out: The HTML file. Default: RUN/report.html, or report.html for several runs.
        bands: Channels to draw as red, green and blue, counted from 1, such as 4,3,2. Default: each run's.
        neighbors: Add the images nearest to 20 random ones, and the pairs most alike.
    """
    if not runs:
        raise UserError("no run given: pixmim report RUN [RUN ...]")
    from pixmim.api import report_path
    from pixmim.report import write_report

    console, page, images = Console(), report_path(list(runs), out), None if data is None else absolute(data)
    write_report(
        list(runs), page, images, lambda line: print_plain(console, f"warning: {line}"), bands, neighbors, console
    )
    _show(list(runs), page, console)
    return 0


@command("coverage")
def coverage(
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
    """Object coverage: the share of an object that RRC, SRC and CC keep, and what masking leaves of it.

    Needs image sizes and boxes only; no model and no pixels. Writes a table of all objects, the means, and a figure
    of coverage against object size.

    Args:
        data: A .csv (width,height,x,y,w,h[,image]), COCO's .json, boxes of VOC or YOLO, masks, or shapes:.
        size: Side of the crop, or HEIGHTxWIDTH.
        mask_ratio: Share of the patches that is hidden.
        boxes: Use the boxes of masks instead of the masks.
        simulate: Crops to sample for each object, to check the expectation, from 2 on; 0: none.
        seed: Seed of these.
        out: Folder for coverage.csv, coverage.json and coverage.png.
        overwrite: Replace existing files.
    """
    from pixmim.evaluation.object_coverage import measure_coverage
    from pixmim.utils.validation import parse_size

    for suffix in ("json", "csv", "png"):
        check_output(out / f"coverage.{suffix}", overwrite)
    console, crop = Console(), parse_size(size)
    assert crop is not None  # checked by the type of the flag
    result = measure_coverage(data, crop, mask_ratio, boxes=boxes, draws=simulate, seed=seed, console=console)
    console.print(result.table())
    if problems := str(result.problems):
        print_plain(console, problems)
    print_plain(console, "written: " + ", ".join(map(str, result.save(out))))
    return 0
