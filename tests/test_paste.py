from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from synmlops.learning.paste import Donors, paste_into
from synmlops.learning.sampling import LabelledRegion
from synmlops.params import LabelKind, SynmlopsError
from synmlops.volumes.prepared import BACKGROUND, POST, PRE, SIDE_UNKNOWN, UNTRUSTED, Box, PreparedVolume
from synmlops.volumes.sites import find_sites
from synmlops.volumes.store import Grid, write_hdf5

GRID = Grid((40.0, 20.0, 20.0))  # whole up to 2 voxels in plane, gone after 4; 1 and 2 sections
ALL, UNION = (True, True, True), (False, False, True)
SHAPE = (12, 40, 44)


def _volume(
    folder: Path, label: NDArray[np.uint16], *, kind: LabelKind = "pairs", grey: int = 100
) -> LabelledRegion:
    """Write a volume that is `grey` but for brighter pre and darker post sides."""
    image = np.full(label.shape, grey, np.uint8)
    image[label > 0] = np.where(label[label > 0] % 2, grey + 50, grey - 50)
    sides = np.where(label > 0, SIDE_UNKNOWN if kind == "union" else 2 - label % 2, 0).astype(np.uint8)
    sites = find_sites(lambda: [(0, label)], kind, voxel_nm=GRID.voxel_nm)
    name = f"{kind}_{grey}.h5"
    write_hdf5(folder / name, {"image": image, "sides": sides, "label": label, "sites": sites}, grid=GRID)
    return LabelledRegion(PreparedVolume(folder / name, SHAPE, kind, GRID), Box((0, 0, 0), SHAPE))


def _label(*corners: tuple[int, int, int]) -> NDArray[np.uint16]:
    """Give one synapse of 2 x 4 x 6 voxels at each corner, the pre side before the post side in x."""
    label = np.zeros(SHAPE, np.uint16)
    for n, (z, y, x) in enumerate(corners):
        label[z : z + 2, y : y + 4, x : x + 3] = 2 * n + 1
        label[z : z + 2, y : y + 4, x + 3 : x + 6] = 2 * n + 2
    return label


def _target(grey: int = 160) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return np.full((8, 32, 32), grey, np.uint8), np.zeros((8, 32, 32), np.uint8)


