"""Instances to the partner table: one row per pre-post pair, told apart by post neuron or by component.

All work is on the voxels of the instances, sorted and counted; nothing walks the volume site by site.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from synmlops.params import SCALE
from synmlops.synapses.instances import Instances, Probabilities, components_of, sites_of
from synmlops.volumes.table import COLUMNS, empty_table

Indices = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class _Voxels:
    """Some of the non-zero voxels of the instances, in scan order."""

    index: NDArray[np.int64]  # (N, 3) z y x
    site: NDArray[np.int64]  # (N,) place among the sites
    part: NDArray[np.int64]  # (N,) what tells the parts of a site apart: neuron place, or component
    union: NDArray[np.int64]  # (N,) uint8 union probability, or 255

    def where(self, chosen: NDArray[np.bool_]) -> "_Voxels":
        return _Voxels(self.index[chosen], self.site[chosen], self.part[chosen], self.union[chosen])


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Groups of voxels, ascending by site and then part."""

    site: NDArray[np.int64]  # (K,)
    part: NDArray[np.int64]  # (K,)
    voxels: NDArray[np.int64]  # (K,)
    union: NDArray[np.int64]  # (K,) sum over the voxels
    low: NDArray[np.int64]  # (K, 3) bounding box, half open
    high: NDArray[np.int64]  # (K, 3)
    point: NDArray[np.int64]  # (K, 3) the voxel nearest to the centroid

    def where(self, chosen: NDArray[np.bool_] | Indices) -> "_Pieces":
        return _Pieces(
            self.site[chosen],
            self.part[chosen],
            self.voxels[chosen],
            self.union[chosen],
            self.low[chosen],
            self.high[chosen],
            self.point[chosen],
        )


def partners_of(
    instances: Instances,
    *,
    voxel_nm: Sequence[float],
    offset_nm: Sequence[float] = (0.0, 0.0, 0.0),
    probabilities_czyx: Probabilities | None = None,
    neurons: NDArray[np.integer] | None = None,
    min_side_voxels: int = 0,
) -> pd.DataFrame:
    """List the synaptic partners of decoded, or of true, instances.

    Parameters
    ----------
    instances : (Z, Y, X) array of unsigned int
        Pairs convention: site n has pre 2n-1 and post 2n.
    voxel_nm, offset_nm : sequence of 3 float
        Voxel size, and world position of voxel (0, 0, 0); nm, z y x.
    probabilities_czyx : (3, Z, Y, X) array of uint8, optional
        Pre, post, union. The confidence of a row is the mean union probability over the voxels of its pre
        side and its post piece; 1 where this is not given.
    neurons : (Z, Y, X) array of int, optional
        Neuron id of each voxel, 0 for none. The post side is then split by neuron, otherwise into its
        26-connected components. Voxels of neuron 0 make a piece only where the side lies in no neuron.
    min_side_voxels : int, default 0
        A smaller post piece is no partner, but the largest piece of a site always stays.

    Returns
    -------
    table : DataFrame
        Columns and types of `synmlops.volumes.table.COLUMNS`, ascending by site and then by post neuron
        or scan order; `partner` counts the rows from 1. A site without a pre or a post side gives no row. The
        pre neuron is the one with most voxels of the pre side. A post piece in the pre neuron itself is
        dropped unless the site has no other. Positions are voxels of the label, and of that neuron, nearest
        to the centroid; rows of one site share the pre point.

    Raises
    ------
    ValueError
        If ids are not unsigned or a shape differs.

    Examples
    --------
    >>> labels = np.array([[[1, 1, 1, 2, 2, 0, 2, 0, 4]]], np.uint16)
    >>> table = partners_of(labels, voxel_nm=(40, 4, 4))
    >>> table[["site", "partner", "pre_x", "post_x", "post_x_nm", "post_voxels"]].to_numpy().tolist()
    [[1.0, 1.0, 1.0, 3.0, 12.0, 2.0], [1.0, 2.0, 1.0, 6.0, 24.0, 1.0]]
    """
    _check(instances, probabilities_czyx, neurons)
    flat = np.flatnonzero(instances)
    ids = instances.reshape(-1)[flat]
    sites, site = np.unique(sites_of(ids).astype(np.uint64), return_inverse=True)
    neuron_ids, part = _parts(instances, flat, neurons)
    voxels = _Voxels(
        index=np.stack(np.unravel_index(flat, instances.shape), axis=1).astype(np.int64),
        site=site.astype(np.int64),
        part=part,
        union=_union_of(probabilities_czyx, flat),
    )
    is_pre = (ids & 1) == 1
    if is_pre.all() or not is_pre.any():
        return empty_table()
    size_nm = np.asarray(voxel_nm, np.float64)
    by_neuron = neurons is not None
    pre_sides = _pieces(voxels.where(is_pre), size_nm, by_part=by_neuron)
    post_pieces = _pieces(voxels.where(~is_pre), size_nm, by_part=True)
    pre, post = _pair_up(pre_sides, post_pieces, by_neuron=by_neuron, min_side_voxels=min_side_voxels)
    if not len(post.site):
        return empty_table()
    return _table(
        sites[post.site],
        neuron_ids[np.stack((pre.part, post.part)) if by_neuron else np.zeros((2, len(post.part)), np.intp)],
        pre,
        post,
        world=(size_nm, np.asarray(offset_nm, np.float64)),
    )


