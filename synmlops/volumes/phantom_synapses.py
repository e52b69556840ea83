"""Where the phantom's synapses and their look-alikes lie, and the labels and partners that follow.

A site is a ball on a membrane. Its pre neuron is the one whose membrane it sits on, its posts are the neurons
that face it there with a fair share of the contact; a ball where a neuron faces with a sliver is passed over,
so that the number of partners can be seen.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, label

from synmlops.volumes.phantom_tissue import Tissue
from synmlops.volumes.store import Grid
from synmlops.volumes.table import COLUMNS, empty_table

Kind = Literal["synapse", "bare", "junction", "cloud", "blob"]

LOOKALIKES: dict[Kind, float] = {"bare": 0.5, "cloud": 0.25, "junction": 0.15, "blob": 0.1}
"""Shares: density without vesicles, vesicles without density, both sides dark, a dark spot."""

RADIUS_NM = (140.0, 215.0)  # of a site's ball, so that a synapse is some 280 to 430 nm across
PRE_NM = 72.0  # depth of the pre label, from the membrane
POST_NM = 80.0
GAP_NM = 125.0  # least distance between the balls of two sites
FAIR_SHARE = 0.17  # of the contact: a neuron with more is a post ...
SLIVERS = 0.05  # ... and all others together must have less
LEAST_POST_NM3 = 6e5  # a smaller post is no partner
LEAST_ROOM = (
    0.2  # of a ball of 1.3 radii lies in the pre neuron, clear of its membrane, and can hold vesicles
)
LEAST_FACING_NM = 70.0  # between the middles of the sides: less where one wraps around the other
GREATEST_TILT = 0.72
PARTNER_CHANCES = {2: 0.5, 3: 0.3, 4: 0.2}  # of a polyadic site
TRIES = 16000


@dataclass(frozen=True)
class Site:
    """One synapse or look-alike.

    Attributes
    ----------
    kind : str
    centre_zyx : (3,) array of int
        Voxel on the pre side of the membrane.
    radius_nm : float
    inward : (3,) array of float
        Unit vector (nm, z y x) from the posts into the pre neuron.
    pre : int
        Neuron id.
    posts : tuple of int
        Neuron ids, 1 to 4.
    box : tuple of slice
        The part of the volume that `side` and `depth_nm` describe.
    side : array of uint8
        1 pre, 2 post, 0 elsewhere; within the ball.
    depth_nm : array of float32
        Distance to the contact between pre and posts.
    """

    kind: Kind
    centre_zyx: NDArray[np.int64]
    radius_nm: float
    inward: NDArray[np.float64]
    pre: int
    posts: tuple[int, ...]
    box: tuple[slice, slice, slice]
    side: NDArray[np.uint8]
    depth_nm: NDArray[np.float32]


def place_sites(
    rng: np.random.Generator,
    tissue: Tissue,
    *,
    voxel_nm: tuple[float, float, float],
    synapses: int,
    lookalikes: int,
    polyadic: float,
) -> list[Site]:
    """Find room for synapses, then for look-alikes; the list is shorter where the tissue has no room.

    Parameters
    ----------
    rng : numpy Generator
    tissue : Tissue
    voxel_nm : tuple of float
    synapses, lookalikes : int
        How many to place.
    polyadic : float
        Share of synapses with two to four posts. Where the tissue has too few such places, fewer.
    """
    room = _Room(rng, tissue, voxel_nm)
    room.fill(["synapse"] * synapses, wanted=_partner_counts(rng, synapses, polyadic))
    room.fill(["synapse"] * (synapses - len(room.sites)))
    room.fill(_lookalike_kinds(rng, lookalikes))
    return room.sites


class _Room:
    """The sites placed so far, and the candidate voxels that still have room around them."""

    def __init__(
        self, rng: np.random.Generator, tissue: Tissue, voxel_nm: tuple[float, float, float]
    ) -> None:
        self.sites: list[Site] = []
        self._rng, self._tissue, self._voxel_nm = rng, tissue, voxel_nm
        self._candidates = _candidates(rng, tissue, voxel_nm)
        self._free = np.ones(len(self._candidates), bool)

    def fill(self, kinds: list[Kind], *, wanted: Counter[int] | None = None) -> None:
        """Place sites of these kinds; with `wanted`, only as many of each number of partners."""
        left = list(kinds)
        for i in range(len(self._candidates)):
            if not left:
                return
            if not self._free[i]:
                continue
            centre, radius = self._candidates[i], float(self._rng.uniform(*RADIUS_NM))
            if self._is_crowded(centre, radius):
                continue
            site = _make_site(self._tissue, centre, radius, kind=left[-1], voxel_nm=self._voxel_nm)
            if site is None or (wanted is not None and not wanted[len(site.posts)]):
                continue
            if wanted is not None:
                wanted[len(site.posts)] -= 1
            left.pop()
            self.sites.append(site)
            self._free &= self._gaps(site, self._candidates) >= RADIUS_NM[0] + GAP_NM

    def _is_crowded(self, centre: NDArray[np.int64], radius: float) -> bool:
        return any(self._gaps(site, centre[None])[0] < radius + GAP_NM for site in self.sites)

    def _gaps(self, site: Site, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give how far each place is from the site's ball, in nm."""
        apart = np.linalg.norm((places - site.centre_zyx) * self._voxel_nm, axis=1)
        return np.asarray(apart - site.radius_nm, dtype=np.float64)


