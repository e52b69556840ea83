"""From CREMI's clefts and annotated pairs to `pairs` labels: which cleft a pair is at, and which tissue it
claims."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from synmlops.volumes.importers.cremi_clefts import Box, Clefts, Nm, Surroundings
from synmlops.volumes.labels import smallest_unsigned

NO_CLEFT = "pairs with no cleft near"
ONE_SIDED = "pairs whose nearest cleft does not lie between their neurons"
ONE_NEURON = "pairs within one neuron"
NOT_ANNOTATED = "clefts without an annotated pair"
CONTESTED = "sites that lost voxels which are as near to another cleft"
LOST_SIDE = "pairs with a side that cannot be told from those of others"


@dataclass(frozen=True)
class Doubt:
    """Something that is masked because the file does not tell what it is."""

    kind: str
    what: str
    at_nm: tuple[float, float, float]  # where, in the world


@dataclass(frozen=True, eq=False)
class Pairs:
    """Annotated pairs, counted from the first voxel of the labels."""

    points_nm: NDArray[np.float64]  # (P, 2, 3)
    neurons: NDArray[np.uint64]  # (P, 2), 0 where a point lies in none
    ids: NDArray[np.uint64]  # (P, 2) of the annotations

    def name(self, row: int) -> str:
        """Name a pair as its file does."""
        return f"{self.ids[row, 0]} -> {self.ids[row, 1]}"


@dataclass(frozen=True, eq=False)
class Sites:
    """Which site each pair belongs to, and which pieces of clefts lie at each site."""

    site: NDArray[np.int64]  # (P,) from 1; 0 where the pair could not be placed
    pieces: dict[int, list[int]]
    doubts: dict[str, list[int]]  # kind to rows of the pairs
    doubtful: set[int] = field(default_factory=set)  # pieces at which pairs lie that could not be placed


def place_pairs(
    pairs: Pairs, surroundings: Surroundings, neurons: NDArray[np.unsignedinteger], *, reach_nm: float
) -> Sites:
    """Find the cleft of each pair, and join the pairs of one site.

    A pair lies at the piece nearest to the line between its points, no farther than `reach_nm`, that has both
    its neurons beside it. Pairs are one site if they share the pre annotation, or the piece and
    the pre neuron. A piece at which no pair lies joins a site that is within reach, touches both neurons of a
    pair and has a piece of the same cleft.
    """
    clefts, voxel_nm = surroundings.clefts, surroundings.voxel_nm
    beside = cache(lambda k: surroundings.neurons(k, neurons))
    piece = np.full(len(pairs.ids), -1)
    doubts: dict[str, list[int]] = defaultdict(list)
    doubtful: set[int] = set()
    reached: list[dict[int, float]] = []
    for row, (pre, post) in enumerate(pairs.neurons.tolist()):
        near = _pieces_near(pairs.points_nm[row], clefts, voxel_nm=voxel_nm, reach_nm=reach_nm)
        between = [k for k in near if {pre, post} <= beside(k)] if pre and post else []
        reached.append({k: near[k] for k in between})
        if not (pre and post):
            doubtful.update(list(near)[:1])  # the caller says what is wrong with such a pair
        elif pre == post:
            doubts[ONE_NEURON].append(row)
            doubtful.update(between[:1])
        elif between:
            piece[row] = between[0]
        else:
            doubts[ONE_SIDED if near else NO_CLEFT].append(row)
            doubtful.update(list(near)[:1])
    site = _joined(pairs, piece)
    pieces: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(site).tolist():
        if piece[row] not in pieces[int(site[row])]:
            pieces[int(site[row])].append(int(piece[row]))
    _join_fragments(clefts, site, piece, reached, pieces)
    return Sites(site, dict(pieces), dict(doubts), doubtful)


def _joined(pairs: Pairs, piece: NDArray[np.intp]) -> NDArray[np.int64]:
    """Number the sites of the placed pairs from 1, in the order of their first pair."""
    rows = np.flatnonzero(piece >= 0)
    site = np.zeros(len(piece), np.int64)
    if not len(rows):
        return site
    _, by_point = np.unique(pairs.ids[rows, 0], return_inverse=True)
    at = np.stack((piece[rows].astype(np.uint64), pairs.neurons[rows, 0]), axis=1)
    _, by_cleft = np.unique(at, axis=0, return_inverse=True)
    n = len(rows)
    a = np.concatenate((np.arange(n), np.arange(n)))
    b = np.concatenate((n + by_point, 2 * n + by_cleft))
    graph = coo_array((np.ones(2 * n, bool), (a, b)), shape=(3 * n, 3 * n))
    group = connected_components(graph, directed=False)[1][:n]
    _, first, place = np.unique(group, return_index=True, return_inverse=True)
    site[rows] = np.argsort(np.argsort(first))[place] + 1
    return site


def _join_fragments(
    clefts: Clefts,
    site: NDArray[np.int64],
    piece: NDArray[np.intp],
    reached: list[dict[int, float]],
    pieces: dict[int, list[int]],
) -> None:
    """Give pieces at which no pair lies to the nearest site that has another piece of the same cleft."""
    taken = set(piece[piece >= 0].tolist())
    best: dict[int, tuple[float, int]] = {}
    for row, near in enumerate(reached):
        for k, apart in near.items():
            if site[row] and k not in taken and clefts.ids[k] == clefts.ids[piece[row]]:
                best[k] = min(best.get(k, (math.inf, 0)), (apart, int(site[row])))
    for k, (_, number) in best.items():
        pieces[number].append(k)


def _pieces_near(
    ends_nm: NDArray[np.float64], clefts: Clefts, *, voxel_nm: Nm, reach_nm: float
) -> dict[int, float]:
    """Give the pieces within reach of the line between two points, nearest first, with their distance."""
    size = np.asarray(voxel_nm)
    low, high = ends_nm.min(axis=0) - reach_nm, ends_nm.max(axis=0) + reach_nm
    candidates = np.flatnonzero(((clefts.low * size <= high) & ((clefts.high - 1) * size >= low)).all(axis=1))
    apart = {int(k): float(to_segment(clefts.of(k) * size, ends_nm).min()) for k in candidates}
    return dict(sorted(((k, d) for k, d in apart.items() if d <= reach_nm), key=lambda item: item[1]))


def to_segment(points: NDArray[Any], ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the distance of points (..., 3) to the line between two ends (2, 3).

    Examples
    --------
    >>> to_segment(np.array([[0, 3, 5], [0, 0, 14]]), np.array([[0.0, 0, 0], [0, 0, 10]])).tolist()
    [3.0, 4.0]
    """
    along = ends[1] - ends[0]
    length = float(along @ along)
    share = ((points - ends[0]) @ along / length).clip(0, 1) if length else np.zeros(points.shape[:-1])
    distance: NDArray[np.float64] = np.linalg.norm(points - ends[0] - share[..., None] * along, axis=-1)
    return distance


