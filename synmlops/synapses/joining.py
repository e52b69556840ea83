"""Components of blocks to sites: which are one, which are large enough, how they are numbered."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from synmlops.synapses.blocks import Apart, Given, Links, Summary
from synmlops.synapses.foreground import PRE
from synmlops.synapses.sparse import Indices, groups

_NONE = np.empty((0, 4), np.int64)


@dataclass(frozen=True, eq=False)
class Sites:
    """The sites of a region, and which components of its blocks they are made of."""

    n: int
    n_sided: int  # of which a voxel has a side
    site: Indices  # (K,) of each component of all blocks: 1 to n, or 0 where it is dropped
    first: Indices  # (n,) place at which each site begins, ascending
    pres: Indices  # (n,) pre sides of each site, as `settle` counts them
    spans: NDArray[np.bool_]  # (K,) whether the site has another component
    part: NDArray[np.uint64]  # (M,) name of each part of all blocks: where the whole part begins
    components_before: Indices  # (blocks + 1,) components in the blocks before
    parts_before: Indices  # (blocks + 1,)
    apart: dict[int, Apart] = field(default_factory=dict)  # by block, where sites were taken apart

    def given(self, block: int) -> Given:
        """Give what a block needs to know."""
        components = slice(*self.components_before[block : block + 2])
        parts = slice(*self.parts_before[block : block + 2])
        return Given(self.site[components], self.spans[components], self.part[parts], self.apart.get(block))


def settle(
    summaries: Sequence[Summary],
    links: Sequence[Links],
    *,
    min_voxels: int,
    min_pre_voxels: int = 1,
    keeps_all: bool = False,
) -> Sites:
    """Join the components of all blocks, drop what is no site, and number the rest.

    Parameters
    ----------
    summaries : sequence of Summary
        Of each block, in order.
    links : sequence of Links
    min_voxels : int
        A component with fewer foreground voxels, all its blocks together, is dropped; so is one of which no
        voxel has a side.
    min_pre_voxels : int
        A smaller pre side is not counted.
    keeps_all : bool, default False
        Drop no component.

    Returns
    -------
    sites : Sites
        Numbered in scan order.
    """
    components_before = starts_of([len(one.size) for one in summaries])
    parts_before = starts_of([len(one.part_first) for one in summaries])
    component = joined_members(components_before, np.concatenate([_NONE, *(one.components for one in links)]))
    part = joined_members(parts_before, np.concatenate([_NONE, *(one.parts for one in links)]))
    n = int(component.max(initial=-1)) + 1
    size, sided = np.zeros(n, np.int64), np.zeros(n, bool)
    np.add.at(size, component, np.concatenate([one.size for one in summaries]))
    np.logical_or.at(sided, component, np.concatenate([one.sided for one in summaries]))
    first = _least(component, np.concatenate([one.first for one in summaries]), n)
    chosen = np.flatnonzero(((size >= min_voxels) & sided) | keeps_all)
    chosen = chosen[np.argsort(first[chosen])]
    number = np.zeros(n, np.int64)
    number[chosen] = np.arange(1, len(chosen) + 1)
    n_parts = int(part.max(initial=-1)) + 1
    name = _least(part, np.concatenate([one.part_first for one in summaries]), n_parts)
    large = _large_pres(summaries, part, n_parts, min_pre_voxels)
    of_part = component[_shifted([one.part_component for one in summaries], components_before)]
    whole = np.zeros(n_parts, np.int64)
    whole[part] = of_part
    pres = np.bincount(whole[large], minlength=n)
    return Sites(
        n=len(chosen),
        n_sided=int(sided[chosen].sum()),
        site=number[component],
        first=first[chosen],
        pres=pres[chosen],
        spans=np.bincount(component, minlength=n)[component] > 1,
        part=name[part].astype(np.uint64),
        components_before=components_before,
        parts_before=parts_before,
    )


def starts_of(counts: Sequence[int]) -> Indices:
    """Give how many members there are in the blocks before each, and in all."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def joined_members(before: Indices, pairs: Indices) -> Indices:
    """Label the members of all blocks, given pairs of (block, number) that are one."""
    block, number = pairs[:, 0::2], pairs[:, 1::2]
    one, other = (before[block] + number).T
    return groups(int(before[-1]), one, other)


def _shifted(numbers: Sequence[Indices], before: Indices) -> Indices:
    """Turn numbers within each block into numbers among those of all blocks."""
    return np.concatenate([one + start for one, start in zip(numbers, before[:-1], strict=True)])


def _large_pres(
    summaries: Sequence[Summary], part: Indices, n_parts: int, min_voxels: int
) -> NDArray[np.bool_]:
    """Tell which whole parts are pre sides of at least so many voxels."""
    size = np.zeros(n_parts, np.int64)
    side = np.concatenate([one.part_side for one in summaries])
    np.add.at(size, part[side == PRE], np.concatenate([one.part_size for one in summaries])[side == PRE])
    return size >= max(min_voxels, 1)


def _least(label: Indices, values: Indices, n: int) -> Indices:
    least = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(least, label, values)
    return least
