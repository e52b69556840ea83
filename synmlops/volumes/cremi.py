"""The CREMI challenge's HDF5: what its annotations and volumes are, read and written.

Layout: `volumes/raw`, `volumes/labels/neuron_ids` and `volumes/labels/clefts`, each with the attribute
`resolution` and, in the padded versions, `offset` (nm, z y x); `annotations` with `ids`, `types`, `locations`
(nm, counted from the group's own `offset`), `presynaptic_site/partners` and `comments`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_path, plain_write_errors
from synmlops.volumes.hdf5 import list_datasets
from synmlops.volumes.store import Grid, Volume, open_volume
from synmlops.volumes.table import points_nm

NOTHING = np.uint64(2**64 - 1)
"""Background of clefts, and a voxel that lies in no neuron."""
LEAST_SPECIAL = np.uint64(2**64 - 3)
"""From here on values are no ids: transparent (-3), outside of what was annotated (-2), nothing (-1)."""

RAW, NEURONS, CLEFTS = "volumes/raw", "volumes/labels/neuron_ids", "volumes/labels/clefts"
PRE_TYPE, POST_TYPE = "presynaptic_site", "postsynaptic_site"
FILE_FORMAT = "0.2"
_CHUNK_ZYX = (1, 256, 256)  # one section deep, so that slabs of any depth fill whole chunks

Nm = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Annotations:
    """Points on the two sides of synapses, and which of them are partners.

    Attributes
    ----------
    ids : (A,) array of uint64
        Each of its own.
    types : tuple of str
        `presynaptic_site` or `postsynaptic_site`, one each.
    locations_nm : (A, 3) array of float
        z y x, counted from `offset_nm`, as they stand in the file.
    partners : (P, 2) array of uint64
        Ids of the pre and the post point of each pair.
    comments : dict of int to str
        By id; most points have none.
    offset_nm : tuple of float
    """

    ids: NDArray[np.uint64]
    types: tuple[str, ...]
    locations_nm: NDArray[np.float64]
    partners: NDArray[np.uint64]
    comments: Mapping[int, str] = field(default_factory=dict)
    offset_nm: Nm = (0.0, 0.0, 0.0)

    @property
    def partner_rows(self) -> NDArray[np.intp]:
        """Which rows of `ids` the partners are, (P, 2)."""
        order = np.argsort(self.ids)
        rows: NDArray[np.intp] = order[np.searchsorted(self.ids[order], self.partners)]
        return rows

    def pairs_nm(self, origin_nm: Nm = (0.0, 0.0, 0.0)) -> NDArray[np.float64]:
        """Give pre and post point of each pair as (P, 2, 3), counted from a point of the world.

        Examples
        --------
        >>> ids = np.array([7, 9], np.uint64)
        >>> points = Annotations(ids, (PRE_TYPE, POST_TYPE), np.array([[0, 0, 0], [0, 4, 8]]), ids[None],
        ...                      offset_nm=(40, 0, 0))
        >>> points.pairs_nm().tolist(), points.partner_rows.tolist()
        ([[[40.0, 0.0, 0.0], [40.0, 4.0, 8.0]]], [[0, 1]])
        """
        shift = np.asarray(self.offset_nm) - np.asarray(origin_nm)  # first, as the challenge's scorer does
        pairs: NDArray[np.float64] = (self.locations_nm + shift)[self.partner_rows]
        return pairs


@dataclass(frozen=True)
class Layer:
    """A volume to write: its shape, where it lies, and its slabs along z, each with its first z."""

    shape_zyx: tuple[int, ...]
    grid: Grid
    slabs: Iterable[tuple[int, NDArray[Any]]]


def is_id(values: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Tell which values of a label are ids, and not background, unknown or outside.

    Examples
    --------
    >>> is_id(np.array([0, 5, 2**64 - 1, 2**64 - 3], np.uint64)).tolist()
    [False, True, False, False]
    """
    found: NDArray[np.bool_] = values != 0
    if values.dtype == np.uint64:
        found &= values < LEAST_SPECIAL
    return found


