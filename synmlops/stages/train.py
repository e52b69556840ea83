"""The train stage: a model per fold, its curves, and the record of the run they belong to."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from pydantic import BaseModel

from synmlops.layout import RUN_FILE, WHOLE, model_file
from synmlops.learning.checkpoint import Model, ModelMeta, save_model
from synmlops.learning.distributed import Ranks, joined_ranks
from synmlops.learning.loop import Fitted, Observer, Recipe, Row, fit
from synmlops.learning.predict import predict
from synmlops.learning.sampling import LabelledRegion
from synmlops.params import CHANNELS, InferParams, Params, SynmlopsError, sections
from synmlops.progress import Report, say, track
from synmlops.synapses.voxels import Histogram, add_by_key, voxel_histograms
from synmlops.tracking.lineage import project_root
from synmlops.tracking.recorder import Context
from synmlops.tracking.runs import RunRecord, StageRun
from synmlops.volumes.files import atomic_path
from synmlops.volumes.prepared import Fold, Manifest, Region, read_manifest

SECTIONS = ("seed", "data", "network", "sampling", "augment", "loss", "train")
"""What train depends on and logs."""


@dataclass(frozen=True)
class _Training:
    """What does not change from fold to fold."""

    params: Params
    recipe: Recipe
    manifest: Manifest
    states: Path  # folder of the resume checkpoints


def run(params: Params, *, prepared: Path, out: Path, gpus: int | None = None) -> RunRecord | None:
    """Train one model per fold and write them when all are done.

    Parameters
    ----------
    params : Params
    prepared : Path
        What prepare wrote.
    out : Path
        Folder for `model.safetensors`, `last.safetensors` (with a suffix per fold), `history.csv` and
        `run.json`.
    gpus : int, optional
        0 trains on the CPU. By default a GPU is used where there is one.

    Returns
    -------
    record : RunRecord or None
        The run that was written into; None on all ranks but the first.
    """
    manifest, recipe = read_manifest(prepared), _recipe_of(params)
    states = project_root() / ".synmlops" / "checkpoints" / _digest(recipe, prepared)
    training = _Training(params, recipe, manifest, states)
    with joined_ranks(gpus) as ranks:
        if ranks.is_first:
            return _train_as_first(training, ranks, out=out)
        for fold in manifest.folds:
            _fit_fold(training, fold, ranks=ranks, observer=_Silent())
        return None


def _train_as_first(training: _Training, ranks: Ranks, *, out: Path) -> RunRecord:
    """Train on the rank that writes files and talks to MLflow."""
    params, folds = training.params, training.manifest.folds
    key_file = training.states / "key"
    key = key_file.read_text() if key_file.exists() else None
    with StageRun.start(params=sections(params, *SECTIONS), data=training.manifest.digests, key=key) as run:
        training.states.mkdir(parents=True, exist_ok=True)
        key_file.write_text(run.record.key)
        _log_volumes(run, training.manifest)
        with track("train", params.train.steps * len(folds)) as report:
            outcomes = {}
            for n, fold in enumerate(folds):
                observer = _Observer(run, report, fold=fold.name, before=n * params.train.steps)
                outcomes[fold.name] = _fit_fold(training, fold, ranks=ranks, observer=observer)
        _write(out, outcomes, training=training, run=run)
    shutil.rmtree(training.states)
    say(run.notes)
    return run.record


def _log_volumes(run: StageRun, manifest: Manifest) -> None:
    """Log the volumes as MLflow datasets, each in the context of the role that it has in the first fold."""
    fold = manifest.folds[0]
    contexts: dict[str, tuple[Context, tuple[Region, ...]]] = {
        "train": ("training", fold.train),
        "validation": ("validation", fold.validation),
        "test": ("test", fold.test),
    }
    cross = len(manifest.folds) > 1  # then every volume is trained on, and held out in part
    for role, (context, regions) in contexts.items():
        if cross and role != "train":
            continue
        for name in sorted({region.volume for region in regions}):
            volume = manifest.volumes[name]
            run.log_input(
                name,
                digest=volume.sha256["image"],
                context=context,
                source=volume.sources["image"],
                profile={
                    "shape_zyx": list(volume.shape_zyx),
                    "voxel_nm": list(volume.grid.voxel_nm),
                    "label_kind": volume.kind or "none",
                },
            )


def _recipe_of(params: Params) -> Recipe:
    return Recipe(
        network=params.network,
        sampling=params.sampling,
        augment=params.augment,
        loss=params.loss,
        train=params.train,
        seed=params.seed,
    )


def _digest(recipe: Recipe, prepared: Path) -> str:
    """Name a training by all that decides its outcome, so that a resume finds its own checkpoint."""
    parts = [part.model_dump_json() for part in vars(recipe).values() if isinstance(part, BaseModel)]
    text = "\n".join([*parts, str(recipe.seed), (prepared / "manifest.json").read_text()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fit_fold(
    training: _Training, fold: Fold, *, ranks: Ranks, observer: Observer
) -> tuple[Fitted, ModelMeta]:
    params, manifest = training.params, training.manifest
    regions = train_regions(fold, manifest, patch_zyx=params.sampling.patch_zyx)
    channels = {name for region in regions for name in region.volume.channels}
    meta = ModelMeta(
        network=params.network,
        channels=tuple(name for name in CHANNELS if name in channels),
        mean=manifest.mean,
        std=manifest.std,
        voxel_nm=regions[0].volume.grid.voxel_nm,
        fold=fold.name,
    )
    truths = [
        LabelledRegion(volume, region.box)
        for region in fold.validation
        if (volume := manifest.volumes[region.volume]).kind
    ]
    fitted = fit(
        training.recipe,
        regions,
        meta=meta,
        ranks=ranks,
        state_path=training.states / f"{fold.name}.pt",
        validate=partial(_validation_f1, truths=truths, params=params.train.validation) if truths else None,
        observer=observer,
    )
    return fitted, meta


def train_regions(fold: Fold, manifest: Manifest, *, patch_zyx: tuple[int, int, int]) -> list[LabelledRegion]:
    """Give the training regions of a fold that can hold a patch.

    Raises
    ------
    SynmlopsError
        If a whole volume is smaller than a patch, or no region can hold one.
    """
    regions = []
    for region in fold.train:
        volume = manifest.volumes[region.volume]
        if any(n < p for n, p in zip(volume.shape_zyx, patch_zyx, strict=True)):
            raise SynmlopsError(
                f"{volume.sources.get('image', volume.path)}: {volume.shape_zyx} voxels are fewer than "
                f"sampling.patch_zyx {patch_zyx}; lower the patch or leave the volume out"
            )
        if all(n >= p for n, p in zip(region.box.shape_zyx, patch_zyx, strict=True)):
            regions.append(LabelledRegion(volume, region.box))
    if not regions:
        raise SynmlopsError(
            f"fold {fold.name}: no training region holds a patch of {patch_zyx}; lower sampling.patch_zyx or "
            "data.split.guard"
        )
    return regions


def _validation_f1(model: Model, *, truths: Sequence[LabelledRegion], params: InferParams) -> float:
    """Give the mean over the known channels of voxel F1 at its best threshold, over all regions together."""
    histograms: dict[str, Histogram] = {}
    for truth in truths:
        sides = truth.volume.sides[truth.box.slices]
        slabs = predict(model, truth.volume.image[truth.box.slices], params=params)
        for z, slab in slabs:
            found = voxel_histograms(
                slab, sides[z : z + slab.shape[1]], names=CHANNELS, known=truth.volume.channels
            )
            histograms = add_by_key(histograms, found)
    scored = [histograms[name] for name in model.meta.channels if name in histograms]
    return sum(one.at(one.best_threshold()).f1 for one in scored) / len(scored) if scored else 0.0


def _write(
    out: Path, outcomes: dict[str, tuple[Fitted, ModelMeta]], *, training: _Training, run: StageRun
) -> None:
    """Write models, curves and run record, and hand them to the run."""
    tables = []
    for fold, (fitted, meta) in outcomes.items():
        meta = meta.model_copy(update={"run_key": run.record.key})
        best = meta.model_copy(update={"step": fitted.best_step, "score": fitted.best_score})
        last = meta.model_copy(update={"step": training.params.train.steps})
        save_model(out / model_file(fold), fitted.best, best)
        save_model(out / model_file(fold, "last"), fitted.last, last)
        for which in ("model", "last"):
            run.log_artifact(out / model_file(fold, which), "checkpoints")
        prefix = "" if fold == WHOLE else f"fold_{fold}/"
        run.log_metrics({f"{prefix}best_step": float(fitted.best_step)}, step=0)
        if fitted.best_score is not None:
            run.log_metrics({f"{prefix}best_validation_f1": fitted.best_score}, step=0)
        tables.append(pd.DataFrame(fitted.history).assign(fold=fold))
    with atomic_path(out / "history.csv") as temporary:
        pd.concat(tables).to_csv(temporary, index=False)
    run.log_artifact(out / "history.csv", "curves")
    run.record.write(out / RUN_FILE)


class _Silent:
    def logged(self, step: int, row: Row) -> None:
        pass

    def saved(self, step: int) -> None:
        pass


@dataclass
class _Observer:
    """Hands the curves of a fold to the run and to the progress bar."""

    run: StageRun
    report: Report
    fold: str
    before: int  # steps of the folds before
    note: str = ""

    def logged(self, step: int, row: Row) -> None:
        prefix = "" if self.fold == WHOLE else f"fold_{self.fold}/"
        self.run.log_metrics({prefix + name: value for name, value in row.items()}, step=self.before + step)
        if "validation_f1" in row:
            self.note = f"validation F1 {row['validation_f1']:.3f}"
        loss = f"loss {row['loss']:.3f}" if "loss" in row else ""
        self.report(self.before + step, f"{loss} {self.note}".strip())

    def saved(self, step: int) -> None:
        self.run.commit(self.before + step)
