"""Decoding one block: functions of a task and a block, for this process or any other.

A block is read once. Its foreground is laid aside as a list of voxels, and what follows works on these
lists: the voxels near its faces are joined to those of its neighbours, ids are written, and the pieces of the
partner table are summed up.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from synmlops.blockwise.grid import Block, BlockGrid
from synmlops.params import SynmlopsError
from synmlops.synapses.foreground import (
    NEITHER,
    POST,
    PRE,
    Foreground,
    Levels,
    find_foreground,
    first_corners,
)
from synmlops.synapses.pieces import Pieces, group, located, nearest
from synmlops.synapses.sparse import Indices, components, first_places, places
from synmlops.synapses.spool import Spool

Places = tuple[Indices, Indices, Indices]


class Source(Protocol):
    """What can be read by region: an open volume, or an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size along each axis."""
        ...

    def __getitem__(self, region: Any, /) -> Any:
        """Give the voxels of a region, a slice for each axis."""
        ...


@dataclass(frozen=True)
class Task:
    """What every block needs to know; it can be pickled.

    Attributes
    ----------
    blocks : BlockGrid
    levels : Levels
    min_voxels : int
        A component with fewer foreground voxels is dropped.
    has_sides : bool
        Whether the probabilities are of pre, post and union, rather than of union alone.
    by_neuron : bool
        Whether post pieces are told apart by neuron rather than by component.
    voxel_nm : tuple of float
    spool : Spool
        Where voxels are laid aside: in memory if one process does all blocks.
    keeps_all : bool
        Whether every component has a number, large or small, with a side or without.
    semantic : bool
        Whether 1 for pre and 2 for post is written instead of ids, and no table is made.
    """

    blocks: BlockGrid
    levels: Levels
    min_voxels: int
    has_sides: bool
    by_neuron: bool
    voxel_nm: tuple[float, float, float]
    spool: Spool
    keeps_all: bool = False
    semantic: bool = False


@dataclass(frozen=True, eq=False)
class Summary:
    """Components of a block that may be sites, and their parts: 26-connected voxels of one side."""

    size: Indices  # (K,) foreground voxels
    sided: NDArray[np.bool_]  # (K,) whether one of them has a side
    first: Indices  # (K,) place in the region at which the component begins; it decides the numbering
    part_component: Indices  # (M,)
    part_side: NDArray[np.uint8]  # (M,)
    part_size: Indices  # (M,)
    part_first: Indices  # (M,) place in the region of its first voxel

    def slight(self) -> "Summary":
        """Give this, or where there is no component the one that stands for all such blocks."""
        return self if len(self.size) else _NOTHING


def _nothing() -> Summary:
    none = np.empty(0, np.int64)
    return Summary(none, none.astype(bool), none, none, none.astype(np.uint8), none, none)


_NOTHING = _nothing()  # of most blocks of a sparse volume, which then take no memory each


@dataclass(frozen=True, eq=False)
class Links:
    """Pairs of (block, number in the block) that are one."""

    components: Indices  # (E, 4) block, component, block, component
    parts: Indices  # (F, 4) block, part, block, part

    @property
    def any(self) -> bool:
        """Whether anything goes on."""
        return len(self.components) > 0 or len(self.parts) > 0


def each_block(task: Task, *, least: int = 1) -> Iterator[tuple[Block]]:
    """Give the blocks one by one, for `Crew.map`; none where there are fewer than `least`."""
    return ((block,) for block in task.blocks) if len(task.blocks) >= least else iter(())


def read_block(block: Block, probabilities: Source) -> NDArray[np.uint8]:
    """Read the probabilities of a block.

    Raises
    ------
    SynmlopsError
        If they end within the block.
    """
    planes = np.asarray(probabilities[(slice(None), *block.write.slices)])
    if planes.shape[1:] != block.write.shape_zyx:
        raise SynmlopsError(
            f"the probabilities of {block.write} have the shape {planes.shape}: they end early; "
            "copy or make them again"
        )
    return planes


def label_block(task: Task, block: Block, probabilities: Source) -> Summary:
    """Read a block, label its foreground and lay its voxels aside.

    Components too small to be a site, or without a side, are left out unless they may go on in a neighbour.

    Raises
    ------
    SynmlopsError
        If the probabilities end within the block, or there is no room to lay voxels aside.
    """
    return lay_aside(task, block, find_foreground(read_block(block, probabilities), task.levels))


def lay_aside(task: Task, block: Block, found: Foreground) -> Summary:
    """Lay the foreground of a block aside for the passes that follow, and sum it up."""
    found, near = _possible_sites(found, near_faces(found.flat, task, block), task)
    part = _parts(found, block)
    if len(found.flat):
        task.spool.put(
            "voxels",
            block.index,
            (
                stored(found.flat, block),
                found.component.astype(np.int32),
                found.side,
                found.union,
                part.astype(np.int32),
            ),
        )
    place = places_in_region(found.flat, task, block)
    if near.any():
        faces = place[near], found.component[near], found.side[near], part[near]
        task.spool.put("faces", block.index, faces)
    return _summarise(found, place, part, task)


def join_block(task: Task, block: Block) -> Links:
    """Find what goes on from a block into the blocks before it."""
    reach = task.levels.reach
    near = block.read((1, reach, reach), within=task.blocks.region)
    shares = []
    for other in task.blocks.meeting(near):
        faces = task.spool.get("faces", other.index) if other.index <= block.index else None
        if faces is not None:
            owner = np.full(len(faces[0]), other.index)
            shares.append((faces[0], owner, *faces[1:]))
    if len(shares) < 2:
        return Links(np.empty((0, 4), np.int64), np.empty((0, 4), np.int64))
    place, owner, component, side, part = (np.concatenate(columns) for columns in zip(*shares, strict=True))
    order = np.argsort(place)
    place, owner, component, side, part = (a[order] for a in (place, owner, component, side, part))
    shape = task.blocks.region.shape_zyx
    sided = np.flatnonzero(side != NEITHER)
    return Links(
        components=links(components(place, shape, reach=reach, faces=task.levels.faces), owner, component),
        parts=links(components(place[sided], shape, value=side[sided]), owner[sided], part[sided]),
    )


@dataclass(frozen=True, eq=False)
class Apart:
    """The new numbers of sites that were taken apart."""

    shelves: tuple[str, ...]  # on which it is laid aside which voxel is of which
    sites: Indices  # (S,) ascending, as they were numbered before
    begins: Indices  # (S,) where the numbers of each begin in `numbers`
    numbers: Indices


@dataclass(frozen=True, eq=False)
class Given:
    """What a block is told once all are joined."""

    site: Indices  # (K,) number of the site of each of its components, 0 for none
    spans: NDArray[np.bool_]  # (K,) whether the site has voxels in another component
    part: NDArray[np.uint64]  # (M,) name of each of its parts: where the whole part begins in the region
    apart: Apart | None = None  # of sites that were taken apart

    @property
    def any(self) -> bool:
        """Whether the block has voxels of a site."""
        return bool(self.site.any()) or self.apart is not None


@dataclass(frozen=True, eq=False)
class Decoded:
    """Ids of a block's voxels, and its share of the partner table."""

    flat: Indices  # (N,) place in the flattened block
    ids: Indices  # (N,)
    whole: Pieces | None  # of sites that lie in this block alone, with their points; None without sides
    shares: Pieces | None  # of the others

    def without_voxels(self) -> "Decoded":
        """Give the pieces alone."""
        return replace(self, flat=self.flat[:0], ids=self.ids[:0])


