"""The commands about runs, scores and registered models."""

import os
from pathlib import Path
from typing import Annotated

import typer

from synmlops.cli.common import (
    ModelsFolder,
    ParamsFile,
    app,
)
from synmlops.layout import EVALUATED, MODELS, RUN_FILE, WHOLE, model_file
from synmlops.params import SynmlopsError, load_params
from synmlops.progress import say


@app.command()
def scores(
    folder: Annotated[Path, typer.Argument(help="What evaluate wrote.")] = EVALUATED,
) -> None:
    """Print the F1 table of the last evaluation, where its report is, and how to open the MLflow UI."""
    from synmlops.stages.scores import score_table
    from synmlops.tracking.lineage import project_root, ui_command

    typer.echo(score_table(folder))
    typer.echo(f"report:    {(folder / 'report.html').resolve()}")
    typer.echo(f"MLflow UI: {ui_command(project_root())}")


@app.command()
def register(
    params: ParamsFile = Path("params.yaml"),
    models: ModelsFolder = MODELS,
    evaluated: Annotated[Path, typer.Option("--evaluated", help="What evaluate wrote.")] = EVALUATED,
    name: Annotated[str, typer.Option(help="Name in the registry.")] = "synmlops",
    alias: Annotated[str, typer.Option(help="Alias to set: champion, challenger ...")] = "champion",
    fold: Annotated[str, typer.Option(help="Of a cross-validation: whose model.")] = WHOLE,
    model: Annotated[
        Path | None, typer.Option(help="An imported model file, instead of what train and evaluate wrote.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Operating point of --model, 0 to 1.")] = None,
) -> None:
    """Put the trained model and its operating point in the MLflow registry."""
    from synmlops.serving import registry
    from synmlops.tracking.lineage import project_root, tracking_uri
    from synmlops.tracking.record import RunRecord

    infer = load_params(params).infer
    if model is not None:
        version = registry.register_file(model, infer=infer, threshold=threshold, name=name, alias=alias)
    elif threshold is not None:
        raise SynmlopsError("--threshold: goes with --model; evaluate chooses it for what train wrote")
    else:
        version = registry.register(
            models / model_file(fold),
            record=RunRecord.read(models / RUN_FILE),
            infer=infer,
            operating_point=evaluated / "operating_point.json",
            metrics=evaluated / "metrics.json",
            name=name,
            alias=alias,
        )
    say(version.notes)
    typer.echo(f"{version.name} version {version.version} is {version.uri}")
    store = (
        "" if "MLFLOW_TRACKING_URI" in os.environ else f"MLFLOW_TRACKING_URI={tracking_uri(project_root())} "
    )
    typer.echo(f"serve it: {store}mlflow models serve -m {version.uri} --env-manager local")


@app.command()
def sync() -> None:
    """Send what earlier stages logged while the MLflow server was away."""
    from synmlops.tracking.lineage import project_root
    from synmlops.tracking.runs import sync as send

    outcome = send(project_root())
    say(outcome.notes)
    typer.echo(f"{outcome.sent} metric file(s) wholly sent, {outcome.left} with something left")
    if outcome.left:
        raise typer.Exit(1)
