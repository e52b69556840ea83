"""Voxel scores: per channel, from how many voxels have each probability; they add over blocks and volumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import SCALE
from synmlops.synapses.instances import Mask, Probabilities, level_of
from synmlops.volumes.prepared import BACKGROUND, POST, PRE, UNTRUSTED

_N_LEVELS = SCALE + 1


def ratio(part: float, whole: float, *, if_nothing: float) -> float:
    """Divide, with a value of its own where there is nothing to divide by."""
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
        return ratio(self.tp, self.predicted, if_nothing=float(self.true == 0))

    @property
    def recall(self) -> float:
        """Share of the true that was predicted; 0 if nothing is true, 1 if nothing was predicted either."""
        return ratio(self.tp, self.true, if_nothing=float(self.predicted == 0))

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: 2 tp / (2 tp + fp + fn), and 1 if all are 0."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn, if_nothing=1.0)


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


def voxel_histograms(
    probabilities_czyx: Probabilities,
    sides_zyx: NDArray[np.uint8],
    *,
    names: Sequence[str],
    known: Sequence[str],
) -> dict[str, Histogram]:
    """Count voxels by probability and truth, for each channel that is both predicted and known.

    Parameters
    ----------
    probabilities_czyx : (C, Z, Y, X) array of uint8
        One plane per name in `names`.
    sides_zyx : (Z, Y, X) array of uint8
        Codes of `synmlops.volumes.prepared`; untrusted voxels do not count.
    names, known : sequence of str
        Channels of the probabilities, and those that the label knows.
    """
    trusted = sides_zyx != UNTRUSTED
    truth = {"pre": sides_zyx == PRE, "post": sides_zyx == POST, "union": (sides_zyx != BACKGROUND) & trusted}
    mask = None if trusted.all() else trusted
    return {
        name: histogram_of(plane, truth[name], mask_zyx=mask)
        for name, plane in zip(names, probabilities_czyx, strict=True)
        if name in known
    }


T = TypeVar("T", Counts, Histogram)


def add_by_key(one: Mapping[str, T], other: Mapping[str, T]) -> dict[str, T]:
    """Add two mappings key by key; a key that one lacks is taken from the other."""
    both = dict(one)
    for name, value in other.items():
        both[name] = both[name] + value if name in both else value
    return both