def decode_block(task: Task, block: Block, given: Given, neurons: Source | None) -> Decoded:
    """Give the ids of a block's voxels and sum up its pieces.

    The voxels of sites that span blocks are laid aside for `nearest_in_block`.
    """
    voxels = _sited(task, block, given)
    if not task.has_sides:
        return Decoded(voxels.flat, voxels.site, None, None)
    if task.semantic:
        return Decoded(voxels.flat, voxels.side.astype(np.int64), None, None)
    ids = 2 * voxels.site - (voxels.side == PRE)
    if not len(ids):
        return Decoded(voxels.flat, ids, None, None)
    index = _within(block, voxels.flat, origin=block.write.start_zyx)
    name = voxels.part if neurons is None else neurons_at(neurons, index)
    site = voxels.site.astype(np.uint64)
    number, example = group(site, voxels.side, name)
    keys = site[example], voxels.side[example], name[example]
    pieces = located(index, voxels.union, number, keys=keys, voxel_nm=task.voxel_nm)
    spans = given.spans[voxels.component[example]]
    if spans.any():
        some = spans[number]
        laid_aside = voxels.flat[some], (np.cumsum(spans) - 1)[number[some]]
        task.spool.put("spanning", block.index, laid_aside)
    return Decoded(voxels.flat, ids, pieces.where(~spans), pieces.where(spans))


