"""Decoding by block: ids, numbering and partner table are those of the whole volume, whatever the blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from synmlops.blockwise.grid import Block, BlockGrid
from synmlops.params import EvaluateParams, SynmlopsError
from synmlops.synapses import spool as spool_module
from synmlops.synapses.decoding import decode_blocks
from synmlops.synapses.instances import decode_pairs, decode_union
from synmlops.synapses.partners import partners_of
from synmlops.synapses.spool import lasting_spool
from synmlops.volumes.prepared import Box
from synmlops.volumes.store import Grid, open_volume, write_hdf5

GRID = Grid((40.0, 8.0, 4.0), (400.0, 80.0, 12.0))
PARAMS = EvaluateParams(min_voxels=4, side_threshold=0.6, min_side_voxels=2, split="none")
THRESHOLD = 0.55


@dataclass(frozen=True)
class Made:
    """What came of a decoding."""

    ids: NDArray[Any]
    table: pd.DataFrame | None


def by_block(
    probabilities: NDArray[np.uint8],
    block_zyx: tuple[int, int, int],
    *,
    region: Box | None = None,
    params: EvaluateParams = PARAMS,
    **options: Any,
) -> Made:
    """Decode into an array, by blocks."""
    shape = probabilities.shape[1], probabilities.shape[2], probabilities.shape[3]
    made: list[NDArray[Any]] = []

    def out(kind: Any) -> NDArray[Any]:
        made.append(np.zeros(shape, kind))
        return made[0]

    blocks = BlockGrid(region or Box((0, 0, 0), shape), block_zyx)
    options = {"grid": GRID, "threshold": THRESHOLD} | options
    decoding = decode_blocks(probabilities, blocks=blocks, params=params, out=out, **options)
    largest = int(made[0].max())
    assert decoding.n_sites == (largest if decoding.table is None else (largest + 1) // 2)
    return Made(made[0], decoding.table)


def as_whole(
    probabilities: NDArray[np.uint8],
    *,
    params: EvaluateParams = PARAMS,
    neurons: NDArray[Any] | None = None,
    join_voxels: int = 0,
) -> Made:
    """Decode the whole volume at once."""
    ids = decode_pairs(
        probabilities,
        threshold=THRESHOLD,
        side_threshold=params.side_threshold,
        min_voxels=params.min_voxels,
        join_voxels=join_voxels,
    )
    table = partners_of(
        ids,
        voxel_nm=GRID.voxel_nm,
        offset_nm=GRID.offset_nm,
        probabilities_czyx=probabilities,
        neurons=neurons,
        min_side_voxels=params.min_side_voxels,
    )
    return Made(ids, table)


def same(one: Made, other: Made) -> None:
    """Expect the same ids in the same type, and the same rows, bit by bit."""
    assert one.ids.dtype == other.ids.dtype
    np.testing.assert_array_equal(one.ids, other.ids)
    assert one.table is not None
    assert other.table is not None
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)


def random_probabilities(seed: int, shape: tuple[int, int, int] = (7, 18, 19)) -> NDArray[np.uint8]:
    """Make tangled foreground of many sizes, in 5 to 40 % of the voxels."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((3, *shape)), (0, 0.7, 1.2, 1.2))
    spread = (smooth - smooth.mean()) / smooth.std()
    return (127 + 60 * (spread - rng.uniform(0.2, 1.6))).clip(0, 255).astype(np.uint8)


