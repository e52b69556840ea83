"""Copy-paste of synapses: one from elsewhere, with its surroundings, set into free tissue of a patch.

Rare synapses turn up in more surroundings than they were labelled in. Source: Ghiasi et al. 2021,
arXiv:2012.07177, for objects in photographs; here the surroundings go along and fade out, since what makes a
synapse out are its neighbours (vesicles, a membrane on either side) as much as its density.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from synmlops.learning.sampling import LabelledRegion
from synmlops.params import SynmlopsError
from synmlops.volumes.prepared import BACKGROUND, UNTRUSTED, Box, PreparedVolume
from synmlops.volumes.sites import MIDDLE, START, STOP

WHOLE_NM, GONE_NM = 50.0, 100.0
"""From a synapse: up to which its surroundings replace the target's, and from which they are gone."""

TRIES = 8
"""Places looked at for each synapse; with none of them free it is left out."""

GREATEST_GAIN = 1.25
"""By which grey values are stretched or shrunk to match."""

_KEPT = 512  # donors, cut out and weighed, of about 0.3 MB each; one that was dropped costs 2 ms

Grey = NDArray[np.unsignedinteger]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Paste:
    """One synapse to be pasted, drawn without a voxel."""

    donor: int  # row of the donors
    flips: tuple[bool, ...]  # along z, y, x
    transposed: bool  # y and x
    places: NDArray[np.float64]  # (TRIES, 3), shares of the box in which the middle may lie


@dataclass(frozen=True)
class _Site:
    """Where a donor lies."""

    volume: PreparedVolume
    box: Box  # of the synapse and its surroundings
    middle_zyx: tuple[int, int, int]  # in the box
    ends: tuple[tuple[bool, bool], ...]  # along y and x: whether the region ends before the surroundings do


@dataclass(frozen=True)
class Donor:
    """A synapse and its surroundings, cut out of its volume; all (z, y, x)."""

    image: Grey
    sides: NDArray[np.uint8]  # codes of the synapse's own voxels, `BACKGROUND` elsewhere
    weight: NDArray[np.float16]  # share of the donor in the blend: 1 in the synapse, 0 from `GONE_NM` on

    def turned(self, paste: Paste) -> "Donor":
        """Flip and transpose as drawn; views."""
        axes = tuple(axis for axis in range(3) if paste.flips[axis])
        order = (0, 2, 1) if paste.transposed else (0, 1, 2)

        def turn(part: NDArray[Scalar]) -> NDArray[Scalar]:
            return np.flip(part, axes).transpose(order)

        return Donor(turn(self.image), turn(self.sides), turn(self.weight))

    def part(self, slices: tuple[slice, ...]) -> "Donor":
        """Give a box of it; views."""
        return Donor(self.image[slices], self.sides[slices], self.weight[slices])


class Donors:
    """The synapses that lie in the regions without touching a face; no voxel beyond is ever read.

    Surroundings go as far as the region does, and fade out towards its faces in plane.

    Parameters
    ----------
    regions : sequence of LabelledRegion
        Of the training tissue alone.

    Raises
    ------
    SynmlopsError
        If there is none.
    """

    def __init__(self, regions: Sequence[LabelledRegion]) -> None:
        self._sites: list[_Site] = []
        by_known: dict[tuple[bool, ...], list[int]] = {}
        for region in regions:
            found = list(_whole_sites(region))
            rows = range(len(self._sites), len(self._sites) + len(found))
            by_known.setdefault(region.known, []).extend(rows)
            self._sites += found
        if not self._sites:
            raise SynmlopsError(
                "augment.copy_paste: every synapse of the training regions is cut by a face of its region; "
                "set its probability to 0"
            )
        self._by_known = {known: np.array(rows) for known, rows in by_known.items() if rows}
        self.cut = lru_cache(maxsize=_KEPT)(self._cut)

    def draw(self, rng: np.random.Generator, *, known: tuple[bool, ...], n: int) -> tuple[Paste, ...]:
        """Draw what to paste into a patch: n donors that know the same channels, or nothing without such."""
        rows = self._by_known.get(known)
        if rows is None:
            return ()
        return tuple(
            Paste(
                donor=int(rng.choice(rows)),
                flips=tuple(bool(flip) for flip in rng.random(3) < 0.5),
                transposed=bool(rng.random() < 0.5),
                places=rng.random((TRIES, 3)),
            )
            for _ in range(n)
        )

    def _cut(self, row: int) -> Donor:
        site = self._sites[row]
        volume, box, at = site.volume, site.box, site.middle_zyx
        sides = np.array(volume.sides[box.slices])
        foreground = (sides != BACKGROUND) & (sides != UNTRUSTED)
        if volume.kind == "pairs":
            numbers = (volume.label[box.slices].astype(np.int64) + 1) // 2
            own = foreground & (numbers == numbers[at])
        else:
            components = cc3d.connected_components(foreground, connectivity=26)
            own = components == components[at]
        foreign = (sides != BACKGROUND) & ~own
        weight = _blend_weight(own, foreign=foreign, ends=site.ends, voxel_nm=volume.grid.voxel_nm)
        return Donor(np.array(volume.image[box.slices]), np.where(own, sides, BACKGROUND), weight)


