"""From a user's files to prepared volumes: the form, and every refusal."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from tiny import Blobs, make_blobs, pairs_in

from synmlops.params import DataParams, LabelKind, PhantomParams, SplitParams, SynmlopsError, VolumeSet
from synmlops.stages.prepare import folds_by_band, run
from synmlops.volumes.labels import count_in
from synmlops.volumes.prepared import (
    BACKGROUND,
    POST,
    PRE,
    ROLES,
    SIDE_UNKNOWN,
    UNTRUSTED,
    Box,
    Region,
    read_manifest,
)
from synmlops.volumes.preparing import Preparation, Source, digest_of, list_sources, prepare_volume
from synmlops.volumes.store import Grid, write_hdf5
from synmlops.volumes.table import COLUMNS, read_table, write_table

NM = (40.0, 8.0, 8.0)
GRID = Grid(NM)
ONE = (1, 1, 1)


def _write(folder: Path, name: str = "a", *, grid: Grid | None = GRID, **arrays: NDArray[Any]) -> Path:
    path = folder / f"{name}.h5"
    write_hdf5(path, arrays, grid=grid)
    return path


def _prepare(
    folder: Path,
    path: Path,
    kind: LabelKind | None = "pairs",
    *,
    pool: tuple[int, int, int] = ONE,
    voxel_nm: tuple[float, float, float] | None = None,
    **parts: str,
) -> Preparation:
    source = Source(
        name="a", image=f"{path}::image", label=f"{path}::label" if kind else None, kind=kind, **parts
    )
    (folder / "out").mkdir(exist_ok=True)
    return prepare_volume(source, folder / "out", voxel_nm=voxel_nm, pool_zyx=pool)


def _semantic(blobs: Blobs) -> NDArray[np.uint8]:
    return np.where(blobs.pairs == 0, 0, np.where(blobs.pairs % 2 == 1, 1, 2)).astype(np.uint8)


def test_pairs_keep_ids_and_code_sides(tmp_path: Path) -> None:
    blobs = make_blobs(0)
    path = blobs.write(tmp_path / "a.h5", neurons=(blobs.pairs.astype(np.uint64) + 2**40))
    made = _prepare(tmp_path, path, neurons=f"{path}::neurons")
    volume, everything = made.volume, Box((0, 0, 0), made.volume.shape_zyx)
    np.testing.assert_array_equal(volume.image, blobs.image)
    np.testing.assert_array_equal(volume.read("label", everything), blobs.pairs)
    np.testing.assert_array_equal(volume.read("neurons", everything), blobs.pairs.astype(np.uint64) + 2**40)
    assert volume.read("mask", everything) is None
    sides = np.where(blobs.pairs == 0, BACKGROUND, np.where(blobs.pairs % 2 == 1, PRE, POST))
    np.testing.assert_array_equal(volume.sides, sides)
    assert volume.grid == GRID
    assert volume.channels == ("pre", "post", "union")


def test_semantic_and_union_labels(tmp_path: Path) -> None:
    blobs = make_blobs(0)
    path = _write(tmp_path, image=blobs.image, label=_semantic(blobs))
    np.testing.assert_array_equal(_prepare(tmp_path, path, "semantic").volume.sides, _semantic(blobs))
    volume = _prepare(tmp_path, path, "union").volume
    np.testing.assert_array_equal(volume.sides, np.where(blobs.pairs > 0, SIDE_UNKNOWN, BACKGROUND))
    assert volume.channels == ("union",)


@pytest.mark.parametrize("pool", [ONE, (1, 2, 2), (2, 3, 1)])
def test_foreground_sum_counts_trusted_foreground_of_any_box(
    tmp_path: Path, pool: tuple[int, int, int]
) -> None:
    blobs, rng = make_blobs(1), np.random.default_rng(0)
    mask = (rng.random(blobs.image.shape) < 0.9).astype(np.uint8)
    path = blobs.write(tmp_path / "a.h5", mask=mask)
    volume = _prepare(tmp_path, path, pool=pool, mask=f"{path}::mask").volume
    foreground = (volume.sides == PRE) | (volume.sides == POST)
    assert (volume.sides == UNTRUSTED).any()
    assert foreground.any()
    for _ in range(30):
        start = rng.integers(0, volume.shape_zyx)
        size = rng.integers(1, np.array(volume.shape_zyx) - start + 1)
        z, y, x = (slice(s, s + n) for s, n in zip(start, size, strict=True))
        counted = count_in(volume.foreground_sum, start[None], tuple(size))[0]
        assert counted == foreground[z, y, x].sum()


def test_a_volume_of_many_slabs_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = make_blobs(2)
    path = blobs.write(tmp_path / "a.h5", mask=(blobs.image > 100).astype(np.uint8))
    whole = _prepare(tmp_path, path, pool=(2, 2, 2), mask=f"{path}::mask").volume
    expected = [np.array(array) for array in (whole.image, whole.sides, whole.foreground_sum)]
    monkeypatch.setattr("synmlops.volumes.store.Volume.slabs.__defaults__", (1,))
    slabs = _prepare(tmp_path, path, pool=(2, 2, 2), mask=f"{path}::mask").volume
    for one, other in zip(expected, (slabs.image, slabs.sides, slabs.foreground_sum), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pooling_in_plane(tmp_path: Path) -> None:
    blobs = make_blobs(0, shape=(4, 21, 24))
    path = _write(tmp_path, grid=Grid(NM, (400.0, 80.0, 0.0)), image=blobs.image, label=blobs.pairs)
    volume = _prepare(tmp_path, path, pool=(1, 2, 2)).volume
    assert volume.shape_zyx == (4, 10, 12)  # the odd row is left out
    assert volume.grid == Grid((40.0, 16.0, 16.0), (400.0, 84.0, 4.0))
    groups = blobs.image[:, :20].reshape(4, 10, 2, 12, 2).mean(axis=(2, 4))
    assert np.abs(volume.image - groups).max() <= 0.5
    any_foreground = (blobs.pairs[:, :20] > 0).reshape(4, 10, 2, 12, 2).any(axis=(2, 4))
    np.testing.assert_array_equal(volume.sides > 0, any_foreground)


def test_uint16_keeps_its_grey_levels(tmp_path: Path) -> None:
    blobs = make_blobs(0)
    image = blobs.image.astype(np.uint16) * 200
    made = _prepare(tmp_path, _write(tmp_path, image=image, label=blobs.pairs))
    np.testing.assert_array_equal(made.volume.image, image)
    assert made.volume.image.dtype == np.uint16
    assert made.intensities.mean == pytest.approx(image.mean())
    assert made.intensities.std == pytest.approx(image.std())


def test_a_folder_of_tiff_sections_and_a_stack(tmp_path: Path) -> None:
    blobs = make_blobs(0)
    (tmp_path / "sections").mkdir()
    for z, section in enumerate(blobs.image):
        tifffile.imwrite(tmp_path / "sections" / f"{z}.tif", section)
    tifffile.imwrite(tmp_path / "label.tif", blobs.pairs)
    source = Source(
        name="a", image=str(tmp_path / "sections"), label=str(tmp_path / "label.tif"), kind="pairs"
    )
    made = prepare_volume(source, tmp_path, voxel_nm=NM, pool_zyx=ONE)
    np.testing.assert_array_equal(made.volume.image, blobs.image)  # 10.tif comes after 9.tif
    assert set(made.volume.sha256) == {"image", "label"}


def test_digest_of_a_chunked_folder_tells_its_chunks(tmp_path: Path) -> None:
    for name, value in {"a": 1, "b": 1, "c": 2}.items():
        zarr.create_array(tmp_path / name, data=np.full((2, 2, 2), value), chunks=(1, 2, 2))
    a, b, c = (digest_of(f"zarr3://{tmp_path}/{name}::0") for name in "abc")
    assert a == b != c
    assert digest_of("https://host/a") == digest_of("zarr://https://host/a::1") != digest_of("https://host/b")


def test_digest_of_a_folder_tells_its_content(tmp_path: Path) -> None:
    blobs = make_blobs(0)
    (tmp_path / "sections").mkdir()
    for z, section in enumerate(blobs.image):
        tifffile.imwrite(tmp_path / "sections" / f"{z}.tif", section)
    source = Source(name="a", image=str(tmp_path / "sections"))
    before = prepare_volume(source, tmp_path, voxel_nm=NM, pool_zyx=ONE).volume.sha256
    again = prepare_volume(source, tmp_path, voxel_nm=NM, pool_zyx=ONE).volume.sha256
    tifffile.imwrite(tmp_path / "sections" / "3.tif", blobs.image[4])
    assert before == again
    assert prepare_volume(source, tmp_path, voxel_nm=NM, pool_zyx=ONE).volume.sha256 != before


def test_voxel_size_of_params_goes_before_that_of_the_file(tmp_path: Path) -> None:
    path = make_blobs(0).write(tmp_path / "a.h5")
    assert _prepare(tmp_path, path, voxel_nm=(30, 4, 4)).volume.grid.voxel_nm == (30, 4, 4)


def test_partner_table_is_copied_and_follows_the_pooling(tmp_path: Path) -> None:
    path = make_blobs(0).write(tmp_path / "a.h5")
    row = dict.fromkeys(COLUMNS, 1) | {
        "pre_z_nm": 80.0, "pre_y_nm": 44.0, "pre_x_nm": 20.0, "post_z_nm": 80.0, "post_y_nm": 44.0,
        "post_x_nm": 84.0, "pre_z": 2, "pre_y": 5, "pre_x": 2, "post_z": 2, "post_y": 5, "post_x": 10,
        "z0": 1, "y0": 3, "x0": 1, "z1": 3, "y1": 8, "x1": 14,
    }  # fmt: skip
    write_table(pd.DataFrame([row]), tmp_path / "a.parquet")
    same = _prepare(tmp_path, path, partners=str(tmp_path / "a.parquet")).volume
    assert same.partners is not None
    pd.testing.assert_frame_equal(read_table(same.partners), read_table(tmp_path / "a.parquet"))
    pooled = _prepare(tmp_path, path, pool=(1, 2, 2), partners=str(tmp_path / "a.parquet")).volume
    assert pooled.partners is not None
    written = read_table(pooled.partners).iloc[0]
    assert written[["pre_z_nm", "pre_y_nm", "pre_x_nm"]].tolist() == [80, 44, 20]
    assert written[["pre_z", "pre_y", "pre_x", "post_x"]].tolist() == [2, 2, 1, 5]
    assert written[["z0", "y0", "x0", "z1", "y1", "x1"]].tolist() == [1, 1, 0, 3, 4, 7]


def _broken(name: str, blobs: Blobs) -> dict[str, Any]:
    """Give the arrays of a volume with one thing wrong with it."""
    image, label = blobs.image.astype(np.float32), blobs.pairs.astype(np.int32)
    nan = image.copy()
    nan[3, 4, 5] = np.nan
    below = label.copy()
    below[1, 2, 3] = -1
    trusted_nowhere = (label == 0).astype(np.uint8)
    fine = {"image": blobs.image, "label": blobs.pairs}
    wrong: dict[str, dict[str, NDArray[Any]]] = {
        "shapes": {"label": blobs.pairs[1:]},
        "nan": {"image": nan},
        "float image": {"image": image},
        "signed image": {"image": blobs.image.astype(np.int16)},
        "constant image": {"image": np.full_like(blobs.image, 7)},
        "float label": {"label": label.astype(np.float32)},
        "negative": {"label": below},
        "no foreground": {"label": np.zeros_like(blobs.pairs)},
        "no post": {"label": np.where(blobs.pairs % 2 == 1, blobs.pairs, 0).astype(np.uint16)},
        "no pre": {"label": np.where(blobs.pairs % 2 == 0, blobs.pairs, 0).astype(np.uint16)},
        "mask": {"mask": trusted_nowhere},
        "float neurons": {"neurons": image},
        "negative neurons": {"neurons": below},
        "neurons shape": {"neurons": blobs.pairs[:, 1:]},
    }
    return fine | wrong[name]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("shapes", r"::label: label has shape \(9, 48, 48\) but the image .*a.h5::image has \(10, 48, 48\)"),
        ("nan", r"::image: holds NaN or infinity, first at z y x = \(3, 4, 5\)"),
        ("float image", "::image: is float32, an image must be uint8 or uint16"),
        ("signed image", "::image: is int16, an image must be uint8 or uint16"),
        ("constant image", "::image: is 7 everywhere"),
        ("float label", "::label: is float32, a label holds whole numbers"),
        ("negative", r"::label: is -1 somewhere, first negative at z y x = \(1, 2, 3\)"),
        ("no foreground", "::label: has no foreground"),
        ("no post", "::label: has no post side"),
        ("no pre", "::label: has no pre side"),
        ("mask", "::label: has no foreground left where the mask trusts it"),
        ("float neurons", "::neurons: is float32, neuron ids are whole numbers"),
        ("negative neurons", "::neurons: is -1 somewhere"),
        ("neurons shape", "::neurons: neurons has shape"),
    ],
)
def test_refusals_name_the_file_and_leave_no_output(tmp_path: Path, name: str, complaint: str) -> None:
    arrays = _broken(name, make_blobs(0))
    path = _write(tmp_path, **arrays)
    parts: dict[str, Any] = {p: f"{path}::{p}" for p in arrays if p in ("mask", "neurons")}
    with pytest.raises(SynmlopsError, match=complaint):
        _prepare(tmp_path, path, **parts)
    assert not list((tmp_path / "out").iterdir())


def test_unknown_voxel_size_says_which_key_to_set(tmp_path: Path) -> None:
    path = _write(tmp_path, grid=None, image=make_blobs(0).image, label=make_blobs(0).pairs)
    with pytest.raises(SynmlopsError, match=r"a.h5::image: does not say its voxel size; set data.voxel_nm"):
        _prepare(tmp_path, path)


def test_smaller_than_the_pool(tmp_path: Path) -> None:
    with pytest.raises(SynmlopsError, match=r"smaller than data.pool_zyx \(11, 1, 1\)"):
        _prepare(tmp_path, make_blobs(0).write(tmp_path / "a.h5"), pool=(11, 1, 1))


def test_broken_partner_table(tmp_path: Path) -> None:
    path = make_blobs(0).write(tmp_path / "a.h5")
    (tmp_path / "no.parquet").write_text("no table")
    pd.DataFrame({"site": [1]}).to_parquet(tmp_path / "other.parquet")
    for name in ("no.parquet", "other.parquet", "missing.parquet"):
        with pytest.raises(SynmlopsError, match=f"{name}: not a readable partner table"):
            _prepare(tmp_path, path, partners=str(tmp_path / name))


@pytest.mark.parametrize(
    ("volumes", "role", "complaint"),
    [
        ({"image": "a.h5", "label": "b.h5"}, "train", "data.train.label_kind is missing; say pairs"),
        ({"image": "a.h5"}, "train", "data.train.label is missing"),
        ({"image": "a.h5", "label_kind": "pairs"}, "test", "data.test.label is missing"),
        (
            {"image": "a.h5@b.h5", "label": "c.h5", "label_kind": "pairs"},
            "test",
            "data.test.label: 1 given for 2 images",
        ),
        (
            {"image": ["a.h5", "b.h5"], "label": "c.h5@d.h5", "label_kind": ["pairs", "union", "union"]},
            "train",
            "data.train.label_kind: 3 given for 2 images",
        ),
        (
            {"image": "a.h5", "label": "c.h5", "label_kind": "union", "mask": "m.h5@n.h5"},
            "train",
            "data.train.mask: 2 given for 1 images",
        ),
        ({"image": "a.h5@"}, "test", "holds an empty path"),
    ],
)
def test_lists_that_do_not_agree(volumes: dict[str, Any], role: str, complaint: str) -> None:
    with pytest.raises(SynmlopsError, match=complaint):
        list_sources(VolumeSet(**volumes), role=role)


def test_one_kind_stands_for_all_and_a_test_volume_needs_no_label() -> None:
    volumes = VolumeSet(image="x/raw.h5@y/raw.h5@z.h5", label="a.h5@b.h5@c.h5", label_kind="semantic")
    sources = list_sources(volumes, role="train")
    assert [one.kind for one in sources] == ["semantic"] * 3
    assert len({one.name for one in sources}) == 3
    assert sources[2].name == "z"
    unlabelled = list_sources(VolumeSet(image="a.h5"), role="test")[0]
    assert (unlabelled.label, unlabelled.kind) == (None, None)


def _data(folder: Path, **changes: Any) -> DataParams:
    """Write a volume per role, each `raw.h5` in a folder of its own."""
    given: dict[str, Any] = {}
    for n, role in enumerate(ROLES):
        (folder / role).mkdir(exist_ok=True)
        given[role] = pairs_in(make_blobs(n).write(folder / role / "raw.h5"))
    return DataParams(**(given | changes))


def test_volumes_of_one_name_in_different_roles_are_told_apart(tmp_path: Path) -> None:
    manifest, notes = run(_data(tmp_path), out=tmp_path / "out")
    assert len(manifest.volumes) == 3
    for n, role in enumerate(ROLES):
        (region,) = getattr(manifest.folds[0], role)
        np.testing.assert_array_equal(manifest.volumes[region.volume].image, make_blobs(n).image)
    assert notes == []
    assert read_manifest(tmp_path / "out") == manifest


def test_normalisation_is_that_of_the_training_images_alone(tmp_path: Path) -> None:
    manifest, _ = run(_data(tmp_path), out=tmp_path / "out")
    assert manifest.mean == pytest.approx(make_blobs(0).image.mean())
    assert manifest.std == pytest.approx(make_blobs(0).image.std())


def test_given_grey_levels_are_taken_instead(tmp_path: Path) -> None:
    """Those of images scaled to [0, 1], from which a half is taken and which are divided by a half."""
    data = _data(tmp_path).model_copy(update={"grey": (127.5, 127.5)})
    manifest, _ = run(data, out=tmp_path / "out")
    grey = np.arange(256)
    found = (grey - manifest.mean) / manifest.std
    np.testing.assert_allclose(found, (grey / 255 - 0.5) / 0.5, atol=1e-15)


def test_one_image_in_two_roles_is_refused(tmp_path: Path) -> None:
    data = _data(tmp_path)
    with pytest.raises(SynmlopsError, match=r"data.test.image: .* stands in data.train.image too"):
        run(data.model_copy(update={"test": data.train}), out=tmp_path / "out")


def test_volumes_that_one_model_cannot_serve_are_refused(tmp_path: Path) -> None:
    data = _data(tmp_path)
    path = _write(tmp_path, "coarse", grid=Grid((40.0, 16.0, 16.0)), **vars(make_blobs(3)))
    mixed = VolumeSet(image=f"{path}::image", label=f"{path}::pairs", label_kind="pairs")
    with pytest.raises(
        SynmlopsError, match=r"coarse.h5::image: voxels of \(40.0, 16.0, 16.0\) nm, but .*raw"
    ):
        run(data.model_copy(update={"test": mixed}), out=tmp_path / "out")
    path = _write(tmp_path, "deep", image=make_blobs(3).image.astype(np.uint16), pairs=make_blobs(3).pairs)
    deep = VolumeSet(image=f"{path}::image", label=f"{path}::pairs", label_kind="pairs")
    with pytest.raises(SynmlopsError, match=r"deep.h5::image: is uint16, but .*raw.h5::image is uint8"):
        run(data.model_copy(update={"validation": deep}), out=tmp_path / "out")


def test_earlier_output_stays_as_it_was_on_failure(tmp_path: Path) -> None:
    data, out = _data(tmp_path), tmp_path / "out"
    run(data, out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    label = make_blobs(2).pairs * 0
    write_hdf5(tmp_path / "test" / "raw.h5", {"image": make_blobs(2).image, "label": label}, grid=GRID)
    with pytest.raises(SynmlopsError, match="no foreground"):
        run(data, out=out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {*ROLES, "out"}


def test_a_pre_without_post_is_noted(tmp_path: Path) -> None:
    data = _data(tmp_path)
    with h5py.File(tmp_path / "train" / "raw.h5", "r+") as file:
        label = file["label"][...]
        label[label == 2] = 0
        file["label"][...] = label
    _, notes = run(data, out=tmp_path / "out")
    assert len(notes) == 1
    assert "raw.h5::label: 1 of 6 sites have a pre but no post side, first id 1" in notes[0]


@pytest.mark.slow
def test_a_phantom_seed_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    phantom = PhantomParams(size_zyx=(8, 96, 96), train_seeds=(1,), validation_seeds=(), test_seeds=(2,))
    for name in ("one", "two"):
        run(DataParams(phantom=phantom), out=tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert set(one) == {
        "manifest.json",
        *(f"phantom_{seed}{end}" for seed in (1, 2) for end in (".h5", ".partners.parquet")),
    }


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_bands_cover_the_tissue_once_and_training_keeps_its_distance(axis: str) -> None:
    regions = [Region("a", "a", Box((0, 0, 0), (61, 83, 97))), Region("b", "b", Box((0, 5, 0), (50, 60, 70)))]
    split = SplitParams(axis=axis, bands=3, guard=9)
    along = "zyx".index(axis)
    tested = {name: np.zeros((61, 83, 97), int) for name in "ab"}
    for fold in folds_by_band(regions, split):
        in_test = {name: np.zeros((61, 83, 97), bool) for name in "ab"}
        for region in fold.test:
            tested[region.volume][region.box.slices] += 1
            in_test[region.volume][region.box.slices] = True
        for region in fold.train:
            start, stop = region.box.start_zyx[along], region.box.stop_zyx[along]
            wide = [slice(None)] * 3
            wide[along] = slice(max(0, start - split.guard), stop + split.guard)
            assert not in_test[region.volume][tuple(wide)].any()
            wide[along] = slice(max(0, start - split.guard - 1), stop + split.guard + 1)
            assert in_test[region.volume][tuple(wide)].any()  # no farther than it must
        assert len({region.name for region in (*fold.test, *fold.train)}) == len(fold.test + fold.train)
    for region in regions:
        whole = np.zeros((61, 83, 97), int)
        whole[region.box.slices] = 1
        np.testing.assert_array_equal(tested[region.volume], whole)
