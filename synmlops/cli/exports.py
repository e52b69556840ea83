"""`synmlops export partners`: the partner table in the formats of others."""

from pathlib import Path
from typing import Annotated

import typer

from synmlops.cli.common import three_numbers
from synmlops.cli.exchange import exporters


@exporters.command()
def partners(
    table: Annotated[Path, typer.Argument(help="Partner table as decode, evaluate and imports write it.")],
    to: Annotated[
        Path,
        typer.Option(
            help="File or folder: .parquet, .feather, .csv, .tsv, .graphml, .edges, .jsonl (CAVE), "
            ".precomputed (neuroglancer), .hdf (CREMI)."
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(help="table, cave, graphml, edges, precomputed or cremi; default: by the name of OUT."),
    ] = None,
    units: Annotated[str | None, typer.Option(help="Of CAVE's positions: nm (default) or voxel.")] = None,
    point_nm: Annotated[
        str | None, typer.Option(help="CAVE's positions count voxels of this size z,y,x, as 40,4,4.")
    ] = None,
    voxel_nm: Annotated[
        str | None,
        typer.Option(
            help="Of the precomputed image to be seen with: lines move to the middle of its voxels."
        ),
    ] = None,
) -> None:
    """Write a partner table as Parquet, CSV, neuroglancer annotations, CAVE points, GraphML or edge list."""
    from synmlops.volumes.exporters.partners import export_partners

    typer.echo(
        export_partners(
            table,
            to,
            format=format,
            units=units,
            point_nm=three_numbers(point_nm, "--point-nm"),
            voxel_nm=three_numbers(voxel_nm),
        )
    )
