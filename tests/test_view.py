"""The viewer: voxels served as the files hold them, at their place, to this machine alone; plain refusals."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pandas as pd
import psutil
import pytest
import tifffile
from browser import CHROMIUM, look_at
from numpy.typing import NDArray
from scipy import ndimage
from tiny import TinyProject

from synmlops.cli import main
from synmlops.params import SynmlopsError
from synmlops.stages import view
from synmlops.synapses.partners import partners_of
from synmlops.view.arrays import ViewedArray, sides_of
from synmlops.view.scene import Sources, open_scene, start_of
from synmlops.volumes.probabilities import probabilities_writer
from synmlops.volumes.store import Grid, open_volume, write_hdf5
from synmlops.volumes.table import read_table, write_table

GRID = Grid((40.0, 8.0, 8.0), (80.0, 16.0, 24.0))
SHAPE = (12, 96, 112)  # z y x, no two alike
CORNER_XYZ = [3.0, 2.0, 2.0]  # the offset in voxels


@dataclass(frozen=True, eq=False)
class Files:
    """A painted volume with two synapses, the second one more confident."""

    folder: Path
    image: NDArray[np.uint8]
    instances: NDArray[np.uint16]

    @property
    def sources(self) -> Sources:
        names = ("image.h5", "probabilities.h5", "instances.h5", "partners.parquet", "neurons.h5")
        image, probabilities, instances, partners, neurons = (self.folder / name for name in names)
        return Sources(str(image), probabilities, str(instances), partners, str(neurons))

    @property
    def options(self) -> list[str]:
        fields = ("image", "probabilities", "instances", "partners", "neurons")
        return [word for name in fields for word in (f"--{name}", str(getattr(self.sources, name)))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("view")
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random(SHAPE), (0, 2, 2))
    image = ((image - image.min()) / np.ptp(image) * 255).astype(np.uint8)
    instances = np.zeros(SHAPE, np.uint16)
    for site, (z, y, x) in ((1, (2, 20, 20)), (2, (6, 50, 60))):
        instances[z : z + 4, y : y + 12, x : x + 20] = 2 * site - 1
        instances[z : z + 4, y + 12 : y + 24, x : x + 20] = 2 * site
    certain = np.where(instances > 2, 240, 180)
    sides = [instances % 2 == 1, (instances > 0) & (instances % 2 == 0), instances > 0]
    values = np.stack([certain * side for side in sides]).astype(np.uint8)
    write_hdf5(folder / "image.h5", {"main": image}, grid=GRID, compression="gzip")
    write_hdf5(folder / "instances.h5", {"main": instances}, grid=GRID, attrs={"label_kind": "pairs"})
    write_hdf5(folder / "neurons.h5", {"main": instances.astype(np.int64)}, grid=None)
    with probabilities_writer(
        folder / "probabilities.h5", SHAPE, channels=("pre", "post", "union"), grid=GRID
    ) as data:
        data[...] = values
    table = partners_of(
        instances, voxel_nm=GRID.voxel_nm, offset_nm=GRID.offset_nm, probabilities_czyx=values
    )
    write_table(table, folder / "partners.parquet")
    return Files(folder, image, instances)


@contextmanager
def viewing(*options: str, end_by: int = signal.SIGTERM) -> Iterator[tuple[str, int]]:
    """Run the command; give URL and process id. It must end in order."""
    command = [sys.executable, "-m", "synmlops", "view", "--no-browser", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        else:
            raise AssertionError("".join(said))
        yield next(line.strip() for line in said if line.startswith("http")), process.pid
        process.send_signal(end_by)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def viewer(files: Files) -> Iterator[tuple[str, int]]:
    with viewing(*files.options) as running:
        yield running


def state_of(url: str) -> dict[str, Any]:
    """Give the state as the page is told it."""
    root, _, token = url.rstrip("/").rpartition("/v/")
    with urlopen(f"{root}/events/{token}?c=test&gc=&gs=", timeout=20) as events:
        for line in events:
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("k") == "s":
                state: dict[str, Any] = message["s"]
                return state
    raise AssertionError("no state came")


def layer_of(state: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer for layer in state["layers"] if layer["name"] == name)


def address(url: str, layer: dict[str, Any], kind: str) -> str:
    """Give the start of the address of a layer's data."""
    key = layer["source"][0]["url"].removeprefix("python://volume/")
    return f"{url.partition('/v/')[0]}/neuroglancer/{kind}/{key}"


