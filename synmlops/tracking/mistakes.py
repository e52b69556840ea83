"""Where a prediction is wrong, and which sections and windows show most of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from synmlops.synapses.instances import Instances, sites_of
from synmlops.synapses.matching import Overlaps, match_overlaps, overlaps_of
from synmlops.synapses.metrics import direction_of

Kind = Literal["missed", "false", "reversed"]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Mistake:
    """A synapse that was missed, invented, or found with its sides swapped.

    Attributes
    ----------
    kind : {"missed", "false", "reversed"}
    site : int
        Id in the truth; in the prediction for a false one.
    other : int or None
        Id, on the other side, of what overlaps it most.
    iou : float
        With that one; 0 if nothing overlaps.
    voxels : int
    """

    kind: Kind
    site: int
    other: int | None
    iou: float
    voxels: int

    @property
    def gravity(self) -> tuple[bool, int]:
        """What to sort by: what nothing overlaps comes first, then the largest."""
        return self.kind != "reversed" and self.iou > 0, -self.voxels


def mistakes_of(predicted: Instances, true: Instances, *, sides: bool, iou: float) -> list[Mistake]:
    """List what the detection score counts as wrong, the gravest of each kind first.

    Grave is what nothing overlaps, and of those the largest.

    Parameters
    ----------
    predicted, true : (Z, Y, X) array of unsigned int
        Pairs convention if `sides`, else one id per synapse.
    sides : bool
    iou : float
        Least intersection over union of a match, as in the score.

    Examples
    --------
    >>> true = np.array([[[1, 1, 2, 2, 0, 0, 3, 4]]], np.uint16)
    >>> predicted = np.array([[[2, 2, 1, 1, 5, 0, 0, 0]]], np.uint16)
    >>> for mistake in mistakes_of(predicted, true, sides=True, iou=0.5):
    ...     print(mistake.kind, mistake.site, mistake.other, mistake.voxels)
    missed 2 None 2
    false 3 None 1
    reversed 1 1 4
    """
    by_side = overlaps_of(predicted, true)
    table = by_side.by_site() if sides else by_side
    matches = match_overlaps(table, iou=iou)
    missed = _unmatched(table, matches[:, 1], kind="missed")
    false = _unmatched(table, matches[:, 0], kind="false")
    reversed_ = [
        Mistake(
            "reversed",
            site=int(table.true_ids[t]),
            other=int(table.predicted_ids[p]),
            iou=_iou_of(table, p, t),
            voxels=int(table.true_voxels[t]),
        )
        for p, t in (_reversed(by_side, table, matches) if sides else matches[:0])
    ]
    return [*missed, *false, *sorted(reversed_, key=lambda mistake: mistake.gravity)]


@dataclass(frozen=True, eq=False)
class SiteVoxels:
    """The voxels of each site of a volume, so that one pass over the volume serves all questions."""

    shape: tuple[int, ...]
    ids: Instances  # (S,) ascending
    starts: Indices  # (S + 1,) where the voxels of each site begin
    flat: Indices  # (N,) by site, then scan order

    @classmethod
    def of(cls, instances: Instances, *, sides: bool) -> Self:
        """Collect the voxels of all sites."""
        flat = np.flatnonzero(instances)
        ids = instances.reshape(-1)[flat]
        site = sites_of(ids) if sides else ids
        order = np.argsort(site, kind="stable")
        unique, starts = np.unique(site[order], return_index=True)
        return cls(instances.shape, unique, np.append(starts, len(flat)), flat[order])

    def voxels_of(self, site: int) -> Indices:
        """Give z, y, x of each voxel of a site, (N, 3)."""
        place = int(np.searchsorted(self.ids, site))
        flat = self.flat[self.starts[place] : self.starts[place + 1]]
        return np.stack(np.unravel_index(flat, self.shape), axis=1)

    def centre_of(self, site: int) -> tuple[tuple[int, int, int], tuple[slice, slice]]:
        """Give the section where most of a site lies: a central voxel of it there, and its box in y and x.

        Examples
        --------
        >>> SiteVoxels.of(np.array([[[0, 1, 1, 2]], [[0, 1, 0, 0]]], np.uint8), sides=True).centre_of(1)
        ((0, 0, 2), (slice(0, 1, None), slice(1, 4, None)))
        """
        voxels = self.voxels_of(site)
        z = int(np.bincount(voxels[:, 0]).argmax())
        section = voxels[voxels[:, 0] == z, 1:]
        off = np.abs(section - section.mean(axis=0)).sum(axis=1)
        y, x = section[off.argmin()].tolist()
        (y0, x0), (y1, x1) = section.min(axis=0).tolist(), section.max(axis=0).tolist()
        return (z, y, x), (slice(y0, y1 + 1), slice(x0, x1 + 1))

    def by_section(self) -> Iterator[tuple[int, int]]:
        """Give section and site, once each."""
        z = self.flat // math.prod(self.shape[1:])
        site = np.repeat(np.arange(len(self.ids)), np.diff(self.starts))
        first = (np.diff(site, prepend=-1) != 0) | (np.diff(z, prepend=-1) != 0)
        return zip(z[first].tolist(), self.ids[site[first]].tolist(), strict=True)


def telling_sections(volumes: Sequence[SiteVoxels], *, most: int) -> list[int]:
    """Choose sections that between them show as many sites as possible, in ascending order.

    Parameters
    ----------
    volumes : sequence of SiteVoxels
        Of the prediction and, where it is known, the truth.
    most : int
        How many to choose; fewer if those show all there is.

    Examples
    --------
    >>> labels = np.array([[[1, 0]], [[1, 2]], [[0, 2]], [[3, 0]]], np.uint8)
    >>> telling_sections([SiteVoxels.of(labels, sides=False)], most=3)
    [1, 3]
    """
    sites: dict[int, set[tuple[int, int]]] = {}
    for volume, voxels in enumerate(volumes):
        for z, site in voxels.by_section():
            sites.setdefault(z, set()).add((volume, site))
    chosen: list[int] = []
    seen: set[tuple[int, int]] = set()
    while len(chosen) < most and sites:
        best = max(sites, key=lambda z: (len(sites[z] - seen), len(sites[z]), -z))
        if sites[best] <= seen:
            break
        chosen.append(best)
        seen |= sites.pop(best)
    return sorted(chosen)


def telling_window(marked_yx: NDArray[np.bool_], *, size_yx: tuple[int, int]) -> tuple[slice, slice]:
    """Choose the window of a section, at most `size_yx` voxels, that holds most marked voxels, roughly.

    Examples
    --------
    >>> marked = np.zeros((4, 40), bool)
    >>> marked[0, 35] = True
    >>> telling_window(marked, size_yx=(10, 10))
    (slice(0, 4, None), slice(30, 40, None))
    """
    y, x = np.nonzero(marked_yx)
    half = [max(size // 2, 1) for size in size_yx]
    cells = np.zeros([n // h + 2 for n, h in zip(marked_yx.shape, half, strict=True)], np.int64)
    np.add.at(cells, (y // half[0], x // half[1]), 1)
    four = cells[:-1, :-1] + cells[1:, :-1] + cells[:-1, 1:] + cells[1:, 1:]  # as large as the window
    corner = np.unravel_index(int(four.argmax()), four.shape)
    centre = [(int(c) + 1) * h for c, h in zip(corner, half, strict=True)]
    return window_round(centre, size_yx=size_yx, shape_yx=marked_yx.shape)


def window_round(
    centre_yx: Sequence[int], *, size_yx: tuple[int, int], shape_yx: Sequence[int]
) -> tuple[slice, slice]:
    """Give the window of `size_yx` voxels round a voxel, moved and if need be cut to lie in the section.

    Examples
    --------
    >>> window_round((1, 50), size_yx=(10, 10), shape_yx=(5, 100))
    (slice(0, 5, None), slice(45, 55, None))
    """
    low = [
        min(max(c - size // 2, 0), max(n - size, 0))
        for c, size, n in zip(centre_yx, size_yx, shape_yx, strict=True)
    ]
    y, x = (slice(a, min(a + size, n)) for a, size, n in zip(low, size_yx, shape_yx, strict=True))
    return y, x


def _unmatched(table: Overlaps, matched: Indices, *, kind: Literal["missed", "false"]) -> list[Mistake]:
    """List the unmatched true (`missed`) or predicted (`false`) sites."""
    own, far = (1, 0) if kind == "missed" else (0, 1)
    ids, far_ids = (table.predicted_ids, table.true_ids)[own], (table.predicted_ids, table.true_ids)[far]
    voxels = (table.predicted_voxels, table.true_voxels)[own]
    best: dict[int, tuple[float, int]] = {}
    for pair, iou in zip(table.pairs.tolist(), table.iou().tolist(), strict=True):
        best[pair[own]] = max(best.get(pair[own], (0.0, -1)), (iou, pair[far]))
    found = []
    for place in np.setdiff1d(np.arange(len(ids)), matched).tolist():
        iou, other = best.get(place, (0.0, -1))
        far_id = int(far_ids[other]) if other >= 0 else None
        found.append(Mistake(kind, int(ids[place]), far_id, iou, int(voxels[place])))
    return sorted(found, key=lambda mistake: mistake.gravity)


def _reversed(by_side: Overlaps, sites: Overlaps, matches: Indices) -> Indices:
    """Give the matches that the direction score counts as wrong, found by halving: they are few."""
    if not len(matches) or direction_of(by_side, sites, matches).right == len(matches):
        return matches[:0]
    if len(matches) == 1:
        return matches
    half = len(matches) // 2
    parts = [_reversed(by_side, sites, part) for part in (matches[:half], matches[half:])]
    return np.concatenate(parts)


def _iou_of(table: Overlaps, predicted: int, true: int) -> float:
    same = (table.pairs[:, 0] == predicted) & (table.pairs[:, 1] == true)
    return float(table.iou()[same].sum())