def _pasted(
    donors: Donors, seed: int, *, known: tuple[bool, ...] = ALL, n: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
    image, sides = _target()
    rng = np.random.default_rng(seed)
    pastes = donors.draw(rng, known=known, n=n)
    return image, sides, paste_into(image, sides, pastes=pastes, donors=donors, inner_zyx=(6, 16, 16))


def test_a_synapse_keeps_its_sides_and_takes_on_the_grey_of_its_new_place(tmp_path: Path) -> None:
    """In all turns pre stays the bright side and beside the post; no voxel is lost but at borders."""
    donors = Donors([_volume(tmp_path, _label((5, 18, 18)))])
    places, directions = set(), set()
    for seed in range(60):
        image, sides, n = _pasted(donors, seed)
        assert n == 1
        assert (image[sides == PRE] == 210).all()  # 160 and 50 of contrast
        assert (image[sides == POST] == 110).all()
        assert (image[sides == BACKGROUND] == 160).all()  # the surroundings match, so no seam is left
        assert (sides == PRE).sum() == (sides == POST).sum()
        assert (sides == PRE).sum() in (12, 24)  # a section may be cut off, for 6 of 8 take a middle
        middle = np.argwhere(sides == PRE).mean(axis=0)
        places.add(tuple(middle))
        directions.add(tuple(np.sign(np.argwhere(sides == POST).mean(axis=0) - middle).astype(int)))
    assert len(places) > 40
    assert directions == {(0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0)}


def test_only_free_tissue_is_pasted_into(tmp_path: Path) -> None:
    """What is there already stays, and so does all within reach of the surroundings."""
    donors = Donors([_volume(tmp_path, _label((5, 18, 18)))])
    numbers = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, sides = _target()
        sides[:, :, 20:], sides[:, :6] = UNTRUSTED, POST
        before, codes = image.copy(), sides.copy()
        image[codes != BACKGROUND] = before[codes != BACKGROUND] = 7
        pastes = donors.draw(rng, known=ALL, n=1)
        numbers.add(n := paste_into(image, sides, pastes=pastes, donors=donors, inner_zyx=(8, 32, 32)))
        assert (sides[codes != BACKGROUND] == codes[codes != BACKGROUND]).all()
        assert (image[codes != BACKGROUND] == 7).all()
        assert ((sides != codes).any() and (image != before).any()) == bool(n)
        own = np.argwhere(sides != codes)
        if n:
            assert own[:, 2].max() < 20 - 3
            assert own[:, 1].min() >= 6 + 3
    assert numbers == {0, 1}


def test_a_neighbour_is_not_pasted_along(tmp_path: Path) -> None:
    """Neither its label nor its looks."""
    region = _volume(tmp_path, _label((5, 14, 18), (5, 20, 18)))  # two rows apart
    donors = Donors([region])
    for seed in range(20):
        image, sides, n = _pasted(donors, seed)
        assert n == 1
        assert (sides == PRE).sum() <= 24
        assert np.abs(image[sides == BACKGROUND].astype(int) - 160).max() <= 1


@pytest.mark.parametrize("kind", ["union", "semantic"])
def test_of_labels_without_ids_a_component_is_pasted(tmp_path: Path, kind: LabelKind) -> None:
    label = _label((5, 14, 18), (5, 20, 18))
    if kind == "semantic":
        label = np.where(label > 0, 2 - label % 2, 0).astype(np.uint16)
    known = UNION if kind == "union" else ALL
    image, sides, n = _pasted(Donors([_volume(tmp_path, label, kind=kind)]), 3, known=known)
    assert n == 1
    counts = {int(code): int((sides == code).sum()) for code in np.unique(sides[sides > 0])}
    assert counts == ({SIDE_UNKNOWN: 48} if kind == "union" else {PRE: 24, POST: 24})
    assert len(np.unique(image[sides > 0])) == 2


def test_donors_know_what_the_patch_knows(tmp_path: Path) -> None:
    pairs = _volume(tmp_path, _label((5, 18, 18)))
    union = _volume(tmp_path, _label((5, 10, 30)), kind="union")
    donors, rng = Donors([pairs, union]), np.random.default_rng(0)
    for known, codes in ((ALL, {PRE, POST}), (UNION, {SIDE_UNKNOWN})):
        cuts = [donors.cut(paste.donor) for paste in donors.draw(rng, known=known, n=20)]
        assert all(set(np.unique(one.sides[one.sides > 0])) == codes for one in cuts)
    assert Donors([pairs]).draw(rng, known=UNION, n=2) == ()


def test_donors_lie_in_their_region_and_nothing_beyond_is_read(tmp_path: Path) -> None:
    """A synapse that a face of the region cuts or touches is no donor: beyond may be test tissue."""
    volume = _volume(tmp_path, _label((5, 4, 4), (5, 18, 18), (5, 30, 34))).volume
    rng = np.random.default_rng(0)
    for box, size in (
        (
            Box((3, 5, 1), (9, 26, 28)),
            (2 + 2 * 2, 4 + 2 * 4, 6 + 2 * 4),
        ),  # the first is cut, the last outside
        (
            Box((4, 5, 15), (9, 26, 25)),
            (1 + 2 + 2, 4 + 2 * 4, 3 + 6 + 1),
        ),  # the second has but this around it
    ):
        donors = Donors([LabelledRegion(volume, box)])
        assert {paste.donor for paste in donors.draw(rng, known=ALL, n=20)} == {0}
        assert donors.cut(0).image.shape == size
    for tight in (Box((5, 5, 15), (9, 26, 25)), Box((4, 5, 15), (9, 26, 24)), Box((4, 19, 15), (9, 26, 25))):
        with pytest.raises(SynmlopsError, match=r"augment.copy_paste: every synapse .* is cut by a face"):
            Donors([LabelledRegion(volume, tight)])


def test_surroundings_fade_towards_the_face_of_a_region(tmp_path: Path) -> None:
    """Whole for 2 voxels and gone after 4 on the far side; gone at the face, 3 voxels from the synapse."""
    volume = _volume(tmp_path, _label((5, 18, 18))).volume
    weight = Donors([LabelledRegion(volume, Box((0, 0, 15), SHAPE))]).cut(0).weight.astype(float)
    line = weight[weight.shape[0] // 2, weight.shape[1] // 2]
    assert line.tolist() == pytest.approx([0, 0.352, 0.896, *[1] * 6, 1, 1, 0.896, 0.352], abs=1e-3)


def test_contrast_follows_the_surroundings_within_limits(tmp_path: Path) -> None:
    region = _volume(tmp_path, _label((5, 18, 18)))
    noisy = np.array(region.volume.image)
    noisy[::2] += 4  # sections differ, which is no contrast within one
    noisy[:, ::2] += 8
    write_hdf5(
        tmp_path / "noisy.h5",
        {"image": noisy, **{name: getattr(region.volume, name) for name in ("sides", "label", "sites")}},
        grid=GRID,
    )
    volume = PreparedVolume(tmp_path / "noisy.h5", SHAPE, "pairs", GRID)
    donors = Donors([LabelledRegion(volume, Box((0, 0, 0), SHAPE))])
    image, sides, _ = _pasted(donors, 0)  # into tissue without any contrast
    spread = int(image[sides == PRE].max()) - int(image[sides == PRE].min())
    assert spread == pytest.approx(8 / 1.25, abs=1)