def voxels_of(
    url: str, layer: dict[str, Any], start: tuple[int, ...], stop: tuple[int, ...], scale: str = "1,1,1"
) -> NDArray[Any]:
    corners = "/".join(",".join(map(str, corner)) for corner in (start, stop))
    with urlopen(f"{address(url, layer, 'npz')}/{scale}/{corners}", timeout=20) as answer:
        voxels: NDArray[Any] = np.load(io.BytesIO(zlib.decompress(answer.read())))
    return voxels


def test_voxels_are_served_as_the_files_hold_them(files: Files, viewer: tuple[str, int]) -> None:
    url, _ = viewer
    state = state_of(url)
    image = voxels_of(url, layer_of(state, "image"), (5, 10, 2), (45, 90, 9))
    np.testing.assert_array_equal(image, files.image[2:9, 10:90, 5:45].T)
    pre, post = (
        voxels_of(url, layer_of(state, side), (0, 0, 0), SHAPE[::-1]).T.astype(int)
        for side in ("pre", "post")
    )
    np.testing.assert_array_equal(pre + post, files.instances)
    assert set(np.unique(pre)) == {0, 1, 3}
    neurons = voxels_of(url, layer_of(state, "neurons"), (0, 0, 0), SHAPE[::-1])
    assert neurons.dtype == np.uint64
    np.testing.assert_array_equal(neurons.T, files.instances)
    chances = voxels_of(url, layer_of(state, "probabilities"), (0, 0, 0, 0), (*SHAPE[::-1], 3), "1,1,1,1")
    with open_volume(f"{files.sources.probabilities}::probabilities", ndim=4) as volume:
        np.testing.assert_array_equal(chances.T, volume.read())
    coarse = voxels_of(url, layer_of(state, "pre"), (0, 0, 0), (28, 24, 12), "4,4,1")
    np.testing.assert_array_equal(coarse.T, pre[:, ::4, ::4])


def test_all_layers_lie_where_the_world_has_them(files: Files, viewer: tuple[str, int]) -> None:
    state = state_of(viewer[0])
    nm = {"x": [8e-9, "m"], "y": [8e-9, "m"], "z": [4e-8, "m"]}
    assert state["dimensions"] == nm
    for name in ("image", "neurons", "probabilities", "pre", "post"):
        transform = layer_of(state, name)["source"][0]["transform"]
        matrix = np.array(transform["matrix"])
        np.testing.assert_allclose(matrix[:3, -1], CORNER_XYZ)
        np.testing.assert_array_equal(matrix[:, :-1], np.eye(len(matrix)))
    table = read_table(files.folder / "partners.parquet")
    best = table.loc[table.confidence.idxmax()]
    assert best.site == 2
    lines = layer_of(state, "partners")["annotations"]
    assert [line["props"][1] for line in lines] == [2, 1]  # the most confident first
    for end in ("pre", "post"):
        point = np.array([best[f"{end}_{axis}"] for axis in "xyz"]) + CORNER_XYZ + 0.5
        np.testing.assert_allclose(lines[0]["pointA" if end == "pre" else "pointB"], point)
    middle = (np.array(lines[0]["pointA"]) + lines[0]["pointB"]) / 2
    assert np.abs(np.array(state["position"]) - middle).max() <= 0.5
    assert layer_of(state, "post")["segments"] == ["4"]
    assert layer_of(state, "probabilities")["visible"] is False  # the instances are seen


