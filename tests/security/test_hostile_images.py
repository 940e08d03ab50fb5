"""Hostile image files and folders, made to hang, to exhaust memory or to open other files, cost one line each."""

import ast
import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pixmim
from helpers.hostile_files import plain, tiff
from helpers.images import JPEG, PIXELS, PNG, SMOOTH, encoded
from pixmim import cli
from pixmim.data import image_folder as files
from pixmim.data import open_dataset
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode import headers, limits
from pixmim.data.decode.image import FORMATS, decode, open_image, read
from pixmim.data.throughput import drop_from_page_cache
from pixmim.evaluation.annotations import read_objects
from pixmim.evaluation.segmentation.dataset import open_segmentation
from pixmim.utils.errors import UserError

DEEP = ImageSpec(1, "uint16")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's path is short
        try:
            one.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


NOT_REGULAR = [fifo, unix_socket, device, link_to_fifo]


# Only regular files


@pytest.mark.parametrize("make", NOT_REGULAR)
def test_irregular_files_cost_a_line(make: Callable[[Path], None], pictures: Path, tmp_path: Path) -> None:
    make(pictures / "cats" / "z.jpg")
    assert cli.main(["cache", str(pictures), str(tmp_path / "cached"), "--size", "32"]) == 0
    rows = (tmp_path / "cached" / "skipped.csv").read_text().splitlines()
    assert len(rows) == 2 and re.search(r"z\.jpg,.*not a regular file", rows[1])
    assert len(open_dataset(str(tmp_path / "cached"))) == 10
    (tmp_path / "list.txt").write_text("pictures/cats/z.jpg\npictures/cats/0.jpg\n")
    listed = open_dataset(str(tmp_path / "list.txt"))
    with pytest.raises(BadImage, match="not a regular file"):
        listed.read_array(0)
    assert listed.read_array(1).shape == (40, 56, 3)
    drop_from_page_cache((listed.path_of(0), 0, 0))


