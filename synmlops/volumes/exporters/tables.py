"""Partner tables in, and flat tables out: CSV, TSV, Parquet, Feather, JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_path
from synmlops.volumes.table import points_nm, read_table

Units = Literal["nm", "voxel"]
Nm = tuple[float, float, float]
Columns = Mapping[str, NDArray[Any] | pa.Array]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FLAT = (*DELIMITERS, ".parquet", ".feather")
"""Suffixes of flat tables."""


def read_partners(path: Path) -> pd.DataFrame:
    """Read a partner table.

    Raises
    ------
    SynmlopsError
        If the file is missing or no partner table in Parquet.
    """
    if not path.exists():
        raise SynmlopsError(f"{path}: there is no such file; check the path")
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise SynmlopsError(
            f"{path}: is no partner table in Parquet ({error}); give the one of `synmlops decode`"
        ) from error


def positions_of(table: pd.DataFrame, units: Units, point_nm: Nm | None = None) -> NDArray[Any]:
    """Give pre and post points of each row as (P, 2, 3), z y x.

    Parameters
    ----------
    table : DataFrame
    units : "nm" or "voxel"
        Voxels are those of the volume, whole numbers, unless `point_nm` is given.
    point_nm : tuple of float, optional
        Voxel size in which points are counted from the origin of the world; not rounded.

    Examples
    --------
    >>> from synmlops.volumes.table import COLUMNS
    >>> table = pd.DataFrame({name: [1] for name in COLUMNS} | {"pre_z_nm": [80.0]})
    >>> positions_of(table, "nm")[0, 0].tolist(), positions_of(table, "voxel")[0, 0].tolist()
    ([80.0, 1.0, 1.0], [1, 1, 1])
    >>> positions_of(table, "voxel", (40.0, 4.0, 4.0))[0, 0].tolist()
    [2.0, 0.25, 0.25]
    """
    if units == "nm":
        return points_nm(table)
    if point_nm is not None:
        return np.asarray(points_nm(table) / point_nm)
    names = [f"{side}_{axis}" for side in ("pre", "post") for axis in "zyx"]
    return table[names].to_numpy(np.int64).reshape(-1, 2, 3)


def chosen_units(units: str | None, point_nm: Nm | None, *, default: Units) -> Units:
    """Settle the units of positions.

    Raises
    ------
    SynmlopsError
        If they are neither nm nor voxel, or contradict `point_nm`.

    Examples
    --------
    >>> chosen_units(None, None, default="nm"), chosen_units(None, (40.0, 4.0, 4.0), default="nm")
    ('nm', 'voxel')
    """
    if units not in (None, "nm", "voxel"):
        raise SynmlopsError(f"--units {units}: must be nm or voxel")
    if point_nm is None:
        return default if units is None else "nm" if units == "nm" else "voxel"
    if units == "nm":
        raise SynmlopsError("--point-nm is the size of the voxels that positions count; not with --units nm")
    if not (np.isfinite(point_nm).all() and min(point_nm) > 0):
        raise SynmlopsError(f"--point-nm {point_nm}: sizes in nm must be positive numbers, z,y,x")
    return "voxel"


def write_columns(columns: Columns, path: Path) -> None:
    """Write columns as CSV, TSV, Parquet or Feather, by the suffix; complete or not at all.

    Columns of lists become text such as "[1, 2, 3]" in CSV and TSV.

    Raises
    ------
    SynmlopsError
        If the suffix is none of `FLAT`, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in FLAT:
        raise SynmlopsError(f"{path}: must end in {', '.join(FLAT)}")
    arrays = {
        name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()
    }
    if suffix in DELIMITERS:
        arrays = {name: _as_text(column) for name, column in arrays.items()}
    table = pa.table(arrays)
    with atomic_path(path) as partial:
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, partial)
        elif suffix == ".feather":
            pyarrow.feather.write_feather(table, partial)
        else:
            options = pyarrow.csv.WriteOptions(delimiter=DELIMITERS[suffix], quoting_style="needed")
            pyarrow.csv.write_csv(table, partial, options)


def write_json_lines(rows: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object a line; `rows` has a list for each key, of which those of a dict are nested."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        names = list(rows)
        for values in zip(*(_nested(rows[name]) for name in names), strict=True):
            file.write(json.dumps(dict(zip(names, values, strict=True))) + "\n")


def _nested(rows: Any) -> list[Any]:
    if not isinstance(rows, Mapping):
        return list(rows)
    parts = zip(*(_nested(part) for part in rows.values()), strict=True)
    return [dict(zip(rows, values, strict=True)) for values in parts]


def lists_xyz(points_zyx: NDArray[Any]) -> pa.Array:
    """Give (N, 3) points, z y x, as a column of lists x, y, z."""
    return pa.FixedSizeListArray.from_arrays(pa.array(points_zyx[:, ::-1].ravel()), 3)


def _as_text(column: pa.Array) -> pa.Array:
    if not pa.types.is_fixed_size_list(column.type):
        return column
    flat = column.flatten().cast(pa.string()).to_numpy(zero_copy_only=False).reshape(-1, 3)
    return pa.array([f"[{x}, {y}, {z}]" for x, y, z in flat])