def test_surfaces_are_made_of_one_synapse(files: Files, viewer: tuple[str, int]) -> None:
    url, _ = viewer
    state = state_of(url)
    with urlopen(f"{address(url, layer_of(state, 'pre'), 'mesh')}/3", timeout=20) as answer:
        mesh = answer.read()
    n = int(np.frombuffer(mesh, "<u4", 1)[0])
    vertices_nm = np.frombuffer(mesh, "<f4", 3 * n, 4).reshape(n, 3) * 1e9
    z, y, x = (np.flatnonzero((files.instances == 3).any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    np.testing.assert_allclose(vertices_nm.min(axis=0), [x[0] * 8, y[0] * 8, z[0] * 40], atol=0.1)
    np.testing.assert_allclose(
        vertices_nm.max(axis=0), [x[-1] * 8 + 8, y[-1] * 8 + 8, z[-1] * 40 + 40], atol=0.1
    )
    for name, number in (("pre", 99), ("neurons", 3), ("neurons", 1), ("neurons", 4)):  # each answers at once
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{address(url, layer_of(state, name), 'mesh')}/{number}", timeout=20)


def test_it_listens_on_this_machine_alone_and_wants_the_token(viewer: tuple[str, int]) -> None:
    url, pid = viewer
    listening = [c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    for wrong in (re.sub("[0-9a-f]{40}", "0" * 40, url), url.partition("/v/")[0]):
        with pytest.raises(HTTPError, match="404"):
            urlopen(wrong, timeout=20)
    root, _, token = url.rstrip("/").rpartition("/v/")
    with pytest.raises(HTTPError, match="403"):  # no credentials of this user's accounts
        urlopen(f"{root}/credentials/{token}", data=b"{}", timeout=20)


def test_ctrl_c_ends_it_in_order_and_a_port_in_use_is_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    with viewing(*files.options[:2], "--at", "3,20,40", end_by=signal.SIGINT) as (url, _):
        state = state_of(url)
        assert state["position"] == [43.5, 22.5, 5.5]
        assert [layer["name"] for layer in state["layers"]] == ["image"]
        port = url.partition("/v/")[0].rpartition(":")[2]
        with pytest.raises(SystemExit) as ended:
            _main("view", *files.options, "--no-browser", "--port", port)
    assert ended.value.code == 2
    assert f"--port {port}: is in use" in capsys.readouterr().err


def _main(*words: str) -> None:
    before, sys.argv = sys.argv, ["synmlops", *words]
    try:
        main()
    finally:
        sys.argv = before


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


def test_without_neuroglancer_it_says_how_to_get_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "find_spec", lambda name: None)
    with pytest.raises(SynmlopsError, match=r"pip install 'synmlops\[view\]'"):
        view.run(files.sources)


def test_an_address_of_another_machine_is_refused(files: Files) -> None:
    with pytest.raises(SynmlopsError, match=r"--bind 192\.0\.2\.1: cannot listen there"):
        view.run(files.sources, bind="192.0.2.1", browser=False)


def test_other_addresses_are_told_of(files: Files) -> None:
    with socket.create_server(("127.0.0.2", 0)):
        pass  # else this system has one loopback address alone, and the command below fails
    command = [
        sys.executable,
        "-m",
        "synmlops",
        "view",
        "--no-browser",
        *files.options[:2],
        "--bind",
        "0.0.0.0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ctrl-C"):
            break
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert "anybody who reaches 0.0.0.0" in said
    assert process.returncode == 0


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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, which draws the page; apt-get install chromium")
def test_a_browser_draws_tissue_synapses_and_lines(files: Files, tmp_path: Path) -> None:
    with viewing(*files.options) as (url, _):
        page = look_at(url, tmp_path / "profile")
    root = url.partition("/v/")[0]
    assert page.title.startswith("synmlops: image.h5")
    outside = [one for one in page.requests if not one.startswith((f"{root}/", "blob:", "data:"))]
    assert outside == []
    assert any("/npz/" in one for one in page.requests)
    red, green, blue = np.moveaxis(page.picture[70:-40, 40:330].astype(int), 2, 0)  # the panel of x and y
    grey = (red == green) & (green == blue)
    assert len(np.unique(red[grey])) > 50  # tissue, not a plain ground
    assert np.count_nonzero(blue - red > 40) > 500  # pre
    assert np.count_nonzero((red - blue > 40) & (red - green > 15) & (green > blue)) > 500  # post
    assert np.count_nonzero((red - green > 80) & (blue - green > 60)) > 30  # the line
