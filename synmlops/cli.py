"""The `synmlops` command: one Typer command per stage and tool, nothing else."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from synmlops.layout import EVALUATED, MODELS, PREDICTED, PREPARED, RUN_FILE, WHOLE, model_file
from synmlops.params import IncompleteError, Params, SynmlopsError, load_params
from synmlops.progress import say

_Number = TypeVar("_Number", int, float)

app = typer.Typer(
    help="Find synaptic partners in electron-microscopy volumes and keep every experiment comparable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
importers = typer.Typer(help="Turn public datasets into volumes.", no_args_is_help=True)
app.add_typer(importers, name="import")


def _find_modules_beside(params: Path) -> Path:
    """Have Python look for a network of the user's own beside params.yaml, after everywhere else."""
    folder = str(params.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return params


ParamsFile = Annotated[Path, typer.Option("--params", help="The params file.", callback=_find_modules_beside)]
PreparedFolder = Annotated[Path, typer.Option("--prepared", help="What prepare wrote.")]
ModelsFolder = Annotated[Path, typer.Option("--models", help="What train wrote.")]
PredictedFolder = Annotated[Path, typer.Option("--predicted", help="What infer wrote.")]
Gpus = Annotated[int | None, typer.Option(min=0, help="GPUs to use; default: all there are, else the CPU.")]


def main() -> None:
    """Run the command line."""
    with plain_errors():
        app()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can mend into one message and exit code 2, or 3 if all else was done."""
    try:
        yield
    except IncompleteError as error:
        print(f"synmlops: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from None
    except SynmlopsError as error:
        from synmlops.learning.launch import tell_launcher

        if tell_launcher(error):
            raise SystemExit(2) from None
        hint = ""
        if "DVC_STAGE" in os.environ:
            hint = "\nDVC removed this stage's outputs before it ran; `dvc checkout` brings them back."
        print(f"synmlops: {error}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


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
) -> None:
    """Predict the validation and test regions, or any volume with --image, to which most options belong.

    A volume is predicted by block. Run again after whatever ended it, it goes on where it was; exit code 3
    says that some blocks could not be read.
    """
    from synmlops.learning.volume_prediction import Engine
    from synmlops.stages import infer as stage

    settings = load_params(params)
    if image is None:
        if any((model, voxel_nm, resample, roi, mask, format, block, scheduler, part)):
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
        engine=Engine(gpus, processes, scheduler, _part(part), _three_voxels("--block", block, least=1)),
        view=stage.View(_three_numbers(voxel_nm), stage.parse_roi(roi) if roi else None, mask, resample),
        suffix=_suffix(format),
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


@app.command()
def decode(
    probabilities: Annotated[Path, typer.Argument(help="What infer wrote: HDF5 or Zarr.")],
    params: ParamsFile = Path("params.yaml"),
    out: Annotated[Path, typer.Option(help="Folder for instances, partners and edges.")] = Path(
        "data/decoded"
    ),
    threshold: Annotated[
        float | None,
        typer.Option(help="0 to 1; default: evaluate.threshold, else what evaluate chose, else 0.5."),
    ] = None,
    evaluated: Annotated[Path, typer.Option("--evaluated", help="What evaluate wrote.")] = EVALUATED,
    fold: Annotated[str, typer.Option(help="Of a cross-validation: whose threshold.")] = WHOLE,
    neurons: Annotated[
        str | None, typer.Option(help="Segmentation on the same voxels, to tell partners apart by neuron.")
    ] = None,
    block: Annotated[
        str | None, typer.Option(help="Voxels that a process reads at once, z,y,x; default: 64,512,512.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="CPU processes.")] = 1,
    format: Annotated[
        str | None, typer.Option(help="Of the instances: h5, or zarr, the default for several processes.")
    ] = None,
) -> None:
    """Turn probabilities of any size into instances, partner table and edges, block by block."""
    from synmlops.stages import decode as stage

    suffix, settings = _suffix(format), load_params(params).evaluate
    chosen = stage.choose_threshold(
        threshold, params=settings, operating_point=evaluated / "operating_point.json", fold=fold
    )
    typer.echo(f"threshold {chosen.value:g} ({chosen.source})")
    written = stage.run(
        probabilities,
        out=out,
        params=settings,
        threshold=chosen.value,
        neurons=neurons,
        block_zyx=_three_voxels("--block", block, least=1) or stage.BLOCK_ZYX,
        processes=processes,
        suffix=suffix,
    )
    say(written.notes)
    typer.echo(written.summary)
    for path in written.files:
        typer.echo(path)


@app.command()
def view(
    folder: Annotated[
        Path | None, typer.Argument(help="What decode or evaluate wrote: its files, unless others are named.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="The image; with evaluate's folder it is known.")] = None,
    probabilities: Annotated[Path | None, typer.Option(help="What infer wrote.")] = None,
    instances: Annotated[str | None, typer.Option(help="Synapses as decode and evaluate write them.")] = None,
    partners: Annotated[Path | None, typer.Option(help="Partner table, Parquet.")] = None,
    neurons: Annotated[str | None, typer.Option(help="Segmentation of the neurons.")] = None,
    region: Annotated[
        str | None, typer.Option(help="Of evaluate's folder: which region; default: the first.")
    ] = None,
    prepared: PreparedFolder = PREPARED,
    predicted: PredictedFolder = PREDICTED,
    at: Annotated[str | None, typer.Option(help="Where to begin: voxel z,y,x of the image.")] = None,
    site: Annotated[
        int | None, typer.Option(min=1, help="Site to begin at; default: the most confident.")
    ] = None,
    voxel_nm: Annotated[
        str | None, typer.Option(help="Voxel size z,y,x where the image does not say it.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
    bind: Annotated[str, typer.Option(help="Address to listen on; the default is this machine's own.")] = (
        "127.0.0.1"
    ),
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
) -> None:
    """Look at image, probabilities, synapses and partners in the browser (neuroglancer), until Ctrl-C."""
    from synmlops.stages import view as stage

    found = {}
    if folder is not None:
        found = stage.sources_in(folder, region=region, prepared=prepared, predicted=predicted)
    elif region is not None:
        raise SynmlopsError(f"--region {region}: is one of evaluate's folder; give that")
    given = {
        "image": image,
        "probabilities": probabilities,
        "instances": instances,
        "partners": partners,
        "neurons": neurons,
    }
    stage.run(
        stage.sources_of(found, given, voxel_nm=_three_numbers(voxel_nm)),
        at_zyx=_three_voxels("--at", at, least=0),
        site=site,
        bind=bind,
        port=port,
        browser=browser,
    )


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
) -> None:
    """Put the trained model and its operating point in the MLflow registry."""
    from synmlops.serving import registry
    from synmlops.tracking.lineage import project_root, tracking_uri
    from synmlops.tracking.record import RunRecord

    version = registry.register(
        models / model_file(fold),
        record=RunRecord.read(models / RUN_FILE),
        infer=load_params(params).infer,
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


@app.command("params")
def show_params(
    params: ParamsFile = Path("params.yaml"),
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of params.yaml.")] = False,
) -> None:
    """Check params.yaml, or print its JSON schema, with which an editor completes and checks it."""
    import json

    if schema:
        typer.echo(json.dumps(Params.model_json_schema(), indent=1))
        return
    load_params(params)
    typer.echo(f"{params}: nothing wrong found")


@app.command()
def network(
    params: ParamsFile = Path("params.yaml"),
    prepared: PreparedFolder = PREPARED,
    patch: Annotated[
        str | None, typer.Option(help="Voxels of a patch, z,y,x; default: sampling.patch_zyx.")
    ] = None,
    gpus: Gpus = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Print parameters, receptive field, arithmetic and memory of the network that the params describe."""
    from synmlops.learning.distributed import pick_device
    from synmlops.learning.networks import show
    from synmlops.learning.networks.report import report_on
    from synmlops.stages.prepare import voxel_nm_of

    given = {} if patch is None else {"sampling.patch_zyx": patch.split(",")}
    settings = load_params(params, overrides=given)
    sampling = settings.sampling
    report = report_on(
        settings.network, train=settings.train, patch_zyx=sampling.patch_zyx, device=pick_device(gpus)
    )
    voxel_nm = voxel_nm_of(settings.data, prepared)
    if as_json:
        typer.echo(show.as_json(report, batch=sampling.batch_size, voxel_nm=voxel_nm))
    else:
        show.show(report, batch=sampling.batch_size, voxel_nm=voxel_nm)


@app.command()
def inspect(
    files: Annotated[list[str], typer.Argument(help="Volumes: HDF5, TIFF, folder of sections.")],
) -> None:
    """Print shape, type, voxel size, label kind and counts of volumes, and what is wrong with them."""
    from rich.console import Console

    from synmlops.volumes.inspect import inspect_volumes, render

    reports = inspect_volumes(files)
    console = Console()
    for report in reports:
        console.print(render(report))
    if not all(report.readable for report in reports):
        raise typer.Exit(2)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder for the volumes.")],
    seed: Annotated[
        list[int] | None, typer.Option(help="One volume for each; give it again for more.")
    ] = None,
    params: Annotated[Path | None, typer.Option(help="Take data.phantom from this params file.")] = None,
) -> None:
    """Make phantom EM volumes with labels, neuron ids and true partners."""
    from synmlops.params import PhantomParams
    from synmlops.stages.prepare import phantom_source

    settings = load_params(params).data.phantom if params else PhantomParams()
    if settings is None:
        raise SynmlopsError(f"{params}: data.phantom is null; set it, or leave out --params for the default")
    out.mkdir(parents=True, exist_ok=True)
    for number in seed or [1]:
        source = phantom_source(settings, number, out)
        typer.echo("\n".join(f"{name}: {path}" for name, path in source.paths.items()))


