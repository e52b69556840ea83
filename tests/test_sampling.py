from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from tiny import TinyProject

from synmlops.learning.sampling import Draw, LabelledRegion, PatchSampler
from synmlops.params import SamplingParams, SynmlopsError
from synmlops.volumes.labels import foreground_sum
from synmlops.volumes.prepared import BACKGROUND, PRE, UNTRUSTED, Box, PreparedVolume
from synmlops.volumes.sites import MIDDLE, find_sites
from synmlops.volumes.store import Grid, write_hdf5

PARAMS = SamplingParams(patch_zyx=(2, 4, 4), batch_size=2, reject_below=4, reject_probability=0.9)


def _volume(folder: Path, sides: np.ndarray, name: str = "a") -> PreparedVolume:
    """Write a prepared volume whose image counts its voxels."""
    path = folder / f"{name}.h5"
    trusted = (sides != BACKGROUND) & (sides != UNTRUSTED)
    image = np.arange(sides.size, dtype=np.uint16).reshape(sides.shape)
    arrays = {
        "image": image,
        "sides": sides,
        "foreground_sum": foreground_sum(trusted),
        "sites": find_sites(lambda: [(0, trusted)], "union", voxel_nm=(40.0, 8.0, 8.0)),
    }
    if (sides == UNTRUSTED).any():
        arrays["trusted_sum"] = foreground_sum(sides != UNTRUSTED)
    write_hdf5(path, arrays, grid=Grid((40.0, 8.0, 8.0)))
    z, y, x = sides.shape
    return PreparedVolume(path, (z, y, x), "pairs", Grid((40.0, 8.0, 8.0)))


def _sides(shape: tuple[int, int, int] = (3, 8, 9)) -> np.ndarray:
    sides = np.zeros(shape, np.uint8)
    sides[1, 5:8, 5:8] = PRE
    return sides


def _whole(volume: PreparedVolume) -> LabelledRegion:
    return LabelledRegion(volume, Box((0, 0, 0), volume.shape_zyx))


def _with(**changes: Any) -> SamplingParams:
    return SamplingParams(**(PARAMS.model_dump() | changes))


def _sampler(*regions: LabelledRegion, params: SamplingParams = PARAMS, seed: int = 0) -> PatchSampler:
    return PatchSampler(regions, params=params, seed=seed)


def _key(draw: Draw) -> tuple[str, tuple[int, ...]]:
    return draw.volume, draw.start_zyx


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

    The exact law: a position's weight is 1 if rich, else 1 - reject_probability, times that of its volume.
    """
    first = _volume(tmp_path, _sides((3, 7, 8)), "first")
    second = _volume(tmp_path, np.roll(_sides((3, 7, 8)), -2, axis=2), "second")
    params = _with(volume_weights={"second": 2.5})
    sampler = _sampler(_whole(first), _whole(second), params=params)
    law = np.stack([_law(first.sides, params), 2.5 * _law(second.sides, params)])
    n = 6000
    drawn = [sampler.draw(step, 0) for step in range(n)]
    seen = np.zeros(law.shape)
    for draw in drawn:
        seen[["first", "second"].index(draw.volume), *draw.start_zyx] += 1
    assert chisquare(seen.ravel(), (n * law / law.sum()).ravel()).pvalue > 1e-3
    simulated, law = _simulate(first.sides, n), law[0]  # the law is that of the rule
    assert chisquare(simulated.ravel(), (n * law / law.sum()).ravel()).pvalue > 1e-3


def _law(sides: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Give the weight of each position: crop, count, and look at the synapses one by one."""
    spans = [n - p + 1 for n, p in zip(sides.shape, params.patch_zyx, strict=True)]
    middles = find_sites(lambda: [(0, sides % UNTRUSTED)], "union", voxel_nm=(40.0, 8.0, 8.0))[:, MIDDLE]
    weights = np.zeros(spans)
    for at in np.ndindex(*spans):
        box = Box(at, tuple(np.add(at, params.patch_zyx)))
        patch = sides[box.slices]
        n_synapses = sum(
            all(s <= m < e for s, m, e in zip(at, one, box.stop_zyx, strict=True)) for one in middles
        )
        rich = (
            np.count_nonzero(patch % UNTRUSTED) >= params.reject_below and n_synapses >= params.min_synapses
        )
        trusted = np.mean(patch != UNTRUSTED) >= params.min_trusted
        weights[at] = trusted * (1.0 if rich else 1 - params.reject_probability)
    assert 0 < (weights == 1).sum() < weights.size
    return weights


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


def test_too_few_synapses_are_poor_and_too_little_trust_is_never_drawn(tmp_path: Path) -> None:
    sides = np.zeros((3, 7, 12), np.uint8)
    sides[1, 2:4, 2:4], sides[1, 2:4, 5], sides[1, 2:5, 9::2] = PRE, PRE, PRE
    sides[0, :, 8:] = UNTRUSTED
    params = _with(min_synapses=2, reject_below=5, min_trusted=0.6)
    sampler = _sampler(_whole(_volume(tmp_path, sides)), params=params)
    law = _law(sides, params)
    assert (law == 0).any()
    n, seen = 4000, np.zeros(law.shape)
    for step in range(n):
        seen[sampler.draw(step, 0).start_zyx] += 1
    assert not seen[law == 0].any()
    assert chisquare(seen[law > 0], n * law[law > 0] / law.sum()).pvalue > 1e-3


