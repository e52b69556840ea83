from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyProject
from torch.testing import assert_close

from synmlops.learning import feed as module
from synmlops.learning.augment import resample
from synmlops.learning.feed import Batch, Feed, cut, source_box
from synmlops.learning.native import without_kernels
from synmlops.learning.sampling import LabelledRegion, PatchSampler
from synmlops.params import AugmentParams, SamplingParams, SynmlopsError
from synmlops.volumes.labels import foreground_sum
from synmlops.volumes.prepared import UNTRUSTED, Box, PreparedVolume
from synmlops.volumes.sites import find_sites
from synmlops.volumes.store import Grid, write_hdf5

PARAMS = SamplingParams(patch_zyx=(4, 24, 24), batch_size=4, reject_below=20, reject_probability=0.5)
SILENT = AugmentParams(
    **{"flip": 0, "quarter_turn": 0},
    **{name: {"probability": 0} for name in ("misalign", "defocus", "intensity", "noise", "missing_section")},
)
EVERYTHING = AugmentParams(
    rotate={"probability": 0.5},
    elastic={"probability": 0.5, "displacement": 2, "spacing": 8},
    blur={"probability": 0.5},
    noise={"probability": 1},
    copy_paste={"probability": 0.5},
)
INSIDE = Box((1, 4, 6), (9, 44, 42))
NM = (200.0, 50.0, 50.0)  # so coarse that a synapse and its surroundings take few voxels


def _region(project: TinyProject) -> LabelledRegion:
    volume = project.manifest.volumes["train"]
    return LabelledRegion(replace(volume, grid=Grid(NM)), Box((0, 0, 0), volume.shape_zyx))


def _feed(*regions: LabelledRegion, augment: AugmentParams = EVERYTHING, **changes: Any) -> Feed:
    sampler = PatchSampler(regions, params=PARAMS, seed=5)
    given: dict[str, Any] = {"mean": 100.0, "std": 20.0, "isotropic": False, "rank": 0, "n_ranks": 1}
    given |= {"device": torch.device("cpu")} | changes
    return Feed(sampler, augment=augment, batch_size=4, **given)


def test_without_augmentation_a_batch_is_the_voxels_of_its_draws(tiny_project: TinyProject) -> None:
    region = _region(tiny_project)
    with _feed(region, augment=SILENT) as feed:
        batch = feed.batch(3)
    for n, drawn in enumerate(batch.draws):
        draw = PatchSampler([region], params=PARAMS, seed=5).draw(3, n)
        assert (drawn.volume, drawn.start_zyx, drawn.augmentations) == ("train", draw.start_zyx, ())
        assert_close(batch.image[n], (torch.from_numpy(np.array(draw.image)).float() - 100) / 20)
        assert (batch.sides[n].numpy() == draw.sides).all()
    assert batch.image.dtype == torch.float32
    assert batch.known.tolist() == [[True, True, True]] * 4


def _all(batches: list[Batch]) -> list[Any]:
    return [(b.image.tolist(), b.sides.tolist(), b.known.tolist(), b.draws) for b in batches]


