"""Measure everything that needs a GPU in ten minutes, most important first. Each part writes its results to a file.

python benchmarks/gpu.py --out runs/gpu                                on a GPU, for at most --minutes 9
python benchmarks/gpu.py --dry                                         every part at tiny size, on the CPU
python benchmarks/gpu.py --out runs/gpu --write docs/performance.md    its section about GPUs, from the files

It needs the source tree and a Python with torch, and no network. Each part is a process that is killed at its limit;
what it has measured by then stays. Packages that the machine lacks can be carried in a folder that another one made:

python -m pip install --target packages --no-deps --only-binary :all: --python-version 3.12 \\
    --platform manylinux_2_28_x86_64 simplejpeg tyro docstring-parser typeguard braceexpand beartype
python benchmarks/gpu.py --packages packages
"""

import argparse
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent

PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "simplejpeg", "tyro", "rich", "jaxtyping"),
    *("matplotlib", "jinja2", "braceexpand", "filelock", "pytest", "hypothesis", "transformers"),
)
"""Modules that some part imports."""

REPLACED = ("tyro", "braceexpand", "simplejpeg")
"""Modules that pixmim imports and a part can do without: flags, patterns of names, and JPEGs if images are kept raw."""

Row = dict[str, Any]


def summary(error: BaseException) -> str:
    """Return the first line of an error, as `pixmim.utils.errors.first_line`: pixmim itself may not import here."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass
class Part:
    """Tables of one part. Its file is replaced at each row: a part that is killed keeps what it has measured."""

    name: str
    dry: bool
    out: Path
    data: str = ""
    tables: dict[str, list[Row]] = field(default_factory=dict)
    end: str = "running"
    replaced: tuple[str, ...] = ()

    def add(self, table: str, **row: Any) -> None:
        self.tables.setdefault(table, []).append(row)
        self.write()

    def write(self) -> None:
        path = result_path(self.out, self.name)
        path.with_suffix(".tmp").write_text(json.dumps({"end": self.end, "tables": self.tables}, indent=1))
        path.with_suffix(".tmp").replace(path)

    @contextmanager
    def trying(self, table: str, **row: Any) -> Iterator[Row]:
        """Add a row, with the error in it if there is one, so that the next row is measured anyway."""
        try:
            yield row
        except Exception as error:
            row["error"] = summary(error)[:160]
            traceback.print_exc()
        self.add(table, **row)


def ceilings(part: Part) -> None:
    """Measure one large product and one large copy: the upper bounds for all that follows."""
    import torch
    from timing import copy_rate, machine, product_rate

    device = torch.device("cpu" if part.dry else "cuda")
    side, size = (256, 2**20) if part.dry else (8192, 2**32)
    part.add("machine", machine=machine())
    with part.trying("ceilings", what=f"product of {side} x {side} in bf16, TFLOP/s") as row:
        row["rate"] = product_rate(device, "bf16", side=side) / 1e12
    with part.trying("ceilings", what="copy on the device, read and written, GB/s") as row:
        row["rate"] = copy_rate(device, size) / 1e9


def tests(part: Part) -> None:
    """Run tests/test_gpu.py; on the CPU one of them."""
    import pytest

    started = time.monotonic()

    class Collector:
        """Counts of outcomes, and the message of each failure."""

        counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.counts[report.outcome] += 1
                part.tables["tests"] = [{**self.counts, "seconds": time.monotonic() - started}]
                part.write()
            if report.failed:
                text = report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else "error"
                part.add("failed tests", test=report.nodeid.split("::")[-1], message=text.splitlines()[0][:160])

    # Without jaxtyping's checks, which a graph of torch.compile may not contain.
    options = ["-o", "addopts=", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    chosen = ["-k", "low_pass"] if part.dry else []
    pytest.main([*options, *chosen, str(SOURCE / "tests/test_gpu.py")], plugins=[Collector()])
    if not part.tables.get("tests"):
        raise RuntimeError("no test ran: see the log")


class Case(NamedTuple):
    """One step to time."""

    model: str
    batch: int
    compile: str
    method: str = "mae"
    backbone: str = "vit_base_patch16_224"
    size: int = 224
    kind: str = "PixMIM"


def cases(dry: bool) -> list[Case]:
    """Return the steps to time, most important first."""
    if dry:
        return [
            *(Case("ViT-B", 2, how) for how in ("none", "blocks", "full")),
            *(Case("ViT-B", 2, "none", kind=kind) for kind in ("MAE", "plain MAE", "transformers")),
            Case("ConvMAE-B", 2, "none", "convmae", "convmae_base"),
            Case("SimMIM, Swin-B", 2, "none", "simmim", "swin_base_patch4_window7_224", 192),
        ]
    return [
        *(Case("ViT-B", 256, how) for how in ("none", "blocks")),
        *(Case("ViT-B", 1024, how) for how in ("blocks", "none")),
        Case("ViT-L", 1024, "blocks", backbone="vit_large_patch16_224"),
        *(Case("ViT-B", 256, how) for how in ("full", "graphs")),
        *(Case("ViT-B", 256, "full", kind=kind) for kind in ("plain MAE", "transformers")),
        Case("ViT-B", 1024, "blocks", kind="MAE"),
        Case("ConvMAE-B", 256, "blocks", "convmae", "convmae_base"),
        Case("SimMIM, Swin-B", 256, "blocks", "simmim", "swin_base_patch4_window7_224", 192),
        *(Case("ViT-B", batch, "blocks") for batch in (512, 2048)),
        *(Case("ViT-B", 256, how, kind=kind) for how in ("none", "graphs") for kind in ("plain MAE", "transformers")),
    ]


_THIN = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}

DRY: dict[str, dict[str, Any]] = {
    "mae": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, **_THIN},
    "convmae": {"embed_dim": (8, 8, 16), "depth": (1, 1, 1), "num_heads": 2, **_THIN},
    "simmim": {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)},
}
"""Options of models that a CPU trains in milliseconds, at 64 px."""


def step(part: Part) -> None:
    """Time steps of PixMIM and of peers, eager and compiled."""
    import torch
    from timing import product_rate

    device = torch.device("cpu" if part.dry else "cuda")
    peak = product_rate(device, "bf16", side=256 if part.dry else 8192)
    for case in cases(part.dry):
        size = 64 if part.dry else case.size
        about = {"model": case.model, "step": case.kind, "px": size, "batch": case.batch, "compiled": case.compile}
        with part.trying("steps", **about) as row:
            row |= time_case(part, case, size, device, peak)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def time_case(part: Part, case: Case, size: int, device: Any, peak: float) -> Row:
    """Time one case. Also profile the fastest step of PixMIM with ViT-B."""
    import torch
    from steps import memory, training_flops
    from timing import interleaved, largest_costs, stated_peak

    import pixmim

    method = case.method if case.kind in ("PixMIM", "MAE") else "mae"
    options = DRY[method] if part.dry else {"window_size": 6} if method == "simmim" else {}
    train, model = build(case, size, device, options, "eager" if part.dry else "inductor")
    images = torch.randn(case.batch, 3, size, size, device=device)
    began = time.monotonic()
    train(images)
    first, (rounds, steps) = time.monotonic() - began, (1, 1) if part.dry else (3, 5)
    turns = {"step": partial(train, images), "target": partial(pixmim.LowFrequency("auto"), images)}
    seconds = interleaved(turns, rounds, steps=steps)
    flops, rate = training_flops(method, case.backbone, size, **options), case.batch / seconds["step"]
    row = {"ms": 1e3 * seconds["step"], "images/s": rate, "of a product": flops * rate / peak, "first step, s": first}
    if stated := stated_peak():
        row["of the stated peak"] = flops * rate / stated
    if device.type == "cuda":
        row["GiB"] = memory(train, model, images) / 2**30
    earlier = [other for other in part.tables.get("steps", []) if other["model"] == case.model]
    if case.kind == "PixMIM" and method == "mae" and all(rate > other.get("images/s", 0) for other in earlier):
        costs = [("PixMIM's target", seconds["target"] / seconds["step"])]
        costs += largest_costs(turns["step"], device, 5)
        title = f"largest costs: {case.model}"
        part.tables[title] = [{"cost": name, "share": value} for name, value in costs]
    return row


def build(case: Case, size: int, device: Any, options: Row, backend: str) -> tuple[Callable[[Any], None], Any]:
    """Return a case's step, and the model that it trains."""
    import torch
    from plain_mae import PlainMAE
    from steps import Ours, huggingface_mae, theirs

    import pixmim

    how: Any = case.compile
    if case.kind in ("PixMIM", "MAE"):
        target = pixmim.Pixels() if case.kind == "MAE" else None
        ours = Ours(case.method, case.backbone, size, "bf16", device, target, how, backend, **options)
        return ours, ours.model
    sizes = (size, 8, 16, 1, 2, (16, 1, 2)) if options else (size, 16, 768, 12, 12, (512, 8, 16))
    with torch.device(device):
        model = {"plain MAE": PlainMAE, "transformers": huggingface_mae}[case.kind](*sizes)
    return theirs(model, "bf16", device, how, backend), model


