"""The commands that dvc.yaml runs, and the search over their params."""

from pathlib import Path
from typing import Annotated, Any

import typer

from synmlops.cli.common import (
    Gpus,
    ModelsFolder,
    ParamsFile,
    PredictedFolder,
    PreparedFolder,
    app,
    box_of,
    part_of,
    suffix_of,
    three_numbers,
    three_voxels,
)
from synmlops.layout import EVALUATED, MODELS, PREDICTED, PREPARED
from synmlops.params import Params, SynmlopsError, load_params
from synmlops.progress import say


@app.command()
def prepare(
    params: ParamsFile = Path("params.yaml"),
    out: Annotated[Path, typer.Option(help="Folder for the prepared volumes.")] = PREPARED,
    image: Annotated[
        str | None, typer.Option(help="Training images, a.h5@b.h5; instead of those in the params.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Their labels, a_syn.h5@b_syn.h5.")] = None,
    label_kind: Annotated[
        str | None, typer.Option(help="pairs, semantic or union; a@b for one each.")
    ] = None,
) -> None:
    """Check every volume, convert it, and divide the tissue into train, validation and test."""
    from synmlops.stages.prepare import run

    settings = load_params(params)
    if image is not None or label is not None or label_kind is not None:
        settings = load_params(params, overrides=_given_volumes(settings, image, label, label_kind))
    manifest, notes = run(settings.data, out=out)
    say(notes)
    for name, volume in manifest.volumes.items():
        typer.echo(f"{name}: {volume.shape_zyx} voxels of {volume.grid.voxel_nm} nm, label {volume.kind}")
    typer.echo(f"{len(manifest.volumes)} volumes, {len(manifest.folds)} fold(s) in {out}")


@app.command()
def train(
    params: ParamsFile = Path("params.yaml"),
    prepared: PreparedFolder = PREPARED,
    out: Annotated[Path, typer.Option(help="Folder for the models and their curves.")] = MODELS,
    gpus: Gpus = None,
    processes: Annotated[
        int, typer.Option(min=1, help="CPU processes that share the batch, where no GPU is used.")
    ] = 1,
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint, or its folder, to go on from; default: its own.")
    ] = None,
) -> None:
    """Train a model; several GPUs (or CPU processes) share each batch. Run again, it goes on where it was."""
    from synmlops.learning.launch import is_worker, launch, leave_if_stopped

    leave_if_stopped()
    if not is_worker() and (n_ranks := _count_ranks(gpus, processes)) > 1:
        load_params(params)  # what is wrong with them is said before anything starts
        given = ["--gpus", gpus or 0] if gpus is not None or processes > 1 else []
        given += ["--resume", resume] if resume is not None else []
        flags = ["train", "--params", params, "--prepared", prepared, "--out", out, *given]
        launch(n_ranks, [str(flag) for flag in flags])
        return
    from synmlops.learning.distributed import joined_ranks
    from synmlops.stages.train import run_as

    with joined_ranks(gpus) as ranks:  # first of all, so that what is wrong in one process ends all of them
        record = run_as(ranks, load_params(params), prepared=prepared, out=out, resume=resume)
    if record is not None:
        typer.echo(f"models in {out}; run {record.key}")


@app.command()
def tune(
    params: ParamsFile = Path("params.yaml"),
    prepared: PreparedFolder = PREPARED,
    space: Annotated[Path, typer.Option(help="Which params to change, and to what.")] = Path("tune.yaml"),
    name: Annotated[str, typer.Option(help="Of the search; run again, it goes on.")] = "search",
    trials: Annotated[int, typer.Option(min=1, help="In all, those of an earlier start included.")] = 20,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each trial, instead of train.steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides, with the scores, what is tried.")] = 0,
    spare: Annotated[int, typer.Option(min=1, help="Trials to complete before any is pruned.")] = 4,
    gpus: Annotated[int | None, typer.Option(min=0, max=1, help="0 trains on the CPU.")] = None,
    apply: Annotated[
        int | None, typer.Option(min=0, help="Run nothing; write this trial's params into the params file.")
    ] = None,
) -> None:
    """Search for better params: train many sets, the bad ones not to the end; each is a run in MLflow."""
    from functools import partial

    from synmlops.stages import tune as stage

    if apply is not None:
        changed = stage.apply(name, apply, params=params)
        typer.echo("\n".join([f"{key}: {value}" for key, value in changed.items()] or ["nothing to change"]))
        typer.echo(f"{params} is that of trial {apply} now; `dvc repro` trains it")
        return
    from synmlops.stages.train import run

    search = stage.Search(name, params, space, prepared, trials, steps, seed, spare)
    rows = stage.run(search, train=partial(run, prepared=prepared, gpus=gpus))
    typer.echo(stage.trials_table(rows))
    typer.echo(f"params of a trial: `synmlops tune --name {name} --apply TRIAL`, then `dvc repro`")


