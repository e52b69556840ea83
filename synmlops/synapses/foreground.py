"""The voxels that count as synapse, as a list: where they are, their component, their side.

Everything after this list works on the foreground alone, since synapses fill about a hundredth of a volume.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synmlops.params import CHANNELS
from synmlops.synapses.sparse import Indices, components, first_places, places

NEITHER, PRE, POST = 0, 1, 2
"""Sides of a foreground voxel."""


@dataclass(frozen=True)
class Levels:
    """What counts as foreground, and what of it belongs together.

    Attributes
    ----------
    union : int
        Least uint8 probability of the foreground, from 1.
    side : int
        Least uint8 probability of the likelier side.
    join_voxels : int
        Parts of the foreground up to twice this far apart along y and x are one component: as if each voxel
        grew by this much in plane before the labelling.
    faces : bool
        Grown voxels touch by faces alone, rather than by edges and corners too.
    """

    union: int
    side: int = 1
    join_voxels: int = 0
    faces: bool = False

    @property
    def reach(self) -> int:
        """How far apart along y and x two foreground voxels may lie that touch."""
        return 2 * self.join_voxels + 1


@dataclass(frozen=True, eq=False)
class Foreground:
    """Foreground voxels of a box, in scan order."""

    flat: Indices  # (N,) place in the flattened box
    component: Indices  # (N,) from 0
    side: NDArray[np.uint8]  # (N,) NEITHER, PRE or POST
    union: NDArray[np.uint8]  # (N,) probability


def find_foreground(probabilities_czyx: NDArray[np.uint8], levels: Levels) -> Foreground:
    """List the foreground of a box.

    Parameters
    ----------
    probabilities_czyx : (3 or 1, Z, Y, X) array of uint8
        Pre, post, union, or union alone: then no voxel has a side.
    levels : Levels

    Returns
    -------
    foreground : Foreground
        Components are numbered in scan order of their first voxels. A voxel belongs to its likelier side, a
        tie to post, and to neither where both are below the side's level.

    Examples
    --------
    >>> p = np.array([[9, 0, 0, 1], [0, 0, 5, 9], [8, 8, 0, 8]], np.uint8).reshape(3, 1, 1, 4)
    >>> found = find_foreground(p, Levels(union=8, side=2))
    >>> found.flat.tolist(), found.component.tolist(), found.side.tolist()
    ([0, 1, 3], [0, 0, 1], [1, 0, 2])
    """
    union_zyx = probabilities_czyx[-1]
    depth, height, width = union_zyx.shape
    flat = np.flatnonzero(np.greater_equal(union_zyx, levels.union))
    place = places(flat, union_zyx.shape)
    side = np.zeros(len(flat), np.uint8)
    if len(probabilities_czyx) == len(CHANNELS):
        pre, post = probabilities_czyx[0][place], probabilities_czyx[1][place]
        side = np.where(pre > post, PRE, POST).astype(np.uint8)
        side[np.maximum(pre, post) < levels.side] = NEITHER
    return Foreground(
        flat=flat,
        component=components(flat, (depth, height, width), reach=levels.reach, faces=levels.faces),
        side=side,
        union=union_zyx[place],
    )


def first_corners(flat: Indices, component: Indices, size_yx: tuple[int, int], join_voxels: int) -> Indices:
    """Give where in scan order each component begins once its voxels have grown in plane.

    Parameters
    ----------
    flat : (N,) array of int
        Ascending places of the voxels in a flattened volume.
    component : (N,) array of int
        From 0 without gaps.
    size_yx : tuple of int
        Of the volume, at whose borders growth ends.
    join_voxels : int
        How far each voxel grows along y and x.

    Examples
    --------
    >>> first_corners(np.array([1, 5, 11]), np.array([0, 1, 0]), (3, 4), 1).tolist()
    [0, 0]
    """
    if join_voxels == 0:
        return first_places(flat, component)
    height, width = size_yx
    z, y, x = places(flat, (0, height, width))
    corner = (z * height + np.maximum(y - join_voxels, 0)) * width + np.maximum(x - join_voxels, 0)
    first = np.full(int(component.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, component, corner)
    return first
