"""A volume seen at another voxel size, read and resampled region by region."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class _Image(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Resampled:
    """A z, y, x image of integers at voxels `factor_zyx` times as large.

    Larger voxels are the mean of the tissue that they cover, smaller ones are interpolated linearly between
    the middles of the old. Any region comes out as it would of the whole; its grid is `Grid.pooled`.

    Parameters
    ----------
    image : array-like
    factor_zyx : sequence of float

    Examples
    --------
    >>> image = np.array([[[0, 10, 20, 30]]], np.uint8)
    >>> Resampled(image, (1, 1, 2))[:, :, :].tolist(), Resampled(image, (1, 1, 0.5))[:, :, 2:5].tolist()
    ([[[5, 25]]], [[[8, 12, 18]]])
    """

    def __init__(self, image: _Image, factor_zyx: Sequence[float]) -> None:
        self._image, self._factors = image, tuple(factor_zyx)
        self.dtype = image.dtype
        self.shape = tuple(
            max(1, math.floor(n / factor + 1e-6)) for n, factor in zip(image.shape, factor_zyx, strict=True)
        )

    def __getitem__(self, region: tuple[slice, ...]) -> NDArray[Any]:
        """Read a region: slices with step 1, one per axis."""
        parts = [
            _weights(range(*span.indices(n)), factor, size)
            for span, n, factor, size in zip(
                region, self.shape, self._factors, self._image.shape, strict=True
            )
        ]
        voxels = np.asarray(self._image[tuple(slice(low, low + w.shape[1]) for low, w in parts)])
        if all(factor == 1 for factor in self._factors):
            return voxels
        values = voxels.astype(np.float32)
        for axis, (_, weights) in enumerate(parts):
            if self._factors[axis] != 1:
                values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
        return np.rint(values).astype(self.dtype)


def _weights(wanted: range, factor: float, size: int) -> tuple[int, NDArray[np.float32]]:
    """Give the first old voxel that is needed along an axis, and each old one's share in each new one."""
    at = np.array(wanted)[:, None]
    if factor >= 1:
        low = math.floor(wanted.start * factor)
        old = np.arange(low, min(size, math.ceil(wanted.stop * factor - 1e-6)))
        share = np.minimum(old + 1, (at + 1) * factor) - np.maximum(old, at * factor)
    else:
        middle = np.clip((at + 0.5) * factor - 0.5, 0, size - 1)
        low = math.floor(middle[0, 0])
        old = np.arange(low, min(size, math.floor(middle[-1, 0]) + 2))
        share = 1 - np.abs(old - middle)
    share = np.maximum(share, 0)
    return low, (share / share.sum(axis=1, keepdims=True)).astype(np.float32)
