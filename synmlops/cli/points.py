"""`synmlops import points` and `synmlops export points`: tables of pre and post points in and out."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from synmlops.cli.common import three_numbers
from synmlops.cli.exchange import exporters, importers, show_dry_run
from synmlops.params import SynmlopsError
from synmlops.progress import say


@importers.command()
def points(
    table: Annotated[Path, typer.Argument(help="CSV, TSV, Parquet or Feather, a row for each pair.")],
    dest: Annotated[Path, typer.Argument(help="Folder for label, mask and partner table.")],
    image: Annotated[str, typer.Option(help="The image that the points lie in: its voxels are labelled.")],
    radius_nm: Annotated[float, typer.Option(help="Of the balls.")],
    neurons: Annotated[
        str | None, typer.Option(help="Segmentation of the same voxels: a ball stays in its point's neuron.")
    ] = None,
    shape: Annotated[
        str, typer.Option(help="ball: about each point. half-ball: about the middle, a half for each side.")
    ] = "ball",
    units: Annotated[
        str | None,
        typer.Option(help="Of the positions: nm or voxel (of the image); default: by their kind."),
    ] = None,
    point_nm: Annotated[
        str | None, typer.Option(help="Positions count voxels of this size z,y,x from the world's origin.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns of other names: pre_z=zcol,pre_neuron=body,..."),
    ] = None,
    swap_xz: Annotated[bool, typer.Option("--swap-xz", help="What the table calls x is z.")] = False,
    crop: Annotated[
        bool, typer.Option("--crop", help="Leave out synapses that do not lie in the image.")
    ] = False,
    merge_nm: Annotated[
        float, typer.Option(help="Pre points of one neuron that lie no farther apart are one site.")
    ] = 0.0,
    voxel_nm: Annotated[
        str | None, typer.Option(help="Voxel size z,y,x where the image does not say it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the files; default: the table's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there and draw a few synapses, write nothing else.")
    ] = False,
) -> None:
    """Turn pre and post points into labels: balls of a radius in nm, clipped to neurons.

    Columns of Synful, neuPrint, CAVE and our partner table are recognised.
    """
    from synmlops.volumes.importers import points as stage

    source = stage.PointSource(
        table=table,
        image=image,
        radius_nm=radius_nm,
        neurons=neurons,
        shape=stage.one_of("--shape", shape, get_args(stage.BallShape)),
        units=None if units is None else stage.one_of("--units", units, get_args(stage.Units)),
        point_nm=three_numbers(point_nm, "--point-nm"),
        voxel_nm=three_numbers(voxel_nm),
        swap_xz=swap_xz,
        columns=_named(columns),
        crop=crop,
        merge_nm=merge_nm,
    )
    if dry_run:
        picture = dest / f"{stage.stem_of(source, name)}_survey.png"
        show_dry_run(stage.survey_points(source, picture), picture)
        return
    written = stage.import_points(source, dest, name=name)
    say(written.notes)
    typer.echo(f"{written.sites} sites, {written.rows} pairs; for params.yaml:")
    typer.echo("\n".join(stage.params_lines(source, written)))


@exporters.command("points")
def export_points(
    table: Annotated[Path, typer.Argument(help="Partner table as decode, evaluate and imports write it.")],
    out: Annotated[Path, typer.Argument(help="The file: .csv, .tsv, .parquet or .feather.")],
    like: Annotated[str, typer.Option(help="Whose columns: synful, neuprint, cave or synmlops.")],
    units: Annotated[
        str | None, typer.Option(help="nm or voxel (of the volume); default: what tables of this kind have.")
    ] = None,
    point_nm: Annotated[
        str | None, typer.Option(help="Count voxels of this size z,y,x from the world's origin, 40,4,4.")
    ] = None,
) -> None:
    """Write the points of a partner table with the columns of Synful, neuPrint or CAVE."""
    from synmlops.volumes.exporters.points import export_points as write

    written = write(table, out, like=like, units=units, point_nm=three_numbers(point_nm, "--point-nm"))
    typer.echo(f"{out}: {written.rows} pairs, positions in {written.units}")


def _named(columns: str | None) -> dict[str, str]:
    """Read --columns."""
    named: dict[str, str] = {}
    for part in columns.split(",") if columns else []:
        role, equals, column = part.partition("=")
        if not equals or not column:
            raise SynmlopsError(f"--columns {part}: give what it is and the column, such as pre_z=z1")
        named[role.strip()] = column.strip()
    return named
