"""The commands beside the pipeline: decode and look at what there is, check volumes, params and network."""

from pathlib import Path
from typing import Annotated

import typer

from synmlops.cli.common import (
    Gpus,
    ParamsFile,
    PredictedFolder,
    PreparedFolder,
    app,
    box_of,
    suffix_of,
    three_numbers,
    three_voxels,
)
from synmlops.layout import EVALUATED, PREDICTED, PREPARED, WHOLE
from synmlops.params import Params, SynmlopsError, load_params
from synmlops.progress import say


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
    roi: Annotated[str | None, typer.Option(help="Region in voxels, z0:z1,y0:y1,x0:x1.")] = None,
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

    suffix, settings = suffix_of(format), load_params(params).evaluate
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
        roi=box_of(roi),
        block_zyx=three_voxels("--block", block, least=1) or stage.BLOCK_ZYX,
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
        stage.sources_of(found, given, voxel_nm=three_numbers(voxel_nm)),
        at_zyx=three_voxels("--at", at, least=0),
        site=site,
        bind=bind,
        port=port,
        browser=browser,
    )


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