def open_layer(path: Path, name: str) -> Volume:
    """Open one volume of a CREMI file.

    Raises
    ------
    SynmlopsError
        If the file is none of the challenge's, cannot be read, or the volume is not in it, has no voxel size
        or, being a label, holds other numbers than ids.
    """
    _refuse_other_file(path)
    if name not in list_datasets(path):
        raise SynmlopsError(f"{path}: has no {name}; give a CREMI file that holds it")
    volume = open_volume(f"{path}::{name}")
    problem = None
    if volume.grid is None:
        problem = "does not say its voxel size; write the attribute `resolution`: three numbers, nm, z y x"
    elif name == NEURONS and volume.dtype.kind != "u":
        problem = f"holds {volume.dtype}, ids are unsigned whole numbers; convert it to uint64"
    elif name == CLEFTS and volume.dtype != np.uint64:
        problem = f"holds {volume.dtype}, which has no 2**64 - 1 for background; write it as uint64"
    if problem is not None:
        volume.close()
        raise SynmlopsError(f"{path}::{name}: {problem}")
    return volume


def has_layer(path: Path, name: str) -> bool:
    """Tell whether a CREMI file holds a volume of this name; raises as `open_layer` for another file."""
    _refuse_other_file(path)
    return name in list_datasets(path)


def grid_of(volume: Volume) -> Grid:
    """Give the grid of an opened layer, which has one."""
    assert volume.grid is not None  # else `open_layer` had refused it
    return volume.grid


