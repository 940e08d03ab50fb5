"""Read DICOM through pydicom.

- In uint8 and uint16, gray values are fractions of the file's first VOI window or VOI table; without one, of the full
  range of its stored bits. MONOCHROME1 is inverted, so that bright is large everywhere.
- In float32, gray values are measurements, such as Hounsfield units: rescaled, and not windowed.
- Color (RGB, YBR, palettes) becomes RGB. Frames are read as the pages of a TIFF are.
- Compressed files need a plugin of pydicom that decodes them. Deflated ones are refused: they unpack without a bound.
"""

import io
import struct
import warnings
from functools import cache
from typing import Any

import numpy as np

from pixmim.data.dataset import BadImage, DType, TiffPages
from pixmim.data.decode.headers import MAX_PAGES, read_jpeg_header
from pixmim.data.decode.limits import check_bytes, check_size, library_errors
from pixmim.transforms.crops import Array

_DEFLATED, _RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
_PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
_MAX_RLE_RATIO = 64  # two bytes become at most 128
_PALETTE = tuple(
    f"{prefix}{color}PaletteColorLookupTable{part}"
    for color in ("Red", "Green", "Blue")
    for prefix, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)
_TAGS = (
    *("SOPClassUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows"),
    *("Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", *_PALETTE),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
)  # nothing else is kept: neither names of patients nor millions of elements


