"""One-to-one matching of predicted to true synapses: by overlap, by distance, and as partners.

All three list the candidate pairs first (they are few) and then solve the assignment on that sparse graph, so
that 100 000 partners against 100 000 take seconds and no matrix of all pairs is ever made.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from synmlops.synapses.instances import Instances, Mask, sites_of

Indices = NDArray[np.intp]
Floats = NDArray[np.float64]

_BATCH_PAIRS = 4096  # candidate pairs solved in one call: the solver is quadratic, its start costs 0.2 ms
_COUNT_BELOW = 1 << 24  # ids below are counted in a table of that length, others are sorted


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Contingency table of two instance volumes: the pairs that share voxels, and all sizes."""

    predicted_ids: NDArray[np.uint64]  # (P,) ascending
    predicted_voxels: NDArray[np.int64]  # (P,)
    true_ids: NDArray[np.uint64]  # (T,) ascending
    true_voxels: NDArray[np.int64]  # (T,)
    pairs: Indices  # (K, 2) index into predicted_ids, index into true_ids
    voxels: NDArray[np.int64]  # (K,) voxels that the two share, at least 1

    def iou(self) -> Floats:
        """Give intersection over union of each pair in `pairs`."""
        p, t = self.pairs.T
        iou: Floats = self.voxels / (self.predicted_voxels[p] + self.true_voxels[t] - self.voxels)
        return iou

    def by_site(self) -> "Overlaps":
        """Give the table of whole sites, where the ids of this one follow the pairs convention."""
        predicted_sites, p_of, predicted_voxels = _grouped(self.predicted_ids, self.predicted_voxels)
        true_sites, t_of, true_voxels = _grouped(self.true_ids, self.true_voxels)
        key = p_of[self.pairs[:, 0]] * len(true_sites) + t_of[self.pairs[:, 1]]
        pair, first, place = np.unique(key, return_index=True, return_inverse=True)
        pairs = np.stack((p_of[self.pairs[first, 0]], t_of[self.pairs[first, 1]]), axis=1)
        return Overlaps(
            predicted_sites,
            predicted_voxels,
            true_sites,
            true_voxels,
            pairs,
            _sums(place, self.voxels, len(pair)),
        )


def overlaps_of(predicted: Instances, true: Instances, *, mask: Mask | None = None) -> Overlaps:
    """Count the voxels that predicted and true instances have and share.

    Parameters
    ----------
    predicted, true : (Z, Y, X) array of unsigned int
        Instance ids; 0 is none.
    mask : (Z, Y, X) array of bool, optional
        Only voxels where it is set count; an instance wholly outside does not exist.

    Raises
    ------
    ValueError
        If the shapes differ or ids are not unsigned.

    Examples
    --------
    >>> predicted = np.array([[[1, 1, 1, 0, 2]]], np.uint16)
    >>> table = overlaps_of(predicted, np.array([[[0, 7, 7, 7, 0]]], np.uint16))
    >>> table.predicted_voxels, table.true_voxels, table.voxels, table.iou()
    (array([3, 1]), array([3]), array([2]), array([0.5]))
    """
    for name, volume in (("predicted", predicted), ("true", true)):
        if volume.dtype.kind != "u":
            raise ValueError(f"{name} instances must be unsigned, got {volume.dtype}")
    if predicted.shape != true.shape or (mask is not None and mask.shape != true.shape):
        shapes = [volume.shape for volume in (predicted, true, mask) if volume is not None]
        raise ValueError(f"predicted, true and mask must have one shape, got {shapes}")
    counted = predicted != 0
    counted |= true != 0
    if mask is not None:
        counted &= mask
    flat = np.flatnonzero(counted)
    p, t = predicted.reshape(-1)[flat], true.reshape(-1)[flat]
    predicted_ids, p_index, predicted_voxels = _counted(p)
    true_ids, t_index, true_voxels = _counted(t)
    shared = (p != 0) & (t != 0)
    key = p_index[shared].astype(np.uint64) * np.uint64(len(true_ids)) + t_index[shared].astype(np.uint64)
    pair, _, voxels = _counted(key, zero_is_none=False)
    p_of, t_of = np.divmod(pair, np.uint64(max(1, len(true_ids))))
    pairs = np.stack((p_of, t_of), axis=1).astype(np.intp)
    return Overlaps(predicted_ids, predicted_voxels, true_ids, true_voxels, pairs, voxels)


def match_overlaps(overlaps: Overlaps, *, iou: float) -> Indices:
    """Match instances one to one: as many as can be, and among those ways the greatest sum of IoU.

    Parameters
    ----------
    overlaps : Overlaps
        From `overlaps_of`.
    iou : float
        Least intersection over union of a match, inclusive; above 0.5 no instance has two candidates.

    Returns
    -------
    matches : (M, 2) array of int
        Index into `overlaps.predicted_ids`, index into `overlaps.true_ids`; ascending.

    Examples
    --------
    >>> predicted = np.array([[[1, 1, 1, 0, 2]]], np.uint16)
    >>> table = overlaps_of(predicted, np.array([[[0, 7, 7, 7, 0]]], np.uint16))
    >>> match_overlaps(table, iou=0.5)
    array([[0, 0]])
    """
    share = overlaps.iou()
    enough = share >= iou
    pairs = overlaps.pairs[enough]
    return _assign(pairs, len(overlaps.true_ids) + share[enough])  # one more match outweighs any IoU


