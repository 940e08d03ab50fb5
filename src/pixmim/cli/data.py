"""Commands that read datasets: `pixmim advise`, `cache`, `stats` and `bench-data`."""

import json
import shlex
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from pixmim.cli.flags import ChoiceFlags, absolute, command
from pixmim.utils.console import cell, print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import check_output, check_writable, write_text_atomically
from pixmim.utils.validation import (
    MAX_CHANNELS,
    Count,
    Device,
    Integer,
    NonNegative,
    Real,
    Settings,
    Share,
    Size,
    Stretch,
    Threads,
)

_INSPECTED = 200  # images whose files `pixmim stats` inspects for channels and dtype

Data = Annotated[Positional[str], arg(help="Images: anything that --data of pretrain accepts.")]
ViewSize = Annotated[Size, arg(help="Side of the network's input in pixels, or HEIGHTxWIDTH.")]
NumThreads = Annotated[Threads, arg(help="Number of threads. 0: one per core, at most 16.")]


@dataclass(frozen=True)
class _FileFlags(Settings):
    """Flags on how files are read."""

    tiff_pages: Literal["first", "channels"] = "first"
    """Pages of a TIFF to use: the first, or all of them as channels."""
    stretch: Stretch = ""
    """Percentiles of each channel of an image to map to the full range, such as 1,99."""
    max_no_data: Share = 1.0
    """Largest share of the pixels of a GeoTIFF that may have no data; images with more are left out."""


@dataclass(frozen=True)
class _ImageFlags(_FileFlags):
    """Flags of an `ImageSpec`."""

    channels: Annotated[int, Integer(1, MAX_CHANNELS)] = 3
    """Color (3), gray (1), or as many as the files have."""
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """Pixels: uint8 or uint16, whose 255 or 65535 mean 1.0, or float32, unchanged."""


