"""Flips and quarter turns: a patch read along other axes, without a voxel changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Orientation:
    """Which axis of the source each axis of the patch reads, and which axes of the patch are turned round."""

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[int, ...] = ()

    def source_zyx(self, shape_zyx: Sequence[int]) -> tuple[int, int, int]:
        """Size of the source of a box of this shape.

        Examples
        --------
        >>> Orientation(axes=(1, 2, 0)).source_zyx((4, 5, 6))
        (6, 4, 5)
        """
        source = [0, 0, 0]
        for size, axis in zip(shape_zyx, self.axes, strict=True):
            source[axis] = size
        z, y, x = source
        return z, y, x

    def apply(self, voxels: Tensor) -> Tensor:
        """Turn a (z, y, x) tensor of any type; nothing is copied where nothing turns.

        Examples
        --------
        >>> Orientation(axes=(0, 2, 1), flips=(2,)).apply(torch.tensor([[[1, 2], [3, 4]]])).tolist()
        [[[3, 1], [4, 2]]]
        """
        turned = voxels.permute(self.axes)
        if not self.flips:
            return turned
        if turned.dtype == torch.uint16:  # which torch cannot flip by that name
            return turned.view(torch.int16).flip(self.flips).view(torch.uint16)
        return turned.flip(self.flips)


def draw_orientation(
    rng: np.random.Generator, *, flip: float, quarter_turn: float, isotropic: bool
) -> Orientation:
    """Draw one of 16 orientations that keep z, or of all 48 if voxels are isotropic.

    At chances of one half all are equally likely.
    """
    axes = [0, 1, 2]
    if rng.random() < quarter_turn:
        axes[1], axes[2] = axes[2], axes[1]
    # z changes places with y or x in two of three orderings of the axes, hence the 4 / 3
    if isotropic and rng.random() < quarter_turn * 4 / 3:
        other = int(rng.integers(1, 3))
        axes[0], axes[other] = axes[other], axes[0]
    flips = tuple(axis for axis in range(3) if rng.random() < flip)
    return Orientation((axes[0], axes[1], axes[2]), flips)
