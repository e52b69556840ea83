"""All scores of a predicted region against its truth, and their sum over regions and folds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.blockwise.grid import BlockGrid
from synmlops.params import EvaluateParams, LabelKind, SynmlopsError
from synmlops.synapses.decoding import decode_blocks
from synmlops.synapses.instances import Instances, Probabilities, decode_pairs, decode_union, sites_of
from synmlops.synapses.metrics import InstanceScores, score_instances, score_partners
from synmlops.synapses.voxels import Counts, Histogram, add_by_key
from synmlops.volumes.prepared import POST, PRE, Box
from synmlops.volumes.store import Grid


def decode(
    probabilities_czyx: Probabilities,
    *,
    threshold: float,
    params: EvaluateParams,
    voxel_nm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Instances:
    """Decode instances: pairs from three channels, whole synapses from the union channel alone.

    The voxel size tells what is near where `params.split` takes touching synapses apart.
    """
    shape = probabilities_czyx.shape[1], probabilities_czyx.shape[2], probabilities_czyx.shape[3]
    whole = BlockGrid(Box((0, 0, 0), shape), shape)
    made: list[Instances] = []

    def out(kind: np.dtype[np.unsignedinteger]) -> Instances:
        made.append(np.zeros(shape, kind))
        return made[0]

    decode_blocks(
        probabilities_czyx, blocks=whole, grid=Grid(voxel_nm), params=params, threshold=threshold, out=out
    )
    return made[0]


def refuse_unscorable(params: EvaluateParams) -> None:
    """Refuse options of decoding that leave nothing to compare with a label.

    Raises
    ------
    SynmlopsError
    """
    if params.rule != "polarity":
        return
    if params.polarity.semantic:
        raise SynmlopsError(
            "evaluate.polarity.semantic: true leaves no instances to score; use false here, and true for "
            "`synmlops decode` alone"
        )
    if params.polarity.scale_zyx != (1.0, 1.0, 1.0):
        raise SynmlopsError(
            f"evaluate.polarity.scale_zyx: instances scaled by {list(params.polarity.scale_zyx)} do not lie "
            "on the voxels of the label; use [1.0, 1.0, 1.0] here, and others for `synmlops decode` alone"
        )


def true_instances(label_zyx: NDArray[np.unsignedinteger], kind: LabelKind, *, sides: bool) -> Instances:
    """Give the instances that a label stands for.

    Parameters
    ----------
    label_zyx : (Z, Y, X) array of unsigned int
    kind : {"pairs", "semantic", "union"}
        A pairs label is its own instances; in the others a synapse is a connected component.
    sides : bool
        True for ids in the pairs convention, False for one id per synapse.

    Examples
    --------
    >>> label = np.array([[[1, 2, 0, 0, 2, 1]]], np.uint8)
    >>> true_instances(label, "semantic", sides=True)
    array([[[1, 2, 0, 0, 4, 3]]], dtype=uint16)
    >>> true_instances(label, "pairs", sides=False)
    array([[[1, 1, 0, 0, 1, 1]]], dtype=uint8)
    """
    if kind == "pairs":
        return label_zyx if sides else sites_of(label_zyx)
    if kind == "semantic" and sides:
        planes = np.stack([label_zyx == PRE, label_zyx == POST, label_zyx != 0]).astype(np.uint8) * 255
        return decode_pairs(planes, threshold=0.5, side_threshold=0.5, min_voxels=1)
    return decode_union((label_zyx != 0).astype(np.uint8) * np.uint8(255), threshold=0.5, min_voxels=1)


@dataclass(frozen=True)
class Scores:
    """Scores of one region or, added up, of many."""

    histograms: dict[str, Histogram] = field(default_factory=dict)  # by channel
    voxels: dict[str, Counts] = field(default_factory=dict)  # by channel, at the operating point
    instances: InstanceScores = InstanceScores()
    partners: Counts | None = None  # None where no label knows the sides
    partners_with_neurons: Counts | None = None  # None where there is no segmentation

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(
            add_by_key(self.histograms, other.histograms),
            add_by_key(self.voxels, other.voxels),
            self.instances + other.instances,
            _add_known(self.partners, other.partners),
            _add_known(self.partners_with_neurons, other.partners_with_neurons),
        )

    def flat(self) -> dict[str, float]:
        """Give all scores by name, for metrics.json and MLflow; what is not known is left out."""
        flat: dict[str, float] = {}
        for name, counts in self.voxels.items():
            flat |= _named(f"voxel_{name}", counts)
            flat[f"voxel_{name}_average_precision"] = self.histograms[name].average_precision()
        flat |= _named("detection", self.instances.by_iou, counted=True)
        flat |= _named("detection_centroid", self.instances.by_centroid)
        if self.partners is not None:
            flat["direction_accuracy"] = self.instances.direction.accuracy
            flat |= _named("partner", self.partners, counted=True)
        if self.partners_with_neurons is not None:
            flat |= _named("partner_neurons", self.partners_with_neurons)
        return flat


@dataclass(frozen=True)
class Tables:
    """Predicted and true partners of a region, and whether both know the neurons."""

    predicted: pd.DataFrame
    true: pd.DataFrame
    with_neurons: bool


def score_region(
    histograms: Mapping[str, Histogram],
    predicted: Instances,
    true: Instances,
    *,
    threshold: float,
    voxel_nm: tuple[float, float, float],
    tables: Tables | None,
    params: EvaluateParams,
) -> Scores:
    """Score one region at an operating point.

    Parameters
    ----------
    histograms : mapping
        From `voxel_histograms`.
    predicted, true : (Z, Y, X) array of unsigned int
        In the pairs convention if `tables` is given, else one id per synapse; 0 where the label is not to be
        trusted.
    threshold : float
        Operating point, for the voxel scores.
    voxel_nm : (3,) float
    tables : Tables or None
        Partner tables; None where the sides are not known.
    params : EvaluateParams
        Limits of the matchings.
    """
    instances = score_instances(
        predicted,
        true,
        pairs=tables is not None,
        voxel_nm=voxel_nm,
        iou=params.iou,
        centroid_nm=params.centroid_nm,
    )
    partners = with_neurons = None
    if tables is not None:
        partners = _partner_counts(tables, with_neurons=False, params=params)
        with_neurons = (
            _partner_counts(tables, with_neurons=True, params=params) if tables.with_neurons else None
        )
    voxels = {name: histogram.at(threshold) for name, histogram in histograms.items()}
    return Scores(dict(histograms), voxels, instances, partners, with_neurons)


def _partner_counts(tables: Tables, *, with_neurons: bool, params: EvaluateParams) -> Counts:
    return score_partners(
        tables.predicted, tables.true, radius_nm=params.radius_nm, with_neurons=with_neurons
    )


def _add_known(one: Counts | None, other: Counts | None) -> Counts | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _named(name: str, counts: Counts, *, counted: bool = False) -> dict[str, float]:
    scores = {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
    if counted:
        scores |= {"true": float(counts.true), "predicted": float(counts.predicted)}
    return {f"{name}_{score}": value for score, value in scores.items()}
