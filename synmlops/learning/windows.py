"""Where a network's windows lie in a volume, and which of them has a say in which voxel.

A region is cut into equal cells, and each cell is the business of one window that sees a margin of tissue
about it. Cells are counted from where the region begins, whatever part of it is computed at a time, so the
parts of a volume fit together as if it had been computed whole. Windows that are blended (`Strides`) overlap
instead, and have a say in all that they see.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synmlops.learning_params import InferParams, WindowParams
from synmlops.volumes.prepared import Box

TIDY = 8
"""Cells wider than this are a multiple of it where that costs nothing, so that chunks are of even sizes."""
GROWTH = 1 / 8
"""By how much of its size a window may grow, so that one fewer covers the region."""


@dataclass(frozen=True)
class AxisWindows:
    """Windows along one axis.

    Attributes
    ----------
    extent : int
        Voxels of the volume along the axis.
    start, stop : int
        The region that is predicted.
    size : int
        Of a window. It is larger than `extent` if that is no size for the network.
    cell : int
        Voxels that a window answers for.
    fade : int
        A window's say falls from all to none from so many voxels within its cell to as many beyond it.
    """

    extent: int
    start: int
    stop: int
    size: int
    cell: int
    fade: int

    def __len__(self) -> int:
        return math.ceil((self.stop - self.start) / self.cell)

    def meeting(self, low: int, high: int) -> range:
        """Give the windows with a say in voxels `low` to before `high`, which lie in the region.

        Examples
        --------
        >>> AxisWindows(100, 0, 100, size=16, cell=12, fade=2).meeting(12, 24)
        range(0, 3)
        """
        first = (low - self.start - self.fade) // self.cell
        stop = math.ceil((high - self.start + self.fade) / self.cell)
        return range(max(0, first), min(len(self), stop))

    def first_voxel(self, window: int) -> int:
        """Give where a window begins: its cell in its middle, but never beyond the volume's ends."""
        centred = self.start + window * self.cell - (self.size - self.cell) // 2
        return max(0, min(centred, self.extent - self.size))

    def support(self, window: int) -> tuple[int, int]:
        """Give the first voxel in which a window has a say, and the one after the last."""
        begin = self.start + window * self.cell
        return max(self.start, begin - self.fade), min(self.stop, begin + self.cell + self.fade)

    def weights(self, window: int) -> NDArray[np.float32]:
        """Give a window's say in each voxel of its support; those of all windows add up to 1.

        Examples
        --------
        >>> windows = AxisWindows(8, 0, 8, size=6, cell=4, fade=1)
        >>> windows.weights(0).tolist(), windows.weights(1).tolist()
        ([1.0, 1.0, 1.0, 0.75, 0.25], [0.25, 0.75, 1.0, 1.0, 1.0])
        """
        low, high = self.support(window)
        at = np.arange(low, high) + 0.5 - self.start
        begin, end = window * self.cell, (window + 1) * self.cell
        say = np.ones(high - low)
        if self.fade and window > 0:
            say = np.minimum(say, (at - begin + self.fade) / (2 * self.fade))
        if self.fade and window < len(self) - 1:
            say = np.minimum(say, (end + self.fade - at) / (2 * self.fade))
        return say.astype(np.float32)


