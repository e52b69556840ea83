"""Volumes are checked before training, and counts and pooling agree with plain arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from synmlops.params import SynmlopsError
from synmlops.volumes import labels
from synmlops.volumes.labels import (
    check_image,
    check_label,
    count_components,
    count_in,
    foreground_sum,
    foreground_sums,
    smallest_unsigned,
)
from synmlops.volumes.pooling import pool_image, pool_label, pool_mask, pooled_slabs
from synmlops.volumes.store import Volume, open_volume, write_hdf5


def _volume(path: Path, array: NDArray[Any]) -> Volume:
    write_hdf5(path / "a.h5", {"main": array}, grid=None)
    return open_volume(path / "a.h5")


@pytest.fixture(autouse=True)
def _one_section_per_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is right for one slab must be right across slabs."""
    plain = Volume.slabs
    monkeypatch.setattr(Volume, "slabs", lambda self, n=1, *, multiple=1: plain(self, n, multiple=multiple))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_levels_are_counted(tmp_path: Path, dtype: Any) -> None:
    image = np.random.default_rng(0).integers(3, 250, (4, 20, 30)).astype(dtype)
    with _volume(tmp_path, image) as volume:
        found = check_image(volume)
    assert (found.lowest, found.highest) == (image.min(), image.max())
    assert found.mean == pytest.approx(image.mean())
    assert found.std == pytest.approx(image.std())
    assert found.percentile(50) == np.percentile(image, 50, method="inverted_cdf")
    assert found.percentile(100) == image.max()


def _with(array: NDArray[Any], at: tuple[int, int, int], value: float) -> NDArray[Any]:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (_with(np.ones((3, 4, 5), np.float32), (2, 1, 3), np.nan), r"NaN .*first at z y x = \(2, 1, 3\)"),
        (np.ones((3, 4, 5), np.float32), "is float32.*convert it to uint8"),
        (np.ones((3, 4, 5), np.int16), "is int16, an image must be uint8 or uint16"),
        (np.full((3, 4, 5), 7, np.uint8), "is 7 everywhere"),
    ],
)
def test_a_bad_image_is_refused(tmp_path: Path, image: NDArray[Any], message: str) -> None:
    with _volume(tmp_path, image) as volume, pytest.raises(SynmlopsError, match=message) as caught:
        check_image(volume)
    assert "a.h5::main: " in str(caught.value)


def _label(*ids: int, dtype: Any = np.uint32) -> NDArray[Any]:
    """Give a label with each id in a row of its own."""
    label = np.zeros((2, max(len(ids), 1), 3), dtype)
    for row, value in enumerate(ids):
        label[:, row, 1] = value
    return label


def test_a_good_label_is_summed_up(tmp_path: Path) -> None:
    with _volume(tmp_path, _label(1, 2, 5, 6)) as volume:
        found = check_label(volume, "pairs")
    assert (found.sites, found.foreground, found.voxels, found.largest_id) == (2, 8, 24, 6)
    assert found.ids.tolist() == [1, 2, 5, 6]
    assert found.sizes.tolist() == [2, 2, 2, 2]
    assert found.problems == ()


def test_lonely_sides_are_told_but_allowed(tmp_path: Path) -> None:
    with _volume(tmp_path, _label(1, 2, 5, 8, dtype=np.int64)) as volume:
        found = check_label(volume, "pairs")
    assert found.problems == (
        "1 of 3 sites have a pre but no post side, first id 5",
        "1 of 3 sites have a post but no pre side, first id 8",
    )


def test_ids_beyond_31_bits_are_kept(tmp_path: Path) -> None:
    with _volume(tmp_path, _label(2**33 + 1, 2**33 + 2, dtype=np.uint64)) as volume:
        assert check_label(volume, "pairs").largest_id == 2**33 + 2


@pytest.mark.parametrize(
    ("label", "kind", "message"),
    [
        (_label(1, 2, dtype=np.float32), "pairs", "is float32, a label holds whole numbers"),
        (_label(1, -3, dtype=np.int32), "union", r"is -3 somewhere, first negative at z y x = \(0, 1, 1\)"),
        (_label(0), "union", "has no foreground"),
        (_label(1, 3, 5), "pairs", "has no post side, a pairs label needs even values.*label_kind to union"),
        (_label(2, 4), "pairs", "has no pre side"),
        (_label(1, 2, 7), "semantic", "holds 7, a semantic label knows 0, 1"),
        (_label(255), "semantic", "holds 255"),
        (_label(1), "semantic", "has no post side"),
    ],
)
def test_a_bad_label_is_refused(tmp_path: Path, label: NDArray[Any], kind: Any, message: str) -> None:
    with _volume(tmp_path, label) as volume, pytest.raises(SynmlopsError, match=message) as caught:
        check_label(volume, kind)
    assert "a.h5::main: " in str(caught.value)


