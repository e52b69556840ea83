"""`synmlops import pytc`: configs of PyTorch Connectomics."""

from pathlib import Path
from typing import Annotated

import typer

from synmlops.cli.common import three_numbers
from synmlops.cli.exchange import importers, show


@importers.command()
def pytc(
    config: Annotated[Path, typer.Argument(help="YAML config of PyTorch Connectomics v0 or v1.")],
    base: Annotated[Path | None, typer.Option(help="Its base config, which CONFIG overrides.")] = None,
    out: Annotated[Path, typer.Option(help="The params file to write.")] = Path("params.yaml"),
    voxel_nm: Annotated[str | None, typer.Option(help="Voxel size z,y,x, which the config lacks.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write no params; look at the volumes that the config names.")
    ] = False,
    picture: Annotated[Path, typer.Option(help="Where a dry run draws synapses.")] = Path("synapses.png"),
) -> None:
    """Turn a PyTorch Connectomics config into params.yaml, and print what became of each key."""
    from rich.console import Console

    from synmlops.volumes.importers.pytc_config import import_config, render_table, write_params
    from synmlops.volumes.importers.pytc_survey import draw_first, survey_volumes

    imported = import_config(config, base=base, voxel_nm=three_numbers(voxel_nm))
    console = Console()
    if dry_run:
        found = survey_volumes(imported.params.data)
        console.print(render_table(imported))
        show(found)
        drawn = draw_first(imported.params.data, picture)
        typer.echo(f"nothing written{f' but {picture}' if drawn else ''}")
        return
    write_params(imported, out, force=force)
    console.print(render_table(imported))
    typer.echo(f"{out}: written; `synmlops params --params {out}` checks it again after changes")
