"""Where the synapses of a labelled volume are: a row for each, with a voxel in it and its box."""

from collections.abc import Callable, Iterable, Iterator

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from synmlops.params import LabelKind
from synmlops.volumes.labels import touching

Slabs = Iterable[tuple[int, NDArray[np.integer]]]

MIDDLE, START, STOP = slice(0, 3), slice(3, 6), slice(6, 9)
"""Columns of the table: a voxel of the synapse near its middle, and its box, half open; each z, y, x."""


def find_sites(
    slabs: Callable[[], Slabs], kind: LabelKind, *, voxel_nm: tuple[float, float, float]
) -> NDArray[np.int32]:
    """Find the synapses of a label that is given in slabs, twice, so that it may be larger than memory.

    Parameters
    ----------
    slabs : callable
        Gives the label's slabs along z, each with its first z, without gap; 0 where nothing is to count.
    kind : LabelKind
        With "pairs" a synapse is ids 2n - 1 and 2n together, wherever they lie; otherwise a 26-connected
        component of the foreground.
    voxel_nm : tuple of float
        What "near" means for the middle.

    Returns
    -------
    sites : (N, 9) array of int32
        Middle (the voxel of the synapse that is nearest to its centre of mass), start and stop, z y x each;
        by rising n for "pairs", else by the first voxel. N is 0 if there is no foreground.

    Examples
    --------
    >>> label = np.array([[[1, 1, 1, 0, 2, 0, 3], [0, 0, 0, 0, 0, 0, 0]]])
    >>> find_sites(lambda: [(0, label)], "pairs", voxel_nm=(40, 8, 8)).tolist()
    [[0, 0, 2, 0, 0, 0, 1, 1, 5], [0, 0, 6, 0, 0, 6, 1, 1, 7]]
    >>> find_sites(lambda: [(0, label)], "union", voxel_nm=(40, 8, 8))[:, MIDDLE].tolist()
    [[0, 0, 1], [0, 0, 4], [0, 0, 6]]
    """
    ids, rows, edges = [], [], []
    for at, piece, joined in _pieces(slabs(), kind):
        order = np.argsort(piece, kind="stable")
        found, first = _sorted_groups(piece, order)
        at = at[order]
        size = np.diff(np.append(first, len(at)))[:, None]
        parts = (size, np.add.reduceat(at, first), np.minimum.reduceat(at, first))
        ids.append(found)
        rows.append(np.hstack([*parts, np.maximum.reduceat(at, first) + 1]))
        edges.append(joined)
    if not ids:
        return np.empty((0, 9), np.int32)
    pieces = np.unique(np.concatenate(ids))
    site_of_piece = _joined(pieces, np.concatenate(edges, axis=1))
    site = site_of_piece[np.searchsorted(pieces, np.concatenate(ids))]
    order = np.argsort(site, kind="stable")
    _, first = _sorted_groups(site, order)
    table = np.concatenate(rows)[order]
    sums = np.add.reduceat(table[:, :4], first)
    middles = _nearest_voxels(
        ((at, site_of_piece[np.searchsorted(pieces, piece)]) for at, piece, _ in _pieces(slabs(), kind)),
        sums[:, 1:] / sums[:, :1],
        voxel_nm=voxel_nm,
    )
    starts, stops = np.minimum.reduceat(table[:, 4:7], first), np.maximum.reduceat(table[:, 7:], first)
    return np.hstack([middles, starts, stops]).astype(np.int32)


def _pieces(
    slabs: Slabs, kind: LabelKind
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Give each slab's foreground voxels (M, 3), the piece that each is of, and what joins pieces (2, E).

    A piece of a pairs label is a whole synapse; otherwise it is a component of the slab, which may go on in
    the slab before.
    """
    total, last = 0, None
    none = np.empty((2, 0), np.int64)
    for z, slab in slabs:
        at = np.argwhere(slab)
        if kind == "pairs":
            values = slab[tuple(at.T)].astype(np.int64)
            piece, joined = (values + 1) // 2, none
        else:
            components, n = cc3d.connected_components(slab != 0, connectivity=26, return_N=True)
            above = np.where(components[0] > 0, components[0].astype(np.int64) + total, 0)
            joined = none if last is None else touching(last, above)
            piece = components[tuple(at.T)].astype(np.int64) + total
            last = np.where(components[-1] > 0, components[-1].astype(np.int64) + total, 0)
            total += int(n)
        if len(at):
            yield at + np.array([z, 0, 0]), piece, joined


def _joined(pieces: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the synapses that the pieces make up, by their first piece."""
    a, b = np.searchsorted(pieces, edges)
    graph = coo_array((np.ones(len(a)), (a, b)), (len(pieces), len(pieces)))
    _, component = connected_components(graph, directed=False)
    _, first, site = np.unique(component, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbered: NDArray[np.int64] = rank[site]
    return numbered


def _nearest_voxels(
    parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
    centres: NDArray[np.float64],
    *,
    voxel_nm: tuple[float, float, float],
) -> NDArray[np.int64]:
    """Give of each synapse the voxel nearest to its centre, the first one of several."""
    best = np.full(len(centres), np.inf)
    middles = np.zeros((len(centres), 3), np.int64)
    for at, site in parts:
        away = (((at - centres[site]) * voxel_nm) ** 2).sum(axis=1)
        order = np.lexsort((away, site))
        found, first = _sorted_groups(site, order)
        nearest = order[first]
        better = away[nearest] < best[found]
        best[found[better]] = away[nearest[better]]
        middles[found[better]] = at[nearest[better]]
    return middles


def _sorted_groups(
    keys: NDArray[np.int64], order: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Give the keys that occur and where each begins in the sorted order."""
    found, first = np.unique(keys[order], return_index=True)
    return found, first
