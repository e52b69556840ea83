"""Instances to the partner table: one row per pre-post pair, told apart by post neuron or by component.

All work is on the voxels of the instances, sorted and counted; nothing walks the volume site by site.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from synmlops.params import SCALE
from synmlops.synapses.foreground import POST, PRE
from synmlops.synapses.instances import Instances, Probabilities, sites_of
from synmlops.synapses.pieces import Pieces, group, located
from synmlops.synapses.sparse import Indices, components, first_places, places
from synmlops.volumes.table import COLUMNS, empty_table


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
        dropped unless the site has no other, and then flagged as `self_contact`. Positions are voxels of the
        label, and of that neuron, nearest to the centroid; rows of one site share the pre point.

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
    index = places(flat, instances.shape)
    ids = instances[index]
    site, side = sites_of(ids).astype(np.uint64), np.where(ids & 1, PRE, POST).astype(np.uint8)
    if neurons is None:
        part = np.where(side == POST, _first_of_component(flat, ids, instances.shape), 0).astype(np.uint64)
    else:
        part = neurons[index].astype(np.uint64)
    union = np.full(len(flat), SCALE) if probabilities_czyx is None else probabilities_czyx[2][index]
    number, example = group(site, side, part)
    keys = site[example], side[example], part[example]
    pieces = located(index, union, number, keys=keys, voxel_nm=voxel_nm)
    return rows_of(
        pieces,
        voxel_nm=voxel_nm,
        offset_nm=offset_nm,
        by_neuron=neurons is not None,
        min_side_voxels=min_side_voxels,
    )


def rows_of(
    pieces: Pieces,
    *,
    voxel_nm: Sequence[float],
    offset_nm: Sequence[float] = (0.0, 0.0, 0.0),
    by_neuron: bool,
    min_side_voxels: int = 0,
) -> pd.DataFrame:
    """Choose the pieces that are partners and lay out the table; see `partners_of`.

    Parameters
    ----------
    pieces : Pieces
        With their points, ascending by site, side and part. A pre side is one piece, or one for each neuron.
    voxel_nm, offset_nm : sequence of 3 float
    by_neuron : bool
        Whether a part is the id of a neuron; else it tells components apart.
    min_side_voxels : int, default 0
    """
    pre_sides, post_pieces = pieces.where(pieces.side == PRE), pieces.where(pieces.side == POST)
    if not len(pre_sides) or not len(post_pieces):
        return empty_table()
    pre, post = _pair_up(pre_sides, post_pieces, by_neuron=by_neuron, min_side_voxels=min_side_voxels)
    if not len(post):
        return empty_table()
    return _table(
        pre,
        post,
        by_neuron=by_neuron,
        world=(np.asarray(voxel_nm, np.float64), np.asarray(offset_nm, np.float64)),
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


def _first_of_component(flat: Indices, ids: Instances, shape: tuple[int, ...]) -> Indices:
    """Give for each voxel where the 26-connected component of its id begins."""
    depth, height, width = shape
    label = components(flat, (depth, height, width), value=ids)
    return first_places(flat, label)[label]


def _pair_up(pre: Pieces, post: Pieces, *, by_neuron: bool, min_side_voxels: int) -> tuple[Pieces, Pieces]:
    """Choose the post pieces that are partners, and give the pre side of each, row by row."""
    pre = _whole_sides(pre)
    row = np.searchsorted(pre.site, post.site)
    paired = (row < len(pre)) & (pre.site[np.minimum(row, len(pre) - 1)] == post.site)
    post, row = post.where(paired), row[paired]
    kept = np.ones(len(row), bool)
    if by_neuron:
        kept = _unless_last(kept, post.part == pre.part[row], post.site)
        kept = _unless_last(kept, post.part == 0, post.site)
    largest = np.zeros(len(row), bool)
    largest[_first_of_site(post, np.where(kept, -post.voxels, 0))] = True
    kept &= largest | (post.voxels >= min_side_voxels)
    return pre.where(row[kept]), post.where(kept)


def _whole_sides(pre: Pieces) -> Pieces:
    """Merge the pieces of each pre side; part and point are those of its main neuron."""
    main = pre.where(_first_of_site(pre, np.where(pre.part > 0, -pre.voxels, 0)))
    starts = _starts(pre.site)
    return replace(
        main,
        voxels=np.add.reduceat(pre.voxels, starts),
        union=np.add.reduceat(pre.union, starts),
        low=np.minimum.reduceat(pre.low, starts),
        high=np.maximum.reduceat(pre.high, starts),
    )


def _first_of_site(pieces: Pieces, rank: Indices) -> NDArray[np.intp]:
    """Give the piece of least rank of each site; of equal ones the first."""
    order = np.lexsort((rank, pieces.site))
    return order[_starts(pieces.site[order])]


def _starts(site: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Give where each site begins; sites stand together."""
    new = np.ones(len(site), bool)
    new[1:] = site[1:] != site[:-1]
    return np.flatnonzero(new)


def _unless_last(
    kept: NDArray[np.bool_], unwanted: NDArray[np.bool_], site: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Drop the unwanted from what is kept, save where a site would have none left."""
    wanted = kept & ~unwanted
    return np.where(np.isin(site, site[wanted]), wanted, kept)


def _table(
    pre: Pieces,
    post: Pieces,
    *,
    by_neuron: bool,
    world: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> pd.DataFrame:
    """Lay out the rows; `world` is voxel size and offset in nm."""
    voxel_nm, offset_nm = world
    low, high = np.minimum(pre.low, post.low), np.maximum(pre.high, post.high)
    confidence = (pre.union + post.union) / (pre.voxels + post.voxels) / SCALE
    columns: dict[str, NDArray[np.generic]] = {"site": post.site, "partner": np.arange(1, len(post) + 1)}
    for side, pieces in (("pre", pre), ("post", post)):
        columns |= {f"{side}_{axis}": pieces.point[:, i] for i, axis in enumerate("zyx")}
        nm = offset_nm + pieces.point * voxel_nm
        columns |= {f"{side}_{axis}_nm": nm[:, i] for i, axis in enumerate("zyx")}
        columns[f"{side}_voxels"] = pieces.voxels
    for i, axis in enumerate("zyx"):
        columns |= {f"{axis}0": low[:, i], f"{axis}1": high[:, i]}
    columns["confidence"] = confidence
    for side, pieces in (("pre", pre), ("post", post)):
        columns[f"{side}_neuron"] = pieces.part if by_neuron else np.zeros_like(pieces.part)
    columns["self_contact"] = (columns["pre_neuron"] == columns["post_neuron"]) & (pre.part > 0)
    return pd.DataFrame({name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()})
