from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from tiny import make_blobs

from synmlops.params import LabelKind
from synmlops.volumes.labels import count_in
from synmlops.volumes.prepared import PreparedVolume
from synmlops.volumes.preparing import Source, prepare_volume
from synmlops.volumes.sites import MIDDLE, START, STOP, find_sites

NM = (40.0, 8.0, 8.0)


def _in_slabs(label: NDArray[np.integer], depth: int) -> Iterator[tuple[int, NDArray[np.integer]]]:
    for z in range(0, len(label), depth):
        yield z, label[z : z + depth]


def _expected(components: NDArray[np.integer]) -> list[list[int]]:
    """Give a row for each id, one id after the other."""
    rows = []
    for piece in np.unique(components[components > 0]):
        at = np.argwhere(components == piece)
        away = (((at - at.mean(axis=0)) * NM) ** 2).sum(axis=1)
        rows.append([*at[away.argmin()], *at.min(axis=0), *(at.max(axis=0) + 1)])
    return rows


@pytest.mark.parametrize("depth", [1, 3, 10])
@pytest.mark.parametrize("kind", ["pairs", "union", "semantic"])
def test_sites_of_any_slabs_are_those_of_the_whole(kind: LabelKind, depth: int) -> None:
    """Components and synapses go on from slab to slab; the blobs touch and overlap in places."""
    label = make_blobs(3, n=25).pairs
    if kind == "pairs":
        expected = _expected((label.astype(int) + 1) // 2)
    else:
        components, n = ndimage.label(label > 0, structure=np.ones((3, 3, 3)))
        assert 1 < n < 25
        expected = _expected(components)
    if kind == "semantic":
        label = np.where(label > 0, 2 - label % 2, 0).astype(np.uint16)
    sites = find_sites(lambda: _in_slabs(label, depth), kind, voxel_nm=NM)
    assert sites.dtype == np.int32
    assert sites.tolist() == expected


def test_a_component_that_only_meets_itself_below() -> None:
    """A U opened towards the first section is two pieces that a later slab joins."""
    label = np.zeros((3, 1, 5), np.uint8)
    label[:, 0, 0], label[:, 0, 4], label[2, 0] = 1, 1, 1
    sites = find_sites(lambda: _in_slabs(label, 1), "union", voxel_nm=NM)
    assert sites[:, START.start :].tolist() == [[0, 0, 0, 3, 1, 5]]


def test_the_middle_lies_in_the_synapse() -> None:
    """The centre of mass of a ring does not."""
    label = np.ones((1, 5, 5), np.uint8)
    label[0, 1:4, 1:4] = 0
    (z, y, x) = find_sites(lambda: [(0, label)], "union", voxel_nm=NM)[0, MIDDLE]
    assert label[z, y, x] == 1
    assert {y, x} & {2}


def test_no_foreground_and_one_sided_pairs() -> None:
    empty = np.zeros((2, 3, 4), np.uint8)
    assert find_sites(lambda: [(0, empty)], "pairs", voxel_nm=NM).shape == (0, 9)
    empty[1, 2, 3] = 254  # of site 127; uint8 ids do not wrap
    empty[0, 0, 0] = 255
    assert find_sites(lambda: [(0, empty)], "pairs", voxel_nm=NM)[:, MIDDLE].tolist() == [
        [1, 2, 3],
        [0, 0, 0],
    ]


def _prepared(folder: Path, mask: NDArray[np.uint8] | None) -> PreparedVolume:
    blobs = make_blobs(1)
    path = blobs.write(folder / "a.h5", **({} if mask is None else {"mask": mask}))
    source = Source(
        "b", f"{path}::image", f"{path}::label", "pairs", mask=None if mask is None else f"{path}::mask"
    )
    return prepare_volume(source, folder, voxel_nm=None, pool_zyx=(1, 2, 2)).volume


def test_prepare_writes_the_sites_of_trusted_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synmlops.volumes.preparing.SLAB_BYTES", 1)
    mask = np.ones(make_blobs(1).image.shape, np.uint8)
    mask[:, :, 20:] = 0
    volume = _prepared(tmp_path, mask)
    trusted = np.where(volume.sides == 255, 0, volume.label)
    assert volume.sites.tolist() == _expected((trusted.astype(int) + 1) // 2)
    assert 0 < len(volume.sites) < 6
    assert volume.sites[:, STOP].max() <= 24
    assert volume.trusted_sum is not None
    start, size = np.array([[2, 3, 4]]), (5, 16, 12)
    assert count_in(volume.trusted_sum, start, size)[0] == (volume.sides[2:7, 3:19, 4:16] != 255).sum()


def test_without_a_mask_all_voxels_are_trusted(tmp_path: Path) -> None:
    volume = _prepared(tmp_path, None)
    assert volume.trusted_sum is None
    assert len(volume.sites) == 6
    assert volume.name == "b"