def test_trust_that_just_suffices_suffices(tmp_path: Path) -> None:
    """0.55 x 100 is more than 55 in floating point."""
    sides = np.full((1, 10, 10), PRE, np.uint8)
    sides.ravel()[:45] = UNTRUSTED
    params = _with(patch_zyx=(1, 10, 10), min_trusted=0.55)
    assert _sampler(_whole(_volume(tmp_path, sides)), params=params).draw(1, 0).start_zyx == (0, 0, 0)
    with pytest.raises(SynmlopsError, match=r"sampling.min_trusted: the masks of .*a.h5 leave no .* 56%"):
        _sampler(_whole(_volume(tmp_path, sides)), params=_with(patch_zyx=(1, 10, 10), min_trusted=0.56))


def test_centred_patches_show_all_synapses_alike_and_not_always_in_the_middle(tmp_path: Path) -> None:
    """A volume's weight counts, its size and the size of a synapse do not."""
    many, few = np.zeros((4, 40, 40), np.uint8), np.zeros((4, 12, 12), np.uint8)
    for x in (9, 15, 22, 29):
        many[2, 20, x] = PRE
    few[1:3, 5:9, 5:9] = PRE
    weights = {"many": 0.5, "few": 3.0}
    params = _with(centred=1.0, patch_zyx=(2, 4, 4), reject_below=8, volume_weights=weights)
    regions = [_whole(_volume(tmp_path, many, "many")), _whole(_volume(tmp_path, few, "few"))]
    sampler = _sampler(*regions, params=params)
    draws = [sampler.draw(step, 0) for step in range(2000)]
    seen = np.zeros(5)
    places = set()
    for draw in draws:
        for n, middle in enumerate(np.concatenate([region.middles_zyx for region in regions])):
            place = tuple(int(at) for at in middle - draw.start_zyx)
            if (draw.volume == "few") == (n == 4) and all(
                0 <= at < p for at, p in zip(place, (2, 4, 4), strict=True)
            ):
                seen[n] += 1
                places.add(place)
    assert seen.sum() == 2000
    assert chisquare(seen, 2000 * np.array([0.5, 0.5, 0.5, 0.5, 3]) / 5).pvalue > 1e-3
    assert places == {(1, y, x) for y in (1, 2, 3) for x in (1, 2, 3)}


def test_a_share_is_centred_and_stays_in_the_region(tmp_path: Path) -> None:
    sides = np.zeros((2, 30, 60), np.uint8)
    sides[0, 2, 2], sides[1, 20, 50] = PRE, PRE
    params = _with(centred=0.4, reject_probability=0.0)
    region = LabelledRegion(_volume(tmp_path, sides), Box((0, 1, 1), (2, 30, 51)))
    sampler = _sampler(region, params=params)
    starts = [sampler.draw(step, 0).start_zyx for step in range(3000)]
    at_border = sum(start == (0, 1, 1) for start in starts)  # a ninth of its patches would be elsewhere
    assert 0.4 / 2 * 0.6 * 3000 < at_border < 0.4 / 2 * 1.1 * 3000
    assert min(start[1] for start in starts) == 1
    assert max(start[2] for start in starts) == 47


def test_what_cannot_be_centred_or_weighted_is_refused(tmp_path: Path) -> None:
    region = LabelledRegion(_volume(tmp_path, _sides((3, 8, 20))), Box((0, 0, 7), (3, 8, 20)))
    with pytest.raises(SynmlopsError, match=r"sampling.centred: no synapse of .*a.h5 has its middle"):
        _sampler(region, params=_with(centred=0.5))
    assert _sampler(region, params=_with(centred=0.0))
    with pytest.raises(SynmlopsError, match=r"sampling.volume_weights: b is no training volume; there are a"):
        _sampler(region, params=_with(volume_weights={"b": 2.0}))


def test_many_synapses_are_counted_as_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = np.where(rng.random((12, 40, 30)) < 0.01, PRE, BACKGROUND).astype(np.uint8)
    region = LabelledRegion(_volume(tmp_path, sides), Box((1, 3, 2), (11, 38, 29)))
    params = _with(min_synapses=3, reject_probability=1.0, reject_below=0, patch_zyx=(6, 10, 9))
    for step in range(50):
        box = _sampler(region, params=params).draw(step, 0).box
        inside = (region.middles_zyx >= box.start_zyx) & (region.middles_zyx < box.stop_zyx)
        assert inside.all(axis=1).sum() >= 3
    assert _sampler(region, params=_with(min_synapses=1)).draw(0, 0)


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
    drawn = [sampler.draw(step, 0).volume for step in range(3000)]
    seen = [drawn.count("small"), drawn.count("large")]
    assert chisquare(seen, 3000 * np.array([5, 75]) / 80).pvalue > 1e-3


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