def neurons_under(
    points_nm: ArrayLike,
    neurons: NDArray[np.integer],
    *,
    voxel_nm: Sequence[float],
    offset_nm: Sequence[float] = (0.0, 0.0, 0.0),
) -> NDArray[np.integer]:
    """Look up the neuron of the voxel nearest to each point.

    Parameters
    ----------
    points_nm : (..., 3) array of float
        World positions; nm, z y x.
    neurons : (Z, Y, X) array of int
        Neuron id of each voxel.
    voxel_nm, offset_nm : sequence of 3 float
        Voxel size, and world position of voxel (0, 0, 0); nm, z y x.

    Returns
    -------
    ids : (...) array
        The type of `neurons`; 0 for a point whose nearest voxel lies outside.

    Examples
    --------
    >>> neurons_under([[0, 0, 5], [0, 0, 7], [0, 0, -9]], np.array([[[1, 2, 3]]]), voxel_nm=(40, 4, 4))
    array([2, 3, 0])
    """
    points = np.asarray(points_nm, np.float64)
    index = np.rint((points - np.asarray(offset_nm)) / np.asarray(voxel_nm)).astype(np.int64)
    inside = ((index >= 0) & (index < neurons.shape)).all(axis=-1)
    ids = np.zeros(index.shape[:-1], neurons.dtype)
    ids[inside] = neurons[tuple(index[inside].T)]
    return ids


def _check(
    instances: Instances, probabilities_czyx: Probabilities | None, neurons: NDArray[np.integer] | None
) -> None:
    if instances.ndim != 3 or instances.dtype.kind != "u":
        raise ValueError(
            f"instances must be unsigned along z, y, x; got {instances.dtype} of shape {instances.shape}"
        )
    if probabilities_czyx is not None and (
        probabilities_czyx.shape != (3, *instances.shape) or probabilities_czyx.dtype != np.uint8
    ):
        raise ValueError(
            f"probabilities must be uint8 of shape {(3, *instances.shape)}, "
            f"got {probabilities_czyx.dtype} of shape {probabilities_czyx.shape}"
        )
    if neurons is not None and neurons.shape != instances.shape:
        raise ValueError(
            f"neurons must have the shape of the instances {instances.shape}, got {neurons.shape}"
        )


