"""Touching synapses: worked examples of both ways to take them apart, and blocks that equal the whole."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from test_decoding import PARAMS, as_whole, by_block, random_neurons, random_probabilities, same

from synmlops.params import EvaluateParams
from synmlops.synapses.instances import sites_of
from synmlops.synapses.partners import partners_of
from synmlops.synapses.splitting import Site, SplitMode, SplitRules, split_site
from synmlops.volumes.store import Grid

VOXEL_NM = (40.0, 8.0, 8.0)


def split(
    sides: NDArray[np.uint8],
    mode: SplitMode,
    *,
    union: NDArray[np.uint8] | None = None,
    voxel_nm: tuple[float, float, float] = VOXEL_NM,
    min_voxels: int = 2,
    min_side_voxels: int = 2,
) -> NDArray[np.int64]:
    """Take apart what is not 0: 1 pre, 2 post, 3 neither. Gives a volume with 0 outside, synapses from 1."""
    index = np.nonzero(sides)
    side = np.where(sides[index] == 3, 0, sides[index]).astype(np.uint8)
    certain = np.full(len(side), 255, np.uint8) if union is None else union[index]
    rules = SplitRules(mode, min_voxels, min_side_voxels, voxel_nm)
    labels = np.zeros(sides.shape, np.int64)
    labels[index] = 1 + split_site(Site(index, side, certain), rules)  # type: ignore[arg-type]
    return labels


def picture(*rows: str) -> NDArray[np.uint8]:
    """Read a section: p pre, q post, n neither."""
    code = {".": 0, "p": 1, "q": 2, "n": 3}
    return np.array([[[code[mark] for mark in row] for row in rows]], np.uint8)


def test_every_pre_takes_what_is_nearest() -> None:
    labels = split(picture("ppqqqqqqpp", "ppnqqqqqpp"), "pre")
    assert labels[0].tolist() == [[1] * 5 + [2] * 5] * 2


def test_near_is_measured_along_the_site() -> None:
    horseshoe = picture(
        "qqqqqq.",
        "qq..qq.",
        "qq..qq.",
        "qq..qqq",
        "pp..qpp",
        "pp..qpp",
    )
    labels = split(horseshoe, "pre")
    assert labels[0, 3, 4] == 2
    assert labels[0, 0, 0] == 1
    # the tip of the left arm is nearer to the right pre through the gap, but not along the site
    gap = picture("ppqqqqqqq", "........q", "qqqqqqqqq", "qpp......")
    assert split(gap, "pre")[0, 2, 1] == 2
    assert split(gap, "pre")[0, 0, 4] == 1


@pytest.mark.parametrize(
    ("voxel_nm", "at_the_corner"), [((40.0, 8.0, 8.0), (0, 7)), ((8.0, 8.0, 40.0), (3, 0))]
)
def test_distance_is_in_nm(voxel_nm: tuple[float, float, float], at_the_corner: tuple[int, int]) -> None:
    angle = np.zeros((4, 1, 8), np.uint8)
    angle[:, 0, 0] = angle[0, 0, :] = 2
    angle[3, 0, 0] = angle[0, 0, 7] = 1  # three sections, or seven voxels, from the corner
    labels = split(angle, "pre", voxel_nm=voxel_nm, min_side_voxels=1)
    assert labels.max() == 2
    z, x = at_the_corner
    assert labels[0, 0, 0] == labels[z, 0, x]


def test_one_pre_or_a_speck_of_another_is_one_synapse() -> None:
    for row in ("ppqqqqqqqq", "ppqqqqqqqp", "qqqqqqqqqq"):
        assert split(picture(row), "pre").max() == 1
    assert split(picture("ppqqqqqqqp"), "pre", min_side_voxels=1).max() == 2


def test_no_synapse_is_smaller_than_the_least() -> None:
    site = picture("ppqqqpp", "ppqqqqq", "ppqqqqq")
    assert split(site, "pre", min_voxels=8).max() == 2
    assert split(site, "pre", min_voxels=11).max() == 1  # of 21 voxels
    three = picture("ppqqqpp.qqqpp", "ppqqqppqqqqpp")
    sizes = np.bincount(split(three, "pre", min_voxels=9).ravel())[1:]
    assert sizes.min() >= 9
    assert sizes.sum() == np.count_nonzero(three)


def balls(distance: int) -> NDArray[np.uint8]:
    """Put two balls of radius 8 side by side."""
    z, y, x = np.ogrid[-8:9, -9:10, -20:21]
    near = [(z * 1.0) ** 2 + y**2 + (x - at) ** 2 <= 64 for at in (-distance / 2, distance / 2)]
    return (near[0] | near[1]).astype(np.uint8) * 2


def test_a_watershed_cuts_at_a_neck() -> None:
    two = balls(14)
    labels = split(two, "watershed", voxel_nm=(8.0, 8.0, 8.0))
    assert labels.max() == 2
    assert (labels[:, :, :20][two[:, :, :20] > 0] == 1).mean() > 0.95
    assert (labels[:, :, 21:][two[:, :, 21:] > 0] == 2).mean() > 0.95
    assert split(balls(6), "watershed", voxel_nm=(8.0, 8.0, 8.0)).max() == 1  # no neck
    assert split(balls(0), "watershed", voxel_nm=(8.0, 8.0, 8.0)).max() == 1


def test_a_watershed_meets_where_the_union_is_doubtful() -> None:
    two = balls(14)
    union = np.full(two.shape, 250, np.uint8)
    union[:, :, 22:24] = 140
    labels = split(two, "watershed", voxel_nm=(8.0, 8.0, 8.0), union=union)
    assert set(labels[:, :, 21][two[:, :, 21] > 0].tolist()) == {1}
    assert set(labels[:, :, 24][two[:, :, 24] > 0].tolist()) == {2}


@pytest.mark.parametrize("mode", ["pre", "watershed"])
@pytest.mark.parametrize("with_neurons", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_equal_the_whole(seed: int, with_neurons: bool, mode: SplitMode) -> None:
    probabilities = random_probabilities(seed)
    params = PARAMS.model_copy(update={"split": mode, "min_side_voxels": 3})
    neurons = random_neurons(seed) if with_neurons else None
    whole = by_block(probabilities, (7, 18, 19), params=params, neurons=neurons)
    assert whole.ids.max() > as_whole(probabilities).ids.max()
    for block in [(3, 5, 7), (2, 18, 6), (7, 4, 19)]:
        same(by_block(probabilities, block, params=params, neurons=neurons), whole)
    assert np.unique(sites_of(whole.ids)).tolist() == list(range(int(sites_of(whole.ids).max()) + 1))
    # the table is that of the instances
    table = partners_of(
        whole.ids,
        voxel_nm=(40, 8, 4),
        offset_nm=(400, 80, 12),
        probabilities_czyx=probabilities,
        neurons=neurons,
        min_side_voxels=3,
    )
    assert whole.table is not None
    assert table.equals(whole.table)


def test_what_has_no_side_is_no_synapse_once_apart() -> None:
    two = np.stack([balls(14), balls(14), balls(14)]).astype(np.uint8) * 120
    two[:2, :, :, 16:] = 0
    params = EvaluateParams(min_voxels=50, split="watershed")
    found = by_block(two, (9, 10, 11), params=params, grid=Grid((8.0, 8.0, 8.0)))
    assert found.ids.max() == 2
    np.testing.assert_array_equal(found.ids > 0, two[0] > 0)


def test_with_joining_and_for_the_union_alone() -> None:
    probabilities = random_probabilities(4)
    params = PARAMS.model_copy(update={"split": "pre"})
    whole = by_block(probabilities, (7, 18, 19), params=params, join_voxels=1)
    same(by_block(probabilities, (2, 7, 6), params=params, join_voxels=1), whole)
    watershed = PARAMS.model_copy(update={"split": "watershed"})
    union = probabilities[2:]
    one, many = (by_block(union, block, params=watershed).ids for block in ((7, 18, 19), (3, 6, 8)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(one, many)
    assert (np.diff(np.unique(one, return_index=True)[1][1:]) > 0).all()  # numbered in scan order
    assert one.max() > by_block(union, (7, 18, 19)).ids.max()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="join_voxels"):
        by_block(probabilities, (7, 18, 19), params=watershed, join_voxels=1)


def test_two_touching_synapses_are_two_rows() -> None:
    two: NDArray[Any] = np.zeros((3, 4, 12, 40), np.uint8)
    two[0, :, 2:6, 2:18] = two[1, :, 6:10, 2:20] = 220
    two[0, :, 6:10, 22:38] = two[1, :, 2:6, 20:38] = 220
    two[2] = two[:2].max(axis=0)
    params = EvaluateParams(min_voxels=50, min_side_voxels=10, split="none")
    found = {
        mode: by_block(two, (3, 12, 16), params=params.model_copy(update={"split": mode}))
        for mode in ("none", "pre")
    }
    assert found["none"].ids.max() == 2
    assert found["pre"].ids.max() == 4
    table = found["pre"].table
    assert table is not None
    assert ndimage.label(two[0] > 0)[1] == len(table) == 2
    assert (table.pre_x < 20).tolist() == (table.post_x < 21).tolist() == [True, False]
