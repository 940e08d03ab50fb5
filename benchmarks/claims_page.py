"""Statistics, tables and figure of docs/claims.md, from the results of claims.py.

An effect is a contrast between arms. Its interval over seeds is paired: values are a sum of arm and seed, since arms of
one seed share initial weights, order and masks. For two arms it is the paired t-test.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from claims import ARMS, DATA, RADII, SEEDS, SETS, Run, Scale, plan
from runs import is_finished, plus_minus, replace_generated, table
from scipy import stats

from pixmim.utils.plotting import PLOT_COLORS, Axes, Figure, matplotlib

BEGIN, END = "<!-- results: written by `make claims-page` -->", "<!-- end of the results -->"

NAMES = {"caltech101": "Caltech-101", "imagewoof": "Imagewoof", "shapes": "shapes"}
"""Data by key, as printed."""

TITLES = {"mae": "MAE", "target": "+ target", "crop": "+ SRC", "both": "+ both"}

CONTRASTS: dict[str, dict[str, float]] = {
    "target": {"mae": -0.5, "target": 0.5, "crop": -0.5, "both": 0.5},
    "SRC": {"mae": -0.5, "target": -0.5, "crop": 0.5, "both": 0.5},
    "both": {"mae": -1, "both": 1},
}
"""Effects of the paper's two values, each averaged over the other one, and of PixMIM against MAE."""

LINEAR, NOISE, BIAS = "linear/top1", "noise", "shape-bias/probe/shape_bias"
CORRUPTED = "robustness/in_memory/probe/error"
MEASURES = {
    LINEAR: "linear probe",
    "knn/mean/top1": "k-NN, mean of patch tokens",
    "knn/cls/top1": "k-NN, class token",
    "attentive/top1": "attentive probe",
    "robustness/in_memory/probe/clean": "error, clean",
    CORRUPTED: "error, 15 corruptions",
    NOISE: "error, 3 kinds of noise",
    BIAS: "shape bias",
}
"""Values that are compared, in per cent. The first one decides on a claim about accuracy."""

Effect = tuple[float, float, int]
"""Estimate, half of the 95 % interval over seeds, and seeds."""


def contrast_interval(values: npt.NDArray[np.float64], weights: Sequence[float]) -> tuple[float, float]:
    """Return a contrast between arms and half of its 95 % interval, for values (arms seeds).

    Arms and seeds have additive effects; the residual has (arms - 1)(seeds - 1) degrees of freedom.
    """
    arms, seeds = values.shape
    residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    freedom = (arms - 1) * (seeds - 1)
    error = math.sqrt((residual**2).sum() / freedom * np.square(weights).sum() / seeds)
    return float(values.mean(axis=1) @ np.asarray(weights)), float(stats.t.ppf(0.975, freedom) * error)


def smallest_difference(deviation: float, arms: int, seeds: int, weights: Sequence[float], power: float = 0.8) -> float:
    """Return the smallest true contrast that the interval excludes zero for, with probability `power`.

    Args:
        deviation: Assumed standard deviation of one value around the additive effects.
        arms: Arms of the layout.
        seeds: Seeds of each arm.
        weights: Weights of the contrast.
        power: The probability.
    """
    freedom = (arms - 1) * (seeds - 1)
    quantile = stats.t.ppf(0.975, freedom)
    low, high = 0.0, 100.0
    for _ in range(60):  # bisection: the power grows with the noncentrality
        middle = (low + high) / 2
        reached = stats.nct.sf(quantile, freedom, middle) + stats.nct.cdf(-quantile, freedom, middle)
        low, high = (middle, high) if reached < power else (low, middle)
    return high * deviation * math.sqrt(sum(w * w for w in weights) / seeds)


def image_deviation(images: int, share: float = 0.5) -> float:
    """Return the standard deviation in points of an accuracy over independent test images."""
    return 100 * math.sqrt(share * (1 - share) / images)