def _parts(
    instances: Instances, flat: Indices, neurons: NDArray[np.integer] | None
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Give neuron ids with 0 first, and of each voxel its neuron's place there, or its component."""
    if neurons is None:
        # labels differ between sides and sites, so that each component lies in one side of one site
        return np.zeros(1, np.uint64), components_of(instances).reshape(-1)[flat].astype(np.int64)
    under = np.concatenate((np.zeros(1, np.uint64), neurons.reshape(-1)[flat].astype(np.uint64)))
    neuron_ids, part = np.unique(under, return_inverse=True)
    return neuron_ids, part[1:].astype(np.int64)


def _union_of(probabilities_czyx: Probabilities | None, flat: Indices) -> NDArray[np.int64]:
    if probabilities_czyx is None:
        return np.full(len(flat), SCALE, np.int64)
    union: NDArray[np.int64] = probabilities_czyx[2].reshape(-1)[flat].astype(np.int64)
    return union


def _pieces(voxels: _Voxels, voxel_nm: NDArray[np.float64], *, by_part: bool) -> _Pieces:
    """Sum up the voxels of each site, or of each part of a site; there is at least one voxel."""
    part = voxels.part if by_part else np.zeros_like(voxels.part)
    order = np.lexsort((part, voxels.site))  # stable: scan order within a piece
    site, part, index = voxels.site[order], part[order], voxels.index[order]
    starts = np.flatnonzero((np.diff(site, prepend=-1) != 0) | (np.diff(part, prepend=-1) != 0))
    n_voxels = np.diff(starts, append=len(site))
    place = np.repeat(np.arange(len(starts)), n_voxels)
    centroid = np.add.reduceat(index, starts) / n_voxels[:, None]
    # rounded, so that the choice among equally near voxels does not hang on where the volume begins
    distance = np.round((((index - centroid[place]) * voxel_nm) ** 2).sum(axis=1), 3)
    return _Pieces(
        site=site[starts],
        part=part[starts],
        voxels=n_voxels,
        union=np.add.reduceat(voxels.union[order], starts),
        low=np.minimum.reduceat(index, starts),
        high=np.maximum.reduceat(index, starts) + 1,
        point=index[np.lexsort((distance, place))[starts]],
    )


def _pair_up(
    pre: _Pieces, post: _Pieces, *, by_neuron: bool, min_side_voxels: int
) -> tuple[_Pieces, _Pieces]:
    """Choose the post pieces that are partners, and give the pre side of each, row by row."""
    pre = _whole_sides(pre)
    row = np.searchsorted(pre.site, post.site)
    paired = (row < len(pre.site)) & (pre.site[np.minimum(row, len(pre.site) - 1)] == post.site)
    post, row = post.where(paired), row[paired]
    kept = np.ones(len(row), bool)
    if by_neuron:
        kept = _unless_last(kept, post.part == pre.part[row], post.site)
        kept = _unless_last(kept, post.part == 0, post.site)
    largest = np.zeros(len(row), bool)
    largest[_first_of_site(post, np.where(kept, -post.voxels, 0))] = True
    kept &= largest | (post.voxels >= min_side_voxels)
    return pre.where(row[kept]), post.where(kept)


def _whole_sides(pre: _Pieces) -> _Pieces:
    """Merge the pieces of each pre side; part and point are those of its main neuron."""
    main = pre.where(_first_of_site(pre, np.where(pre.part > 0, -pre.voxels, 0)))
    starts = np.flatnonzero(np.diff(pre.site, prepend=-1))
    return _Pieces(
        site=main.site,
        part=main.part,
        voxels=np.add.reduceat(pre.voxels, starts),
        union=np.add.reduceat(pre.union, starts),
        low=np.minimum.reduceat(pre.low, starts),
        high=np.maximum.reduceat(pre.high, starts),
        point=main.point,
    )


def _first_of_site(pieces: _Pieces, rank: NDArray[np.int64]) -> Indices:
    """Give the piece of least rank of each site; of equal ones the first."""
    order = np.lexsort((rank, pieces.site))
    return order[np.flatnonzero(np.diff(pieces.site[order], prepend=-1))]


def _unless_last(
    kept: NDArray[np.bool_], unwanted: NDArray[np.bool_], site: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Drop the unwanted from what is kept, save where a site would have none left."""
    wanted = kept & ~unwanted
    return np.where(np.isin(site, site[wanted]), wanted, kept)


def _table(
    site: NDArray[np.uint64],
    neurons: NDArray[np.uint64],
    pre: _Pieces,
    post: _Pieces,
    *,
    world: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> pd.DataFrame:
    """Lay out the rows; `neurons` is (2, rows), `world` voxel size and offset in nm."""
    voxel_nm, offset_nm = world
    low, high = np.minimum(pre.low, post.low), np.maximum(pre.high, post.high)
    confidence = (pre.union + post.union) / (pre.voxels + post.voxels) / SCALE
    columns: dict[str, NDArray[np.generic]] = {"site": site, "partner": np.arange(1, len(site) + 1)}
    for side, pieces in (("pre", pre), ("post", post)):
        columns |= {f"{side}_{axis}": pieces.point[:, i] for i, axis in enumerate("zyx")}
        nm = offset_nm + pieces.point * voxel_nm
        columns |= {f"{side}_{axis}_nm": nm[:, i] for i, axis in enumerate("zyx")}
        columns[f"{side}_voxels"] = pieces.voxels
    for i, axis in enumerate("zyx"):
        columns |= {f"{axis}0": low[:, i], f"{axis}1": high[:, i]}
    columns |= {"confidence": confidence, "pre_neuron": neurons[0], "post_neuron": neurons[1]}
    return pd.DataFrame({name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()})
