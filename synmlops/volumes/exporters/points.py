"""Points of the partner table with the columns of Synful, neuPrint, CAVE, or our own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.exporters.tables import (
    Columns,
    Nm,
    Units,
    as_text,
    chosen_units,
    lists_xyz,
    positions_of,
    read_partners,
    write_columns,
    write_lines,
)
from synmlops.volumes.table import COLUMNS

UNITS: dict[str, Units] = {"synful": "nm", "neuprint": "voxel", "cave": "nm", "synmlops": "nm"}
"""Whose columns there are, and the units of their positions unless others are asked for."""


@dataclass(frozen=True)
class ExportedPoints:
    """What was written."""

    rows: int
    units: str  # in words


def export_points(
    table: Path, out: Path, *, like: str, units: str | None = None, point_nm: Nm | None = None
) -> ExportedPoints:
    """Write the points of a partner table so that those who know these columns can read them.

    Parameters
    ----------
    table : Path
        Partner table, Parquet.
    out : Path
        .csv, .tsv, .parquet or .feather.
    like : str
        synful, neuprint, cave or synmlops.
    units, point_nm
        See `synmlops.volumes.exporters.tables.positions_of`; default: `UNITS`.

    Raises
    ------
    SynmlopsError
        If the table cannot be read, an option is none that is known, or OUT cannot be written.
    """
    if like not in UNITS:
        raise SynmlopsError(f"--like {like}: must be {', '.join(UNITS)}")
    if like == "synmlops" and (units is not None or point_nm is not None):
        raise SynmlopsError(
            "--like synmlops: has positions in nm and in voxels; leave out --units and --point-nm"
        )
    chosen, partners = chosen_units(units, point_nm, default=UNITS[like]), read_partners(table)
    write_columns(columns_like(partners, like, positions_of(partners, chosen, point_nm)), out)
    words = "nm" if chosen == "nm" else f"voxels of {point_nm} nm" if point_nm else "voxels of the volume"
    return ExportedPoints(len(partners), words)


def columns_like(table: pd.DataFrame, like: str, points_zyx: NDArray[Any]) -> Columns:
    """Give the columns of a table of one kind.

    Parameters
    ----------
    table : DataFrame
        Partner table.
    like : str
        synful, neuprint, cave or synmlops.
    points_zyx : (P, 2, 3) array
        Pre and post points in the units to write.

    Source: Synful's tables of FAFB (Buhmann et al. 2021); `fetch_synapse_connections` of neuprint-python;
    the bound points of CAVE's schema `synapse`.
    """
    if like == "cave":
        return bound_points(table, points_zyx)
    if like == "synmlops":
        return {name: table[name].to_numpy() for name in COLUMNS}
    name = {"synful": "{side}_{axis}", "neuprint": "{axis}_{side}"}[like]
    points = {
        name.format(side=side, axis=axis): points_zyx[:, k, 2 - i]
        for k, side in enumerate(("pre", "post"))
        for i, axis in enumerate("xyz")
    }
    pre, post, confidence = (table[key].to_numpy() for key in ("pre_neuron", "post_neuron", "confidence"))
    if like == "synful":
        return points | {"scores": confidence, "segmentid_pre": pre, "segmentid_post": post}
    scores = {"confidence_pre": confidence, "confidence_post": confidence}
    return {"bodyId_pre": pre, "bodyId_post": post} | points | scores


def bound_points(table: pd.DataFrame, points_zyx: NDArray[Any]) -> Columns:
    """Give the columns of CAVE's schema `synapse`: bound points of pre, post and centre, with root ids."""
    return {
        "id": table.partner.to_numpy(np.int64),
        "valid": np.ones(len(table), bool),
        "size": (table.pre_voxels + table.post_voxels).to_numpy(np.float64),
        "pre_pt_position": lists_xyz(points_zyx[:, 0]),
        "post_pt_position": lists_xyz(points_zyx[:, 1]),
        "ctr_pt_position": lists_xyz(points_zyx.mean(axis=1)),
        "pre_pt_root_id": table.pre_neuron.to_numpy(),
        "post_pt_root_id": table.post_neuron.to_numpy(),
    }


def write_bound_points(table: pd.DataFrame, points_zyx: NDArray[Any], path: Path) -> None:
    """Write CAVE's bound points flat, or nested as JSON lines (.jsonl), as its service is sent them."""
    if path.suffix.lower() != ".jsonl":
        write_columns(bound_points(table, points_zyx), path)
        return
    flat = {name: as_text(pa.array(column)) for name, column in bound_points(table, points_zyx).items()}
    parts: list[str | pa.Array] = ['{"id": ', flat["id"], ', "valid": true, "size": ', flat["size"]]
    for end in ("pre_pt", "post_pt"):
        parts += [f', "{end}": {{"position": ', flat[f"{end}_position"]]
        parts += [', "root_id": ', flat[f"{end}_root_id"], "}"]
    parts += [', "ctr_pt": {"position": ', flat["ctr_pt_position"], "}}"]
    write_lines(parts, path)
