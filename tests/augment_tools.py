"""What the tests of augmentation share: params with all chances at 0, and an independent look at geometry."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from synmlops.learning.augment.geometry import Geometry
from synmlops.learning_params import AugmentParams

SHARES = ("flip", "quarter_turn", "invert")
SECTIONS = tuple(name for name in AugmentParams.model_fields if name not in (*SHARES, "copy_paste"))
NAMES = (*SHARES, *SECTIONS)
MODEST: dict[str, dict[str, Any]] = {  # for patches of some 20 voxels
    "misalign": {"shift": 3, "degrees": 10, "single": 0.5},
    "elastic": {"displacement": 2, "spacing": 6},
    "motion_blur": {"length": 5},
    "missing_section": {"partly": 0.5, "most": 2},
    "intensity": {"per_section": 0.5},
}


def only(*names: str, chance: float = 1.0, **settings: dict[str, Any]) -> AugmentParams:
    """Give params by which what is named happens at this chance, and nothing else ever."""
    values: dict[str, Any] = {name: chance if name in names else 0.0 for name in SHARES}
    for name in SECTIONS:
        probability = chance if name in names else 0.0
        values[name] = {**MODEST.get(name, {}), **settings.get(name, {}), "probability": probability}
    return AugmentParams.model_validate(values | {"copy_paste": {"probability": 0.0}})


def turn_in_numpy(geometry: Geometry, voxels: NDArray[Any]) -> NDArray[Any]:
    """Turn an array as the orientation says."""
    return np.flip(voxels.transpose(geometry.orientation.axes), geometry.orientation.flips)


def places_in_numpy(geometry: Geometry) -> NDArray[np.float64]:
    """Say in float64 which y and x of the turned source each voxel reads: (2, z, y, x)."""
    n, height, width = geometry.patch_zyx
    y, x = np.mgrid[:height, :width].astype(float)
    by = np.zeros((2, height, width))
    if geometry.elastic is not None:
        knots = np.array([y, x]) / geometry.elastic.spacing + 1
        for axis, control in enumerate(geometry.elastic.control):
            padded = np.pad(control, 2)  # keeps the mirrored border out of reach
            by[axis] = map_coordinates(padded, knots + 2, order=3, prefilter=False)
    offset = (by[1] + x - (width - 1) / 2) + 1j * (by[0] + y - (height - 1) / 2)  # the plane as x + iy
    places = np.empty((n, height, width), dtype=complex)
    for z in range(n):
        slip = geometry.slip if geometry.slip and geometry.slip.first <= z < geometry.slip.stop else None
        degrees = geometry.degrees + (slip.degrees if slip else 0)
        places[z] = offset * np.exp(-1j * np.radians(degrees)) / geometry.zoom
        if slip:
            places[z] += slip.shift_yx[1] + 1j * slip.shift_yx[0]
    _, box_y, box_x = turn_in_numpy(geometry, np.empty(geometry.source_zyx, dtype=bool)).shape
    return np.array([places.imag + (box_y - 1) / 2, places.real + (box_x - 1) / 2])


def noisy(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Give a uint8 image of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
