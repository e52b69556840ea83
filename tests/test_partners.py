"""The partner table: worked answers on lines of voxels, and a site-by-site reference on random volumes."""

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from synmlops.synapses.partners import neurons_under, partners_of
from synmlops.volumes.table import COLUMNS, edges_of, read_table, write_table

VOXEL_NM = (40.0, 8.0, 4.0)


def _line(*ids: int) -> NDArray[np.uint16]:
    return np.array([[ids]], np.uint16)


def _columns(table: pd.DataFrame, *names: str) -> list[list[float]]:
    return table[list(names)].to_numpy(np.float64).tolist()


def test_one_pair_by_hand() -> None:
    labels = np.zeros((3, 4, 6), np.uint16)
    labels[1, 1:3, 1:4] = 1
    labels[1:3, 3, 2] = 2
    probabilities = np.zeros((3, 3, 4, 6), np.uint8)
    probabilities[2, 1, 1:3, 1:4] = 255
    probabilities[2, 1:3, 3, 2] = 51
    table = partners_of(
        labels, voxel_nm=VOXEL_NM, offset_nm=(1000, 100, 10), probabilities_czyx=probabilities
    )
    assert {name: str(kind) for name, kind in table.dtypes.items()} == COLUMNS
    assert table.iloc[0].to_dict() == {
        "site": 1,
        "partner": 1,
        # centroids: pre (1, 1.5, 2), between two voxels, the first of which is taken; post (1.5, 3, 2)
        "pre_z_nm": 1040,
        "pre_y_nm": 108,
        "pre_x_nm": 18,
        "post_z_nm": 1040,
        "post_y_nm": 124,
        "post_x_nm": 18,
        "pre_z": 1,
        "pre_y": 1,
        "pre_x": 2,
        "post_z": 1,
        "post_y": 3,
        "post_x": 2,
        "pre_voxels": 6,
        "post_voxels": 2,
        "z0": 1,
        "y0": 1,
        "x0": 1,
        "z1": 3,
        "y1": 4,
        "x1": 4,
        "confidence": pytest.approx((6 * 1 + 2 * 0.2) / 8),
        "pre_neuron": 0,
        "post_neuron": 0,
        "self_contact": False,
    }


def test_a_point_lies_inside_a_bent_side() -> None:
    labels = np.zeros((1, 5, 5), np.uint16)
    labels[0, 0, :] = labels[0, 4, :] = labels[0, :, 0] = 1  # a C, whose centroid lies outside it
    labels[0, 2, 2:] = 2
    table = partners_of(labels, voxel_nm=(1, 1, 1))
    row = table.iloc[0]
    assert labels[int(row.pre_z), int(row.pre_y), int(row.pre_x)] == 1
    assert labels[int(row.post_z), int(row.post_y), int(row.post_x)] == 2
    assert (row.post_y, row.post_x) == (2, 3)


def test_the_nearest_voxel_is_nearest_in_nm() -> None:
    labels = np.zeros((5, 1, 21), np.uint16)
    labels[0, 0, 8:13] = labels[4, 0, 8:13] = labels[2, 0, 5] = 1  # centroid (2, 0, 9.5) or so
    labels[2, 0, 0] = 2
    far_sections = partners_of(labels, voxel_nm=(400, 1, 1)).iloc[0]
    assert (far_sections.pre_z, far_sections.pre_x) == (2, 5)
    thin_sections = partners_of(labels, voxel_nm=(1, 1, 4)).iloc[0]
    assert (thin_sections.pre_z, thin_sections.pre_x) == (0, 10)


def test_posts_are_told_apart_by_component() -> None:
    table = partners_of(_line(1, 2, 0, 2, 2, 0, 3, 4), voxel_nm=VOXEL_NM)
    assert _columns(table, "site", "partner", "pre_x", "post_x", "post_voxels", "x0", "x1") == [
        [1, 1, 0, 1, 1, 0, 2],
        [1, 2, 0, 3, 2, 0, 5],
        [2, 3, 6, 7, 1, 6, 8],
    ]


def test_posts_are_told_apart_by_neuron() -> None:
    neurons = np.array([[[9, 7, 7, 5, 5, 5]]], np.uint64)
    table = partners_of(_line(1, 2, 2, 2, 2, 2), voxel_nm=VOXEL_NM, neurons=neurons)
    assert _columns(table, "pre_neuron", "post_neuron", "post_voxels", "post_x") == [
        [9, 5, 3, 4],
        [9, 7, 2, 1],
    ]


def test_neuron_ids_of_64_bits_stay_exact() -> None:
    neurons = np.array([[[2**64 - 1, 2**64 - 2]]], np.uint64)
    row = partners_of(_line(1, 2), voxel_nm=VOXEL_NM, neurons=neurons)
    assert row.pre_neuron[0] == 2**64 - 1
    assert row.post_neuron[0] == 2**64 - 2


