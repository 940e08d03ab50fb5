"""Fuzz tests of the image readers: every file gives a valid array or BadImage in bounded time."""

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.hostile_files import plain, tiff
from helpers.images import PIXELS, SMOOTH, encoded
from pixmim.data import open_dataset
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode import headers, limits
from pixmim.data.decode.image import decode, open_image, read_numbers
from pixmim.utils.errors import UserError

pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

FORMS = [
    ImageSpec(), ImageSpec(1), ImageSpec(3, "uint16"), ImageSpec(1, "float32"), ImageSpec(13, "uint16"),
    ImageSpec(2, "uint8", "channels"),
    ImageSpec(3, "float32", "channels"),
]  # fmt: skip
bounded = settings(max_examples=20, phases=[Phase.generate])


@pytest.fixture(autouse=True, scope="module")
def _short_time_limit() -> Iterator[None]:
    default, limits.MAX_SECONDS = limits.MAX_SECONDS, 2.0
    yield
    limits.MAX_SECONDS = default


def try_all(data: bytes, forms: list[ImageSpec] = FORMS) -> None:
    for form in forms:
        try:
            pixels = decode(data, form)
        except BadImage as error:
            assert "s to decode" not in str(error) and len(str(error)) < 1000
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == form.channels and pixels.dtype == form.dtype
            assert pixels.flags.c_contiguous


def _samples() -> dict[str, bytes]:
    import tifffile

    color, grey = Image.fromarray(PIXELS), Image.fromarray(SMOOTH)
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = {
        "jpeg": encoded(color, "JPEG", exif=exif),
        "progressive": encoded(color, "JPEG", progressive=True),
        "cmyk": encoded(color.convert("CMYK"), "JPEG"),
        "png": encoded(color, "PNG", exif=exif),
        "palette": encoded(grey.convert("P"), "PNG", transparency=bytes(range(256))),
        "la": encoded(grey.convert("LA"), "PNG"),
        "i16": encoded(Image.fromarray(SMOOTH.astype(np.uint16) * 257), "PNG"),
        "webp": encoded(color, "WEBP"),
        "moving": encoded(color, "WEBP", save_all=True, append_images=[grey.convert("RGB")]),
        "gif": encoded(grey, "GIF", save_all=True, append_images=[Image.fromarray(SMOOTH[::-1].copy())]),
        "bmp": encoded(color, "BMP"),
        "ppm": encoded(color, "PPM"),
        "pfm": encoded(Image.fromarray(SMOOTH.astype(np.float32)), "PPM"),
        "tiff": encoded(color, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encoded(color, "TIFF", compression="jpeg"),
        "tiff-fax": encoded(grey.convert("1"), "TIFF", compression="group4"),
    }
    for compression in ("deflate", "lzw", "packbits", "zstd", "lzma", "jpeg", "lerc"):
        buffer = io.BytesIO()
        wide = PIXELS if compression == "jpeg" else np.dstack([PIXELS] * 4)[..., :5].astype(np.uint16)
        tifffile.imwrite(buffer, wide, compression=compression, tile=(16, 16), planarconfig="contig",
                         photometric="rgb" if wide.shape[2] == 3 else "minisblack")  # fmt: skip
        samples[f"tifffile-{compression}"] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    return samples | {"npy": buffer.getvalue()}


SAMPLES = _samples()


@pytest.mark.parametrize("kind", sorted(SAMPLES))
@bounded
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    later=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
    end=st.one_of(st.none(), st.floats(0, 1)),
    form=st.sampled_from(FORMS),
)
def test_changed_images(kind: str, changes: Any, later: Any, end: float | None, form: ImageSpec) -> None:
    data = bytearray(SAMPLES[kind])
    for at, value in [*changes, *((int(share * len(data)), value) for share, value in later)]:
        data[at % len(data)] = value
    hurt = bytes(data if end is None else data[: int(end * len(data))])
    try_all(hurt, [form])
    for call in (open_image, read_numbers):
        try:
            call(hurt)  # type: ignore[operator]
        except BadImage as error:
            assert "s to decode" not in str(error)


