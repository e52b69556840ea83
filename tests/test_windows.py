"""Where windows lie: each voxel the business of one, with the margin that was asked for, and few of them."""

import math

import numpy as np
import pytest

from synmlops.learning.windows import GROWTH, windows_over
from synmlops.params import WindowParams
from synmlops.volumes.prepared import Box


def _lengths(rng: np.random.Generator) -> tuple[int, int, int, int, int]:
    """Draw pooling, window, extent and a region's ends, which are often the extent's."""
    pool = int(rng.choice([1, 2, 4, 8, 16]))
    window = pool * int(rng.integers(1, 20))
    extent = int(rng.integers(1, 6 * window + 1))
    start = int(rng.choice([0, rng.integers(0, extent)]))
    return pool, window, extent, start, int(rng.choice([extent, rng.integers(start + 1, extent + 1)]))


@pytest.mark.parametrize("overlap", [0, 0.1, 0.125, 0.25, 0.5, 0.75])
def test_every_voxel_has_one_window_and_its_margin(overlap: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        pool, window, extent, start, stop = _lengths(rng)
        params = WindowParams(window_zyx=(window, 1, 1), overlap=overlap)
        box, shape = Box((start, 0, 0), (stop, 1, 1)), (extent, 1, 1)
        axis, _, _ = windows_over(box, shape_zyx=shape, pool_zyx=(pool, 1, 1), params=params)
        asked = min(window, math.ceil(extent / pool) * pool)
        margin = min(round(asked * overlap / 2), (asked - 1) // 2)
        assert axis.size % pool == 0
        assert asked <= axis.size <= asked * (1 + GROWTH)
        reached = start
        for number in range(len(axis)):
            (low, high), first = axis.support(number), axis.first_voxel(number)
            assert low == reached < high
            assert first <= max(0, low - margin)
            assert first + axis.size >= min(extent, high + margin)
            reached = high
        assert reached == stop


@pytest.mark.parametrize(
    ("extent", "overlap", "laid"),
    [
        (512, 0.25, (2, 288)),  # three of 256 would be a third more
        (512, 0.125, (2, 272)),
        (640, 0.25, (3, 280)),
        (420, 0.25, (2, 256)),
        (680, 0.25, (4, 256)),  # three would be of 296
        (256, 0.25, (1, 256)),
        (272, 0.25, (1, 272)),
        (300, 0.25, (2, 256)),  # no smaller than was asked: margins are wider
    ],
)
def test_few_voxels_are_computed(extent: int, overlap: float, laid: tuple[int, int]) -> None:
    params = WindowParams(window_zyx=(1, 256, 1), overlap=overlap)
    shape = (1, extent, 1)
    _, axis, _ = windows_over(Box((0, 0, 0), shape), shape_zyx=shape, pool_zyx=(1, 8, 1), params=params)
    assert (len(axis), axis.size) == laid


def test_a_small_region_has_the_window_that_was_asked() -> None:
    """Its margins are tissue: a network that norms over a window sees as much as elsewhere."""
    region = Box((0, 1000, 0), (1, 1100, 1))
    params = WindowParams(window_zyx=(1, 256, 1), overlap=0.25)
    _, axis, _ = windows_over(region, shape_zyx=(1, 4000, 1), pool_zyx=(1, 8, 1), params=params)
    assert (len(axis), axis.size) == (1, 256)
