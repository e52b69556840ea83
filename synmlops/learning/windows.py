"""Where a network's windows lie in a volume, and which of them has a say in which voxel.

A region is cut into equal cells, and each cell is the business of one window that sees a margin of tissue
about it. Cells are counted from where the region begins, whatever part of it is computed at a time, so the
parts of a volume fit together as if it had been computed whole.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synmlops.learning_params import WindowParams
from synmlops.volumes.prepared import Box

TIDY = 8
"""Cells wider than this are a multiple of it where that costs no window, so that chunks are of even sizes."""


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


def windows_over(
    region: Box, *, shape_zyx: tuple[int, ...], pool_zyx: tuple[int, ...], params: WindowParams
) -> tuple[AxisWindows, AxisWindows, AxisWindows]:
    """Lay windows over a region of a volume, along z, y and x.

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
    [(3, 12, 16), (3, 168, 256), (53, 192, 256)]
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
    size = min(window, math.ceil((extent - more) / pool) * pool + more)
    greatest = max(1, size - 2 * round(size * params.overlap / 2))
    if size >= extent:  # one window sees all there is
        greatest = max(greatest, stop - start)
    n = math.ceil((stop - start) / greatest)
    cell = math.ceil((stop - start) / n)  # windows spread evenly: what is left over widens the margins
    if cell > TIDY:
        cell = min(greatest, math.ceil(cell / TIDY) * TIDY)
    fade = min(round(size * params.overlap / 2 * params.fade), cell // 2)
    return AxisWindows(extent, start, stop, size, cell, fade)