@dataclass(frozen=True)
class Results:
    """The files of finished runs, by name."""

    files: dict[str, dict[str, Any]]
    scale: Scale

    @staticmethod
    def read(folder: Path, scale: Scale) -> "Results":
        """Read finished runs. Raises ValueError if arms of one data set were not measured in the same way."""
        names = [run.name for run in plan() if is_finished(run.name, folder)]
        names += [f"start-{data}-{seed}" for data in DATA for seed in SEEDS]
        paths = {name: folder / f"{name}.json" for name in names}
        files = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
        for data in DATA:
            own = [files[run.name] for run in plan() if run.data == data and run.name in files and run.arm in ARMS]
            for key in ("sources", "scale"):
                if len({json.dumps(one["settings"][key]) for one in own}) > 1:
                    raise ValueError(f"runs on {data} have different {key}")
            if len({json.dumps([one["images"], one["versions"]["torch"]]) for one in own}) > 1:
                raise ValueError(
                    f"runs on {data} were measured on different images, or with different versions of torch"
                )
        for run in plan():
            start = files.get(f"start-{run.data}-{run.seed}")
            if (
                run.name in files
                and run.arm in ARMS
                and (not start or start["settings"]["start"] != files[run.name]["start"])
            ):
                raise ValueError(f"{run.name} did not start from the weights of the other arms of its seed")
        return Results({name: one for name, one in files.items() if one["finished"]}, scale)

    def value(self, data: str, arm: str, seed: int, measure: str, step: int) -> float | None:
        """Return one value in per cent; None if it is missing."""
        file = self.files.get(f"start-{data}-{seed}" if step == 0 else Run(data, arm, seed).name)
        values = file["points"].get(str(step), {}) if file else {}
        if measure == NOISE:
            noise = [
                values.get(f"robustness/in_memory/probe/corruption/{n}_noise") for n in ("gaussian", "shot", "impulse")
            ]
            known = [value for value in noise if value is not None]
            return sum(known) / 3 if len(known) == 3 else None
        return values.get(measure)

    def layout(self, data: str, arms: Sequence[str], measure: str, step: int) -> npt.NDArray[np.float64]:
        """Return the values (arms seeds) of the seeds of which all arms are there."""
        rows = [[self.value(data, arm, seed, measure, step) for arm in arms] for seed in SEEDS]
        return np.array([row for row in rows if None not in row], np.float64).reshape(-1, len(arms)).T

    def effect(
        self, data: str, arms: Sequence[str], weights: Mapping[str, float], measure: str, step: int | None = None
    ) -> Effect | None:
        """Return a contrast within a layout of arms; None unless two seeds are complete."""
        values = self.layout(data, arms, measure, self.scale.steps if step is None else step)
        if values.shape[1] < 2:
            return None
        return *contrast_interval(values, [weights.get(arm, 0.0) for arm in arms]), values.shape[1]

    def over_images(self, data: str, weights: Mapping[str, float], measure: str) -> float:
        """Return half of the 95 % interval over test images of a contrast, as if arms were tested on different ones."""
        arms = list(weights)
        share = self.layout(data, arms, measure, self.scale.steps).mean(axis=1) / 100
        counts = next(
            one["images"] for name, one in self.files.items() if name.startswith(f"{data}-") and "images" in one
        )
        images = np.full(len(arms), counts["corrupt" if measure == NOISE or "robustness" in measure else "test"], float)
        if measure == BIAS:  # a share of the decisions for shape or texture only
            cues = [
                self.layout(data, arms, f"shape-bias/probe/{cue}", self.scale.steps) for cue in ("shape", "texture")
            ]
            images = (cues[0] + cues[1]).mean(axis=1) / 100 * counts["conflict"]
        return 196 * float(np.sqrt((np.square(list(weights.values())) * share * (1 - share) / images).sum()))


FOUR = ("mae", "target", "crop", "both")
SWEEP = ("mae", *(f"radius-{r}" for r in RADII), "target")


def shown(effect: Effect | None) -> str:
    """Return an effect with its interval as text."""
    return "-" if effect is None else plus_minus(*effect[:2])


