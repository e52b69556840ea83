"""Probabilities on disk: uint8, (c, z, y, x), which say their channels and scale or are refused.

HDF5 for what fits one machine; Zarr, made by `synmlops.volumes.zarr`, for what many processes write.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import CHANNELS, SCALE, SynmlopsError
from synmlops.volumes.chunk_headers import is_chunked
from synmlops.volumes.store import Grid, Volume, hdf5_writer, open_volume

DATASET = "probabilities"


@dataclass(frozen=True, eq=False)
class Probabilities:
    """What a network says of a region."""

    values_czyx: NDArray[np.uint8]
    channels: tuple[str, ...]
    grid: Grid


@contextmanager
def probabilities_writer(
    path: Path, shape_zyx: tuple[int, int, int], *, channels: Sequence[str], grid: Grid
) -> Iterator[Any]:
    """Give a writable (c, z, y, x) dataset; the file appears under its name when complete."""
    forms = {DATASET: ((len(channels), *shape_zyx), np.uint8)}
    with hdf5_writer(path, forms, grid=grid, attrs={"scale": SCALE, "channels": list(channels)}) as made:
        yield made[DATASET]


@contextmanager
def open_probabilities(path: Path) -> Iterator[Volume]:
    """Open an HDF5 file or a Zarr group of probabilities; its attribute `channels` names the planes.

    Raises
    ------
    SynmlopsError
        If it is missing or damaged, or does not say its channels, scale and voxel size.
    """
    source = path if is_chunked(str(path)) else f"{path}::{DATASET}"
    with open_volume(source, ndim=4) as volume:
        channels, scale = volume.attrs.get("channels"), volume.attrs.get("scale")
        if volume.dtype != np.uint8 or scale != SCALE or channels is None or volume.grid is None:
            raise SynmlopsError(
                f"{path}: not a file of probabilities (uint8 with attributes scale={SCALE}, channels and "
                f"resolution; has {volume.dtype}, scale={scale}, channels={channels}); run `synmlops infer`"
            )
        if len(channels) != volume.shape[0] or not set(channels) <= set(CHANNELS):
            raise SynmlopsError(
                f"{path}: channels {channels} do not name its {volume.shape[0]} planes; run `synmlops infer`"
            )
        yield volume


def read_probabilities(path: Path) -> Probabilities:
    """Read a whole file or Zarr group of probabilities; raises as `open_probabilities` does."""
    with open_probabilities(path) as volume:
        assert volume.grid is not None  # else it was refused
        return Probabilities(volume.read(), tuple(volume.attrs["channels"]), volume.grid)
