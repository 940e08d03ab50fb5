"""pixmim cache: pictures resized once, for all epochs to come. pixmim stats: what is in them."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from pixmim.cli.flags import absolute, checked
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import check_writable
from pixmim.utils.validation import MAX_CHANNELS, Count, Size, Some, Threads, Whole

_LOOK = 200  # images whose files are looked into for their channels and depth


def cache(args: list[str]) -> int:
    """Make a cache, or go on with one."""

    def command(
        data: Positional[str],
        out: Positional[Path],
        /,
        *,
        size: Size = "224",
        quality: Annotated[int, Whole(1, 100)] = 95,
        chroma: Literal["444", "420"] = "444",
        raw: bool = False,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        channels: Annotated[int, Whole(1, MAX_CHANNELS)] = 3,
        dtype: Literal["uint8", "uint16", "float32"] = "uint8",
        tiff_pages: Literal["first", "channels"] = "first",
        per_shard: Count = 2000,
        threads: Threads = 0,
    ) -> int:
        """Resize pictures once and keep them in indexed tar shards (WebDataset), for --data of the other commands.

        PixMIM's crop begins with a resize that is the same in every epoch; a cache pays it once. Interrupt it as you
        like and run it again: finished shards stay. Under torchrun or in a Slurm array each process makes its part.

        Args:
            data: Images, as pretrain's --data takes them.
            out: The folder of the cache.
            size: Side of what the network will see, or HEIGHTxWIDTH: images just cover it, aspect kept.
            quality: Of the JPEGs.
            chroma: 444 keeps colors at full resolution; 420 is smaller and faster, and disturbs the target more.
            raw: Pixels instead of JPEGs: no decoding later, four times the space. For all but uint8 in 1 or 3 channels.
            interpolation: Resampling, always with antialias; the crop's of the run to come.
            channels: Color (3), grey (1), or as many as the files have.
            dtype: uint8, uint16: 255 or 65535 count as one. float32: floating-point values are taken as they are.
            tiff_pages: Of a TIFF with several pages: the first one, or all of them as channels.
            per_shard: Images in a tar.
            threads: 0: one for each core, at most 16.
        """
        from pixmim.config import PretrainConfig
        from pixmim.data import open_dataset
        from pixmim.data.build_resized_cache import make_cache
        from pixmim.data.dataset import ImageSpec
        from pixmim.utils.console import progress

        console = Console()
        source = open_dataset(absolute(data), ImageSpec(channels, dtype, tiff_pages))
        with progress(f"caching {data}", len(source), console) as advance:
            made = make_cache(
                source,
                out,
                PretrainConfig(size=size).image_size,
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
            print_plain(console, f"{made.images:,} images written in {rate}; {made.bytes / 1e6:,.0f} MB")
        elif not made.skipped:
            print_plain(console, "nothing was left to do")
        if made.skipped:
            print_plain(console, f"{made.skipped} could not be read: see {out}/skipped*.csv")
        print_plain(
            console,
            f"whole: train with --data {shlex.quote(str(out))}"
            if made.complete
            else "not whole yet: other parts are to come",
        )
        return 0

    return tyro.cli(checked(command), prog="pixmim cache", args=args)


def stats(args: list[str]) -> int:
    """Measure mean and std, and say what is in a data set."""

    def command(
        data: Positional[str],
        /,
        *,
        channels: Annotated[int, Whole(0, MAX_CHANNELS)] = 0,
        dtype: Literal["auto", "uint8", "uint16", "float32"] = "auto",
        tiff_pages: Literal["first", "channels"] = "first",
        images: Some = 5000,
        threads: Threads = 0,
    ) -> int:
        """Look at a data set: channels, depths, sizes, what cannot be read, mean and std of each channel.

        Mean and std are kept where `pixmim pretrain` finds them: in the folder of a cache, or else in the user's cache
        directory, by the data's whole path. Each image counts the same, whatever its size.

        Args:
            data: A folder of images, a cache, tars, a .txt that names images, a URL, or shapes:.
            channels: What images are brought into; 0: what most files hold.
            dtype: uint8, uint16: 255 or 65535 count as one. float32: floating-point values are taken as they are.
            tiff_pages: Of a TIFF with several pages: the first one, or all of them as channels.
            images: Images to measure, spread evenly over the data, the same ones each time; 0: all.
            threads: 0: one for each core, at most 16.
        """
        import time

        from pixmim.data import open_dataset
        from pixmim.data import statistics as look
        from pixmim.data.dataset import ImageSpec
        from pixmim.data.resized_cache import read_settings
        from pixmim.utils.console import progress

        console, spec = Console(), absolute(data)
        settings = read_settings(spec)
        form = settings.image_spec if settings is not None else ImageSpec(tiff_pages=tiff_pages)
        source = open_dataset(spec, form)
        kinds = look.kinds(source, look.sample(len(source), _LOOK), tiff_pages)
        likely = form if settings is not None else look.fitting(kinds, tiff_pages)
        form = ImageSpec(channels or likely.channels, likely.dtype if dtype == "auto" else dtype, likely.tiff_pages)
        if form != source.image_spec:
            source = open_dataset(spec, form)
        check_writable(look.place(spec, form))
        chosen, began = look.sample(len(source), images), time.monotonic()
        with progress(f"measuring {data}", len(chosen), console) as advance:
            found = look.measure_statistics(source, chosen, threads=threads, progress=advance)
        seconds = time.monotonic() - began
        for line in look.report(source, kinds, found):
            print_plain(console, line)
        if not found.images:
            raise UserError(f"not one image of {data} can be brought into {form}")
        print_plain(console, f"measured in {seconds:.0f} s, {len(chosen) / seconds:.0f} images/s")
        path = look.remember(spec, form, look.to_keep(found, len(source)))
        print_plain(console, f"kept in {path}")
        print_plain(console, f"train with --data {shlex.quote(data)} {form.flags}")
        return 0

    return tyro.cli(checked(command), prog="pixmim stats", args=args)
