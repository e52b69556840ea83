"""What is looked at: volumes in their place, plain refusals, and what is found in folders."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from tiny import TinyProject
from view_tools import GRID, SHAPE, Files, layer_of, paint, state_of, viewing

from synmlops.params import SynmlopsError
from synmlops.stages import view
from synmlops.view.arrays import ViewedArray, sides_of
from synmlops.view.scene import Sources, open_scene, start_of
from synmlops.volumes.store import Grid, open_volume, write_hdf5
from synmlops.volumes.table import moved_voxels, read_table, write_table


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return paint(tmp_path_factory.mktemp("view"))


def test_threads_read_side_by_side(files: Files, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "image.tif", files.image, compression="zlib")
    for source in (files.sources.image, str(tmp_path / "image.tif")):
        with open_volume(source) as volume, ThreadPoolExecutor(8) as pool:
            array = ViewedArray(volume, ids=False)
            regions = [(slice(x, x + 40), slice(0, 96), slice(z, z + 3)) for x in range(60) for z in range(9)]
            for region, voxels in zip(regions, pool.map(array.__getitem__, regions), strict=True):
                np.testing.assert_array_equal(voxels, files.image.T[region])


def test_sides_share_one_lock(files: Files) -> None:
    assert files.sources.instances is not None
    with open_volume(files.sources.instances) as volume:
        sides = sides_of(volume)
        assert sides["pre"]._lock is sides["post"]._lock
        assert (sides["post"].shape, sides["post"].ndim) == (SHAPE[::-1], 3)


def test_a_coarser_or_smaller_volume_lies_at_its_place(files: Files, tmp_path: Path) -> None:
    layers = pytest.importorskip("synmlops.view.layers")
    pooled, cropped = GRID.pooled((1, 2, 2)), GRID.cropped((2, 10, 20))
    write_hdf5(tmp_path / "pooled.h5", {"main": files.instances[:, ::2, ::2]}, grid=pooled)
    write_hdf5(tmp_path / "cropped.h5", {"main": files.instances[2:9, 10:50, 20:80]}, grid=cropped)
    for name, corner in (("pooled", [1.5, 1.0, 2.0]), ("cropped", [23.0, 12.0, 4.0])):
        sources = Sources(files.sources.image, instances=str(tmp_path / f"{name}.h5"))
        with open_scene(sources) as scene:
            state = layers.state_of(scene, start_of(scene)).to_json()
        layer = layer_of(state, "instances")  # whose file does not say that it has sides
        np.testing.assert_allclose(np.array(layer["source"][0]["transform"]["matrix"])[:, 3], corner)


def test_boxes_of_sites_are_found_wherever_the_table_counts_from(files: Files) -> None:
    meshes = pytest.importorskip("synmlops.view.meshes")
    table = read_table(files.folder / "partners.parquet")
    with open_scene(files.sources) as scene:
        for counted in (
            table,
            moved_voxels(table, (5, 6, 7)),
        ):  # as evaluate counts, from the whole volume's start
            boxes = meshes.SiteBoxes(counted, scene.instances)
            assert boxes.around(3) == boxes.around(4) == (slice(5, 11), slice(49, 75), slice(59, 81))
            assert boxes.around(5) is None


def test_of_many_lines_those_near_the_start_are_drawn(files: Files) -> None:
    layers = pytest.importorskip("synmlops.view.layers")
    table = pd.concat([read_table(files.folder / "partners.parquet")] * 3, ignore_index=True)
    near = table.loc[0, ["pre_z_nm", "pre_y_nm", "pre_x_nm"]].to_numpy(float)
    assert layers.shown_lines(table, start_nm=near, most=3).site.tolist() == [1, 1, 1]
    assert layers.shown_lines(table, start_nm=near).site.tolist() == [2, 2, 2, 1, 1, 1]


def test_start_is_looked_up_or_refused(files: Files) -> None:
    with open_scene(files.sources) as scene:
        assert start_of(scene).site == 2
        assert start_of(scene, site=1).site == 1
        assert start_of(scene, at_zyx=(1, 2, 3)).zyx == (1, 2, 3)
        with pytest.raises(SynmlopsError, match=r"--site 3: .* 2 sites are from 1 to 2"):
            start_of(scene, site=3)
        with pytest.raises(SynmlopsError, match="outside the image of"):
            start_of(scene, at_zyx=(12, 0, 0))
        with pytest.raises(SynmlopsError, match="leave one of them out"):
            start_of(scene, at_zyx=(1, 0, 0), site=1)
    with open_scene(Sources(files.sources.image)) as scene:
        assert start_of(scene).zyx == (6, 48, 56)
        with pytest.raises(SynmlopsError, match="give --partners"):
            start_of(scene, site=1)


Change = Callable[[Files, Path], dict[str, Any]]


def _other(**arrays: Any) -> Change:
    """Give what writes another file in place of one of the sources."""

    def write(files: Files, folder: Path) -> dict[str, Any]:
        ((name, (array, grid)),) = arrays.items()
        write_hdf5(folder / f"{name}.h5", {"main": array}, grid=grid)
        return {name: str(folder / f"{name}.h5")}

    return write


def _lame_table(files: Files, folder: Path) -> dict[str, Any]:
    read_table(files.folder / "partners.parquet").drop(columns=["site"]).to_parquet(folder / "t.parquet")
    return {"partners": folder / "t.parquet"}


def _far_table(files: Files, folder: Path) -> dict[str, Any]:
    table = read_table(files.folder / "partners.parquet")
    write_table(table.assign(pre_x_nm=1e6, post_x_nm=1e6), folder / "t.parquet")
    return {"partners": folder / "t.parquet"}


def _csv(files: Files, folder: Path) -> dict[str, Any]:
    write_table(read_table(files.folder / "partners.parquet"), folder / "t.csv")
    return {"partners": folder / "t.csv"}


BYTES = np.zeros(SHAPE, np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda *_: {"image": "none.h5"}, "none.h5: there is no such file"),
        (lambda *_: {"partners": Path("none.parquet")}, "none.parquet: there is no such file"),
        (lambda files, _: {"probabilities": Path(files.sources.image)}, "probabilities"),
        (_lame_table, "lacks the columns site"),
        (_csv, "no partner table in Parquet"),
        (_far_table, r"none of its 2 partners lies in .*instances\.h5"),
        (_other(image=(BYTES, None)), r"image\.h5::main: does not say its voxel size; give --voxel-nm"),
        (lambda *_: {"voxel_nm": (40.0, 4.0, 4.0)}, r"40 x 8 x 8 nm, --voxel-nm says 40 x 4 x 4"),
        (_other(neurons=(BYTES[:5], None)), r"\(5, 96, 112\) is not that of the image"),
        (_other(neurons=(BYTES.astype(np.float32), GRID)), "holds float32; ids of neurons are whole"),
        (_other(instances=(BYTES, Grid((40.0, 8.0, 8.0), (4000.0, 0, 0)))), "does not lie within the image"),
        (_other(instances=(BYTES, Grid((40.0, 4.0, 4.0), GRID.offset_nm))), "do not fit the image"),
        (_other(instances=(BYTES[:6], GRID)), r"are not decoded from .*probabilities"),
    ],
)
def test_what_does_not_fit_is_refused(
    files: Files, tmp_path: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(SynmlopsError, match=message),
        open_scene(replace(files.sources, **change(files, tmp_path))),
    ):
        pass


def test_an_image_without_voxel_size_takes_the_one_given(files: Files, tmp_path: Path) -> None:
    write_hdf5(tmp_path / "image.h5", {"main": files.image}, grid=None)
    with open_scene(Sources(str(tmp_path / "image.h5"), voxel_nm=(30.0, 5.0, 6.0))) as scene:
        assert scene.image.grid == Grid((30.0, 5.0, 6.0))


def test_the_folder_of_decode(files: Files, tmp_path: Path) -> None:
    places = {"region": None, "prepared": Path("none"), "predicted": Path("none")}
    with pytest.raises(SynmlopsError, match="holds neither"):
        view.sources_in(tmp_path, **places)
    (tmp_path / "instances.h5").write_bytes((files.folder / "instances.h5").read_bytes())
    found = view.sources_in(tmp_path, **places)
    assert found == {"instances": str(tmp_path / "instances.h5"), "partners": None}
    with pytest.raises(SynmlopsError, match=r"Give --image em\.h5"):
        view.sources_of(found, {"image": None}, voxel_nm=None)
    with pytest.raises(SynmlopsError, match="has no regions"):
        view.sources_in(tmp_path, **(places | {"region": "a"}))
    (tmp_path / "instances.zarr").mkdir()
    with pytest.raises(SynmlopsError, match=r"instances\.h5 and instances\.zarr"):
        view.sources_in(tmp_path, **places)


def test_the_folder_of_evaluate(tiny_project: TinyProject, tmp_path: Path) -> None:
    fold = tiny_project.manifest.folds[0]
    region = fold.test[0]
    volume = tiny_project.manifest.volumes[region.volume]
    (tmp_path / "instances").mkdir()
    (tmp_path / "operating_point.json").write_text(json.dumps({fold.name: {"threshold": 0.3}}))
    places = {"prepared": tiny_project.prepared, "predicted": tmp_path / "none"}
    with pytest.raises(SynmlopsError, match="no test region of the prepared data"):
        view.sources_in(tmp_path, region=None, **places)
    grid = volume.grid.cropped(region.box.start_zyx)
    path = tmp_path / "instances" / f"{region.name}.h5"
    write_hdf5(path, {"main": volume.label[region.box.slices]}, grid=grid)
    with pytest.raises(SynmlopsError, match=f"has {region.name}"):
        view.sources_in(tmp_path, region="other", **places)
    found = view.sources_of(view.sources_in(tmp_path, region=None, **places), {}, voxel_nm=None)
    assert (found.instances, found.threshold, found.partners) == (str(path), 0.3, None)
    with open_scene(found) as scene:
        assert scene.image.volume.shape == volume.shape_zyx
    with viewing(str(tmp_path), "--prepared", str(tiny_project.prepared)) as (url, _):
        state = state_of(url)
    assert layer_of(state, "image")["source"][0]["url"].startswith("python://volume/")
    corner = np.array(layer_of(state, "instances")["source"][0]["transform"]["matrix"])[:, 3]
    np.testing.assert_allclose(corner[::-1], region.box.start_zyx)


def test_a_damaged_part_is_told_of_once_and_the_rest_is_served(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meshes = pytest.importorskip("synmlops.view.meshes")
    path = tmp_path / "image.h5"
    noise = np.random.default_rng(0).integers(0, 255, (32, 128, 128), np.uint8)
    write_hdf5(path, {"main": noise}, grid=GRID, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["main"].id.get_chunk_info(1)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset + 100)
        raw.write(b"x" * 1000)
    with open_volume(path) as volume:
        served = meshes.LazyVolume(ViewedArray(volume, ids=False), GRID.voxel_nm, kind="image")
        first, second = (np.array([[0, 0, z], [128, 128, z + 16]]) for z in (0, 16))
        for _ in range(2):
            with pytest.raises(ValueError, match="damaged"):
                served.get_encoded_subvolume("npz", *second, "1,1,1")
        assert served.get_encoded_subvolume("npz", *first, "1,1,1")
    assert capsys.readouterr().err.count("note: ") == 1
