"""Arrays beside the heap: zeros like any other, of which nothing stays when they are dropped."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from synmlops.learning.allocator import keep_freed_memory
from synmlops.volumes.mapped import mapped_zeros
from synmlops.volumes.store import Grid, open_volume, write_hdf5
from synmlops.volumes.zarr import create_zarr

SHAPE = (64, 1024, 1024)  # 64 MiB


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 7, 7), (3, 64, 128, 256)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_zeros_like_any_other(shape: tuple[int, ...], dtype: type) -> None:
    array = mapped_zeros(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags.c_contiguous
    assert not array.any()
    array[...] = 7
    part = array[-1:]
    del array
    assert (part == 7).all()  # a view keeps it


def test_too_much_is_what_numpy_says_of_it() -> None:
    with pytest.raises(MemoryError, match="no 1125899906842624 bytes are left"):
        mapped_zeros((2**20, 2**30), np.uint8)


def _zarr(path: Path, voxels: NDArray[np.uint8]) -> None:
    writer = create_zarr(path, SHAPE, np.uint8, shard=SHAPE, chunk=(16, 256, 256), grid=Grid((40, 8, 8)))
    writer.write((slice(None),) * 3, voxels)


def _hdf5(path: Path, voxels: NDArray[np.uint8]) -> None:
    write_hdf5(path, {"main": voxels}, grid=Grid((40, 8, 8)))


@pytest.mark.parametrize(("name", "write"), [("em.zarr", _zarr), ("em.h5", _hdf5)])
def test_what_was_read_goes_when_it_is_dropped(
    name: str, write: Callable[[Path, NDArray[Any]], None], tmp_path: Path
) -> None:
    """Even where the C library keeps what is freed."""
    voxels = np.random.default_rng(0).integers(0, 255, (1, 1, 1024), dtype=np.uint8)
    write(tmp_path / name, np.broadcast_to(voxels, SHAPE).copy())
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    try:
        with open_volume(tmp_path / name) as volume:
            volume.read()  # fills the reader's cache; the heap would keep what this took
            before = _resident_mib()
            read = volume.read()
            assert _resident_mib() > before + 60
            assert np.array_equal(read[5, 5], voxels[0, 0])
            del read
            assert _resident_mib() < before + 8
    finally:
        keep_freed_memory(False)
