"""Where every voxel of a patch comes from: one map in plane, and a second one for sections out of place.

A patch's voxel at offset p from the middle of its section reads the source at offset `matrix @ (p + u(p))`
from the source's middle, u being the elastic displacement; sections out of place turn and shift that once
more. Image and labels are read at the same places, so labels follow geometry exactly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from synmlops.learning.augment.elastic import Spline, draw_spline
from synmlops.learning.augment.orient import Orientation, draw_orientation
from synmlops.learning_params import AugmentParams, Misalignment

Matrix = NDArray[np.float64]
ROUNDING = 0.01  # voxels; a float32 coordinate is closer to its float64 twin
BULGE = 0.1  # voxels; a spline that does not fold strays less from a straight line between two pixels


@dataclass(frozen=True)
class Slip:
    """Sections `first` to before `stop` are out of place in plane."""

    first: int
    stop: int
    shift_yx: tuple[int, int]
    degrees: float


@dataclass(frozen=True)
class Geometry:
    """All geometry of one patch."""

    patch_zyx: tuple[int, int, int]
    orientation: Orientation
    degrees: float = 0.0  # clockwise on a screen, y pointing down
    zoom: float = 1.0  # above 1, tissue looks larger
    elastic: Spline | None = None
    slip: Slip | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether voxels are interpolated; else they are only moved."""
        turns = self.degrees != 0 or (self.slip is not None and self.slip.degrees != 0)
        return turns or self.zoom != 1 or self.elastic is not None

    @cached_property
    def box_zyx(self) -> tuple[int, int, int]:
        """Size of the box that is read, in the patch's axes: the patch and even margins in plane."""
        z, *sizes = self.patch_zyx
        farthest = self._farthest_yx()
        reach = np.max([self._reach_yx(farthest, run[2]) for run in self.runs()], axis=0)
        slack = ROUNDING if self.is_sampled else 0.0
        y, x = (
            size + 2 * math.ceil(r + slack - (size - 1) / 2) for size, r in zip(sizes, reach, strict=True)
        )
        return z, max(1, y), max(1, x)

    @property
    def source_zyx(self) -> tuple[int, int, int]:
        """Size of the box that is read, in the source's axes."""
        return self.orientation.source_zyx(self.box_zyx)

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """Give first section, the one after the last, and whether they are out of place, for each run."""
        n, slip = self.patch_zyx[0], self.slip
        if slip is None:
            yield 0, n, False
            return
        for first, stop, slipped in (
            (0, slip.first, False),
            (slip.first, slip.stop, True),
            (slip.stop, n, False),
        ):
            if first < stop:
                yield first, stop, slipped

    def map_of(self, slipped: bool) -> tuple[Matrix, Matrix]:
        """Give the matrix and the shift of a run: source = matrix @ (p + u(p)) + shift."""
        matrix = _rotation(self.degrees) / self.zoom
        if self.slip is None or not slipped:
            return matrix, np.zeros(2)
        return _rotation(self.slip.degrees) @ matrix, np.array(self.slip.shift_yx, dtype=np.float64)

    def start_of(self, slipped: bool) -> tuple[int, int]:
        """Give the first y and x in the box of a run that is only shifted."""
        shift = self.map_of(slipped)[1].astype(int).tolist()
        y, x = (
            (box - size) // 2 + by
            for box, size, by in zip(self.box_zyx[1:], self.patch_zyx[1:], shift, strict=True)
        )
        return y, x

    def move(self, labels: Tensor) -> Tensor:
        """Cut the runs of a box, already in the patch's axes, that is only shifted."""
        parts = []
        for first, stop, slipped in self.runs():
            (y, x), (height, width) = self.start_of(slipped), self.patch_zyx[1:]
            parts.append(labels[first:stop, y : y + height, x : x + width])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sample(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolate a box in the patch's axes: the image linearly, labels from the nearest voxel."""
        moved = self._displaced(image.device)
        at = {slipped: self._places(slipped, *moved) for slipped in {run[2] for run in self.runs()}}
        images, others = [], []
        for first, stop, slipped in self.runs():
            images.append(_linear(image[first:stop], at[slipped]))
            others.append(_nearest(labels[first:stop], at[slipped]))
        if len(images) == 1:
            return images[0], others[0]
        return torch.cat(images), torch.cat(others)

    def displacement(self, device: torch.device) -> Tensor | None:
        """Give what elastic deformation adds to y and x of each pixel of a section: (2, y, x)."""
        return None if self.elastic is None else self.elastic.on(self.patch_zyx[1:], device)

    def rows_of(self, slipped: bool) -> list[tuple[float, float, float]]:
        """Give a, b and c for y, then for x, in the box of a run: a * y + b + c * x.

        The pixel's own y and x count from the middle of its section, elastic displacement included.
        """
        matrix, shift = self.map_of(slipped)
        middle = (np.array(self.box_zyx[1:]) - 1) / 2 + shift
        return [(a, b, c) for (a, c), b in zip(matrix.tolist(), middle.tolist(), strict=True)]

    def _displaced(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give y and x of each pixel from the middle of its section, where they are to be turned."""
        y, x = (
            torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
            for size in self.patch_zyx[1:]
        )
        by = self.displacement(device)
        return (y[:, None], x[None, :]) if by is None else (by[0].add_(y[:, None]), by[1].add_(x[None, :]))

    def _places(self, slipped: bool, y: Tensor, x: Tensor) -> Tensor:
        """Index into the box, fractional, that each pixel of a section reads: (2, y, x), y before x.

        No product is fused with a sum, so these are the same to the last bit wherever they are computed.
        """
        return torch.stack([(y * a + b) + x * c for a, b, c in self.rows_of(slipped)])

    def _farthest_yx(self) -> Matrix:
        """Farthest that a pixel comes to lie from the middle of its section, in voxels along y and x."""
        farthest = (np.array(self.patch_zyx[1:]) - 1) / 2
        if self.elastic is None:
            return farthest
        # nothing folds, so what lies within the border stays within it, but for its curve between pixels
        return farthest + self.elastic.greatest_yx(self.patch_zyx[1:]) + BULGE

    def _reach_yx(self, farthest_yx: Matrix, slipped: bool) -> Matrix:
        """Farthest that a run reads from the source's middle, in voxels along y and x."""
        matrix, shift = self.map_of(slipped)
        return np.asarray(np.abs(matrix) @ farthest_yx + np.abs(shift))


def draw_geometry(
    rng: np.random.Generator, *, params: AugmentParams, patch_zyx: tuple[int, int, int], isotropic: bool
) -> Geometry:
    """Draw orientation, rotation, scale, elastic deformation and misalignment of a patch."""
    orientation = draw_orientation(
        rng, flip=params.flip, quarter_turn=params.quarter_turn, isotropic=isotropic
    )
    degrees, zoom, elastic = 0.0, 1.0, None
    if rng.random() < params.rotate.probability:
        degrees = float(rng.uniform(-params.rotate.degrees, params.rotate.degrees))
    if rng.random() < params.scale.probability:
        zoom = float(params.scale.factor ** rng.uniform(-1, 1))
    if rng.random() < params.elastic.probability:
        elastic = draw_spline(
            rng,
            shape_yx=patch_zyx[1:],
            displacement=params.elastic.displacement,
            spacing=params.elastic.spacing,
        )
    slip = _draw_slip(rng, params.misalign, patch_zyx[0])
    return Geometry(patch_zyx, orientation, degrees, zoom, elastic, slip)


def _draw_slip(rng: np.random.Generator, params: Misalignment, n_sections: int) -> Slip | None:
    if rng.random() >= params.probability or n_sections < 2:
        return None
    if rng.random() < params.single:
        first = int(rng.integers(n_sections))
        stop = first + 1
    else:
        first, stop = int(rng.integers(1, n_sections)), n_sections
    dy, dx = rng.integers(-params.shift, params.shift + 1, size=2).tolist()
    return Slip(first, stop, (dy, dx), float(rng.uniform(-params.degrees, params.degrees)))


def _rotation(degrees: float) -> Matrix:
    angle = math.radians(degrees)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _linear(image: Tensor, at: Tensor) -> Tensor:
    scale = [2 / max(1, size - 1) for size in (image.shape[2], image.shape[1])]
    grid = torch.stack([at[1] * scale[0], at[0] * scale[1]], dim=-1).sub_(1)  # -1 to 1, x before y
    return grid_sample(image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0]


def _nearest(labels: Tensor, at: Tensor) -> Tensor:
    """Read labels at the nearest voxel; as a gather of integers, so that any id survives."""
    y, x = (at + 0.5).long()  # the source holds every place, so none is negative
    index = y.mul_(labels.shape[2]).add_(x).flatten()
    flat = labels.reshape(len(labels), -1)
    return flat.gather(1, index.expand(len(flat), -1)).reshape(len(labels), *at.shape[1:])
