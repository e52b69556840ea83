"""A volume that looks like EM to a data path: grey texture, and synapses that make up a given share of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from synmlops.volumes.prepared import PreparedVolume
from synmlops.volumes.preparing import Source, prepare_volume
from synmlops.volumes.store import Grid, write_hdf5

HALF_ZYX = (
    2.0,
    9.0,
    9.0,
)  # voxels; half axes of a pre and a post side together, about 690 voxels, so that at
# 0.06 % foreground a patch takes 7 crops; the incumbent was seen to need 8.6 there, of larger crops
MARGIN_ZYX = (3, 12, 12)  # voxels between a middle and the border, so that every synapse is whole
VOXEL_NM = (40.0, 8.0, 8.0)


@dataclass(frozen=True)
class EmVolume:
    """Image and `pairs` label, both (z, y, x), and the middles of the synapses, (N, 3)."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint16]
    middles: NDArray[np.int_]


def make_em_volume(shape_zyx: tuple[int, int, int], *, foreground: float, seed: int) -> EmVolume:
    """Scatter synapses evenly until they fill this share of the voxels.

    Examples
    --------
    >>> made = make_em_volume((16, 128, 128), foreground=0.01, seed=1)
    >>> 0.009 < float((made.labels > 0).mean()) < 0.015, int(made.labels.max()) == 2 * len(made.middles)
    (True, True)
    """
    rng = np.random.default_rng(seed)
    coarse = gaussian_filter(rng.standard_normal(shape_zyx, np.float32), (0.5, 2.0, 2.0))
    fine = rng.standard_normal(shape_zyx, np.float32)
    grey = 140 + 30 * coarse / coarse.std() + 15 * fine
    labels = np.zeros(shape_zyx, np.uint16)
    middles: list[NDArray[np.int_]] = []
    filled = 0
    low, high = np.array(MARGIN_ZYX), np.array(shape_zyx) - MARGIN_ZYX
    while filled < foreground * labels.size:
        middle = rng.integers(low, high)
        box = tuple(slice(m - s, m + s) for m, s in zip(middle, MARGIN_ZYX, strict=True))
        if labels[box].any():
            continue  # synapses do not overlap
        inside, is_pre = _synapse(rng)
        middles.append(middle)
        labels[box] = np.where(inside, 2 * len(middles) - is_pre, 0)
        grey[box] -= np.where(inside, 50, 0)
        filled += int(inside.sum())
    return EmVolume(np.clip(grey, 1, 255).astype(np.uint8), labels, np.array(middles))


def prepare_em_volume(made: EmVolume, folder: Path) -> PreparedVolume:
    """Write the volume as a user has it and prepare it as the first stage does."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    write_hdf5(raw / "em.h5", {"image": made.image, "label": made.labels}, grid=Grid(VOXEL_NM))
    source = Source(name="em", image=f"{raw}/em.h5::image", label=f"{raw}/em.h5::label", kind="pairs")
    return prepare_volume(source, folder, voxel_nm=None, pool_zyx=(1, 1, 1)).volume


def _synapse(rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Give a flat ellipsoid in a box of twice the margin, and which half of it is pre."""
    axes = [np.arange(-size, size) + 0.5 for size in MARGIN_ZYX]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    inside = (z / HALF_ZYX[0]) ** 2 + (y / HALF_ZYX[1]) ** 2 + (x / HALF_ZYX[2]) ** 2 < 1
    angle = rng.uniform(0, 2 * np.pi)
    return inside, y * np.cos(angle) + x * np.sin(angle) > 0
