"""Probabilities of a volume of any size, made up region by region from a seed: no file holds them."""

import time
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

CELL_ZYX = (32, 96, 96)  # voxels; one synapse each, so that 128 x 1024 x 1024 hold about 450
HALF_ZYX = (5.0, 15.0, 15.0)  # voxels; half axes of a synapse, pre and post together about 5 000 voxels
SPECKS = 2e-5  # share of the voxels that a poor network lights up for nothing


@dataclass
class Synthetic:
    """Pre, post and union: uint8, (3, z, y, x); what is read depends on the place alone.

    `made_s` adds up the CPU seconds that it took to make what was read, so that they can be taken off.
    """

    shape_zyx: tuple[int, int, int]
    seed: int = 0
    made_s: float = field(default=0.0, init=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Size along c, z, y, x."""
        return 3, *self.shape_zyx

    def __getitem__(self, region: tuple[slice, ...]) -> NDArray[np.uint8]:
        """Make all channels of a region; slices without a step, the first one open."""
        began = time.process_time()
        bounds = [s.indices(n)[:2] for s, n in zip(region[1:], self.shape_zyx, strict=True)]
        starts = np.array([low for low, _ in bounds])
        planes = np.zeros((3, *(high - low for low, high in bounds)), np.uint8)
        cells = [
            range(max(low // size - 1, 0), min(-(-high // size) + 1, -(-n // size)))
            for (low, high), size, n in zip(bounds, CELL_ZYX, self.shape_zyx, strict=True)
        ]
        for cell in product(*cells):
            _paint(planes, starts, *self._synapse(cell))
        self._speckle(planes, starts)
        self.made_s += time.process_time() - began
        return planes

    def _synapse(self, cell: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Give the middle of a cell's synapse, anywhere in it, and the way its signal goes."""
        rng = np.random.default_rng((self.seed, *cell))
        middle = np.array(cell) * CELL_ZYX + (rng.random(3) * CELL_ZYX).astype(np.int64)
        towards = rng.standard_normal(3)
        return middle, towards / np.linalg.norm(towards)

    def _speckle(self, planes: NDArray[np.uint8], starts: NDArray[np.int64]) -> None:
        """Light up single voxels, by a hash of the section so that any region shows the same ones."""
        size = planes[0, 0].size
        n = round(SPECKS * self.shape_zyx[1] * self.shape_zyx[2])
        if n == 0 or size == 0:
            return
        for z in range(planes.shape[1]):
            rng = np.random.default_rng((self.seed, 1 << 40, int(starts[0]) + z))
            y = rng.integers(0, self.shape_zyx[1], n) - starts[1]
            x = rng.integers(0, self.shape_zyx[2], n) - starts[2]
            inside = (y >= 0) & (y < planes.shape[2]) & (x >= 0) & (x < planes.shape[3])
            planes[:, z, y[inside], x[inside]] = 180


def _paint(
    planes: NDArray[np.uint8],
    starts: NDArray[np.int64],
    middle: NDArray[np.int64],
    towards: NDArray[np.float64],
) -> None:
    """Paint a synapse: pre behind, post ahead, certain in the middle and less so at the rim."""
    reach = np.ceil(HALF_ZYX).astype(np.int64)
    low = np.maximum(middle - reach - starts, 0)
    high = np.minimum(middle + reach + 1 - starts, planes.shape[1:])
    if (low >= high).any():
        return
    axes = [np.arange(a, b) + start - at for a, b, start, at in zip(low, high, starts, middle, strict=True)]
    z, y, x = np.ix_(*axes)
    distance = (z / HALF_ZYX[0]) ** 2 + (y / HALF_ZYX[1]) ** 2 + (x / HALF_ZYX[2]) ** 2
    probability = (255 * (1 - distance / 2)).clip(0, 255)
    probability[distance > 1] = 0
    ahead = z * towards[0] * 3 + y * towards[1] + x * towards[2] > 0
    view = planes[:, *(slice(a, b) for a, b in zip(low, high, strict=True))]
    for channel, share in enumerate((~ahead, ahead, np.True_)):
        np.maximum(view[channel], (probability * share).astype(np.uint8), out=view[channel])
