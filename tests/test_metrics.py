"""Scores: worked answers, brute-force references, and what other groups' scorers give."""

import itertools
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score

from synmlops.synapses import matching
from synmlops.synapses.instances import sites_of
from synmlops.synapses.matching import match_overlaps, match_partners, match_points, overlaps_of
from synmlops.synapses.metrics import (
    Direction,
    InstanceScores,
    centroids_of,
    score_instances,
    score_partners,
)
from synmlops.synapses.partners import neurons_under, partners_of
from synmlops.synapses.voxels import Counts, Histogram, histogram_of
from synmlops.volumes.table import empty_table

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="reference outputs of other scorers are not beside the repository"
)
VOXEL_NM = (40.0, 8.0, 8.0)


# -- counts and direction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "precision", "recall", "f1"),
    [
        (Counts(), 1, 1, 1),
        (Counts(fp=3), 0, 0, 0),
        (Counts(fn=3), 0, 0, 0),
        (Counts(fp=1, fn=1), 0, 0, 0),
        (Counts(tp=1, fp=1, fn=3), 0.5, 0.25, 1 / 3),
    ],
)
def test_counts_by_hand(counts: Counts, precision: float, recall: float, f1: float) -> None:
    assert (counts.precision, counts.recall, counts.f1) == pytest.approx((precision, recall, f1))


def test_direction_by_hand() -> None:
    assert Direction().accuracy == 1
    assert Direction(unmatched=1).accuracy == 0
    assert Direction(right=1, matched=4, unmatched=9).accuracy == 0.25


# -- voxels -----------------------------------------------------------------------------------------------


