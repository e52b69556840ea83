"""The train stage: a model per fold, its curves, and the record of the run they belong to."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from synmlops.layout import RUN_FILE, WHOLE, model_file
from synmlops.learning.checkpoint import Model, ModelMeta, load_start, read_meta, save_model
from synmlops.learning.distributed import Ranks, joined_ranks
from synmlops.learning.launch import restarts_so_far
from synmlops.learning.loop import Fitted, Observer, Recipe, Row, Silent, fit
from synmlops.learning.predict import predict
from synmlops.learning.resume import KEY_FILE, Facts, adopt, digest_of, facts_of
from synmlops.learning.sampling import LabelledRegion, train_regions
from synmlops.learning.states import States
from synmlops.params import CHANNELS, InferParams, Params, SynmlopsError, WindowParams, sections
from synmlops.progress import Report, say, track
from synmlops.synapses.voxels import Histogram, add_by_key, voxel_histograms
from synmlops.tracking.lineage import project_root
from synmlops.tracking.recorder import Context
from synmlops.tracking.runs import Ended, Nested, RunRecord, StageRun
from synmlops.volumes.files import atomic_path, plain_write_errors, sha256_of
from synmlops.volumes.prepared import Fold, Manifest, Region, read_manifest

SECTIONS = ("seed", "data", "network", "sampling", "augment", "loss", "train")
"""What train depends on and logs."""

SAME_GREY = 0.1
"""Means and deviations of grey levels that differ by less than this share of a deviation are the same."""

NEUTRAL = ("train.checkpoint_every",)
"""Params that change no weight and no curve: a training goes on though they changed."""


@dataclass(frozen=True)
class _Training:
    """What does not change from fold to fold."""

    params: Params
    recipe: Recipe
    manifest: Manifest
    facts: Facts  # what decides the outcome
    states: Path  # folder of the resume checkpoints


def run(
    params: Params,
    *,
    prepared: Path,
    out: Path,
    gpus: int | None = None,
    resume: Path | None = None,
    watch: Callable[[int, float], None] | None = None,
    nested: Nested | None = None,
) -> RunRecord | None:
    """Train one model per fold and write them when all are done.

    A training that was ended before goes on from its newest checkpoint, as the same run.

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
    resume : Path, optional
        A checkpoint, or its folder, to go on from.
    watch : callable, optional
        Hears of (step, validation F1) on rank 0, and may raise to end the training; `Ended` ends it for
        good, so that nothing is kept to go on from.
    nested : Nested, optional
        The run that this one lies below.

    Returns
    -------
    record : RunRecord or None
        The run that was written into; None on all ranks but the first.

    Raises
    ------
    SynmlopsError
        If params, data and machine do not allow this training, or `resume` is of another one.
    """
    with joined_ranks(gpus) as ranks:
        return run_as(ranks, params, prepared=prepared, out=out, resume=resume, watch=watch, nested=nested)


def run_as(
    ranks: Ranks,
    params: Params,
    *,
    prepared: Path,
    out: Path,
    resume: Path | None = None,
    watch: Callable[[int, float], None] | None = None,
    nested: Nested | None = None,
) -> RunRecord | None:
    """Do what `run` does as one of `ranks` that have met already."""
    manifest, recipe = read_manifest(prepared), Recipe.of(params)
    facts = _facts_of(params, manifest)
    states = project_root() / ".synmlops" / "checkpoints" / digest_of(facts)
    training = _Training(params, recipe, manifest, facts, states)
    if ranks.is_first:
        if resume is not None and not restarts_so_far():  # a group started again has gone further by itself
            adopt(resume, folder=states, facts=facts, folds=[fold.name for fold in manifest.folds])
        return _train_as_first(training, ranks, out=out, watch=watch, nested=nested)
    ranks.agree(facts)
    for fold in manifest.folds:
        _fit_fold(training, fold, ranks=ranks, observer=Silent(), run_key="")
    return None


def _train_as_first(
    training: _Training,
    ranks: Ranks,
    *,
    out: Path,
    watch: Callable[[int, float], None] | None,
    nested: Nested | None,
) -> RunRecord:
    """Train on the rank that writes files and talks to MLflow."""
    params, folds = training.params, training.manifest.folds
    say(_unlike_start(params.train.start_from, training.manifest))
    key_file = training.states / KEY_FILE
    key = key_file.read_text() if key_file.exists() else None
    with (
        _kept_until_over(training.states),
        StageRun.start(
            params=sections(params, *SECTIONS),
            data=training.manifest.digests,
            key=key,
            from_step=_steps_done(training) if key else None,
            nested=nested,
        ) as run,
        _room_for_the_record(training),
        ranks.together(),
    ):
        ranks.when_ended(lambda reason: _end_as_failed(run, reason))
        ranks.agree(training.facts)  # here, so that the run says why it failed
        with plain_write_errors(key_file):
            training.states.mkdir(parents=True, exist_ok=True)
            key_file.write_text(run.record.key)
        _log_volumes(run, training.manifest)
        with track("train", params.train.steps * len(folds)) as report:
            outcomes = {}
            for n, fold in enumerate(folds):
                observer = _Observer(
                    run,
                    report,
                    fold=fold.name,
                    before=n * params.train.steps,
                    batch_size=params.sampling.batch_size,
                    watch=watch,
                )
                outcomes[fold.name] = _fit_fold(
                    training, fold, ranks=ranks, observer=observer, run_key=run.record.key
                )
        _write(out, outcomes, training=training, run=run)
    say(run.notes)
    return run.record


@contextmanager
def _kept_until_over(states: Path) -> Iterator[None]:
    """Remove the checkpoints once nothing will go on from them."""
    try:
        yield
    except Ended:
        shutil.rmtree(states)
        raise
    shutil.rmtree(states)


@contextmanager
def _room_for_the_record(training: _Training) -> Iterator[None]:
    """See that a full disk can still take the line that says so."""
    try:
        yield
    except SynmlopsError:
        for fold in training.manifest.folds:
            States(training.states / fold.name).make_room()
        raise


def _end_as_failed(run: StageRun, reason: str) -> None:
    run.finish("FAILED", reason, seconds=5.0)


def _unlike_start(start_from: str | None, manifest: Manifest) -> list[str]:
    """Say where the model that training begins with saw other images: it has to learn that anew."""
    if start_from is None:
        return []
    meta = read_meta(Path(start_from))
    here, there = (manifest.mean, manifest.std), (meta.mean, meta.std)
    if all(abs(a - b) <= SAME_GREY * meta.std for a, b in zip(here, there, strict=True)):
        return []
    return [
        f"train.start_from: {start_from} takes grey levels {there[0]:g} and {sum(there):g} for 0 and 1, this "
        f"training {here[0]:.4g} and {sum(here):.4g}; to keep its own, set data.grey: "
        f"[{there[0]:g}, {there[1]:g}]"
    ]


def _facts_of(params: Params, manifest: Manifest) -> Facts:
    """Give all that decides the outcome, by dotted names: params, and what prepare made of the data."""
    values: dict[str, object] = {
        name: value
        for name, value in sections(params, *SECTIONS).items()
        if name not in NEUTRAL and not name.startswith("data.")
    }
    values |= {f"data.{name}": digest for name, digest in manifest.digests.items()}
    for name, volume in manifest.volumes.items():
        values[f"data.{name}.shape_zyx"] = volume.shape_zyx
        values[f"data.{name}.voxel_nm"] = volume.grid.voxel_nm
        values[f"data.{name}.label_kind"] = volume.kind
    values |= {"data.mean": manifest.mean, "data.std": manifest.std}
    if params.train.start_from is not None:
        load_start(Path(params.train.start_from), params.network)  # refused before a run is begun
        values["train.start_from.sha256"] = sha256_of(params.train.start_from)
    for fold in manifest.folds:
        for role in ("train", "validation"):
            boxes = [(region.volume, region.box.slices) for region in getattr(fold, role)]
            values[f"data.fold_{fold.name}.{role}"] = hashlib.sha256(str(boxes).encode()).hexdigest()[:16]
    return facts_of(values)


def _steps_done(training: _Training) -> int:
    """Count the steps of all folds that the checkpoints cover."""
    done = 0
    for n, fold in enumerate(training.manifest.folds):
        state = States(training.states / fold.name).load()
        if state is not None:
            done = n * training.params.train.steps + state["progress"]["step"]
    return done


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


def _fit_fold(
    training: _Training, fold: Fold, *, ranks: Ranks, observer: Observer, run_key: str
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
        states=training.states / fold.name,
        validate=partial(_validation_f1, truths=truths, windows=params.train.validation) if truths else None,
        observer=observer,
        origin={"facts": training.facts, "fold": fold.name, "run": run_key},
    )
    return fitted, meta


def _validation_f1(model: Model, *, truths: Sequence[LabelledRegion], windows: WindowParams) -> float:
    """Give the mean over the known channels of voxel F1 at its best threshold, over all regions together."""
    histograms: dict[str, Histogram] = {}
    params = InferParams(**windows.model_dump())
    for truth in truths:
        sides = truth.volume.sides[truth.box.slices]
        slabs = predict(model, truth.volume.image[truth.box.slices], params=params)
        for z, slab in slabs:
            found = voxel_histograms(
                slab,
                sides[z : z + slab.shape[1]],
                names=model.meta.channels,
                known=truth.volume.channels,
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
        last = meta.model_copy(update={"step": fitted.last_step})
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


@dataclass
class _Observer:
    """Hands the curves of a fold to the run and to the progress bar."""

    run: StageRun
    report: Report
    fold: str
    before: int  # steps of the folds before
    batch_size: int
    watch: Callable[[int, float], None] | None = None
    note: str = ""
    _since: tuple[int, float] | None = None  # step and time of the loss curve's last point

    def logged(self, step: int, row: Row) -> None:
        prefix = "" if self.fold == WHOLE else f"fold_{self.fold}/"
        row = row | (self._speed(step) if "loss" in row else {})
        self.run.log_metrics({prefix + name: value for name, value in row.items()}, step=self.before + step)
        if "validation_f1" in row:
            self.note = f"validation F1 {row['validation_f1']:.3f}"
            if self._since is not None:
                self._since = step, time.monotonic()  # validation is no part of the speed
        parts = (
            f"loss {row['loss']:.3f}" if "loss" in row else "",
            f"{row['patches_per_s']:.1f} patches/s" if "patches_per_s" in row else "",
            self.note,
        )
        self.report(self.before + step, " ".join(part for part in parts if part))
        if self.watch is not None and "validation_f1" in row:
            self.watch(self.before + step, row["validation_f1"])

    def saved(self, step: int) -> None:
        self.run.commit(self.before + step)

    def alarm(self, step: int, message: str) -> None:
        where = message if self.fold == WHOLE else f"fold {self.fold}: {message}"
        self.run.set_tags({"synmlops.alarm": where})
        say([where])

    def _speed(self, step: int) -> Row:
        """Give patches per second since the last point; in MLflow alone, since it is never twice the same."""
        before, now = self._since, time.monotonic()
        self._since = step, now
        if before is None or step == before[0]:
            return {}
        return {"patches_per_s": (step - before[0]) * self.batch_size / (now - before[1])}
