"""Balls and half-balls about points, painted block by block; of several at a voxel the nearest wins."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from synmlops.volumes.sections import Region
from synmlops.volumes.store import Grid, Volume

BLOCK_ZYX = (32, 512, 512)
"""Voxels painted at once: some 150 MB with what is needed beside them."""

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Balls:
    """Balls to paint, a row each. Rows of one `end` make a piece of the label, rows of one `site` a synapse.

    Attributes
    ----------
    end, site : (B,) array of int
        From 0. Voxels are counted for an end; voxels that several sites reach are contested.
    point_nm : (B, 3) array of float
        Where the end lies: of several ends that reach a voxel, the one whose point is nearest gets it.
    centre_nm : (B, 3) array of float
        Middle of the ball: the point itself, or that between the two points for half a ball.
    facing : (B, 3) array of float
        Half a ball holds what lies on this side of the plane through its centre; 0, 0, 0 for a whole one.
    neuron : (B,) array of uint64
        The ball is clipped to this neuron; 0 leaves it whole.
    """

    end: NDArray[np.int64]
    site: NDArray[np.int64]
    point_nm: NDArray[np.float64]
    centre_nm: NDArray[np.float64]
    facing: NDArray[np.float64]
    neuron: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.end)

    def where(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> "Balls":
        """Give some of the balls."""
        return Balls(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def and_(self, others: "Balls") -> "Balls":
        """Give these balls and then the others."""
        names = [field.name for field in fields(self)]
        return Balls(**{name: np.concatenate([getattr(self, name), getattr(others, name)]) for name in names})


@dataclass(frozen=True, eq=False)
class Painted:
    """A block of painted balls."""

    owner: NDArray[np.int32]  # row of the ends, from 1; 0 where no ball reaches
    ends: NDArray[np.int64]  # the end of each row
    contested: int  # voxels that balls of several sites reach


def voxels_of(points_nm: ArrayLike, grid: Grid) -> NDArray[np.int64]:
    """Give the voxel nearest to each point, wherever it lies.

    Examples
    --------
    >>> voxels_of([[40, 5, -3]], Grid((40.0, 4.0, 4.0)))
    array([[ 1,  1, -1]])
    """
    at = (np.asarray(points_nm, np.float64) - grid.offset_nm) / np.asarray(grid.voxel_nm)
    return np.asarray(np.rint(at).astype(np.int64))


def inside(index_zyx: NDArray[np.int64], shape: Shape) -> NDArray[np.bool_]:
    """Say which voxel indices lie in a volume.

    Examples
    --------
    >>> inside(np.array([[0, 0, 3], [0, 0, 4]]), (1, 1, 4))
    array([ True, False])
    """
    return np.asarray(((index_zyx >= 0) & (index_zyx < shape)).all(axis=-1))


def values_at(volume: Volume, index_zyx: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Read single voxels of a volume of any size, block by block.

    Parameters
    ----------
    volume : Volume
        Of whole numbers, none negative.
    index_zyx : (N, 3) array of int
        All inside.
    """
    values = np.zeros(len(index_zyx), np.uint64)
    if (whole := volume.memmap()) is not None:
        values[:] = whole[tuple(index_zyx.T)]
        return values
    for box, rows in _by_block(index_zyx, index_zyx + 1, volume.shape):
        start = [axis.start for axis in box]
        low, high = (f(index_zyx[rows], axis=0) for f in (np.min, np.max))
        near = tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True))
        assert (low >= start).all()
        values[rows] = volume[near][tuple((index_zyx[rows] - low).T)]
    return values


def blocks_of(
    balls: Balls, *, radius_nm: float, grid: Grid, shape: Shape
) -> Iterator[tuple[Region, NDArray[np.intp]]]:
    """Give the blocks that balls reach, in order, and the rows of the balls that reach each."""
    low, high = _reach(balls.centre_nm, radius_nm, grid)
    if not balls.facing.any():  # a whole ball always holds the voxel of its point
        at = voxels_of(balls.point_nm, grid)
        low, high = np.minimum(low, at), np.maximum(high, at + 1)
    yield from _by_block(low, high, shape)


def paint(
    balls: Balls, box: Region, *, radius_nm: float, grid: Grid, neurons: NDArray[np.integer] | None = None
) -> Painted:
    """Paint the balls that reach a box of the volume.

    Parameters
    ----------
    balls : Balls
    box : tuple of slice
        Of the volume, z y x; the result has its shape.
    radius_nm : float
        Inclusive.
    grid : Grid
        Of the volume.
    neurons : array of int, optional
        Neuron of each voxel of the box.

    Examples
    --------
    >>> point = np.array([[0.0, 0.0, 8.0]])
    >>> ball = Balls(np.array([0]), np.array([0]), point, point, np.zeros((1, 3)), np.zeros(1, np.uint64))
    >>> box = (slice(0, 1), slice(0, 1), slice(0, 6))
    >>> paint(ball, box, radius_nm=4, grid=Grid((40.0, 4.0, 4.0))).owner[0, 0].tolist()
    [0, 1, 1, 1, 0, 0]
    """
    ends, row = np.unique(balls.end, return_inverse=True)
    size = tuple(axis.stop - axis.start for axis in box)
    owner, contested = np.zeros(size, np.int32), np.zeros(size, bool)
    nearest = np.full(size, np.inf, np.float32)
    site_of = np.zeros(len(ends) + 1, np.int64)
    site_of[row + 1] = balls.site
    low, high = _reach(balls.centre_nm, radius_nm, grid)
    at = voxels_of(balls.point_nm, grid)
    for n in range(len(balls)):
        part = _within(low[n], high[n], box)
        whole = not balls.facing[n].any()
        if whole:
            part = _within(np.minimum(low[n], at[n]), np.maximum(high[n], at[n] + 1), box)
        if part is None:
            continue
        start = [here.start + axis.start for here, axis in zip(part, box, strict=True)]
        shape = tuple(here.stop - here.start for here in part)
        reached = _ball(balls, n, start, shape, radius_nm=radius_nm, grid=grid)
        own = tuple(at[n] - start)
        if whole and all(0 <= i < k for i, k in zip(own, shape, strict=True)):
            reached[own] = True
        if neurons is not None and balls.neuron[n]:
            reached &= neurons[part] == balls.neuron[n]
        distance = _squares(balls.point_nm[n], start, shape, grid)
        other = reached & (owner[part] > 0)
        if other.any():
            contested[part][other] |= site_of[owner[part][other]] != balls.site[n]
        won = reached & (distance < nearest[part])
        owner[part][won] = row[n] + 1
        nearest[part][won] = distance[won]
    return Painted(owner, ends, int(np.count_nonzero(contested)))


