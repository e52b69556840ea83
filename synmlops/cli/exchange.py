"""`synmlops import`, `export` and `score`: what other groups' data, models and scores go through."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synmlops.cli.common import app

if TYPE_CHECKING:
    from synmlops.volumes.importers.survey import Survey

importers = typer.Typer(help="Take over datasets, labels, params and models of others.", no_args_is_help=True)
exporters = typer.Typer(help="Write synapses in the formats of others.", no_args_is_help=True)
scorers = typer.Typer(help="Score synapses by the rules of others.", no_args_is_help=True)
app.add_typer(importers, name="import")
app.add_typer(exporters, name="export")
app.add_typer(scorers, name="score")


def show(survey: "Survey") -> None:
    """Print what an importer found."""
    from rich.console import Console

    from synmlops.volumes.importers.survey import render

    Console().print(render(survey))


def show_dry_run(survey: "Survey", picture: Path) -> None:
    """Print what an importer found, and where it drew it."""
    show(survey)
    typer.echo(f"picture: {picture.resolve()}; nothing else is written")


@importers.command()
def vnc(
    source: Annotated[str, typer.Argument(help="Folder or archive of the dataset, or the archive's URL.")],
    dest: Annotated[Path, typer.Argument(help="Folder for the HDF5 volumes.")],
    sha256: Annotated[str | None, typer.Option(help="Digest that the downloaded archive must have.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there and draw a few synapses, write nothing else.")
    ] = False,
) -> None:
    """Turn the public Drosophila VNC dataset into HDF5 volumes with union labels."""
    from synmlops.volumes.importers.vnc import import_vnc, survey_vnc

    if dry_run:
        picture = dest / "survey.png"
        show_dry_run(survey_vnc(source, picture, sha256=sha256), picture)
        return
    summary = import_vnc(source, dest, sha256=sha256)
    if summary.sha256 is not None:
        typer.echo(f"archive {summary.archive}: sha256 {summary.sha256}")
    for stack in summary.stacks:
        typer.echo(f"{stack.image}: {' x '.join(map(str, stack.shape_zyx))} voxels of 50 x 4.6 x 4.6 nm")
        if stack.label is not None:
            bands = ", ".join(map(str, stack.per_band))
            typer.echo(
                f"{stack.label}: {stack.synapses} synapses, {stack.foreground_share:.2%} of the voxels; "
                f"{bands} in bands of y"
            )
