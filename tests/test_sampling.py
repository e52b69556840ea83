from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny import TinyProject

from synmlops.learning.sampling import LabelledRegion, Patch, PatchSampler
from synmlops.params import SamplingParams, SynmlopsError
from synmlops.volumes.labels import foreground_sum
from synmlops.volumes.prepared import BACKGROUND, PRE, UNTRUSTED, Box, PreparedVolume
from synmlops.volumes.store import Grid, write_hdf5

PARAMS = SamplingParams(patch_zyx=(2, 4, 4), batch_size=2, reject_below=4, reject_probability=0.9)


def _volume(folder: Path, sides: np.ndarray, name: str = "a") -> PreparedVolume:
    """Write a prepared volume whose image counts its voxels."""
    path = folder / f"{name}.h5"
    trusted = (sides != BACKGROUND) & (sides != UNTRUSTED)
    image = np.arange(sides.size, dtype=np.uint16).reshape(sides.shape)
    arrays = {"image": image, "sides": sides, "foreground_sum": foreground_sum(trusted)}
    write_hdf5(path, arrays, grid=Grid((40.0, 8.0, 8.0)))
    z, y, x = sides.shape
    return PreparedVolume(path, (z, y, x), "pairs", Grid((40.0, 8.0, 8.0)))


def _sides(shape: tuple[int, int, int] = (3, 8, 9)) -> np.ndarray:
    sides = np.zeros(shape, np.uint8)
    sides[1, 5:8, 5:8] = PRE
    return sides


def _whole(volume: PreparedVolume) -> LabelledRegion:
    return LabelledRegion(volume, Box((0, 0, 0), volume.shape_zyx))


def _sampler(*regions: LabelledRegion, params: SamplingParams = PARAMS, seed: int = 0) -> PatchSampler:
    return PatchSampler(regions, params=params, seed=seed)


def _key(patch: Patch) -> tuple[int, ...]:
    return patch.volume, *patch.start_zyx


def test_a_draw_is_decided_by_seed_step_and_index(tiny_project: TinyProject) -> None:
    region = _whole(tiny_project.manifest.volumes["train"])
    params = tiny_project.params.sampling
    one, two = (PatchSampler([region], params=params, seed=3) for _ in range(2))
    order = [(step, index) for step in range(1, 9) for index in range(4)]
    forward = {at: one.draw(*at) for at in order}
    backward = {at: two.draw(*at) for at in reversed(order)}
    for at in order:
        assert _key(forward[at]) == _key(backward[at])
        np.testing.assert_array_equal(forward[at].image, backward[at].image)
        assert forward[at].rng.integers(2**62) == backward[at].rng.integers(2**62)


def test_no_two_draws_share_their_chances(tiny_project: TinyProject) -> None:
    """Neither steps nor indices nor seeds repeat a stream; (1, 2) is not (2, 1)."""
    region = _whole(tiny_project.manifest.volumes["train"])
    params = tiny_project.params.sampling
    streams = {
        int(PatchSampler([region], params=params, seed=seed).draw(step, index).rng.integers(2**62))
        for seed in range(3)
        for step in range(20)
        for index in range(8)
    }
    assert len(streams) == 3 * 20 * 8


def test_patch_holds_the_voxels_of_its_place(tmp_path: Path) -> None:
    volume = _volume(tmp_path, _sides())
    patch = _sampler(_whole(volume)).draw(1, 0)
    place = tuple(slice(s, s + n) for s, n in zip(patch.start_zyx, PARAMS.patch_zyx, strict=True))
    np.testing.assert_array_equal(patch.image, volume.image[place])
    np.testing.assert_array_equal(patch.sides, volume.sides[place])
    assert patch.known == (True, True, True)
    union = replace(volume, kind="union")
    assert _sampler(_whole(union)).draw(1, 0).known == (False, False, True)


def test_acceptance_is_draw_count_reject(tmp_path: Path) -> None:
    """Frequencies of positions agree with drawing uniformly and throwing poor patches away by chance.

    The exact law: a position's weight is 1 if rich, else 1 - reject_probability.
    """
    sides = _sides((3, 7, 8))
    sampler = _sampler(_whole(_volume(tmp_path, sides)))
    spans = [n - p + 1 for n, p in zip(sides.shape, PARAMS.patch_zyx, strict=True)]
    weights = np.zeros(spans)
    for at in np.ndindex(*spans):
        box = tuple(slice(s, s + n) for s, n in zip(at, PARAMS.patch_zyx, strict=True))
        rich = np.count_nonzero(sides[box]) >= PARAMS.reject_below
        weights[at] = 1.0 if rich else 1 - PARAMS.reject_probability
    assert 0 < (weights == 1).sum() < weights.size
    n = 6000
    seen = np.zeros(spans)
    for step in range(n):
        seen[sampler.draw(step, 0).start_zyx] += 1
    simulated = _simulate(sides, n)
    expected = n * weights / weights.sum()
    assert chisquare(seen.ravel(), expected.ravel()).pvalue > 1e-3
    assert chisquare(simulated.ravel(), expected.ravel()).pvalue > 1e-3  # the law is that of the rule