def test_stats_report_a_fifo(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fifo(pictures / "cats" / "z.jpg")
    assert cli.main(["stats", str(pictures)]) == 0
    assert "not a regular file" in capsys.readouterr().out


def test_large_files_growing_files_and_impossible_names(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(str(pictures))
    if Path("/proc/self/status").exists():
        with pytest.raises(BadImage, match="grew"):
            files.ImageFolder("", Path("/proc/self"), ["status"]).read_array(0)
    for name in ("a\0b.jpg", "\ud800.jpg", "a" * 5000 + ".jpg"):
        with pytest.raises(BadImage):
            files.ImageFolder("", pictures, [name]).read_array(0)
    monkeypatch.setattr(limits, "_machine_bounds", lambda: (10**6, 100))
    with pytest.raises(BadImage, match="limit of 100"):
        data.read_array(0)


def test_lists_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "list.txt"
    text.write_text("a.jpg\n" * 9)
    monkeypatch.setattr(files, "MAX_LINES", 8)
    with pytest.raises(UserError, match="more than 8 lines"):
        open_dataset(str(text))
    monkeypatch.setattr(files, "MAX_LIST_BYTES", 20)
    with pytest.raises(UserError, match="54 bytes exceed the limit of 20"):
        open_dataset(str(text))


def test_folders_nested_deeper_than_a_path_can_be(tmp_path: Path, pictures: Path) -> None:
    here = os.open(pictures, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 100, dir_fd=here)
        down = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = down
    os.close(here)
    (pictures / "up").symlink_to("..")
    data = open_dataset(str(pictures))
    assert len(data) == 10 and "because they cannot be read: 1" in data.description
    subprocess.run(["rm", "-rf", str(pictures / ("d" * 100))], check=True)  # deeper than pytest's own cleaning goes


@pytest.mark.parametrize("make", NOT_REGULAR)
def test_masks_and_names_of_classes_are_regular_files(make: Callable[[Path], None], tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.fromarray(SMOOTH // 100).save(tmp_path / folder / "a.png")
        Image.fromarray(SMOOTH // 100).save(tmp_path / folder / "b.png")
    (tmp_path / "masks" / "a.png").unlink()
    make(tmp_path / "masks" / "a.png")
    pairs = open_segmentation(str(tmp_path), ImageSpec(), "training")
    assert pairs.read_array(1).shape == (20, 30, 4)
    with pytest.raises(BadImage, match="mask"):
        pairs.read_array(0)
    with pytest.raises(UserError, match=r"a\.png, not a regular file|no object inside|b\.png"):
        read_objects(str(tmp_path / "masks"))
    os.makedirs(tmp_path / "names")
    make(tmp_path / "names" / "x")
    for name in ("classes.txt", "objectInfo150.txt"):
        os.rename(tmp_path / "names" / "x", tmp_path / name)
        with pytest.raises(
            UserError, match=rf"{name} cannot be read: not a regular file|{name} cannot be read: No such"
        ):
            open_segmentation(str(tmp_path), ImageSpec(), "training")
        os.rename(tmp_path / name, tmp_path / "names" / "x")


def test_annotations_without_bombs(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    root = "<annotation>&{};</annotation>"
    for text in (
        f'<!DOCTYPE x [<!ENTITY a0 "a">{entities}]>{root.format("a11")}',
        f'<!DOCTYPE x [<!ENTITY a "b">]>{root.format("a")}',
    ):
        for encoding in ("utf-8", "utf-16"):
            (tmp_path / "a.xml").write_text(text, encoding=encoding)
            with pytest.raises(UserError, match="defines entities"):
                read_objects(str(tmp_path))
    (tmp_path / "a.csv").write_text("width,height,x,y,w,h\n1e300,5,0,0,1,1\n")
    with pytest.raises(UserError, match="image size 1e"):
        read_objects(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text(f"width,height,x,y,w,h\n{'1' * 200_000}")
    with pytest.raises(UserError, match="line 2: field larger"):
        read_objects(str(tmp_path / "a.csv"))
    for text in ('{"images": [[]], "annotations": []}', '{"images": [], "annotations": ["a"]}', "[" * 10**5):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json"):
            read_objects(str(tmp_path / "a.json"))


# Decoders


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    b"newpath 0 0 moveto 10 0 lineto 10 10 lineto closepath fill\nshowpage\n"
)


def test_an_eps_is_not_handed_to_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gs", "gswin64c", "djpeg"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/PWNED\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for call in (decode, read, open_image):
        with pytest.raises(BadImage, match="known format"):
            call(EPS)  # type: ignore[operator]
    assert not (tmp_path / "PWNED").exists()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(EPS)
    with pytest.raises(UserError, match=r"a\.png, not an image"):
        read_objects(str(tmp_path / "masks"))


def test_no_other_format_is_opened() -> None:
    Image.init()
    tested = []
    for name in sorted(set(Image.SAVE) & set(Image.OPEN) - set(FORMATS)):
        try:
            data = encoded(Image.new("RGB", (16, 16)), name)
        except Exception:
            continue  # not every plugin writes color
        if data[:2] == b"BM":  # DIB's other name
            continue
        tested.append(name)
        with pytest.raises(BadImage):
            decode(data)
    assert {"ICO", "TGA", "SGI", "PCX"} <= set(tested)
    with pytest.raises(BadImage):
        open_image(PNG, ("JPEG",))
    with open_image(PNG, ("PNG",)) as image:
        assert image.size == (30, 20)


def test_all_uses_of_image_open_list_formats() -> None:
    """Image.open is called in two modules, with a list of formats; np.load never unpickles."""
    found = []
    for path in sorted(Path(pixmim.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
                if named.endswith("Image.open"):
                    assert "formats" in keywords, f"{path}:{node.lineno}"
                    found.append(path.name)
                if named in ("np.load", "numpy.load"):
                    assert "allow_pickle=False" in ast.unparse(node), f"{path}:{node.lineno}"
    assert found == ["image.py", "corruptions.py"]


def test_a_phone_image_of_several_frames_is_a_jpeg() -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))
    with open_image(data) as image:
        assert image.format == "JPEG"


# TIFF


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_circular_page_list(order: str, big: bool) -> None:
    for loop in (0, 1, 2):
        data = tiff([plain()] * 3, order=order, big=big, loop=loop)
        assert decode(data, DEEP).shape == (16, 16, 1)  # the first page is valid
        with pytest.raises(BadImage, match="is circular"):
            decode(data, ImageSpec(3, "uint16", "channels"))
        with pytest.raises(BadImage, match="is circular"):
            decode(data, ImageSpec(2, "uint16"))  # which counts the pages, to name --tiff-pages
    assert decode(tiff([plain()] * 3, order=order, big=big), ImageSpec(3, "uint16", "channels")).shape == (16, 16, 3)


def test_more_pages_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_PAGES", 5)
    with pytest.raises(BadImage, match="more than 5 pages"):
        decode(tiff([plain()] * 6), ImageSpec(6, "uint16", "channels"))
    assert decode(tiff([plain()] * 5), ImageSpec(5, "uint16", "channels")).shape == (16, 16, 5)


def test_other_tags_are_removed() -> None:
    """No library sees circular lists of further images, OME-XML with entities, or headers of microscopes."""
    xml = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "b">]><OME xmlns="x">&a;</OME>'
    for code, kind, values in (
        (330, 4, [520] * 400), (34665, 4, [520]), (34853, 4, [520]), (34412, 1, list(range(200))),
        (270, 2, list(xml)), (33628, 4, [520] * 90), (65420, 4, [1]), (50839, 1, [0] * 99),
    ):  # fmt: skip
        data = tiff([plain(**{f"t{code}": (kind, values)})])
        assert code not in headers.TiffHeader(data).pages()[0]
        clean = headers.sanitize_tiff(data)
        (start,) = struct.unpack_from("<I", clean, 4)
        assert start >= len(data) and struct.pack("<HH", code, kind) not in clean[start:]
        assert np.array_equal(decode(data, DEEP), np.zeros((16, 16, 1), np.uint16))


@pytest.mark.usefixtures("usual_bounds")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"t273": (4, [8] * 5000), "t279": (4, [512] * 5000), "t278": (3, [1])}, "claim more bytes than the file"),
        ({"t278": (3, [1]), "t256": (4, [2**20]), "t257": (4, [2**20])}, "pixels are more than"),
        ({"t322": (4, [1]), "t323": (4, [1]), "t256": (4, [8000]), "t257": (4, [8000])}, "64,000,000 strips or tiles"),
        ({"t322": (4, [2**31]), "t323": (4, [2**31])}, "GiB are more than"),
        ({"t322": (4, [0]), "t323": (4, [16])}, "tiles without a size"),
        ({"t258": (3, [16] * 9)}, "1 samples of 16 bits"),
        ({"t258": (3, [60000])}, "samples of 60000 bits"),
        ({"t277": (4, [2**31])}, "samples of 16 bits"),
        ({"t277": (3, [65000]), "t256": (3, [3000]), "t257": (3, [3000])}, "GiB are more than"),
        ({"t32997": (4, [2**30])}, "GiB are more than"),
        ({"t259": (3, [34712])}, "compression 34712; supported are .*LZW"),
        ({"t259": (3, [50002])}, "compression 50002"),
        ({"t273": (4, [5000])}, "truncated"),
        ({"t279": (4, [2**31])}, "truncated"),
        ({"t256": (3, [16, 60000])}, "do not hold one integer"),
        ({"t256": (2, [16])}, "do not hold one integer"),
        ({"t256": (3, [0])}, "is empty"),
    ],
)
def test_tags_that_claim_too_much(changes: dict[str, tuple[int, list[int]]], reason: str) -> None:
    data = tiff([plain(**changes)])
    began = time.monotonic()
    for form in (DEEP, ImageSpec(1), ImageSpec(1, "uint16", "channels")):
        with pytest.raises(BadImage, match=reason):
            decode(data, form)
    assert time.monotonic() - began < 2


def test_counts_beyond_the_file() -> None:
    data = bytearray(tiff([plain()]))
    (first,) = struct.unpack_from("<I", data, 4)
    at = data.index(struct.pack("<HHI", 273, 4, 1), first)
    struct.pack_into("<I", data, at + 4, 2**31)  # two billion strips
    with pytest.raises(BadImage):
        decode(bytes(data), DEEP)
    struct.pack_into("<H", data, first, 65535)
    with pytest.raises(BadImage, match="65,535 tags"):
        decode(bytes(data), DEEP)


def test_a_strip_that_is_a_decompression_bomb() -> None:
    pytest.importorskip("imagecodecs")
    packed = zlib.compress(bytes(50 * 2**20))
    page = plain(t259=(3, [8]), t277=(3, [5]), t278=(4, [16]), t258=(3, [16] * 5), t279=(4, [2560]))
    data = tiff([page | {273: (4, [len(tiff([page]))]), 279: (4, [len(packed)])}]) + packed
    tracemalloc.start()
    with pytest.raises(BadImage, match="DeflateError"):
        decode(data, ImageSpec(5, "uint16"))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_jpeg_larger_than_its_strip() -> None:
    pytest.importorskip("imagecodecs")
    inside = encoded(Image.new("L", (4000, 4000)), "JPEG", quality=1)
    body = tiff([plain(t259=(3, [7]), t258=(3, [8]))])
    changes = {"t259": (3, [7]), "t258": (3, [8]), "t273": (4, [len(body)]), "t279": (4, [len(inside)])}
    data = tiff([plain(**changes, t256=(3, [1600]), t257=(3, [1600]), t278=(3, [1600]), t338=(3, [0]))])
    data = tiff([plain(**(changes | {"t273": (4, [len(data)])}), t256=(3, [1600]), t257=(3, [1600]),
                       t278=(3, [1600]), t338=(3, [0]))]) + inside  # fmt: skip
    with pytest.raises(BadImage, match="strip or tile of 4000x4000 pixels"):
        decode(data, ImageSpec(1, "float32"))


# JPEG


def scans(count: int) -> bytes:
    data = encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + b"\xff\xd9"


def test_scans_of_a_jpeg_are_bounded() -> None:
    for call in (decode, open_image):
        with pytest.raises(BadImage, match="a JPEG of 101 scans"):
            call(scans(101))  # type: ignore[operator]
    assert decode(encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)).shape == (20, 30, 3)
    start = JPEG.index(b"\xff\xda")
    several = JPEG[: start + 4] + b"\1" + JPEG[start + 5 :] + JPEG[start:] * 100  # each channel in scans of its own
    with pytest.raises(BadImage, match="a JPEG of 101 scans"):
        decode(several)
    with pytest.raises(BadImage, match="a JPEG of 30 scans over 100,000,000 pixels"):
        headers._check_scans(30, 10**8)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def hostile_exif() -> bytes:
    """Return thousands of tags that each claim all of the block."""
    tags = [struct.pack("<HHII", 40_000 + i, 7, 60_000, 10) for i in range(5000)]
    return (b"II*\0" + struct.pack("<IH", 8, 65535) + b"".join(tags)).ljust(65_000, b"\0")


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_exif_of_tags_that_claim_all_of_it_takes_no_memory(mode: str) -> None:
    data = encoded(Image.fromarray(PIXELS).convert(mode), "JPEG", quality=95)
    hostile = data[:2] + segment(0xE1, b"Exif\0\0" + hostile_exif()) * 20 + data[2:]
    tracemalloc.start()
    assert np.array_equal(decode(hostile), decode(data))
    assert np.array_equal(read(hostile), read(data))
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "filling", [b"\xff", b"\xff\xe0\0\2", b"\xff\xe0\0\0", b"\xff\xe0\0\1", b"\xff\x01", b"\xff\xd8"]
)
def test_chains_of_empty_segments_end(filling: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(BadImage):
        decode(b"\xff\xd8\xff" + filling * 1_000_000 + JPEG[2:])
    assert time.monotonic() - began < 2


# PNG, WebP, GIF


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_chunks_of_png_that_unpack_to_more() -> None:
    packed = zlib.compress(bytes(50 * 2**20))
    deep = pytest.importorskip("imagecodecs").png_encode(PIXELS.astype(np.uint16) * 257)
    for data, form in ((PNG, ImageSpec()), (deep, ImageSpec(3, "uint16"))):
        expected = decode(data, form)
        for hostile in (
            chunk(b"zTXt", b"a\0\0" + packed),
            chunk(b"iCCP", b"a\0\0" + packed),
            chunk(b"iTXt", b"a\0\1\0\0\0" + packed),
            chunk(b"eXIf", hostile_exif() * 5),
        ):
            tracemalloc.start()
            try:
                assert np.array_equal(decode(data[:33] + hostile + data[33:], form), expected)
            except BadImage:
                assert hostile[4:8] != b"eXIf"
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
            tracemalloc.stop()


def test_sizes_are_checked_before_anything_is_opened() -> None:
    webp = encoded(Image.fromarray(PIXELS), "WEBP")
    extended = (
        b"RIFF" + struct.pack("<I", 999) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff" * 6 + webp[12:]
    )
    gif = (
        b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + bytes(6) + b"!\xf9\4\x08\0\0\0\0,"
        + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\2\2L\1\0;"
    )  # fmt: skip
    bmp = bytearray(encoded(Image.fromarray(PIXELS), "BMP"))
    struct.pack_into("<ii", bmp, 18, 60_000, -60_000)
    for data in (extended, gif, bytes(bmp), b"P6 60000 60000 255\n", b"Pf\n60000 60000\n-1.0\n"):
        for call in (decode, open_image):
            with pytest.raises(BadImage, match="pixels"):
                call(data)  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_only_the_first_frame_is_decoded(kind: str) -> None:
    first, second = Image.new("RGB", (9, 9), (255, 0, 0)), Image.new("RGB", (9, 9), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second] * 3, **options)
    assert decode(data).reshape(-1, 3).tolist() == [[255, 0, 0]] * 81