def verdict(effect: Effect | None, sign: int) -> str:
    """Return the verdict of an interval on a claim of this direction."""
    if effect is None:
        return "no result yet"
    if abs(effect[0]) <= effect[1]:
        return "undecided"
    return "agrees" if effect[0] * sign > 0 else "disagrees"


def claims(results: Results) -> list[list[str]]:
    """Return a row for each claim: what it is, what the paper found, what was found here, and whether they agree."""

    end, steps = (results.scale.steps,), (*results.scale.curve, *results.scale.points)

    def on_all(
        claim: str, paper: str, contrast: str, measure: str, sign: int, steps: tuple[int, ...] = end
    ) -> list[str]:
        found = {
            name: [results.effect(data, FOUR, CONTRASTS[contrast], measure, step) for step in steps]
            for data, name in NAMES.items()
        }
        if not any(effect for effects in found.values() for effect in effects):
            return [claim, paper, "-", "no result yet"]
        here = "; ".join(f"{name} {', '.join(map(shown, effects))}" for name, effects in found.items())
        verdicts = {name: dict.fromkeys(verdict(one, sign) for one in effects) for name, effects in found.items()}
        said = "; ".join(f"{name}: {', '.join(words)}" for name, words in verdicts.items())
        return [claim, paper, f"{MEASURES[measure]}: {here}", said]

    weights = {"target": 1.0} | {f"radius-{r}": -1 / len(RADII) for r in RADII}
    smaller = results.effect("caltech101", SWEEP, weights, LINEAR)
    larger = results.effect("caltech101", SWEEP, {"target": 1, "mae": -1}, LINEAR)
    supervised = results.effect("caltech101", ("rrc", "src"), {"rrc": -1, "src": 1}, "finetune/top1")
    rows = [
        on_all("PixMIM improves MAE", "linear probe +2.5 after 300 epochs, +2.4 after 800", "both", LINEAR, 1),
        on_all("The low-frequency target alone improves MAE", "linear probe +1.2", "target", LINEAR, 1),
        on_all("SRC instead of RRC improves MAE", "linear probe: higher", "SRC", LINEAR, 1),
        on_all(
            f"PixMIM is ahead all along (steps {', '.join(map(str, steps))})",
            "linear probe at every epoch of a plot",
            *("both", LINEAR, 1, steps),
        ),
        [
            "A radius of 40 is better than smaller ones, which lose information",
            "linear probe at 40 is the best",
            f"linear probe, 40 against the mean of {', '.join(map(str, RADII))}: Caltech-101 {shown(smaller)}",
            verdict(smaller, 1),
        ],
        [
            "A radius of 40 is better than no filter, which keeps texture",
            "linear probe +1.2",
            f"linear probe, within the sweep: Caltech-101 {shown(larger)}",
            verdict(larger, 1),
        ],
        on_all("PixMIM is steadier under corruptions", "ImageNet-C: less error", "both", CORRUPTED, -1),
        on_all("... under noise", "no number of its own", "both", NOISE, -1),
        on_all("PixMIM prefers shape to texture", "more shape bias", "both", BIAS, 1),
        [
            "SRC hurts supervised training (DeiT III)",
            "lower accuracy than with RRC",
            f"Caltech-101 {shown(supervised)}",
            verdict(supervised, -1),
        ],
    ]
    return [*rows, coverage(results)]


def coverage(results: Results) -> list[str]:
    """Return the row of the claim on object coverage."""
    files = [results.files.get(f"shapes-coverage-{seed}") for seed in SEEDS]
    found = [file["points"]["0"] for file in files if file]
    claim, paper = "SRC keeps more of the object than RRC", "68.3 % with RRC; after masking 17.1 % and 22.1 %"
    if not found:
        return [claim, paper, "-", "no result yet"]
    mean = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
    rrc, src = mean["rrc"], mean["src"]
    here = f"shapes: RRC {rrc:.1f} %, SRC {src:.1f} %; after masking {rrc / 4:.1f} % and {src / 4:.1f} %"
    return [claim, paper, here, "agrees" if src > rrc else "disagrees"]