def random_neurons(seed: int, shape: tuple[int, int, int] = (7, 18, 19)) -> NDArray[np.uint64]:
    """Make neurons of some voxels across, among them 0 and one of 64 bits."""
    rng = np.random.default_rng(seed)
    ids = np.array([0, 5, 6, 7, 2**64 - 1], np.uint64)
    coarse = ids[rng.integers(0, len(ids), [n // 4 + 1 for n in shape])]
    return np.kron(coarse, np.ones((4, 4, 4), np.uint64))[tuple(slice(n) for n in shape)]


@pytest.mark.parametrize("join_voxels", [0, 1, 2])
@pytest.mark.parametrize("with_neurons", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_equal_the_whole(seed: int, with_neurons: bool, join_voxels: int) -> None:
    probabilities = random_probabilities(seed)
    neurons = random_neurons(seed) if with_neurons else None
    whole = as_whole(probabilities, neurons=neurons, join_voxels=join_voxels)
    assert len(whole.table if whole.table is not None else []) > 1
    sizes = np.random.default_rng(seed).integers((1, 4, 4), (8, 16, 16), (3, 3)).tolist()
    for z, y, x in [*sizes, (7, 18, 19)]:
        same(by_block(probabilities, (z, y, x), neurons=neurons, join_voxels=join_voxels), whole)


@pytest.mark.parametrize("join_voxels", [0, 2])
def test_blocks_of_a_voxel_or_two_equal_the_whole(join_voxels: int) -> None:
    probabilities = random_probabilities(0, (3, 6, 7))
    whole = as_whole(probabilities, join_voxels=join_voxels)
    assert whole.ids.any()
    for block in [(1, 1, 1), (1, 2, 1), (2, 1, 2)]:
        same(by_block(probabilities, block, join_voxels=join_voxels), whole)


@pytest.mark.parametrize("seed", range(4))
def test_the_whole_equals_growing_and_labelling_each_voxel(seed: int) -> None:
    union = random_probabilities(seed)[2]
    for join_voxels in (0, 1, 3):
        mask = union >= 128
        grown = ndimage.binary_dilation(mask, np.ones((1, 2 * join_voxels + 1, 2 * join_voxels + 1)))
        labelled, n = ndimage.label(grown, np.ones((3, 3, 3)))  # in scan order
        labelled *= mask
        small = np.bincount(labelled.ravel(), minlength=n + 1) < 9
        labelled[small[labelled]] = 0
        expected = np.unique(labelled, return_inverse=True)[1].reshape(labelled.shape)
        found = decode_union(union, threshold=0.5, min_voxels=9, join_voxels=join_voxels)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_region_is_decoded_as_if_there_were_nothing_else(seed: int) -> None:
    probabilities, neurons = random_probabilities(seed), random_neurons(seed)
    region = Box((1, 3, 2), (6, 17, 15))
    inside = (slice(None), *region.slices)
    whole = as_whole(
        np.ascontiguousarray(probabilities[inside]), neurons=neurons[region.slices], join_voxels=1
    )
    found = by_block(probabilities, (2, 5, 4), region=region, neurons=neurons, join_voxels=1)
    np.testing.assert_array_equal(found.ids[region.slices], whole.ids)
    assert found.ids.astype(bool).sum() == whole.ids.astype(bool).sum()
    assert found.table is not None
    assert whole.table is not None
    for axis, start in zip("zyx", region.start_zyx, strict=True):
        for side in ("pre", "post"):
            np.testing.assert_array_equal(
                found.table[f"{side}_{axis}"], whole.table[f"{side}_{axis}"] + start
            )
    assert (found.table.confidence == whole.table.confidence).all()


def test_without_sides_there_are_ids_and_no_table() -> None:
    union = random_probabilities(3)[2:]
    expected = decode_union(union[0], threshold=THRESHOLD, min_voxels=4)
    assert expected.max() > 3
    for block in [(7, 18, 19), (2, 5, 7)]:
        found = by_block(union, block)  # type: ignore[arg-type]
        assert found.table is None
        np.testing.assert_array_equal(found.ids, expected)


@pytest.mark.parametrize("n_synapses", [127, 128, 32_767, 32_768])
def test_many_synapses_keep_their_ids(n_synapses: int) -> None:
    spaced = np.zeros((3, 1, 2 * n_synapses, 4), np.uint8)
    spaced[0, 0, ::2, 0] = spaced[1, 0, ::2, 1] = 255
    spaced[2, 0, ::2, :2] = 255
    lowest = EvaluateParams(min_voxels=1, side_threshold=0.5, min_side_voxels=0)
    found = by_block(spaced, (1, n_synapses // 5, 1), params=lowest)
    assert found.ids.dtype == (np.uint16 if n_synapses < 32_768 else np.uint32)
    assert (found.ids[0, ::2, 0] == 2 * np.arange(1, n_synapses + 1) - 1).all()
    assert found.table is not None
    assert found.table.site.tolist() == list(range(1, n_synapses + 1))


def on_every_corner() -> NDArray[np.uint8]:
    """Put a synapse, its two sides at odds along x, on every corner of blocks of 6 x 8 x 8."""
    probabilities = np.zeros((3, 18, 32, 32), np.uint8)
    for z in (6, 12):
        for y in (8, 16, 24):
            for x in (8, 16, 24):
                box = slice(z - 1, z + 1), slice(y - 2, y + 2)
                probabilities[(0, *box, slice(x - 2, x))] = 200
                probabilities[(1, *box, slice(x, x + 2))] = 200
                probabilities[(2, *box, slice(x - 2, x + 2))] = 100 + z + 2 * y + x
    return probabilities


def test_synapses_on_all_the_corners_of_blocks() -> None:
    probabilities = on_every_corner()
    options: dict[str, Any] = {"params": PARAMS.model_copy(update={"min_voxels": 32}), "threshold": 0.3}
    found = by_block(probabilities, (6, 8, 8), **options)
    same(found, by_block(probabilities, (18, 32, 32), **options))
    assert found.table is not None
    assert len(found.table) == 18
    assert (found.table.pre_voxels == 16).all()
    assert found.table.confidence.nunique() > 10


def test_a_post_piece_goes_on_across_blocks() -> None:
    line = np.zeros((3, 1, 5, 12), np.uint8)
    line[0, 0, 2, :3] = line[1, 0, 0:5:2, 3:] = 200
    line[1, 0, 1, 8] = 200  # joins two of the three bars, in one block only
    line[2] = line[:2].max(axis=0)
    line[2, 0, :, 3] = 200
    found = by_block(line, (1, 1, 4))
    assert found.table is not None
    assert sorted(found.table.post_voxels) == [9, 19]
    same(found, as_whole(line))


def test_joining_reaches_over_a_narrow_block() -> None:
    cleft = np.zeros((3, 1, 1, 9), np.uint8)
    cleft[0, 0, 0, :2] = cleft[1, 0, 0, 7:] = 200
    cleft[2] = cleft[:2].max(axis=0)
    assert by_block(cleft, (1, 1, 2), join_voxels=2).ids.max() == 0  # two parts of two voxels
    found = by_block(cleft, (1, 1, 2), join_voxels=3)
    assert found.ids.ravel().tolist() == [1, 1, 0, 0, 0, 0, 0, 2, 2]
    same(found, as_whole(cleft, join_voxels=3))


def test_growth_ends_at_the_border_which_decides_the_order() -> None:
    two = np.zeros((3, 1, 4, 12), np.uint8)
    two[:, 0, 1, :4] = two[:, 0, 0, 8:] = 200  # once grown, both begin in row 0
    found = by_block(two, (1, 2, 5), join_voxels=1)
    assert (found.ids[0, 1, 0], found.ids[0, 0, 8]) == (2, 4)
    mask = two[2] > 0
    grown = ndimage.label(ndimage.binary_dilation(mask, np.ones((1, 3, 3))), np.ones((3, 3, 3)))[0]
    assert (grown[0, 1, 0], grown[0, 0, 8]) == (1, 2)
    same(found, as_whole(two, join_voxels=1))


def test_nothing_above_the_threshold() -> None:
    found = by_block(np.zeros((3, 4, 5, 6), np.uint8), (2, 2, 2))
    assert not found.ids.any()
    assert found.table is not None
    assert len(found.table) == 0


@dataclass(frozen=True)
class Folder:
    """A target that several processes write, a file for each block."""

    path: Path

    def write(self, region: tuple[slice, ...], array: NDArray[Any]) -> None:
        name = "_".join(f"{s.start}-{s.stop}" for s in region)
        np.save(self.path / f"{name}.npy", array)

    def read(self, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        whole = np.zeros(shape, kind)
        for path in self.path.glob("*.npy"):
            ends = [tuple(map(int, part.split("-"))) for part in path.stem.split("_")]
            whole[tuple(slice(*one) for one in ends)] = np.load(path)
        return whole


def test_two_processes_equal_one(tmp_path: Path) -> None:
    probabilities, neurons = random_probabilities(5), random_neurons(5)
    write_hdf5(tmp_path / "p.h5", {"main": probabilities, "neurons": neurons}, grid=GRID)
    openers: dict[str, Callable[[], Any]] = {
        name: partial(open_volume, f"{tmp_path / 'p.h5'}::{name}", ndim=None) for name in ("main", "neurons")
    }
    whole = as_whole(probabilities, neurons=neurons)
    (tmp_path / "ids").mkdir()
    target = Folder(tmp_path / "ids")
    decoding = decode_blocks(
        openers["main"],
        blocks=BlockGrid(Box((0, 0, 0), (7, 18, 19)), (3, 5, 8)),
        grid=GRID,
        params=PARAMS,
        threshold=THRESHOLD,
        out=lambda kind: target,
        neurons=openers["neurons"],
        workers=2,
        scratch=tmp_path / "scratch",
    )
    same(Made(target.read(probabilities.shape[1:], whole.ids.dtype), decoding.table), whole)
    assert list((tmp_path / "scratch").iterdir()) == []


class Interrupted:
    """Probabilities whose reading is interrupted after some blocks; it counts them."""

    def __init__(self, values: Any, after: int) -> None:
        self.values, self.shape, self.after, self.n_read = values, values.shape, after, 0

    def __getitem__(self, region: Any) -> Any:
        if self.n_read == self.after:
            raise KeyboardInterrupt
        self.n_read += 1
        return self.values[region]


def test_what_was_read_before_an_interruption_is_not_read_again(tmp_path: Path) -> None:
    values = random_probabilities(7)
    size, n_blocks = (4, 9, 10), 8
    once = {"scratch": tmp_path, "inputs": {"source": "one"}}
    with pytest.raises(KeyboardInterrupt):
        by_block(Interrupted(values, after=5), size, **once)
    (tmp_path / ".decode.blocks" / "voxels_7.partial").write_bytes(b"what a kill left of a file")
    rest = Interrupted(values, after=99)
    same(by_block(rest, size, **once), as_whole(values))
    assert rest.n_read == n_blocks - 5
    assert list(tmp_path.iterdir()) == []
    again = Interrupted(values, after=99)
    same(by_block(again, size, **once), as_whole(values))
    assert again.n_read == n_blocks


def test_what_was_laid_aside_of_other_probabilities_is_not_mixed_in(tmp_path: Path) -> None:
    values = random_probabilities(7)
    with pytest.raises(KeyboardInterrupt):
        by_block(Interrupted(values, after=5), (4, 9, 10), scratch=tmp_path, inputs={"source": "one"})
    other = Interrupted(values[:, ::-1], after=99)
    same(by_block(other, (4, 9, 10), scratch=tmp_path, inputs={"source": "other"}), as_whole(values[:, ::-1]))
    assert other.n_read == 8


def test_two_processes_do_not_decode_into_one_place(tmp_path: Path) -> None:
    with lasting_spool(tmp_path, {"inputs": 1}):
        with pytest.raises(SynmlopsError, match="another process decodes into it"):
            by_block(random_probabilities(7), (4, 9, 10), scratch=tmp_path, inputs={"source": "one"})
        assert (tmp_path / ".decode.blocks").exists()
    assert not (tmp_path / ".decode.blocks").exists()


def test_laid_aside_on_disk(tmp_path: Path) -> None:
    probabilities = random_probabilities(6)
    same(by_block(probabilities, (3, 7, 6), scratch=tmp_path), as_whole(probabilities))


def test_progress_is_told() -> None:
    told: list[int] = []
    by_block(random_probabilities(1), (4, 9, 10), report=lambda done, note: told.append(done))
    assert told == list(range(1, len(told) + 1))
    assert len(told) >= 16


def test_blocks_are_handed_out_as_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    values, n_blocks = on_every_corner(), 48
    handed, at_read, at_write = [], [], []
    every = BlockGrid.__iter__

    def watched(blocks: BlockGrid) -> Iterator[Block]:
        for block in every(blocks):
            handed.append(block.index)
            yield block

    class Source:
        shape = values.shape

        def __getitem__(self, region: Any) -> Any:
            at_read.append(len(handed))
            return values[region]

    class Target:
        def __setitem__(self, region: Any, ids: Any) -> None:
            at_write.append(len(handed))

    monkeypatch.setattr(BlockGrid, "__iter__", watched)
    decode_blocks(
        Source(),
        blocks=BlockGrid(Box((0, 0, 0), (18, 32, 32)), (6, 8, 8)),
        grid=GRID,
        params=PARAMS,
        threshold=0.3,
        out=lambda kind: Target(),
    )
    assert at_read == list(range(1, n_blocks + 1))
    assert at_write == list(range(2 * n_blocks + 1, 3 * n_blocks + 1))  # read and joined, then written


class EndsEarly:
    """Probabilities of which the last section is missing."""

    shape = (3, 7, 18, 19)

    def __getitem__(self, region: tuple[slice, ...]) -> NDArray[np.uint8]:
        return random_probabilities(1)[:, :6][region]


def test_what_a_user_can_mend_is_told_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = random_probabilities(1)
    with pytest.raises(SynmlopsError, match=r"neurons have the shape \(7, 18, 18\)"):
        by_block(probabilities, (4, 9, 9), neurons=random_neurons(1)[:, :, :-1])
    with pytest.raises(SynmlopsError, match="end early"):
        decode_blocks(
            EndsEarly(),
            blocks=BlockGrid(Box((0, 0, 0), (7, 18, 19)), (4, 9, 10)),
            grid=GRID,
            params=PARAMS,
            threshold=THRESHOLD,
            out=lambda kind: np.zeros((7, 18, 19), kind),
        )

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool_module.np, "save", full)
    with pytest.raises(SynmlopsError, match="disk is full"):
        by_block(probabilities, (4, 9, 10), scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_mistakes_of_a_caller_are_refused() -> None:
    probabilities = random_probabilities(1)
    for wrong, message in (
        ({"threshold": 1.5}, "0 to 1"),
        ({"region": Box((0, 0, 0), (8, 9, 9))}, "leaves the volume"),
        ({"workers": 2}, "scratch"),
    ):
        with pytest.raises(ValueError, match=message):
            by_block(probabilities, (4, 9, 10), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 or 1"):
        by_block(probabilities[:2], (4, 9, 10))
