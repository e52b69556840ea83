"""Neuroglancer's precomputed annotations: a line from pre to post for each partner, with its properties.

A folder that a plain web server can serve. Where there are many, the indices by id and by neuron are in
shards, for which the server must know HTTP ranges.

Source: "Annotation collection representation" of neuroglancer (src/datasource/precomputed/annotations.md).
neuroglancer's own writer (2.41) holds all in one cell and writes a file for each annotation.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorstore as ts
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_folder
from synmlops.volumes.table import points_nm

PROPERTIES = {
    "confidence": ("float32", "mean probability of the two sides"),
    "site": ("uint32", "synaptic site n: pre is instance 2n-1, post is 2n"),
    "partner": ("uint32", "row of the table"),
    "pre_voxels": ("uint32", "size of the pre side"),
    "post_voxels": ("uint32", "size of this post side"),
    "self_contact": ("uint8", "1 where both sides lie in one neuron"),
}
"""Column, its type there, what it says; those of four bytes first, as the format wants them."""

RELATIONSHIPS = ("pre_neuron", "post_neuron")
"""Columns whose ids a segmentation layer can be linked to."""

CELL_LIMIT = 2000
"""Lines of a cell of the spatial index, about: what is loaded at once where they are dense."""

MOST_FILES = 10_000
"""Keys of an index from which on it is sharded."""

_LEVELS = 16
_LEAST_CELL_NM = 500.0
_MINISHARD_BITS = 6
_SHARD_KEYS = 32_768  # of one shard, about: they are held in memory
_LINE = np.dtype(
    [("geometry", "<f4", 6)]
    + [(name, np.dtype(kind).newbyteorder("<")) for name, (kind, _) in PROPERTIES.items()]
    + [("padding", "u1", 3)]
)


@dataclass(frozen=True, eq=False)
class _Level:
    key: str
    grid: NDArray[np.int64]  # x y z
    cell: NDArray[np.float64]
    limit: int


def write_precomputed(
    table: pd.DataFrame, folder: Path, *, voxel_nm: tuple[float, float, float] | None = None, seed: int = 0
) -> None:
    """Write a partner table as precomputed annotations in nm.

    Parameters
    ----------
    table : DataFrame
    folder : Path
        Appears when complete. An earlier collection of annotations there is replaced, anything else is not.
    voxel_nm : tuple of float, optional
        Of the image. Lines are then moved by half a voxel: precomputed images have the corner of their first
        voxel where we have its middle.
    seed : int
        Of the order in which lines of a dense place appear.

    Raises
    ------
    SynmlopsError
        If the table is empty, a site or partner does not fit 32 bits, or the folder holds something else.
    """
    if table.empty:
        raise SynmlopsError("the table holds no partners; there is nothing to show")
    _refuse_other(folder)
    lines, ids = _lines(table, voxel_nm)
    related = {name: table[name].to_numpy(np.uint64) for name in RELATIONSHIPS}
    points = lines["geometry"].reshape(-1, 2, 3).astype(np.float64)
    low = points.min(axis=(0, 1))
    high = np.maximum(np.nextafter(points.max(axis=(0, 1)), np.inf), low + 1)
    with atomic_folder(folder) as made:
        levels = list(_write_spatial(made, lines, ids, points, low, high, np.random.default_rng(seed)))
        by_id = _write_index(made / "by_id", ids, _single(lines, related))
        linked = [
            {"id": name, "key": f"by_{name}"}
            | _write_index(made / f"by_{name}", *_by_neuron(lines, ids, neurons))
            for name, neurons in related.items()
        ]
        info = _info(low, high, levels) | {"relationships": linked, "by_id": {"key": "by_id"} | by_id}
        (made / "info").write_text(json.dumps(info, indent=1))


def _refuse_other(folder: Path) -> None:
    if not folder.exists():
        return
    info = folder / "info"
    ours = info.is_file() and "neuroglancer_annotations_v1" in info.read_text(errors="replace")
    if not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise SynmlopsError(
            f"{folder}: holds something else than annotations; move it away or name another folder"
        )


def _lines(
    table: pd.DataFrame, voxel_nm: tuple[float, float, float] | None
) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """Give the encoded lines and their ids."""
    lines = np.zeros(len(table), _LINE)
    half = np.zeros(3) if voxel_nm is None else np.array(voxel_nm) / 2
    lines["geometry"] = (points_nm(table) + half)[:, :, ::-1].reshape(-1, 6)
    for name, (kind, _) in PROPERTIES.items():
        values = table[name].to_numpy()
        if kind == "uint32" and values.max() > np.iinfo(np.uint32).max:
            raise SynmlopsError(
                f"{name} {values.max()}: neuroglancer's properties have 32 bits; split the table"
            )
        lines[name] = values
    ids = table.partner.to_numpy(np.uint64)
    return lines, ids if len(np.unique(ids)) == len(ids) else np.arange(1, len(ids) + 1, dtype=np.uint64)


def _info(low: NDArray[np.float64], high: NDArray[np.float64], levels: list[_Level]) -> dict[str, Any]:
    return {
        "@type": "neuroglancer_annotations_v1",
        "annotation_type": "LINE",
        "dimensions": {axis: [1e-9, "m"] for axis in "xyz"},
        "lower_bound": low.tolist(),
        "upper_bound": high.tolist(),
        "properties": [
            {"id": name, "type": kind, "description": text} for name, (kind, text) in PROPERTIES.items()
        ],
        "spatial": [
            {
                "key": level.key,
                "grid_shape": level.grid.tolist(),
                "chunk_size": level.cell.tolist(),
                "limit": level.limit,
            }
            for level in levels
        ],
    }


def _write_spatial(
    folder: Path,
    lines: NDArray[Any],
    ids: NDArray[np.uint64],
    points: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    rng: np.random.Generator,
) -> Iterator[_Level]:
    """Write the levels of the spatial index from coarse to fine; each line stands in one of them."""
    left = rng.permutation(len(lines))  # so that the first of a place are a fair sample of it
    grid = np.ones(3, np.int64)
    for number in range(_LEVELS):
        cell = (high - low) / grid
        row, cells = _cells(points[left], low, cell, grid)
        most = int(np.bincount(cells).max())
        last = number == _LEVELS - 1 or cell.max() / 2 < _LEAST_CELL_NM
        taken = np.ones(len(left), bool) if last else rng.random(len(left)) < CELL_LIMIT / most
        level = _Level(f"spatial{number}", grid, cell, limit=1)
        (folder / level.key).mkdir()
        kept = taken[row]
        limit = _write_cells(folder / level.key, lines, ids, left[row[kept]], cells[kept], grid)
        yield _Level(level.key, grid, cell, max(limit, 1))
        left = left[~taken]
        if not len(left):
            return
        grid = np.where(cell > cell.max() / 1.5, grid * 2, grid)


def _cells(
    points: NDArray[np.float64], low: NDArray[np.float64], cell: NDArray[np.float64], grid: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Give for each line the cells that its box reaches: rows of `points`, and numbers of cells."""
    at = np.clip(((points - low) // cell).astype(np.int64), 0, grid - 1)
    first, counts = at.min(axis=1), np.ptp(at, axis=1) + 1
    rows, numbers = [], []
    for step in np.ndindex(*counts.max(axis=0)):
        found = np.flatnonzero((np.array(step) < counts).all(axis=1))
        rows.append(found)
        numbers.append(np.ravel_multi_index(tuple((first[found] + step).T), tuple(grid)))
    return np.concatenate(rows), np.concatenate(numbers)


def _write_cells(
    folder: Path,
    lines: NDArray[Any],
    ids: NDArray[np.uint64],
    rows: NDArray[np.intp],
    cells: NDArray[np.int64],
    grid: NDArray[np.int64],
) -> int:
    """Write a file for each cell that has lines; give the most lines of one."""
    most = 0
    for number, these in _groups(cells):
        name = "_".join(str(int(n)) for n in np.unravel_index(int(number), tuple(grid)))
        (folder / name).write_bytes(_several(lines[rows[these]], ids[rows[these]]))
        most = max(most, len(these))
    return most


def _groups(keys: NDArray[Any]) -> Iterator[tuple[Any, NDArray[np.intp]]]:
    """Give each key and where it stands, in their order."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order])) + 1
    for these in np.split(order, starts) if len(order) else ():
        yield keys[these[0]], these


def _several(lines: NDArray[Any], ids: NDArray[np.uint64]) -> bytes:
    return struct.pack("<Q", len(lines)) + lines.tobytes() + ids.astype("<u8").tobytes()


def _single(lines: NDArray[Any], related: dict[str, NDArray[np.uint64]]) -> Iterator[bytes]:
    """Give each line by itself, with the neurons of its ends."""
    whole, size = lines.tobytes(), lines.dtype.itemsize
    neurons = zip(*(column.tolist() for column in related.values()), strict=True)
    for n, ends in enumerate(neurons):
        tail = b"".join(struct.pack("<IQ", 1, end) if end else b"\0\0\0\0" for end in ends)
        yield whole[n * size : (n + 1) * size] + tail


def _by_neuron(
    lines: NDArray[Any], ids: NDArray[np.uint64], neurons: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], Iterator[bytes]]:
    """Give the neurons that have lines, and the lines of each."""
    keys = np.unique(neurons[neurons > 0])
    rows = (these for neuron, these in _groups(neurons) if neuron)
    return keys, (_several(lines[these], ids[these]) for these in rows)


def _write_index(folder: Path, keys: NDArray[np.uint64], values: Iterator[bytes]) -> dict[str, Any]:
    """Write an index of uint64 keys; give what the info says of it besides its place."""
    folder.mkdir()
    if len(keys) <= MOST_FILES:
        for key, value in zip(keys.tolist(), values, strict=True):
            (folder / str(key)).write_bytes(value)
        return {}
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": "identity",
        "preshift_bits": 0,
        "minishard_bits": _MINISHARD_BITS,
        "shard_bits": int(np.ceil(np.log2(len(keys) / _SHARD_KEYS))) if len(keys) > _SHARD_KEYS else 0,
        "minishard_index_encoding": "gzip",
        "data_encoding": "raw",
    }
    _write_shards(folder, keys, list(values), sharding)
    return {"sharding": sharding}


def _write_shards(
    folder: Path, keys: NDArray[np.uint64], values: Sequence[bytes], sharding: dict[str, Any]
) -> None:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    store = ts.KvStore.open(
        {"driver": "neuroglancer_uint64_sharded", "metadata": sharding, "base": base}
    ).result()
    shard = (keys >> np.uint64(_MINISHARD_BITS)) & np.uint64((1 << sharding["shard_bits"]) - 1)
    for _, these in _groups(shard):
        with ts.Transaction() as transaction:
            into = store.with_transaction(transaction)
            for n in these.tolist():
                into[int(keys[n]).to_bytes(8, "big")] = values[n]