def test_the_pre_neuron_has_most_voxels_and_holds_the_point() -> None:
    neurons = np.array([[[4, 4, 4, 0, 0, 0, 0, 3, 3, 8]]], np.uint32)
    table = partners_of(_line(1, 1, 1, 1, 1, 1, 1, 1, 1, 2), voxel_nm=VOXEL_NM, neurons=neurons)
    assert _columns(table, "pre_neuron", "pre_x", "pre_voxels", "post_neuron") == [[4, 1, 9, 8]]


def test_a_post_in_the_pre_neuron_goes_unless_alone() -> None:
    neurons = np.array([[[4, 4, 4, 4, 5]]], np.uint32)
    table = partners_of(_line(1, 2, 2, 2, 2), voxel_nm=VOXEL_NM, neurons=neurons, min_side_voxels=2)
    assert _columns(table, "pre_neuron", "post_neuron", "post_voxels", "self_contact") == [[4, 5, 1, 0]]
    alone = partners_of(_line(1, 2, 2, 2, 0), voxel_nm=VOXEL_NM, neurons=neurons)
    assert _columns(alone, "pre_neuron", "post_neuron", "post_voxels", "self_contact") == [[4, 4, 3, 1]]


def test_background_is_a_partner_only_where_there_is_no_neuron() -> None:
    labels = _line(1, 2, 2, 2, 0, 3, 4)
    neurons = np.array([[[4, 0, 0, 6, 0, 0, 0]]], np.uint32)
    table = partners_of(labels, voxel_nm=VOXEL_NM, neurons=neurons)
    assert _columns(table, "pre_neuron", "post_neuron", "post_voxels") == [[4, 6, 1], [0, 0, 1]]
    assert not table.self_contact.any()  # not known of what lies in no neuron


def test_slivers_are_no_partners_but_the_largest_piece_stays() -> None:
    labels = _line(1, 2, 0, 2, 2, 0, 2, 2, 2)
    sizes = [
        partners_of(labels, voxel_nm=VOXEL_NM, min_side_voxels=n).post_voxels.tolist() for n in (0, 2, 3, 99)
    ]
    assert sizes == [[1, 2, 3], [2, 3], [3], [3]]


@pytest.mark.parametrize("ids", [(0, 0), (1, 0), (2, 0), (1, 4), (2, 3)])
@pytest.mark.parametrize("with_neurons", [True, False])
def test_a_site_without_both_sides_gives_no_row(ids: tuple[int, int], with_neurons: bool) -> None:
    neurons = np.ones((1, 1, 2), np.uint64) if with_neurons else None
    table = partners_of(_line(*ids), voxel_nm=VOXEL_NM, neurons=neurons)
    assert {name: str(kind) for name, kind in table.dtypes.items()} == COLUMNS
    assert len(table) == 0