@app.command()
def patches(
    params: ParamsFile = Path("params.yaml"),
    prepared: PreparedFolder = PREPARED,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("data/patches.png"),
    step: Annotated[int, typer.Option(min=1, help="Step of training whose batch to show.")] = 1,
    n: Annotated[int, typer.Option("--n", min=1, max=64, help="Patches.")] = 8,
    fold: Annotated[str | None, typer.Option(help="Of a cross-validation; default: the first.")] = None,
    only: Annotated[
        str | None, typer.Option(help="One augmentation, such as elastic: always, and nothing else.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--all", help="One patch in a row for each augmentation, alone.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the one in the params.")] = None,
) -> None:
    """Draw what training sees: image, target and weight of patches, before and after augmentation."""
    from synmlops.stages.patches import run

    if each and only is not None:
        raise SynmlopsError(f"--only {only} goes without --all; leave one of them out")
    settings = load_params(params, overrides={} if seed is None else {"seed": seed})
    titles = run(settings, prepared=prepared, out=out, step=step, n=n, fold=fold, only=only, each=each)
    for title in titles:
        typer.echo(title)
    typer.echo(f"picture: {out.resolve()}")


@importers.command()
def vnc(
    source: Annotated[str, typer.Argument(help="Folder or archive of the dataset, or the archive's URL.")],
    dest: Annotated[Path, typer.Argument(help="Folder for the HDF5 volumes.")],
    sha256: Annotated[str | None, typer.Option(help="Digest that the downloaded archive must have.")] = None,
) -> None:
    """Turn the public Drosophila VNC dataset into HDF5 volumes with union labels."""
    from synmlops.volumes.importers.vnc import import_vnc

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


def _three_numbers(text: str | None) -> tuple[float, float, float] | None:
    return None if text is None else _triple("--voxel-nm", text, float, "three numbers, such as 40,8,8")


def _three_voxels(option: str, text: str | None, *, least: int) -> tuple[int, int, int] | None:
    if text is None:
        return None
    found = _triple(option, text, int, "three whole numbers z,y,x, such as 64,512,512")
    if min(found) < least:
        raise SynmlopsError(f"{option} {text}: must not be below {least}")
    return found


def _triple(
    option: str, text: str, kind: Callable[[str], _Number], wanted: str
) -> tuple[_Number, _Number, _Number]:
    try:
        z, y, x = (kind(part) for part in text.split(","))
    except ValueError as error:
        raise SynmlopsError(f"{option} {text}: give {wanted}") from error
    return z, y, x


def _suffix(format: str | None) -> str | None:
    if format not in (None, "h5", "zarr"):
        raise SynmlopsError(f"--format {format}: must be h5 or zarr")
    return format and f".{format}"


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise SynmlopsError(f"--part {text}: give a share and how many there are, such as 3/64")
    return int(number), int(of)