# Time


@pytest.fixture
def short_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.3)
    time.sleep(1.1)  # the watcher thread uses it from its next round on


def test_decoding_has_a_time_limit(short_time_limit: None) -> None:
    rows = bytearray(encoded(Image.fromarray(SMOOTH).convert("P"), "BMP"))
    struct.pack_into("<ii", rows, 18, 8000, 8000)
    struct.pack_into("<I", rows, 30, 1)  # run lengths, which Pillow unpacks in Python
    for data in (
        b"P3\n#" + b"a" * 20_000_000 + b"\n3 3\n255\n" + b"1 " * 27,
        PNG[:33] + chunk(b"aaAa", b"") * 1_000_000 + PNG[33:],
        bytes(rows[:1078]) + b"\1\1" * 5_000_000,
    ):
        began = time.monotonic()
        with pytest.raises(BadImage, match=r"longer than 0\.3 s to decode"):
            decode(data)
        assert time.monotonic() - began < 5
    assert np.array_equal(decode(PNG), PIXELS)


def test_an_interruption_never_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that ends at the deadline gives its result or BadImage, and no later interruption."""
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.02)
    time.sleep(1.1)
    outcomes: list[str] = []

    def work(seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return "done"

    def many() -> None:
        try:
            for i in range(40):
                try:
                    outcomes.append(limits.run_with_time_limit(lambda: work(0.02 + 0.0003 * (i % 20))))  # noqa: B023
                except BadImage:
                    outcomes.append("late")
                sum(range(20_000))
        except BaseException as error:
            outcomes.append(repr(error))

    threads = [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {"done", "late"} and len(outcomes) == 120
    assert not limits._deadlines


# Memory


def test_bounds_fit_the_machine() -> None:
    gib = 2**30
    assert limits.size_bounds(64 * gib, 4) == (120_000_000, gib)
    assert limits.size_bounds(None, 16) == (120_000_000, gib)
    pixels, size = limits.size_bounds(16 * gib, 8)
    assert 25_000_000 < pixels < 120_000_000 and pixels * 20 * 8 <= 8 * gib and size * 4 * 8 <= 8 * gib
    assert limits.size_bounds(gib, 16) == (25_000_000, 2**28)
    assert limits.size_bounds(gib, 16, "300000000") == (300_000_000, 2_400_000_000)
    for wrong in ("many", "-1", "0", "1e9", "9" * 99, "٣"):
        with pytest.raises(UserError, match="PIXMIM_MAX_PIXELS="):
            limits.size_bounds(gib, 16, wrong)


def test_environment_variable_sets_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for pixels, works in ((599, False), (600, True)):
            monkeypatch.setenv("PIXMIM_MAX_PIXELS", str(pixels))
            limits._machine_bounds.cache_clear()
            for data in (PNG, JPEG, encoded(Image.fromarray(PIXELS), "TIFF")):
                if works:
                    assert decode(data).shape == (20, 30, 3)
                else:
                    with pytest.raises(BadImage, match=r"30x20 pixels .* the 599 allowed.*PIXMIM_MAX_PIXELS"):
                        decode(data)
    finally:
        monkeypatch.delenv("PIXMIM_MAX_PIXELS")
        limits._machine_bounds.cache_clear()


_IN_LITTLE_MEMORY = """
import resource, sys
from pixmim.data.decode import limits
from pixmim.data.decode.image import decode
from pixmim.data.dataset import ImageSpec
for name in sys.argv[1:]:
    data, form = open(name, "rb").read(), ImageSpec(3, "uint16" if "deep" in name else "uint8")
    decode(open(sys.argv[1] + ".small", "rb").read(), form)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    rest = 2**22  # chunks that the allocator cannot reuse, whose number depends on what was imported
    resource.setrlimit(resource.RLIMIT_AS, (used + 1500 * 1000 * limits._PIXEL_BYTES + rest, -1))
    assert decode(data, form).shape == (1000, 1500, 3), name
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_per_pixel_of_every_format(tmp_path: Path) -> None:
    grey = Image.fromarray(np.broadcast_to(np.arange(1500) // 6, (1000, 1500)).astype(np.uint8))
    color = Image.merge("RGB", [grey] * 3)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    files = {
        "png": encoded(color, "PNG"),
        "rgba": encoded(color.convert("RGBA"), "PNG"),
        "palette": encoded(grey.convert("P"), "PNG", transparency=bytes(range(256))),
        "la": encoded(grey.convert("LA"), "PNG"),
        "webp": encoded(color.convert("RGBA"), "WEBP", quality=1, method=0),
        "cmyk": encoded(color.convert("CMYK"), "JPEG"),
        "progressive": encoded(color, "JPEG", progressive=True),
        "i16": encoded(deep, "PNG"),
        "deep": encoded(deep, "TIFF"),
        "gif": encoded(grey, "GIF"),
        "tiff": encoded(color, "TIFF", compression="tiff_deflate"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "png.small").write_bytes(PNG)
    done = subprocess.run(
        [sys.executable, "-c", _IN_LITTLE_MEMORY, *(str(tmp_path / name) for name in files)],
        capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
