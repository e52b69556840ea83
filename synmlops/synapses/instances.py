"""Probabilities to synapse instances.

The foreground is where the union channel reaches the threshold; its 26-connected components are the
synaptic sites, and each voxel of a site goes to its likelier side. `synmlops.synapses.decoding` does the same
to volumes larger than memory, block by block.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from synmlops.params import CHANNELS, SCALE
from synmlops.synapses.foreground import NEITHER, PRE, Levels, find_foreground, first_corners
from synmlops.synapses.sparse import Indices, components, places

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
    levels = Levels(level_of(threshold), level_of(side_threshold * threshold), join_voxels)
    flat, component, side = _large(probabilities_czyx, levels, min_voxels=min_voxels)
    sided = side > NEITHER
    site, n_sites = _dense(component[sided])
    ids = 2 * site - (side[sided] == PRE)
    return _scatter(flat[sided], ids, shape=probabilities_czyx.shape[1:], largest=2 * n_sites)


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
    levels = Levels(level_of(threshold), join_voxels=join_voxels)
    flat, component, _ = _large(probability_zyx[None], levels, min_voxels=min_voxels)
    ids, n_instances = _dense(component)
    return _scatter(flat, ids, shape=probability_zyx.shape, largest=n_instances)


def components_of(volume_zyx: NDArray[np.bool_] | Instances) -> Instances:
    """Label 26-connected components of equal, non-zero values.

    Parameters
    ----------
    volume_zyx : (Z, Y, X) array of bool or unsigned int

    Returns
    -------
    components : (Z, Y, X) array of uint16, uint32 or uint64
        From 1 without gaps, in scan order (x fastest) of their first voxels; 0 where the volume is 0.

    Examples
    --------
    >>> components_of(np.array([[[1, 0, 1, 2, 2]]], np.uint16)).tolist()
    [[[1, 0, 2, 3, 3]]]
    """
    flat = np.flatnonzero(volume_zyx)
    depth, height, width = volume_zyx.shape
    value = volume_zyx[places(flat, volume_zyx.shape)].astype(np.uint64)
    component = 1 + components(flat, (depth, height, width), value=value)
    largest = int(component.max(initial=0))
    return _scatter(flat, component, shape=volume_zyx.shape, largest=largest)


def _large(
    probabilities_czyx: Probabilities, levels: Levels, *, min_voxels: int
) -> tuple[Indices, Indices, NDArray[np.uint8]]:
    """Give flat index, component in scan order and side of each voxel whose component is large enough."""
    if probabilities_czyx.ndim != 4 or probabilities_czyx.dtype != np.uint8:
        raise ValueError(
            f"probabilities must be uint8 along z, y, x; got {probabilities_czyx.dtype} "
            f"of shape {probabilities_czyx.shape[1:]}"
        )
    found = find_foreground(probabilities_czyx, levels)
    component = found.component
    if not len(component):
        return found.flat, component, found.side
    if levels.join_voxels:  # numbered as the grown foreground would be
        _, height, width = probabilities_czyx.shape[1:]
        first = first_corners(found.flat, component, (height, width), levels.join_voxels)
        component = np.argsort(np.argsort(first))[component]
    large = (np.bincount(component) >= min_voxels)[component]
    return found.flat[large], component[large], found.side[large]


def _dense(component: Indices) -> tuple[Indices, int]:
    """Renumber to 1, 2, ... without gaps, in the same order; and how many there are."""
    if not component.size:
        return component, 0
    present = np.bincount(component) > 0
    rank = np.cumsum(present, dtype=np.int64)
    dense: Indices = rank[component]
    return dense, int(rank[-1])


def _scatter(flat: Indices, ids: Indices, *, shape: tuple[int, ...], largest: int) -> Instances:
    """Put ids where `flat` says, in the narrowest type that holds them."""
    instances: Instances = np.zeros(shape, id_type(largest))
    instances.reshape(-1)[flat] = ids
    return instances