def measure(
    painted: Painted, start_zyx: Shape
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Give the voxels of each end in a block, and first and one past the last of each axis, in the volume.

    An end without voxels has a low and a high of 0.
    """
    voxels = np.bincount(painted.owner.ravel(), minlength=len(painted.ends) + 1)[1:].astype(np.int64)
    low, high = np.zeros((2, len(voxels), 3), np.int64)
    for n, found in enumerate(ndimage.find_objects(painted.owner, max_label=len(voxels))):
        if found is not None:
            low[n] = [axis.start + first for axis, first in zip(found, start_zyx, strict=True)]
            high[n] = [axis.stop + first for axis, first in zip(found, start_zyx, strict=True)]
    return voxels, low, high


def _ball(
    balls: Balls, n: int, start: list[int], shape: Shape, *, radius_nm: float, grid: Grid
) -> NDArray[np.bool_]:
    reached = _squares(balls.centre_nm[n], start, shape, grid) <= np.float32(radius_nm**2)
    if balls.facing[n].any():
        z, y, x = (
            step * side
            for step, side in zip(
                _steps(balls.centre_nm[n], start, shape, grid), balls.facing[n], strict=True
            )
        )
        reached &= z[:, None, None] + y[:, None] + x >= 0
    return np.asarray(reached)


def _squares(
    point_nm: NDArray[np.float64], start: list[int], shape: Shape, grid: Grid
) -> NDArray[np.float32]:
    """Give the square of the distance of each voxel of a box from a point."""
    z, y, x = (np.square(step).astype(np.float32) for step in _steps(point_nm, start, shape, grid))
    return np.asarray(z[:, None, None] + y[:, None] + x)


def _steps(
    point_nm: NDArray[np.float64], start: list[int], shape: Shape, grid: Grid
) -> list[NDArray[np.float64]]:
    """Give how far the voxels of a box lie from a point along each axis, in nm."""
    axes = zip(point_nm, start, shape, grid.offset_nm, grid.voxel_nm, strict=True)
    return [offset + (first + np.arange(n)) * size - at for at, first, n, offset, size in axes]


def _reach(
    centre_nm: NDArray[np.float64], radius_nm: float, grid: Grid
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the first and one past the last voxel that each ball reaches along each axis."""
    at = (centre_nm - grid.offset_nm) / np.asarray(grid.voxel_nm)
    reach = radius_nm / np.asarray(grid.voxel_nm)
    return np.ceil(at - reach).astype(np.int64), np.floor(at + reach).astype(np.int64) + 1


def _within(low: NDArray[np.int64], high: NDArray[np.int64], box: Region) -> Region | None:
    """Give the part of a box from low to high, counted from the box's first voxel; None if there is none."""
    part = tuple(
        slice(max(int(a), axis.start) - axis.start, min(int(b), axis.stop) - axis.start)
        for a, b, axis in zip(low, high, box, strict=True)
    )
    return None if any(axis.start >= axis.stop for axis in part) else part


def _by_block(
    low: NDArray[np.int64], high: NDArray[np.int64], shape: Shape
) -> Iterator[tuple[Region, NDArray[np.intp]]]:
    """Give each block of a volume that boxes touch, and the rows of those that do; blocks in order."""
    block = np.array(BLOCK_ZYX)
    first = np.maximum(low, 0) // block
    last = (np.minimum(high, shape) - 1) // block
    counts = np.maximum(last - first + 1, 0)
    grid = -(-np.array(shape) // block)
    rows, numbers = [np.empty(0, np.intp)], [np.empty(0, np.int64)]
    for step in itertools.product(*(range(int(n)) for n in counts.max(axis=0, initial=0))):
        found = np.flatnonzero((np.array(step) < counts).all(axis=1))
        rows.append(found)
        numbers.append(np.ravel_multi_index(tuple((first[found] + step).T), tuple(grid)))
    row, number = np.concatenate(rows), np.concatenate(numbers)
    order = np.lexsort((row, number))
    row, number = row[order], number[order]
    for these in np.split(np.arange(len(row)), np.flatnonzero(np.diff(number)) + 1):
        if len(these):
            start = np.array(np.unravel_index(number[these[0]], grid)) * block
            stop = np.minimum(start + block, shape)
            yield tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True)), row[these]
