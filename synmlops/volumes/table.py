"""The partner table: one row per pre-post pair, in memory a pandas frame, on disk Parquet or CSV."""

from pathlib import Path

import numpy as np
import pandas as pd

COLUMNS: dict[str, str] = {
    "site": "uint64",  # synaptic site n: pre is instance 2n-1, post is 2n
    "partner": "uint64",  # row number from 1, unique in the table
    "pre_z_nm": "float64",  # a point on the pre side, in the world frame
    "pre_y_nm": "float64",
    "pre_x_nm": "float64",
    "post_z_nm": "float64",
    "post_y_nm": "float64",
    "post_x_nm": "float64",
    "pre_z": "int64",  # the same points as voxel indices of the volume
    "pre_y": "int64",
    "pre_x": "int64",
    "post_z": "int64",
    "post_y": "int64",
    "post_x": "int64",
    "pre_voxels": "int64",  # size of the site's pre side
    "post_voxels": "int64",  # size of this partner's post side
    "z0": "int64",  # bounding box of pre and this post, half open
    "y0": "int64",
    "x0": "int64",
    "z1": "int64",
    "y1": "int64",
    "x1": "int64",
    "confidence": "float64",  # 0 to 1; 1 in a true table
    "pre_neuron": "uint64",  # 0 where no segmentation is given or the side lies in its background
    "post_neuron": "uint64",
    "self_contact": "bool",  # both sides lie in one neuron; false where that is not known
}
"""Column names and dtypes, in order. World position in nm is offset_nm + voxel index * voxel_nm."""


def empty_table() -> pd.DataFrame:
    """Give a partner table without rows.

    Examples
    --------
    >>> len(empty_table()), list(empty_table().columns)[:2]
    (0, ['site', 'partner'])
    """
    return pd.DataFrame({name: np.empty(0, dtype) for name, dtype in COLUMNS.items()})


def points_nm(table: pd.DataFrame) -> np.ndarray:
    """Give pre and post points of each row as a (P, 2, 3) float array; nm, z y x."""
    names = [f"{side}_{axis}_nm" for side in ("pre", "post") for axis in "zyx"]
    return table[names].to_numpy(np.float64).reshape(-1, 2, 3)


def moved_voxels(table: pd.DataFrame, by_zyx: tuple[int, int, int]) -> pd.DataFrame:
    """Give the table with its voxel indices counted from another voxel; positions in nm stay.

    Parameters
    ----------
    table : DataFrame
    by_zyx : tuple of int
        Added to every index and bounding box: a region's start turns its indices into the volume's.

    Examples
    --------
    >>> table = pd.DataFrame({name: [1] for name in COLUMNS})
    >>> moved_voxels(table, (0, 0, 10))[["pre_z", "post_x", "x0", "x1", "pre_x_nm"]].values.tolist()
    [[1, 11, 11, 11, 1]]
    """
    moved = table.copy()
    for axis, by in zip("zyx", by_zyx, strict=True):
        columns = [f"pre_{axis}", f"post_{axis}", f"{axis}0", f"{axis}1"]
        moved[columns] = moved[columns] + by
    return moved


def edges_of(table: pd.DataFrame) -> pd.DataFrame:
    """Count the partners of each pair of neurons: the wiring diagram as a list.

    Parameters
    ----------
    table : DataFrame
        A partner table. Rows with an end in no neuron are left out.

    Returns
    -------
    edges : DataFrame
        `pre_neuron`, `post_neuron`, `count` and `confidence_sum`, ascending by the two neurons. Contacts of a
        neuron with itself are edges as well.

    Examples
    --------
    >>> table = pd.DataFrame({name: [1, 1, 1] for name in COLUMNS} | {"post_neuron": [4, 0, 4]})
    >>> edges_of(table).values.tolist()
    [[1, 4, 2, 2]]
    """
    known = table[(table.pre_neuron > 0) & (table.post_neuron > 0)]
    by_pair = known.groupby(["pre_neuron", "post_neuron"], as_index=False)
    return by_pair.agg(count=("confidence", "size"), confidence_sum=("confidence", "sum"))


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a partner table, with the dtypes of `COLUMNS`; extra columns are kept. See `write_frame`."""
    write_frame(table.astype(COLUMNS), path)


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet, or as CSV where the name ends in `.csv`."""
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read a partner table from Parquet.

    A table without `self_contact`, as written before there was this column, gets it.

    Raises
    ------
    ValueError
        If another column of `COLUMNS` is missing.
    """
    table = pd.read_parquet(path)
    if "self_contact" not in table and {"pre_neuron", "post_neuron"} <= set(table):
        table["self_contact"] = (table.pre_neuron == table.post_neuron) & (table.pre_neuron != 0)
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"{path}: is no partner table, it lacks the columns {', '.join(missing)}")
    return table.astype(COLUMNS)
