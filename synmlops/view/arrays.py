"""A volume in neuroglancer's axes, x y z, read by region from several threads."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synmlops.volumes.chunk_headers import is_chunked
from synmlops.volumes.store import Volume

Side = Literal["pre", "post"]

_PARITY = {"pre": 1, "post": 0}


class ViewedArray:
    """A volume as neuroglancer wants it: axes x, y, z (or x, y, z, c), no more read than is asked for.

    Parameters
    ----------
    volume : Volume
        z, y, x, or c, z, y, x; open for as long as this is used.
    ids : bool
        Whether the voxels are ids: a type that the viewer lacks becomes a wide enough one, which for ids is
        uint64 and for intensities float32.
    side : "pre" or "post", optional
        Of instances in the pairs convention: the other side reads as 0.
    lock : context manager, optional
        Shared by all arrays over one volume; by default its own.

    Examples
    --------
    >>> class Pairs:
    ...     name, shape, dtype = "pairs.h5", (1, 2, 4), np.dtype(np.uint8)
    ...     def __getitem__(self, region):
    ...         return np.arange(8, dtype=np.uint8).reshape(self.shape)[region]
    >>> array = ViewedArray(Pairs(), ids=True, side="post")
    >>> array.shape, array[1:3, 1:2, 0:1].ravel().tolist()
    ((4, 2, 1), [0, 6])
    """

    def __init__(
        self,
        volume: Volume,
        *,
        ids: bool,
        side: Side | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._volume, self._side, self.ids = volume, side, ids
        self._lock = lock or _lock_of(volume)
        self.dtype = _viewable(volume.dtype, ids=ids)
        self.shape = tuple(reversed(volume.shape))
        self.ndim = len(self.shape)

    def __getitem__(self, region: Sequence[slice]) -> NDArray[Any]:
        """Read a region: slices with step 1, one per axis, x first."""
        return self.read(tuple(reversed(region))).T

    def read(self, region: Sequence[slice]) -> NDArray[Any]:
        """Read a region given, and returned, in the volume's own axes."""
        bounds = (s.indices(n) for s, n in zip(region, self._volume.shape, strict=True))
        plain = tuple(slice(int(start), int(stop)) for start, stop, _ in bounds)
        with self._lock:
            voxels = self._volume[plain]
        if self._side is not None:
            voxels = np.where(voxels % 2 == _PARITY[self._side], voxels, 0)
        return voxels.astype(self.dtype, copy=False)


def sides_of(volume: Volume) -> dict[Side, ViewedArray]:
    """Give the two sides of instances in the pairs convention, each as an array of its own."""
    lock = _lock_of(volume)
    sides: tuple[Side, ...] = ("pre", "post")
    return {side: ViewedArray(volume, ids=True, side=side, lock=lock) for side in sides}


def _lock_of(volume: Volume) -> AbstractContextManager[Any]:
    """HDF5 and image files have one position to read from; chunked stores are read side by side."""
    return nullcontext() if is_chunked(volume.name.partition("::")[0]) else Lock()


def _viewable(dtype: np.dtype[Any], *, ids: bool) -> np.dtype[Any]:
    if ids:
        return dtype if dtype.kind == "u" else np.dtype(np.uint64)
    fits = dtype.kind in "ui" and dtype.itemsize <= 4
    return dtype if fits else np.dtype(np.float32)