@pytest.mark.parametrize("kind", sorted(SAMPLES))
def test_unchanged_images_are_read(kind: str) -> None:
    """Without this, the other tests would prove little."""
    form = ImageSpec(5, "uint16") if kind.startswith("tifffile-") and kind[9:] != "jpeg" else ImageSpec()
    form = ImageSpec(1, "float32") if kind == "pfm" else form
    assert decode(SAMPLES[kind], form).shape[2] == form.channels


_small = st.integers(0, 40)
_any = st.one_of(_small, st.sampled_from([255, 2**15, 2**16 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
_codes = st.sampled_from([*sorted(headers.KEPT_TAGS), 330, 700, 34665, 270, 34412, 33628])
_kinds = st.sampled_from([1, 2, 3, 4, 16])


@bounded
@given(
    pages=st.lists(st.dictionaries(_codes, st.tuples(_kinds, st.lists(_any, min_size=1, max_size=5))), max_size=3),
    order=st.sampled_from("<>"),
    big=st.booleans(),
    loop=st.integers(-1, 2),
)
def test_tags_of_a_tiff(pages: list[dict[int, Any]], order: str, big: bool, loop: int) -> None:
    most = {1: 2**8, 2: 2**8, 3: 2**16, 4: 2**32, 16: 2**64}
    filled = [
        plain()
        | {code: (kind if big or kind != 16 else 4, [v % most[kind] for v in values])
           for code, (kind, values) in page.items()}
        for page in [*pages, {}]
    ]  # fmt: skip
    try_all(tiff(filled, order=order, big=big, loop=loop if loop < len(filled) else 0))


@bounded
@given(data=st.binary(max_size=200), magic=st.sampled_from(headers.TIFF_MAGIC))
def test_random_bytes_after_the_magic_of_a_tiff(data: bytes, magic: bytes) -> None:
    try_all(magic + data)
    assert headers.exif_orientation(magic + data) >= 0


_dimensions = st.lists(st.one_of(st.integers(-2, 60), st.integers(0, 10**30)), max_size=4)


@bounded
@given(
    shape=_dimensions,
    kind=st.sampled_from(
        ["<f4", ">u2", "|u1", "|b1", "<f8", "<f2", "|O", "<c8", "|S9", "<U9", "V4", "f4,f4", "<M8[s]"]
    ),
    columns=st.sampled_from(["True", "False", "None", "1"]),
    version=st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\7\0"]),
    content=st.binary(max_size=4000),
    header=st.one_of(st.none(), st.text(max_size=60), st.sampled_from(["(" * 9000, "-" * 9000 + "1", "9" * 9000])),
)
def test_headers_of_npy(
    shape: Any, kind: str, columns: str, version: bytes, content: bytes, header: str | None
) -> None:
    text = f"{{'descr': '{kind}', 'fortran_order': {columns}, 'shape': {tuple(shape)}, }}" if header is None else header
    encoded_text = text.encode("latin-1", "replace") + b"\n"
    length = len(encoded_text).to_bytes(2 if version == b"\1\0" else 4, "little")
    try_all(b"\x93NUMPY" + version + length + encoded_text + content, [ImageSpec(1, "float32"), ImageSpec()])


@bounded
@given(data=st.binary(max_size=300))
def test_lists_of_random_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "lists"
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(SAMPLES["jpeg"])
    Path(folder / "list.txt").write_bytes(data + b"\na.jpg\r\n\n")
    try:
        found = open_dataset(str(folder / "list.txt"))
    except UserError:
        return
    assert found.read_array(len(found) - 1).shape == (30, 20, 3)
    for index in range(min(len(found), 20)):
        assert isinstance(found.path_of(index), str)
        with suppress(BadImage):
            found.read_array(index)
