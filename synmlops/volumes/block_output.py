"""Probabilities written block by block, which processes that die leave whole: HDF5 or sharded Zarr."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.files import plain_write_errors
from synmlops.volumes.prepared import Box
from synmlops.volumes.probabilities import DATASET, probabilities_writer
from synmlops.volumes.store import Grid, open_volume
from synmlops.volumes.zarr import ZarrWriter, create_zarr, open_zarr_writer

CHUNK_BYTES = 2**20
"""A chunk of a Zarr is halved until it has no more: what a viewer reads for one look."""


class BlockOutput(Protocol):
    """Where probabilities are written by block, by several processes at once."""

    def write(self, box: Box, probabilities: NDArray[np.uint8]) -> None:
        """Write a block's own region, all channels; it is on the disk when this returns."""


@dataclass(frozen=True)
class _Zarr:
    writer: ZarrWriter

    def write(self, box: Box, probabilities: NDArray[np.uint8]) -> None:
        self.writer.write((slice(0, len(probabilities)), *box.slices), probabilities)


@dataclass(frozen=True)
class _Hdf5:
    """The voxels of a dataset, whose place in the file is settled: nothing else of the file changes."""

    path: Path
    offset: int
    shape: tuple[int, ...]

    def write(self, box: Box, probabilities: NDArray[np.uint8]) -> None:
        with plain_write_errors(self.path):
            # mapped anew each time, so that written pages do not stay in memory
            voxels = np.memmap(self.path, np.uint8, "r+", self.offset, self.shape)
            voxels[(slice(None), *box.slices)] = probabilities
            voxels.flush()


def create_output(
    path: Path,
    shape_zyx: tuple[int, int, int],
    *,
    channels: Sequence[str],
    grid: Grid,
    block_zyx: tuple[int, int, int],
    cell_zyx: tuple[int, int, int],
) -> None:
    """Make an output of zeros, HDF5 (`.h5`) or Zarr (`.zarr`), unless another process has.

    Parameters
    ----------
    path : Path
    shape_zyx : tuple of int
    channels : sequence of str
    grid : Grid
    block_zyx : tuple of int
        Voxels that are written at a time: of a Zarr, a shard.
    cell_zyx : tuple of int
        A whole number of them is a block: of a Zarr, a chunk or a few.

    Raises
    ------
    SynmlopsError
        If there is not enough space, or the place cannot be written.
    """
    if path.exists():
        return
    shape = (len(channels), *shape_zyx)
    if path.suffix == ".zarr":
        chunk = _chunk_of(cell_zyx)
        try:
            create_zarr(
                path,
                shape,
                np.uint8,
                shard=(len(channels), *block_zyx),
                chunk=(1, *chunk),
                grid=grid,
                channels=channels,
            )
        except SynmlopsError:
            if not path.exists():  # else another process was first
                raise
        return
    with probabilities_writer(path, shape_zyx, channels=channels, grid=grid) as made:
        made[(-1,) * 4] = 0  # which gives all voxels their place
    with plain_write_errors(path), path.open("r+b") as file:
        offset = _offset_of(path)
        # a full disk is told of now, not as the death of whoever writes into the map
        os.posix_fallocate(file.fileno(), offset, int(np.prod(shape)))


def open_output(path: Path) -> BlockOutput:
    """Open what `create_output` made, for writing."""
    if path.suffix == ".zarr":
        return _Zarr(open_zarr_writer(path))
    with open_volume(f"{path}::{DATASET}", ndim=4) as volume:
        return _Hdf5(path, _offset_of(path), volume.shape)


def _offset_of(path: Path) -> int:
    with open_volume(f"{path}::{DATASET}", ndim=4) as volume:
        mapped = volume.memmap()
    assert isinstance(mapped, np.memmap)  # it is made without compression
    return int(mapped.offset)


def _chunk_of(cell_zyx: tuple[int, int, int]) -> tuple[int, int, int]:
    """Halve a cell along its longest even axis until it is small enough to browse.

    Examples
    --------
    >>> _chunk_of((12, 192, 192)), _chunk_of((24, 384, 384)), _chunk_of((5, 7, 1001))
    ((12, 192, 192), (24, 192, 192), (5, 7, 1001))
    """
    chunk = list(cell_zyx)
    while np.prod(chunk) > CHUNK_BYTES and any(n % 2 == 0 for n in chunk):
        axis = max((i for i in range(3) if chunk[i] % 2 == 0), key=lambda i: chunk[i])
        chunk[axis] //= 2
    z, y, x = chunk
    return z, y, x
