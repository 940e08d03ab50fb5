"""Small DICOM files, written with pydicom."""

import io
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from pixmim.transforms.crops import Array


def dataset(values: Array, bits: int = 0, frames: int = 1, **tags: Any) -> Dataset:
    """Return a dataset of stored values: (h w), (h w 3), or several frames of these, flat in the first dimension."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = CTImageStorage
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["pixmim"])
    color = values.ndim == 3
    file.Rows, file.Columns = values.shape[0] // frames, values.shape[1]
    file.SamplesPerPixel, file.PhotometricInterpretation = (3, "RGB") if color else (1, "MONOCHROME2")
    if color:
        file.PlanarConfiguration = 0
    if frames > 1:
        file.NumberOfFrames = frames
    file.BitsAllocated = 8 * values.dtype.itemsize
    file.BitsStored = bits or file.BitsAllocated
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    return file


def encoded(file: Dataset) -> bytes:
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, file, enforce_file_format=True)
    return stream.getvalue()


def compressed(file: Dataset, syntax: str, frames: list[bytes]) -> bytes:
    """Return the file with compressed frames."""
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate(frames)
    file["PixelData"].VR = "OB"
    return encoded(file)


def item(**tags: Any) -> list[Dataset]:
    """Return a sequence of one item."""
    one = Dataset()
    for name, value in tags.items():
        setattr(one, name, value)
    return [one]


VALUES = np.random.default_rng(0).integers(0, 4096, (20, 30), np.uint16)
"""Stored values of 12 bits."""
