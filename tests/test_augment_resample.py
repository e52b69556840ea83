"""What is compiled gives what torch gives, whatever was drawn."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from augment_tools import NAMES, noisy, only

from synmlops.learning.augment import resample
from synmlops.learning.augment.geometry import Geometry, Slip
from synmlops.learning.augment.intensity import Bend, Curve
from synmlops.learning.augment.orient import Orientation
from synmlops.learning.augment.plan import Plan, apply_plan, draw_plan
from synmlops.learning.native import without_kernels

IMAGES = (torch.uint8, torch.uint16, torch.float32)
LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)
needs_compiler = pytest.mark.skipif(not resample.suits(*[torch.zeros(1)] * 2), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the feed; patches this small are not worth a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _both(plan: Plan, image: torch.Tensor, sides: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ours = apply_plan(plan, image, sides, mean=128.0, std=70.0)
    with without_kernels():
        assert not resample.suits(image, sides)
        return *ours, *apply_plan(plan, image, sides, mean=128.0, std=70.0)


@needs_compiler
@pytest.mark.parametrize("patch_zyx", [(4, 24, 20), (3, 37, 51), (1, 100, 9)])
@pytest.mark.parametrize("chance", [0.3, 0.7])
def test_hundreds_of_plans_give_the_same_in_torch(patch_zyx: tuple[int, int, int], chance: float) -> None:
    params, n_moved = only(*NAMES, chance=chance), 0
    for seed in range(80):
        rng = np.random.default_rng([8, seed])
        plan = draw_plan(rng, params=params, patch_zyx=patch_zyx, isotropic=seed % 2 == 0)
        image = noisy(plan.source_zyx, seed).to(IMAGES[seed % 3])
        ids = torch.from_numpy(rng.integers(0, 2**63, plan.source_zyx)).to(LABELS[seed % 4])
        assert resample.suits(image, ids)
        kept = image.clone(), ids.clone()
        value, moved, expected, expected_moved = _both(plan, image, ids)
        assert torch.equal(moved, expected_moved)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
        assert image.equal(kept[0])
        assert ids.equal(kept[1])
        n_moved += not plan.geometry.is_sampled
    assert n_moved > 5 or chance > 0.5


@needs_compiler
def test_every_orientation_with_sections_out_of_place_and_bent_alone() -> None:
    axes = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)]
    flips = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    bends = tuple(Bend(0.8 + 0.1 * n, 1.0, 0.1 * n) for n in range(5))
    for orientation in (Orientation(order, turned) for order in axes for turned in flips):
        for degrees in (0.0, 3.0):
            geometry = Geometry((5, 18, 11), orientation, slip=Slip(1, 3, (2, -3), degrees))
            image, ids = noisy(geometry.source_zyx), noisy(geometry.source_zyx, 1)
            value, moved, expected, expected_moved = _both(Plan(geometry, Curve(True, bends)), image, ids)
            assert torch.equal(moved, expected_moved)
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 4), (1, 5, 2)])
@pytest.mark.parametrize("zoom", [1.0, 1.5, 8.0])
def test_the_smallest_patches(shape: tuple[int, int, int], zoom: float) -> None:
    geometry = Geometry(shape, Orientation(flips=(1, 2)), zoom=zoom)
    image = noisy(geometry.source_zyx)
    value, sides, expected, expected_sides = _both(Plan(geometry, Curve()), image, image)
    assert torch.equal(sides, expected_sides)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
