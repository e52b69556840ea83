"""Two baselines that a network has to beat: smoothed intensity, and a random forest on 3-D filter features.

Both score every voxel for being synapse (pre or post) and are judged by voxel F1 at the threshold that is
best on the validation volumes. `python benchmarks/baselines.py` prints their table for the default phantom.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from sklearn.ensemble import RandomForestClassifier

from synmlops.params import PhantomParams
from synmlops.volumes.phantom import make_phantom

_Floats = NDArray[np.float32]

INTENSITY_SIGMAS_NM = (0.0, 8.0, 16.0, 24.0, 40.0, 64.0, 96.0)
FILTER_SIGMAS_NM = (8.0, 16.0, 32.0, 64.0, 128.0)
SAMPLES_PER_VOLUME = 60_000  # half synapse, half not
TREES = 100
LEAF = 8  # least samples of a leaf


@dataclass(frozen=True)
class Labelled:
    """An image and which of its voxels are synapse (both zyx), with the voxel size in nm."""

    image: NDArray[np.uint8]
    union: NDArray[np.bool_]
    voxel_nm: tuple[float, float, float]


@dataclass(frozen=True)
class Baseline:
    """What a baseline makes of the test volumes.

    Attributes
    ----------
    scores : tuple of (z, y, x) array of float32
        One map per test volume; more is likelier synapse.
    threshold : float
        Best on the validation volumes.
    f1 : tuple of float
        Voxel F1 of the union at that threshold, one per test volume.
    """

    scores: tuple[_Floats, ...] = field(repr=False)
    threshold: float
    f1: tuple[float, ...]


def phantom_volume(seed: int, phantom: PhantomParams) -> Labelled:
    """Make a phantom and reduce its labels to the union."""
    made = make_phantom(
        seed=seed,
        **phantom.model_dump(exclude={"train_seeds", "validation_seeds", "test_seeds"}),
    )
    return Labelled(made.image, made.labels > 0, phantom.voxel_nm)


def smoothed_intensity(
    train: Sequence[Labelled], test: Sequence[Labelled], *, validation: Sequence[Labelled]
) -> Baseline:
    """Score voxels by how dark they are after a Gaussian, whose width is best on `train`."""

    def scored(volumes: Sequence[Labelled], sigma_nm: float) -> list[_Floats]:
        return [-_smooth(normalised(v.image), sigma_nm, v.voxel_nm) for v in volumes]

    best = max(INTENSITY_SIGMAS_NM, key=lambda s: best_threshold(scored(train, s), _truths(train))[1])
    threshold, _ = best_threshold(scored(validation, best), _truths(validation))
    return _judged(scored(test, best), threshold, test)


def random_forest(
    train: Sequence[Labelled], test: Sequence[Labelled], *, validation: Sequence[Labelled], seed: int
) -> Baseline:
    """Score voxels by a forest on `filter_features`, trained on as many synapse voxels as others."""
    rng = np.random.default_rng(seed)
    tables, answers = zip(*(_samples(rng, volume) for volume in train), strict=True)
    forest = RandomForestClassifier(
        TREES, min_samples_leaf=LEAF, max_features="sqrt", random_state=seed, n_jobs=-1
    )
    forest.fit(np.concatenate(tables), np.concatenate(answers))
    threshold, _ = best_threshold([_forest_scores(forest, v) for v in validation], _truths(validation))
    return _judged([_forest_scores(forest, v) for v in test], threshold, test)


def normalised(image: NDArray[np.uint8]) -> _Floats:
    """Bring brightness and contrast of a volume to median 0 and interquartile range 1.

    Examples
    --------
    >>> normalised(np.array([100, 110, 120, 130, 140], np.uint8))
    array([-1. , -0.5,  0. ,  0.5,  1. ], dtype=float32)
    """
    low, middle, high = np.percentile(image, [25, 50, 75])
    return np.asarray((image - middle) / max(high - low, 1.0), dtype=np.float32)


def filter_features(image: _Floats, voxel_nm: tuple[float, float, float], sigma_nm: float) -> list[_Floats]:
    """Give Gaussian, gradient magnitude, Laplacian and the three Hessian eigenvalues at one scale.

    Derivatives are per nm, times sigma (squared for second ones), so that a long voxel counts as long.

    Examples
    --------
    >>> features = filter_features(np.zeros((3, 8, 8), np.float32), (40, 8, 8), 16.0)
    >>> len(features), features[0].shape
    (6, (3, 8, 8))
    """
    smooth = _smooth(image, sigma_nm, voxel_nm)
    first = [sigma_nm * _slope(smooth, axis, voxel_nm) for axis in range(3)]
    second = {(a, b): sigma_nm * _slope(first[a], b, voxel_nm) for a in range(3) for b in range(a, 3)}
    magnitude = np.sqrt(sum((np.square(g) for g in first), np.zeros_like(smooth)))
    return [smooth, magnitude, second[0, 0] + second[1, 1] + second[2, 2], *_eigenvalues(second)]


def best_threshold(scores: Sequence[_Floats], truths: Sequence[NDArray[np.bool_]]) -> tuple[float, float]:
    """Give the threshold of best F1 over all voxels together, and that F1.

    Examples
    --------
    >>> threshold, f1 = best_threshold([np.array([0.0, 0.2, 0.8, 1.0])], [np.array([0, 0, 1, 1], bool)])
    >>> 0.2 < threshold <= 0.8, f1
    (True, 1.0)
    """
    low, high = min(float(s.min()) for s in scores), max(float(s.max()) for s in scores)
    edges = np.linspace(low, high, 501)
    hits, falses = np.zeros(500), np.zeros(500)
    for score, truth in zip(scores, truths, strict=True):
        hits += np.histogram(score[truth], edges)[0]
        falses += np.histogram(score[~truth], edges)[0]
    found, wrong = hits[::-1].cumsum()[::-1], falses[::-1].cumsum()[::-1]
    f1 = 2 * found / np.maximum(found + wrong + found[0], 1)
    return float(edges[f1.argmax()]), float(f1.max())


def _truths(volumes: Sequence[Labelled]) -> list[NDArray[np.bool_]]:
    return [v.union for v in volumes]


def _judged(scores: list[_Floats], threshold: float, test: Sequence[Labelled]) -> Baseline:
    f1 = []
    for score, volume in zip(scores, test, strict=True):
        found = score >= threshold
        both = int(np.count_nonzero(found & volume.union))
        f1.append(2 * both / max(1, int(np.count_nonzero(found)) + int(np.count_nonzero(volume.union))))
    return Baseline(tuple(scores), threshold, tuple(f1))


def _smooth(image: _Floats, sigma_nm: float, voxel_nm: tuple[float, float, float]) -> _Floats:
    return np.asarray(
        gaussian_filter(image, [sigma_nm / v for v in voxel_nm], truncate=3.0), dtype=np.float32
    )


def _slope(values: _Floats, axis: int, voxel_nm: tuple[float, float, float]) -> _Floats:
    if values.shape[axis] < 2:
        return np.zeros_like(values)
    return np.asarray(np.gradient(values, voxel_nm[axis], axis=axis), dtype=np.float32)


def _eigenvalues(second: dict[tuple[int, int], _Floats]) -> list[_Floats]:
    """Give the eigenvalues of symmetric 3x3 matrices, the greatest first.

    Source: Smith 1961, Eigenvalues of a symmetric 3 x 3 matrix, Communications of the ACM 4:168.
    """
    mean = (second[0, 0] + second[1, 1] + second[2, 2]) / 3
    a, b, c = (second[i, i] - mean for i in range(3))
    d, e, f = second[0, 1], second[0, 2], second[1, 2]
    spread = np.sqrt((a * a + b * b + c * c + 2 * (d * d + e * e + f * f)) / 6)
    determinant = a * (b * c - f * f) - d * (d * c - f * e) + e * (d * f - b * e)
    ratio = determinant / np.maximum(2 * spread**3, np.float32(1e-20))
    angle = np.arccos(np.clip(ratio, -1, 1)) / 3
    greatest = mean + 2 * spread * np.cos(angle)
    least = mean + 2 * spread * np.cos(angle + np.float32(2 * np.pi / 3))
    return [greatest, 3 * mean - greatest - least, least]


def _table(volume: Labelled, flat: NDArray[np.int64] | None) -> _Floats:
    """Give all features of the voxels with these flat indices, or of every voxel, as (N, F)."""
    chosen = slice(None) if flat is None else flat
    image = normalised(volume.image)
    columns = [image.ravel()[chosen]]
    for sigma in FILTER_SIGMAS_NM:
        columns += [f.ravel()[chosen] for f in filter_features(image, volume.voxel_nm, sigma)]
    return np.stack(columns, axis=1)


def _samples(rng: np.random.Generator, volume: Labelled) -> tuple[_Floats, NDArray[np.bool_]]:
    flat = [np.flatnonzero(volume.union), np.flatnonzero(~volume.union)]
    n = min(SAMPLES_PER_VOLUME // 2, *map(len, flat))
    chosen = np.concatenate([rng.choice(part, n, replace=False) for part in flat])
    return _table(volume, chosen), volume.union.ravel()[chosen]


def _forest_scores(forest: RandomForestClassifier, volume: Labelled) -> _Floats:
    table = _table(volume, None)
    parts = [forest.predict_proba(part)[:, 1] for part in np.array_split(table, 1 + len(table) // 500_000)]
    return np.concatenate(parts).astype(np.float32).reshape(volume.image.shape)


def main(argv: Sequence[str]) -> None:
    """Print voxel F1 of both baselines on unseen seeds, and under doubled noise and jitter, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test-seeds", type=int, nargs="+", default=[21, 22, 23])
    parser.add_argument("--noisy-seed", type=int, default=21, help="made again with doubled noise and jitter")
    options = parser.parse_args(argv)
    phantom = PhantomParams()
    noisy = phantom.model_copy(update={"noise": 2 * phantom.noise, "jitter": 2 * phantom.jitter})
    train = [phantom_volume(seed, phantom) for seed in phantom.train_seeds]
    validation = [phantom_volume(seed, phantom) for seed in phantom.validation_seeds]
    test = [phantom_volume(seed, phantom) for seed in options.test_seeds]
    test.append(phantom_volume(options.noisy_seed, noisy))
    rows = {
        "smoothed intensity": smoothed_intensity(train, test, validation=validation),
        "random forest": random_forest(train, test, validation=validation, seed=0),
    }
    names = [f"seed {seed}" for seed in options.test_seeds] + [f"seed {options.noisy_seed}, noise x 2"]
    print("| voxel F1 | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for name, baseline in rows.items():
        print(f"| {name} | " + " | ".join(f"{f1:.3f}" for f1 in baseline.f1) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
