"""NumPy's .npy: an array (h w), (h w c) or (c h w) of plain numbers.

Of three dimensions, the shorter one of the first and the last holds the channels; the last, if they are equal.
"""

import io
import math

import numpy as np
from numpy.lib import format as npy

from pixmim.data.dataset import BadImage
from pixmim.data.decode.limits import check_bytes, check_size
from pixmim.transforms.crops import Array
from pixmim.utils.errors import first_line

MAGIC = npy.MAGIC_PREFIX
_MAX_SIDE = 2**40


def read_npy(data: bytes) -> Array:
    """The array as (h w c), a view of `data` wherever that goes. Raises BadImage.

    Nothing is unpickled, and no memory is taken for what the header claims.
    """
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, columns_first, kind = header(stream)
    except Exception as error:  # a header is a Python literal: damage shows in many ways
        raise BadImage(f"a damaged .npy: {first_line(error)[:200]}") from None
    if kind.kind not in "buif":
        raise BadImage(f"an array of {kind}, and not of numbers")
    if len(shape) not in (2, 3):
        raise BadImage(f"an array of {len(shape)} dimensions, and not (h w), (h w c) or (c h w)")
    if max(shape) > _MAX_SIDE:
        raise BadImage("an array with a dimension of more than 2^40")
    first = len(shape) == 3 and shape[0] < shape[2]
    height, width = shape[1:] if first else shape[:2]
    check_size(width, height)
    if min(shape) < 1:
        raise BadImage("an array without channels")
    check_bytes(math.prod(shape) * kind.itemsize)
    if len(data) - stream.tell() < math.prod(shape) * kind.itemsize:
        raise BadImage("a .npy that is cut off")
    values = np.frombuffer(data, kind, math.prod(shape), stream.tell())
    values = values.reshape(shape, order="F" if columns_first else "C").astype(kind.newbyteorder("="), copy=False)
    if values.ndim == 2:
        return values[..., None]
    return values.transpose(1, 2, 0) if first else values