@app.command()
def infer(
    params: ParamsFile = Path("params.yaml"),
    prepared: PreparedFolder = PREPARED,
    models: ModelsFolder = MODELS,
    out: Annotated[Path, typer.Option(help="Folder for the probabilities.")] = PREDICTED,
    gpus: Gpus = None,
    processes: Annotated[int, typer.Option(min=1, help="CPU processes, where no GPU is used.")] = 1,
    image: Annotated[
        str | None, typer.Option(help="Volumes to predict, a.h5@b.zarr; instead of the prepared ones.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model file, or models:/NAME@ALIAS of the registry; again for an ensemble."),
    ] = None,
    voxel_nm: Annotated[
        str | None, typer.Option(help="Voxel size z,y,x where the file does not say it.")
    ] = None,
    resample: Annotated[bool, typer.Option(help="Resample to the model's voxel size on the fly.")] = False,
    roi: Annotated[str | None, typer.Option(help="Region in voxels, z0:z1,y0:y1,x0:x1.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="Volume, non-zero where to predict; of any voxel size.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="h5, or zarr: the default where several machines write.")
    ] = None,
    block: Annotated[
        str | None, typer.Option(help="Voxels of a block, z,y,x; rounded up to whole windows.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers compute.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Of a job array: 3/64 is the third of 64 shares.")] = None,
    track: Annotated[
        bool, typer.Option("--track", help="Make it a run in MLflow, with params and progress.")
    ] = False,
) -> None:
    """Predict the validation and test regions, or any volume with --image, to which most options belong.

    A volume is predicted by block. Run again after whatever ended it, it goes on where it was; exit code 3
    says that some blocks could not be read.
    """
    from synmlops.learning.volume_prediction import Engine
    from synmlops.stages import infer as stage

    settings = load_params(params)
    if image is None:
        if any((model, voxel_nm, resample, roi, mask, format, block, scheduler, part, track)):
            raise SynmlopsError("of the options, only --gpus and --processes go without --image")
        engine = Engine(gpus=gpus, processes=processes)
        record = stage.run(settings, prepared=prepared, models=models, out=out, engine=engine)
        typer.echo(f"probabilities in {out}; run {record.key}")
        return
    written = stage.run_on_images(
        image,
        models=model or [str(models / "model.safetensors")],
        out=out,
        params=settings.infer,
        engine=Engine(gpus, processes, scheduler, part_of(part), three_voxels("--block", block, least=1)),
        view=stage.View(three_numbers(voxel_nm), box_of(roi), mask, resample),
        suffix=suffix_of(format),
        tracked=track,
    )
    for path in written:
        typer.echo(path)
    if not written:
        typer.echo("this part is done; the output appears when all are")


@app.command()
def evaluate(
    params: ParamsFile = Path("params.yaml"),
    prepared: PreparedFolder = PREPARED,
    predicted: PredictedFolder = PREDICTED,
    models: ModelsFolder = MODELS,
    out: Annotated[Path, typer.Option(help="Folder for scores, tables and report.")] = EVALUATED,
) -> None:
    """Decode the probabilities, match partners to the truth, write scores, tables and a report."""
    from synmlops.stages.evaluate import run
    from synmlops.stages.scores import score_table

    run(load_params(params), prepared=prepared, predicted=predicted, curves=models / "history.csv", out=out)
    typer.echo(score_table(out))
    typer.echo(f"report: {(out / 'report.html').resolve()}")


def _count_ranks(gpus: int | None, processes: int) -> int:
    """Settle how many processes train: one per GPU, else as many as were asked for on the CPU."""
    from synmlops.learning.distributed import check_gpus

    n_gpus = check_gpus(0 if processes > 1 and gpus is None else gpus)
    if n_gpus and processes > 1:
        raise SynmlopsError(f"--processes {processes} is for the CPU; with --gpus {n_gpus} leave it out")
    return n_gpus or processes


def _given_volumes(params: Params, image: str | None, label: str | None, kind: str | None) -> dict[str, Any]:
    """Turn the volume options into the params they stand for.

    Where the params name no validation and test volumes and no split, the volumes are cross-validated by
    bands, with the narrowest guard that the network allows.
    """
    if image is None or label is None or kind is None:
        raise SynmlopsError("--image, --label and --label-kind go together; give all three")
    kinds = kind.split("@")
    given = {"image": image, "label": label, "label_kind": kinds[0] if len(kinds) == 1 else kinds}
    overrides: dict[str, Any] = {"data.phantom": None, "data.train": given}
    if params.data.validation is None and params.data.split is None:
        guard = params.network.receptive_field_zyx()[1]
        overrides["data.split"] = {"axis": "y", "bands": 4, "guard": guard}
    return overrides