def neurons_at(neurons: Volume, points_nm: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Look up the ids under points counted from the volume's first voxel, reading slab by slab.

    Returns
    -------
    ids : (...) array
        0 for a point outside.
    inside : (...) array of bool
    """
    index = np.rint(points_nm / np.asarray(grid_of(neurons).voxel_nm)).astype(np.int64)
    inside = ((index >= 0) & (index < neurons.shape)).all(axis=-1)
    wanted = index[inside]
    found = np.zeros(len(wanted), neurons.dtype)
    if len(wanted):
        order = np.argsort(wanted[:, 0], kind="stable")
        for z, slab in neurons.slabs():
            first, last = np.searchsorted(wanted[order, 0], (z, z + len(slab)))
            here = order[first:last]
            found[here] = slab[tuple((wanted[here] - (z, 0, 0)).T)]
    ids = np.zeros(index.shape[:-1], neurons.dtype)
    ids[inside] = found
    return ids, inside


def read_annotations(path: Path) -> Annotations:
    """Read the annotations of a CREMI file; a file without any has none.

    Raises
    ------
    SynmlopsError
        If the file is none of the challenge's or cannot be read, a part is missing or of another length, a
        location is no number, an id stands twice, or a partner or comment names an id that is not there.
    """
    _refuse_other_file(path)
    try:
        with h5py.File(path, "r") as file:
            if "annotations" not in file:
                return _no_annotations()
            found = _read_group(path, file["annotations"])
    except (OSError, RuntimeError) as error:
        raise SynmlopsError(
            f"{path}: its annotations cannot be read ({error}); copy or make it again"
        ) from error
    _check(path, found)
    return found


def annotations_of(table: pd.DataFrame) -> Annotations:
    """Give a partner table as annotations: a pre point for each site, a post point for each row.

    Parameters
    ----------
    table : DataFrame
        A partner table. Where it has the columns `pre_annotation` and `post_annotation`, as an import from
        CREMI writes them, those are the ids; otherwise the points are numbered from 1 in the order of the
        rows, and rows of one site share a pre point where it is the same place. `pre_comment` and
        `post_comment` are kept.

    Raises
    ------
    SynmlopsError
        If one id stands at two places.

    Examples
    --------
    >>> from synmlops.volumes.table import COLUMNS
    >>> table = pd.DataFrame({name: [1, 1, 2] for name in COLUMNS} | {"post_x_nm": [4.0, 8.0, 9.0]})
    >>> annotations_of(table).partners.tolist(), annotations_of(table).locations_nm[:3, 2].tolist()
    ([[1, 2], [1, 3], [4, 5]], [1.0, 4.0, 8.0])
    """
    if not len(table):
        return _no_annotations()
    if {"pre_annotation", "post_annotation"} <= set(table):
        partners = table[["pre_annotation", "post_annotation"]].to_numpy(np.uint64)
    else:
        partners = _numbered(table)
    points = points_nm(table).reshape(-1, 3)
    ids, first, place = np.unique(partners.reshape(-1), return_index=True, return_inverse=True)
    moved = np.flatnonzero((points != points[first][place]).any(axis=1))
    if len(moved):
        raise SynmlopsError(
            f"the partner table has annotation {partners.reshape(-1)[moved[0]]} at two places; "
            "leave out the columns pre_annotation and post_annotation to have all numbered anew"
        )
    types = tuple(POST_TYPE if at % 2 else PRE_TYPE for at in first)
    return Annotations(ids, types, points[first], partners, _comments_of(table, partners))


def write_cremi(
    path: Path,
    *,
    annotations: Annotations,
    raw: Layer | None = None,
    neurons: Layer | None = None,
    clefts: Layer | None = None,
) -> None:
    """Write a CREMI file, which appears under its name when complete.

    Parameters
    ----------
    path : Path
    annotations : Annotations
        Its arrays are written as they are, so that reading gives the same numbers.
    raw, neurons, clefts : Layer, optional
        uint8; neuron ids; cleft ids. 0 in clefts is written as background, 2**64 - 1.

    Raises
    ------
    SynmlopsError
        If the place is full or cannot be written.
    """
    layers = ((RAW, raw, np.uint8), (NEURONS, neurons, np.uint64), (CLEFTS, clefts, np.uint64))
    with atomic_path(path) as partial, plain_write_errors(path, partial), h5py.File(partial, "w") as file:
        file.attrs["file_format"] = FILE_FORMAT
        for name, layer, dtype in layers:
            if layer is not None:
                _write_layer(file, name, layer, dtype)
        if len(annotations.ids):
            _write_group(file.create_group("annotations"), annotations)


def _no_annotations() -> Annotations:
    return Annotations(np.empty(0, np.uint64), (), np.empty((0, 3)), np.empty((0, 2), np.uint64))


def _refuse_other_file(path: Path) -> None:
    if not path.is_file():
        raise SynmlopsError(f"{path}: there is no such file; check the path")
    names = list_datasets(path)
    if not any(name.startswith(("volumes/", "annotations/")) for name in names):
        listed = ", ".join(list(names)[:5]) or "nothing"
        raise SynmlopsError(
            f"{path}: is no CREMI file, it holds neither volumes/ nor annotations/ but {listed}; give the "
            "challenge's HDF5"
        )


def _read_group(path: Path, group: Any) -> Annotations:
    missing = [name for name in ("ids", "types", "locations") if name not in group]
    if missing:
        raise SynmlopsError(f"{path}: annotations lacks {', '.join(missing)}; copy or make the file again")
    partners = group.get("presynaptic_site/partners")
    comments: dict[int, str] = {}
    if "comments/target_ids" in group and "comments/comments" in group:
        targets, texts = group["comments/target_ids"][()], _texts(group["comments/comments"])
        comments = {int(target): text for target, text in zip(targets, texts, strict=False)}
    offset = np.asarray(group.attrs.get("offset", (0.0, 0.0, 0.0)), np.float64)
    if offset.shape != (3,) or not np.isfinite(offset).all():
        raise SynmlopsError(
            f"{path}: attribute offset of annotations is {offset.tolist()}; it must be three numbers (nm, z "
            f"y x)"
        )
    z, y, x = offset.tolist()
    return Annotations(
        ids=group["ids"][()].astype(np.uint64),
        types=tuple(_texts(group["types"])),
        locations_nm=group["locations"][()].astype(np.float64),
        partners=np.empty((0, 2), np.uint64) if partners is None else partners[()].astype(np.uint64),
        comments=comments,
        offset_nm=(z, y, x),
    )


def _texts(dataset: Any) -> list[str]:
    return [text.decode() if isinstance(text, bytes) else str(text) for text in dataset[()]]


def _check(path: Path, found: Annotations) -> None:
    """Refuse annotations that contradict themselves."""
    n = len(found.ids)
    if found.ids.ndim != 1 or len(found.types) != n or found.locations_nm.shape != (n, 3):
        raise SynmlopsError(
            f"{path}: annotations has {n} ids, {len(found.types)} types and locations of shape "
            f"{found.locations_nm.shape}; there must be as many of each, with three coordinates"
        )
    if found.partners.ndim != 2 or found.partners.shape[1] != 2:
        raise SynmlopsError(
            f"{path}: presynaptic_site/partners has shape {found.partners.shape}; rows must be pre id, post "
            f"id"
        )
    unlocated = found.ids[~np.isfinite(found.locations_nm).all(axis=1)]
    if len(unlocated):
        raise SynmlopsError(f"{path}: annotation {unlocated[0]} lies at no finite place; mend or remove it")
    known, counts = np.unique(found.ids, return_counts=True)
    if (counts > 1).any():
        raise SynmlopsError(
            f"{path}: annotation id {known[counts > 1][0]} stands {counts.max()} times; ids must differ"
        )
    lost = np.argwhere(~np.isin(found.partners, known))
    if len(lost):
        row, side = lost[0]
        raise SynmlopsError(
            f"{path}: of the pair {found.partners[row, 0]} -> {found.partners[row, 1]} the "
            f"{('pre', 'post')[side]} side is missing, no annotation has id {found.partners[row, side]} "
            f"({len(lost)} such); add the annotation or remove the pair"
        )
    stray = [target for target in found.comments if np.uint64(target) not in known]
    if stray:
        raise SynmlopsError(
            f"{path}: a comment is on annotation {stray[0]}, which is not there; remove the comment"
        )


def _numbered(table: pd.DataFrame) -> NDArray[np.uint64]:
    """Number the points of a table: a new pre point, then its posts, row by row."""
    key = table[["site", "pre_z_nm", "pre_y_nm", "pre_x_nm"]]
    site = key.groupby(list(key), sort=False).ngroup().to_numpy()
    _, first = np.unique(site, return_index=True)
    new = np.zeros(len(table), np.int64)
    new[first] = 1
    post = np.cumsum(new + 1)
    pre = post[first][site] - 1
    return np.stack((pre, post), axis=1).astype(np.uint64)


def _comments_of(table: pd.DataFrame, partners: NDArray[np.uint64]) -> dict[int, str]:
    comments: dict[int, str] = {}
    for side, name in enumerate(("pre_comment", "post_comment")):
        if name in table:
            texts = zip(partners[:, side], table[name], strict=True)
            comments |= {int(target): text for target, text in texts if isinstance(text, str) and text}
    return comments


def _write_layer(file: Any, name: str, layer: Layer, dtype: DTypeLike) -> None:
    chunks = tuple(min(n, c) for n, c in zip(layer.shape_zyx, _CHUNK_ZYX, strict=True))
    out = file.create_dataset(name, layer.shape_zyx, dtype, chunks=chunks, compression="gzip")
    out.attrs["resolution"] = np.asarray(layer.grid.voxel_nm, np.float64)
    if any(layer.grid.offset_nm):
        out.attrs["offset"] = np.asarray(layer.grid.offset_nm, np.float64)
    for z, slab in layer.slabs:
        values = slab.astype(dtype, copy=False)
        out[z : z + len(slab)] = np.where(values == 0, NOTHING, values) if name == CLEFTS else values


def _write_group(group: Any, annotations: Annotations) -> None:
    text = h5py.string_dtype()
    group["ids"], group["locations"] = annotations.ids, annotations.locations_nm
    group.create_dataset("types", data=list(annotations.types), dtype=text, compression="gzip")
    if any(annotations.offset_nm):
        group.attrs["offset"] = np.asarray(annotations.offset_nm, np.float64)
    if len(annotations.partners):
        group["presynaptic_site/partners"] = annotations.partners
    if annotations.comments:
        group["comments/target_ids"] = np.array(list(annotations.comments), np.uint64)
        group.create_dataset("comments/comments", data=list(annotations.comments.values()), dtype=text)
