"""DICOM files made to exhaust memory or time cost one line each, before anything large is allocated."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="DICOM needs pydicom: pip install 'pixmim[dicom]'")

from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless  # noqa: E402

from helpers.dicom import VALUES, compressed, dataset, encoded, item  # noqa: E402
from helpers.images import SMOOTH  # noqa: E402
from pixmim.data.dataset import BadImage, ImageSpec  # noqa: E402
from pixmim.data.decode import limits  # noqa: E402
from pixmim.data.decode.image import decode, read  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def deflated() -> bytes:
    """Return 100 MB of zeros as an element, deflated."""
    file = dataset(SMOOTH)
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    start = encoded(dataset(SMOOTH)).index(b"\x08\x00\x16\x00")
    meta = encoded(file)[:start]
    packer = zlib.compressobj(9, wbits=-15)
    element = b"\xe1\x7f\x10\x00OB\0\0" + struct.pack("<I", 10**8)
    return meta + packer.compress(element + bytes(10**8)) + packer.flush()


def claiming(**tags: object) -> bytes:
    return encoded(dataset(SMOOTH, **tags))


def jpeg(size: int, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (size, size)).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (deflated, "deflated"),
        (lambda: claiming(Rows=60000, Columns=60000), "60000x60000"),
        (lambda: claiming(NumberOfFrames=10**9), "1,000,000,000 frames"),
        (lambda: claiming(SamplesPerPixel=4), "4 samples"),
        (lambda: claiming(Rows=0), "empty"),
        (lambda: claiming(PixelData=b"\0" * 10), "."),
        (lambda: compressed(dataset(SMOOTH), JPEGBaseline8Bit, [jpeg(4000, "JPEG")]), "frame of 4000x4000"),
        (
            lambda: compressed(dataset(SMOOTH), JPEG2000Lossless, [jpeg(4000, "JPEG2000", no_jp2=True)]),
            "frame of 4000x4000",
        ),
        (lambda: compressed(dataset(SMOOTH), JPEG2000Lossless, [b"%!PS" + bytes(100)]), "not JPEG"),
        (lambda: encoded(dataset(SMOOTH))[:300], "."),
        (lambda: claiming(SharedFunctionalGroupsSequence=item()), None),
    ],
)
def test_what_a_file_claims_is_checked_before_it_is_allocated(data: object, reason: str | None) -> None:
    content = data()  # type: ignore[operator]
    read(encoded(dataset(SMOOTH)))  # imports pydicom
    tracemalloc.start()
    try:
        if reason is None:
            assert np.array_equal(read(content)[..., 0], SMOOTH)
        else:
            with pytest.raises(BadImage, match=reason):
                read(content, ImageSpec(dtype="uint16", tiff_pages="channels"))
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + 2**21
    finally:
        tracemalloc.stop()


def test_runs_of_a_compressed_frame_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "max_bytes", lambda: 2**20)
    bomb = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2**19  # 64 MiB of zeros
    with pytest.raises(BadImage, match="GiB"):
        read(compressed(dataset(SMOOTH), RLELossless, [bomb]))


def test_more_elements_than_are_needed_are_not_kept(tmp_path: Path) -> None:
    private = b"".join(struct.pack("<HH2sH", 0x0009, 0x1000 + i % 0xEFF, b"LO", 0) for i in range(50_000))
    data = encoded(dataset(VALUES, 12))
    start = data.index(b"\x28\x00\x02\x00")
    tracemalloc.start()
    decode(data[:start] + private + data[start:], ImageSpec(1, "uint16"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(private)


@pytest.mark.parametrize("seed", range(13))
def test_damage_gives_an_image_or_one_line(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(dataset(VALUES, 12, WindowCenter=40, WindowWidth=400)))
    for position in rng.integers(0, len(data) if seed % 2 else 800, 1 + seed):
        data[position] = rng.integers(256)
    try:
        read(bytes(data), ImageSpec(dtype="uint16", tiff_pages="channels"))
    except BadImage as error:
        assert "\n" not in str(error)
