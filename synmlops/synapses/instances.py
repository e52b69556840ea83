"""Probabilities to synapse instances.

The foreground is where the union channel reaches the threshold; its 26-connected components are the
synaptic sites, and each voxel of a site goes to its likelier side. Everything after the labelling works on
the foreground voxels alone, since synapses fill about a hundredth of a volume.
"""

import math

import cc3d
import numpy as np
from numpy.typing import ArrayLike, NDArray

from synmlops.params import CHANNELS, SCALE

Mask = NDArray[np.bool_]
Instances = NDArray[np.unsignedinteger]
Probabilities = NDArray[np.uint8]


def level_of(threshold: float) -> int:
    """Give the least uint8 value that counts as `threshold` or more.

    Parameters
    ----------
    threshold : float
        Probability, 0 to 1. The level is never below 1: what has probability 0 is never foreground.

    Raises
    ------
    ValueError
        If the threshold is not within 0 to 1.

    Examples
    --------
    >>> level_of(0.5), level_of(0), level_of(1), level_of(77 / 255)
    (128, 1, 255, 77)
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie within 0 to 1, got {threshold}")
    return max(1, math.ceil(threshold * SCALE - 1e-6))  # 0.2 + 0.4 is a hair above 153 / 255


def id_type(largest: int) -> np.dtype[np.unsignedinteger]:
    """Give the narrowest of uint16, uint32 and uint64 that holds the id `largest`.

    The last id of n synapses in the pairs convention is 2n: 32 768 of them no longer fit 16 bits.

    Raises
    ------
    ValueError
        If `largest` is negative or beyond 64 bits.

    Examples
    --------
    >>> [str(id_type(2 * n)) for n in (128, 32767, 32768, 2**31)]
    ['uint16', 'uint16', 'uint32', 'uint64']
    """
    for kind in (np.uint16, np.uint32, np.uint64):
        if 0 <= largest <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise ValueError(f"an id lies within 0 to 2**64 - 1, got {largest}")


def sites_of(instances: ArrayLike) -> Instances:
    """Give the site n of each instance id: both 2n-1 (pre) and 2n (post) are n, and 0 stays 0.

    Parameters
    ----------
    instances : array of unsigned int, any shape
        Ids in the pairs convention. The type stays; the largest id of it does not wrap.

    Raises
    ------
    ValueError
        If the ids are not unsigned.

    Examples
    --------
    >>> sites_of(np.array([0, 1, 2, 3, 4, 65535], np.uint16))
    array([    0,     1,     1,     2,     2, 32768], dtype=uint16)
    """
    ids = np.asarray(instances)
    if ids.dtype.kind != "u":
        raise ValueError(f"instances must be unsigned, got {ids.dtype}")
    sites: Instances = (ids >> 1) + (ids & 1)  # (ids + 1) // 2 wraps at the largest id of the type
    return sites


def decode_pairs(
    probabilities_czyx: Probabilities,
    *,
    threshold: float,
    side_threshold: float,
    min_voxels: int,
    join_voxels: int = 0,
) -> Instances:
    """Decode pre and post sides of synaptic sites.

    Parameters
    ----------
    probabilities_czyx : (3, Z, Y, X) array of uint8
        Pre, post, union; 255 is probability 1.
    threshold : float
        Least union probability of the foreground, inclusive.
    side_threshold : float
        Share of `threshold` that the likelier side must reach, inclusive; a foreground voxel below it
        belongs to neither side.
    min_voxels : int
        A component with fewer foreground voxels is dropped.
    join_voxels : int, default 0
        Parts of the foreground up to twice this far apart along y and x are one site (a box dilation in
        plane before labelling; the sides themselves do not grow).

    Returns
    -------
    instances : (Z, Y, X) array of uint16, uint32 or uint64
        Site n has pre id 2n-1 and post id 2n; n runs from 1 without gaps, in scan order of the sites. A site
        that shows one side only keeps that side; one that shows neither is dropped. Equal probabilities go
        to post. All zeros if nothing reaches the threshold. The type is the narrowest that holds the ids.

    Raises
    ------
    ValueError
        If the probabilities are not uint8 of this shape or a threshold is not within 0 to 1.

    Examples
    --------
    >>> p = np.zeros((3, 1, 1, 8), np.uint8)
    >>> p[0, 0, 0, 1:3], p[1, 0, 0, 3:5], p[2, 0, 0, 1:5] = 200, 220, 250
    >>> p[1:, 0, 0, 6:] = 250
    >>> decode_pairs(p, threshold=0.5, side_threshold=0.5, min_voxels=2)
    array([[[0, 1, 1, 2, 2, 0, 4, 4]]], dtype=uint16)
    """
    if probabilities_czyx.ndim != 4 or len(probabilities_czyx) != len(CHANNELS):
        raise ValueError(
            f"probabilities must be (3, z, y, x) of {', '.join(CHANNELS)}, got {probabilities_czyx.shape}"
        )
    pre_zyx, post_zyx, union_zyx = probabilities_czyx
    side_level = level_of(side_threshold * threshold)
    flat, component = _foreground(
        union_zyx, threshold=threshold, min_voxels=min_voxels, join_voxels=join_voxels
    )
    pre, post = pre_zyx.reshape(-1)[flat], post_zyx.reshape(-1)[flat]
    sided = np.maximum(pre, post) >= side_level
    flat, component = flat[sided], component[sided]
    site, n_sites = _dense(component)
    is_pre = (pre > post)[sided]
    ids = 2 * site - is_pre
    return _scatter(flat, ids, shape=union_zyx.shape, largest=2 * n_sites)


def decode_union(
    probability_zyx: Probabilities, *, threshold: float, min_voxels: int, join_voxels: int = 0
) -> Instances:
    """Decode whole synapses, where the sides are not known.

    Parameters
    ----------
    probability_zyx : (Z, Y, X) array of uint8
        Union channel; 255 is probability 1.
    threshold, min_voxels, join_voxels
        As in `decode_pairs`.

    Returns
    -------
    instances : (Z, Y, X) array of uint16, uint32 or uint64
        Ids from 1 without gaps, in scan order; not the pairs convention.

    Raises
    ------
    ValueError
        If the probability is not three-dimensional uint8 or the threshold is not within 0 to 1.

    Examples
    --------
    >>> p = np.array([[[9, 200, 210, 0, 220, 0, 230, 240]]], np.uint8)
    >>> decode_union(p, threshold=0.5, min_voxels=2)
    array([[[0, 1, 1, 0, 0, 0, 2, 2]]], dtype=uint16)
    """
    flat, component = _foreground(
        probability_zyx, threshold=threshold, min_voxels=min_voxels, join_voxels=join_voxels
    )
    ids, n_instances = _dense(component)
    return _scatter(flat, ids, shape=probability_zyx.shape, largest=n_instances)


def components_of(volume_zyx: NDArray[np.bool_] | Instances) -> Instances:
    """Label 26-connected components of equal, non-zero values.

    Parameters
    ----------
    volume_zyx : (Z, Y, X) array of bool or unsigned int

    Returns
    -------
    components : (Z, Y, X) array of unsigned int
        From 1 without gaps, in scan order (x fastest) of their first voxels; 0 where the volume is 0.

    Examples
    --------
    >>> components_of(np.array([[[1, 0, 1, 2, 2]]], np.uint16)).tolist()
    [[[1, 0, 2, 3, 3]]]
    """
    z, y, x = volume_zyx.shape
    # numbering follows the memory layout; cc3d 4.1 fails on a line of single voxels that fill both its ends
    volume = np.ascontiguousarray(volume_zyx)
    if sorted(volume.shape)[1] == 1:
        volume = np.pad(volume, ((0, 1),) * 3)
    labelled: Instances = cc3d.connected_components(volume, connectivity=26)
    return labelled[:z, :y, :x]


def _foreground(
    union_zyx: Probabilities, *, threshold: float, min_voxels: int, join_voxels: int
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Give flat index and component of each foreground voxel whose component is large enough."""
    if union_zyx.ndim != 3 or union_zyx.dtype != np.uint8:
        raise ValueError(
            f"probabilities must be uint8 along z, y, x; got {union_zyx.dtype} of shape {union_zyx.shape}"
        )
    foreground: Mask = np.greater_equal(union_zyx, level_of(threshold))
    flat = np.flatnonzero(foreground)
    if not flat.size:
        return flat, np.empty(0, np.int64)
    if join_voxels:
        foreground = _dilate_in_plane(foreground, join_voxels)
    component = components_of(foreground).reshape(-1)[flat].astype(np.int64)
    del foreground
    large = (np.bincount(component) >= min_voxels)[component]
    return flat[large], component[large]


def _dilate_in_plane(mask: Mask, reach: int) -> Mask:
    """Grow the mask by `reach` voxels along y and x: a box, twice `reach` plus one wide."""
    grown = mask
    for axis in (1, 2):
        before = np.moveaxis(grown, axis, 0)
        grown = grown.copy()
        after = np.moveaxis(grown, axis, 0)
        for shift in range(1, min(reach, len(before) - 1) + 1):
            after[shift:] |= before[:-shift]
            after[:-shift] |= before[shift:]
    return grown


def _dense(component: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Renumber to 1, 2, ... without gaps, in the same order; and how many there are."""
    if not component.size:
        return component, 0
    present = np.bincount(component) > 0
    rank: NDArray[np.int64] = np.cumsum(present, dtype=np.int64)
    dense: NDArray[np.int64] = rank[component]
    return dense, int(rank[-1])


def _scatter(
    flat: NDArray[np.intp], ids: NDArray[np.int64], *, shape: tuple[int, ...], largest: int
) -> Instances:
    """Put ids where `flat` says, in the narrowest type that holds them."""
    instances: Instances = np.zeros(shape, id_type(largest))
    instances.reshape(-1)[flat] = ids
    return instances