def _random_channel(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    truth = rng.random((5, 9, 11)) < 0.2
    probability = (rng.integers(0, 12, truth.shape) * 15 + 80 * truth).astype(np.uint8)
    return probability, truth, rng.random(truth.shape) < 0.7


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_scikit_learn(seed: int) -> None:
    probability, truth, mask = _random_channel(seed)
    whole = histogram_of(probability, truth).average_precision()
    assert whole == pytest.approx(average_precision_score(truth.ravel(), probability.ravel()), abs=1e-12)
    masked = histogram_of(probability, truth, mask_zyx=mask).average_precision()
    assert masked == pytest.approx(average_precision_score(truth[mask], probability[mask]), abs=1e-12)


@pytest.mark.parametrize("threshold", [0, 1 / 255, 0.3, 95 / 255, 120 / 255, 0.5, 1])
def test_voxel_counts_are_those_of_the_cut_volume(threshold: float) -> None:
    probability, truth, mask = _random_channel(4)
    assert {95, 120} <= set(probability[mask].tolist())  # thresholds that some voxels hit exactly
    cut = (probability / 255 >= threshold) & (probability > 0)
    expected = Counts(
        tp=int((cut & truth & mask).sum()),
        fp=int((cut & ~truth & mask).sum()),
        fn=int((~cut & truth & mask).sum()),
    )
    assert histogram_of(probability, truth, mask_zyx=mask).at(threshold) == expected


def test_the_best_threshold_has_the_greatest_f1() -> None:
    histogram = histogram_of(*_random_channel(5)[:2])
    best = max(histogram.at(level / 255).f1 for level in range(1, 256))
    assert histogram.at(histogram.best_threshold()).f1 == best
    curve = histogram.curve()
    assert curve.f1.max() == pytest.approx(best)
    at = histogram.at(curve.threshold[40])
    assert (at.precision, at.recall) == pytest.approx((curve.precision[40], curve.recall[40]))


def test_the_best_threshold_lies_amid_equals() -> None:
    probability = np.array([[[100, 100, 201, 201]]], np.uint8)
    assert histogram_of(probability, probability > 150).best_threshold() == 151 / 255


def test_histograms_of_blocks_add_up_to_the_whole() -> None:
    probability, truth, mask = _random_channel(6)
    blocks = Histogram.empty()
    for part in (slice(0, 2), slice(2, 5)):
        blocks += histogram_of(probability[part], truth[part], mask_zyx=mask[part])
    whole = histogram_of(probability, truth, mask_zyx=mask)
    np.testing.assert_array_equal(blocks.foreground, whole.foreground)
    np.testing.assert_array_equal(blocks.background, whole.background)


def test_voxel_scores_without_truth_or_prediction() -> None:
    nothing, something = np.zeros((1, 1, 4), np.uint8), np.full((1, 1, 4), 200, np.uint8)
    none, all_true = np.zeros((1, 1, 4), bool), np.ones((1, 1, 4), bool)
    for probability, truth, score in ((nothing, none, 1), (something, none, 0), (nothing, all_true, 0)):
        assert histogram_of(probability, truth).at(0.5).f1 == score
    assert histogram_of(nothing, none).average_precision() == 1
    assert histogram_of(something, none).average_precision() == 0
    assert histogram_of(something, all_true).average_precision() == 1
    assert histogram_of(something, none).best_threshold() == 0.5
    assert len(Histogram.empty().curve()) == 0
    assert (Histogram.empty().average_precision(), Histogram.empty().at(0.5).f1) == (1, 1)
    assert np.isfinite(histogram_of(something, none).curve().to_numpy()).all()


def test_voxel_arrays_that_do_not_fit_are_refused() -> None:
    probability, truth, _ = _random_channel(7)
    with pytest.raises(ValueError, match="shape"):
        histogram_of(probability, truth[1:])
    with pytest.raises(ValueError, match="uint8"):
        histogram_of(probability / 255, truth)  # type: ignore[arg-type]


# -- instances by overlap and by centroid -----------------------------------------------------------------


def _random_instances(seed: int, kind: type = np.uint16) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Make 8 true instances, and the same shifted with a third of the blocks renamed."""
    rng = np.random.default_rng(seed)
    true = np.kron(rng.integers(0, 9, (3, 4, 4)), np.ones((2, 3, 3), int))
    predicted = np.roll(true, 1, axis=2)
    predicted = np.where(rng.random(true.shape) < 0.25, rng.integers(0, 12, true.shape), predicted)
    return predicted.astype(kind), true.astype(kind)


@pytest.mark.parametrize("largest", [100, 2**24, 2**63])
@pytest.mark.parametrize("seed", range(3))
def test_overlaps_are_those_counted_pair_by_pair(seed: int, largest: int) -> None:
    predicted, true = _random_instances(seed, np.uint64)
    predicted[predicted == 3] = largest
    true[true == 5] = largest + 1
    mask = np.random.default_rng(seed).random(true.shape) < 0.8
    table = overlaps_of(predicted, true, mask=mask)
    p_ids, t_ids = np.unique(predicted[mask & (predicted > 0)]), np.unique(true[mask & (true > 0)])
    assert table.predicted_ids.tolist() == p_ids.tolist()
    assert table.true_ids.tolist() == t_ids.tolist()
    assert table.true_voxels.tolist() == [((true == t) & mask).sum() for t in t_ids]
    assert table.predicted_voxels.tolist() == [((predicted == p) & mask).sum() for p in p_ids]
    shared = {(p, t): ((predicted == p) & (true == t) & mask).sum() for p in p_ids for t in t_ids}
    found = {
        (table.predicted_ids[p], table.true_ids[t]): n
        for (p, t), n in zip(table.pairs, table.voxels, strict=True)
    }
    assert found == {pair: n for pair, n in shared.items() if n}


@pytest.mark.parametrize("seed", range(3))
def test_sites_of_a_table_are_the_table_of_sites(seed: int) -> None:
    predicted, true = _random_instances(seed)
    merged = overlaps_of(predicted, true).by_site()
    direct = overlaps_of(sites_of(predicted), sites_of(true))
    for name in ("predicted_ids", "predicted_voxels", "true_ids", "true_voxels", "pairs", "voxels"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(direct, name))


@pytest.mark.parametrize("iou", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_overlap_matching_is_the_best_of_all(seed: int, iou: float) -> None:
    predicted, true = _random_instances(seed)
    table = overlaps_of(predicted % 6, true % 6)
    share = np.zeros((len(table.predicted_ids), len(table.true_ids)))
    share[tuple(table.pairs.T)] = table.iou()
    gain = np.where((share >= iou) & (share > 0), 100 + share, 0)
    matches = match_overlaps(table, iou=iou)
    assert len(np.unique(matches[:, 0])) == len(np.unique(matches[:, 1])) == len(matches)
    assert gain[tuple(matches.T)].sum() == pytest.approx(_best_total(gain))
    assert gain[tuple(matches.T)].all()


def _best_total(gain: NDArray[np.float64]) -> float:
    """Try all assignments."""
    rows, columns = gain.shape
    if rows > columns:
        return _best_total(gain.T)
    return max(
        (
            sum(gain[i, j] for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(columns), rows)
        ),
        default=0.0,
    )


def test_more_matches_come_before_greater_overlap() -> None:
    # predicted 1 and true 1 are the closest pair; but apart, each has another to go with
    true = np.array([[[1] * 10 + [2] * 2]], np.uint16)
    predicted = np.array([[[2] * 2 + [1] * 9 + [0]]], np.uint16)
    table = overlaps_of(predicted, true)
    assert table.iou().round(3).tolist() == [0.727, 0.1, 0.2]
    assert match_overlaps(table, iou=0.1).tolist() == [[0, 1], [1, 0]]
    assert match_overlaps(table, iou=0.2).tolist() == [[0, 0]]


def test_iou_is_inclusive() -> None:
    table = overlaps_of(np.array([[[1, 1, 0]]], np.uint8), np.array([[[1, 0, 0]]], np.uint8))
    assert (len(match_overlaps(table, iou=0.5)), len(match_overlaps(table, iou=0.51))) == (1, 0)


@needs_golden
def test_instance_matching_equals_the_reference() -> None:
    with np.load(GOLDEN / "pytc" / "instance_matching.npz") as golden:
        table = overlaps_of(golden["pred"], golden["gt"])
        matched = len(match_overlaps(table, iou=0.5))
        counts = Counts.of(matched, predicted=len(table.predicted_ids), true=len(table.true_ids))
        assert (counts.tp, counts.fp, counts.fn) == tuple(golden["counts_05"])
        assert counts.f1 == pytest.approx(float(golden["f1_05"]), abs=1e-12)


def test_centroids_match_within_the_distance_inclusive() -> None:
    true, predicted = np.zeros((2, 1, 9, 20), np.uint16)
    true[0, 0, 0:2], true[0, 8, 0:2] = (1, 2), (3, 4)  # two sites
    predicted[0, 0, 10:12] = (1, 2)  # 80 nm from the first
    options = {"pairs": True, "voxel_nm": VOXEL_NM}
    near = score_instances(predicted, true, centroid_nm=80, **options)  # type: ignore[arg-type]
    assert near.by_centroid == Counts(tp=1, fn=1)
    assert near.by_iou == Counts(fp=1, fn=2)
    far = score_instances(predicted, true, centroid_nm=79.9, **options)  # type: ignore[arg-type]
    assert far.by_centroid == Counts(fp=1, fn=2)


def test_centroids_by_hand() -> None:
    labels = np.zeros((2, 1, 9), np.uint16)
    labels[0, 0, 2], labels[1, 0, 4], labels[1, 0, 8] = 1, 2, 5
    mask = np.ones(labels.shape, bool)
    assert centroids_of(labels, pairs=True, voxel_nm=VOXEL_NM).tolist() == [[20, 0, 24], [40, 0, 64]]
    assert centroids_of(labels, pairs=False, voxel_nm=VOXEL_NM).tolist()[1] == [40, 0, 32]
    mask[1] = False
    assert centroids_of(labels, pairs=True, voxel_nm=VOXEL_NM, mask=mask).tolist() == [[0, 0, 16]]


def test_instance_scores_without_truth_or_prediction() -> None:
    nothing, one = np.zeros((1, 1, 4), np.uint16), np.array([[[0, 1, 2, 0]]], np.uint16)
    for predicted, true, score in (
        (nothing, nothing, 1),
        (one, nothing, 0),
        (nothing, one, 0),
        (one, one, 1),
    ):
        scores = score_instances(predicted, true, pairs=True, voxel_nm=VOXEL_NM)
        assert (scores.by_iou.f1, scores.by_centroid.f1, scores.direction.accuracy) == (score,) * 3


def test_what_the_mask_hides_does_not_exist() -> None:
    true = np.array([[[1, 2, 0, 3, 4]]], np.uint16)
    predicted = np.array([[[2, 1, 0, 3, 4]]], np.uint16)
    mask = np.array([[[False, False, True, True, True]]])
    scores = score_instances(predicted, true, pairs=True, voxel_nm=VOXEL_NM, mask=mask)
    assert scores == InstanceScores(Counts(tp=1), Counts(tp=1), Direction(right=1, matched=1))


# -- direction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "right"),
    [
        ([1, 1, 2, 2], 1),
        ([2, 2, 1, 1], 0),
        ([1, 2, 1, 2], 0),  # a tie
        ([1, 1, 1, 2], 1),  # 3 voxels for, 1 against
        ([0, 2, 2, 2], 1),
        ([1, 1, 0, 0], 1),  # one side only
        ([0, 0, 1, 1], 0),
    ],
)
def test_direction_of_one_site(predicted: list[int], right: int) -> None:
    true = np.array([[[1, 1, 2, 2]]], np.uint16)
    scores = score_instances(np.array([[predicted]], np.uint16), true, pairs=True, voxel_nm=VOXEL_NM)
    assert scores.direction == Direction(right=right, matched=1)


def test_scores_add_up_over_volumes() -> None:
    one = InstanceScores(Counts(1, 2, 3), Counts(4, 5, 6), Direction(1, 2, 3))
    assert one + one == InstanceScores(Counts(2, 4, 6), Counts(8, 10, 12), Direction(2, 4, 6))


def test_swapped_sides_ruin_direction_and_partners_but_not_detection() -> None:
    labels, neurons = _tissue()
    swapped = np.where(labels == 0, 0, ((labels - 1) ^ 1) + 1).astype(np.uint16)  # 2n-1 <-> 2n
    true, predicted, wrong = (
        partners_of(volume, voxel_nm=VOXEL_NM, neurons=neurons) for volume in (labels, labels, swapped)
    )
    assert len(true) == 12
    right = score_instances(labels, labels, pairs=True, voxel_nm=VOXEL_NM)
    ruined = score_instances(swapped, labels, pairs=True, voxel_nm=VOXEL_NM)
    assert (right.by_iou.f1, right.direction.accuracy) == (1, 1)
    assert (ruined.by_iou.f1, ruined.by_centroid.f1, ruined.direction.accuracy) == (1, 1, 0)
    for with_neurons in (True, False):
        options = {"radius_nm": 60.0, "with_neurons": with_neurons}
        assert score_partners(predicted, true, **options).f1 == 1  # type: ignore[arg-type]
        assert score_partners(wrong, true, **options).f1 == 0  # type: ignore[arg-type]
    # even where both ends lie within reach, the neurons tell the direction
    assert score_partners(wrong, true, radius_nm=400, with_neurons=True).f1 == 0
    assert score_partners(wrong, true, radius_nm=400, with_neurons=False).f1 > 0


def _tissue() -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Make 12 sites of 4 x 8 x 16 voxels, pre below and post above, each side in a neuron of its own."""
    labels, neurons = np.zeros((8, 60, 120), np.uint16), np.zeros((8, 60, 120), np.uint32)
    for n, (y, x) in enumerate(itertools.product((5, 25, 45), (5, 35, 65, 95)), start=1):
        labels[2:6, y : y + 8, x : x + 8], labels[2:6, y : y + 8, x + 8 : x + 16] = 2 * n - 1, 2 * n
        neurons[:, y : y + 8, x : x + 8], neurons[:, y : y + 8, x + 8 : x + 16] = 100 + n, 200 + n
    return labels, neurons


# -- partners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_neurons", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_partner_matching_is_the_best_of_all(seed: int, with_neurons: bool) -> None:
    rng = np.random.default_rng(seed)
    n_predicted, n_true = rng.integers(1, 8, 2)
    predicted, true = (rng.uniform(0, 60, (n, 2, 3)) for n in (n_predicted, n_true))
    neurons = [rng.integers(0, 2, (n, 2)) for n in (n_predicted, n_true)] if with_neurons else [None, None]
    matches = match_partners(
        predicted, true, radius_nm=45, predicted_neurons=neurons[0], true_neurons=neurons[1]
    )
    distance = np.linalg.norm(predicted[:, None] - true[None], axis=3)
    gain = np.where((distance <= 45).all(axis=2), 90 - distance.mean(axis=2), 0)
    if neurons[0] is not None and neurons[1] is not None:
        gain *= (neurons[0][:, None] == neurons[1][None]).all(axis=2)
    assert len(np.unique(matches[:, 0])) == len(np.unique(matches[:, 1])) == len(matches)
    assert gain[tuple(matches.T)].sum() == pytest.approx(_best_total(gain))
    assert gain[tuple(matches.T)].all()
    assert matches.tolist() == sorted(matches.tolist())


def test_both_ends_must_lie_within_the_radius() -> None:
    true = [[[0, 0, 0], [0, 0, 100]]]
    for pre, post, matched in ((30, 70, 1), (31, 100, 0), (0, 69, 0), (100, 0, 0)):
        predicted = [[[0, 0, pre], [0, 0, post]]]
        assert len(match_partners(predicted, true, radius_nm=30)) == matched


def test_the_radius_is_inclusive_in_three_dimensions() -> None:
    true = np.zeros((1, 2, 3))
    predicted = np.array([[[0, 240, 320], [400, 0, 0]]])
    assert len(match_partners(predicted, true, radius_nm=400)) == 1
    assert len(match_partners(predicted, true, radius_nm=399.99)) == 0


def test_least_total_distance_beats_the_nearest() -> None:
    predicted = [[[0, 0, x], [0, 0, x]] for x in (10, 22)]
    true = [[[0, 0, x], [0, 0, x]] for x in (0, 12)]
    assert match_partners(predicted, true, radius_nm=30).tolist() == [[0, 0], [1, 1]]


def test_one_true_partner_is_found_once() -> None:
    predicted = [[[0, 0, x], [0, 0, x]] for x in (5, 4, 6)]
    assert match_partners(predicted, [[[0, 0, 0], [0, 0, 0]]], radius_nm=30).tolist() == [[1, 0]]


@pytest.mark.parametrize("match", [match_partners, match_points])
def test_matching_nothing_gives_no_match(match) -> None:  # type: ignore[no-untyped-def]
    some = np.zeros((2, 2, 3) if match is match_partners else (2, 3))
    for predicted, true in ((some, []), ([], some), ([], []), (some[:0], some)):
        assert match(predicted, true, radius_nm=9).shape == (0, 2)


def test_wrong_partners_are_refused() -> None:
    good = np.zeros((1, 2, 3))
    for wrong, message in ((np.zeros((1, 3)), r"\(N, 2, 3\)"), (np.full((1, 2, 3), np.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            match_partners(wrong, good, radius_nm=9)
    for radius in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive"):
            match_partners(good, good, radius_nm=radius)
    with pytest.raises(ValueError, match="both"):
        match_partners(good, good, radius_nm=9, predicted_neurons=[[1, 2]])
    with pytest.raises(ValueError, match="true_neurons"):
        match_partners(good, good, radius_nm=9, predicted_neurons=[[1, 2]], true_neurons=[[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        match_points(good, good[0], radius_nm=9)


def test_neuron_ids_beyond_53_bits_are_told_apart() -> None:
    points = np.zeros((1, 2, 3))
    one, other = np.array([[2**63, 2**63 + 1]], np.uint64), np.array([[2**63, 2**63 + 2]], np.uint64)
    for true, n in ((one, 1), (other, 0)):
        matches = match_partners(points, points, radius_nm=1, predicted_neurons=one, true_neurons=true)
        assert len(matches) == n


@pytest.mark.parametrize("batch_pairs", [1, 60, 10**9])
def test_crowded_partners_match_best_however_they_are_batched(
    batch_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_BATCH_PAIRS", batch_pairs)
    rng = np.random.default_rng(0)
    true = np.repeat(rng.uniform(0, 2000, (400, 1, 3)), 2, axis=1)
    predicted = true + rng.normal(0, 100, true.shape)
    matches = match_partners(predicted, true, radius_nm=500)
    distance = np.linalg.norm(predicted[:, None] - true[None], axis=3)
    assert (distance <= 500).all(axis=2).sum() > 1000
    cost = np.where((distance <= 500).all(axis=2), distance.mean(axis=2), 1000)
    best = cost[linear_sum_assignment(cost)].sum()
    assert cost[tuple(matches.T)].sum() + 1000 * (400 - len(matches)) == pytest.approx(best)


def test_empty_tables_score_as_defined() -> None:
    labels, neurons = _tissue()
    some, none = partners_of(labels, voxel_nm=VOXEL_NM, neurons=neurons), empty_table()
    for with_neurons in (True, False):
        options = {"radius_nm": 400.0, "with_neurons": with_neurons}
        assert score_partners(none, none, **options).f1 == 1  # type: ignore[arg-type]
        assert score_partners(some, none, **options) == Counts(fp=12)  # type: ignore[arg-type]
        assert score_partners(none, some, **options) == Counts(fn=12)  # type: ignore[arg-type]


@needs_golden
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_partner_score_equals_that_of_cremi(name: str) -> None:
    expected = json.loads((GOLDEN / "cremi" / "expected.json").read_text())[name]
    predicted, _, _, _ = _read_cremi(GOLDEN / "cremi" / f"{name}_predicted.hdf")
    true, neurons, voxel_nm, offset_nm = _read_cremi(GOLDEN / "cremi" / f"{name}_truth.hdf")
    of_predicted, of_true = (
        neurons_under(points, neurons, voxel_nm=voxel_nm, offset_nm=offset_nm) for points in (predicted, true)
    )
    matches = match_partners(
        predicted,
        true,
        radius_nm=expected["threshold_nm"],
        predicted_neurons=of_predicted,
        true_neurons=of_true,
    )
    counts = Counts.of(len(matches), predicted=len(predicted), true=len(true))
    assert (counts.fp, counts.fn) == (expected["false_positives"], expected["false_negatives"])
    assert counts.tp == expected["matches"]
    assert counts.f1 == pytest.approx(expected["fscore"], abs=1e-9)
    assert counts.precision == pytest.approx(expected["precision"], abs=1e-9)
    assert counts.recall == pytest.approx(expected["recall"], abs=1e-9)


def _read_cremi(
    path: Path,
) -> tuple[NDArray[np.float64], NDArray[np.uint64], list[float], list[float]]:
    """Read partners (world nm), neuron ids, voxel size and offset of a file in CREMI's layout."""
    with h5py.File(path) as file:
        annotations, segmentation = file["annotations"], file["volumes/labels/neuron_ids"]
        place = pd.Series(np.arange(len(annotations["ids"])), index=annotations["ids"][()])
        row = place.loc[annotations["presynaptic_site/partners"][()].ravel()].to_numpy()
        offset = np.asarray(annotations.attrs.get("offset", (0, 0, 0)), float)
        points = annotations["locations"][()][row].reshape(-1, 2, 3) + offset
        return (
            points,
            segmentation[()],
            segmentation.attrs["resolution"].tolist(),
            [float(nm) for nm in segmentation.attrs.get("offset", (0, 0, 0))],
        )