@dataclass(frozen=True, eq=False)
class _Sited:
    """The voxels of a block that are part of a site, those without a side left out where sides are known."""

    flat: Indices
    component: Indices
    side: NDArray[np.uint8]
    union: NDArray[np.uint8]
    site: Indices
    part: NDArray[np.uint64]  # name of the post part; 0 beside the post side


def _sited(task: Task, block: Block, given: Given) -> _Sited:
    laid_aside = task.spool.get("voxels", block.index)
    assert laid_aside is not None  # a block without foreground is not asked
    flat, component, side, union, number = laid_aside
    site, part = given.site[component], np.zeros(len(flat), np.uint64)
    post = side == POST
    part[post] = given.part[number[post]]
    if given.apart is not None:
        _take_apart(task, block, given.apart, site=site, name=part)
    kept = (site > 0) & (side != NEITHER) if task.has_sides else site > 0
    return _Sited(
        flat[kept].astype(np.int64), component[kept], side[kept], union[kept], site[kept], part[kept]
    )


def _take_apart(task: Task, block: Block, apart: Apart, *, site: Indices, name: NDArray[np.uint64]) -> None:
    """Give the voxels of sites that were taken apart their new sites and the names of their parts."""
    for shelf in apart.shelves:
        laid_aside = task.spool.get(shelf, block.index)
        assert laid_aside is not None  # it is named since it was laid aside
        position, before, label, part = laid_aside
        site[position] = apart.numbers[apart.begins[np.searchsorted(apart.sites, before)] + label]
        name[position] = part


def nearest_in_block(
    task: Task, block: Block, centroid: NDArray[np.float64]
) -> tuple[NDArray[np.float64], Indices]:
    """Find the voxels of a block's spanning pieces that are nearest to the centroids of the whole pieces.

    Returns
    -------
    distance : (K,) array of float
        Squared, in nm.
    point : (K, 3) array of int
    """
    laid_aside = task.spool.get("spanning", block.index)
    assert laid_aside is not None  # the block is asked since it has such pieces
    flat, number = laid_aside
    index = _within(block, flat, origin=block.write.start_zyx)
    distance, chosen = nearest(index, number, centroid, task.voxel_nm)
    return distance, np.stack([at[chosen] for at in index], axis=1)


def neurons_at(neurons: Source, index: Places) -> NDArray[np.uint64]:
    """Give the neuron of each voxel; only the box around them is read."""
    low = [int(at.min()) for at in index]
    box = tuple(slice(start, int(at.max()) + 1) for start, at in zip(low, index, strict=True))
    within = tuple(at - start for start, at in zip(low, index, strict=True))
    ids: NDArray[np.uint64] = np.asarray(neurons[box])[within].astype(np.uint64)
    return ids


