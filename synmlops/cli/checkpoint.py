"""`synmlops import checkpoint`."""

from pathlib import Path
from typing import Annotated

import typer

from synmlops.cli.common import three_numbers
from synmlops.cli.exchange import importers, show


@importers.command()
def checkpoint(
    file: Annotated[Path, typer.Argument(help="A .pth.tar of PyTorch Connectomics v1.")],
    config: Annotated[Path, typer.Option("--config", help="YAML file it was trained with.")],
    voxel_nm: Annotated[str, typer.Option("--voxel-nm", help="z,y,x of the images it was trained on.")],
    base: Annotated[Path | None, typer.Option("--base", help="Its --config-base.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The model file to write.")] = Path("model.safetensors"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written.")] = False,
) -> None:
    """Turn a trained network of PyTorch Connectomics into a model that runs here."""
    from synmlops.learning.pytc_checkpoint import import_checkpoint

    nm = three_numbers(voxel_nm, "--voxel-nm")
    assert nm is not None
    imported = import_checkpoint(file, config, base=base, voxel_nm=nm)
    show(imported.survey())
    if dry_run:
        return
    imported.save(out)
    typer.echo(f"{out}: run it with `synmlops infer --model {out} --image VOLUME`; to train on, set")
    typer.echo(f"train.start_from: {out} in the params.yaml that `synmlops import pytc {config}` writes")
