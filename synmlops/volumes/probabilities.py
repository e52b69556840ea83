"""Files of probabilities: uint8, (c, z, y, x), which say their channels and scale or are refused."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import CHANNELS, SCALE, SynmlopsError
from synmlops.volumes.store import Grid, hdf5_writer, open_volume

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


def read_probabilities(path: Path) -> Probabilities:
    """Read a whole file of probabilities.

    Raises
    ------
    SynmlopsError
        If the file is missing or damaged, or does not say its channels, scale and voxel size.
    """
    with open_volume(f"{path}::{DATASET}", ndim=4) as volume:
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
        return Probabilities(volume.read(), tuple(channels), volume.grid)