class Strides(AxisWindows):
    """Windows along one axis that overlap: one begins every `cell` voxels, the last one ends with the region.

    Source: PyTorch Connectomics v1, `VolumeDataset`.

    Examples
    --------
    >>> windows = Strides(20, 0, 18, size=8, cell=4, fade=0)
    >>> [windows.first_voxel(window) for window in range(len(windows))]
    [0, 4, 8, 10]
    >>> windows.meeting(8, 10), windows.meeting(0, 4)
    (range(1, 3), range(0, 1))
    """

    def __len__(self) -> int:
        return 1 + max(0, math.ceil((self.stop - self.start - self.size) / self.cell))

    def meeting(self, low: int, high: int) -> range:
        """Give the windows with a say in voxels `low` to before `high`, which lie in the region."""
        last = len(self) - 1
        first = min(last, max(0, (low - self.start - self.size) // self.cell + 1))
        stop = min(last, math.ceil((high - self.start) / self.cell))
        return range(first, stop + (self.first_voxel(last) < high))

    def first_voxel(self, window: int) -> int:
        """Give where a window begins; before the region if that is shorter than a window."""
        begin = min(self.start + window * self.cell, max(self.start, self.stop - self.size))
        return max(0, min(begin, self.extent - self.size))

    def support(self, window: int) -> tuple[int, int]:
        """Give the first voxel of the region that a window sees, and the one after the last."""
        first = self.first_voxel(window)
        return max(self.start, first), min(self.stop, first + self.size)


def blend_weights(size_zyx: tuple[int, int, int], kind: Literal["gaussian", "bump"]) -> NDArray[np.float32]:
    """Weigh the voxels of a window by how near they lie to its middle.

    Sources: PyTorch Connectomics v1, `data_blending.py`; the bump is that of Lee et al. 2017,
    arXiv:1706.00120.

    Parameters
    ----------
    size_zyx : tuple of int
    kind : {"gaussian", "bump"}
        `gaussian`: of the distance to the middle, with a deviation of a tenth of the window along each axis.
        `bump`: flat in the middle, and falls steeply near the faces.

    Returns
    -------
    weights : array of float32
        From 0.0001 up.

    Examples
    --------
    >>> (1000 * blend_weights((1, 1, 5), "bump")).astype(int).tolist()
    [[[0, 213, 1000, 213, 0]]]
    """
    if kind == "gaussian":
        z, y, x = np.ix_(*(np.linspace(-1, 1, n, dtype=np.float32) for n in size_zyx))
        distance = np.sqrt(z * z + y * y + x * x)
        weights: NDArray[np.float32] = np.exp(-(distance**2) / np.float32(2 * 0.2**2)) + np.float32(1e-4)
        return weights
    inner = (np.linspace(0, 1, n + 2, dtype=np.float32)[1:-1] for n in size_zyx)
    z, y, x = np.ix_(*((at * (1 - at)) ** np.float32(-1.5) for at in inner))
    steepness = -x - y - z
    weights = np.exp(steepness - steepness.max()) + np.float32(1e-4)
    return weights


def strides_over(
    region: Box, *, shape_zyx: tuple[int, ...], pool_zyx: tuple[int, ...], params: InferParams
) -> tuple[Strides, Strides, Strides]:
    """Lay overlapping windows over a region of a volume, along z, y and x.

    Parameters
    ----------
    region, shape_zyx, pool_zyx
        As in `windows_over`.
    params : InferParams
        `window_zyx`, and `stride_zyx` or else `overlap`.

    Examples
    --------
    >>> params = InferParams(window_zyx=(16, 256, 256), overlap=0.5, blend="gaussian")
    >>> box = Box((0, 0, 0), (32, 500, 1000))
    >>> axes = strides_over(box, shape_zyx=(32, 500, 1000), pool_zyx=(4, 8, 8), params=params)
    >>> [(len(axis), axis.cell) for axis in axes]
    [(3, 8), (3, 128), (7, 128)]
    """
    axes = []
    for axis, (start, stop, extent) in enumerate(
        zip(region.start_zyx, region.stop_zyx, shape_zyx, strict=True)
    ):
        size = _size(extent, params.window_zyx[axis], pool_zyx[axis])
        stride = round(size * (1 - params.overlap)) if params.stride_zyx is None else params.stride_zyx[axis]
        axes.append(Strides(extent, start, stop, size, max(1, min(stride, size)), fade=0))
    z, y, x = axes
    return z, y, x


def windows_over(
    region: Box, *, shape_zyx: tuple[int, ...], pool_zyx: tuple[int, ...], params: WindowParams
) -> tuple[AxisWindows, AxisWindows, AxisWindows]:
    """Lay windows over a region of a volume, along z, y and x.

    Each answers for a cell and sees at least `overlap / 2` of the asked window beyond it on every side. They
    spread evenly, and are up to an eighth larger than was asked where one fewer then does.

    Parameters
    ----------
    region : Box
        What is predicted; context is taken from the volume around it.
    shape_zyx : tuple of int
        Of the volume.
    pool_zyx : tuple of int
        Windows are multiples of it, or one voxel more where `params.window_zyx` is.
    params : WindowParams

    Examples
    --------
    >>> params = WindowParams(window_zyx=(16, 256, 256), overlap=0.25)
    >>> z, y, x = windows_over(
    ...     Box((0, 0, 0), (32, 500, 10_000)), shape_zyx=(32, 500, 10_000), pool_zyx=(4, 8, 8), params=params
    ... )
    >>> [(len(axis), axis.cell, axis.size) for axis in (z, y, x)]
    [(3, 12, 16), (2, 256, 288), (53, 192, 256)]
    """
    z, y, x = (
        _along(start, stop, extent=n, window=window, pool=pool, params=params)
        for start, stop, n, window, pool in zip(
            region.start_zyx, region.stop_zyx, shape_zyx, params.window_zyx, pool_zyx, strict=True
        )
    )
    return z, y, x


def _along(
    start: int, stop: int, *, extent: int, window: int, pool: int, params: WindowParams
) -> AxisWindows:
    more = int(window > pool > 1 and window % pool == 1)

    def fitting(voxels: int) -> int:
        return math.ceil((voxels - more) / pool) * pool + more

    def even(least: int, most: int) -> int:
        tidy = math.ceil(least / TIDY) * TIDY if least > TIDY else least
        return max(least, min(tidy, most))

    span, asked = stop - start, min(window, fitting(extent))
    margin = min(round(asked * params.overlap / 2), (asked - 1) // 2)
    greatest = asked - 2 * margin
    n = 1 if asked >= extent else math.ceil(span / greatest)
    size, cell = asked, even(math.ceil(span / n), greatest)  # what is left over widens the margins
    if n > 1:
        fewer = math.ceil(span / (n - 1))
        margins = (2 if n > 3 or span < extent else n - 2) * margin  # none beyond the volume's own ends
        larger = max(asked, min(fitting(fewer + margins), fitting(extent)))
        if larger <= asked * (1 + GROWTH) and (n - 1) * larger <= n * asked:
            size, cell = larger, even(fewer, larger - margins)
    fade = min(round(asked * params.overlap / 2 * params.fade), cell // 2)
    return AxisWindows(extent, start, stop, size, cell, fade)


def _size(extent: int, window: int, pool: int) -> int:
    """Give the size of a window, which need not be larger than the volume and its padding."""
    return min(window, math.ceil(extent / pool) * pool)
