"""The partner table in the formats of others, chosen by the name of the file or folder."""

from pathlib import Path

from synmlops.params import SynmlopsError
from synmlops.volumes.exporters import graphs
from synmlops.volumes.exporters.points import write_bound_points
from synmlops.volumes.exporters.tables import Nm, chosen_units, positions_of, read_partners, write_columns

SUFFIXES = {
    ".parquet": "table",
    ".feather": "table",
    ".csv": "table",
    ".tsv": "table",
    ".jsonl": "cave",
    ".graphml": "graphml",
    ".edges": "edges",
    ".precomputed": "precomputed",
    ".hdf": "cremi",
    ".h5": "cremi",
    ".hdf5": "cremi",
}
"""The format that a name stands for, unless another is asked for."""

FORMATS = ("table", "cave", "graphml", "edges", "precomputed", "cremi")


def export_partners(
    table: Path,
    out: Path,
    *,
    format: str | None = None,
    units: str | None = None,
    point_nm: Nm | None = None,
    voxel_nm: Nm | None = None,
) -> str:
    """Write a partner table in another format; give what was written, in words.

    Parameters
    ----------
    table : Path
        Parquet.
    out : Path
        A file, or a folder for precomputed annotations.
    format : str, optional
        One of `FORMATS`; default: by the suffix of `out`.
    units, point_nm
        Of positions for CAVE, see `synmlops.volumes.exporters.tables.positions_of`; nm by default.
    voxel_nm : tuple of float, optional
        Of the image that precomputed annotations are seen with.

    Raises
    ------
    SynmlopsError
        If the table cannot be read, the format is not known or does not go with an option, there are no
        edges, or OUT cannot be written.
    """
    chosen = _format(out, format)
    if chosen != "cave" and (units is not None or point_nm is not None):
        raise SynmlopsError(f"--units and --point-nm are for CAVE; {chosen} has positions in nm")
    if chosen != "precomputed" and voxel_nm is not None:
        raise SynmlopsError("--voxel-nm is for precomputed annotations; leave it out")
    partners = read_partners(table)
    words = f"{out}: {len(partners)} partners"
    if chosen == "table":
        write_columns({str(name): partners[name].to_numpy() for name in partners}, out)
    elif chosen == "cave":
        given = chosen_units(units, point_nm, default="nm")
        write_bound_points(partners, positions_of(partners, given, point_nm), out)
    elif chosen == "precomputed":
        from synmlops.volumes.exporters.precomputed import write_precomputed  # tensorstore takes a while

        write_precomputed(partners, out, voxel_nm=voxel_nm)
        words += "; served by a web server, it is precomputed://ADDRESS in neuroglancer"
    elif chosen == "cremi":
        from synmlops.volumes.cremi import annotations_of, write_cremi

        write_cremi(out, annotations=annotations_of(partners))
    else:
        edges = graphs.known_edges(partners, where=str(table))
        (graphs.write_graphml if chosen == "graphml" else graphs.write_edge_list)(edges, out)
        words = f"{out}: {len(edges)} edges of {len(partners)} partners"
    return words


def _format(out: Path, format: str | None) -> str:
    if format is not None and format not in FORMATS:
        raise SynmlopsError(f"--format {format}: must be {', '.join(FORMATS)}")
    chosen = format or SUFFIXES.get(out.suffix.lower())
    if chosen is None:
        raise SynmlopsError(
            f"{out}: its name stands for no format; let it end in {', '.join(SUFFIXES)}, or give --format "
            f"({', '.join(FORMATS)})"
        )
    return chosen
