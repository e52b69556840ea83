from collections import Counter

import numpy as np
import pytest
import torch
from augment_tools import NAMES, noisy, only

from synmlops.learning.augment.plan import apply_plan, draw_plan
from synmlops.learning_params import AugmentParams

PATCH = (4, 24, 20)
GREY = ("blur", "defocus", "motion_blur", "intensity", "invert", "noise", "cut_noise", "cut_blur")


def _patch(seed: int, params: AugmentParams, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    plan = draw_plan(np.random.default_rng(seed), params=params, patch_zyx=PATCH, isotropic=False)
    image = noisy(plan.source_zyx, seed)
    return apply_plan(plan, image.to(dtype), image, mean=128.0, std=70.0)[0]


def test_nothing_happens_at_chance_zero() -> None:
    plan = draw_plan(np.random.default_rng(0), params=only(), patch_zyx=PATCH, isotropic=True)
    assert plan.names() == ()
    assert plan.source_zyx == PATCH
    image, sides = noisy(PATCH), noisy(PATCH, 1)
    kept = image.clone()
    got, same = apply_plan(plan, image, sides, mean=100.0, std=50.0)
    assert torch.equal(same, sides)
    assert torch.allclose(got, (kept.float() - 100) / 50)
    assert torch.equal(image, kept)


@pytest.mark.parametrize("name", NAMES)
def test_each_happens_alone_when_asked_for_and_changes_something(name: str) -> None:
    params = only(name)
    plan = draw_plan(np.random.default_rng(5), params=params, patch_zyx=PATCH, isotropic=False)
    assert plan.names() == (name,)
    changed = _patch(5, params)
    assert changed.shape == PATCH
    assert changed.isfinite().all()
    assert not torch.equal(changed, _patch(5, only()))


def test_chances_are_those_of_the_params() -> None:
    params = only(*NAMES, chance=0.25)
    rng = np.random.default_rng(0)
    n = 2000
    counts = Counter(
        name
        for _ in range(n)
        for name in draw_plan(rng, params=params, patch_zyx=(4, 8, 8), isotropic=False).names()
    )
    assert counts.pop("flip") / n == pytest.approx(1 - 0.75**3, abs=0.05)  # of any axis
    assert len(counts) == len(NAMES) - 1
    for name, count in counts.items():
        assert count / n == pytest.approx(0.25, abs=0.05), name  # five deviations


def test_a_patch_is_the_same_wherever_and_whenever_it_is_made() -> None:
    params = only(*NAMES, chance=0.6)
    first = [_patch(seed, params) for seed in range(20)]
    torch.manual_seed(1)
    np.random.default_rng(1).random()
    again = [_patch(seed, params) for seed in reversed(range(20))]
    assert all(torch.equal(one, two) for one, two in zip(first, reversed(again), strict=True))


def test_grey_changes_leave_labels_alone() -> None:
    params = only(*GREY, "missing_section")
    for seed in range(50):
        plan = draw_plan(np.random.default_rng(seed), params=params, patch_zyx=PATCH, isotropic=False)
        sides = noisy(PATCH, seed)
        kept = sides.clone()
        _, same = apply_plan(plan, noisy(PATCH), sides, mean=128.0, std=70.0)
        assert torch.equal(same, kept)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_grey_of_any_type_gives_the_same_patch(dtype: torch.dtype) -> None:
    """Only that gamma is taken after sampling where there are too many values for a table."""
    params = only(*NAMES, chance=0.6, intensity={"gamma": 0.0, "per_section": 0.5})
    for seed in range(20):
        assert torch.allclose(_patch(seed, params, dtype), _patch(seed, params), atol=1e-4)


def test_a_source_of_the_wrong_size_is_refused() -> None:
    plan = draw_plan(np.random.default_rng(0), params=only("misalign"), patch_zyx=PATCH, isotropic=False)
    with pytest.raises(ValueError, match="source_zyx"):
        apply_plan(plan, noisy(PATCH), noisy(PATCH), mean=128.0, std=70.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_patch_but_for_noise() -> None:
    params = only(*(name for name in NAMES if "noise" not in name), chance=0.6)
    for seed in range(50):
        plan = draw_plan(np.random.default_rng(seed), params=params, patch_zyx=PATCH, isotropic=False)
        image, sides = noisy(plan.source_zyx), noisy(plan.source_zyx, 1)
        here = apply_plan(plan, image, sides, mean=128.0, std=70.0)
        there = apply_plan(plan, image.cuda(), sides.cuda(), mean=128.0, std=70.0)
        assert torch.allclose(here[0], there[0].cpu(), atol=0.01)
        assert (here[1] == there[1].cpu()).float().mean() > 0.999
    noise = draw_plan(np.random.default_rng(0), params=only("noise"), patch_zyx=PATCH, isotropic=False)
    flat = torch.zeros(PATCH, device="cuda")
    assert 0 < apply_plan(noise, flat, flat.byte(), mean=0.0, std=1.0)[0].std() < 0.6
