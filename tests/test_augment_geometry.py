import numpy as np
import pytest
import torch
from augment_tools import noisy, only, places_in_numpy, turn_in_numpy
from scipy.ndimage import map_coordinates

from synmlops.learning.augment.elastic import Spline, draw_spline, spline_basis, squeeze
from synmlops.learning.augment.geometry import Geometry, Slip
from synmlops.learning.augment.orient import Orientation, draw_orientation
from synmlops.learning.augment.plan import Curve, Plan, apply_plan, draw_plan
from synmlops.learning_params import AugmentParams
from synmlops.volumes.prepared import UNTRUSTED

PATCH = (3, 20, 16)
GEOMETRY = ("flip", "quarter_turn", "rotate", "scale", "elastic", "misalign")


def _draw(seed: int, params: AugmentParams, *, isotropic: bool = False) -> Plan:
    rng = np.random.default_rng([7, seed])
    return draw_plan(rng, params=params, patch_zyx=PATCH, isotropic=isotropic)


def _ids(shape: tuple[int, ...]) -> torch.Tensor:
    """An id of its own for every voxel, beyond what float32 can tell apart."""
    return torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape) + 2**24


@pytest.mark.parametrize("isotropic", [False, True])
def test_image_and_ids_come_from_the_same_voxels_in_thousands_of_crops(isotropic: bool) -> None:
    """Every id lies where an independent evaluation of the map in float64 says, and so does the image."""
    params = only(*GEOMETRY, chance=0.5)
    n_sampled = 0
    for seed in range(500):
        plan = _draw(seed, params, isotropic=isotropic)
        image, ids = noisy(plan.source_zyx, seed), _ids(plan.source_zyx)
        got, moved = apply_plan(plan, image, ids, mean=0.0, std=1.0)
        assert got.shape == moved.shape == PATCH
        y, x = places_in_numpy(plan.geometry)
        z = np.broadcast_to(np.arange(PATCH[0])[:, None, None], PATCH)
        turned = turn_in_numpy(plan.geometry, image.numpy()).astype(float)
        np.testing.assert_allclose(got, map_coordinates(turned, [z, y, x], order=1), atol=0.01)
        clear = (np.abs(y % 1 - 0.5) > 1e-4) & (np.abs(x % 1 - 0.5) > 1e-4)  # no tie between two voxels
        nearest = turn_in_numpy(plan.geometry, ids.numpy())[z, np.rint(y).astype(int), np.rint(x).astype(int)]
        assert (moved.numpy() == nearest)[clear].all()
        assert clear.mean() > 0.9
        n_sampled += plan.geometry.is_sampled
    assert 250 < n_sampled < 500


def test_pre_and_post_of_an_instance_stay_where_the_image_shows_them() -> None:
    """The image carries the ids: pre of n is 2 n - 1, post 2 n, and both move with their tissue."""
    params = only("flip", "quarter_turn", "misalign", chance=0.7, misalign={"degrees": 0})
    for seed in range(1000):
        plan = _draw(seed, params, isotropic=True)
        ids = torch.randint(0, 7, plan.source_zyx, dtype=torch.int32) * (1 + seed)
        image, moved = apply_plan(plan, ids.float(), ids, mean=0.0, std=1.0)
        assert torch.equal(image, moved.float())


@pytest.mark.parametrize(("displacement", "spacing"), [(2, 6), (30, 4), (6, 32)])
def test_the_source_holds_all_that_is_read(displacement: float, spacing: float) -> None:
    params = only(*GEOMETRY, chance=0.7, elastic={"displacement": displacement, "spacing": spacing})
    for seed in range(300):
        geometry = _draw(seed, params).geometry
        box = turn_in_numpy(geometry, np.empty(geometry.source_zyx, dtype=bool)).shape[1:]
        for places, size in zip(places_in_numpy(geometry), box, strict=True):
            assert places.min() >= 0
            assert places.max() <= size - 1


