"""Partner tables in, and flat tables out: CSV, TSV, Parquet, Feather, JSON lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
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

_ROWS = 100_000  # made into text at once


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
        arrays = {name: as_text(column) for name, column in arrays.items()}
    table = pa.table(arrays)
    with atomic_path(path) as partial:
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, partial)
        elif suffix == ".feather":
            pyarrow.feather.write_feather(table, partial)
        else:
            options = pyarrow.csv.WriteOptions(delimiter=DELIMITERS[suffix], quoting_style="needed")
            pyarrow.csv.write_csv(table, partial, options)


def write_lines(parts: Sequence[str | pa.Array], path: Path) -> None:
    """Write a line of text for each row: the parts one after another, of which a text is the same in all.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> write_lines(['{"id": ', pa.array([1, 2]), "}"], path)
    >>> path.read_text().splitlines()
    ['{"id": 1}', '{"id": 2}']
    """
    n = max(len(part) for part in parts if isinstance(part, pa.Array))
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        for start in range(0, n, _ROWS):
            some = [part if isinstance(part, str) else part[start : start + _ROWS] for part in parts]
            file.write("\n".join(_joined(*some).to_pylist()) + "\n")


def lists_xyz(points_zyx: NDArray[Any]) -> pa.Array:
    """Give (N, 3) points, z y x, as a column of lists x, y, z."""
    return pa.FixedSizeListArray.from_arrays(pa.array(points_zyx[:, ::-1].ravel()), 3)


def as_text(column: pa.Array) -> pa.Array:
    """Give a column of lists of three as text, "[1, 2, 3]"; others as they are."""
    if not pa.types.is_fixed_size_list(column.type):
        return column
    flat = column.flatten()
    x, y, z = (flat.take(pa.array(np.arange(n, len(flat), 3))) for n in range(3))
    return _joined("[", x, ", ", y, ", ", z, "]")


def _joined(*parts: str | pa.Array) -> pa.Array:
    """Put texts and columns together, row by row."""
    texts = [pa.scalar(part) if isinstance(part, str) else part.cast(pa.string()) for part in parts]
    return pc.binary_join_element_wise(*texts, "")