def design(scale: Scale, images: Mapping[str, int]) -> list[str]:
    """Return the table of the smallest differences that this design shows, before any result."""
    rows = []
    for name, weights in CONTRASTS.items():
        cells = [
            f"{smallest_difference(image_deviation(n), len(FOUR), len(SEEDS), list(weights.values())):.1f}"
            for n in images.values()
        ]
        rows.append([f"{name} (4 arms)", *cells])
    first, *others = images.values()
    dash = ["-"] * len(others)
    sweep = smallest_difference(image_deviation(first), len(SWEEP), len(SEEDS), (1, -1))
    pair = smallest_difference(image_deviation(first), 2, len(SEEDS), (1, -1))
    rows += [["one radius against none (7 arms)", f"{sweep:.1f}", *dash]]
    rows += [["SRC against RRC, supervised (2 arms)", f"{pair:.1f}", *dash]]
    return table(["effect", *(f"{NAMES[data]} ({n:,} test images)" for data, n in images.items())], rows)


def text(results: Results, figure: str | None) -> str:
    """Return the generated part of the page."""
    lines = ["", "### Runs", ""]
    names = set(results.files)
    counts = {name: (sum(run.name in names for run in plan((name,))), len(plan((name,)))) for name in SETS}
    done, total = (sum(column) for column in zip(*counts.values(), strict=True))
    lines += [
        f"**{done} of {total} runs are finished.** "
        + ", ".join(f"{k}: {a} of {b}" for k, (a, b) in counts.items())
        + "."
    ]
    if done < total:
        lines += ["Rows without two complete seeds have no result yet, and the others may change."]
    lines += ["", "### Claims", ""]
    lines += table(
        ["claim", "the paper, on ImageNet-1k", "here: points, ± 95 % over seeds", "verdict"], claims(results)
    )
    if figure:
        lines += ["", f"![Effects, and linear probes during training]({figure})"]
    for data, name in NAMES.items():
        if results.layout(data, FOUR, LINEAR, results.scale.steps).shape[1] >= 2:
            lines += ["", f"### {name}", "", *values_table(results, data)]
    lines += sweep_table(results)
    return "\n".join([*lines, ""])


def values_table(results: Results, data: str) -> list[str]:
    """Return start, mean of each arm at the end, and effects with both intervals."""
    rows = []
    for measure, title in MEASURES.items():
        start = results.layout(data, ("mae",), measure, 0)
        end = results.layout(data, FOUR, measure, results.scale.steps)
        if end.shape[1] < 2:
            continue
        effects = [
            f"{shown(results.effect(data, FOUR, weights, measure))} ({results.over_images(data, weights, measure):.1f})"
            for weights in CONTRASTS.values()
        ]
        rows.append([title, f"{start.mean():.1f}", *(f"{value:.1f}" for value in end.mean(axis=1)), *effects])
    seeds = results.layout(data, FOUR, LINEAR, results.scale.steps).shape[1]
    note = (
        f"Means of {seeds} seeds in per cent; effects ± 95 % over seeds (over test images). Of errors, less is better."
    )
    header = ["", "start", *TITLES.values(), *(f"effect of {name}" for name in CONTRASTS)]
    lines = [note, "", *table(header, rows), "", "The effects on their way:", ""]
    steps = (*results.scale.curve, *results.scale.points)
    rows = [
        [f"{MEASURES[measure]}, {name}", *(shown(results.effect(data, FOUR, weights, measure, s)) for s in steps)]
        for measure in (LINEAR, NOISE)
        for name, weights in CONTRASTS.items()
    ]
    return [*lines, *table(["", *(f"step {s}" for s in steps)], rows)]


