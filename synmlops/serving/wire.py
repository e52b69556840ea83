"""Volumes as bytes: what a request and an answer of the served model carry is a `.npy` file.

Such a file says its own shape and type, NumPy reads and writes it, and so do other languages. It comes from
anywhere, so it is read by hand: only unsigned 8 and 16 bit, never a pickle, and no memory is set aside that
the file does not fill.
"""

import io
import math
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))


def to_npy(array: NDArray[Any]) -> bytes:
    """Write an array as the bytes of a `.npy` file.

    Raises
    ------
    ValueError
        If it is neither uint8 nor uint16.
    """
    if array.dtype not in DTYPES:
        raise ValueError(f"the array is {array.dtype}; only uint8 and uint16 travel")
    file = io.BytesIO()
    npy.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def from_npy(raw: bytes, *, ndim: int) -> NDArray[Any]:
    """Read the bytes of a `.npy` file as an array of its own memory.

    Raises
    ------
    ValueError
        If it is no `.npy` file, is cut short or too long, is not uint8 or uint16, has another number of
        axes, or an axis without voxels.

    Examples
    --------
    >>> from_npy(to_npy(np.zeros((2, 3, 4), np.uint8)), ndim=3).shape
    (2, 3, 4)
    >>> from_npy(to_npy(np.zeros((2, 3), np.uint8)), ndim=3)
    Traceback (most recent call last):
        ...
    ValueError: the array has 2 axes (2 x 3); 3 are wanted
    """
    file = io.BytesIO(raw)
    shape, is_fortran, dtype = _read_header(file)
    if dtype.newbyteorder("=") not in DTYPES:
        raise ValueError(f"the array is {dtype}; send uint8 or uint16")
    if len(shape) != ndim or min(shape, default=0) < 1:
        size = " x ".join(map(str, shape)) or "a single value"
        wrong = "has no voxels" if len(shape) == ndim else f"has {len(shape)} axes"
        raise ValueError(f"the array {wrong} ({size}); {ndim} are wanted")
    start, wanted = file.tell(), math.prod(shape) * dtype.itemsize
    if len(raw) - start != wanted:
        raise ValueError(f"the array should fill {wanted} bytes and fills {len(raw) - start}; send it again")
    flat = np.frombuffer(raw, dtype, offset=start)
    return np.array(flat.reshape(shape, order="F" if is_fortran else "C"), dtype.newbyteorder("="), order="C")


def _read_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        version = npy.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version} of the format is not read here")
        shape, is_fortran, dtype = readers[version](file)
    except ValueError as error:
        raise ValueError(f"not the bytes of a .npy file ({error}); write it with numpy.save") from error
    return shape, is_fortran, dtype
