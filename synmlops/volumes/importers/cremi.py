"""A file of the CREMI challenge into an image, `pairs` labels, a mask and the partner table.

Source: Funke, Saalfeld, Bock, Turaga, Perlman (2016), MICCAI challenge on circuit reconstruction from
electron microscopy images, cremi.org.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.cremi import (
    CLEFTS,
    LEAST_SPECIAL,
    NEURONS,
    NOTHING,
    POST_TYPE,
    PRE_TYPE,
    RAW,
    Annotations,
    grid_of,
    is_id,
    open_layer,
    read_annotations,
)
from synmlops.volumes.files import atomic_path
from synmlops.volumes.importers.cremi_clefts import Box, Surroundings, pieces_of
from synmlops.volumes.importers.cremi_sites import (
    CONTESTED,
    LOST_SIDE,
    NOT_ANNOTATED,
    Doubt,
    Pairs,
    Sites,
    capsules,
    claim_all,
    place_pairs,
)
from synmlops.volumes.importers.cremi_table import extents, table_of
from synmlops.volumes.labels import smallest_unsigned
from synmlops.volumes.prepared import UNTRUSTED
from synmlops.volumes.preparing import sides_of
from synmlops.volumes.store import Grid, Volume, hdf5_writer, open_volume
from synmlops.volumes.table import write_table

THICKNESS_NM = 60.0  # with half a cleft of the challenge, some 80 nm from the middle to where a side ends
REACH_NM = 150.0  # points are set in the middle of a density, well within this of its cleft
UNPAIRED = "annotations without a partner"
FAULTY = "pairs with an end outside the labels or in no neuron"


@dataclass(frozen=True, eq=False)
class CremiLabels:
    """What is made of a CREMI file, before it is written; arrays cover the labels, which raw may surpass.

    Attributes
    ----------
    source : Path
    grid : Grid
        Of the raw volume.
    shape_zyx : tuple of int
        Of the raw volume.
    box : tuple of slice
        The labels in the raw volume.
    label, neurons, mask : (z, y, x) array
        Pairs ids; neuron ids as in the file, 0 for none; 0 where the label is not to be trusted.
    partners : DataFrame
        Every annotated pair inside the labels, trusted or not; voxel indices are those of the raw volume.
    annotations : Annotations
    doubts : tuple of Doubt
        What was masked.
    """

    source: Path
    grid: Grid
    shape_zyx: tuple[int, int, int]
    box: Box
    label: NDArray[np.unsignedinteger]
    neurons: NDArray[np.unsignedinteger]
    mask: NDArray[np.uint8]
    partners: pd.DataFrame
    annotations: Annotations
    doubts: tuple[Doubt, ...]

    def sides(self, box: Box) -> NDArray[np.uint8]:
        """Give the codes of `synmlops.volumes.prepared` in a box of the raw volume."""
        sides = np.full(tuple(part.stop - part.start for part in box), UNTRUSTED, np.uint8)
        ours = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, self.box, strict=True)]
        if all(low < high for low, high in ours):
            theirs = tuple(slice(lo - a.start, hi - a.start) for (lo, hi), a in zip(ours, box, strict=True))
            here = tuple(
                slice(lo - b.start, hi - b.start) for (lo, hi), b in zip(ours, self.box, strict=True)
            )
            sides[theirs] = sides_of(self.label[here], "pairs", self.mask[here])
        return sides


def label_cremi(
    source: Path,
    *,
    thickness_nm: float = THICKNESS_NM,
    reach_nm: float = REACH_NM,
    leave_out_faulty: bool = False,
) -> CremiLabels:
    """Derive pairs labels from a CREMI file; nothing is written.

    Parameters
    ----------
    source : Path
        With raw, neuron ids, clefts and annotations.
    thickness_nm : float
        How far from the cleft tissue of the pre and the post neuron belongs to the synapse.
    reach_nm : float
        How far a cleft may lie from the line between the points of its pair.
    leave_out_faulty : bool
        Mask and list pairs with an end outside the labels or in no neuron, instead of refusing the file.

    Raises
    ------
    SynmlopsError
        If the file cannot be read, lacks a part or contradicts itself, or no pair could be labelled.

    Notes
    -----
    Memory: 11 to 18 bytes for each voxel of the labels, by the width of the ids, and some 400 for each voxel
    of a cleft; raw is not read.
    """
    for name, value in (("thickness", thickness_nm), ("reach", reach_nm)):
        if not (value > 0 and math.isfinite(value)):
            raise SynmlopsError(f"{name} {value}: must be a positive number of nm")
    annotations = read_annotations(source)
    _check_types(source, annotations)
    with ExitStack() as stack:
        raw, in_neurons, in_clefts = (
            stack.enter_context(open_layer(source, name)) for name in (RAW, NEURONS, CLEFTS)
        )
        box = _box_of_labels(raw, in_neurons, in_clefts)
        grid, origin = grid_of(raw), grid_of(in_neurons).offset_nm
        mask = np.ones(in_neurons.shape, np.uint8)
        neurons = _read_neurons(in_neurons, mask)
        pairs = _pairs_of(annotations, neurons, grid_of(in_neurons))
        faulty = _faulty(source, pairs, neurons.shape, grid.voxel_nm, leave_out=leave_out_faulty)
        clefts = pieces_of(_cleft_slabs(in_clefts, mask), in_clefts.shape)
        shape = (raw.shape[0], raw.shape[1], raw.shape[2])
    beside = Surroundings(clefts, neurons.shape, voxel_nm=grid.voxel_nm, thickness_nm=thickness_nm)
    sites = place_pairs(pairs, beside, neurons, reach_nm=reach_nm)
    label, doubts = _labelled(sites, pairs, beside, neurons, mask)
    alone, points = _unpaired(annotations, origin)
    lost = _mask_hidden(pairs, sites.site, points, label, mask, neurons, beside)
    doubts += [
        Doubt(kind, f"pair {pairs.name(row)}", _middle(pairs.points_nm[row]))
        for kind, rows in (*sites.doubts.items(), (LOST_SIDE, lost), (FAULTY, faulty))
        for row in rows
    ]
    doubts += alone
    if not label.any():
        raise SynmlopsError(
            f"{source}: none of its {len(pairs.ids)} pairs lies at a cleft between its two neurons, so "
            f"there is nothing to label; check the offsets, or raise the reach ({reach_nm:g} nm)"
        )
    start = np.array([part.start for part in box])
    table = table_of(annotations, pairs, sites.site, label, neurons, grid=grid, start_zyx=start)
    moved = tuple(Doubt(each.kind, each.what, _moved(each.at_nm, origin)) for each in doubts)
    return CremiLabels(source, grid, shape, box, label, neurons, mask, table, annotations, moved)


def write_labels(
    made: CremiLabels, dest: Path, name: str, *, attrs: Mapping[str, Any]
) -> tuple[Path, Path, Path]:
    """Write DEST/NAME.h5 (image, label, neurons, mask), DEST/NAME_partners.parquet and DEST/NAME_doubts.csv.

    The image keeps its padding; there the mask is 0. The HDF5 file gets `attrs` beside its own. All files
    appear when all are complete.

    Raises
    ------
    SynmlopsError
        If the place is full or cannot be written.
    """
    path = dest / f"{name}.h5"
    table, listing = dest / f"{name}_partners.parquet", dest / f"{name}_doubts.csv"
    forms: dict[str, tuple[tuple[int, ...], Any]] = {
        "label": (made.shape_zyx, made.label.dtype),
        "neurons": (made.shape_zyx, made.neurons.dtype),
        "mask": (made.shape_zyx, np.uint8),
    }
    with ExitStack() as files:
        raw = files.enter_context(open_volume(f"{made.source}::{RAW}"))
        forms["image"] = (made.shape_zyx, raw.dtype)
        out = files.enter_context(
            hdf5_writer(path, forms, grid=made.grid, attrs={"label_kind": "pairs", **attrs})
        )
        write_table(made.partners, files.enter_context(atomic_path(table)))
        _doubt_table(made.doubts).to_csv(files.enter_context(atomic_path(listing)), index=False)
        for z, slab in raw.slabs():
            out["image"][z : z + len(slab)] = slab
        for part in ("label", "neurons", "mask"):
            out[part][made.box] = getattr(made, part)
    return path, table, listing


def _doubt_table(doubts: tuple[Doubt, ...]) -> pd.DataFrame:
    rows = [(each.kind, each.what, *each.at_nm) for each in doubts]
    return pd.DataFrame(rows, columns=["kind", "what", "z_nm", "y_nm", "x_nm"])


def _check_types(source: Path, annotations: Annotations) -> None:
    """Refuse a file without pairs, and pairs whose points are not marked as pre and post."""
    if not len(annotations.partners):
        raise SynmlopsError(
            f"{source}: has no annotated partners, labels are made from them; give a training file (the test "
            "files of the challenge have none)"
        )
    for ids, rows in zip(annotations.partners, annotations.partner_rows, strict=True):
        for row, wanted in zip(rows, (PRE_TYPE, POST_TYPE), strict=True):
            if annotations.types[row] != wanted:
                raise SynmlopsError(
                    f"{source}: the pair {ids[0]} -> {ids[1]} needs annotation {annotations.ids[row]} as a "
                    f"{wanted}, but it is a {annotations.types[row] or 'point of no type'}; mend types or "
                    f"partners"
                )


def _box_of_labels(raw: Volume, neurons: Volume, clefts: Volume) -> Box:
    """Give where in raw the labels lie; raw may be larger."""
    grid, inner = grid_of(raw), grid_of(neurons)
    if clefts.shape != neurons.shape or grid_of(clefts) != inner:
        raise SynmlopsError(
            f"{clefts.name}: has shape {clefts.shape} and {grid_of(clefts)}, the neuron ids {neurons.shape} "
            f"and {inner}; both must cover the same voxels"
        )
    if grid.voxel_nm != inner.voxel_nm:
        raise SynmlopsError(
            f"{neurons.name}: has voxels of {inner.voxel_nm} nm, the raw volume of {grid.voxel_nm}; "
            "resample one or mend `resolution`"
        )
    start = (np.array(inner.offset_nm) - grid.offset_nm) / grid.voxel_nm
    first = np.rint(start).astype(int)
    stop = first + neurons.shape
    if np.abs(start - first).max() > 0.01 or first.min() < 0 or (stop > raw.shape).any():
        raise SynmlopsError(
            f"{neurons.name}: begins {start.tolist()} voxels (z y x) into the raw volume and has "
            f"{neurons.shape} of its {raw.shape}; labels must lie on whole voxels inside it, check the "
            f"attribute `offset`"
        )
    z, y, x = (slice(int(a), int(b)) for a, b in zip(first, stop, strict=True))
    return z, y, x


def _read_neurons(volume: Volume, mask: NDArray[np.uint8]) -> NDArray[np.unsignedinteger]:
    """Read the neuron ids, 0 for none, in 32 bits where they fit; mask what was not looked at."""
    neurons: NDArray[np.unsignedinteger] = np.empty(volume.shape, np.uint32)
    for z, slab in volume.slabs():
        here = slice(z, z + len(slab))
        known = is_id(slab)
        mask[here][~known & (slab >= LEAST_SPECIAL) & (slab != NOTHING)] = 0
        slab = np.where(known, slab, 0)
        if slab.max() > np.iinfo(neurons.dtype).max:
            neurons = neurons.astype(np.uint64)
        neurons[here] = slab
    return neurons


def _cleft_slabs(volume: Volume, mask: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Give the slabs of the clefts, and mask what was not looked at for clefts."""
    for z, slab in volume.slabs():
        mask[z : z + len(slab)][(slab >= LEAST_SPECIAL) & (slab != NOTHING)] = 0
        yield z, slab