def sweep_table(results: Results) -> list[str]:
    """Return the sweep of the radius and supervised training, as far as they are there."""
    lines = []
    end = results.layout("caltech101", SWEEP, LINEAR, results.scale.steps)
    if end.shape[1] >= 2:
        rows = []
        for arm in SWEEP:
            cells = []
            for measure in (LINEAR, "knn/mean/top1", "attentive/top1", CORRUPTED, NOISE, BIAS):
                mean = results.layout("caltech101", SWEEP, measure, results.scale.steps).mean(axis=1)[SWEEP.index(arm)]
                effect = results.effect("caltech101", SWEEP, {arm: 1, "mae": -1}, measure) if arm != "mae" else None
                cells.append(f"{mean:.1f}" + (f" ({shown(effect)})" if effect else ""))
            rows.append([{"mae": "none", "target": "40"}.get(arm, arm.removeprefix("radius-")), *cells])
        header = ["radius", "linear probe", "k-NN", "attentive probe", "error, corrupted", "error, noise", "shape bias"]
        lines += ["", "### Radius", "", "Caltech-101, RRC; in brackets the difference to no filter.", ""]
        lines += table(header, rows)
    pair = results.layout("caltech101", ("rrc", "src"), "finetune/top1", results.scale.steps)
    if pair.shape[1] >= 2:
        effect = results.effect("caltech101", ("rrc", "src"), {"rrc": -1, "src": 1}, "finetune/top1")
        rrc, src = pair.mean(axis=1)
        lines += [
            "",
            "### Supervised",
            "",
            f"Caltech-101: RRC {rrc:.1f} %, SRC {src:.1f} %, difference {shown(effect)}.",
        ]
    return lines


def draw(results: Results, path: Path) -> bool:
    """Draw effects with their intervals, and linear probes during training. Returns False if nothing is there."""
    present = [data for data in NAMES if results.layout(data, FOUR, LINEAR, results.scale.steps).shape[1] >= 2]
    if not present:
        return False
    with matplotlib.rc_context({"svg.hashsalt": "pixmim", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.5, 2.9 * len(present)), dpi=110, layout="constrained")
        axes = np.atleast_2d(figure.subplots(len(present), 2, width_ratios=(2, 3)))
        for (curves, effects), data in zip(axes, present, strict=True):
            draw_curves(curves, results, data)
            draw_effects(effects, results, data)
        for axis in axes[0]:
            axis.legend(
                frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=4, columnspacing=1, handlelength=1
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def draw_curves(axes: Axes, results: Results, data: str) -> None:
    steps = (0, *results.scale.curve, *results.scale.points)
    for (arm, title), color in zip(TITLES.items(), PLOT_COLORS, strict=False):
        means = [results.layout(data, ("mae",) if s == 0 else FOUR, LINEAR, s).mean(axis=1) for s in steps]
        axes.plot(
            steps, [m[0 if len(m) == 1 else FOUR.index(arm)] for m in means], "o-", color=color, ms=3, label=title
        )
    axes.set(title=NAMES[data], xlabel="step", ylabel="linear probe (%)")
    axes.spines[["top", "right"]].set_visible(False)


def draw_effects(axes: Axes, results: Results, data: str) -> None:
    for i, (contrast, color) in enumerate(zip(CONTRASTS, PLOT_COLORS[1:], strict=False)):
        found = [results.effect(data, FOUR, CONTRASTS[contrast], measure) for measure in MEASURES]
        rows = [(row, *effect) for row, effect in enumerate(found) if effect]
        axes.errorbar(
            [mean for _, mean, _, _ in rows],
            [row + (i - 1) * 0.22 for row, *_ in rows],
            xerr=[half for _, _, half, _ in rows],
            fmt="o", ms=3.5, lw=1.3, color=color, label=f"effect of {contrast}",
        )  # fmt: skip
    axes.axvline(0, color="#888", lw=1)
    axes.set_yticks(range(len(MEASURES)), list(MEASURES.values()))
    axes.invert_yaxis()
    axes.set(xlabel="points, with 95 % interval over seeds; errors: less is better")
    axes.spines[["top", "right"]].set_visible(False)


def write(folder: Path, scale: Scale, page: Path) -> str:
    """Replace the generated part of the page, and write the figure to images/. Return a summary."""
    results = Results.read(folder, scale)
    image = Path("images/claims.svg")
    drawn = draw(results, page.parent / image)
    replace_generated(page, BEGIN, END, text(results, str(image) if drawn else None))
    finished = sum(run.name in results.files for run in plan())
    return f"{page}: {finished} of {len(plan())} runs"
