"""The phantom: what it promises about its labels, neurons, partners and look-alikes."""

from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import label

from synmlops.params import SynmlopsError
from synmlops.volumes.phantom import Phantom, make_phantom
from synmlops.volumes.phantom_synapses import RADIUS_NM
from synmlops.volumes.table import COLUMNS, points_nm

SIZE = (20, 192, 192)
VOXEL = (40.0, 8.0, 8.0)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(size_zyx=SIZE, voxel_nm=VOXEL, seed=3, offset_nm=(400.0, 80.0, 0.0))


def test_gives_what_it_says(phantom: Phantom) -> None:
    assert phantom.image.dtype == np.uint8
    assert phantom.labels.dtype == np.uint32
    assert phantom.neurons.dtype == np.uint32
    assert phantom.image.shape == phantom.labels.shape == phantom.neurons.shape == SIZE
    assert {name: str(kind) for name, kind in phantom.partners.dtypes.items()} == COLUMNS
    assert phantom.grid.voxel_nm == VOXEL
    assert np.array_equal(np.unique(phantom.neurons), np.arange(1, phantom.neurons.max() + 1))


def test_same_seed_gives_the_same_bytes(phantom: Phantom) -> None:
    again = make_phantom(size_zyx=SIZE, voxel_nm=VOXEL, seed=3, offset_nm=(400.0, 80.0, 0.0))
    assert np.array_equal(again.image, phantom.image)
    assert np.array_equal(again.labels, phantom.labels)
    assert np.array_equal(again.neurons, phantom.neurons)
    assert again.partners.equals(phantom.partners)
    other = make_phantom(size_zyx=SIZE, voxel_nm=VOXEL, seed=4)
    assert not np.array_equal(other.image, phantom.image)


def test_each_side_lies_in_its_neurons(phantom: Phantom) -> None:
    table = phantom.partners
    assert len(table) > 0
    for site, rows in table.groupby("site"):
        pre = phantom.neurons[phantom.labels == 2 * site - 1]
        post = phantom.neurons[phantom.labels == 2 * site]
        assert set(pre) == set(rows["pre_neuron"])
        assert set(post) == set(rows["post_neuron"])
        assert len(rows) == len(set(rows["post_neuron"])) <= 4
        assert pre[0] not in post
        for row in rows.itertuples():
            assert row.pre_voxels == len(pre)
            assert row.post_voxels == np.count_nonzero(post == row.post_neuron)
            assert row.post_voxels >= 50


def test_table_numbers_every_labelled_site(phantom: Phantom) -> None:
    table = phantom.partners
    n_sites = int(table["site"].max())
    assert set(np.unique(phantom.labels)) == set(range(2 * n_sites + 1))
    assert list(table["partner"]) == list(range(1, len(table) + 1))
    assert (table["confidence"] == 1).all()
    assert n_sites == sum(site.kind == "synapse" for site in phantom.sites)


def test_points_lie_in_their_side_and_positions_are_nm(phantom: Phantom) -> None:
    table = phantom.partners
    for row in table.itertuples():
        pre, post = (row.pre_z, row.pre_y, row.pre_x), (row.post_z, row.post_y, row.post_x)
        assert phantom.labels[pre] == 2 * row.site - 1
        assert phantom.labels[post] == 2 * row.site
        assert phantom.neurons[pre] == row.pre_neuron
        assert phantom.neurons[post] == row.post_neuron
        for at, low, high in zip(pre, (row.z0, row.y0, row.x0), (row.z1, row.y1, row.x1), strict=True):
            assert low <= at < high
    voxels = table[[f"{side}_{axis}" for side in ("pre", "post") for axis in "zyx"]].to_numpy()
    expected = voxels.reshape(-1, 2, 3) * np.array(VOXEL) + np.array([400.0, 80.0, 0.0])
    assert np.array_equal(points_nm(table), expected)


