"""Time and memory of the CREMI partner score by number of pairs, and its equality with the dense matrix.

Usage: OMP_NUM_THREADS=2 python benchmarks/cremi_score.py [--pairs 100000] [--per-um3 2]

Points are scattered at a density (2 partners a cubic micrometre is dense neuropil; CREMI's samples have about
1.5); predictions are the true pairs moved by some 100 nm, a tenth of them missing and a tenth of others
added. What is timed is `score_cremi` on two files, with reading them. Up to DENSE pairs the challenge's way,
a square matrix filled with twice the threshold and scipy's assignment, is run too and must give the same
counts.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from synmlops.synapses.cremi_scores import score_cremi
from synmlops.volumes.cremi import (
    NEURONS,
    POST_TYPE,
    PRE_TYPE,
    Annotations,
    Layer,
    neurons_at,
    open_layer,
    read_annotations,
    write_cremi,
)
from synmlops.volumes.store import Grid

DENSE = 2000
THRESHOLD_NM = 400.0
VOXEL_NM = (200.0, 200.0, 200.0)  # of the segmentation: its size in voxels is not what is measured


def annotations(points_nm: NDArray[np.float64]) -> Annotations:
    """Number the points of pairs (P, 2, 3)."""
    ids = np.arange(1, 2 * len(points_nm) + 1, dtype=np.uint64)
    types = (PRE_TYPE, POST_TYPE) * len(points_nm)
    return Annotations(ids, types, points_nm.reshape(-1, 3), ids.reshape(-1, 2))


def make(folder: Path, n: int, per_um3: float) -> tuple[Path, Path]:
    """Write truth and prediction of n pairs each, in tissue cut into neurons a micrometre wide."""
    rng = np.random.default_rng(n)
    side_nm = (n / per_um3) ** (1 / 3) * 1000
    shape = (int(side_nm / VOXEL_NM[0]) + 2,) * 3
    cells = np.indices(shape) // 5
    neurons = (cells[0] * 1009 + cells[1]) * 1009 + cells[2] + 1
    pre = rng.uniform(0, side_nm, (n, 3))
    true = np.stack((pre, (pre + rng.normal(0, 80, (n, 3))).clip(0, side_nm)), axis=1)
    found = (true + rng.normal(0, 60, true.shape)).clip(0, side_nm)
    found[: n // 10] = rng.uniform(0, side_nm, (n // 10, 2, 3))
    layer = Layer(shape, Grid(VOXEL_NM), [(0, neurons)])
    write_cremi(folder / "truth.hdf", annotations=annotations(true), neurons=layer)
    write_cremi(folder / "predicted.hdf", annotations=annotations(rng.permutation(found)))
    return folder / "truth.hdf", folder / "predicted.hdf"


def dense_matches(truth: Path, predicted: Path) -> int:
    """Count the matches in the challenge's way."""
    points = [read_annotations(path).pairs_nm() for path in (predicted, truth)]
    with open_layer(truth, NEURONS) as neurons:
        ids = [neurons_at(neurons, each)[0] for each in points]
    apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=3)
    allowed = (apart <= THRESHOLD_NM).all(axis=2) & (ids[0][:, None] == ids[1][None]).all(axis=2)
    costs = np.full((max(map(len, points)),) * 2, 2 * THRESHOLD_NM)
    costs[: len(points[0]), : len(points[1])] = np.where(allowed, apart.mean(axis=2), 2 * THRESHOLD_NM)
    return int((costs[linear_sum_assignment(costs)] <= THRESHOLD_NM).sum())


def main() -> None:
    """Score small files both ways, then files of the size asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--per-um3", type=float, default=2.0)
    asked = parser.parse_args()
    for n in (200, DENSE, asked.pairs):
        with tempfile.TemporaryDirectory() as folder:
            truth, predicted = make(Path(folder), n, asked.per_um3)
            start = time.perf_counter()
            counts = score_cremi(truth, predicted).partners
            seconds = time.perf_counter() - start
            assert counts is not None
            row = {"pairs": n, "seconds": round(seconds, 2), "fscore": counts.f1, "matches": counts.tp}
            row["peak_GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            if n <= DENSE:
                row["dense_matches"] = dense_matches(truth, predicted)
                assert row["dense_matches"] == counts.tp, row
        print(json.dumps(row))


if __name__ == "__main__":
    main()
