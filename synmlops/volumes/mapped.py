"""Arrays in memory of their own, which the system has back as soon as they are dropped."""

import mmap
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LEAST_BYTES = 2**20
"""Smaller arrays are not worth a map."""


def mapped_zeros(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Give an array of zeros outside the heap of the C library.

    For what lives as long as a block. On the heap it would lie among arrays that live as long as a window:
    when they go, gaps stay into which nothing fits, and the process grows though no more of it is in use.

    Parameters
    ----------
    shape : sequence of int
    dtype : data type

    Returns
    -------
    array : numpy.ndarray
        C order, writable.

    Raises
    ------
    MemoryError
        As NumPy does.
    """
    dtype = np.dtype(dtype)
    n_bytes = prod(shape) * dtype.itemsize
    if n_bytes < LEAST_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return np.zeros(shape, dtype)
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {n_bytes} bytes are left for an array of {tuple(shape)}") from error
    return np.frombuffer(memory, dtype).reshape(shape)
