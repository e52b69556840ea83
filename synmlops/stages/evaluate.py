"""The evaluate stage: instances, partner tables, scores, curves and a report."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.layout import RUN_FILE, model_file, probabilities_file
from synmlops.params import CHANNELS, EvaluateParams, Params, SynmlopsError, flatten, sections
from synmlops.progress import say, track
from synmlops.synapses.instances import Instances
from synmlops.synapses.partners import partners_of
from synmlops.synapses.scores import (
    Scores,
    Tables,
    decode,
    refuse_unscorable,
    score_region,
    true_instances,
)
from synmlops.synapses.voxels import Histogram, voxel_histograms
from synmlops.tracking.record import RunRecord
from synmlops.tracking.report import RegionView, ReportContent, write_report
from synmlops.tracking.runs import StageRun
from synmlops.volumes.files import atomic_folder, atomic_path
from synmlops.volumes.prepared import UNTRUSTED, Fold, Manifest, PreparedVolume, Region, read_manifest
from synmlops.volumes.probabilities import Probabilities, read_probabilities
from synmlops.volumes.store import write_hdf5
from synmlops.volumes.table import moved_voxels, points_nm, read_table, write_table


@dataclass(frozen=True)
class OperatingPoint:
    """The threshold of one fold and where it comes from; stored as JSON beside the scores."""

    threshold: float
    source: str  # "given", "validation" or "test regions of the other folds"
    voxel_f1: float | None  # of the union at this threshold, on the regions it was chosen on
    model_sha256: str  # of the model file it was chosen for


@dataclass(frozen=True)
class Evaluation:
    """What evaluate found."""

    scores: Scores
    metrics: dict[str, float]
    operating_points: dict[str, OperatingPoint]  # by fold


def run(params: Params, *, prepared: Path, predicted: Path, curves: Path, out: Path) -> Evaluation:
    """Score the test regions of every fold and write OUT, which appears when all is done.

    Parameters
    ----------
    params : Params
    prepared, predicted : Path
        What prepare and infer wrote.
    curves : Path
        `history.csv` of train, for the report.
    out : Path
        Folder for metrics.json, operating_point.json, precision_recall.csv, report.html, partners/ and
        instances/.

    Raises
    ------
    SynmlopsError
        If a file is missing or broken, the threshold is "auto" and only the test region is labelled, or what
        is decoded cannot be scored.
    """
    refuse_unscorable(params.evaluate)
    manifest, inferred = read_manifest(prepared), RunRecord.read(predicted / RUN_FILE)
    with StageRun.attach("evaluate", params=sections(params, "evaluate"), record=inferred) as run:
        with atomic_folder(out) as folder:
            points = {
                fold.name: _operating_point(
                    fold,
                    manifest,
                    predicted,
                    params=params.evaluate,
                    model_sha256=_model_digest(inferred, fold.name, predicted),
                )
                for fold in manifest.folds
            }
            scored = _score_all(manifest, predicted, points, params=params.evaluate, folder=folder)
            evaluation = _sum_up(scored, points)
            _write_summary(evaluation, scored, run=run, curves=curves, params=params, folder=folder)
        _log(run, evaluation, out)
    say(run.notes)
    return evaluation


def _model_digest(inferred: RunRecord, fold: str, predicted: Path) -> str:
    """Give the digest of the model that a fold was predicted with."""
    name = model_file(fold)
    if name not in inferred.data:
        raise SynmlopsError(
            f"{predicted / RUN_FILE}: names no {name}, so the predictions are of other folds than the "
            "prepared data; run `synmlops infer` again"
        )
    return inferred.data[name]


def _score_all(
    manifest: Manifest,
    predicted: Path,
    points: Mapping[str, OperatingPoint],
    *,
    params: EvaluateParams,
    folder: Path,
) -> "list[_Scored]":
    scored: list[_Scored] = []
    with track("evaluate", sum(len(fold.test) for fold in manifest.folds)) as report:
        for fold, region in _test_regions(manifest):
            probabilities = read_probabilities(predicted / probabilities_file(fold.name, "test", region.name))
            one = _evaluate_region(
                region,
                manifest.volumes[region.volume],
                probabilities,
                fold=fold.name,
                threshold=points[fold.name].threshold,
                params=params,
            )
            _write_region(one, probabilities, folder)
            scored.append(one)
            report(len(scored), region.name)
    return scored


@dataclass(frozen=True, eq=False)
class _Scored:
    """One test region with all that was made of it."""

    view: RegionView
    scores: Scores | None  # None where there is no label
    instances: Instances  # all that was decoded; the view shows what the label can be compared with
    partners: pd.DataFrame | None
    start_zyx: tuple[int, int, int]  # of the region in its volume


def _operating_point(
    fold: Fold, manifest: Manifest, predicted: Path, *, params: EvaluateParams, model_sha256: str
) -> OperatingPoint:
    """Settle the threshold of a fold without looking at its test region."""
    if params.threshold != "auto":
        return OperatingPoint(params.threshold, "given", None, model_sha256)
    chosen_on = [(fold, "validation", region) for region in fold.validation]
    source = "validation"
    if not chosen_on:  # a cross-validation: what the other folds hold out
        chosen_on = [
            (other, "test", region) for other in manifest.folds if other != fold for region in other.test
        ]
        source = "test regions of the other folds"
    histogram = Histogram.empty()
    for other, role, region in chosen_on:
        volume = manifest.volumes[region.volume]
        if volume.kind is not None:
            probabilities = read_probabilities(predicted / probabilities_file(other.name, role, region.name))
            histogram += _histograms(probabilities, volume, region)["union"]
    if not histogram.foreground.any():
        raise SynmlopsError(
            f"evaluate.threshold: auto finds no labelled synapse to choose it on (fold {fold.name}); "
            "label a validation volume, or set a number such as 0.5"
        )
    threshold = histogram.best_threshold()
    return OperatingPoint(threshold, source, histogram.at(threshold).f1, model_sha256)


def _histograms(probabilities: Probabilities, volume: PreparedVolume, region: Region) -> dict[str, Histogram]:
    return voxel_histograms(
        probabilities.values_czyx,
        volume.sides[region.box.slices],
        names=probabilities.channels,
        known=volume.channels,
    )


def _evaluate_region(
    region: Region,
    volume: PreparedVolume,
    probabilities: Probabilities,
    *,
    fold: str,
    threshold: float,
    params: EvaluateParams,
) -> _Scored:
    """Decode one region and score it as far as its label and its model know."""
    grid, has_sides = probabilities.grid, probabilities.channels == CHANNELS
    values = probabilities.values_czyx if has_sides else probabilities.values_czyx[-1:]
    instances = decode(values, threshold=threshold, params=params, voxel_nm=grid.voxel_nm)
    neurons = volume.read("neurons", region.box)
    partners = None
    if has_sides:
        partners = partners_of(
            instances,
            voxel_nm=grid.voxel_nm,
            offset_nm=grid.offset_nm,
            probabilities_czyx=values,
            neurons=neurons,
            min_side_voxels=params.min_side_voxels,
        )
    view = RegionView(
        name=region.name,
        fold=fold,
        image=volume.image[region.box.slices],
        predicted=instances,
        true=None,
        sides=has_sides,
        predicted_partners=partners,
        true_partners=None,
        voxel_nm=grid.voxel_nm,
        offset_nm=grid.offset_nm,
    )
    scores = None
    if volume.kind is not None:
        view = _beside_truth(view, volume, region, neurons=neurons)
        scores = _score(view, _histograms(probabilities, volume, region), neurons, threshold, params)
    return _Scored(view, scores, instances, partners, region.box.start_zyx)


def _beside_truth(
    view: RegionView, volume: PreparedVolume, region: Region, *, neurons: NDArray[np.unsignedinteger] | None
) -> RegionView:
    """Give a view with the truth, in the ids that both know, and without what lies outside the valid mask."""
    assert volume.kind is not None  # the caller asks for labelled volumes alone
    label = volume.read("label", region.box)
    assert label is not None  # prepare writes a label for every kind
    sides = view.sides and volume.kind != "union"
    true = true_instances(label, volume.kind, sides=sides)
    predicted = view.predicted
    if view.sides and not sides:
        predicted = true_instances(predicted, "pairs", sides=False)
    predicted_partners = true_partners = None
    trusted = volume.sides[region.box.slices] != UNTRUSTED
    if sides and view.predicted_partners is not None:
        predicted_partners = _with_trusted_ends(view.predicted_partners, trusted)
        true_partners = _with_trusted_ends(_true_partners(volume, region, true, neurons), trusted)
    if not trusted.all():
        predicted, true = predicted * trusted, true * trusted
    return replace(
        view,
        predicted=predicted,
        true=true,
        sides=sides,
        predicted_partners=predicted_partners,
        true_partners=true_partners,
    )


def _with_trusted_ends(table: pd.DataFrame, trusted: NDArray[np.bool_]) -> pd.DataFrame:
    """Keep the partners both of whose points lie where the label can be trusted."""
    kept = np.ones(len(table), bool)
    for side in ("pre", "post"):
        points = table[[f"{side}_{axis}" for axis in "zyx"]].to_numpy()
        inside = ((points >= 0) & (points < trusted.shape)).all(axis=1)  # a site may reach beyond its region
        kept[inside] &= trusted[tuple(points[inside].T)]
    return pd.DataFrame(table[kept]).reset_index(drop=True)


def _score(
    view: RegionView,
    histograms: Mapping[str, Histogram],
    neurons: NDArray[np.unsignedinteger] | None,
    threshold: float,
    params: EvaluateParams,
) -> Scores:
    tables = None
    if view.predicted_partners is not None and view.true_partners is not None:
        tables = Tables(view.predicted_partners, view.true_partners, with_neurons=neurons is not None)
    assert view.true is not None  # a view beside its truth
    return score_region(
        histograms,
        view.predicted,
        view.true,
        threshold=threshold,
        voxel_nm=view.voxel_nm,
        tables=tables,
        params=params,
    )


def _true_partners(
    volume: PreparedVolume, region: Region, true: Instances, neurons: NDArray[np.unsignedinteger] | None
) -> pd.DataFrame:
    """Give the true partners of a region: those of the table that came with the volume, else of its label."""
    grid = volume.grid.cropped(region.box.start_zyx)
    if volume.partners is None:
        return partners_of(true, voxel_nm=grid.voxel_nm, offset_nm=grid.offset_nm, neurons=neurons)
    table = read_table(volume.partners)
    voxel = (points_nm(table).mean(axis=1) - np.array(grid.offset_nm)) / np.array(grid.voxel_nm)
    inside = ((voxel >= -0.5) & (voxel < np.array(region.box.shape_zyx) - 0.5)).all(axis=1)
    z, y, x = region.box.start_zyx
    return moved_voxels(pd.DataFrame(table[inside]).reset_index(drop=True), (-z, -y, -x))


def _test_regions(manifest: Manifest) -> Iterator[tuple[Fold, Region]]:
    for fold in manifest.folds:
        for region in fold.test:
            yield fold, region


def _sum_up(scored: list[_Scored], points: dict[str, OperatingPoint]) -> Evaluation:
    known = [one.scores for one in scored if one.scores is not None]
    total = sum(known[1:], start=known[0]) if known else Scores()
    metrics = total.flat() if known else {}
    metrics["threshold"] = float(np.mean([point.threshold for point in points.values()]))
    return Evaluation(total, metrics, points)


def _write_region(one: _Scored, probabilities: Probabilities, folder: Path) -> None:
    name = one.view.name
    attrs = {"label_kind": "union" if one.partners is None else "pairs"}
    (folder / "instances").mkdir(exist_ok=True)
    write_hdf5(
        folder / "instances" / f"{name}.h5",
        {"main": one.instances},
        grid=probabilities.grid,
        attrs=attrs,
        compression="gzip",
    )
    if one.partners is not None:
        (folder / "partners").mkdir(exist_ok=True)
        write_table(moved_voxels(one.partners, one.start_zyx), folder / "partners" / f"{name}.parquet")


def _write_summary(
    evaluation: Evaluation,
    scored: list[_Scored],
    *,
    run: StageRun,
    curves: Path,
    params: Params,
    folder: Path,
) -> None:
    _write_json(folder / "metrics.json", evaluation.metrics)
    points = {name: asdict(point) for name, point in evaluation.operating_points.items()}
    _write_json(folder / "operating_point.json", points)
    curve = _curves(evaluation.scores.histograms)
    with atomic_path(folder / "precision_recall.csv") as temporary:
        curve.to_csv(temporary, index=False)
    per_region = [
        {"region": one.view.name, "fold": one.view.fold} | _headlines(one.scores)
        for one in scored
        if one.scores is not None
    ]
    sources = {point.source for point in evaluation.operating_points.values()}
    record = run.record
    content = ReportContent(
        title="Synaptic partners",
        run={
            "run key": record.key,
            "commit": record.commit + (" (with uncommitted changes)" if record.dirty else ""),
            "DVC experiment": record.dvc_experiment or "none",
        },
        scores=evaluation.metrics,
        thresholds={name: point.threshold for name, point in evaluation.operating_points.items()},
        threshold_source=", ".join(sorted(sources)),
        per_region=pd.DataFrame(per_region),
        params=flatten(params),
        curves=pd.read_csv(curves) if curves.exists() else pd.DataFrame(),
        precision_recall=curve,
        regions=[one.view for one in scored],
        notes=[],
    )
    write_report(content, folder / "report.html")


def _headlines(scores: Scores) -> dict[str, float]:
    """Pick what tells one region from another at a glance."""
    endings = ("_f1", "_accuracy", "_true", "_predicted")
    return {name: value for name, value in scores.flat().items() if name.endswith(endings)}


def _curves(histograms: Mapping[str, Histogram]) -> pd.DataFrame:
    """Precision and recall of each channel by threshold; the same columns without any."""
    tables = [histogram.curve().assign(channel=name) for name, histogram in histograms.items()]
    columns = ["channel", "threshold", "precision", "recall", "f1"]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def _write_json(path: Path, tree: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(tree, indent=1) + "\n")


def _log(run: StageRun, evaluation: Evaluation, out: Path) -> None:
    run.log_metrics(evaluation.metrics, step=0)
    for name in ("metrics.json", "operating_point.json", "precision_recall.csv", "report.html"):
        run.log_artifact(out / name, "evaluation")
    for path in sorted((out / "partners").glob("*.parquet")):
        run.log_artifact(path, "evaluation/partners")
