"""Zarr: others read what we write, many may write at once, and a killed writer leaves whole shards."""

import itertools
import multiprocessing
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.probabilities import open_probabilities, read_probabilities
from synmlops.volumes.store import Grid, open_volume
from synmlops.volumes.zarr import ZarrWriter, create_zarr, open_zarr_writer

GRID = Grid((40.0, 4.0, 8.0), (400.0, 0.0, 16.0))
CHANNELS = ["pre", "post", "union"]
SHAPE, SHARD, CHUNK = (3, 20, 40, 70), (3, 8, 32, 32), (1, 4, 16, 16)
WHOLE = (slice(None),) * 4


def _noise(shape: tuple[int, ...] = SHAPE, dtype: Any = np.uint8, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(1, 100, shape).astype(dtype)


def _probabilities(path: Path, **changes: Any) -> ZarrWriter:
    options = {"shard": SHARD, "chunk": CHUNK, "grid": GRID, "channels": CHANNELS, "attrs": {"run": "r7"}}
    return create_zarr(path, SHAPE, np.uint8, **(options | changes))


def _region(*bounds: tuple[int, int]) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in bounds)


def test_others_read_what_we_write(tmp_path: Path) -> None:
    image = _noise()
    _probabilities(tmp_path / "p.zarr").write(WHOLE, image)
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert (group.attrs["scale"], group.attrs["channels"], group.attrs["run"]) == (255, CHANNELS, "r7")
    (level,) = group.attrs["ome"]["multiscales"]
    assert [axis.get("unit") for axis in level["axes"]] == [None, *["nanometer"] * 3]
    scale, translation = level["datasets"][0]["coordinateTransformations"]
    assert (scale["scale"], translation["translation"]) == ([1, 40, 4, 8], [0, 400, 0, 16])
    array = group["0"]
    assert (array.shape, array.shards, array.chunks) == (SHAPE, SHARD, CHUNK)
    np.testing.assert_array_equal(array[:], image)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int8", "float32"])
def test_ids_of_every_width(tmp_path: Path, dtype: str) -> None:
    top = 2**24 if dtype == "float32" else np.iinfo(dtype).max
    ids = (_noise((5, 16, 16), np.uint64) + np.uint64(top - 100)).astype(dtype)
    writer = create_zarr(tmp_path / "a", ids.shape, dtype, shard=(4, 16, 16), chunk=(4, 8, 8), grid=GRID)
    writer.write((slice(4, 5), slice(None), slice(0, 16)), ids[4:])
    read = zarr.open_group(tmp_path / "a", mode="r")["0"]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read[4:], ids[4:])
    assert not read[:4].any()


def test_a_writer_opened_again_is_the_same(tmp_path: Path) -> None:
    made = _probabilities(tmp_path / "p.zarr")
    writer = open_zarr_writer(tmp_path / "p.zarr")
    assert (writer.shape, writer.shard, writer.chunk, writer.dtype) == (SHAPE, SHARD, CHUNK, np.uint8)
    assert writer.attrs == made.attrs == {"run": "r7", "scale": 255, "channels": CHANNELS}
    image = _noise()
    for z in range(0, 20, 8):
        region = _region((0, 3), (z, min(z + 8, 20)), (0, 40), (0, 70))
        (made if z else writer).write(region, image[region])
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "p.zarr", mode="r")["0"][:], image)


@pytest.mark.parametrize(
    "region",
    [
        _region((0, 3), (4, 8), (0, 40), (0, 70)),
        _region((0, 3), (0, 9), (0, 40), (0, 70)),
        _region((0, 1), (0, 8), (0, 40), (0, 70)),
        _region((0, 3), (0, 8), (0, 40), (0, 96)),
        _region((0, 3), (8, 8), (0, 40), (0, 70)),
        _region((0, 3), (-8, 20), (0, 40), (0, 70)),
        (slice(0, 3), slice(0, 16, 2), slice(0, 40), slice(0, 70)),
        _region((0, 3), (0, 8), (0, 40)),
    ],
)
def test_a_region_that_cuts_a_shard_is_refused(tmp_path: Path, region: tuple[slice, ...]) -> None:
    writer = _probabilities(tmp_path / "p.zarr")
    with pytest.raises(ValueError, match="whole shards"):
        writer.write(region, _noise()[region])
    assert not (tmp_path / "p.zarr/0/c").exists()


@pytest.mark.parametrize("array", [_noise(dtype=np.uint16), _noise((3, 20, 40, 69)), _noise()[0]])
def test_an_array_of_another_form_is_refused(tmp_path: Path, array: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"the region is \(3, 20, 40, 70\) uint8"):
        _probabilities(tmp_path / "p.zarr").write(WHOLE, array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": (3, 8, 32, 24)}, "not a whole number of chunks"),
        ({"chunk": (4, 16, 16)}, "need 4 positive sizes"),
        ({"chunk": (1, 0, 16, 16)}, "need 4 positive sizes"),
        ({"channels": ["pre"]}, "do not name the channels"),
        ({"attrs": {"ome": 1}}, "is that of OME-Zarr"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _probabilities(tmp_path / "p.zarr", **changes)
    assert not list(tmp_path.iterdir())


def test_nothing_is_mixed_with_what_is_there(tmp_path: Path) -> None:
    image = _noise()
    _probabilities(tmp_path / "p.zarr").write(WHOLE, image)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("p.zarr", "file", "folder"):
        with pytest.raises(SynmlopsError, match=f"{name}: is there already"):
            _probabilities(tmp_path / name)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "p.zarr", mode="r")["0"][:], image)
    assert len(list(tmp_path.iterdir())) == 3


