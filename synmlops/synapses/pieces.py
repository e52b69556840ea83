"""What the partner table needs to know of groups of voxels: sums that add up over blocks, and a point."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from synmlops.synapses.sparse import Indices

_Number = TypeVar("_Number", bound=np.number[Any])
Sites = NDArray[np.uint64]
Sides = NDArray[np.uint8]
Parts = NDArray[np.uint64]
Keys = tuple[Sites, Sides, Parts]
Places = tuple[Indices, ...]
Order = NDArray[np.bool_] | NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Groups of voxels of one side of a site each; a block knows its own share of them.

    Attributes
    ----------
    site, side, part : (K,) array
        What tells them apart: number of the site, PRE or POST, and neuron id or, for a connected component,
        the place of its first voxel.
    voxels, union : (K,) array of int
        Count, and sum of the union probabilities.
    total, low, high, point : (K, 3) array of int
        Sum of the indices; bounding box, half open; the voxel nearest to the centroid.
    """

    site: Sites
    side: Sides
    part: Parts
    voxels: Indices
    union: Indices
    total: Indices
    low: Indices
    high: Indices
    point: Indices

    def __len__(self) -> int:
        return len(self.site)

    def where(self, chosen: Order) -> "Pieces":
        """Give some of them, or all in another order."""
        return Pieces(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @property
    def centroid(self) -> NDArray[np.float64]:
        """Mean index of the voxels, (K, 3)."""
        centroid: NDArray[np.float64] = self.total / self.voxels[:, None]
        return centroid


def joined(shares: Sequence[Pieces]) -> Pieces:
    """Give the pieces of several blocks one after another; at least one."""
    return Pieces(*(np.concatenate([getattr(one, field.name) for one in shares]) for field in fields(Pieces)))


def group(site: Sites, side: Sides, part: Parts) -> tuple[Indices, NDArray[np.intp]]:
    """Number equal triples from 0, ascending by site, then side, then part.

    Returns
    -------
    number : (N,) array of int
        Of each triple.
    example : (K,) array of int
        For each number, an index at which it stands.

    Examples
    --------
    >>> group(np.array([5, 2, 5], np.uint64), np.array([1, 2, 1], np.uint8), np.array([0, 0, 0], np.uint64))
    (array([1, 0, 1]), array([1, 0]))
    """
    order = np.lexsort((part, side, site))
    new = np.zeros(len(order), bool)
    new[:1] = True
    for key in (site, side, part):
        new[1:] |= key[order][1:] != key[order][:-1]
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(new) - 1
    return number, order[new]


def located(
    index: Places,
    union: NDArray[np.integer],
    number: Indices,
    *,
    keys: Keys,
    voxel_nm: Sequence[float],
) -> Pieces:
    """Sum up the voxels of each piece and find the one nearest to its centroid.

    Parameters
    ----------
    index : three (N,) arrays of int
        z, y and x of the voxels, in scan order.
    union : (N,) array of int
        Probability.
    number : (N,) array of int
        Piece of each voxel: 0 to K - 1, each at least once.
    keys : three (K,) arrays
        Site, side and part of the pieces.
    voxel_nm : sequence of 3 float
    """
    n = len(keys[0])
    pieces = Pieces(
        *keys,
        voxels=np.bincount(number, minlength=n).astype(np.int64),
        union=_sums(number, union, n),
        total=np.stack([_sums(number, at, n) for at in index], axis=1),
        low=np.stack([_extremes(np.minimum, number, at, n) for at in index], axis=1),
        high=np.stack([_extremes(np.maximum, number, at, n) for at in index], axis=1) + 1,
        point=np.empty((n, 3), np.int64),
    )
    _, chosen = nearest(index, number, pieces.centroid, voxel_nm)
    pieces.point[:] = np.stack([at[chosen] for at in index], axis=1)
    return pieces


def merge(shares: Pieces) -> tuple[Pieces, Indices]:
    """Add up the shares that blocks have of the same pieces.

    Returns
    -------
    whole : Pieces
        Ascending by site, side and part. The point is that of any share.
    number : (N,) array of int
        Which of them each share belongs to.
    """
    number, example = group(shares.site, shares.side, shares.part)
    n = len(example)
    whole = Pieces(
        shares.site[example],
        shares.side[example],
        shares.part[example],
        voxels=_sums(number, shares.voxels, n),
        union=_sums(number, shares.union, n),
        total=np.stack([_sums(number, along, n) for along in shares.total.T], axis=1),
        low=np.stack([_extremes(np.minimum, number, along, n) for along in shares.low.T], axis=1),
        high=np.stack([_extremes(np.maximum, number, along, n) for along in shares.high.T], axis=1),
        point=shares.point[example],
    )
    return whole, number


def nearest(
    index: Places,
    number: Indices,
    centroid: NDArray[np.float64],
    voxel_nm: Sequence[float],
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Find the voxel of each piece that is nearest to a point.

    Parameters
    ----------
    index : three (N,) arrays of int
        z, y and x of the voxels, in scan order.
    number : (N,) array of int
        Piece of each voxel: 0 to K - 1, each at least once.
    centroid : (K, 3) array of float
        The points, in voxels.
    voxel_nm : sequence of 3 float

    Returns
    -------
    distance : (K,) array of float
        Squared, in nm; rounded, so that the choice among equally near voxels does not hang on where the
        volume begins.
    chosen : (K,) array of int
        Which voxel; of equally near ones the first.

    Examples
    --------
    >>> index = np.array([0, 0, 0]), np.array([0, 0, 0]), np.array([2, 3, 6])
    >>> nearest(index, np.array([0, 0, 0]), np.array([[0, 0, 11 / 3]]), (40, 4, 4))
    (array([7.111]), array([1]))
    """
    distance = np.zeros(len(number))
    for axis, at in enumerate(index):
        distance += ((at - centroid[number, axis]) * voxel_nm[axis]) ** 2
    distance = np.round(distance, 3)
    least = _extremes(np.minimum, number, distance, len(centroid))
    found = np.flatnonzero(distance == least[number])[::-1]
    chosen = np.empty(len(centroid), np.intp)
    chosen[number[found]] = found  # the last one written is the first in scan order
    return least, chosen


def _sums(number: Indices, values: NDArray[np.integer], n: int) -> Indices:
    sums = np.zeros(n, np.int64)
    np.add.at(sums, number, values.astype(np.int64, copy=False))
    return sums


def _extremes(which: np.ufunc, number: Indices, values: NDArray[_Number], n: int) -> NDArray[_Number]:
    extremes = np.zeros(n, values.dtype)
    extremes[number] = values  # any one of each, to begin with
    which.at(extremes, number, values)
    return extremes
