"""Connected components of listed voxels: the cost goes by their number, not by the volume.

Voxels that follow each other along x make a run, and only runs are compared. Synapses fill about a hundredth
of a volume, so that this is several times as fast as labelling every voxel of it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Indices = NDArray[np.int64]


def components(
    flat: NDArray[np.integer],
    shape_zyx: tuple[int, int, int],
    *,
    reach: int = 1,
    faces: bool = False,
    value: NDArray[np.integer] | None = None,
) -> Indices:
    """Label the connected components of some voxels of a volume.

    Parameters
    ----------
    flat : (N,) array of int
        Where they are: ascending places in the flattened volume, x fastest.
    shape_zyx : tuple of int
        Of the volume.
    reach : int, default 1
        Two voxels touch if they lie at most one section and, along y and x, at most this many voxels apart; 1
        is 26-connectivity.
    faces : bool, default False
        Two voxels touch if boxes of `reach` by `reach` voxels in plane about them share voxels or a face; 1
        is 6-connectivity, and more is that of the voxels dilated by such a box.
    value : (N,) array of int, optional
        Only voxels of equal value touch; with a `reach` of 1 alone.

    Returns
    -------
    labels : (N,) array of int
        From 0 without gaps, in scan order of the components' first voxels.

    Raises
    ------
    ValueError
        If values are given with a `reach` beyond 1 or with `faces`.

    Examples
    --------
    >>> components(np.array([0, 1, 3, 9]), (1, 2, 5)).tolist()
    [0, 0, 1, 1]
    >>> components(np.array([0, 1, 3, 9]), (1, 2, 5), faces=True).tolist()
    [0, 0, 1, 2]
    >>> components(np.array([0, 1, 3, 9]), (1, 2, 5), value=np.array([1, 2, 2, 2])).tolist()
    [0, 1, 2, 2]
    """
    if value is not None and (reach != 1 or faces):
        raise ValueError(f"values part the voxels that touch at a reach of 1, not of {reach}")
    if not len(flat):
        return np.empty(0, np.int64)
    runs = _Runs(flat.astype(np.int64, copy=False), shape_zyx, reach=reach, faces=faces, value=value)
    one, other = (np.concatenate(ends) for ends in zip(*runs.meeting(), strict=True))
    labels = groups(len(runs.row), one, other)
    return np.repeat(labels, np.diff(runs.begins, append=len(flat)))


def groups(n: int, one: ArrayLike, other: ArrayLike) -> Indices:
    """Label what belongs together, given pairs that do.

    Parameters
    ----------
    n : int
        Members, numbered from 0.
    one, other : (E,) array of int
        Members of each pair; a pair may come up twice.

    Returns
    -------
    labels : (n,) array of int
        From 0 without gaps, in the order of the groups' first members.

    Examples
    --------
    >>> groups(5, [1, 4], [3, 1]).tolist()
    [0, 1, 2, 1, 1]
    """
    pairs = (np.asarray(one, np.int64), np.asarray(other, np.int64))
    graph = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(n, n))
    labels: Indices = connected_components(graph, directed=False)[1].astype(np.int64)  # goes through in order
    return labels


def first_places(flat: Indices, label: Indices) -> Indices:
    """Give the first of the ascending places `flat` that bears each label, 0 to K - 1.

    Examples
    --------
    >>> first_places(np.array([3, 5, 8]), np.array([1, 0, 1])).tolist()
    [5, 3]
    """
    first = np.empty(int(label.max(initial=-1)) + 1, np.int64)
    first[label[::-1]] = flat[::-1]  # the last one written is the first in order
    return first


def places(flat: Indices, shape_zyx: tuple[int, ...]) -> tuple[Indices, Indices, Indices]:
    """Give z, y and x of places in a flattened volume; several times as fast as `numpy.unravel_index`.

    Examples
    --------
    >>> [at.tolist() for at in places(np.array([0, 7, 12]), (2, 2, 5))]
    [[0, 0, 1], [0, 1, 0], [0, 2, 2]]
    """
    _, height, width = shape_zyx
    row = flat // width
    z = row // height
    return z, row - z * height, flat - row * width


class _Runs:
    """Voxels of a row with no gap of `reach` or more between them, in scan order."""

    def __init__(
        self,
        flat: Indices,
        shape_zyx: tuple[int, int, int],
        *,
        reach: int,
        faces: bool,
        value: NDArray[np.integer] | None,
    ) -> None:
        self._depth, self._height, width = shape_zyx
        self._reach, self._faces = reach, faces
        row = flat // width
        x = flat - row * width
        parted = (np.diff(flat, prepend=flat[0] - reach - 1) > reach) | (np.diff(row, prepend=-1) != 0)
        if value is not None:
            parted[1:] |= value[1:] != value[:-1]
        self.begins = np.flatnonzero(parted)
        self.row = row[self.begins]
        self._first, self._last = x[self.begins], x[np.append(self.begins[1:], len(flat)) - 1]
        self._value = None if value is None else value[self.begins]
        # one ascending number for row and x, with room between rows for what reaches beyond their ends
        self._stride = width + 2 * reach + 1
        self._first_key = self.row * self._stride + self._first + reach
        self._last_key = self.row * self._stride + self._last + reach

    def meeting(self) -> Iterator[tuple[Indices, Indices]]:
        """Give the pairs of runs in different rows that touch; the second follows the first."""
        z, y = np.divmod(self.row, self._height)
        for section, step, along_x in self._steps():
            inside = (y + step >= 0) & (y + step < self._height) & (z + section < self._depth)
            yield self._touching(np.flatnonzero(inside), section * self._height + step, along_x)

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        """Give the sections and rows from a run to another, and how far apart along x they may lie there."""
        reach, overlap = self._reach, self._reach - self._faces
        yield from ((0, step, reach) for step in range(1, overlap + 1))
        if self._faces:  # one row further, the boxes have to overlap along x
            yield 0, reach, overlap
        yield from ((1, step, overlap) for step in range(-overlap, overlap + 1))

    def _touching(self, runs: Indices, rows: int, along_x: int) -> tuple[Indices, Indices]:
        """Give the pairs of one of `runs` and a run that touches it `rows` rows further on."""
        row = (self.row[runs] + rows) * self._stride + self._reach
        begin = np.searchsorted(self._last_key, row + self._first[runs] - along_x)
        end = np.searchsorted(self._first_key, row + self._last[runs] + along_x, side="right")
        n = np.maximum(end - begin, 0)
        one = np.repeat(runs, n)
        other = np.arange(len(one)) + np.repeat(begin - np.cumsum(n) + n, n)
        if self._value is not None:
            same = self._value[one] == self._value[other]
            one, other = one[same], other[same]
        return one, other