def _partner_counts(rng: np.random.Generator, synapses: int, polyadic: float) -> Counter[int]:
    many = round(polyadic * synapses)
    drawn = rng.choice(list(PARTNER_CHANCES), size=many, p=list(PARTNER_CHANCES.values()))
    return Counter([int(n) for n in drawn] + [1] * (synapses - many))


def _lookalike_kinds(rng: np.random.Generator, n: int) -> list[Kind]:
    """Give n kinds in the shares of `LOOKALIKES`, in random order."""
    ends = np.round(np.cumsum(list(LOOKALIKES.values())) * n).astype(int)
    kinds = list(LOOKALIKES)
    return [kinds[int(np.searchsorted(ends, i, side="right"))] for i in rng.permutation(n)]


def _candidates(
    rng: np.random.Generator, tissue: Tissue, voxel_nm: tuple[float, float, float]
) -> NDArray[np.int64]:
    """Give (N, 3) voxels beside upright membranes, away from the volume's faces, in random order."""
    size = np.array(tissue.neurons.shape)
    margin = np.minimum(np.ceil(np.array([110.0, 200.0, 200.0]) / voxel_nm), (size - 1) // 3).astype(int)
    inner = tuple(slice(m, n - m) for m, n in zip(margin, size, strict=True))
    near = (tissue.membrane_nm[inner] < 0.75 * max(voxel_nm[1:])) & (tissue.tilt[inner] < GREATEST_TILT)
    voxels = np.argwhere(near) + margin
    chosen = rng.permutation(len(voxels))[:TRIES]
    return np.asarray(voxels[chosen], dtype=np.int64)


def _make_site(
    tissue: Tissue,
    centre: NDArray[np.int64],
    radius: float,
    *,
    kind: Kind,
    voxel_nm: tuple[float, float, float],
) -> Site | None:
    """Make a site at `centre` if the tissue there suits one."""
    pre = int(tissue.neurons[tuple(centre)])
    posts = _posts(tissue, centre, radius, pre, voxel_nm)
    if not posts:
        return None
    box, away = _ball(centre, radius + POST_NM, tissue.neurons.shape, voxel_nm)
    neurons = tissue.neurons[box]
    reach = _reach(away)
    contact = _contact(neurons, pre, posts, reach <= radius)
    if contact is None:
        return None
    depth = np.asarray(distance_transform_edt(~contact, sampling=voxel_nm), dtype=np.float32)
    inside = reach <= radius + 15.0
    side = np.where(neurons == pre, 1, np.where(np.isin(neurons, posts), 2, 0)) * inside
    ends = [away[:, (side == n) & (depth < deep)] for n, deep in ((1, PRE_NM), (2, POST_NM))]
    if min(end.shape[1] for end in ends) == 0:
        return None
    towards = ends[0].mean(1) - ends[1].mean(1)
    if np.linalg.norm(towards) < LEAST_FACING_NM:
        return None
    site = Site(
        kind=kind, centre_zyx=centre, radius_nm=radius, inward=towards / np.linalg.norm(towards),
        pre=pre, posts=posts, box=box, side=side.astype(np.uint8), depth_nm=depth,
    )  # fmt: skip
    return site if _is_sound(site, tissue, voxel_nm) else None


def _ball(
    centre: NDArray[np.int64], radius: float, size: tuple[int, ...], voxel_nm: tuple[float, float, float]
) -> tuple[tuple[slice, slice, slice], NDArray[np.float64]]:
    """Give the box around a ball, cut at the faces, and the (3, z, y, x) way in nm from the centre."""
    reach = np.ceil(radius / np.asarray(voxel_nm)).astype(int)
    low = np.maximum(centre - reach, 0)
    high = np.minimum(centre + reach + 1, size)
    axes = [(np.arange(a, b) - c) * v for a, b, c, v in zip(low, high, centre, voxel_nm, strict=True)]
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return (z, y, x), np.stack(np.meshgrid(*axes, indexing="ij"))


def _reach(away: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the distance in a norm whose balls are blunt along z.

    A round ball would end in sections that hold a sliver of the synapse, too faint for anyone to mark.
    """
    z, y, x = np.square(away)
    return np.asarray(np.sqrt(np.sqrt(np.square(z) + np.square(y + x))))


def _posts(
    tissue: Tissue,
    centre: NDArray[np.int64],
    radius: float,
    pre: int,
    voxel_nm: tuple[float, float, float],
) -> tuple[int, ...]:
    """Give the neurons that face `pre` within the ball, or none if the place does not suit a synapse."""
    box, away = _ball(centre, radius * 1.3, tissue.neurons.shape, voxel_nm)
    distance = _reach(away)
    own = tissue.neurons[box] == pre
    ball = distance <= 1.3 * radius
    if (own & ball & (tissue.membrane_nm[box] > 25.0)).sum() < LEAST_ROOM * ball.sum():
        return ()
    facing = tissue.across[box][own & (distance <= radius) & (tissue.membrane_nm[box] < max(voxel_nm[1:]))]
    ids, counts = np.unique(facing, return_counts=True)
    fair = counts >= FAIR_SHARE * counts.sum()
    posts = tuple(int(n) for n in ids[fair] if n != 0)
    if not 1 <= len(posts) <= 4 or counts[~fair].sum() > SLIVERS * counts.sum():
        return ()
    return posts


def _contact(
    neurons: NDArray[np.uint32], pre: int, posts: tuple[int, ...], ball: NDArray[np.bool_]
) -> NDArray[np.bool_] | None:
    """Give the pre voxels in the ball that touch a post, the largest connected piece of them."""
    post = np.isin(neurons, posts)
    touched = np.zeros_like(post)
    for axis in range(3):
        a: list[slice] = [slice(None)] * 3
        b: list[slice] = [slice(None)] * 3
        a[axis], b[axis] = slice(1, None), slice(None, -1)
        touched[tuple(a)] |= post[tuple(b)]
        touched[tuple(b)] |= post[tuple(a)]
    pieces, n = label(touched & (neurons == pre) & ball, structure=np.ones((3, 3, 3)))
    if n == 0:
        return None
    sizes = np.bincount(pieces.ravel())[1:]
    if sizes.max() < 0.85 * sizes.sum():
        return None
    return np.asarray(pieces == sizes.argmax() + 1)


def _is_sound(site: Site, tissue: Tissue, voxel_nm: tuple[float, float, float]) -> bool:
    """Tell whether every side of the site is large enough to be seen."""
    pre = (site.side == 1) & (site.depth_nm <= PRE_NM)
    post = (site.side == 2) & (site.depth_nm <= POST_NM)
    least = max(8.0, LEAST_POST_NM3 / float(np.prod(voxel_nm)))
    neurons = tissue.neurons[site.box]
    if np.count_nonzero(pre) < least:
        return False
    if any(np.count_nonzero(post & (neurons == n)) < least for n in site.posts):
        return False
    sections = min(3, tissue.neurons.shape[0])
    return all(np.count_nonzero(mask.any((1, 2))) >= sections for mask in (pre, post))


def label_sites(sites: list[Site], shape: tuple[int, ...]) -> NDArray[np.uint32]:
    """Give the `pairs` labels of the synapses among the sites, numbered in their order from 1."""
    labels = np.zeros(shape, np.uint32)
    for n, site in enumerate((s for s in sites if s.kind == "synapse"), start=1):
        view = labels[site.box]
        view[(site.side == 1) & (site.depth_nm <= PRE_NM)] = 2 * n - 1
        view[(site.side == 2) & (site.depth_nm <= POST_NM)] = 2 * n
    return labels


def partner_table(sites: list[Site], tissue: Tissue, *, grid: Grid) -> pd.DataFrame:
    """Give the true partner table, one row per synapse and post neuron (see `synmlops.volumes.table`)."""
    rows: list[dict[str, float]] = []
    for n, site in enumerate((s for s in sites if s.kind == "synapse"), start=1):
        pre = (site.side == 1) & (site.depth_nm <= PRE_NM)
        for neuron in site.posts:
            post = (site.side == 2) & (site.depth_nm <= POST_NM) & (tissue.neurons[site.box] == neuron)
            row: dict[str, float] = {"site": n, "partner": len(rows) + 1, "confidence": 1.0}
            row |= {"pre_neuron": site.pre, "post_neuron": neuron, "self_contact": False}
            rows.append(row | _geometry(site.box, pre, post, grid))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS) if rows else empty_table()


def _geometry(
    box: tuple[slice, slice, slice], pre: NDArray[np.bool_], post: NDArray[np.bool_], grid: Grid
) -> dict[str, float]:
    corner = np.array([part.start for part in box])
    row: dict[str, float] = {"pre_voxels": int(pre.sum()), "post_voxels": int(post.sum())}
    for name, mask in (("pre", pre), ("post", post)):
        point = _middle(mask, grid.voxel_nm) + corner
        for axis, at, size, start in zip("zyx", point, grid.voxel_nm, grid.offset_nm, strict=True):
            row |= {f"{name}_{axis}": int(at), f"{name}_{axis}_nm": start + int(at) * size}
    voxels = np.argwhere(pre | post) + corner
    for axis, low, high in zip("zyx", voxels.min(0), voxels.max(0) + 1, strict=True):
        row |= {f"{axis}0": int(low), f"{axis}1": int(high)}
    return row


def _middle(mask: NDArray[np.bool_], voxel_nm: tuple[float, float, float]) -> NDArray[np.int64]:
    """Give the voxel of the mask nearest its centre of mass."""
    voxels = np.argwhere(mask)
    away = (voxels - voxels.mean(0)) * voxel_nm
    return np.asarray(voxels[np.square(away).sum(1).argmin()], dtype=np.int64)