def test_an_unknown_kind_is_a_mistake(tmp_path: Path) -> None:
    with _volume(tmp_path, _label(1)) as volume, pytest.raises(ValueError, match="label kind"):
        check_label(volume, "pair")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, "u1"), (255, "u1"), (256, "u2"), (65536, "u4"), (2**32, "u8")]
)
def test_the_smallest_type_that_holds_an_id(largest: int, dtype: str) -> None:
    assert smallest_unsigned(largest) == np.dtype(dtype)


def test_components_across_slabs_agree_with_scipy() -> None:
    mask = np.random.default_rng(1).random((12, 24, 24)) < 0.06
    want = ndimage.label(mask, np.ones((3, 3, 3)))[1]
    assert want > 20
    for step in (1, 5, 12):
        assert count_components([mask[z : z + step] for z in range(0, 12, step)]) == want
    assert count_components([np.zeros((2, 3, 3))]) == 0


def test_counts_in_boxes_agree_with_counting() -> None:
    rng = np.random.default_rng(2)
    label, mask = rng.integers(0, 3, (6, 9, 11)), rng.random((6, 9, 11)) < 0.7
    table = foreground_sum(label, mask)
    assert table.shape == (7, 10, 12)
    assert table.dtype == np.int32
    starts = np.stack([rng.integers(0, n, 50) for n in (4, 6, 5)], axis=1)
    want = [np.count_nonzero((label * mask)[z : z + 3, y : y + 4, x : x + 7]) for z, y, x in starts]
    assert count_in(table, starts, (3, 4, 7)).tolist() == want
    assert count_in(table, [[0, 0, 0]], (6, 9, 11)) == np.count_nonzero(label * mask)
    assert len(count_in(table, np.empty((0, 3)), (1, 1, 1))) == 0
    by_slab = np.concatenate(list(foreground_sums([label[:1], label[1:4], label[4:]], dtype=np.int32)))
    np.testing.assert_array_equal(by_slab, foreground_sum(label))


def test_counts_that_pass_31_bits_do_not_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels.np, "count_nonzero", lambda _: 2**31)
    assert foreground_sum(np.ones((1, 1, 1), bool)).dtype == np.int64


@pytest.mark.parametrize("start", [(-1, 0, 0), (0, 0, 2)])
def test_a_box_outside_is_a_mistake(start: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="leaves the volume"):
        count_in(foreground_sum(np.ones((2, 2, 3))), [start], (1, 1, 2))


def test_pooling() -> None:
    image = np.array([[[250, 255, 1, 2, 9], [251, 255, 2, 2, 9]]], np.uint8)
    assert pool_image(image, (1, 2, 2)).tolist() == [[[253, 2]]]
    label = np.array([[[3, 0, 4, 4, 9, 0, 0, 6], [5, 5, 3, 3, 0, 0, 7, 0]]], np.uint64) << np.uint64(40)
    assert (pool_label(label, (1, 2, 2)) >> np.uint64(40)).tolist() == [[[5, 4, 9, 7]]]
    assert pool_label(label, (1, 1, 1)) is label
    assert pool_mask(np.array([[[1, 1, 1, 0]]]), (1, 1, 2)).tolist() == [[[1, 0]]]


def test_pooling_by_slab_is_pooling_at_once(tmp_path: Path) -> None:
    label = np.random.default_rng(3).integers(0, 4, (7, 9, 8)).astype(np.uint8)
    with _volume(tmp_path, label) as volume:
        parts = list(pooled_slabs(volume, (2, 2, 4), pool_label))
    assert [z for z, _ in parts] == [0, 1, 2]
    np.testing.assert_array_equal(np.concatenate([p for _, p in parts]), pool_label(label, (2, 2, 4)))
    assert pool_label(label, (2, 2, 4)).shape == (3, 4, 2)