def test_only_what_create_makes_is_opened_for_writing(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "plain", shape=(4, 4, 4), dtype="u1")
    zarr.create_array(tmp_path / "group/0", shape=(4, 4, 4), dtype="u1")
    for name in ("nowhere", "plain", "group"):
        with pytest.raises(SynmlopsError, match=f"{name}: is no sharded OME-Zarr"):
            open_zarr_writer(tmp_path / name)


def test_a_damaged_shard_is_written_anew(tmp_path: Path) -> None:
    writer, image = _probabilities(tmp_path / "p.zarr"), _noise()
    writer.write(WHOLE, image)
    shard = tmp_path / "p.zarr/0/c/0/0/0/2"  # cut off by the array's end, so that not every chunk is replaced
    whole = shard.read_bytes()
    for junk in (b"", whole[:-40], whole[:100] + bytes(len(whole) - 100)):
        shard.write_bytes(junk)
        region = _region((0, 3), (0, 8), (0, 32), (64, 70))
        writer.write(region, image[region])
        assert shard.read_bytes() == whole


def test_a_shard_of_zeros_replaces_what_was_there(tmp_path: Path) -> None:
    writer = _probabilities(tmp_path / "p.zarr")
    writer.write(WHOLE, _noise())
    writer.write(WHOLE, np.zeros(SHAPE, np.uint8))
    assert not zarr.open_group(tmp_path / "p.zarr", mode="r")["0"][:].any()


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    writer = _probabilities(tmp_path / "p.zarr")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SynmlopsError, match=r"p\.zarr/0/c/0/0/0/0: cannot be written \(File too large\)"):
            writer.write(WHOLE, _noise())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    writer.write(WHOLE, _noise())
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "p.zarr", mode="r")["0"][:], _noise())


def _write_slabs(path: Path, first: int) -> None:
    writer, image = open_zarr_writer(path), _noise()
    for y in (0, 32):  # the two processes' shards lie beside each other and are written in turn
        for z in range(first, 20, 16):
            region = _region((0, 3), (z, min(z + 8, 20)), (y, min(y + 32, 40)), (0, 70))
            writer.write(region, image[region])


def test_two_processes_write_one_array(tmp_path: Path) -> None:
    _probabilities(tmp_path / "p.zarr")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_write_slabs, args=(tmp_path / "p.zarr", z)) for z in (0, 8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "p.zarr", mode="r")["0"][:], _noise())


BIG = (32, 256, 256)  # one shard of 2 MiB, which zstd cannot make smaller


def _write_for_ever(path: Path) -> None:
    writer, noise = open_zarr_writer(path), _noise(BIG)
    for value in itertools.count(1):
        writer.write((slice(None),) * 3, noise ^ np.uint8(value % 100 + 128))


def test_a_killed_writer_leaves_a_whole_shard_or_none(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = []
    for n in range(3):
        path = tmp_path / f"{n}.zarr"
        create_zarr(path, BIG, np.uint8, shard=BIG, chunk=(8, 64, 64), grid=GRID)
        processes.append((path, spawn.Process(target=_write_for_ever, args=(path,))))
        processes[-1][1].start()
    for n, (path, process) in enumerate(processes):
        folder = path / "0/c/0/0"
        deadline = time.monotonic() + 60
        while not (list(folder.glob("*")) if n == 0 else (folder / "0").exists()):
            assert time.monotonic() < deadline
        time.sleep(0.03 * n)
        process.kill()
        process.join()
    for path, _ in processes:
        values = np.unique(zarr.open_group(path, mode="r")["0"][:] ^ _noise(BIG))
        assert len(values) == 1 or not (path / "0/c/0/0/0").exists()
        writer = open_zarr_writer(path)
        writer.write((slice(None),) * 3, _noise(BIG))  # whatever the dead writer left is not in the way
        np.testing.assert_array_equal(zarr.open_group(path, mode="r")["0"][:], _noise(BIG))


def test_probabilities_are_read_as_from_a_file(tmp_path: Path) -> None:
    image = _noise()
    _probabilities(tmp_path / "p.zarr").write(WHOLE, image)
    with open_volume(tmp_path / "p.zarr", ndim=4) as volume:
        assert volume.attrs == {"run": "r7", "scale": 255, "channels": CHANNELS}
        assert volume.grid == GRID
    read = read_probabilities(tmp_path / "p.zarr")
    assert (read.channels, read.grid) == (tuple(CHANNELS), GRID)
    np.testing.assert_array_equal(read.values_czyx, image)
    with open_probabilities(tmp_path / "p.zarr") as volume:
        np.testing.assert_array_equal(volume[:, 3:9, :5], image[:, 3:9, :5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": None}, "scale=None, channels=None"),
        ({"channels": None, "attrs": {"scale": 1, "channels": CHANNELS}}, "scale=1,"),
        ({"channels": ["pre", "post", "mito"]}, "do not name its 3 planes"),
    ],
)
def test_probabilities_that_say_too_little_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    _probabilities(tmp_path / "p.zarr", **changes)
    with pytest.raises(SynmlopsError, match=message):
        read_probabilities(tmp_path / "p.zarr")
