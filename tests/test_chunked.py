"""Zarr, OME-Zarr, N5 and precomputed of others are read, here and from servers, or refused plainly."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import zarr
from numpy.typing import NDArray
from volume_tools import aged, files_of, seen_elsewhere

from synmlops.params import SynmlopsError
from synmlops.volumes import chunk_stores
from synmlops.volumes.store import Grid, open_volume

REGION = (slice(1, 4), slice(3, 9), slice(None, 7))
GRID = Grid((40.0, 4.0, 8.0), (400.0, 0.0, 16.0))


@pytest.fixture
def image() -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(1, 60_000, (5, 12, 14)).astype(np.uint16)


def _ome(axes: str, scale: list[float], translation: list[float], *, unit: str, paths: list[str]) -> Any:
    before = len(axes) - 3
    named = [{"name": a, "type": "space", "unit": unit} if a in "zyx" else {"name": a} for a in axes]
    datasets = []
    for n, path in enumerate(paths):
        steps = [
            {"type": "scale", "scale": [1.0] * before + [s * 2**n for s in scale]},
            {"type": "translation", "translation": [0.0] * before + translation},
        ]
        datasets.append({"path": path, "coordinateTransformations": steps})
    return [{"axes": named, "datasets": datasets}]


def _array(path: Path, image: NDArray[Any], *, version: int, **options: Any) -> Path:
    chunks = (1,) * (image.ndim - 3) + (2, 4, 8)
    zarr.create_array(path, data=image, chunks=chunks, zarr_format=version, overwrite=True, **options)
    return path


def _zarr2(path: Path, image: NDArray[Any]) -> str:
    return str(_array(path / "a", image, version=2))


def _zarr2_fortran(path: Path, image: NDArray[Any]) -> str:
    return f"zarr://{_array(path / 'a', image.astype('>u2'), version=2, order='F')}"


def _zarr3(path: Path, image: NDArray[Any]) -> str:
    return str(_array(path / "a.zarr", image, version=3, attributes={"resolution": [40, 4, 8]}))


def _zarr3_sharded(path: Path, image: NDArray[Any]) -> str:
    options = {"chunks": (1, 4, 4), "shards": (4, 8, 8), "zarr_format": 3}
    zarr.create_array(path / "a", data=image, **options)
    return f"zarr3://{path}/a/"


def _zarr3_xyz(path: Path, image: NDArray[Any]) -> str:
    return str(_array(path / "a", image.transpose(), version=3, dimension_names=["x", "y", "z"]))


def _only_array(path: Path, image: NDArray[Any]) -> str:
    _array(path / "g.zarr/deep/raw", image, version=3)
    return str(path / "g.zarr")


def _array_of_group(path: Path, image: NDArray[Any]) -> str:
    _array(path / "g.zarr/raw", image, version=2)
    _array(path / "g.zarr/labels", image, version=2)
    return f"{path}/g.zarr::raw"


def _ome4(path: Path, image: NDArray[Any]) -> str:
    group = zarr.create_group(path / "a.zarr", zarr_format=2)
    scale, translation = [0.04, 0.004, 0.008], [0.4, 0, 0.016]
    group.attrs["multiscales"] = _ome("tczyx", scale, translation, unit="micrometer", paths=["0", "1"])
    _array(
        path / "a.zarr/0", image[None, None], version=2, chunk_key_encoding={"name": "v2", "separator": "/"}
    )
    _array(path / "a.zarr/1", image[None, None, :, ::2, ::2], version=2)
    return str(path / "a.zarr")


def _ome5(path: Path, image: NDArray[Any]) -> str:
    group = zarr.create_group(path / "a.zarr")
    levels = _ome("zyx", [40, 4, 8], [400, 0, 16], unit="nanometer", paths=["s0", "s1"])
    group.attrs["ome"] = {"version": "0.5", "multiscales": levels}
    _array(path / "a.zarr/s0", image, version=3)
    _array(path / "a.zarr/s1", image[:, ::2, ::2], version=3)
    return str(path / "a.zarr")


def _ome5_by_array(path: Path, image: NDArray[Any]) -> str:
    return f"{_ome5(path, image)}/s0"


def _n5(path: Path, image: NDArray[Any]) -> str:
    metadata = {
        "dimensions": image.shape[::-1],
        "blockSize": [8, 4, 2],
        "dataType": "uint16",
        "compression": {"type": "gzip"},
    }
    where = {"driver": "file", "path": f"{path}/a.n5/raw/"}
    array = ts.open({"driver": "n5", "kvstore": where, "metadata": metadata}, create=True).result()
    array.write(image.transpose()).result()
    header = path / "a.n5/raw/attributes.json"
    tree = json.loads(header.read_text())
    header.write_text(json.dumps(tree | {"resolution": [8, 4, 40], "offset": [16, 0, 400]}))
    return f"{path}/a.n5/raw"


def _precomputed(path: Path, image: NDArray[Any]) -> str:
    scales = [
        {
            "key": key,
            "size": size[::-1],
            "resolution": resolution,
            "voxel_offset": [2, 0, 10],
            "chunk_sizes": [[8, 4, 2]],
            "encoding": "raw",
        }
        for key, size, resolution in [
            ("8_4_40", list(image.shape), [8, 4, 40]),
            ("16_8_40", list(image[:, ::2, ::2].shape), [16, 8, 40]),
        ]
    ]
    info = {"type": "image", "data_type": str(image.dtype), "num_channels": 1, "scales": scales}
    (path / "p").mkdir()
    (path / "p/info").write_text(json.dumps(info))
    for n, voxels in enumerate([image, image[:, ::2, ::2]]):
        spec = {"driver": "neuroglancer_precomputed", "kvstore": f"file://{path}/p/", "scale_index": n}
        ts.open(spec).result()[..., 0].write(voxels.transpose()).result()
    return f"precomputed://file://{path}/p"


Write = Callable[[Path, NDArray[Any]], str]
FORMATS: dict[str, tuple[Write, Grid | None]] = {
    "zarr 2": (_zarr2, None),
    "zarr 2, Fortran order, big-endian": (_zarr2_fortran, None),
    "zarr 3 with a voxel size": (_zarr3, Grid((40.0, 4.0, 8.0))),
    "zarr 3 sharded": (_zarr3_sharded, None),
    "zarr 3, x first": (_zarr3_xyz, None),
    "the only array": (_only_array, None),
    "one of two arrays": (_array_of_group, None),
    "OME-Zarr 0.4 tczyx in micrometres": (_ome4, GRID),
    "OME-Zarr 0.5": (_ome5, GRID),
    "OME-Zarr 0.5 by its array": (_ome5_by_array, GRID),
    "N5": (_n5, GRID),
    "precomputed": (_precomputed, GRID),
}


@pytest.mark.parametrize(("write", "grid"), FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_region_asked_for(
    tmp_path: Path, image: NDArray[np.uint16], write: Write, grid: Grid | None
) -> None:
    with open_volume(write(tmp_path, image)) as volume:
        assert (volume.shape, volume.dtype) == (image.shape, np.uint16)
        np.testing.assert_array_equal(volume[REGION], image[REGION])
        np.testing.assert_array_equal(volume[-2:], image[-2:])
        np.testing.assert_array_equal(volume.read(), image)
        assert volume[2:2].shape == (0, 12, 14)
        assert volume.memmap() is None
        assert (volume.grid is None) == (grid is None)
        if grid is not None and volume.grid is not None:
            assert volume.grid.voxel_nm == pytest.approx(grid.voxel_nm)
            assert volume.grid.offset_nm == pytest.approx(grid.offset_nm)
        with open_volume(volume.name) as again:  # its name is one that opens it
            np.testing.assert_array_equal(again[1:2], image[1:2])


@pytest.mark.parametrize(
    ("write", "levels", "voxel_nm"),
    [
        (_ome4, ("1",), (80, 8, 16)),
        (_ome5, ("1", "s1"), (80, 8, 16)),
        (_precomputed, ("1", "16_8_40"), (40, 8, 16)),
    ],
)
def test_a_scale_level_is_chosen(
    tmp_path: Path, image: NDArray[np.uint16], write: Write, levels: tuple[str, ...], voxel_nm: Any
) -> None:
    source = write(tmp_path, image)
    for level in levels:
        with open_volume(f"{source}::{level}") as volume:
            assert volume.grid is not None
            assert volume.grid.voxel_nm == pytest.approx(voxel_nm)
            np.testing.assert_array_equal(volume.read(), image[:, ::2, ::2])
    with pytest.raises(SynmlopsError, match=r"has no scale level 2; it has 2: "):
        open_volume(f"{source}::2")


def test_a_label_beside_the_image(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    _ome5(tmp_path, image)
    label = zarr.create_group(tmp_path / "a.zarr/labels/synapses")
    label.attrs["ome"] = zarr.open_group(tmp_path / "a.zarr").attrs["ome"]
    _array(tmp_path / "a.zarr/labels/synapses/s0", image // 3, version=3)
    for dataset in ("labels/synapses", "labels/synapses/s0"):
        with open_volume(f"{tmp_path}/a.zarr::{dataset}") as volume:
            assert volume.grid == GRID
            assert volume.dataset == "labels/synapses/s0"
            np.testing.assert_array_equal(volume.read(), image // 3)


def test_a_voxel_of_a_coarser_scale_lies_in_the_middle(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    source = _precomputed(tmp_path, image)
    with open_volume(source) as fine, open_volume(f"{source}::1") as coarse:
        assert fine.grid is not None
        assert coarse.grid is not None
        assert coarse.grid.voxel_nm == fine.grid.pooled((1, 2, 2)).voxel_nm
        begun_at_0 = Grid(fine.grid.voxel_nm).pooled((1, 2, 2))
        assert coarse.grid.offset_nm == (400, begun_at_0.offset_nm[1], begun_at_0.offset_nm[2] + 2 * 16)


def test_four_axes(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    both = np.stack([image, image // 2])
    _array(tmp_path / "two", both, version=3, attributes={"channels": ["a", "b"]})
    _array(tmp_path / "one", both[:1], version=2, attributes={"channels": ["a"]})
    _array(tmp_path / "unnamed", both[:1], version=2)
    with open_volume(tmp_path / "two", ndim=4) as volume:
        assert volume.attrs == {"channels": ["a", "b"]}
        np.testing.assert_array_equal(volume[:, 1:3], both[:, 1:3])
    for name, ndim, n_axes in [
        ("one", 4, 4),
        ("one", 3, 3),
        ("one", None, 4),
        ("unnamed", None, 3),
        ("unnamed", 3, 3),
    ]:
        with open_volume(tmp_path / name, ndim=ndim) as volume:
            assert len(volume.shape) == n_axes
            np.testing.assert_array_equal(volume.read().reshape(image.shape), image)
    with pytest.raises(SynmlopsError, match=r"two: has 4 axes, shape \(2, 5, 12, 14\)"):
        open_volume(tmp_path / "two")


def test_missing_chunks_are_the_fill_value(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(4, 4, 4), chunks=(2, 2, 2), dtype="u1", fill_value=7)
    with open_volume(tmp_path / "a") as volume:
        assert np.unique(volume.read()).tolist() == [7]


def test_booleans_are_read_as_numbers(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", data=np.ones((2, 2, 2), bool), chunks=(1, 2, 2))
    with open_volume(tmp_path / "a") as volume:
        assert volume.read().dtype == volume.dtype == np.uint8
        assert volume.read().all()


def test_transformations_follow_each_other(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    _ome5(tmp_path, image)
    header = tmp_path / "a.zarr/zarr.json"
    tree = json.loads(header.read_text())
    every = [{"type": "scale", "scale": [1, 2, 3]}, {"type": "translation", "translation": [1, 0, 0]}]
    tree["attributes"]["ome"]["multiscales"][0]["coordinateTransformations"] = every  # after a level's own
    header.write_text(json.dumps(tree))
    with open_volume(tmp_path / "a.zarr") as volume:
        assert volume.grid == Grid((40, 8, 24), (401, 0, 48))


def test_a_size_without_its_unit_is_no_size(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    _ome5(tmp_path, image)
    header = tmp_path / "a.zarr/zarr.json"
    header.write_text(header.read_text().replace("nanometer", "parsec"))
    with open_volume(tmp_path / "a.zarr") as volume:
        assert volume.grid is None


def test_only_the_header_is_read_at_opening(tmp_path: Path, image: NDArray[np.uint16]) -> None:
    source = _zarr2(tmp_path, image)
    for chunk in (tmp_path / "a").glob("[0-9]*"):
        chunk.write_bytes(b"")
    open_volume(source).close()


def _bad_volumes(path: Path, image: NDArray[Any]) -> dict[str, tuple[str, str]]:
    """Make one bad input of each sort; give what to open and what the message must say."""
    _array_of_group(path, image)
    _ome5(path, image)
    for name, dtype in {"text": "S3", "times": "M8[ns]", "complex": "c8", "records": [("a", "u1")]}.items():
        zarr.create_array(path / name, shape=(2, 2, 2), dtype=dtype, zarr_format=2)
    _array(path / "cut2", image, version=2)
    (path / "cut2/0.0.0").write_bytes((path / "cut2/0.0.0").read_bytes()[:20])
    zarr.create_array(path / "cut3", data=image, chunks=(1, 4, 4), shards=(4, 8, 8))
    shard = path / "cut3/c/0/1/0"
    shard.write_bytes(shard.read_bytes()[:-5])
    _array(path / "stub", image, version=3)
    (path / "stub/zarr.json").write_text('{"zarr_format": 3,')
    _array(path / "future", image, version=3)
    header = json.loads((path / "future/zarr.json").read_text())
    (path / "future/zarr.json").write_text(json.dumps(header | {"codecs": [{"name": "unheard-of"}]}))
    zarr.create_array(path / "flat", shape=(4, 4), dtype="u1")
    zarr.create_array(path / "void", shape=(0, 4, 4), dtype="u1")
    zarr.create_array(path / "movie", shape=(2, 1, 4, 4, 4), dtype="u1")
    zarr.create_group(path / "hollow.zarr")
    for name, changes in {"gone": ("s0", "s7"), "turned": ('"scale"', '"affine"')}.items():
        zarr.create_group(path / name)
        (path / name / "zarr.json").write_text((path / "a.zarr/zarr.json").read_text().replace(*changes))
    (path / "file.zarr").write_text("no folder")
    return {
        "missing": ("nowhere.zarr", "nowhere.zarr: there is no such file or folder"),
        "a file": ("file.zarr", "file.zarr: unknown format; give HDF5"),
        "several arrays": ("g.zarr", r"g.zarr: holds 2 arrays \(labels, raw\); name one: .*g.zarr::labels"),
        "no array": ("hollow.zarr", "hollow.zarr: is a group; name one"),
        "wrong array": ("g.zarr::image", "g.zarr::image: there is no Zarr"),
        "array of an array": ("a.zarr/s0::1", "is one array; leave out ::1"),
        "wrong array of a pyramid": ("a.zarr::raw", "a.zarr::raw: there is no Zarr"),
        "text": ("text", r"text: holds \|S3, not numbers"),
        "times": ("times", r"holds .*M8\[ns\], not numbers"),
        "complex": ("complex", "holds .*c8, not numbers"),
        "records": ("records", "holds .*'a'.*, not numbers"),
        "two axes": ("flat", r"has 2 axes, shape \(4, 4\)"),
        "no voxels": ("void", "has no voxels"),
        "time points": ("movie", r"has 5 axes, shape \(2, 1, 4, 4, 4\)"),
        "cut chunk": ("cut2", r"cut2: region \[0:5, 0:12, 0:14\] is truncated or damaged \(.*0\.0\.0"),
        "cut shard": ("cut3", r"cut3: region \[0:5, 0:12, 0:14\] is truncated or damaged \(.*c/0/1/0"),
        "cut header": ("stub", r"stub: zarr.json is damaged \("),
        "unknown codec": ("future", "future: is damaged or of an unknown form .*unheard-of"),
        "a level that is not there": ("gone", "lists a scale level s7, but there is no array"),
        "an unknown transformation": ("turned", "header is damaged or of an unknown version .*affine"),
    }


def test_each_bad_volume_is_one_message(
    tmp_path: Path, image: NDArray[np.uint16], capfd: pytest.CaptureFixture[str]
) -> None:
    for name, (source, message) in _bad_volumes(tmp_path, image).items():
        with pytest.raises(SynmlopsError, match=message) as caught:  # noqa: SIM117
            with open_volume(f"{tmp_path}/{source}") as volume:
                volume.read()
        assert "\n" not in str(caught.value), name
        assert len(str(caught.value)) < 700, name
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("source", ["ftp://host/a.zarr", "zarr://ftp://host/a"])
def test_an_unknown_kind_of_address_is_refused(source: str) -> None:
    with pytest.raises(SynmlopsError, match="unknown kind of address"):
        open_volume(source)


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _serving(handler: Any) -> Iterator[tuple[str, http.server.ThreadingHTTPServer]]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, http.server.ThreadingHTTPServer]]:
    with _serving(partial(_Files, directory=str(tmp_path))) as served:
        yield served


@pytest.mark.parametrize(
    ("write", "path"),
    [
        (_zarr2, "/a"),
        (_ome5, "/a.zarr"),
        (_ome5_by_array, "/a.zarr/s0"),
        (_n5, "/a.n5/raw"),
        (_precomputed, "/p/"),
    ],
)
def test_a_server_gives_the_same(
    tmp_path: Path,
    image: NDArray[np.uint16],
    served: tuple[str, http.server.ThreadingHTTPServer],
    write: Write,
    path: str,
) -> None:
    with open_volume(write(tmp_path, image)) as local, open_volume(f"{served[0]}{path}") as volume:
        assert volume.name.startswith(served[0])
        assert volume.grid == local.grid
        np.testing.assert_array_equal(volume[REGION], image[REGION])


HEADERS = ("zarr.json", ".zarray", "attributes.json", "info")


@pytest.mark.parametrize("write", [write for write, _ in FORMATS.values()], ids=FORMATS)
def test_another_volume_in_its_place_has_another_identity(
    tmp_path: Path, image: NDArray[np.uint16], write: Write
) -> None:
    source = write(tmp_path, image)

    def identity() -> dict[str, Any]:
        with open_volume(source) as volume:
            return volume.identity()

    aged(tmp_path)
    before = identity()
    assert json.loads(json.dumps(before)) == before
    seen_elsewhere(tmp_path)
    assert identity() == before
    for chunk in set(files_of(tmp_path)) - {file for name in HEADERS for file in tmp_path.rglob(name)}:
        if not chunk.name.startswith("."):
            chunk.unlink()
    assert identity() == before  # without a look at what may be millions
    aged(tmp_path, 60)
    assert identity() != before
    aged(tmp_path)
    for header in [file for name in HEADERS for file in tmp_path.rglob(name)]:
        header.write_text(header.read_text() + "\n")
    aged(tmp_path)
    assert identity() != before


def test_a_servers_volume_is_what_its_header_says(
    tmp_path: Path, image: NDArray[np.uint16], served: tuple[str, Any]
) -> None:
    def identity() -> dict[str, Any]:
        with open_volume(f"{served[0]}/a") as volume:
            return volume.identity()

    _zarr2(tmp_path, image)
    before = identity()
    assert before["source"] == f"{served[0]}/a"
    aged(tmp_path)
    assert identity() == before
    _zarr2(tmp_path, image[:4])
    assert identity() != before


def test_what_a_server_does_not_have(tmp_path: Path, served: tuple[str, Any], image: NDArray[Any]) -> None:
    with pytest.raises(SynmlopsError, match=r"nowhere: there is no Zarr, N5 or neuroglancer"):
        open_volume(f"{served[0]}/nowhere")
    _array_of_group(tmp_path, image)
    zarr.create_group(tmp_path / "g.zarr", zarr_format=2, overwrite=False)
    with pytest.raises(SynmlopsError, match=r"g.zarr: is a group; name one: .*g.zarr::PATH"):
        open_volume(f"{served[0]}/g.zarr")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunk_stores._RETRIES, "initial_delay", "10ms")
    monkeypatch.setitem(chunk_stores._RETRIES, "max_delay", "20ms")
    monkeypatch.setattr(chunk_stores, "STALLED_AFTER_S", 0.5)


@pytest.mark.usefixtures("hasty")
def test_a_server_that_goes_away(tmp_path: Path, image: NDArray[Any], served: tuple[str, Any]) -> None:
    url, server = served
    _ome5(tmp_path, image)
    volume = open_volume(f"{url}/a.zarr")
    server.shutdown()
    server.server_close()
    for read in (volume.read, lambda: open_volume(f"{url}/a.zarr")):
        with pytest.raises(SynmlopsError, match=r"a\.zarr.*: its server fails or does not answer"):
            read()


@pytest.mark.usefixtures("hasty")
def test_a_server_that_never_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(SynmlopsError, match=r"/a: no answer of its server came for 0\.5 s"):
            open_volume(f"http://127.0.0.1:{silent.getsockname()[1]}/a")
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_forbids(status: int) -> None:
    class Closed(_Files):
        def do_GET(self) -> None:
            self.send_error(status)

    refusal = pytest.raises(SynmlopsError, match=r"/a: may not be read \(.*\); .*credentials")
    with _serving(Closed) as (url, _), refusal:
        open_volume(f"{url}/a")


def test_a_bucket_that_forbids_to_ask_for_what_it_does_not_have(
    tmp_path: Path, image: NDArray[np.uint16]
) -> None:
    class Bucket(_Files):
        def send_head(self) -> Any:
            if not Path(self.translate_path(self.path)).is_file():
                return self.send_error(403)
            return super().send_head()

    _zarr2(tmp_path, image)
    handler = partial(Bucket, directory=str(tmp_path))
    with _serving(handler) as (url, _), open_volume(f"{url}/a") as volume:
        np.testing.assert_array_equal(volume.read(), image)
