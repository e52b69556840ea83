"""CREMI's scores are those of the challenge's own scorer, by a way that scales."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment

from synmlops.params import SynmlopsError
from synmlops.synapses.cremi_scores import CleftErrors, score_clefts, score_cremi, score_cremi_partners
from synmlops.volumes.cremi import (
    CLEFTS,
    NEURONS,
    NOTHING,
    POST_TYPE,
    PRE_TYPE,
    Annotations,
    Layer,
    open_layer,
    write_cremi,
)
from synmlops.volumes.store import Grid

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "cremi"
GRID = Grid((40.0, 4.0, 4.0), (80.0, 40.0, 0.0))
NM = 100.0


def annotations(points_nm: Any, *, offset_nm: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Annotations:
    """Number the points of pairs (P, 2, 3)."""
    points = np.asarray(points_nm, np.float64).reshape(-1, 3)
    ids = np.arange(1, len(points) + 1, dtype=np.uint64)
    types = (PRE_TYPE, POST_TYPE) * (len(points) // 2)
    return Annotations(ids, types, points, ids.reshape(-1, 2), offset_nm=offset_nm)


def layer(voxels: NDArray[Any], grid: Grid = GRID) -> Layer:
    return Layer(voxels.shape, grid, [(0, voxels)])


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_challenges_numbers(name: str) -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"reference files are not at {GOLDEN}")
    expected = json.loads((GOLDEN / "expected.json").read_text())[name]
    found = score_cremi(
        GOLDEN / f"{name}_truth.hdf",
        GOLDEN / f"{name}_predicted.hdf",
        threshold_nm=expected["threshold_nm"],
    ).flat()
    assert found == pytest.approx(expected, abs=1e-9)


def dense(
    predicted: NDArray[np.float64], true: NDArray[np.float64], labels: NDArray[np.uint64], fill: float
) -> tuple[int, float]:
    """Give matches and total cost as the challenge does: all pairs against all, in a square matrix."""
    costs = np.full((max(len(predicted), len(true)),) * 2, fill)
    shape = np.array(labels.shape)

    def neuron(point: NDArray[np.float64]) -> int | None:
        at = tuple(round(float(c)) for c in (point - GRID.offset_nm) / GRID.voxel_nm)
        return int(labels[at]) if min(at) >= 0 and (np.array(at) < shape).all() else None

    for i, one in enumerate(predicted):
        for j, other in enumerate(true):
            same = all(
                neuron(a) is not None and neuron(a) == neuron(b) for a, b in zip(one, other, strict=True)
            )
            apart = np.linalg.norm(one - other, axis=1)
            if same and (apart <= NM).all():
                costs[i, j] = apart.mean()
    rows, columns = linear_sum_assignment(costs)
    return int((costs[rows, columns] <= NM).sum()), float(costs[rows, columns].sum())


def test_sparse_equals_dense_with_ties_and_points_outside(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (8, 80, 80)).astype(np.uint64)
    labels[:, :40] = 7  # room for many matches
    write_cremi(tmp_path / "t.hdf", annotations=annotations([]), neurons=layer(labels))
    undecided = 0
    with open_layer(tmp_path / "t.hdf", NEURONS) as neurons:
        for trial in range(150):
            n_true, n_found = rng.integers(0, 12, 2)
            extent = np.array(labels.shape) * GRID.voxel_nm
            true = rng.uniform(0, 0.9, (n_true, 2, 3)) * extent * (0.6, 0.5, 0.5)
            found = rng.uniform(-0.05, 1.05, (n_found, 2, 3)) * extent * (0.6, 0.5, 0.5)
            k = min(n_true, n_found) // 2
            found[:k] = true[:k] + rng.normal(0, 30, (k, 2, 3))
            if (
                trial % 2
            ):  # on a lattice: equal distances, distances of just the threshold, places taken twice
                true, found = np.rint(true / 50) * 50, np.rint(found / 50) * 50
            true, found = true + GRID.offset_nm, found + GRID.offset_nm
            counts = score_cremi_partners(annotations(found), annotations(true), neurons, threshold_nm=NM)
            assert counts.true == n_true
            assert counts.predicted == n_found
            if not n_true and not n_found:
                continue
            # a hair less or more for a pair left over shows whether the rule itself fixes the number of
            # matches
            fewest, most = (dense(found, true, labels, 2 * NM * (1 + hair))[0] for hair in (-1e-9, 1e-9))
            undecided += fewest != most
            assert fewest <= counts.tp <= most
            if fewest == most:
                assert counts.tp == dense(found, true, labels, 2 * NM)[0]
    assert undecided < 10


def test_points_are_in_the_nearest_voxel_and_offsets_count(tmp_path: Path) -> None:
    labels = np.array([[[1, 2, 3]]], np.uint64)
    write_cremi(tmp_path / "t.hdf", annotations=annotations([]), neurons=layer(labels))
    with open_layer(tmp_path / "t.hdf", NEURONS) as neurons:
        true = annotations([[[0, 0, 0], [0, 0, 4]]], offset_nm=(80, 40, 0))
        for x, hits in ((5.9, 1), (6.1, 0)):  # voxel 1 ends at 6 nm
            found = annotations([[[80, 40, 0], [80, 40, x]]])
            assert score_cremi_partners(found, true, neurons, threshold_nm=50).tp == hits
        beyond = annotations([[[80, 40, 0], [80, 40, 4]], [[80, 40, 0], [80, 40, 11]]])
        with pytest.raises(SynmlopsError, match=r"annotation 4 lies outside .* \[80.0, 40.0, 11.0\] nm"):
            score_cremi_partners(true, beyond, neurons, threshold_nm=50)


def test_a_pair_the_wrong_way_round_is_no_match(tmp_path: Path) -> None:
    labels = np.array([[[1, 2]]], np.uint64)
    write_cremi(tmp_path / "t.hdf", annotations=annotations([]), neurons=layer(labels))
    ends = np.array([[80.0, 40, 0], [80, 40, 4]])
    with open_layer(tmp_path / "t.hdf", NEURONS) as neurons:
        counts = score_cremi_partners(
            annotations([ends[::-1]]), annotations([ends]), neurons, threshold_nm=50
        )
    assert (counts.tp, counts.fp, counts.fn) == (0, 1, 1)


def _write_clefts(path: Path, clefts: NDArray[np.uint64], grid: Grid = GRID) -> Path:
    write_cremi(path, annotations=annotations([]), clefts=layer(clefts, grid))
    return path


def test_cleft_distances_are_those_of_a_distance_transform(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    volumes = [(rng.random((9, 40, 40)) < share).astype(np.uint64) for share in (0.0006, 0.0008)]
    paths = [_write_clefts(tmp_path / f"{n}.hdf", each) for n, each in enumerate(volumes)]
    with open_layer(paths[0], CLEFTS) as found, open_layer(paths[1], CLEFTS) as true:
        errors = score_clefts(found, true, threshold_nm=50)
    for error, (mine, other) in zip(errors, (volumes, volumes[::-1]), strict=True):
        apart = distance_transform_edt(other == 0, sampling=GRID.voxel_nm)[mine != 0]
        assert error.voxels == len(apart) > 5
        assert error.wrong == (apart > 50).sum() > 0
        assert error.mean_nm == pytest.approx(apart.mean(), abs=1e-9)


def test_what_has_no_cleft_or_was_not_looked_at(tmp_path: Path) -> None:
    one, none = np.zeros((1, 2, 3), np.uint64), np.zeros((1, 2, 3), np.uint64)
    one[0, 0, 0], one[0, 1, :2] = 5, (2**64 - 2, 2**64 - 3)
    paths = [_write_clefts(tmp_path / f"{n}.hdf", each) for n, each in enumerate((one, none))]
    scores = score_cremi(paths[1], paths[0])
    assert scores.false_positives == CleftErrors(voxels=1, wrong=1, mean_nm=None)
    assert scores.flat() == {
        "threshold_nm": 400.0,
        "cleft_false_positives": 1,
        "cleft_false_negatives": 0,
        "cleft_mean_distance_false_positives_nm": None,
        "cleft_mean_distance_false_negatives_nm": None,
    }
    assert scores.notes == ("partners not scored: neither file has any",)
    with h5py.File(paths[1]) as file:
        assert (file[CLEFTS][()] == NOTHING).all()


def test_clefts_that_cannot_be_compared(tmp_path: Path) -> None:
    clefts = np.ones((2, 3, 4), np.uint64)
    first = _write_clefts(tmp_path / "a.hdf", clefts)
    other = _write_clefts(tmp_path / "b.hdf", clefts, Grid((50.0, 4.0, 4.0)))
    with pytest.raises(SynmlopsError, match=r"voxels of \(50.0, 4.0, 4.0\) nm.*make them alike"):
        score_cremi(first, other)
    with h5py.File(other, "a") as file:
        del file[CLEFTS].attrs["resolution"]
    with pytest.raises(SynmlopsError, match=r"clefts: does not say its voxel size; write the attribute"):
        score_cremi(first, other)
    with h5py.File(other, "a") as file:
        file.move(CLEFTS, NEURONS)
    with pytest.raises(SynmlopsError, match=r"nothing to score: .*neither file has any; clefts not scored"):
        score_cremi(first, other)


def test_a_threshold_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SynmlopsError, match="threshold 0: must be a positive number"):
        score_cremi(tmp_path, tmp_path, threshold_nm=0)
