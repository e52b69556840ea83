"""Touching synapses across blocks: which sites may be several, their voxels from all blocks, new numbers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from synmlops.blockwise.grid import Block
from synmlops.synapses.blocks import Apart, Task, places_in_region
from synmlops.synapses.foreground import NEITHER, POST, first_corners
from synmlops.synapses.joining import Sites
from synmlops.synapses.sparse import Indices, components, first_places, places
from synmlops.synapses.splitting import Site, SplitRules, split_site


@dataclass(frozen=True, eq=False)
class Crowd:
    """A site that may be several synapses, and the components that it is made of."""

    site: int
    blocks: Indices  # (C,) ascending
    components: Indices  # (C,) of the block


@dataclass(frozen=True, eq=False)
class Split:
    """A site that turned out to be several synapses."""

    site: int
    first: Indices  # (K,) where each of them begins, which decides the numbering
    first_voxel: Indices  # (K,) ... and, where that is one place, their first voxels
    sided: NDArray[np.bool_]  # (K,) whether it has a voxel with a side


def crowds(task: Task, sites: Sites, rules: SplitRules) -> Iterator[tuple[Block, tuple[Crowd, ...]]]:
    """Give the sites that may be several, by the block of their first component."""
    possible = np.concatenate(([False], sites.pres > 1 if rules.mode == "pre" else np.ones(sites.n, bool)))
    members = np.flatnonzero(possible[sites.site])
    block = np.searchsorted(sites.components_before, members, side="right") - 1
    number = members - sites.components_before[block]
    order = np.lexsort((members, sites.site[members]))
    starts = np.flatnonzero(np.diff(sites.site[members][order], prepend=0))
    by_home: dict[int, list[Crowd]] = {}
    for its in np.split(order, starts[1:]) if len(order) else []:
        crowd = Crowd(int(sites.site[members[its[0]]]), block[its], number[its])
        by_home.setdefault(int(crowd.blocks[0]), []).append(crowd)
    for home in sorted(by_home):
        yield task.blocks[home], tuple(by_home[home])


def part_crowds(
    task: Task, home: Block, crowded: tuple[Crowd, ...], rules: SplitRules
) -> tuple[list[Split], list[int]]:
    """Take sites apart; which voxel went where is laid aside for the blocks that hold them.

    Returns
    -------
    split : list of Split
    touched : list of int
        Blocks for which something is laid aside.
    """
    shelves: dict[int, _Shelf] = {}
    split: list[Split] = []
    laid: dict[int, list[tuple[NDArray[np.generic], ...]]] = {}
    for crowd in crowded:
        gathered = _gather(task, crowd, shelves)
        index = places(gathered.place, task.blocks.region.shape_zyx)
        label = split_site(Site(index, gathered.side, gathered.union), rules)
        if label.max() == 0:
            continue
        split.append(_split_of(crowd.site, gathered, label, task))
        name = _post_names(gathered, label, task)
        for block in np.unique(gathered.block):
            its = gathered.block == block
            columns = gathered.position[its], np.full(its.sum(), crowd.site), label[its], name[its]
            laid.setdefault(int(block), []).append(columns)
    for block, rows in laid.items():
        task.spool.put(shelf_name(home.index), block, tuple(map(np.concatenate, zip(*rows, strict=True))))
    return split, list(laid)


def renumbered(sites: Sites, results: Iterable[tuple[Block, list[Split], list[int]]]) -> Sites:
    """Number the sites anew, those that were taken apart as several."""
    splits: list[Split] = []
    shelves: dict[int, list[str]] = {}
    for home, its, touched in results:
        splits += its
        for block in touched:
            shelves.setdefault(block, []).append(shelf_name(home.index))
    if not splits:
        return sites
    splits.sort(key=lambda one: one.site)
    whole = np.ones(sites.n, bool)
    whole[[one.site - 1 for one in splits]] = False
    first = np.concatenate([sites.first[whole], *(one.first for one in splits)])
    second = np.concatenate([sites.first[whole], *(one.first_voxel for one in splits)])
    sided = np.concatenate([np.ones(whole.sum(), bool), *(one.sided for one in splits)])
    order = np.lexsort((second, first))
    number = np.zeros(len(first), np.int64)
    number[order] = np.where(sided[order], np.cumsum(sided[order]), 0)
    of_site = np.zeros(sites.n + 1, np.int64)
    of_site[1:][whole] = number[: whole.sum()]
    numbers = np.split(number[whole.sum() :], np.cumsum([len(one.first) for one in splits])[:-1])
    of_split = dict(zip([one.site for one in splits], numbers, strict=True))
    apart = {block: _apart(sites.given(block).site, tuple(its), of_split) for block, its in shelves.items()}
    return replace(sites, n=int(sided.sum()), site=of_site[sites.site], apart=apart)


def _apart(site: Indices, shelves: tuple[str, ...], of_split: dict[int, Indices]) -> Apart:
    """Pick what a block, whose components are of these sites, needs to know."""
    its = [number for number in np.unique(site).tolist() if number in of_split]
    begins = np.cumsum([0, *(len(of_split[number]) for number in its)])[:-1]
    return Apart(shelves, np.array(its), begins, np.concatenate([of_split[number] for number in its]))


def shelf_name(home: int) -> str:
    """Name what a home block lays aside for others."""
    return f"split{home}"


@dataclass(frozen=True, eq=False)
class _Gathered:
    """The voxels of a site, in scan order of the region."""

    place: Indices
    side: NDArray[np.uint8]
    union: NDArray[np.uint8]
    block: Indices
    position: Indices  # among the voxels that the block laid aside


class _Shelf:
    """The voxels that a block laid aside, by component."""

    def __init__(self, task: Task, block: int) -> None:
        voxels = task.spool.get("voxels", block)
        assert voxels is not None  # a site has a component there
        flat, component, self.side, self.union, _ = voxels
        self.place = places_in_region(flat.astype(np.int64), task, task.blocks[block])
        self._order = np.argsort(component, kind="stable")
        self._begins = np.concatenate(([0], np.cumsum(np.bincount(component))))

    def positions(self, component: int) -> Indices:
        return self._order[self._begins[component] : self._begins[component + 1]]


def _gather(task: Task, crowd: Crowd, shelves: dict[int, _Shelf]) -> _Gathered:
    shares = []
    for block, component in zip(crowd.blocks.tolist(), crowd.components.tolist(), strict=True):
        if block not in shelves:
            shelves[block] = _Shelf(task, block)
        shelf = shelves[block]
        its = shelf.positions(component)
        shares.append((shelf.place[its], shelf.side[its], shelf.union[its], np.full(len(its), block), its))
    place, side, union, owner, position = map(np.concatenate, zip(*shares, strict=True))
    order = np.argsort(place)
    return _Gathered(place[order], side[order], union[order], owner[order], position[order])


def _split_of(site: int, gathered: _Gathered, label: Indices, task: Task) -> Split:
    n = int(label.max()) + 1
    sided = np.full(n, not task.has_sides)
    sided[label[gathered.side != NEITHER]] = True
    _, height, width = task.blocks.region.shape_zyx
    corners = first_corners(gathered.place, label, (height, width), task.levels.join_voxels)
    return Split(site, corners, first_places(gathered.place, label), sided)


def _post_names(gathered: _Gathered, label: Indices, task: Task) -> NDArray[np.uint64]:
    """Give where the post component of each voxel begins, within its synapse; 0 beside the post side."""
    name = np.zeros(len(label), np.uint64)
    post = np.flatnonzero(gathered.side == POST)
    part = components(gathered.place[post], task.blocks.region.shape_zyx, value=label[post])
    name[post] = first_places(gathered.place[post], part)[part]
    return name
