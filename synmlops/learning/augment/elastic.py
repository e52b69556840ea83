"""A smooth displacement of the plane: a cubic B-spline over control points, and its limit."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_SQUEEZE = 0.8
"""Tissue keeps at least the rest of its width everywhere, so no two voxels change places."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Spline:
    """Displacements in voxels at control points, and the voxels between two of those."""

    control: Values  # (2, rows, columns): y, then x
    spacing: float

    def greatest_yx(self, shape_yx: tuple[int, int]) -> Values:
        """Greatest displacement of the border's pixels, either way along y and x, in voxels."""
        along_y, along_x = (spline_basis(size, self.spacing) for size in shape_yx)
        rows, columns = (
            along_y[[0, -1]] @ self.control @ along_x.T,
            along_y @ self.control @ along_x[[0, -1]].T,
        )
        return np.array([max(np.abs(rows[axis]).max(), np.abs(columns[axis]).max()) for axis in (0, 1)])

    def on(self, shape_yx: tuple[int, int], device: torch.device) -> Tensor:
        """Give the same as a float32 tensor, computed on the device."""
        along_y, along_x, control = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in (*(spline_basis(size, self.spacing) for size in shape_yx), self.control)
        )
        return along_y @ control @ along_x.T


def draw_spline(
    rng: np.random.Generator, *, shape_yx: tuple[int, int], displacement: float, spacing: float
) -> Spline:
    """Draw normal displacements at the control points, lowered together where they would fold tissue."""
    counts = [spline_basis(size, spacing).shape[1] for size in shape_yx]
    drawn = Spline(rng.normal(scale=displacement, size=(2, *counts)), spacing)
    excess = squeeze(drawn, shape_yx) / MOST_SQUEEZE
    return Spline(drawn.control / max(1.0, excess), spacing)


def squeeze(spline: Spline, shape_yx: tuple[int, int]) -> float:
    """Greatest share of its width that tissue loses in any direction anywhere.

    The map is one-to-one if this is below 1: two points move less against each other than they lie apart.
    It is minus the least eigenvalue of the symmetric part of the displacement's gradient, searched on a
    lattice of at least eight points between two control points.

    Examples
    --------
    >>> slope = np.mgrid[:4, :4][::-1] * 4 * -0.5  # x displaced by y and y by x, half a voxel each
    >>> round(squeeze(Spline(slope, spacing=4), (5, 5)), 6)
    0.5
    """
    (at_y, slope_y), (at_x, slope_x) = (_lattice(size, spline.spacing) for size in shape_yx)
    (yy, xy), (yx, xx) = slope_y @ spline.control @ at_x.T, at_y @ spline.control @ slope_x.T
    least = (yy + xx) / 2 - np.hypot((yy - xx) / 2, (xy + yx) / 2)
    return max(0.0, -float(least.min()))


@lru_cache(maxsize=16)
def spline_basis(size: int, spacing: float) -> Values:
    """Weight of each control point at each pixel: (size, points); each row sums to 1.

    Examples
    --------
    >>> basis = spline_basis(9, 4.0)
    >>> basis.shape, basis[4].round(3).tolist()
    ((9, 5), [0.0, 0.167, 0.667, 0.167, 0.0])
    """
    basis = _basis(np.arange(size, dtype=np.float64), spacing, size)
    basis.flags.writeable = False  # shared by all patches
    return basis


@lru_cache(maxsize=16)
def _lattice(size: int, spacing: float) -> tuple[Values, Values]:
    """Weights of the control points, and their slopes, at points an eighth of a spacing apart."""
    points = np.linspace(0, size - 1, min(size, int(8 * size / spacing) + 2))
    return _basis(points, spacing, size), _basis_slope(points, spacing, size)


def _offsets(points: Values, spacing: float, size: int) -> Values:
    """Distance of each point to each control point in spacings; the first one lies a spacing outside."""
    n = int((size - 1) // spacing) + 3
    n += (size - 1) % spacing > 0
    return points[:, None] / spacing + 1 - np.arange(n)


def _basis(points: Values, spacing: float, size: int) -> Values:
    t = np.abs(_offsets(points, spacing, size))
    return np.asarray(np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.maximum(2 - t, 0) ** 3 / 6))


def _basis_slope(points: Values, spacing: float, size: int) -> Values:
    t = _offsets(points, spacing, size)
    far, near = np.abs(t), t * (1.5 * np.abs(t) - 2)
    return np.asarray(np.where(far < 1, near, -np.sign(t) * np.maximum(2 - far, 0) ** 2 / 2) / spacing)