def _pairs_of(annotations: Annotations, neurons: NDArray[np.unsignedinteger], grid: Grid) -> Pairs:
    points = annotations.pairs_nm(grid.offset_nm)
    index = np.rint(points / np.asarray(grid.voxel_nm)).astype(int)
    inside = ((index >= 0) & (index < neurons.shape)).all(axis=-1)
    found = np.zeros(index.shape[:2], np.uint64)
    found[inside] = neurons[tuple(index[inside].T)]
    return Pairs(points, found, annotations.partners)


def _faulty(
    source: Path, pairs: Pairs, shape: tuple[int, ...], voxel_nm: tuple[float, ...], *, leave_out: bool
) -> list[int]:
    """Refuse, or list, pairs with an end outside the labels or in no neuron."""
    index = np.rint(pairs.points_nm / np.asarray(voxel_nm)).astype(int)
    outside = ~((index >= 0) & (index < shape)).all(axis=-1)
    rows = [int(row) for row in np.flatnonzero((pairs.neurons == 0).any(axis=1))]
    if not rows or leave_out:
        return rows
    lost = outside if outside.any() else pairs.neurons == 0
    row, side = np.argwhere(lost)[0]
    where = "lies outside the labels" if outside.any() else "lies in no neuron (background of neuron_ids)"
    raise SynmlopsError(
        f"{source}: annotation {pairs.ids[row, side]} {where}, at voxel {index[row, side].tolist()} (z y x) "
        f"of {tuple(shape)}; {len(rows)} of {len(pairs.ids)} pairs have such an end; check the offsets of "
        f"annotations and labels, or leave these pairs out and mask their tissue with --leave-out-faulty"
    )


