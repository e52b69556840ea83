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

    @property
    def whole(self) -> NDArray[np.bool_]:
        """Which balls are no halves."""
        return np.asarray((self.facing == 0).all(axis=1))

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
        Of whole numbers; negative ones, with which some mark what is no neuron, are read as 0.
    index_zyx : (N, 3) array of int
        All inside.
    """
    values = np.zeros(len(index_zyx), np.uint64)
    if (whole := volume.memmap()) is not None:
        values[:] = whole[tuple(index_zyx.T)].clip(0)
        return values
    for box, rows in _by_block(index_zyx, index_zyx + 1, volume.shape):
        start = [axis.start for axis in box]
        low, high = (f(index_zyx[rows], axis=0) for f in (np.min, np.max))
        near = tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True))
        assert (low >= start).all()
        values[rows] = volume[near][tuple((index_zyx[rows] - low).T)].clip(0)
    return values


def blocks_of(
    balls: Balls, *, radius_nm: float, grid: Grid, shape: Shape
) -> Iterator[tuple[Region, NDArray[np.intp]]]:
    """Give the blocks that balls reach, in order, and the rows of the balls that reach each."""
    yield from _by_block(*_spans(balls, radius_nm, grid), shape)


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
    start = np.array([axis.start for axis in box])
    size = tuple(axis.stop - axis.start for axis in box)
    axes = [
        offset + (first + np.arange(n)) * step
        for first, n, offset, step in zip(start, size, grid.offset_nm, grid.voxel_nm, strict=True)
    ]
    owner, contested = np.zeros(size, np.int32), np.zeros(size, bool)
    nearest = np.full(size, np.inf, np.float32)
    site_of = np.zeros(len(ends) + 1, np.int64)
    site_of[row + 1] = balls.site
    own, whole = (voxels_of(balls.point_nm, grid) - start).tolist(), balls.whole.tolist()
    spans = np.clip(np.stack(_spans(balls, radius_nm, grid)) - start, 0, size)
    for n, (low, high) in enumerate(zip(*spans.tolist(), strict=True)):
        part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        if any(axis.start >= axis.stop for axis in part):
            continue
        here = [axis[along] for axis, along in zip(axes, part, strict=True)]
        distance, reached = _ball(balls, n, here, radius_nm=radius_nm)
        if whole[n] and all(a <= i < b for a, i, b in zip(low, own[n], high, strict=True)):
            reached[tuple(i - a for i, a in zip(own[n], low, strict=True))] = True  # however small the ball
        if neurons is not None and balls.neuron[n]:
            reached &= neurons[part] == balls.neuron[n]
        before = owner[part]
        other = reached & (before > 0)
        if other.any():
            contested[part][other] |= site_of[before[other]] != balls.site[n]
        won = reached & (distance < nearest[part])
        before[won] = row[n] + 1
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
    balls: Balls, n: int, axes: list[NDArray[np.float64]], *, radius_nm: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Give the square of each voxel's distance from the point of a ball, and whether it lies in the ball.

    `axes` are the positions of the voxels along z, y and x.
    """
    steps = [axis - at for axis, at in zip(axes, balls.point_nm[n].tolist(), strict=True)]
    distance, limit = _squares(steps), np.float32(radius_nm**2)
    facing = balls.facing[n].tolist()
    if not any(facing):
        return distance, np.asarray(distance <= limit)
    from_centre = [axis - at for axis, at in zip(axes, balls.centre_nm[n].tolist(), strict=True)]
    z, y, x = (step * side for step, side in zip(from_centre, facing, strict=True))
    return distance, (_squares(from_centre) <= limit) & (z[:, None, None] + y[:, None] + x >= 0)


def _squares(steps: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    z, y, x = (np.square(step).astype(np.float32) for step in steps)
    return np.asarray(z[:, None, None] + y[:, None] + x)


def _spans(balls: Balls, radius_nm: float, grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the first and one past the last voxel that each ball reaches along each axis."""
    at = (balls.centre_nm - grid.offset_nm) / np.asarray(grid.voxel_nm)
    reach = radius_nm / np.asarray(grid.voxel_nm)
    low, high = np.ceil(at - reach).astype(np.int64), np.floor(at + reach).astype(np.int64) + 1
    own = voxels_of(balls.point_nm, grid)
    whole = balls.whole[:, None]  # holds the voxel of its point, however small it is
    return np.where(whole, np.minimum(low, own), low), np.where(whole, np.maximum(high, own + 1), high)


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
