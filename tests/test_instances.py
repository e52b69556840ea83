"""Decoding: worked answers on tiny volumes, and a voxel-by-voxel reference on random ones."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from synmlops.synapses.instances import components_of, decode_pairs, decode_union, id_type, level_of, sites_of


def _probabilities(*planes: list[int]) -> NDArray[np.uint8]:
    """Make (3, 1, 1, X) probabilities of pre, post and union along one line."""
    return np.array(planes, np.uint8).reshape(3, 1, 1, -1)


def _decode(probabilities: NDArray[np.uint8], **options: float) -> list[int]:
    settings = {"threshold": 0.5, "side_threshold": 0.5, "min_voxels": 1} | options
    return decode_pairs(probabilities, **settings).ravel().tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_synapses", "kind"),
    [
        (0, np.uint16),
        (127, np.uint16),
        (128, np.uint16),
        (32_767, np.uint16),
        (32_768, np.uint32),
        (2**31 - 1, np.uint32),
        (2**31, np.uint64),
    ],
)
def test_ids_fit_their_type(n_synapses: int, kind: type) -> None:
    assert id_type(2 * n_synapses) == kind
    assert int(np.array(2 * n_synapses, id_type(2 * n_synapses))) == 2 * n_synapses


@pytest.mark.parametrize("largest", [-1, 2**64])
def test_ids_beyond_64_bits_are_refused(largest: int) -> None:
    with pytest.raises(ValueError, match=r"2\*\*64"):
        id_type(largest)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_sites_do_not_wrap_at_the_largest_id(kind: type) -> None:
    largest = np.iinfo(kind).max
    sites = sites_of(np.array([0, 1, 2, largest - 1, largest], kind))
    assert [int(s) for s in sites] == [0, 1, 1, largest // 2, largest // 2 + 1]


def test_signed_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="unsigned"):
        sites_of(np.array([1, 2]))


def test_every_level_survives_the_way_through_a_fraction() -> None:
    assert [level_of(level / 255) for level in range(256)] == [1, *range(1, 256)]
    assert (level_of(0.2 + 0.4), level_of(0.5000001)) == (153, 128)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 1"):
            level_of(wrong)


@pytest.mark.parametrize("n_synapses", [127, 128, 129, 32_767, 32_768])
def test_many_synapses_keep_their_ids(n_synapses: int) -> None:
    spaced = np.zeros((3, 1, 2 * n_synapses, 4), np.uint8)
    spaced[0, 0, ::2, 0] = spaced[1, 0, ::2, 1] = 255
    spaced[2, 0, ::2, :2] = 255
    instances = decode_pairs(spaced, threshold=0.5, side_threshold=0.5, min_voxels=1)
    assert instances.dtype == id_type(2 * n_synapses)
    assert (instances[0, ::2, 0] == 2 * np.arange(1, n_synapses + 1) - 1).all()
    assert (instances[0, ::2, 1] == 2 * np.arange(1, n_synapses + 1)).all()


def test_each_voxel_goes_to_the_likelier_side_and_a_tie_to_post() -> None:
    assert _decode(_probabilities([200, 200, 150], [100, 200, 160], [255, 255, 255])) == [1, 2, 2]


def test_thresholds_are_inclusive() -> None:
    at = _probabilities([64, 63], [0, 0], [128, 128])
    assert _decode(at) == [1, 0]  # 0.5 * 255 = 127.5 and half of that 63.75, both rounded up
    assert _decode(at, threshold=128 / 255) == [1, 0]
    assert _decode(at, threshold=129 / 255) == [0, 0]


def test_a_union_without_sides_is_dropped_and_leaves_no_gap() -> None:
    sideless_first = _probabilities([0, 0, 0, 200, 0], [9, 0, 0, 0, 200], [200, 0, 0, 200, 200])
    assert _decode(sideless_first) == [0, 0, 0, 1, 2]


def test_a_site_may_show_one_side() -> None:
    assert _decode(_probabilities([0, 0, 200], [200, 0, 0], [200, 0, 200])) == [2, 0, 3]


def test_small_components_go_by_their_union_size() -> None:
    line = _probabilities([200, 0, 0, 0, 0], [0, 0, 200, 200, 9], [200, 0, 200, 200, 200])
    assert _decode(line, min_voxels=3) == [0, 0, 2, 2, 0]
    assert _decode(line, min_voxels=4) == [0] * 5


def test_components_touch_at_corners() -> None:
    cube = np.zeros((3, 2, 2, 2), np.uint8)
    cube[0, 0, 0, 0] = cube[1, 1, 1, 1] = cube[2, 0, 0, 0] = cube[2, 1, 1, 1] = 200
    instances = decode_pairs(cube, threshold=0.5, side_threshold=0.5, min_voxels=2)
    assert (instances[0, 0, 0], instances[1, 1, 1]) == (1, 2)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("axis", range(3))
def test_lines_of_single_voxels_are_labelled(n: int, axis: int) -> None:
    line = np.moveaxis((np.arange(n) % 2 == 0)[None, None], 2, axis)
    np.testing.assert_array_equal(components_of(line).ravel()[::2], 1 + np.arange((n + 1) // 2))


def test_components_of_an_empty_volume_and_of_none() -> None:
    assert not components_of(np.zeros((2, 3, 4), bool)).any()
    assert components_of(np.zeros((0, 3, 4), bool)).shape == (0, 3, 4)


def test_joining_bridges_a_cleft_in_plane_only_and_grows_nothing() -> None:
    cleft = _probabilities([200, 0, 0, 0, 0], [0, 0, 0, 200, 0], [200, 0, 0, 200, 0])
    assert _decode(cleft, join_voxels=0) == [1, 0, 0, 4, 0]
    assert _decode(cleft, join_voxels=1) == [1, 0, 0, 2, 0]
    across = np.moveaxis(cleft, 3, 1)
    assert _decode(across, join_voxels=9) == [1, 0, 0, 4, 0]
    along_y = np.moveaxis(cleft, 3, 2)
    assert _decode(along_y, join_voxels=1) == [1, 0, 0, 2, 0]


def test_nothing_above_the_threshold_gives_no_instance() -> None:
    empty = decode_pairs(np.zeros((3, 2, 3, 4), np.uint8), threshold=0, side_threshold=0, min_voxels=0)
    assert empty.shape == (2, 3, 4)
    assert not empty.any()
    assert not decode_union(np.zeros((2, 3, 4), np.uint8), threshold=0, min_voxels=0).any()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 1, 1, 1), np.uint8), np.zeros((3, 1, 1), np.uint8), np.zeros((3, 1, 1, 1), np.float32)],
)
def test_other_arrays_are_refused(wrong: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="probabilities must be"):
        decode_pairs(wrong, threshold=0.5, side_threshold=0.5, min_voxels=1)


@pytest.mark.parametrize("seed", range(6))
def test_random_volumes_equal_the_voxelwise_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = ndimage.gaussian_filter(rng.random((3, 9, 20, 21)), (0, 1, 1, 1))
    probabilities = ((probabilities - 0.3) / 0.4).clip(0, 1)
    probabilities_czyx = (probabilities * 255).astype(np.uint8)
    settings = {"threshold": 0.6, "side_threshold": 0.9, "min_voxels": 5}
    expected = _reference(probabilities_czyx, **settings)
    assert expected.max() > 4
    instances = decode_pairs(probabilities_czyx, **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(instances, expected)
    by_columns = decode_pairs(np.asfortranarray(probabilities_czyx), **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(by_columns, expected)


def _reference(
    probabilities_czyx: NDArray[np.uint8], *, threshold: float, side_threshold: float, min_voxels: float
) -> NDArray[np.int64]:
    pre, post, union = probabilities_czyx / 255
    labelled, n = ndimage.label(union >= threshold, np.ones((3, 3, 3)))
    instances = np.zeros(union.shape, np.int64)
    site = 0
    for component in range(1, n + 1):  # scan order, as scipy numbers
        inside = labelled == component
        sided = inside & (np.maximum(pre, post) >= side_threshold * threshold)
        if inside.sum() < min_voxels or not sided.any():
            continue
        site += 1
        instances[sided & (pre > post)] = 2 * site - 1
        instances[sided & (pre <= post)] = 2 * site
    return instances