def _labelled(
    sites: Sites,
    pairs: Pairs,
    surroundings: Surroundings,
    neurons: NDArray[np.unsignedinteger],
    mask: NDArray[np.uint8],
) -> tuple[NDArray[np.unsignedinteger], list[Doubt]]:
    """Give the labels of the sites; what is not known becomes 0 there and in the mask."""
    claims, nobodys = claim_all(sites, pairs, surroundings, neurons)
    label, n_sites = claims.label, int(sites.site.max(initial=0))
    clefts, size = surroundings.clefts, np.asarray(surroundings.voxel_nm)
    doubts = [
        Doubt(
            NOT_ANNOTATED, f"cleft {clefts.ids[k]}, {len(clefts.of(k))} voxels", _middle(clefts.of(k) * size)
        )
        for k in nobodys
    ]
    lost = np.bincount((label[claims.contested].astype(np.int64) + 1) // 2, minlength=n_sites + 2)
    middles = {n: _middle(pairs.points_nm[sites.site == n].reshape(-1, 3)) for n in sites.pieces}
    doubts += [Doubt(CONTESTED, f"site {n}, {lost[n]} voxels", middles[n]) for n in middles if lost[n]]
    for section, trusted, contested in zip(label, mask, claims.contested, strict=True):
        trusted[contested | (section == claims.unknown)] = 0
        section[trusted == 0] = 0
    return label.astype(smallest_unsigned(max(1, 2 * n_sites)), copy=False), doubts


def _mask_hidden(
    pairs: Pairs,
    site: NDArray[np.int64],
    points_nm: NDArray[np.float64],
    label: NDArray[np.unsignedinteger],
    mask: NDArray[np.uint8],
    neurons: NDArray[np.unsignedinteger],
    surroundings: Surroundings,
) -> list[int]:
    """Mask the tissue about points (N, 3) and about pairs that the label does not show both sides of.

    What is masked may have been a side of another pair, which is then masked too. Gives the pairs that had
    a site and lost a side.
    """

    def hide(ends_nm: NDArray[np.float64]) -> None:
        voxel_nm, radius_nm = surroundings.voxel_nm, surroundings.thickness_nm
        for box, inside in capsules(ends_nm, shape=mask.shape, voxel_nm=voxel_nm, radius_nm=radius_nm):
            mask[box][inside], label[box][inside] = 0, 0

    hide(np.stack((points_nm, points_nm), axis=1))
    hidden = site == 0
    hide(pairs.points_nm[hidden])
    while True:
        sizes, _, _ = extents(pairs, site, label, neurons)
        new = ~hidden & ~(sizes > 0).all(axis=1)
        if not new.any():
            return [int(row) for row in np.flatnonzero(hidden & (site > 0))]
        hide(pairs.points_nm[new])
        hidden |= new
        _drop(np.setdiff1d(site[hidden], site[~hidden]), label, mask)


def _drop(sites: NDArray[np.int64], label: NDArray[np.unsignedinteger], mask: NDArray[np.uint8]) -> None:
    """Mask what is left of sites of which no pair is shown."""
    ids = np.concatenate((2 * sites - 1, 2 * sites))
    kept = np.arange(max(int(label.max()), int(ids.max(initial=0))) + 1).astype(label.dtype)
    kept[ids[ids > 0]] = 0
    for section, trusted in zip(label, mask, strict=True):
        left = kept[section]
        trusted[left != section] = 0
        section[...] = left


def _unpaired(
    annotations: Annotations, origin_nm: tuple[float, float, float]
) -> tuple[list[Doubt], NDArray[np.float64]]:
    """List the annotations in no pair, and give their points."""
    alone = np.flatnonzero(~np.isin(annotations.ids, annotations.partners))
    points = annotations.locations_nm[alone] + (np.asarray(annotations.offset_nm) - origin_nm)
    listed = [
        Doubt(UNPAIRED, f"{annotations.ids[row]}, a {annotations.types[row]}", _middle(point[None]))
        for row, point in zip(alone, points, strict=True)
    ]
    return listed, points


def _middle(points_nm: NDArray[np.float64]) -> tuple[float, float, float]:
    z, y, x = points_nm.mean(axis=0).tolist()
    return z, y, x


def _moved(
    at_nm: tuple[float, float, float], by_nm: tuple[float, float, float]
) -> tuple[float, float, float]:
    z, y, x = (a + b for a, b in zip(at_nm, by_nm, strict=True))
    return z, y, x