def test_sites_are_as_large_as_real_ones_and_seldom_touch(phantom: Phantom) -> None:
    n_sites = int(phantom.partners["site"].max())
    for site in range(1, n_sites + 1):
        for side in (2 * site - 1, 2 * site):
            at = np.argwhere(phantom.labels == side)
            assert len(at) >= 100
            assert np.ptp(at[:, 0]) + 1 >= 3
        at = np.argwhere((phantom.labels + 1) // 2 == site) * np.array(VOXEL)
        assert 150 < np.ptp(at, axis=0).max() < 2 * RADIUS_NM[1] + 80
    _, components = label(phantom.labels > 0, structure=np.ones((3, 3, 3)))
    assert components >= n_sites


def test_polyadic_share_is_a_parameter() -> None:
    partners = {}
    for share in (0.0, 1.0):
        made = make_phantom(size_zyx=SIZE, voxel_nm=VOXEL, seed=5, polyadic=share, lookalikes=0.0)
        partners[share] = made.partners.groupby("site").size()
    assert (partners[0.0] == 1).mean() > 0.7
    assert (partners[1.0] >= 2).mean() > 0.7


def test_lookalikes_hold_no_label_and_look_like_synapses(phantom: Phantom) -> None:
    kinds = Counter(site.kind for site in phantom.sites)
    assert kinds["bare"] >= 2
    assert kinds["cloud"] >= 1
    dark: dict[str, list[float]] = {"synapse": [], "bare": []}
    for site in phantom.sites:
        if site.kind != "synapse":
            assert not phantom.labels[site.box][site.side > 0].any()
        if site.kind in dark:
            density = (site.side == 2) & (site.depth_nm < 25)
            dark[site.kind].append(float(phantom.image[site.box][density].mean()))
    assert abs(np.mean(dark["synapse"]) - np.mean(dark["bare"])) < 15
    assert np.mean(dark["bare"]) < np.percentile(phantom.image, 20)
    alone = make_phantom(size_zyx=SIZE, voxel_nm=VOXEL, seed=3, lookalikes=0.0)
    assert {site.kind for site in alone.sites} == {"synapse"}


def test_twice_the_noise_leaves_the_tissue_and_doubles_the_noise() -> None:
    made = [make_phantom(size_zyx=(12, 96, 96), voxel_nm=VOXEL, seed=3, noise=n) for n in (0.0, 1.0, 2.0)]
    assert np.array_equal(made[0].labels, made[2].labels)
    clean, noisy, noisier = (p.image.astype(float) for p in made)
    assert (noisier - clean).std() / (noisy - clean).std() == pytest.approx(2.0, rel=0.05)


def test_jitter_moves_sections_and_labels_alike() -> None:
    still, moved = (
        make_phantom(size_zyx=(12, 96, 96), voxel_nm=VOXEL, seed=3, jitter=j, noise=0.0) for j in (0.0, 2.0)
    )
    assert 0.5 < np.mean(still.neurons == moved.neurons) < 1
    for made in (still, moved):
        edge = made.neurons[:, :, 1:] != made.neurons[:, :, :-1]
        inside = ~edge
        grey = made.image[:, :, 1:].astype(float)
        assert grey[inside].mean() - grey[edge].mean() > 45


@pytest.mark.parametrize(
    ("size_zyx", "voxel_nm"),
    [((80, 80, 80), (8.0, 8.0, 8.0)), ((30, 100, 90), (30.0, 6.0, 7.0)), ((40, 41, 43), (16.0, 16.0, 16.0))],
)
def test_other_voxel_sizes_hold_synapses_too(
    size_zyx: tuple[int, int, int], voxel_nm: tuple[float, float, float]
) -> None:
    made = make_phantom(size_zyx=size_zyx, voxel_nm=voxel_nm, seed=2)
    assert made.image.shape == size_zyx
    assert 0 < np.count_nonzero(made.labels) < 0.3 * made.labels.size
    assert len(made.partners) >= 1


def test_no_room_for_a_synapse_is_an_error() -> None:
    with pytest.raises(SynmlopsError, match="no place for a synapse"):
        make_phantom(size_zyx=(2, 8, 8), voxel_nm=VOXEL, seed=1)