def match_points(predicted_nm: ArrayLike, true_nm: ArrayLike, *, radius_nm: float) -> Indices:
    """Match points one to one within a radius, at the least total distance.

    As `match_partners`, with one end instead of two.

    Parameters
    ----------
    predicted_nm, true_nm : (P, 3) and (T, 3) array of float
        Nm, z y x, in the volume's world frame.
    radius_nm : float
        Greatest distance allowed, inclusive; an unmatched point costs twice this much.

    Returns
    -------
    matches : (M, 2) array of int
        Row of `predicted_nm`, row of `true_nm`; ascending. M is 0 if either is empty.

    Raises
    ------
    ValueError
        If an array is not (N, 3) or not finite, or `radius_nm` is not positive.

    Examples
    --------
    >>> match_points([[0, 0, 0], [0, 0, 90]], [[0, 0, 40]], radius_nm=50)
    array([[0, 0]])
    """
    predicted = _points(predicted_nm, "predicted_nm", shape=(1, 3))
    true = _points(true_nm, "true_nm", shape=(1, 3))
    pairs, cost = _within(predicted, true, radius_nm=radius_nm)
    return _assign(pairs, 2 * radius_nm - cost)


def match_partners(
    predicted_nm: ArrayLike,
    true_nm: ArrayLike,
    *,
    radius_nm: float,
    predicted_neurons: ArrayLike | None = None,
    true_neurons: ArrayLike | None = None,
) -> Indices:
    """Match predicted to true synaptic partners, one to one, at the least total distance.

    A match costs the mean of its two end distances, and a partner left unmatched twice the radius.

    Parameters
    ----------
    predicted_nm, true_nm : (P, 2, 3) and (T, 2, 3) array of float
        Pre end then post end of each partner; nm, z y x, in the volume's world frame.
    radius_nm : float
        Greatest distance allowed at either end, inclusive. CREMI scores with 400.
    predicted_neurons, true_neurons : (P, 2) and (T, 2) array of int, optional
        Pre and post neuron of each partner, from one segmentation. Where given, a match must lie on the same
        two neurons in the same order; 0 is compared like any other id.

    Returns
    -------
    matches : (M, 2) array of int
        Row of `predicted_nm`, row of `true_nm`; ascending. M is 0 if either is empty.

    Raises
    ------
    ValueError
        If an array is not (N, 2, 3) or not finite, `radius_nm` is not positive, or neurons are given for one
        side only or do not fit the partners.

    Source: the partner score of the CREMI challenge (cremi.org).

    Examples
    --------
    >>> match_partners([[[0, 0, 50], [0, 0, 150]]], [[[0, 0, 0], [0, 0, 100]]], radius_nm=50)
    array([[0, 0]])
    >>> match_partners([[[0, 0, 0], [0, 0, 9]]], [[[0, 0, 0], [0, 0, 9]]], radius_nm=50,
    ...                predicted_neurons=[[4, 5]], true_neurons=[[5, 4]])
    array([], shape=(0, 2), dtype=int64)
    """
    predicted = _points(predicted_nm, "predicted_nm", shape=(2, 3))
    true = _points(true_nm, "true_nm", shape=(2, 3))
    pairs, cost = _within(predicted, true, radius_nm=radius_nm)
    if (predicted_neurons is None) != (true_neurons is None):
        raise ValueError("neurons must be given for both the predicted and the true partners, or neither")
    if predicted_neurons is not None and true_neurons is not None:
        of_predicted = _neurons(predicted_neurons, "predicted_neurons", n=len(predicted))
        of_true = _neurons(true_neurons, "true_neurons", n=len(true))
        same = (of_predicted[pairs[:, 0]] == of_true[pairs[:, 1]]).all(axis=1)
        pairs, cost = pairs[same], cost[same]
    return _assign(pairs, 2 * radius_nm - cost)


def _points(points_nm: ArrayLike, name: str, *, shape: tuple[int, int]) -> Floats:
    """Give points as (N, ends, 3); (N, 3) is taken where there is one end, and no points as `[]`."""
    points = np.asarray(points_nm, np.float64)
    if not points.size:
        return np.empty((0, *shape))
    if points.shape[1:] != (shape if shape[0] > 1 else (3,)):
        wanted = "(N, 2, 3)" if shape[0] > 1 else "(N, 3)"
        raise ValueError(f"{name} must be {wanted}, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name} must be finite, got {points[~np.isfinite(points)][0]}")
    return points.reshape(-1, *shape)


