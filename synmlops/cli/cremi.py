"""`synmlops import cremi`, `export cremi` and `score cremi`: files of the CREMI challenge."""

from pathlib import Path
from typing import Annotated

import typer

from synmlops.cli.exchange import exporters, importers, scorers, show, show_dry_run


@importers.command()
def cremi(
    source: Annotated[Path, typer.Argument(help="The challenge's HDF5, a training file.")],
    dest: Annotated[Path, typer.Argument(help="Folder for the volume and the partner table.")],
    thickness_nm: Annotated[
        float, typer.Option(help="How far from the cleft tissue belongs to the synapse.")
    ] = 60.0,
    reach_nm: Annotated[
        float, typer.Option(help="How far a cleft may lie from the line between the points of a pair.")
    ] = 150.0,
    leave_out_faulty: Annotated[
        bool,
        typer.Option(
            "--leave-out-faulty", help="Mask pairs that end outside the labels or in no neuron, and go on."
        ),
    ] = False,
    name: Annotated[str | None, typer.Option(help="Of the files; default: the source's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there and draw a few synapses, write nothing else.")
    ] = False,
) -> None:
    """Turn a CREMI file into an image, pairs labels, a mask and the true partner table."""
    from synmlops.volumes.importers import cremi_survey as stage

    options = stage.CremiOptions(thickness_nm, reach_nm, leave_out_faulty)
    chosen = stage.name_of(source, name)
    if dry_run:
        picture = dest / f"{chosen}_survey.png"
        show_dry_run(stage.survey_cremi(source, options, picture), picture)
        return
    show(stage.import_cremi(source, dest, options, name=chosen))
    typer.echo(f"all that is masked: {dest / chosen}_doubts.csv; for data in params.yaml:")
    typer.echo("\n".join(stage.params_lines(dest, chosen)))


@exporters.command("cremi")
def export_cremi(
    table: Annotated[Path, typer.Argument(help="Partner table as decode, evaluate and imports write it.")],
    out: Annotated[Path, typer.Argument(help="The file, such as sample_a.hdf.")],
    clefts: Annotated[
        str | None, typer.Option(help="Instances, or probabilities (with --threshold), to give as clefts.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of the union probability, 0 to 1, from which a voxel is cleft.")
    ] = None,
    neurons: Annotated[str | None, typer.Option(help="Segmentation to give as neuron ids.")] = None,
    raw: Annotated[str | None, typer.Option(help="Image to give along, uint8.")] = None,
    least_confidence: Annotated[float, typer.Option(help="Leave out pairs of less confidence.")] = 0.0,
) -> None:
    """Write partners, clefts and neuron ids as the CREMI challenge wants them."""
    from synmlops.volumes.exporters.cremi import CremiParts, export_cremi

    parts = CremiParts(clefts, threshold, neurons, raw)
    written = export_cremi(table, out, parts, least_confidence=least_confidence)
    typer.echo(f"{out}: {len(written.partners)} pairs, {len(written.ids)} points")


@scorers.command("cremi")
def score_cremi(
    truth: Annotated[Path, typer.Argument(help="CREMI file with true annotations, neuron ids, clefts.")],
    predicted: Annotated[Path, typer.Argument(help="CREMI file with predicted annotations, clefts.")],
    threshold_nm: Annotated[float, typer.Option(help="Both ends of a match lie within it.")] = 400.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Score partners and clefts as the CREMI challenge does."""
    import json

    from synmlops.progress import say
    from synmlops.synapses.cremi_scores import score_cremi

    scores = score_cremi(truth, predicted, threshold_nm=threshold_nm)
    flat = scores.flat()
    if as_json:
        typer.echo(json.dumps(flat, indent=1))
        return
    say(scores.notes)
    for name, value in flat.items():
        shown = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        typer.echo(f"{name:42s} {shown}")