def _whole_sites(region: LabelledRegion) -> Iterator[_Site]:
    """Give the synapses that no face of the region cuts, each with as much around it as the region has."""
    rim = np.ceil(GONE_NM / np.array(region.volume.grid.voxel_nm)).astype(np.int64) - 1
    first, last = np.array(region.box.start_zyx), np.array(region.box.stop_zyx)
    sites = region.volume.sites.astype(np.int64)
    whole = (sites[:, START] > first) & (sites[:, STOP] < last)
    for row in sites[whole.all(axis=1)]:
        start, stop = np.maximum(row[START] - rim, first), np.minimum(row[STOP] + rim, last)
        (z0, y0, x0), (z1, y1, x1), (z, y, x) = (at.tolist() for at in (start, stop, row[MIDDLE] - start))
        ends = tuple(
            (bool(before), bool(after))
            for before, after in zip(start > row[START] - rim, stop < row[STOP] + rim, strict=True)
        )
        yield _Site(region.volume, Box((z0, y0, x0), (z1, y1, x1)), (z, y, x), ends[1:])


def paste_into(
    image: Grey,
    sides: NDArray[np.uint8],
    *,
    pastes: Sequence[Paste],
    donors: Donors,
    inner_zyx: tuple[int, ...],
) -> int:
    """Set synapses into a patch where it is free.

    A place is free if the synapse and its surroundings cover no foreground and no untrusted voxel. A synapse
    at the border of the patch is cut off there.

    Parameters
    ----------
    image : (z, y, x) array of uint8 or uint16
        Changed in place.
    sides : (z, y, x) array of uint8
        Codes of `synmlops.volumes.prepared`; changed in place.
    pastes : sequence of Paste
        What `Donors.draw` drew.
    donors : Donors
    inner_zyx : tuple of int
        Size of the box in the middle of the patch in which the middle of a synapse may come to lie.

    Returns
    -------
    n : int
        Synapses that found a place.
    """
    n_pasted = 0
    inner = np.minimum(inner_zyx, image.shape)
    margin = (np.array(image.shape) - inner) // 2
    for paste in pastes:
        donor = donors.cut(paste.donor).turned(paste)
        middles = margin + (paste.places * inner).astype(np.int64)
        for start in middles - np.array(donor.image.shape) // 2:
            into, of = _overlap(start, donor.image.shape, image.shape)
            part = donor.part(of)
            if part.sides.any() and not (sides[into] != BACKGROUND)[part.weight > 0].any():
                _blend(image[into], sides[into], part)
                n_pasted += 1
                break
    return n_pasted


def _overlap(
    start: NDArray[np.int64], size: tuple[int, ...], whole: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Give the common box of a piece set at `start` and the whole, as slices of the whole and the piece."""
    low, high = np.maximum(start, 0), np.minimum(start + size, whole)
    into = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    of = tuple(slice(int(a), int(b)) for a, b in zip(low - start, high - start, strict=True))
    return into, of


def _blend(image: Grey, sides: NDArray[np.uint8], donor: Donor) -> None:
    """Blend a donor in where it lies; its surroundings take on the grey level of those that they replace."""
    weight = donor.weight.astype(np.float32)
    own = donor.sides != BACKGROUND
    piece, target = donor.image.astype(np.float32), image.astype(np.float32)
    around = ((weight > 0) & ~own).astype(np.float32)
    piece_mean, piece_std = _levels(piece, around)
    target_mean, target_std = _levels(target, around)
    ratio = (target_std + 1) / (piece_std + 1)  # a grey level of rounding, where there is no texture
    gain = np.clip(ratio, 1 / GREATEST_GAIN, GREATEST_GAIN)
    matched = (piece - piece_mean) * gain + target_mean
    blended = target + weight * (matched - target)
    image[...] = np.rint(blended).clip(0, np.iinfo(image.dtype).max).astype(image.dtype)
    sides[own] = donor.sides[own]


def _levels(image: NDArray[np.float32], where: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Give the mean of each section where there is weight, and the deviation from these over all sections."""
    n = where.sum(axis=(1, 2), keepdims=True)
    total = max(float(n.sum()), 1.0)
    everywhere = float((image * where).sum()) / total
    means = np.where(n > 0, (image * where).sum(axis=(1, 2), keepdims=True) / np.maximum(n, 1), everywhere)
    return means, float(np.sqrt((where * (image - means) ** 2).sum() / total))


def _blend_weight(
    own: NDArray[np.bool_],
    *,
    foreign: NDArray[np.bool_],
    ends: tuple[tuple[bool, bool], ...],
    voxel_nm: tuple[float, float, float],
) -> NDArray[np.float16]:
    """Give the donor's weight: 1 in the synapse and near it, fading outwards and towards what is foreign.

    Foreign is also what lies beyond an end; along z nothing fades there, since sections differ anyway.

    Other synapses are not pasted, for nothing would be left of them but an image without a label.
    """
    away = distance_transform_edt(~own, sampling=voxel_nm)
    fade = GONE_NM - WHOLE_NM
    weight = np.clip((GONE_NM - away) / fade, 0, 1)
    if foreign.any() or np.any(ends):
        beyond = [(0, 0), *((int(before), int(after)) for before, after in ends)]
        near = distance_transform_edt(~np.pad(foreign, beyond, constant_values=True), sampling=voxel_nm)
        near = near[
            tuple(slice(before, before + n) for (before, _), n in zip(beyond, own.shape, strict=True))
        ]
        weight = np.minimum(weight, np.clip((near - min(voxel_nm)) / fade, 0, 1))
        weight[own] = 1
    smooth: NDArray[np.float16] = (weight * weight * (3 - 2 * weight)).astype(np.float16)
    return smooth
