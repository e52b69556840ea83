"""The CREMI challenge's scores: F-score of partners, and how far clefts are from clefts.

The challenge's own scorer fills a matrix of all predicted by all true partners and transforms whole volumes;
here the few candidate pairs are matched on a sparse graph, and distances are asked for at cleft voxels alone.
The numbers are the same.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from synmlops.params import SynmlopsError
from synmlops.synapses.matching import match_partners
from synmlops.synapses.voxels import Counts
from synmlops.volumes.cremi import (
    CLEFTS,
    LEAST_SPECIAL,
    NEURONS,
    Annotations,
    Nm,
    grid_of,
    has_layer,
    neurons_at,
    open_layer,
    read_annotations,
)
from synmlops.volumes.store import Volume

THRESHOLD_NM = 400.0  # of the challenge: both ends of a match lie within it
CLEFT_THRESHOLD_NM = 200.0  # of the challenge: a cleft voxel farther from any other is wrong
_QUERY = 1 << 20  # voxels whose distance is asked for at once


@dataclass(frozen=True)
class CleftErrors:
    """Cleft voxels of one file, by their distance to the nearest cleft voxel of the other."""

    voxels: int
    wrong: int  # farther than the threshold
    mean_nm: float | None  # None where either file has no cleft


@dataclass(frozen=True)
class CremiScores:
    """What the challenge scores, where the files hold it."""

    threshold_nm: float
    partners: Counts | None
    false_positives: CleftErrors | None  # predicted clefts against true ones
    false_negatives: CleftErrors | None
    notes: tuple[str, ...] = ()

    def flat(self) -> dict[str, float | int | None]:
        """Give all scores by name; what could not be scored is left out, a mean over no voxel is None."""
        flat: dict[str, float | int | None] = {"threshold_nm": self.threshold_nm}
        if self.partners is not None:
            flat |= {
                "fscore": self.partners.f1,
                "precision": self.partners.precision,
                "recall": self.partners.recall,
                "false_positives": self.partners.fp,
                "false_negatives": self.partners.fn,
                "matches": self.partners.tp,
            }
        errors = {"false_positives": self.false_positives, "false_negatives": self.false_negatives}
        known = {name: error for name, error in errors.items() if error is not None}
        flat |= {f"cleft_{name}": error.wrong for name, error in known.items()}
        flat |= {f"cleft_mean_distance_{name}_nm": error.mean_nm for name, error in known.items()}
        return flat


def score_cremi(truth: Path, predicted: Path, *, threshold_nm: float = THRESHOLD_NM) -> CremiScores:
    """Score a CREMI file against another, as the challenge does.

    Partners are scored where the truth has annotations and neuron ids, clefts where both files have them.

    Parameters
    ----------
    truth, predicted : Path
    threshold_nm : float
        Greatest distance of a match at either end, inclusive.

    Raises
    ------
    SynmlopsError
        If a file cannot be read or contradicts itself, a true point lies outside the truth's segmentation,
        shapes or voxel sizes of the clefts differ, or there is nothing to score.

    Source: cremi.org; github.com/cremi/cremi_python, evaluation.
    """
    if not (threshold_nm > 0 and np.isfinite(threshold_nm)):
        raise SynmlopsError(f"threshold {threshold_nm}: must be a positive number of nm; CREMI's is 400")
    notes: list[str] = []
    partners = _partners_of_files(truth, predicted, threshold_nm, notes)
    clefts: tuple[CleftErrors | None, CleftErrors | None] = (None, None)
    without = [str(path) for path in (truth, predicted) if not has_layer(path, CLEFTS)]
    if without:
        notes.append(f"clefts not scored: {' and '.join(without)} has no {CLEFTS}")
    else:
        with open_layer(truth, CLEFTS) as true, open_layer(predicted, CLEFTS) as found:
            clefts = score_clefts(found, true)
    if partners is None and clefts[0] is None:
        raise SynmlopsError(f"nothing to score: {'; '.join(notes)}")
    return CremiScores(threshold_nm, partners, *clefts, notes=tuple(notes))


def score_cremi_partners(
    predicted: Annotations, true: Annotations, neurons: Volume, *, threshold_nm: float
) -> Counts:
    """Match predicted to true partners as the challenge does.

    A pair may match one on the same two neurons, in order, if both ends lie within the threshold; at the
    least total cost, where a match costs the mean of its distances and a pair left over twice the threshold.
    That is the assignment in the challenge's square matrix filled with twice the threshold: each match takes
    one such entry away. Where matchings of different sizes cost exactly the same, any of them may be counted,
    here as there.

    Parameters
    ----------
    predicted, true : Annotations
    neurons : Volume
        The truth's segmentation, from `open_layer`. The neuron of a point is that of the nearest voxel;
        halves go to the even one, as Python's `round` does. A predicted point outside is in no neuron and
        matches nothing.
    threshold_nm : float

    Raises
    ------
    SynmlopsError
        If a true point lies outside the segmentation.
    """
    grid = grid_of(neurons)
    points = [each.pairs_nm(grid.offset_nm) for each in (predicted, true)]
    lookups = [neurons_at(neurons, each) for each in points]
    (p_ids, p_inside), (t_ids, t_inside) = lookups
    if not t_inside.all():
        row, side = np.argwhere(~t_inside)[0]
        raise SynmlopsError(
            f"{neurons.name}: the true annotation {true.partners[row, side]} lies outside of it, at "
            f"{(points[1][row, side] + grid.offset_nm).tolist()} nm (z y x), {(~t_inside).sum()} such; "
            "check the offsets of volume and annotations"
        )
    kept = p_inside.all(axis=1)
    matches = match_partners(
        points[0][kept],
        points[1],
        radius_nm=threshold_nm,
        predicted_neurons=p_ids[kept],
        true_neurons=t_ids,
    )
    return Counts.of(len(matches), predicted=len(points[0]), true=len(points[1]))


def score_clefts(
    predicted: Volume, true: Volume, *, threshold_nm: float = CLEFT_THRESHOLD_NM
) -> tuple[CleftErrors, CleftErrors]:
    """Measure predicted cleft voxels against true ones, and true ones against predicted.

    Memory goes with the cleft voxels, about 150 bytes each, not with the volume.

    Parameters
    ----------
    predicted, true : Volume
        From `open_layer`. 2**64 - 1 is background; 2**64 - 2 and - 3, outside and transparent, are no cleft
        either, where the challenge's scorer would take them for one.
    threshold_nm : float
        A voxel farther than this is wrong.

    Returns
    -------
    false_positives, false_negatives : CleftErrors

    Raises
    ------
    SynmlopsError
        If the volumes do not have the same shape and voxel size.
    """
    voxel_nm = grid_of(true).voxel_nm
    if predicted.shape != true.shape or grid_of(predicted).voxel_nm != voxel_nm:
        raise SynmlopsError(
            f"{predicted.name}: has {predicted.shape} voxels of {grid_of(predicted).voxel_nm} nm, the truth "
            f"{true.name} has {true.shape} of {voxel_nm}; clefts are compared voxel by voxel, make them alike"
        )
    found, wanted = _cleft_voxels(predicted), _cleft_voxels(true)
    shape = true.shape
    return (
        _errors(found, wanted, shape=shape, voxel_nm=voxel_nm, threshold_nm=threshold_nm),
        _errors(wanted, found, shape=shape, voxel_nm=voxel_nm, threshold_nm=threshold_nm),
    )


def _partners_of_files(truth: Path, predicted: Path, threshold_nm: float, notes: list[str]) -> Counts | None:
    true, found = read_annotations(truth), read_annotations(predicted)
    if not len(true.partners) and not len(found.partners):
        notes.append("partners not scored: neither file has any")
        return None
    if not has_layer(truth, NEURONS):
        notes.append(f"partners not scored: {truth} has no {NEURONS}")
        return None
    with open_layer(truth, NEURONS) as neurons:
        counts = score_cremi_partners(found, true, neurons, threshold_nm=threshold_nm)
        _, inside = neurons_at(neurons, found.pairs_nm(grid_of(neurons).offset_nm))
    outside = int((~inside.all(axis=1)).sum())
    if outside:
        notes.append(f"{outside} predicted pairs lie outside the truth's segmentation: they match nothing")
    return counts


def _cleft_voxels(clefts: Volume) -> NDArray[np.int64]:
    """Give the places of cleft voxels in the raveled volume, ascending."""
    section = int(np.prod(clefts.shape[1:]))
    flat = [np.flatnonzero(slab < LEAST_SPECIAL) + z * section for z, slab in clefts.slabs()]
    return np.concatenate(flat).astype(np.int64)


def _errors(
    voxels: NDArray[np.int64],
    others: NDArray[np.int64],
    *,
    shape: tuple[int, ...],
    voxel_nm: Nm,
    threshold_nm: float,
) -> CleftErrors:
    if not len(voxels) or not len(others):
        return CleftErrors(len(voxels), len(voxels), None)
    size = np.asarray(voxel_nm, np.float64)
    place = np.searchsorted(others, voxels).clip(max=len(others) - 1)
    apart = voxels[others[place] != voxels]  # the rest lie on a voxel of the others, at distance 0
    targets = np.stack(np.unravel_index(others, shape), axis=1)
    tree = cKDTree(targets * size, balanced_tree=False)
    total, wrong = 0.0, 0
    for start in range(0, len(apart), _QUERY):
        at = np.stack(np.unravel_index(apart[start : start + _QUERY], shape), axis=1)
        _, nearest = tree.query(at * size)
        # from whole voxels again, as a distance transform does: no rounding of positions at the threshold
        distance = np.sqrt((((at - targets[nearest]) * size) ** 2).sum(axis=1))
        total += float(distance.sum())
        wrong += int((distance > threshold_nm).sum())
    return CleftErrors(len(voxels), wrong, total / len(voxels))