class Claims:
    """Voxels and the site that each belongs to: the one whose cleft is nearest.

    Where another site's cleft is as near, to within the longest edge of a voxel, it is not known which.
    """

    def __init__(self, shape: tuple[int, ...], n_sites: int, voxel_nm: Nm) -> None:
        self.unknown = 2 * n_sites + 1  # claims of clefts about which nothing is known
        self.label = np.zeros(shape, smallest_unsigned(2 * n_sites + 2))
        self.contested = np.zeros(shape, bool)
        self._best = np.full(shape, np.inf, np.float32)
        self._margin_nm = max(voxel_nm)

    def claim(self, box: Box, near_nm: NDArray[np.float32], ids: NDArray[np.integer]) -> None:
        """Claim voxels of one site, those where `ids` is not 0."""
        label, best, contested = self.label[box], self._best[box], self.contested[box]
        mine = (ids != 0) & np.isfinite(near_nm)
        other = mine & (label != 0) & ((label + 1) // 2 != (ids.astype(label.dtype) + 1) // 2)
        with np.errstate(invalid="ignore"):  # infinite distances are not compared below
            tie = other & (np.abs(near_nm - best) <= self._margin_nm)
        better = mine & (near_nm < best)
        contested[other & better & ~tie] = False
        contested[tie] = True
        label[better] = ids[better]
        best[better] = near_nm[better]


def claim_all(
    sites: Sites,
    pairs: Pairs,
    surroundings: Surroundings,
    neurons: NDArray[np.unsignedinteger],
) -> tuple[Claims, list[int]]:
    """Let every site claim the tissue beside its clefts; also gives the pieces that no pair lies at.

    Tissue of the pre neuron becomes 2n - 1, of the post neurons 2n. What lies beside a cleft in no neuron,
    and all tissue beside a cleft that is nobody's, is claimed as unknown.
    """
    n_sites = int(sites.site.max(initial=0))
    claims = Claims(neurons.shape, n_sites, surroundings.voxel_nm)
    taken: set[int] = set()
    for number, pieces in sorted(sites.pieces.items()):
        rows = np.flatnonzero(sites.site == number)
        pre, posts = pairs.neurons[rows[0], 0], np.unique(pairs.neurons[rows, 1])
        for k in pieces:
            box, near = surroundings(k)
            ids = _ids_of(neurons[box], number=number, pre=pre, posts=posts, unknown=claims.unknown)
            claims.claim(box, near, ids)
        taken.update(pieces)
    nobodys = [k for k in range(len(surroundings.clefts)) if k not in taken]
    for k in nobodys:
        box, near = surroundings(k)
        claims.claim(box, near, np.full(near.shape, claims.unknown))
    return claims, [k for k in nobodys if k not in sites.doubtful]


def _ids_of(
    neurons: NDArray[np.unsignedinteger],
    *,
    number: int,
    pre: np.uint64,
    posts: NDArray[np.uint64],
    unknown: int,
) -> NDArray[np.int64]:
    ids = np.where(neurons == 0, unknown, 0)
    ids[np.isin(neurons, posts.astype(neurons.dtype))] = 2 * number
    ids[neurons == pre.astype(neurons.dtype)] = 2 * number - 1
    return ids


def capsules(
    ends_nm: NDArray[np.float64], *, shape: tuple[int, ...], voxel_nm: Nm, radius_nm: float
) -> Iterator[tuple[Box, NDArray[np.bool_]]]:
    """Give the voxels within a radius of the line between two points, for each of (N, 2, 3)."""
    size = np.asarray(voxel_nm)
    for ends in ends_nm:
        low = np.floor((ends.min(axis=0) - radius_nm) / size).astype(int).clip(min=0)
        high = np.minimum(np.ceil((ends.max(axis=0) + radius_nm) / size).astype(int) + 1, shape)
        if (high <= low).any():
            continue
        at = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), axis=-1) * size
        inside = to_segment(at, ends) <= radius_nm
        inside[tuple((np.rint(ends / size).astype(int).clip(low, high - 1) - low).T)] = True
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        yield (z, y, x), inside