def pretrain(part: Part) -> None:
    """Compare runs on cached images, from the loader and resident on the device, with a step on noise."""
    import torch
    from rich.console import Console
    from steps import Ours
    from timing import interleaved

    import pixmim
    from pixmim.data import open_dataset
    from pixmim.data.build_resized_cache import make_cache

    dry, device = part.dry, torch.device("cpu" if part.dry else "cuda")
    size, batch, steps = (64, 4, 4) if dry else (224, 1024, 60)
    options = DRY["mae"] if dry else {}
    how: Any = "none" if dry else "blocks"
    ours = Ours("mae", "vit_base_patch16_224", size, "bf16", device, None, how, **options)
    images = torch.randn(batch, 3, size, size, device=device)
    synthetic = batch / interleaved({"": partial(ours, images)}, 1 if dry else 3, steps=1 if dry else 5)[""]
    part.add("runs", run="a step on noise", batch=batch, **{"images/s": synthetic})
    del ours, images
    gc.collect()

    jpeg, spec = "simplejpeg" not in part.replaced, part.data or f"shapes:count={16 if dry else 4096},size={size}"
    with tempfile.TemporaryDirectory() as folder:
        repeats = 1 if dry else -(-8192 // len(open_dataset(spec)))
        source = open_dataset(f"{spec}*{repeats}")
        made = make_cache(source, Path(folder) / "cache", (size, size), kind="jpeg" if jpeg else "raw", chroma="420")
        kind = (
            f"{made.images:,} {'JPEGs' if jpeg else 'raw images (simplejpeg is missing)'} of {part.data or 'shapes:'}"
        )
        for name, where in (("loader", "none"), ("in RAM", "ram"), *(() if dry else (("resident", "gpu"),))):
            with part.trying("runs", run=f"pixmim pretrain, {kind}, {name}", batch=batch) as row:
                config = pixmim.get_recipe(
                    "pixmim-vit-base", data=str(Path(folder) / "cache"), steps=steps, batch_size=batch, size=str(size),
                    log_every=max(1, steps // 6), device=device.type, precision="bf16", cache_images=where,
                    **{"model.options": {k: v for k, v in options.items() if not k.startswith("decoder")}},
                    **{f"model.{k}": v for k, v in options.items() if k.startswith("decoder")},
                )  # fmt: skip
                run = pixmim.pretrain(config, Path(folder) / name, report=False, console=Console(quiet=True))
                lines = [line for line in run.metrics if "images_per_s" in line][len(run.metrics) // 2 :]
                rate = sum(line["images_per_s"] for line in lines) / len(lines)
                waited = sum(line["data_wait_fraction"] for line in lines) / len(lines)
                row |= {"images/s": rate, "of noise": rate / synthetic, "waited for data": waited}


def knn(part: Part) -> None:
    """Time k-NN at ImageNet's size, with features of 768 values."""
    import torch
    from knn import CLASSES, IMAGENET, WIDTH, K

    from pixmim.evaluation.knn import classify

    device = torch.device("cpu" if part.dry else "cuda")
    references, queries = (2000, 100) if part.dry else IMAGENET
    generator = torch.Generator(device).manual_seed(0)
    train, test = (torch.randn(n, WIDTH, device=device, generator=generator).cpu() for n in (references, queries))
    labels = torch.randint(CLASSES, (references,))
    for count in (queries // 10, queries):
        began = time.monotonic()
        classify(train, labels, test[:count], CLASSES, (K,), device=device)
        seconds = time.monotonic() - began
        part.add("k-NN", queries=count, references=references, seconds=seconds)


def claims(part: Part) -> str | None:
    """Train and measure as many arms of the paper's claims as the time allows; each measured step is a row."""
    script = HERE / "claims.py"
    if not script.exists():
        return "left out: there is no benchmarks/claims.py"
    chosen = "--scale tiny --only coverage --limit 1" if part.dry else "--scale gpu --only shapes"
    seen: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        running = subprocess.Popen([sys.executable, str(script), "--out", folder, "--jobs", "0", *chosen.split()])
        while True:
            ended = running.poll() is not None
            for path in sorted(Path(folder).glob("*.json")):
                points = json.loads(path.read_text()).get("points", {})
                for step in points.keys() - {step for run, step in seen if run == path.stem}:
                    seen.add((path.stem, step))
                    values = {key: value for key, value in points[step].items() if key.endswith(("top1", "rrc", "src"))}
                    part.add("claims", run=path.stem, step=int(step), **values)
            if ended:
                break
            time.sleep(0.2)
    return None if running.returncode == 0 else "failed: benchmarks/claims.py, see the log"


class Limited(NamedTuple):
    """A part, and its limit in seconds."""

    run: Callable[[Part], str | None]
    seconds: float


PARTS = {
    "ceilings": Limited(ceilings, 40),
    "tests": Limited(tests, 130),
    "step": Limited(step, 220),
    "pretrain": Limited(pretrain, 90),
    "knn": Limited(knn, 40),
    "claims": Limited(claims, 600),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--data", default="", help="photographs for the real run; drawn images if left out")
    parser.add_argument("--packages", type=Path, help="a folder of packages that this Python lacks")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--write", type=Path, help="a page: replace its section about GPUs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.packages is not None:
        sys.path.insert(0, str(options.packages))
    if options.write is not None:
        options.write.write_text(with_section(options.write.read_text(), options.out))
        return 0
    if options.part:
        return run_part(Part(options.part, options.dry, options.out, options.data))
    return run_all(options)


def run_all(options: argparse.Namespace) -> int:
    """Run each part in a process of its own, and print what they have measured. Return 1 if one has failed."""
    stop = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing in this Python: {', '.join(missing)}; to carry them, see --help", flush=True)
    flags = ["--out", str(options.out), "--data", options.data, *(["--dry"] if options.dry else [])]
    flags += ["--packages", str(options.packages)] if options.packages is not None else []
    paths = [str(SOURCE / "src"), *([str(options.packages.resolve())] if options.packages is not None else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    # Of all parts, so that one compiles for the next; torch's own is in the same place.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "pixmim-gpu-compiled"))
    with open(options.out / "log.txt", "w") as log:
        for name in options.only:
            result_path(options.out, name).unlink(missing_ok=True)
            left = stop - time.monotonic() - 5
            limit = min(PARTS[name].seconds, left)
            if limit < 5:
                Part(name, options.dry, options.out, end="not started: no time was left").write()
                continue
            began = time.monotonic()
            end = run_within([sys.executable, __file__, "--part", name, *flags], limit, environment, log)
            result = read_result(options.out, name)
            part = Part(name, options.dry, options.out, tables=result["tables"], end=end or result["end"])
            part.write()
            print(f"{name}: {part.end}, after {time.monotonic() - began:.0f} s", flush=True)
    print(text_of(options.out))
    return int(any(read_result(options.out, name)["end"].startswith("failed") for name in options.only))


def run_within(command: list[str], limit: float, environment: dict[str, str], log: Any) -> str:
    """Run a command as a session of its own, and kill all of it after `limit` seconds; return why it ended early."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        process.wait()
    return f"failed: killed by signal {-process.returncode}" if process.returncode < 0 else ""


def run_part(part: Part) -> int:
    """Run a part in this process."""
    for name in REPLACED:
        if importlib.util.find_spec(name) is None:
            part.replaced += (name,)
            sys.modules.update({name: MagicMock(), f"{name}.conf": MagicMock(), f"{name}.constructors": MagicMock()})
    try:
        part.end = PARTS[part.name].run(part) or "complete"
    except BaseException as error:
        part.end = f"failed: {summary(error)[:200]}"
        raise
    finally:
        part.write()
    return 0


def result_path(out: Path, name: str) -> Path:
    return out / f"{name}.json"


def read_result(out: Path, name: str) -> dict[str, Any]:
    """Return the content of a part's file, or an empty result without one."""
    path = result_path(out, name)
    return json.loads(path.read_text()) if path.exists() else {"end": "failed: it wrote nothing", "tables": {}}


def text_of(out: Path) -> str:
    """Return all tables as text."""
    lines: list[str] = []
    for name in PARTS:
        if not result_path(out, name).exists():
            continue
        result = read_result(out, name)
        if result["end"] != "complete":
            lines += [f"{name}: {result['end']}", ""]
        for title, rows in result["tables"].items():
            lines += [title, *(f"  {line}" for line in aligned(rows)), ""]
    return "\n".join(lines).rstrip()


def aligned(rows: list[Row]) -> list[str]:
    """Return rows as lines of equal columns; the first line is the heading."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([shown(column, row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = [isinstance(rows[0].get(column), str) for column in columns]
    return [
        "  ".join(
            f"{cell:<{w}}" if left else f"{cell:>{w}}" for cell, w, left in zip(line, widths, texts, strict=True)
        ).rstrip()
        for line in cells
    ]


def shown(column: str, value: Any) -> str:
    """Return a value as text: shares in per cent, other numbers with three digits or more."""
    if isinstance(value, float):
        if column in ("share", "waited for data") or column.startswith("of "):
            return f"{value:.1%}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else json.dumps(value)


SECTION = re.compile(r"^## On a GPU\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)

NOT_YET = "No GPU has been measured yet."


def with_section(page: str, out: Path) -> str:
    """Return a page whose section "On a GPU" holds the tables of `out`, or one line without any."""
    body = text_of(out)
    table = "\n".join(f"    {line}".rstrip() for line in body.splitlines()) if body else NOT_YET
    section = f"""## On a GPU

    make gpu                                                               # at most nine minutes
    python benchmarks/gpu.py --out runs/gpu --write docs/performance.md    # this section, from its files

{table}

"""
    found = SECTION.subn(lambda _: section, page)
    if found[1] != 1:
        raise SystemExit('the page needs one section "## On a GPU"')
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
