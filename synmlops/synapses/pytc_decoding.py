"""The decoding rule of PyTorch Connectomics' `polarity2instance`, block by block.

Its foreground is where the union lies above the threshold; pre and post are cut to it, each by the same
threshold, so that a voxel may be both. Objects of one side (6-connected) go where they are small. The union,
dilated in plane, is labelled (6-connected), and component n gives its pre voxels the id 2n-1 and its post
voxels 2n, which wins where a voxel is both. Every component has a number, even if no side of it is left.

Source: `connectomics/utils/process.py` of PyTorch Connectomics v1.0, written anew; there ids wrap beyond 127
and beyond 32 767 synapses. Here two passes over blocks find the objects and drop the small ones, and what is
left is decoded as any other foreground.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from synmlops.blockwise.grid import Block
from synmlops.params import CHANNELS, SCALE, PolarityParams
from synmlops.synapses.blocks import (
    Summary,
    Task,
    each_block,
    lay_aside,
    links,
    near_faces,
    places_in_region,
    read_block,
    stored,
)
from synmlops.synapses.crew import Crew, Sources
from synmlops.synapses.foreground import NEITHER, POST, PRE, Foreground, Levels
from synmlops.synapses.joining import joined_members, starts_of
from synmlops.synapses.sparse import Indices, components

_PRE_PLANE, _POST_PLANE, _UNION_PLANE = (CHANNELS.index(name) for name in ("pre", "post", "union"))
_NONE = np.empty((0, 4), np.int64)


@dataclass(frozen=True)
class PolarityRule:
    """What counts as foreground.

    Attributes
    ----------
    above : int
        Greatest uint8 probability that is not foreground.
    min_voxels : int
        An object of one side with fewer voxels is dropped.
    exclusive : bool
        A voxel is the likeliest of background, pre and post instead; of equally likely ones the first.
    """

    above: int
    min_voxels: int
    exclusive: bool

    @classmethod
    def of(cls, threshold: float, params: PolarityParams) -> "PolarityRule":
        """Take the rule from params; of a threshold the whole grey level counts, as in the original.

        Examples
        --------
        >>> PolarityRule.of(0.5, PolarityParams()).above
        127
        """
        return cls(int(float(SCALE) * threshold), params.min_voxels, params.exclusive)


def levels_of(params: PolarityParams) -> Levels:
    """Tell which voxels of the foreground belong together."""
    return Levels(union=1, join_voxels=params.dilate_yx // 2, faces=True)


def label_marked(hands: Crew, task: Task, rule: PolarityRule, counted: Callable[[Any], Any]) -> list[Summary]:
    """Read every block, drop the small objects of either side, and label and lay aside what is left.

    Parameters
    ----------
    hands : Crew
    task : Task
        With the levels of `levels_of`; it keeps all components.
    rule : PolarityRule
    counted : function
        Called with each result of a block; gives it back.
    """
    sizes = [counted(one) for one in hands.map(_mark_block, each_block(task), task, rule)]
    joined_blocks = map(counted, hands.map(_join_objects, each_block(task, least=2), task))
    pairs = [one for one in joined_blocks if len(one)]
    kept = _large(sizes, pairs, min_voxels=rule.min_voxels)
    jobs = zip(task.blocks, kept, strict=True)
    return [counted(one) for one in hands.map(_label_block, jobs, task)]


def _mark_block(sources: Sources, task: Task, rule: PolarityRule, block: Block) -> Indices:
    """Read a block and lay aside its foreground and the objects of either side.

    Returns
    -------
    sizes : (K,) array of int
        Voxels of each object, those of pre first.
    """
    flat, union, is_side = _marks(read_block(block, sources.probabilities), rule)
    number = np.full((2, len(flat)), -1)
    n = 0
    for side, marked in enumerate(is_side):
        number[side, marked] = n + components(flat[marked], block.write.shape_zyx, faces=True)
        n = max(n, int(number[side].max(initial=-1)) + 1)
    task.spool.put("marks", block.index, (stored(flat, block), union, number.astype(np.int32)))
    near = near_faces(flat, task, block)
    if near.any():
        laid_aside = places_in_region(flat[near], task, block), number[:, near]
        task.spool.put("objects", block.index, laid_aside)
    return np.bincount(number[number >= 0], minlength=n)


def _join_objects(_: Sources, task: Task, block: Block) -> Indices:
    """Find the objects that go on from a block into the blocks before it: pairs of (block, number)."""
    shares = []
    for other in task.blocks.meeting(block.read((1, 1, 1), within=task.blocks.region)):
        laid_aside = task.spool.get("objects", other.index) if other.index <= block.index else None
        if laid_aside is not None:
            shares.append((laid_aside[0], np.full(len(laid_aside[0]), other.index), *laid_aside[1]))
    if len(shares) < 2:
        return _NONE
    place, owner, *numbers = (np.concatenate(columns) for columns in zip(*shares, strict=True))
    order = np.argsort(place)
    pairs = []
    for number in numbers:
        marked = order[number[order] >= 0]
        whole = components(place[marked], task.blocks.region.shape_zyx, faces=True)
        pairs.append(links(whole, owner[marked], number[marked]))
    return np.concatenate(pairs)


def _large(sizes: Sequence[Indices], pairs: Sequence[Indices], *, min_voxels: int) -> list[NDArray[np.bool_]]:
    """Tell of the objects of each block whether they are large enough, all their blocks together."""
    before = starts_of([len(one) for one in sizes])
    whole = joined_members(before, np.concatenate([_NONE, *pairs]))
    total = np.zeros(int(whole.max(initial=-1)) + 1, np.int64)
    np.add.at(total, whole, np.concatenate([np.empty(0, np.int64), *sizes]))
    return np.split((total >= min_voxels)[whole], before[1:-1])


def _label_block(_: Sources, task: Task, block: Block, kept: NDArray[np.bool_]) -> Summary:
    """Lay the foreground of a block aside once it is known which of its objects stay."""
    laid_aside = task.spool.get("marks", block.index)
    assert laid_aside is not None  # every block was marked
    flat, union, number = laid_aside
    task.spool.drop("marks", block.index)
    stays = np.append(kept, False)[number]  # of number -1 the last
    levels = task.levels
    found = Foreground(
        flat=flat.astype(np.int64),
        component=components(flat, block.write.shape_zyx, reach=levels.reach, faces=levels.faces),
        side=np.where(stays[1], POST, np.where(stays[0], PRE, NEITHER)).astype(np.uint8),
        union=union,
    )
    return lay_aside(task, block, found)


def _marks(
    planes: NDArray[np.uint8], rule: PolarityRule
) -> tuple[Indices, NDArray[np.uint8], tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Give the places of the foreground, its union probability, and which voxels are pre and which post."""
    if not rule.exclusive:
        flat = np.flatnonzero(planes[_UNION_PLANE] > rule.above)
        pre, post, union = _at(planes, flat)
        return flat, union, (pre > rule.above, post > rule.above)
    likelier = np.maximum(planes[_PRE_PLANE], planes[_POST_PLANE])
    flat = np.flatnonzero(likelier > SCALE - planes[_UNION_PLANE])
    pre, post, union = _at(planes, flat)
    return flat, union, (pre >= post, post > pre)


