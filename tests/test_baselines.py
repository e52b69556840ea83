"""The phantom stays hard: neither baseline may find its synapses by grey level or local filters alone."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from synmlops.params import PhantomParams

VOXEL = (40.0, 8.0, 8.0)


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "baselines.py"
    spec = importlib.util.spec_from_file_location("benchmark_baselines", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_eigenvalues_agree_with_linear_algebra(baselines: ModuleType) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((50, 3, 3))
    matrix += matrix.swapaxes(1, 2)
    second = {(a, b): matrix[:, a, b].astype(np.float32) for a in range(3) for b in range(a, 3)}
    found = np.stack(baselines._eigenvalues(second), axis=1)
    assert np.allclose(found, np.linalg.eigvalsh(matrix)[:, ::-1], atol=1e-4)


def test_baselines_find_what_is_easy(baselines: ModuleType) -> None:
    rng = np.random.default_rng(0)
    volumes = []
    for _ in range(3):
        union = np.zeros((6, 48, 48), bool)
        union[2:4, 10:20, 10:30] = True
        image = (np.where(union, 60, 180) + rng.normal(0, 8, union.shape)).astype(np.uint8)
        volumes.append(baselines.Labelled(image, union, VOXEL))
    train, validation, test = ([v] for v in volumes)
    assert baselines.smoothed_intensity(train, test, validation=validation).f1[0] > 0.95
    forest = baselines.random_forest(train, test, validation=validation, seed=0)
    assert forest.f1[0] > 0.95
    assert forest.scores[0].shape == test[0].image.shape


@pytest.mark.slow
def test_phantom_is_hard_for_both(baselines: ModuleType) -> None:
    phantom = PhantomParams().model_copy(update={"size_zyx": (16, 176, 176)})
    train, validation, test = ([baselines.phantom_volume(seed, phantom)] for seed in (1, 11, 21))
    intensity = baselines.smoothed_intensity(train, test, validation=validation)
    forest = baselines.random_forest(train, test, validation=validation, seed=0)
    assert intensity.f1[0] < 0.6
    assert 0.1 < forest.f1[0] < 0.6  # below 0.1 it would be broken, not beaten