def _within(block: Block, flat: Indices, *, origin: tuple[int, int, int] = (0, 0, 0)) -> Places:
    """Give z, y and x of places in a flattened block, counted from `origin`, which is the block's start."""
    z, y, x = places(flat, block.write.shape_zyx)
    return z + origin[0], y + origin[1], x + origin[2]


def places_in_region(flat: Indices, task: Task, block: Block) -> Indices:
    """Give places in the flattened region for those in the flattened block."""
    region = task.blocks.region
    if block.write == region:
        return flat
    z, y, x = _within(block, flat, origin=block.write.moved(-at for at in region.start_zyx).start_zyx)
    _, height, width = region.shape_zyx
    return (z * height + y) * width + x


def stored(flat: Indices, block: Block) -> NDArray[np.integer]:
    """Give places in a block in a type that is half as long wherever they fit it."""
    return flat.astype(np.uint32 if math.prod(block.write.shape_zyx) < 2**32 else np.int64)


def near_faces(flat: Indices, task: Task, block: Block) -> NDArray[np.bool_]:
    """Tell which voxels may touch one of another block."""
    near = np.zeros(len(flat), bool)
    index = _within(block, flat)
    reach = task.levels.reach
    for axis, margin in enumerate((1, reach, reach)):
        at, size = index[axis], block.write.shape_zyx[axis]
        if block.write.start_zyx[axis] > task.blocks.region.start_zyx[axis]:
            near |= at < margin
        if block.write.stop_zyx[axis] < task.blocks.region.stop_zyx[axis]:
            near |= at >= size - margin
    return near


def _possible_sites(
    found: Foreground, near: NDArray[np.bool_], task: Task
) -> tuple[Foreground, NDArray[np.bool_]]:
    """Leave out the components that lie in this block alone and are no sites."""
    if task.keeps_all:
        return found, near
    n = int(found.component.max(initial=-1)) + 1
    possible = np.bincount(found.component, minlength=n) >= task.min_voxels
    if task.has_sides:
        possible &= np.bincount(found.component[found.side != NEITHER], minlength=n) > 0
    possible[found.component[near]] = True
    kept = possible[found.component]
    number = np.cumsum(possible) - 1
    foreground = Foreground(
        found.flat[kept], number[found.component[kept]], found.side[kept], found.union[kept]
    )
    return foreground, near[kept]


def _parts(found: Foreground, block: Block) -> Indices:
    """Number the 26-connected components of each side; -1 where a voxel has none."""
    part = np.full(len(found.flat), -1)
    sided = found.side != NEITHER
    part[sided] = components(found.flat[sided], block.write.shape_zyx, value=found.side[sided])
    return part


def _summarise(found: Foreground, place: Indices, part: Indices, task: Task) -> Summary:
    n = int(found.component.max(initial=-1)) + 1
    sided = np.flatnonzero(part >= 0)
    first_of_part = first_places(sided, part[sided])
    _, height, width = task.blocks.region.shape_zyx
    has_side = np.full(n, not task.has_sides)
    has_side[found.component[sided]] = True
    return Summary(
        size=np.bincount(found.component, minlength=n),
        sided=has_side,
        first=first_corners(place, found.component, (height, width), task.levels.join_voxels),
        part_component=found.component[first_of_part],
        part_side=found.side[first_of_part],
        part_size=np.bincount(part[sided], minlength=len(first_of_part)),
        part_first=place[first_of_part],
    )


def links(label: Indices, owner: Indices, number: Indices) -> Indices:
    """Pair the members of each label with its first one; each pair once."""
    if not len(label):
        return np.empty((0, 4), np.int64)
    first = first_places(np.arange(len(label)), label)[label]
    different = (owner != owner[first]) | (number != number[first])
    # most voxels repeat the pair of the one before; what is left is cheap to sort
    pairs = np.stack([owner, number, owner[first], number[first]], axis=1)[different]
    repeated = np.zeros(len(pairs), bool)
    repeated[1:] = (pairs[1:] == pairs[:-1]).all(axis=1)
    return np.unique(pairs[~repeated], axis=0)