def _at(planes: NDArray[np.uint8], flat: Indices) -> NDArray[np.uint8]:
    """Give the probabilities of pre, post and union at some places."""
    wanted: NDArray[np.uint8] = planes.reshape(len(CHANNELS), -1).take(flat, axis=1)
    return wanted


# -- another size ------------------------------------------------------------------------------------------


class Target(Protocol):
    """What takes ids by region, such as an array or an HDF5 dataset of zeros."""

    def __setitem__(self, region: tuple[slice, slice, slice], ids: NDArray[Any], /) -> None:
        """Put the ids of a region."""


class Scaled:
    """Takes ids and hands them on at another size: each voxel is the nearest of those given.

    Parameters
    ----------
    target : Target
        Of `scaled_shape`.
    shape_zyx : tuple of int
        Of what is given.
    scale_zyx : tuple of float

    Examples
    --------
    >>> small = np.zeros((1, 1, 2), np.uint16)
    >>> Scaled(small, (1, 1, 4), (1, 1, 0.5))[0:1, 0:1, 1:4] = np.array([[[3, 4, 5]]])
    >>> small.tolist()
    [[[3, 5]]]
    """

    def __init__(
        self, target: Target, shape_zyx: tuple[int, int, int], scale_zyx: tuple[float, float, float]
    ) -> None:
        self._target = target
        sizes = zip(shape_zyx, scaled_shape(shape_zyx, scale_zyx), strict=True)
        self._nearest = [_nearest(n, scaled) for n, scaled in sizes]

    def __setitem__(self, region: tuple[slice, slice, slice], ids: NDArray[Any], /) -> None:
        """Put the ids of a region of what is given."""
        into, picked = [], []
        for span, nearest in zip(region, self._nearest, strict=True):
            low, high = np.searchsorted(nearest, (span.start, span.stop))
            into.append(slice(int(low), int(high)))
            picked.append(nearest[low:high] - span.start)
        z, y, x = into
        if all(len(one) for one in picked):
            self._target[z, y, x] = ids[np.ix_(*picked)]


def scaled_shape(
    shape_zyx: tuple[int, int, int], scale_zyx: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Give the size at another scale, cut to whole voxels.

    Examples
    --------
    >>> scaled_shape((12, 64, 65), (1, 2, 0.5))
    (12, 128, 32)
    """
    z, y, x = (int(n * scale) for n, scale in zip(shape_zyx, scale_zyx, strict=True))
    return z, y, x


def _nearest(n: int, scaled: int) -> Indices:
    """Give which of `n` voxels the middle of each of `scaled` ones lies in."""
    middle = (np.arange(scaled) + 0.5) * (n / max(scaled, 1))
    nearest: Indices = np.floor(middle).astype(np.int64).clip(0, n - 1)
    return nearest