def test_a_half_site_beside_whole_ones_is_left_out() -> None:
    table = partners_of(_line(1, 2, 3, 0, 6, 0, 7, 8, 10), voxel_nm=VOXEL_NM)
    assert table.site.tolist() == [1, 4]


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="unsigned"):
        partners_of(np.ones((1, 1, 2), np.int64), voxel_nm=VOXEL_NM)
    with pytest.raises(ValueError, match="neurons"):
        partners_of(_line(1, 2), voxel_nm=VOXEL_NM, neurons=np.ones((1, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="probabilities"):
        partners_of(_line(1, 2), voxel_nm=VOXEL_NM, probabilities_czyx=np.ones((3, 1, 1, 2)))  # type: ignore[arg-type]


def test_the_table_survives_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    table = partners_of(_line(1, 2, 0, 2), voxel_nm=VOXEL_NM)
    write_table(table, tmp_path / "partners.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "partners.parquet"), table)


def test_a_table_of_before_there_was_a_flag_gets_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    neurons = np.array([[[4, 4, 0, 0]]], np.uint32)
    table = partners_of(_line(1, 2, 3, 4), voxel_nm=VOXEL_NM, neurons=neurons)
    assert table.self_contact.tolist() == [True, False]
    table.drop(columns="self_contact").to_parquet(tmp_path / "old.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "old.parquet"), table)


def test_edges_count_the_partners_of_two_neurons() -> None:
    neurons = np.array([[[7, 4, 4, 7, 4, 4, 9, 0, 9, 9]]], np.uint64)
    labels = _line(1, 2, 0, 3, 4, 0, 5, 6, 7, 8)
    probabilities = np.full((3, 1, 1, 10), 51, np.uint8)
    table = partners_of(labels, voxel_nm=VOXEL_NM, neurons=neurons, probabilities_czyx=probabilities)
    edges = edges_of(table)
    assert edges.drop(columns="confidence_sum").to_numpy().tolist() == [[7, 4, 2], [9, 9, 1]]
    assert edges.confidence_sum.tolist() == pytest.approx([0.4, 0.2])
    assert edges_of(table[:0]).columns.tolist() == ["pre_neuron", "post_neuron", "count", "confidence_sum"]


@pytest.mark.parametrize("memory", ["C", "F"])
@pytest.mark.parametrize("by_neuron", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_volumes_equal_the_site_by_site_reference(seed: int, by_neuron: bool, memory: str) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 9, (4, 6, 6)) * (rng.random((4, 6, 6)) < 0.7)
    labels = np.kron(coarse, np.ones((2, 3, 3), int)).astype(np.uint16)
    labels *= rng.random(labels.shape) < 0.9
    neurons = ndimage.zoom(rng.integers(0, 4, (2, 3, 3)), (4, 6, 6), order=0).astype(np.uint32)
    union = rng.integers(0, 256, (3, *labels.shape), dtype=np.uint8)
    table = partners_of(
        np.asarray(labels, order=memory),  # type: ignore[call-overload]
        voxel_nm=VOXEL_NM,
        offset_nm=(7, 8, 9),
        probabilities_czyx=union,
        neurons=neurons if by_neuron else None,
        min_side_voxels=12,
    )
    expected = _reference(labels, neurons if by_neuron else None, union[2], min_side_voxels=12)
    assert len(expected) > 3
    names = ["site", "pre_neuron", "post_neuron", "pre_voxels", "post_voxels", "confidence"]
    names += [f"{side}_{axis}" for side in ("pre", "post") for axis in "zyx"]
    names += [f"{axis}{end}" for end in (0, 1) for axis in "zyx"]
    np.testing.assert_allclose(table[names].to_numpy(np.float64), expected, atol=1e-9)
    assert table.partner.tolist() == list(range(1, len(table) + 1))
    np.testing.assert_allclose(table.post_y_nm, 8 + table.post_y * 8)


def _reference(
    labels: NDArray[np.uint16],
    neurons: NDArray[np.uint32] | None,
    union: NDArray[np.uint8],
    *,
    min_side_voxels: int,
) -> list[list[float]]:
    rows: list[list[float]] = []
    for site in range(1, int(labels.max()) // 2 + 1):
        pre, post = labels == 2 * site - 1, labels == 2 * site
        if not pre.any() or not post.any():
            continue
        pre_neuron, pre_core = 0, pre
        if neurons is not None:
            counts = np.bincount(neurons[pre], minlength=2)
            pre_neuron = int(counts[1:].argmax()) + 1 if counts[1:].any() else 0
            pre_core = pre & (neurons == pre_neuron)
        for post_neuron, piece in _post_pieces(post, neurons, pre_neuron, min_side_voxels):
            both = np.argwhere(pre | piece)
            rows.append(
                [
                    *(site, pre_neuron, post_neuron, pre.sum(), piece.sum()),
                    union[pre | piece].mean() / 255,
                    *(*_central(pre_core), *_central(piece), *both.min(axis=0), *(both.max(axis=0) + 1)),
                ]
            )
    return rows


def _post_pieces(
    post: NDArray[np.bool_], neurons: NDArray[np.uint32] | None, pre_neuron: int, min_side_voxels: int
) -> list[tuple[int, NDArray[np.bool_]]]:
    if neurons is None:
        labelled, n = ndimage.label(post, np.ones((3, 3, 3)))
        pieces = [(0, labelled == i) for i in range(1, n + 1)]
    else:
        pieces = [(int(i), post & (neurons == i)) for i in np.unique(neurons[post])]
        pieces = [p for p in pieces if p[0] != pre_neuron or p[0] == 0] or pieces
        pieces = [p for p in pieces if p[0] != 0] or pieces
    largest = max(piece.sum() for _, piece in pieces)
    first_largest = next(i for i, (_, piece) in enumerate(pieces) if piece.sum() == largest)
    return [p for i, p in enumerate(pieces) if i == first_largest or p[1].sum() >= min_side_voxels]


def _central(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    voxels = np.argwhere(mask)
    distance = (((voxels - voxels.mean(axis=0)) * VOXEL_NM) ** 2).sum(axis=1)
    nearest: NDArray[np.int64] = voxels[np.argmin(np.round(distance, 3))]
    return nearest


def test_neurons_under_points_are_those_of_the_nearest_voxel() -> None:
    neurons = np.arange(1, 13, dtype=np.uint64).reshape(2, 2, 3)
    points = np.array(
        [[[100, 0, 0], [139, 5, 9]], [[119, 3, 2.1], [161, 0, 0]], [[100, 12.1, 0], [79, 0, 0]]]
    )
    under = neurons_under(points, neurons, voxel_nm=VOXEL_NM, offset_nm=(100, 0, 0))
    assert under.tolist() == [[1, 12], [2, 0], [0, 0]]
    assert neurons_under(np.empty((0, 2, 3)), neurons, voxel_nm=VOXEL_NM).shape == (0, 2)