@command("advise")
def advise(
    data: Positional[str],
    /,
    *,
    choice: Annotated[ChoiceFlags, arg(name="")] = ChoiceFlags(),  # noqa: B008
    images: Annotated[int, Integer(1, 20_000)] = 2_000,
    list_file: Annotated[Path | None, arg(name="list", metavar="FILE.txt|FILE.csv")] = None,
    json_file: Annotated[str, arg(name="json", metavar="FILE|-")] = "",
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    overwrite: bool = False,
    device: Device = "auto",
    trial: bool = True,
) -> int:
    """Examine a dataset, suggest settings with their reasons, and print the commands to type.

    Args:
        data: Images: anything that --data of pretrain accepts.
        choice: Images to choose by their names.
        images: Images to examine, evenly distributed and always the same.
        list_file: Write a list of the images without masks, for --data. A .csv also has classes, and near-duplicates
            as groups, which --labelled keeps together.
        json_file: Write everything as JSON to a file, or to the standard output (-) instead of the text.
        out: Folder for a page with small images, index.html.
        overwrite: Replace existing files of --list and --json.
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
    chosen = choice.choose(data)
    advice = examine(
        chosen,
        images=images,
        write_list=list_file,
        overwrite=overwrite,
        device=device,
        trial=trial,
        console=console,
    )
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


@command("cache")
def cache(
    data: Data,
    out: Positional[Path],
    /,
    *,
    choice: Annotated[ChoiceFlags, arg(name="")] = ChoiceFlags(),  # noqa: B008
    size: ViewSize = "224",
    quality: Annotated[int, Integer(1, 100)] = 95,
    chroma: Literal["444", "420"] = "444",
    raw: bool = False,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    images: Annotated[_ImageFlags, arg(name="")] = _ImageFlags(),
    per_shard: Count = 2000,
    threads: NumThreads = 0,
) -> int:
    """Resize images once and store them in indexed tar shards (WebDataset), for --data of the other commands.

    PixMIM's crop starts with a resize that is the same in every epoch; a cache does it once. An interrupted command
    resumes when run again. Under torchrun or in a Slurm array, each process writes its share of the shards.

    Args:
        out: Folder of the cache.
        choice: Images to choose by their names.
        quality: JPEG quality.
        chroma: 444 keeps colors at full resolution; 420 is smaller and faster, but distorts the target more.
        raw: Store pixels instead of JPEGs: no decoding, four times the size. Required unless uint8 with 1 or 3
            channels.
        interpolation: Resampling filter, always with antialiasing. Use that of the crop in training.
        per_shard: Images per shard.
    """
    from pixmim.config import ModelConfig
    from pixmim.data import open_dataset
    from pixmim.data.build_resized_cache import make_cache
    from pixmim.data.dataset import ImageSpec
    from pixmim.utils.console import progress

    console, data = Console(), choice.choose(data)
    dataset = open_dataset(absolute(data), ImageSpec(**asdict(images)))
    if dataset.left_out:
        print_plain(console, dataset.left_out)
    with progress(f"caching {data}", len(dataset), console) as advance:
        result = make_cache(
            dataset,
            out,
            ModelConfig(size=size).image_size,
            interpolation=interpolation,
            kind="raw" if raw else "jpeg",
            quality=quality,
            chroma=chroma,
            per_shard=per_shard,
            threads=threads,
            progress=advance,
        )
    if result.images:
        rate = f"{result.seconds:.0f} s, {result.images / result.seconds:.0f} images/s"
        print_plain(console, f"{result.images:,} images written in {rate}; {result.bytes / 1e6:,.0f} MB")
    elif not result.skipped:
        print_plain(console, "no images left to write")
    if result.skipped:
        print_plain(console, f"{result.skipped} could not be read: see {out}/skipped*.csv")
    complete = f"complete: train with --data {shlex.quote(str(out))}"
    print_plain(console, complete if result.complete else "incomplete: shards of other processes are missing")
    return 0


@command("stats")
def stats(
    data: Data,
    /,
    *,
    choice: Annotated[ChoiceFlags, arg(name="")] = ChoiceFlags(),  # noqa: B008
    channels: Annotated[int, Integer(0, MAX_CHANNELS)] = 0,
    dtype: Literal["auto", "uint8", "uint16", "float32"] = "auto",
    files: Annotated[_FileFlags, arg(name="")] = _FileFlags(),
    images: NonNegative = 5000,
    threads: NumThreads = 0,
) -> int:
    """Report channels, dtypes, sizes and unreadable files of a dataset, and measure its mean and std.

    `pixmim pretrain` uses the mean and std. They are saved in the folder of a cache, or else in the user's cache
    directory under the dataset's absolute path. Each image has the same weight, whatever its size.

    Args:
        choice: Images to choose by their names.
        channels: Channels that images are converted to. 0: those of most files.
        dtype: Pixels that images are converted to. auto: the smallest that keeps the values of most files.
        images: Images to measure, evenly distributed over the dataset and always the same. 0: all.
    """
    from pixmim.data import open_dataset, statistics
    from pixmim.data.dataset import ImageSpec
    from pixmim.data.resized_cache import find_settings
    from pixmim.utils.console import progress

    data = choice.choose(data)
    console, spec = Console(), absolute(data)
    settings = find_settings(spec)
    given = {name: value for name, value in asdict(files).items() if value != getattr(_FileFlags, name)}
    likely = replace(ImageSpec() if settings is None else settings.image_spec, **given)
    dataset = open_dataset(spec, likely)
    inspected = statistics.sample_indices(len(dataset), _INSPECTED)
    formats = statistics.count_formats(dataset, inspected, files.tiff_pages)
    if settings is None:
        found = statistics.choose_image_spec(formats)
        likely = replace(likely, channels=found.channels, dtype=found.dtype)
    chosen_dtype = likely.dtype if dtype == "auto" else dtype
    image_spec = replace(likely, channels=channels or likely.channels, dtype=chosen_dtype)
    if image_spec != dataset.image_spec:
        dataset = open_dataset(spec, image_spec)
    check_writable(statistics.statistics_path(spec, image_spec))
    indices, start = statistics.sample_indices(len(dataset), images), time.monotonic()
    with progress(f"measuring {data}", len(indices), console) as advance:
        result = statistics.measure(dataset, indices, threads=threads, progress=advance)
    seconds = time.monotonic() - start
    for line in statistics.format_report(dataset, formats, result):
        print_plain(console, line)
    if not len(result.sizes):
        raise UserError(f"no image of {data} can be converted to {image_spec}")
    print_plain(console, f"measured in {seconds:.0f} s, {len(indices) / seconds:.0f} images/s")
    path = statistics.save_statistics(spec, image_spec, result.stats(len(dataset)))
    print_plain(console, f"saved to {path}")
    print_plain(console, f"train with --data {shlex.quote(data)} {image_spec.flags}")
    return 0


@command("bench-data")
def bench_data(
    data: Data,
    /,
    *,
    size: ViewSize = "224",
    crop: Literal["simple-resized", "random-resized", "center"] = "simple-resized",
    images: Annotated[_ImageFlags, arg(name="")] = _ImageFlags(),
    threads: NumThreads = 0,
    target_rate: Annotated[float | None, Real(0, 1e9, above=True)] = None,
    seconds: Annotated[float, Real(0, 3_600, above=True)] = 1.0,
) -> int:
    """Measure how many images per second this machine loads, and recommend what makes it faster.

    Takes half a minute. Caches are tried on a sample, in a temporary folder.

    Args:
        crop: simple-resized (PixMIM), random-resized (MAE) or center.
        target_rate: Throughput your model needs, in images/s; reports whether the data pipeline keeps up.
        seconds: Length of each of about 15 measurements.
    """
    from pixmim.build import build_crop, image_spec
    from pixmim.config import CropConfig, PretrainConfig
    from pixmim.data import open_dataset
    from pixmim.data.dataset import RGB
    from pixmim.data.throughput import measure, recommend

    config = PretrainConfig(size=size, crop=CropConfig(kind=crop), **asdict(images))
    spec = image_spec(config)
    dataset = open_dataset(absolute(data), spec)
    scale = 2 if crop == "random-resized" else 1  # that crop enlarges a part of the image
    h, w = (side * scale for side in config.image_size)
    flags = f" {spec.flags}" if spec != RGB else ""
    console = Console()
    with console.status("") as status:
        report = measure(
            dataset,
            build_crop(config),
            (h, w),
            command=f"pixmim cache {shlex.quote(data)} cached --size {h if h == w else f'{h}x{w}'}{flags}",
            threads=threads,
            seconds=seconds,
            on_start=lambda name: status.update(cell(f"measuring: {name}")),
        )
    title = f"{len(dataset):,} images; measured with {report.sampled:,} of them"
    table = Table("", "images/s", "kB per image", title=title, title_justify="left", box=SIMPLE)
    for row in report.rows:
        table.add_row(row.name, f"{row.rate:,.0f}", f"{row.bytes / 1e3:,.0f}" if row.bytes else "")
    console.print(table)
    for line in recommend(report, target_rate):
        print_plain(console, line)
    return 0