def is_dicom(data: bytes) -> bool:
    """Return True if a file starts as DICOM does."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes, pages: TiffPages, dtype: DType) -> Array:
    """Read the first frame of a DICOM file, or all frames one after another, as (h w c). Raises BadImage.

    For a run in float32, measurements are kept.
    """
    pydicom = _load_pydicom()
    with library_errors(plugin=_PLUGINS):
        stream = io.BytesIO(data)
        stream.seek(132)
        meta = pydicom.filereader.read_dataset(stream, False, True, stop_when=lambda tag, *_: tag.group != 2)
        if meta.get("TransferSyntaxUID") == _DEFLATED:
            raise BadImage("a deflated DICOM: save it uncompressed, or with JPEG or RLE")
        file = pydicom.dcmread(io.BytesIO(data), specific_tags=list(_TAGS))
        frames = _check(file, pydicom, pages)
        values = pydicom.pixels.pixel_array(file, index=0 if frames == 1 else None)
        stack = values[None] if frames == 1 else values
        return np.concatenate([_to_pixels(file, frame, i, dtype) for i, frame in enumerate(stack)], axis=2)


@cache
def _load_pydicom() -> Any:
    try:
        import pydicom.pixels
    except ImportError:
        raise BadImage("DICOM needs pydicom: pip install 'pixmim[dicom]'") from None
    warnings.filterwarnings("ignore", module="pydicom")  # they quote values of the file
    return pydicom


def _check(file: Any, pydicom: Any, pages: TiffPages) -> int:
    """Check what the file claims before memory is allocated for it. Return the number of frames to read."""
    pixels = next((file[name] for name in _TAGS[-3:] if name in file), None)
    if pixels is None:
        raise BadImage(f"a DICOM without pixels ({file.get('SOPClassUID', pydicom.uid.UID('')).name or 'unknown'})")
    height, width, samples = int(file.Rows), int(file.Columns), int(file.SamplesPerPixel)
    total = int(file.get("NumberOfFrames") or 1)
    check_size(width, height)
    if total > MAX_PAGES:
        raise BadImage(f"a DICOM of {total:,} frames: more than {MAX_PAGES:,}")
    if samples not in (1, 3):
        raise BadImage(f"a DICOM of {samples} samples per pixel: save it as gray or RGB")
    stored = int(file.get("BitsStored") or 0)
    is_encoded = file.file_meta.TransferSyntaxUID.is_compressed
    if not is_encoded and stored and int(file.get("HighBit") or stored - 1) != stored - 1:
        raise BadImage(f"a DICOM whose {stored} bits end at bit {file.HighBit}: save it with them at the lowest bits")
    count = total if pages == "channels" else 1
    check_bytes(width * height * 8 * count)  # gray is computed in float64
    if is_encoded:
        frames = pydicom.encaps.generate_frames(pixels.value, number_of_frames=total)
        for _, frame in zip(range(count), frames, strict=False):
            _check_frame(frame, file.file_meta.TransferSyntaxUID, (width, height, samples))
    return count


def _check_frame(frame: bytes, syntax: str, expected: tuple[int, int, int]) -> None:
    """Refuse a compressed frame whose own header claims another size than the file's tags."""
    if syntax == _RLE:
        check_bytes(_MAX_RLE_RATIO * len(frame) // 4)  # a file takes up to four times the bound in memory
        return
    if frame[:2] == b"\xff\xd8":
        found = read_jpeg_header(frame)[:3]
    elif frame[:4] == b"\xff\x4f\xff\x51" and len(frame) > 42:
        right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
        found = right - left, bottom - top, int.from_bytes(frame[40:42], "big")
    else:
        raise BadImage("a DICOM whose pixels are not JPEG, JPEG-LS, JPEG 2000 or RLE: save it uncompressed")
    if found != expected:
        raise BadImage("a DICOM of {}x{} pixels, {} samples, with a frame of {}x{}, {}".format(*expected, *found))


def _to_pixels(file: Any, values: Array, index: int, dtype: DType) -> Array:
    """Convert the stored values of one frame (h w), or (h w 3), to pixels (h w c)."""
    kind = file.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        return _load_pydicom().pixels.apply_color_lut(values, file)
    bits, white = int(file.get("BitsStored", 0)), float(np.iinfo(np.uint16).max)
    if values.ndim == 3:
        return values if bits in (8, 16) else np.rint(values * (white / (2**bits - 1))).astype(np.uint16)
    values = values[..., None]
    rescale, voi = (_frame_item(file, index, f"{name}Sequence") for name in ("PixelValueTransformation", "FrameVOILUT"))
    is_integer, inverted = values.dtype.kind in "ui", kind == "MONOCHROME1"
    low, high = (0.0, 2.0**bits - 1) if not file.get("PixelRepresentation") else (-(2.0**bits) / 2, 2.0**bits / 2 - 1)
    center, width = (_first(voi.get(f"Window{name}")) for name in ("Center", "Width"))
    slope, intercept = (_first(rescale.get(f"Rescale{name}")) for name in ("Slope", "Intercept"))
    windowed = bool(voi.get("VOILUTSequence")) or not (center is None or width is None)
    if table := file.get("ModalityLUTSequence"):
        values, low, high = _apply_table(values, table[0])
    elif not (slope is None and intercept is None):
        slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
        values = values * slope + intercept
        low, high = sorted((low * slope + intercept, high * slope + intercept))
    elif values.dtype == np.uint8 and bits == 8 and not windowed and dtype != "float32":
        return ~values if inverted else values
    if dtype == "float32" or not is_integer:
        return (low + high - values if inverted else values).astype(np.float32)
    if table := voi.get("VOILUTSequence"):
        values, low, high = _apply_table(values, table[0])
    elif center is not None and width is not None:
        values, low, high = _apply_window(values, center, width, voi.get("VOILUTFunction")), 0.0, 1.0
    fraction = np.clip((values - low) / max(high - low, 1e-300), 0, 1)
    return np.rint((1 - fraction if inverted else fraction) * white).astype(np.uint16)


def _frame_item(file: Any, index: int, name: str) -> Any:
    """Return the part of the file that holds a frame's rescaling or window: in enhanced files, a functional group."""
    per_frame = file.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*per_frame[index : index + 1], *(file.get("SharedFunctionalGroupsSequence") or [])[:1]):
        if group.get(name):
            return getattr(group, name)[0]
    return file


def _apply_window(values: Array, center: float, width: float, function: str | None) -> Array:
    """Return values as fractions of a window (PS3.3 C.11.2.1.2): below 0 and above 1 outside it."""
    exact = function in ("LINEAR_EXACT", "SIGMOID")
    if not width >= (1e-9 if exact else 1):
        raise BadImage(f"a DICOM with a window of width {width:g}")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -500, 500)))
    if exact:
        return (values - center) / width + 0.5
    return (values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5


def _apply_table(values: Array, item: Any) -> tuple[Array, float, float]:
    """Return values looked up in a table, and the range of its entries."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data, np.int64)
    last = min(count or 2**16, len(table)) - 1
    return table[np.clip(values.astype(np.int64) - first, 0, last)], 0.0, 2.0**bits - 1


def _first(value: Any) -> float | None:
    """Return the number in a tag, or the first of several; None if it is missing or empty."""
    values = [value] if value is None or isinstance(value, str | float | int) else [*value, None]
    return None if values[0] in (None, "") else float(values[0])
