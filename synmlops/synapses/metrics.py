"""Scores of synapses and partners; docs/metrics.md defines each, and voxels.py has those of voxels.

Every score is a small frozen dataclass of whole numbers that adds up over volumes and folds, and the ratios
are taken from the sums. Nothing here is NaN: where nothing is true and nothing predicted a ratio is 1, and
where only one of the two is empty it is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.synapses.instances import Instances, Mask, sites_of
from synmlops.synapses.matching import (
    Indices,
    Overlaps,
    match_overlaps,
    match_partners,
    match_points,
    overlaps_of,
)
from synmlops.synapses.voxels import Counts, ratio
from synmlops.volumes.table import points_nm


@dataclass(frozen=True)
class Direction:
    """Which of the matched synapses have their sides the right way round.

    Examples
    --------
    >>> (Direction(right=3, matched=4) + Direction(unmatched=2)).accuracy, Direction().accuracy
    (0.75, 1.0)
    """

    right: int = 0
    matched: int = 0
    unmatched: int = 0  # true and predicted synapses without a partner in the matching

    def __add__(self, other: "Direction") -> "Direction":
        return Direction(
            self.right + other.right, self.matched + other.matched, self.unmatched + other.unmatched
        )

    @property
    def accuracy(self) -> float:
        """Share of the matched that is right; without a match 0, or 1 if there was no synapse at all."""
        return ratio(self.right, self.matched, if_nothing=float(self.unmatched == 0))


@dataclass(frozen=True)
class InstanceScores:
    """How well predicted synapses are those in truth; adds up over volumes."""

    by_iou: Counts = Counts()
    by_centroid: Counts = Counts()
    direction: Direction = Direction()  # stays empty where the sides are not known

    def __add__(self, other: "InstanceScores") -> "InstanceScores":
        return InstanceScores(
            self.by_iou + other.by_iou, self.by_centroid + other.by_centroid, self.direction + other.direction
        )


def score_instances(
    predicted: Instances,
    true: Instances,
    *,
    pairs: bool,
    voxel_nm: Sequence[float],
    iou: float = 0.5,
    centroid_nm: float = 200.0,
    mask: Mask | None = None,
) -> InstanceScores:
    """Score the synapses of one volume.

    Parameters
    ----------
    predicted, true : (Z, Y, X) array of unsigned int
        Instance ids; 0 is none.
    pairs : bool
        Whether the ids follow the pairs convention. Then a synapse is a whole site and its direction is
        scored; otherwise each id is a synapse.
    voxel_nm : sequence of 3 float
        Size of a voxel; nm, z y x.
    iou, centroid_nm : float
        Least intersection over union and greatest distance of the centroids of a match, both inclusive.
    mask : (Z, Y, X) array of bool, optional
        Only voxels where it is set count.

    Raises
    ------
    ValueError
        If the shapes differ, ids are not unsigned, or a limit makes no sense.

    Examples
    --------
    >>> true = np.array([[[1, 1, 2, 2, 0, 0, 3, 4]]], np.uint16)
    >>> predicted = np.array([[[0, 2, 1, 1, 0, 0, 3, 4]]], np.uint16)
    >>> scores = score_instances(predicted, true, pairs=True, voxel_nm=(40, 4, 4))
    >>> scores.by_iou, scores.direction.accuracy
    (Counts(tp=2, fp=0, fn=0), 0.5)
    """
    sides = overlaps_of(predicted, true, mask=mask)
    table = sides.by_site() if pairs else sides
    matches = match_overlaps(table, iou=iou)
    by_iou = Counts.of(len(matches), predicted=len(table.predicted_ids), true=len(table.true_ids))
    centroids = [
        centroids_of(volume, pairs=pairs, voxel_nm=voxel_nm, mask=mask) for volume in (predicted, true)
    ]
    near = match_points(*centroids, radius_nm=centroid_nm)
    return InstanceScores(
        by_iou=by_iou,
        by_centroid=Counts.of(len(near), predicted=len(centroids[0]), true=len(centroids[1])),
        direction=direction_of(sides, table, matches) if pairs else Direction(),
    )


def centroids_of(
    instances: Instances, *, pairs: bool, voxel_nm: Sequence[float], mask: Mask | None = None
) -> NDArray[np.float64]:
    """Give the centroid of each instance, or of each site, by ascending id: (N, 3) nm from the first voxel.

    Examples
    --------
    >>> centroids_of(np.array([[[1, 1, 2, 0, 3]]], np.uint16), pairs=True, voxel_nm=(40, 4, 4))
    array([[ 0.,  0.,  4.],
           [ 0.,  0., 16.]])
    """
    flat = np.flatnonzero(instances if mask is None else (instances != 0) & mask)
    ids = instances.reshape(-1)[flat]
    _, place, voxels = np.unique(sites_of(ids) if pairs else ids, return_inverse=True, return_counts=True)
    if not len(voxels):
        return np.empty((0, 3))
    axes = np.unravel_index(flat, instances.shape)
    sums = np.stack([np.bincount(place, weights=axis) for axis in axes], axis=1)
    centroids: NDArray[np.float64] = sums / voxels[:, None] * np.asarray(voxel_nm, np.float64)
    return centroids


def direction_of(sides: Overlaps, sites: Overlaps, matches: Indices) -> Direction:
    """Count the matched sites whose sides are the right way round.

    A site is right if its predicted pre and post share more voxels with the true pre and post than with the
    true post and pre; a tie is wrong.

    Parameters
    ----------
    sides : Overlaps
        Of ids in the pairs convention.
    sites : Overlaps
        `sides.by_site()`.
    matches : (M, 2) array of int
        From `match_overlaps(sites)`.

    Examples
    --------
    >>> sides = overlaps_of(np.array([[[2, 2, 1, 1]]], np.uint16), np.array([[[1, 1, 2, 2]]], np.uint16))
    >>> direction_of(sides, sides.by_site(), np.array([[0, 0]]))
    Direction(right=0, matched=1, unmatched=0)
    """
    p_ids, t_ids = sides.predicted_ids[sides.pairs[:, 0]], sides.true_ids[sides.pairs[:, 1]]
    same_side = (p_ids & np.uint64(1)) == (t_ids & np.uint64(1))
    n_true = len(sites.true_ids)
    key = np.searchsorted(sites.predicted_ids, sites_of(p_ids)) * n_true
    key += np.searchsorted(sites.true_ids, sites_of(t_ids))
    site_pairs, place = np.unique(key, return_inverse=True)
    balance = np.zeros(len(site_pairs), np.int64)
    np.add.at(balance, place, np.where(same_side, sides.voxels, -sides.voxels))
    right = np.isin(matches[:, 0] * n_true + matches[:, 1], site_pairs[balance > 0])
    n = len(matches)
    return Direction(int(right.sum()), n, len(sites.predicted_ids) + n_true - 2 * n)


def score_partners(
    predicted: pd.DataFrame, true: pd.DataFrame, *, radius_nm: float, with_neurons: bool
) -> Counts:
    """Score predicted rows of a partner table against the true rows.

    Parameters
    ----------
    predicted, true : DataFrame
        With the columns of `synmlops.volumes.table.COLUMNS`.
    radius_nm : float
        Greatest distance at either end, inclusive.
    with_neurons : bool
        Whether a match must lie on the same two neurons in the same order; the neurons of both tables must
        then come from one segmentation.

    Examples
    --------
    >>> from synmlops.volumes.table import empty_table
    >>> score_partners(empty_table(), empty_table(), radius_nm=400, with_neurons=True).f1
    1.0
    """
    neurons = [
        table[["pre_neuron", "post_neuron"]].to_numpy(np.uint64) if with_neurons else None
        for table in (predicted, true)
    ]
    matches = match_partners(
        points_nm(predicted),
        points_nm(true),
        radius_nm=radius_nm,
        predicted_neurons=neurons[0],
        true_neurons=neurons[1],
    )
    return Counts.of(len(matches), predicted=len(predicted), true=len(true))