def _simulate(sides: np.ndarray, n: int) -> np.ndarray:
    """Draw, crop, count, reject: the rule as one would write it down."""
    rng = np.random.default_rng(1)
    spans = [size - p + 1 for size, p in zip(sides.shape, PARAMS.patch_zyx, strict=True)]
    seen = np.zeros(spans)
    while seen.sum() < n:
        at = tuple(int(rng.integers(span)) for span in spans)
        patch = sides[tuple(slice(s, s + size) for s, size in zip(at, PARAMS.patch_zyx, strict=True))]
        if np.count_nonzero(patch) < PARAMS.reject_below and rng.random() < PARAMS.reject_probability:
            continue
        seen[at] += 1
    return seen


def test_threshold_is_inclusive(tmp_path: Path) -> None:
    """A patch with exactly `reject_below` voxels is not poor."""
    sides = np.zeros((2, 4, 10), np.uint8)
    sides[0, 0, :2], sides[0, 0, 8:] = PRE, PRE
    params = PARAMS.model_copy(update={"reject_below": 2, "reject_probability": 1.0})
    sampler = _sampler(_whole(_volume(tmp_path, sides)), params=params)
    assert {sampler.draw(step, 0).start_zyx[2] for step in range(60)} == {0, 6}


def test_patches_stay_inside_their_region_and_reach_its_edges(tmp_path: Path) -> None:
    volume = _volume(tmp_path, np.full((6, 20, 20), PRE, np.uint8))
    region = LabelledRegion(volume, Box((1, 5, 7), (5, 14, 15)))
    starts = np.array([_sampler(region).draw(step, 0).start_zyx for step in range(600)])
    assert starts.min(axis=0).tolist() == [1, 5, 7]
    assert (starts.max(axis=0) + PARAMS.patch_zyx).tolist() == [5, 14, 15]


def test_every_position_of_every_region_is_as_likely(tmp_path: Path) -> None:
    """Regions are drawn by their number of positions, not by their volume or by turns."""
    small = _whole(_volume(tmp_path, np.full((2, 4, 8), PRE, np.uint8), "small"))  # 5 positions
    large = _whole(_volume(tmp_path, np.full((4, 8, 8), PRE, np.uint8), "large"))  # 3 x 5 x 5
    sampler = _sampler(small, large)
    drawn = np.bincount([sampler.draw(step, 0).volume for step in range(3000)], minlength=2)
    assert chisquare(drawn, 3000 * np.array([5, 75]) / 80).pvalue > 1e-3


def test_untrusted_voxels_do_not_count(tmp_path: Path) -> None:
    sides = np.zeros((2, 4, 20), np.uint8)
    sides[:, :, :4] = UNTRUSTED
    sides[:, :, 16:] = PRE
    params = PARAMS.model_copy(update={"reject_below": 32, "reject_probability": 1.0})
    sampler = _sampler(_whole(_volume(tmp_path, sides)), params=params)
    assert {sampler.draw(step, 0).start_zyx[2] for step in range(20)} == {16}


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always_rejecting(tmp_path: Path, probability: float) -> None:
    params = PARAMS.model_copy(update={"reject_below": 9, "reject_probability": probability})
    sampler = _sampler(_whole(_volume(tmp_path, _sides())), params=params)
    counts = [np.count_nonzero(sampler.draw(step, 0).sides) for step in range(100)]
    assert (min(counts) >= 9) == (probability == 1)


def test_a_region_smaller_than_a_patch(tmp_path: Path) -> None:
    volume = _volume(tmp_path, _sides((3, 8, 9)))
    small = LabelledRegion(volume, Box((0, 0, 0), (3, 3, 9)))
    with pytest.raises(
        SynmlopsError, match=r"a.h5: the training region \(3, 3, 9\) is smaller.*\(2, 4, 4\); lower"
    ):
        _sampler(small)


def test_no_foreground_in_the_regions(tmp_path: Path) -> None:
    volume = _volume(tmp_path, _sides((3, 8, 20)))
    with pytest.raises(SynmlopsError, match=r"a.h5: .* no synapse voxel"):
        _sampler(LabelledRegion(volume, Box((0, 0, 10), (3, 8, 20))))
    assert _sampler(LabelledRegion(volume, Box((0, 0, 10), (3, 8, 20))), _whole(volume))


def test_a_wish_that_no_patch_can_grant_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synmlops.learning.sampling.MOST_DRAWS", 640)
    params = PARAMS.model_copy(update={"reject_below": 33, "reject_probability": 1.0})
    with pytest.raises(SynmlopsError, match=r"33 foreground voxels in 640 draws; lower sampling.reject"):
        _sampler(_whole(_volume(tmp_path, _sides())), params=params).draw(1, 0)