def test_threads_order_and_ranks_change_nothing(
    tiny_project: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = _region(tiny_project)
    with _feed(region) as feed:
        whole = [feed.batch(step) for step in range(1, 6)]
        assert feed.batch(2).image.equal(whole[1].image)  # a step back, as after a resume
    monkeypatch.setattr(module, "_MOST_THREADS", 1)
    with _feed(region) as feed:
        backwards = [feed.batch(step) for step in range(5, 0, -1)]
    assert _all(backwards[::-1]) == _all(whole)
    with _feed(region, rank=0, n_ranks=2) as first, _feed(region, rank=1, n_ranks=2) as second:
        shares = [(first.batch(step), second.batch(step)) for step in range(1, 6)]
        assert [first.describe(step) for step in range(1, 6)] == [batch.draws for batch in whole]
    for batch, (one, two) in zip(whole, shares, strict=True):
        assert batch.image[0::2].equal(one.image)
        assert batch.image[1::2].equal(two.image)
        assert batch.sides[1::2].equal(two.sides)
    assert len({draws for batch in whole for draws in batch.draws}) == 20
    names = {name for batch in whole for drawn in batch.draws for name in drawn.augmentations}
    assert {"copy_paste", "rotate", "elastic", "flip", "noise"} <= names


def test_threads_compute_in_torch_alone_where_they_are_told_to(
    tiny_project: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    apply = module.apply_plan

    def watch(*given: Any, **named: Any) -> Any:
        seen.append(resample.suits(given[1], given[2]))
        return apply(*given, **named)

    monkeypatch.setattr(module, "apply_plan", watch)
    with _feed(_region(tiny_project)) as feed, without_kernels():
        batch = feed.batch(1)
    assert seen
    assert not any(seen)
    with _feed(_region(tiny_project)) as feed:
        assert_close(feed.batch(1).image, batch.image, atol=1e-5, rtol=0)


def _poisoned(folder: Path) -> LabelledRegion:
    """Write a volume that is 200 and full of synapses outside the region, 1 to 100 inside."""
    rng = np.random.default_rng(0)
    image, sides = np.full((10, 48, 48), 200, np.uint8), np.full((10, 48, 48), 2, np.uint8)
    image[INSIDE.slices] = rng.integers(1, 101, INSIDE.shape_zyx)
    sides[INSIDE.slices] = 0
    for z, y, x in [(2, 10, 10), (4, 30, 20), (6, 20, 35), (1, 4, 6)]:  # the last one goes on outside
        sides[z : z + 2, y : y + 3, x : x + 4] = 1
    arrays = {
        "image": image,
        "sides": sides,
        "label": sides,
        "foreground_sum": foreground_sum(sides),
        "sites": find_sites(lambda: [(0, sides)], "semantic", voxel_nm=NM),
    }
    write_hdf5(folder / "a.h5", arrays, grid=Grid(NM))
    volume = PreparedVolume(folder / "a.h5", (10, 48, 48), "semantic", Grid(NM))
    return LabelledRegion(volume, INSIDE)


def test_nothing_outside_the_region_is_ever_seen(tmp_path: Path) -> None:
    augment = AugmentParams(
        **SILENT.model_dump(exclude={"rotate", "scale", "elastic", "copy_paste", "flip"}),
        flip=0.5,
        rotate={"probability": 1},
        scale={"probability": 1, "factor": 2},
        elastic={"probability": 1, "displacement": 3, "spacing": 12},
        copy_paste={"probability": 0},
    )
    beyond = 0
    with _feed(_poisoned(tmp_path), augment=augment, mean=0.0, std=1.0) as feed:
        for step in range(30):
            batch = feed.batch(step)
            assert batch.image.min() >= 1
            assert batch.image.max() <= 100
            assert not (batch.sides == 2).any()
            beyond += int((batch.sides == UNTRUSTED).sum())
    assert beyond > 0  # the region's border was met


def test_a_cut_beyond_the_region_repeats_its_edge_and_trusts_nothing_there(tmp_path: Path) -> None:
    region = _poisoned(tmp_path)
    box = Box((0, 2, 30), (3, 8, 46))
    image, sides = cut(region, box)
    inside = region.volume.image[1:3, 4:8, 30:42]
    np.testing.assert_array_equal(image[1:, 2:, :12], inside)
    np.testing.assert_array_equal(image[0, 2:, :12], inside[0])
    np.testing.assert_array_equal(image[1:, 2:, 12:], np.repeat(inside[:, :, -1:], 4, axis=2))
    trusted = np.zeros(box.shape_zyx, bool)
    trusted[1:, 2:, :12] = True
    assert ((sides != UNTRUSTED) == trusted).all()


def test_source_box_shares_its_middle_with_the_patch() -> None:
    patch = Box((3, 10, 10), (7, 20, 21))
    assert source_box(patch, patch.shape_zyx) == patch
    assert source_box(patch, (4, 13, 5)) == Box((3, 9, 13), (7, 22, 18))  # one more before than after


def test_an_error_in_a_thread_arrives_as_itself(
    tiny_project: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synmlops.learning.sampling.MOST_DRAWS", 320)
    params = PARAMS.model_copy(update={"reject_below": 10**6, "reject_probability": 1.0})
    sampler = PatchSampler([_region(tiny_project)], params=params, seed=0)
    given: dict[str, Any] = {"mean": 0.0, "std": 1.0, "isotropic": False, "rank": 0, "n_ranks": 1}
    with Feed(sampler, augment=SILENT, batch_size=2, device=torch.device("cpu"), **given) as feed:
        for step in (1, 2):
            with pytest.raises(SynmlopsError, match=r"no patch of .* in 320 draws"):
                feed.batch(step)


def test_threads_of_the_feed_compute_alone_and_leave_others_their_number(
    tiny_project: TinyProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(module, "_count_cores", lambda: 2)
    torch.set_num_threads(3)
    try:
        with _feed(_region(tiny_project)) as feed:
            assert [feed._pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_batch(tiny_project: TinyProject) -> None:
    augment = EVERYTHING.model_copy(update={"noise": SILENT.noise})  # its numbers are the device's own
    with (
        _feed(_region(tiny_project), augment=augment) as cpu,
        _feed(_region(tiny_project), augment=augment, device=torch.device("cuda")) as gpu,
    ):
        for step in range(5):
            one, two = cpu.batch(step), gpu.batch(step)
            assert two.image.device.type == two.sides.device.type == two.known.device.type == "cuda"
            assert_close(two.image.cpu(), one.image, atol=1e-2, rtol=1e-3)
            assert (two.sides.cpu() == one.sides).float().mean() > 0.999
