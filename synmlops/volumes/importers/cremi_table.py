"""The true partner table of a CREMI file: one row per annotated pair."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from synmlops.volumes.cremi import Annotations
from synmlops.volumes.importers.cremi_sites import Pairs
from synmlops.volumes.store import Grid
from synmlops.volumes.table import COLUMNS


def table_of(
    annotations: Annotations,
    pairs: Pairs,
    site: NDArray[np.int64],
    label: NDArray[np.unsignedinteger],
    neurons: NDArray[np.unsignedinteger],
    *,
    grid: Grid,
    start_zyx: NDArray[np.int64],
) -> pd.DataFrame:
    """Lay out the partner table, all annotated pairs in the order of the file.

    Parameters
    ----------
    annotations : Annotations
    pairs : Pairs
    site : (P,) array of int
        From 1; a pair of site 0 has no label and becomes a site after all others, of its own pre annotation.
    label, neurons : (z, y, x) array of unsigned int
    grid : Grid
        Of the raw volume, whose voxels are counted.
    start_zyx : (3,) array of int
        Where in the raw volume the labels begin.

    Returns
    -------
    table : DataFrame
        `COLUMNS`, `pre_annotation` and `post_annotation` (ids in the file), `labelled` (false where the label
        does not show the pair), and `pre_comment` and `post_comment` where there are comments. A row that has
        no label has no voxels, and its box is that of its points.
    """
    points = annotations.pairs_nm()
    index = np.rint((points - np.asarray(grid.offset_nm)) / np.asarray(grid.voxel_nm)).astype(np.int64)
    columns: dict[str, Any] = {
        "site": _all_sites(site, pairs.ids[:, 0]),
        "partner": np.arange(1, len(site) + 1),
    }
    for n, side in enumerate(("pre", "post")):
        columns |= {f"{side}_{axis}_nm": points[:, n, i] for i, axis in enumerate("zyx")}
        columns |= {f"{side}_{axis}": index[:, n, i] for i, axis in enumerate("zyx")}
        columns[f"{side}_neuron"] = pairs.neurons[:, n]
    sizes, low, high = extents(pairs, site, label, neurons)
    shown: NDArray[np.bool_] = np.asarray((sizes > 0).all(axis=1))
    columns |= {"pre_voxels": sizes[:, 0], "post_voxels": sizes[:, 1]}
    low = np.where(shown[:, None], low + start_zyx, index.min(axis=1))
    high = np.where(shown[:, None], high + start_zyx, index.max(axis=1) + 1)
    for i, axis in enumerate("zyx"):
        columns |= {f"{axis}0": low[:, i], f"{axis}1": high[:, i]}
    columns["confidence"] = np.ones(len(site))
    columns["self_contact"] = (pairs.neurons[:, 0] == pairs.neurons[:, 1]) & (pairs.neurons[:, 0] > 0)
    table = pd.DataFrame({name: columns[name] for name in COLUMNS}).astype(COLUMNS)
    table["pre_annotation"], table["post_annotation"] = annotations.partners.T
    table["labelled"] = shown
    if annotations.comments:
        for n, side in enumerate(("pre", "post")):
            ids = annotations.partners[:, n].tolist()
            table[f"{side}_comment"] = [annotations.comments.get(each, "") for each in ids]
    return table


def _all_sites(site: NDArray[np.int64], pre: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number pairs without a site after the others, one number for each pre annotation."""
    numbered = site.copy()
    without = site == 0
    _, place = np.unique(pre[without], return_inverse=True)
    numbered[without] = site.max(initial=0) + 1 + place
    return numbered


def extents(
    pairs: Pairs,
    site: NDArray[np.int64],
    label: NDArray[np.unsignedinteger],
    neurons: NDArray[np.unsignedinteger],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Count each row's pre side and its own post piece, (P, 2), and give the box of both."""
    sizes = np.zeros((len(site), 2), np.int64)
    low, high = np.zeros((len(site), 3), np.int64), np.zeros((len(site), 3), np.int64)
    boxes = find_objects(label)
    for row, n in enumerate(site.tolist()):
        if not n or len(boxes) < 2 * n or any(box is None for box in boxes[2 * n - 2 : 2 * n]):
            continue
        pre, post = boxes[2 * n - 2], boxes[2 * n - 1]
        voxels = [
            np.argwhere(label[pre] == 2 * n - 1) + [part.start for part in pre],
            np.argwhere((label[post] == 2 * n) & (neurons[post] == pairs.neurons[row, 1]))
            + [part.start for part in post],
        ]
        sizes[row] = [len(each) for each in voxels]
        if sizes[row].all():
            both = np.concatenate(voxels)
            low[row], high[row] = both.min(axis=0), both.max(axis=0) + 1
    return sizes, low, high