def _neurons(neurons: ArrayLike, name: str, *, n: int) -> NDArray[np.integer]:
    ids = np.asarray(neurons)
    if not ids.size and n == 0:
        return np.empty((0, 2), np.uint64)
    if ids.shape != (n, 2) or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be ({n}, 2) whole numbers, got {ids.dtype} of shape {ids.shape}")
    return ids


def _within(predicted: Floats, true: Floats, *, radius_nm: float) -> tuple[Indices, Floats]:
    """Give the pairs (K, 2) whose every end lies within the radius, and the mean of their end distances."""
    if not (radius_nm > 0 and np.isfinite(radius_nm)):
        raise ValueError(f"radius_nm must be positive, got {radius_nm}")
    if not len(predicted) or not len(true):
        return np.empty((0, 2), np.intp), np.empty(0)
    n_ends = predicted.shape[1]
    # ends within r each are within r * sqrt(ends) in the space of all their coordinates
    near = cKDTree(predicted.reshape(len(predicted), -1)).sparse_distance_matrix(
        cKDTree(true.reshape(len(true), -1)), radius_nm * n_ends**0.5 * (1 + 1e-9), output_type="ndarray"
    )
    pairs = np.stack((near["i"], near["j"]), axis=1).astype(np.intp)
    distance = np.linalg.norm(predicted[pairs[:, 0]] - true[pairs[:, 1]], axis=2)
    close = (distance <= radius_nm).all(axis=1)
    return pairs[close], distance[close].mean(axis=1)


def _assign(pairs: Indices, gain: Floats) -> Indices:
    """Choose pairs, none sharing a row or a column, of the greatest total gain (all gains are positive)."""
    if not len(pairs):
        return np.empty((0, 2), np.intp)
    n_rows, n_columns = pairs.max(axis=0) + 1
    n = int(n_rows + n_columns)
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1] + n_rows)), shape=(n, n))
    component = connected_components(graph, directed=False)[1][pairs[:, 0]]
    order = np.argsort(component, kind="stable")
    starts = np.flatnonzero(np.diff(component[order], prepend=-1))
    chosen = []
    begin = 0
    for end in (*starts[1:], len(order)):  # whole components, about _BATCH_PAIRS at a time
        if end - begin >= _BATCH_PAIRS or end == len(order):
            batch = order[begin:end]
            chosen.append(pairs[batch][_assign_batch(pairs[batch], gain[batch])])
            begin = end
    matches = np.concatenate(chosen)
    return matches[np.lexsort(matches.T[::-1])]


def _assign_batch(pairs: Indices, gain: Floats) -> Indices:
    """Solve one sparse assignment; gives indices into `pairs`."""
    rows, row = np.unique(pairs[:, 0], return_inverse=True)
    columns, column = np.unique(pairs[:, 1], return_inverse=True)
    n_rows, n_columns = len(rows), len(columns)
    # a column of its own lets each row stay unmatched, at no gain; costs stay above 0, which would be no edge
    top = 1.5 * gain.max()
    alone = np.arange(n_rows)
    costs = csr_array(
        (
            np.concatenate((top - gain, np.full(n_rows, top))),
            (np.concatenate((row, alone)), np.concatenate((column, n_columns + alone))),
        ),
        shape=(n_rows, n_columns + n_rows),
    )
    matched_row, matched_column = min_weight_full_bipartite_matching(costs)
    matched = matched_column < n_columns
    key = row * n_columns + column
    order = np.argsort(key)
    wanted = matched_row[matched] * n_columns + matched_column[matched]
    return np.asarray(order[np.searchsorted(key[order], wanted)], np.intp)


def _counted(
    ids: NDArray[np.unsignedinteger], *, zero_is_none: bool = True
) -> tuple[NDArray[np.uint64], Indices, NDArray[np.int64]]:
    """Give the distinct ids ascending, the place of each element among them, and their counts.

    Without zero the place of a zero element means nothing.
    """
    if ids.size and int(ids.max()) < _COUNT_BELOW:
        table = np.bincount(ids.astype(np.int64))
        if zero_is_none:
            table[0] = 0
        present = table > 0
        distinct = np.flatnonzero(present).astype(np.uint64)
        return distinct, (np.cumsum(present) - 1)[ids.astype(np.intp)], table[present]
    distinct, place, counts = np.unique(ids.astype(np.uint64), return_inverse=True, return_counts=True)
    if zero_is_none and distinct.size and distinct[0] == 0:
        distinct, place, counts = distinct[1:], place - 1, counts[1:]
    return distinct, place, counts


def _grouped(
    ids: NDArray[np.uint64], voxels: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], Indices, NDArray[np.int64]]:
    """Give the sites of pairs ids ascending, the place of each id among them, and the sites' sizes."""
    sites, place = np.unique(sites_of(ids).astype(np.uint64), return_inverse=True)
    return sites, place, _sums(place, voxels, len(sites))


def _sums(place: Indices, values: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Add up the values of each place, exactly."""
    sums = np.zeros(n, np.int64)
    np.add.at(sums, place, values)
    return sums