def test_the_source_is_no_larger_than_geometry_asks_for() -> None:
    upright = Orientation()
    assert Geometry(PATCH, upright).source_zyx == PATCH
    assert Geometry(PATCH, Orientation(axes=(0, 2, 1))).source_zyx == (3, 16, 20)
    assert Geometry(PATCH, Orientation(axes=(2, 1, 0))).source_zyx == (16, 20, 3)
    slip = Slip(1, 3, (-2, 5), degrees=0.0)
    assert Geometry(PATCH, upright, slip=slip).source_zyx == (3, 24, 26)
    assert Geometry(PATCH, upright, zoom=2.0).source_zyx == (3, 12, 10)
    assert Geometry((3, 100, 100), upright, degrees=45.0).source_zyx == (3, 142, 142)


def test_what_the_volume_does_not_hold_stays_untrusted() -> None:
    plan = Plan(Geometry((2, 4, 4), Orientation(), slip=Slip(1, 2, (0, 3), degrees=0.0)), Curve())
    sides = torch.full(plan.source_zyx, UNTRUSTED, dtype=torch.uint8)
    sides[:, :, 3:7] = 1  # the volume ends where the patch does
    _, moved = apply_plan(plan, sides.float(), sides, mean=0.0, std=1.0)
    assert moved[0].unique().tolist() == [1]
    assert moved[1, 0].tolist() == [1, UNTRUSTED, UNTRUSTED, UNTRUSTED]


@pytest.mark.parametrize(("first", "stop"), [(1, 3), (1, 2), (0, 1), (2, 3)])
def test_misaligned_sections_show_shifted_tissue(first: int, stop: int) -> None:
    geometry = Geometry((3, 4, 4), Orientation(), slip=Slip(first, stop, (1, -2), degrees=0.0))
    image = noisy(geometry.source_zyx)
    moved = geometry.move(image)
    for z in range(3):
        y, x = (2, 0) if first <= z < stop else (1, 2)
        assert torch.equal(moved[z], image[z, y : y + 4, x : x + 4])


def test_rotation_by_a_right_angle_and_zoom_by_two() -> None:
    turn = Plan(Geometry((1, 5, 5), Orientation(), degrees=90.0), Curve())
    ids = _ids(turn.source_zyx)
    _, turned = apply_plan(turn, ids.float(), ids, mean=0.0, std=1.0)
    assert torch.equal(turned, torch.rot90(ids[:, 1:-1, 1:-1], -1, (1, 2)))
    zoom = Plan(Geometry((1, 4, 4), Orientation(), zoom=2.0), Curve())
    ramp = torch.arange(4.0).expand(zoom.source_zyx)
    larger, _ = apply_plan(zoom, ramp, ramp.int(), mean=0.0, std=1.0)
    assert larger[0, 0].tolist() == pytest.approx([0.75, 1.25, 1.75, 2.25])


def test_every_orientation_is_equally_likely() -> None:
    for isotropic, n in ((False, 16), (True, 48)):
        rng = np.random.default_rng(3)
        drawn = [
            draw_orientation(rng, flip=0.5, quarter_turn=0.5, isotropic=isotropic) for _ in range(100 * n)
        ]
        counts = [drawn.count(one) for one in set(drawn)]
        assert len(counts) == n
        assert 60 < min(counts) <= max(counts) < 140  # of 100, 4 deviations


def test_elastic_deformation_never_folds() -> None:
    """However strong: all cells between four neighbours keep their handedness, and limits are reached."""
    shape, squeezed = (60, 70), []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        spline = draw_spline(rng, shape_yx=shape, displacement=40.0, spacing=16.0)
        y, x = np.mgrid[: shape[0], : shape[1]] + spline.on(shape, torch.device("cpu")).double().numpy()
        yy, yx = np.diff(y, axis=0)[:, :-1], np.diff(y, axis=1)[:-1]
        xy, xx = np.diff(x, axis=0)[:, :-1], np.diff(x, axis=1)[:-1]
        assert (yy * xx - yx * xy).min() > 0
        squeezed.append(squeeze(spline, shape))
    assert max(squeezed) == pytest.approx(0.8)


def test_a_gentle_elastic_deformation_is_as_drawn() -> None:
    spline = draw_spline(np.random.default_rng(0), shape_yx=(400, 400), displacement=3.0, spacing=20.0)
    assert spline.control.std() == pytest.approx(3.0, rel=0.1)
    flat = Spline(np.ones((2, spline_basis(9, 4.0).shape[1], spline_basis(7, 4.0).shape[1])), 4.0)
    assert torch.allclose(flat.on((9, 7), torch.device("cpu")), torch.ones(2, 9, 7))
