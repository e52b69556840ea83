"""Scores of voxels, synapses and partners; docs/metrics.md defines each with its formula.

Every score is a small frozen dataclass of whole numbers that adds up over volumes and folds, and the ratios
are taken from the sums. Nothing here is NaN: where nothing is true and nothing predicted a ratio is 1, and
where only one of the two is empty it is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.synapses.instances import SCALE, Instances, Mask, Probabilities, level_of, sites_of
from synmlops.synapses.matching import (
    Indices,
    Overlaps,
    match_overlaps,
    match_partners,
    match_points,
    overlaps_of,
)
from synmlops.volumes.table import points_nm

_N_LEVELS = SCALE + 1


def _ratio(part: float, whole: float, *, if_nothing: float) -> float:
    return part / whole if whole else if_nothing


@dataclass(frozen=True)
class Counts:
    """True positives, false positives and false negatives.

    Examples
    --------
    >>> both = Counts(tp=3, fp=1, fn=0) + Counts(tp=0, fp=0, fn=2)
    >>> both.precision, both.recall, round(both.f1, 3), both.true, both.predicted
    (0.75, 0.6, 0.667, 5, 4)
    >>> Counts().f1, Counts(fp=1).f1, Counts(fn=1).precision
    (1.0, 0.0, 0.0)
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0

    @classmethod
    def of(cls, matched: int, *, predicted: int, true: int) -> Self:
        """Give the counts of a one-to-one matching."""
        return cls(tp=matched, fp=predicted - matched, fn=true - matched)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def true(self) -> int:
        """How many there are in truth."""
        return self.tp + self.fn

    @property
    def predicted(self) -> int:
        """How many were predicted."""
        return self.tp + self.fp

    @property
    def precision(self) -> float:
        """Share of the predicted that is true; 0 if nothing was predicted, 1 if nothing is true either."""
        return _ratio(self.tp, self.predicted, if_nothing=float(self.true == 0))

    @property
    def recall(self) -> float:
        """Share of the true that was predicted; 0 if nothing is true, 1 if nothing was predicted either."""
        return _ratio(self.tp, self.true, if_nothing=float(self.predicted == 0))

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: 2 tp / (2 tp + fp + fn), and 1 if all are 0."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn, if_nothing=1.0)


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
        return _ratio(self.right, self.matched, if_nothing=float(self.unmatched == 0))


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many true foreground and background voxels have each uint8 probability.

    All voxel scores at all thresholds follow from these 512 numbers, which add up over blocks, volumes and
    folds.
    """

    foreground: NDArray[np.int64]  # (256,)
    background: NDArray[np.int64]  # (256,)

    @classmethod
    def empty(cls) -> Self:
        """Give the histogram of no voxels, to add to."""
        return cls(np.zeros(_N_LEVELS, np.int64), np.zeros(_N_LEVELS, np.int64))

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(self.foreground + other.foreground, self.background + other.background)

    def at(self, threshold: float) -> Counts:
        """Count voxels with the prediction cut at `threshold`, inclusive (0 counts as 1/255)."""
        level = level_of(threshold)
        return Counts(
            tp=int(self.foreground[level:].sum()),
            fp=int(self.background[level:].sum()),
            fn=int(self.foreground[:level].sum()),
        )

    def curve(self) -> pd.DataFrame:
        """Give precision, recall and F1 by rising threshold.

        Returns
        -------
        curve : DataFrame
            Columns threshold, precision, recall, f1; one row per level from 0 (everything is foreground) to
            the highest at which a voxel is left; no row if there is no voxel.
        """
        tp, fp = self._at_or_above()
        some = tp + fp > 0
        tp, fp = tp[some], fp[some]
        n_true = self.foreground.sum()
        return pd.DataFrame(
            {
                "threshold": np.flatnonzero(some) / SCALE,
                "precision": tp / (tp + fp),
                "recall": tp / n_true if n_true else np.zeros(len(tp)),
                "f1": 2 * tp / (tp + fp + n_true),
            }
        )

    def average_precision(self) -> float:
        """Sum the precision over the steps of recall, from the highest threshold down.

        Without interpolation, as in scikit-learn. Without true voxels 0, or 1 if all probabilities are 0 too.
        """
        tp, fp = self._at_or_above()
        n_true = int(tp[0])
        if n_true == 0:
            return float(self.background[1:].sum() == 0)
        gained = self.foreground > 0
        precision = tp[gained] / (tp + fp)[gained]
        return float((precision * self.foreground[gained]).sum() / n_true)

    def best_threshold(self) -> float:
        """Give the threshold of the greatest F1; the middle one of several, and 0.5 without true voxels."""
        tp, fp = self._at_or_above()
        n_true = tp[0]
        if n_true == 0:
            return 0.5
        f1 = 2 * tp[1:] / (tp[1:] + fp[1:] + n_true)  # level 0 is no choice: see level_of
        best = np.flatnonzero(f1 == f1.max()) + 1
        return float(best[len(best) // 2] / SCALE)

    def _at_or_above(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give foreground and background voxels at or above each level."""
        return np.cumsum(self.foreground[::-1])[::-1], np.cumsum(self.background[::-1])[::-1]


def histogram_of(
    probability_zyx: Probabilities, foreground_zyx: Mask, *, mask_zyx: Mask | None = None
) -> Histogram:
    """Count the voxels of one channel by probability and truth.

    Parameters
    ----------
    probability_zyx : (Z, Y, X) array of uint8
        255 is probability 1.
    foreground_zyx : (Z, Y, X) array of bool
        Where the channel is in truth.
    mask_zyx : (Z, Y, X) array of bool, optional
        Only voxels where it is set are counted.

    Raises
    ------
    ValueError
        If shapes differ or the types are not uint8 and bool.

    Examples
    --------
    >>> p = np.array([[[0, 10, 200, 250]]], np.uint8)
    >>> h = histogram_of(p, np.array([[[False, True, False, True]]]))
    >>> h.at(0.5), h.average_precision(), h.at(h.best_threshold()).f1
    (Counts(tp=1, fp=1, fn=1), 0.8333333333333333, 0.8)
    """
    given = [probability_zyx, foreground_zyx, *([] if mask_zyx is None else [mask_zyx])]
    if len({volume.shape for volume in given}) != 1 or probability_zyx.ndim != 3:
        raise ValueError(f"volumes must have one shape z, y, x; got {[volume.shape for volume in given]}")
    if probability_zyx.dtype != np.uint8 or any(volume.dtype != np.bool_ for volume in given[1:]):
        raise ValueError(f"want uint8 probabilities and bool masks, got {[str(v.dtype) for v in given]}")
    counts = np.zeros(2 * _N_LEVELS, np.int64)
    for z, section in enumerate(
        probability_zyx
    ):  # bincount widens to 8 bytes a voxel: not for a whole volume
        level = section + foreground_zyx[z] * np.uint16(_N_LEVELS)
        counts += np.bincount(
            level.ravel() if mask_zyx is None else level[mask_zyx[z]], minlength=2 * _N_LEVELS
        )
    return Histogram(foreground=counts[_N_LEVELS:], background=counts[:_N_LEVELS])


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
