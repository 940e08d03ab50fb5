"""Values of DICOM files, compared with pydicom's own functions and with formulas."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="DICOM needs pydicom: pip install 'pixmim[dicom]'")

from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, convert_color_space  # noqa: E402
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, RLELossless  # noqa: E402

from helpers.dicom import VALUES, compressed, dataset, encoded, item  # noqa: E402
from helpers.images import PIXELS, SMOOTH  # noqa: E402
from pixmim.data import open_dataset  # noqa: E402
from pixmim.data.dataset import BadImage, ImageSpec  # noqa: E402
from pixmim.data.decode.image import decode, read  # noqa: E402
from pixmim.data.statistics import choose_image_spec, count_formats  # noqa: E402
from pixmim.transforms.crops import Array  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

GRAY16, FLOAT = ImageSpec(1, "uint16"), ImageSpec(1, "float32")
SIGNED = VALUES.astype(np.int16) - 1000
CT = {"RescaleSlope": 2, "RescaleIntercept": -1024}
LIMITS = {12: (0, 4095), 16: (-32768, 32767)}


def uint16(fraction: Array) -> Array:
    return np.rint(np.clip(fraction, 0, 1) * 65535).astype(np.uint16)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("rescale", [{}, CT])
@pytest.mark.parametrize(("values", "bits"), [(VALUES, 12), (SIGNED, 16)])
def test_gray_is_the_fraction_of_its_window(
    values: Array, bits: int, rescale: dict[str, Any], function: str | None
) -> None:
    window = {"WindowCenter": [500, 90], "WindowWidth": [800, 30], "VOILUTFunction": function}
    file = dataset(values, bits, **rescale, **{name: value for name, value in window.items() if value})
    low, high = (limit * 2 - 1024 if rescale else limit for limit in LIMITS[bits])
    expected = (apply_windowing(apply_modality_lut(values, file), file) - low) / (high - low)
    pixels = decode(encoded(file), GRAY16)[..., 0]
    assert np.abs(pixels.astype(int) - uint16(expected).astype(int)).max() <= 1
    assert 0 < len(np.unique(pixels)) <= len(np.unique(values))
    file.PhotometricInterpretation = "MONOCHROME1"
    assert np.abs(decode(encoded(file), GRAY16)[..., 0].astype(int) - (65535 - pixels.astype(int))).max() <= 1


def test_gray_without_a_window_is_the_fraction_of_its_stored_bits() -> None:
    assert np.array_equal(decode(encoded(dataset(VALUES, 12)), GRAY16)[..., 0], uint16(VALUES / 4095))
    assert np.array_equal(decode(encoded(dataset(SIGNED)), GRAY16)[..., 0], uint16((SIGNED + 32768.0) / 65535))
    assert np.array_equal(decode(encoded(dataset(VALUES, 12, **CT)), GRAY16)[..., 0], uint16(VALUES / 4095))
    byte = read(encoded(dataset(SMOOTH)))
    assert byte.dtype == np.uint8 and np.array_equal(byte[..., 0], SMOOTH)
    inverted = read(encoded(dataset(SMOOTH, PhotometricInterpretation="MONOCHROME1")))
    assert np.array_equal(inverted[..., 0], 255 - SMOOTH)


def test_float32_keeps_measurements_without_a_window() -> None:
    window = {"WindowCenter": 40, "WindowWidth": 400}
    pixels = decode(encoded(dataset(SIGNED, 16, **CT, **window)), FLOAT)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels[..., 0], SIGNED * 2.0 - 1024)
    negative = dataset(VALUES, 12, PhotometricInterpretation="MONOCHROME1", **CT)
    assert np.array_equal(decode(encoded(negative), FLOAT)[..., 0], (4095.0 - VALUES) * 2 - 1024)


def test_empty_and_missing_tags_change_nothing() -> None:
    """As anonymization leaves them: an empty slope counts as 1, and an empty window as missing."""
    for tags, expected in (
        ({"RescaleSlope": None, "RescaleIntercept": None}, VALUES),
        ({"RescaleSlope": None, "RescaleIntercept": -1000}, VALUES - 1000.0),
        ({"RescaleIntercept": -1000}, VALUES - 1000.0),
        ({"RescaleSlope": 3}, VALUES * 3.0),
    ):
        assert np.array_equal(decode(encoded(dataset(VALUES, 12, **tags)), FLOAT)[..., 0], expected)
        assert np.array_equal(decode(encoded(dataset(VALUES, 12, **tags)), GRAY16)[..., 0], uint16(VALUES / 4095))
    for tags in ({"WindowCenter": None}, {"WindowWidth": None}, {"WindowCenter": None, "WindowWidth": None}):
        file = dataset(VALUES, 12, **({"WindowCenter": 40, "WindowWidth": 400} | tags))
        assert np.array_equal(decode(encoded(file), GRAY16)[..., 0], uint16(VALUES / 4095))


def test_values_that_are_not_in_the_lowest_bits_are_refused() -> None:
    """pydicom would return the four lowest bits of each value, shifted, and noise above them."""
    with pytest.raises(BadImage, match="12 bits end at bit 15"):
        read(encoded(dataset(VALUES << 4, 12, HighBit=15)))
    byte = dataset(SMOOTH, HighBit=7)
    assert np.array_equal(read(encoded(byte))[..., 0], SMOOTH)


@pytest.mark.parametrize("depth", [8, 16])
def test_tables_replace_windows_and_rescaling(depth: int) -> None:
    entries = np.linspace(0, 2**depth - 1, 4096).astype(np.uint16)[::-1].copy()
    table = item(LUTDescriptor=[4096, 100, depth], LUTData=entries.tobytes())
    table[0]["LUTData"].VR = "OW"
    expected = entries[np.clip(VALUES.astype(int) - 100, 0, 4095)]
    file = dataset(VALUES, 12, VOILUTSequence=table)
    if depth == 16:
        assert np.array_equal(expected, apply_voi_lut(VALUES, file))  # for 8 bits it wraps around
    assert np.array_equal(decode(encoded(file), GRAY16)[..., 0], uint16(expected / (2.0**depth - 1)))
    modality = dataset(VALUES, 12, ModalityLUTSequence=table)
    assert np.array_equal(decode(encoded(modality), FLOAT)[..., 0], expected.astype(np.float32))


def test_color_becomes_rgb() -> None:
    assert np.array_equal(decode(encoded(dataset(PIXELS))), PIXELS)
    ybr = convert_color_space(PIXELS, "RGB", "YBR_FULL")
    file = dataset(ybr, PhotometricInterpretation="YBR_FULL")
    assert np.array_equal(decode(encoded(file)), convert_color_space(ybr, "YBR_FULL", "RGB"))
    assert np.abs(decode(encoded(file)).astype(int) - PIXELS).max() <= 2
    planar = dataset(PIXELS, PlanarConfiguration=1, PixelData=PIXELS.transpose(2, 0, 1).tobytes())
    assert np.array_equal(decode(encoded(planar)), PIXELS)


def test_palettes_become_rgb() -> None:
    colors = np.random.default_rng(1).integers(0, 65536, (3, 256), np.uint16)
    file = dataset(SMOOTH, PhotometricInterpretation="PALETTE COLOR")
    for name, entries in zip(("Red", "Green", "Blue"), colors, strict=True):
        setattr(file, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(file, f"{name}PaletteColorLookupTableData", entries.tobytes())
    assert np.array_equal(decode(encoded(file), ImageSpec(3, "uint16")), colors.T[SMOOTH])


def test_frames_are_read_as_pages_are() -> None:
    stack = np.concatenate([VALUES, VALUES[::-1], VALUES // 2])
    file = dataset(stack, 12, frames=3)
    assert np.array_equal(decode(encoded(file), GRAY16)[..., 0], uint16(VALUES / 4095))
    frames = decode(encoded(file), ImageSpec(3, "uint16", "channels"))
    assert np.array_equal(frames, uint16(np.stack([VALUES, VALUES[::-1], VALUES // 2], 2) / 4095))
    color = dataset(np.concatenate([PIXELS, PIXELS[::-1]]), frames=2)
    expected = np.concatenate([PIXELS, PIXELS[::-1]], axis=2)
    assert np.array_equal(decode(encoded(color), ImageSpec(6, "uint8", "channels")), expected)


def test_functional_groups_give_each_frame_its_rescaling_and_window() -> None:
    groups = [
        item(
            PixelValueTransformationSequence=item(RescaleSlope=slope, RescaleIntercept=-100),
            FrameVOILUTSequence=item(WindowCenter=slope * 1000, WindowWidth=500),
        )[0]
        for slope in (1, 3)
    ]
    file = dataset(np.concatenate([VALUES, VALUES]), 12, frames=2, PerFrameFunctionalGroupsSequence=groups)
    pixels = decode(encoded(file), ImageSpec(2, "float32", "channels"))
    assert np.array_equal(pixels, np.stack([VALUES - 100.0, VALUES * 3.0 - 100], 2))
    windowed = decode(encoded(file), ImageSpec(2, "uint16", "channels"))
    for i, slope in enumerate((1, 3)):
        expected = (VALUES * slope - 100.0 - (slope * 1000 - 0.5)) / 499 + 0.5
        assert np.array_equal(windowed[..., i], uint16(expected))
    del file.PerFrameFunctionalGroupsSequence
    file.SharedFunctionalGroupsSequence = groups[1:]
    assert np.array_equal(decode(encoded(file), FLOAT)[..., 0], VALUES * 3.0 - 100)


def test_compressed_frames() -> None:
    rle = dataset(VALUES, 12)
    rle.compress(RLELossless)
    assert np.array_equal(decode(encoded(rle), GRAY16)[..., 0], uint16(VALUES / 4095))
    j2k = io.BytesIO()
    Image.fromarray(PIXELS).save(j2k, "JPEG2000", no_jp2=True, irreversible=False)
    lossless = dataset(PIXELS, PhotometricInterpretation="YBR_RCT")
    assert np.array_equal(decode(compressed(lossless, JPEG2000Lossless, [j2k.getvalue()])), PIXELS)
    jpeg = io.BytesIO()
    Image.fromarray(SMOOTH).save(jpeg, "JPEG", quality=95)
    lossy = decode(compressed(dataset(SMOOTH), JPEGBaseline8Bit, [jpeg.getvalue()]), ImageSpec(1))
    assert np.array_equal(lossy[..., 0], np.asarray(Image.open(jpeg)))


def test_messages_name_what_to_do() -> None:
    header = bytes.fromhex("ffd8 ffc3 000b 08 0014 001e 01 01 11 00 ffda 0008 01 01 00 01 00 00")
    with pytest.raises(BadImage, match=r"JPEG Lossless.*pylibjpeg"):
        read(compressed(dataset(SMOOTH), JPEGLosslessSV1, [header + bytes(50)]))
    report = dataset(SMOOTH, SOPClassUID=pydicom.uid.BasicTextSRStorage)
    del report.PixelData
    with pytest.raises(BadImage, match=r"without pixels .Basic Text SR"):
        read(encoded(report))
    with pytest.raises(BadImage, match="window of width 0"):
        read(encoded(dataset(VALUES, 12, WindowCenter=3, WindowWidth=0)))


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "JPEG2000.dcm"])
def test_files_of_scanners_that_pydicom_comes_with(name: str) -> None:
    file = pydicom.dcmread(path := pydicom.data.get_testdata_file(name, download=False))  # type: ignore[arg-type]
    data = Path(str(path)).read_bytes()
    assert np.array_equal(decode(data, FLOAT)[..., 0], apply_modality_lut(file.pixel_array, file).astype(np.float32))
    low, high = (0, 2**file.BitsStored - 1) if not file.PixelRepresentation else (-(2**15), 2**15 - 1)
    low, high = (float(apply_modality_lut(np.asarray([limit]), file)[0]) for limit in (low, high))
    expected = (apply_voi_lut(apply_modality_lut(file.pixel_array, file), file) - low) / (high - low)
    assert np.abs(decode(data, GRAY16)[..., 0] - 65535.0 * np.clip(expected, 0, 1)).max() <= 1


def test_a_folder_of_dicom_is_found_and_its_format_measured(tmp_path: Path) -> None:
    for number, kind in enumerate(("dcm", "DCM", "dcm")):
        (tmp_path / f"{number}.{kind}").write_bytes(encoded(dataset(VALUES, 12)))
    images = open_dataset(str(tmp_path), GRAY16)
    assert len(images) == 3
    assert np.array_equal(images.read_array(1)[..., 0], uint16(VALUES / 4095))
    assert choose_image_spec(count_formats(images, [0, 1, 2])) == GRAY16
