"""Touching synapses taken apart: one site of the foreground into several, by pre sides or by shape."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra, minimum_spanning_tree
from scipy.spatial import cKDTree

from synmlops.synapses.foreground import PRE
from synmlops.synapses.sparse import Indices, components, groups

SplitMode = Literal["none", "pre", "watershed"]

NECK = 0.7
"""Two bulges part where the site between them is thinner than this share of the thinner one."""
LARGEST_BOX = 2**24
"""Voxels of the box around a site; what is larger is no synapse and stays whole."""


@dataclass(frozen=True, eq=False)
class Site:
    """The foreground voxels of one site, in scan order."""

    index: tuple[Indices, Indices, Indices]
    side: NDArray[np.uint8]
    union: NDArray[np.uint8]


@dataclass(frozen=True)
class SplitRules:
    """How a site is taken apart.

    Attributes
    ----------
    mode : {"none", "pre", "watershed"}
        `pre`: each 26-connected pre side of at least `min_side_voxels` begins a synapse, and every voxel goes
        to the nearest one by way of the site. `watershed`: each bulge of the site's shape begins one, and
        they meet where the union probability is least.
    min_voxels : int
        Each synapse has at least so many.
    min_side_voxels : int
    voxel_nm : tuple of float
    """

    mode: SplitMode
    min_voxels: int
    min_side_voxels: int
    voxel_nm: tuple[float, float, float]


def split_site(site: Site, rules: SplitRules) -> Indices:
    """Take one site apart.

    Returns
    -------
    labels : (N,) array of int
        Of each voxel: 0 to K - 1, in scan order of the synapses' first voxels; all 0 where the site is one.

    Notes
    -----
    `pre` measures along the site (Dijkstra), since what is near through the tissue between may belong to
    another. `watershed` is the minimum spanning forest rooted in the seeds, which is a watershed (Cousty et
    al. 2009, "Watershed cuts", IEEE TPAMI 31:1362); its seeds are the maxima of the distance to the border.

    Examples
    --------
    >>> x = np.arange(6)
    >>> line = Site((x * 0, x * 0, x), np.array([1, 2, 2, 2, 2, 1], np.uint8), np.full(6, 200, np.uint8))
    >>> split_site(line, SplitRules("pre", 2, 1, (40, 8, 8))).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    none = np.zeros(len(site.union), np.int64)
    low = [int(at.min()) for at in site.index]
    shape = tuple(int(at.max()) - start + 1 for start, at in zip(low, site.index, strict=True))
    if rules.mode == "none" or np.prod(shape, dtype=np.float64) > LARGEST_BOX:
        return none
    z, y, x = (at - start for at, start in zip(site.index, low, strict=True))
    box = _Box(z, y, x, (shape[0], shape[1], shape[2]), rules.voxel_nm)
    if rules.mode == "pre":
        seed, reach = _pre_seeds(site, box, rules), partial(_nearest, box)
    else:
        depth = _depth(box)
        seed, reach = _bulges(box, depth), partial(_flooded, _passes(box, depth, site.union))
    while seed.max(initial=-1) > 0:
        label = reach(seed)
        size = np.bincount(label, minlength=int(seed.max()) + 1)
        small = np.flatnonzero(size < rules.min_voxels)
        if not len(small):
            return _in_scan_order(label)
        _drop(seed, small[np.argsort(size[small], kind="stable")[: (len(small) + 1) // 2]])
    return none


def _drop(seed: Indices, dropped: Indices) -> None:
    """Take seeds back, whose voxels others then get, and number the rest without gaps."""
    kept = np.ones(int(seed.max()) + 1, bool)
    kept[dropped] = False
    number = np.where(kept, np.cumsum(kept) - 1, -1)
    seed[:] = np.where(seed < 0, -1, number[seed])


class _Box:
    """Voxels of a site within the box around them, and which of them touch."""

    def __init__(
        self,
        z: Indices,
        y: Indices,
        x: Indices,
        shape: tuple[int, int, int],
        voxel_nm: tuple[float, float, float],
    ) -> None:
        self.index, self.shape, self.voxel_nm = (z, y, x), shape, voxel_nm
        self.flat = (z * shape[1] + y) * shape[2] + x
        self.n = len(z)
        ones, others, lengths = [], [], []
        for step in _HALF_OF_26:
            one, other = self._pairs(step)
            ones.append(one)
            others.append(other)
            lengths.append(np.full(len(one), float(np.linalg.norm(np.multiply(step, voxel_nm)))))
        self.one, self.other, self.length = map(np.concatenate, (ones, others, lengths))

    def _pairs(self, step: tuple[int, int, int]) -> tuple[Indices, Indices]:
        """Give the voxels that have another one this step away, and that one."""
        moved = [at + by for at, by in zip(self.index, step, strict=True)]
        inside = np.ones(self.n, bool)
        for at, size in zip(moved, self.shape, strict=True):
            inside &= (at >= 0) & (at < size)
        wanted = ((moved[0] * self.shape[1] + moved[1]) * self.shape[2] + moved[2])[inside]
        found = np.minimum(np.searchsorted(self.flat, wanted), self.n - 1)
        there = self.flat[found] == wanted
        return np.flatnonzero(inside)[there], found[there]

    def graph(self, weight: NDArray[np.float64]) -> coo_array:
        """Give the touching pairs with weights above 0."""
        return coo_array((weight, (self.one, self.other)), shape=(self.n, self.n))


_HALF_OF_26 = [
    (z, y, x) for z in (0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if (z, y, x) > (0, 0, 0)
]  # the other half are the same pairs


def _pre_seeds(site: Site, box: _Box, rules: SplitRules) -> Indices:
    """Number the large pre sides; -1 elsewhere."""
    seed = np.full(box.n, -1)
    pre = np.flatnonzero(site.side == PRE)
    part = components(box.flat[pre], box.shape)
    large = np.bincount(part) >= max(rules.min_side_voxels, 1)
    seed[pre] = np.where(large, np.cumsum(large) - 1, -1)[part]
    return seed


def _nearest(box: _Box, seed: Indices) -> Indices:
    """Give each voxel the seed that is nearest along the site; in nm, of equally near ones any."""
    seeds = np.flatnonzero(seed >= 0)
    _, _, source = dijkstra(
        box.graph(box.length), directed=False, indices=seeds, min_only=True, return_predecessors=True
    )
    label = seed[np.maximum(source, 0)]
    apart = np.flatnonzero(source < 0)  # joined over a gap
    if len(apart):
        points = np.stack(box.index, axis=1) * np.asarray(box.voxel_nm)
        label[apart] = seed[seeds[cKDTree(points[seeds]).query(points[apart])[1]]]
    return label


def _bulges(box: _Box, depth: NDArray[np.float64]) -> Indices:
    """Number the maxima of the distance to the border, those with a neck between them; -1 elsewhere."""
    rank = np.empty(box.n, np.int64)
    rank[np.lexsort((np.arange(box.n), depth))] = np.arange(box.n)  # no two alike, so that each way up ends
    best = rank.copy()
    np.maximum.at(best, box.one, rank[box.other])
    np.maximum.at(best, box.other, rank[box.one])
    by_rank = np.argsort(rank)
    up = by_rank[best]
    while (up != up[up]).any():
        up = up[up]
    peaks, basin = np.unique(up, return_inverse=True)
    merged = _merged(depth, basin, peaks, box)
    seed = np.full(box.n, -1)
    for group in range(int(merged.max()) + 1):
        highest = peaks[merged == group]
        seed[highest[np.argmax(rank[highest])]] = group
    return seed


def _merged(depth: NDArray[np.float64], basin: Indices, peaks: Indices, box: _Box) -> Indices:
    """Merge basins from the highest pass down, unless the pass is a neck."""
    between = basin[box.one] != basin[box.other]
    one, other = basin[box.one[between]], basin[box.other[between]]
    height = np.minimum(depth[box.one[between]], depth[box.other[between]])
    key = np.minimum(one, other) * len(peaks) + np.maximum(one, other)
    order = np.lexsort((-height, key))
    first = order[np.flatnonzero(np.diff(key[order], prepend=-1))]
    owner = np.arange(len(peaks))
    top = depth[peaks].copy()
    pairs = []
    for i in first[np.lexsort((key[first], -height[first]))]:
        a, b = owner[one[i]], owner[other[i]]
        if a != b and height[i] >= NECK * min(top[a], top[b]):
            top[a] = top[b] = max(top[a], top[b])
            owner[owner == b] = a
            pairs.append((one[i], other[i]))
    return groups(len(peaks), [a for a, _ in pairs], [b for _, b in pairs])


def _passes(box: _Box, depth: NDArray[np.float64], union: NDArray[np.uint8]) -> coo_array:
    """Give the lowest ways between all voxels, a minimum spanning tree; low is certain, high is doubtful."""
    # equal probabilities, of which there are many, by the distance to the border; no weight may be 0
    level = 256.0 - union + 0.5 * (1 - depth / depth.max())
    weight = np.maximum(level[box.one], level[box.other])
    return minimum_spanning_tree(box.graph(weight)).tocoo()


def _flooded(passes: coo_array, seed: Indices) -> Indices:
    """Give each voxel the seed that it is flooded from as the water rises."""
    n, seeds = len(seed), np.flatnonzero(seed >= 0)
    # a root below all seeds; where two of them meet, the highest pass between them is left out of the tree
    ends = np.concatenate([passes.row, np.full(len(seeds), n)]), np.concatenate([passes.col, seeds])
    weight = np.concatenate([passes.data, np.full(len(seeds), 0.25)])
    tree = minimum_spanning_tree(coo_array((weight, ends), shape=(n + 1, n + 1))).tocoo()
    kept = (tree.row != n) & (tree.col != n)
    piece = groups(n, tree.row[kept], tree.col[kept])
    of_piece = np.full(int(piece.max()) + 1, -1)
    of_piece[piece[seeds]] = seed[seeds]
    label: Indices = of_piece[piece]
    return label


def _depth(box: _Box) -> NDArray[np.float64]:
    """Give the distance of each voxel to the nearest one outside the site; nm."""
    mask = np.zeros(tuple(n + 2 for n in box.shape), bool)
    inner = tuple(at + 1 for at in box.index)
    mask[inner] = True
    depth: NDArray[np.float64] = distance_transform_edt(mask, sampling=box.voxel_nm)[inner]
    return depth


def _in_scan_order(label: Indices) -> Indices:
    """Number labels by their first voxels."""
    _, first = np.unique(label, return_index=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[label]
