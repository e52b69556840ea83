"""Balls about points become a label of kind `pairs` and a mask, block by block."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.progress import track
from synmlops.volumes.balls import BLOCK_ZYX, Balls, blocks_of, measure, paint
from synmlops.volumes.labels import smallest_unsigned
from synmlops.volumes.sections import Region
from synmlops.volumes.store import Grid, Volume, hdf5_writer

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ends:
    """What is to be painted: end `n` below the number of sites is the pre side of site n, then come posts.

    Attributes
    ----------
    balls : Balls
    site_of_row : (N,) array of int
        Of each pair, from 0 without gaps; the post end of row k is `n_sites + k`.
    unsure_nm : (M, 3) array of float
        Middles of balls in which the label is not to be trusted, save where it says something.
    """

    balls: Balls
    site_of_row: NDArray[np.int64]
    unsure_nm: NDArray[np.float64]

    @property
    def n_sites(self) -> int:
        """How many sites there are."""
        return int(self.site_of_row.max()) + 1


@dataclass(frozen=True, eq=False)
class Labelled:
    """What was painted."""

    voxels: NDArray[np.int64]  # of each end
    low: NDArray[np.int64]  # (E, 3), first voxel of each end
    high: NDArray[np.int64]  # one past the last
    kept: NDArray[np.bool_]  # rows whose pre and post both have voxels
    contested: int  # voxels that balls of several sites reach
    masked: int  # voxels that the mask takes out


def write_labels(
    ends: Ends,
    *,
    label: Path,
    mask: Path,
    radius_nm: float,
    grid: Grid,
    shape: Shape,
    neurons: Volume | None,
    attrs: Mapping[str, Any],
    write_beside: Callable[[Labelled], None],
) -> Labelled:
    """Paint the balls into LABEL, and write MASK where there is something to mask; both appear when complete.

    A site that is left without a pre or without any post voxel, since other points lie nearer, is taken out
    and masked.

    Parameters
    ----------
    ends : Ends
    label, mask : Path
        HDF5.
    radius_nm : float
    grid : Grid
    shape : tuple of int
        Of the volume, z y x.
    neurons : Volume or None
    attrs : mapping
        Attributes of both files, beside their own.
    write_beside : callable
        Called before the files appear, to write what must appear with them.

    Raises
    ------
    SynmlopsError
        If no site keeps both sides, or a file cannot be written.
    """
    dtype = smallest_unsigned(2 * ends.n_sites)
    with ExitStack() as files:
        ours = {"label_kind": "pairs", **attrs}
        writer = hdf5_writer(label, {"main": (shape, dtype)}, grid=grid, attrs=ours)
        data = files.enter_context(writer)["main"]
        ids = _ids(ends)
        done = _paint_all(ends, ids, data, radius_nm=radius_nm, grid=grid, shape=shape, neurons=neurons)
        if not done.kept.any():
            raise SynmlopsError(
                f"--radius-nm {radius_nm:g}: no synapse keeps voxels on both sides; check shape and radius"
            )
        lost = _take_out(ends, done, ids, data)
        unsure = np.concatenate([ends.unsure_nm, ends.balls.centre_nm[np.isin(ends.balls.end, lost)]])
        masked = 0
        if len(unsure):
            form = {"main": (shape, np.uint8)}
            made = hdf5_writer(mask, form, grid=grid, attrs=attrs, compression="gzip")
            to = files.enter_context(made)["main"]
            masked = _write_mask(to, data, unsure, radius_nm=radius_nm, grid=grid)
        done = Labelled(done.voxels, done.low, done.high, done.kept, done.contested, masked)
        write_beside(done)
    return done


def _ids(ends: Ends) -> NDArray[np.int64]:
    """Give the instance of each end: 2n-1 for the pre side of site n, 2n for its posts."""
    return np.concatenate([2 * np.arange(ends.n_sites) + 1, 2 * ends.site_of_row + 2])


def _paint_all(
    ends: Ends,
    ids: NDArray[np.int64],
    data: Any,
    *,
    radius_nm: float,
    grid: Grid,
    shape: Shape,
    neurons: Volume | None,
) -> Labelled:
    n_ends = len(ids)
    voxels, high = np.zeros(n_ends, np.int64), np.zeros((n_ends, 3), np.int64)
    low = np.full((n_ends, 3), np.iinfo(np.int64).max)
    contested = 0
    blocks = list(blocks_of(ends.balls, radius_nm=radius_nm, grid=grid, shape=shape))
    with track("points", len(blocks)) as report:
        for n, (box, rows) in enumerate(blocks, start=1):
            here = None if neurons is None else neurons[box]
            painted = paint(ends.balls.where(rows), box, radius_nm=radius_nm, grid=grid, neurons=here)
            data[box] = np.concatenate([[0], ids[painted.ends]]).astype(data.dtype)[painted.owner]
            counts, first, last = measure(painted, tuple(axis.start for axis in box))
            some = painted.ends[counts > 0]
            voxels[painted.ends] += counts
            low[some] = np.minimum(low[some], first[counts > 0])
            high[some] = np.maximum(high[some], last[counts > 0])
            contested += painted.contested
            report(n, "")
    low[voxels == 0] = 0
    has_both = (voxels[ends.site_of_row] > 0) & (voxels[ends.n_sites :] > 0)
    return Labelled(voxels, low, high, has_both, contested, 0)


def _take_out(ends: Ends, done: Labelled, ids: NDArray[np.int64], data: Any) -> NDArray[np.int64]:
    """Clear the ends of sites without both sides from the label; give all ends that have no place in it."""
    sites = np.unique(ends.site_of_row[done.kept])
    site_of_end = np.concatenate([np.arange(ends.n_sites), ends.site_of_row])
    gone = ~np.isin(site_of_end, sites)
    for end in np.flatnonzero(gone & (done.voxels > 0)):
        box = tuple(slice(int(a), int(b)) for a, b in zip(done.low[end], done.high[end], strict=True))
        part = data[box]
        data[box] = np.where(part == ids[end], 0, part)
    return np.flatnonzero(gone | (done.voxels == 0))


def _write_mask(
    mask: Any, label: Any, unsure_nm: NDArray[np.float64], *, radius_nm: float, grid: Grid
) -> int:
    """Write 1, and 0 in the balls about `unsure_nm` where the label says nothing; give how many."""
    n = len(unsure_nm)
    number = np.arange(n)
    balls = Balls(number, number, unsure_nm, unsure_nm, np.zeros((n, 3)), np.zeros(n, np.uint64))
    reached = {
        tuple(axis.start for axis in box): rows
        for box, rows in blocks_of(balls, radius_nm=radius_nm, grid=grid, shape=mask.shape)
    }
    masked = 0
    starts = [range(0, size, step) for size, step in zip(mask.shape, BLOCK_ZYX, strict=True)]
    for start in np.array(np.meshgrid(*starts, indexing="ij")).reshape(3, -1).T.tolist():
        box: Region = tuple(
            slice(a, min(a + step, size)) for a, step, size in zip(start, BLOCK_ZYX, mask.shape, strict=True)
        )
        known = np.ones([axis.stop - axis.start for axis in box], np.uint8)
        if (rows := reached.get(tuple(start))) is not None:
            painted = paint(balls.where(rows), box, radius_nm=radius_nm, grid=grid)
            known[(painted.owner > 0) & (label[box] == 0)] = 0
            masked += int((known == 0).sum())
        mask[box] = known
    return masked
