"""The search: params sets drawn from a space, each trained like any other, the bad ones not to the end."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from synmlops.layout import RUN_FILE
from synmlops.params import Params, load_params
from synmlops.progress import say
from synmlops.section import SynmlopsError
from synmlops.tracking.lineage import project_root, state_folder
from synmlops.tracking.record import Flat
from synmlops.tracking.runs import Nested, StageRun
from synmlops.tuning.params_file import leaves, rewrite
from synmlops.tuning.space import SEARCHED, Space, read_space
from synmlops.tuning.study import Attempt, Pruned, Row, Study, alone, best_of
from synmlops.volumes.files import atomic_path
from synmlops.volumes.prepared import Manifest, read_manifest

MOST_FAILURES = 3
"""Trials in a row that may fail; more of the same would come."""


class Train(Protocol):
    """Trains one params set, going on where an earlier attempt was ended."""

    def __call__(
        self, params: Params, *, out: Path, watch: Callable[[int, float], None], nested: Nested
    ) -> object:
        """Train; `watch` hears of (step, validation F1) and may raise to end it."""


@dataclass(frozen=True)
class Search:
    """What makes up a search.

    Attributes
    ----------
    base : Path
        The params file that trials start from.
    space : Path
        tune.yaml.
    prepared : Path
        What prepare wrote; shared by all trials.
    n_trials : int
        In all, those of earlier processes included.
    steps : int, optional
        Of each trial, in place of `train.steps`.
    spare : int
        Trials that must be complete before any is pruned.
    """

    name: str
    base: Path
    space: Path
    prepared: Path
    n_trials: int = 20
    steps: int | None = None
    seed: int = 0
    spare: int = 4

    @property
    def folder(self) -> Path:
        """Where study and trials are."""
        return search_folder(self.name)


def search_folder(name: str) -> Path:
    """Give the folder of a search.

    Raises
    ------
    SynmlopsError
        If the name is no plain file name.
    """
    if not name or name.startswith(".") or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise SynmlopsError(f"--name {name!r}: use letters, digits, dots, dashes and underscores")
    return state_folder(project_root()) / "tune" / name


def trial_folder(search: Path, number: int) -> Path:
    """Give the folder of a trial: its params.yaml and models."""
    return search / f"trial_{number:04d}"


def run(search: Search, *, train: Train) -> list[Row]:
    """Run the trials that are not done yet, each as an MLflow run below the one of the search.

    A trial is scored by its best validation F1. It is pruned at a validation where its best so far is
    below the median of the complete trials, though not in the first quarter of its steps. A trial whose
    process was killed goes on from its checkpoint.

    Parameters
    ----------
    search : Search
    train : Train

    Returns
    -------
    rows : list of Row
        All trials of the search, in their order.

    Raises
    ------
    SynmlopsError
        If space, params and data do not allow the search, another process runs it, or several trials in a
        row fail.
    """
    manifest = read_manifest(search.prepared)
    _check_validation(manifest, search.prepared)
    space = read_space(search.space, base=search.base)
    base = _base_values(search, space)
    steps = int(base["train.steps"])
    facts = {key: json.dumps(value) for key, value in base.items() if key not in space.entries}
    facts |= {f"data {name}": digest for name, digest in manifest.digests.items()} | {
        "--seed": str(search.seed)
    }
    with alone(search.folder):
        study = Study(
            search.folder,
            space=space,
            facts=facts,
            seed=search.seed,
            spare=search.spare,
            first_prunable=steps // 4,
        )
        with _start_run(search, space, manifest=manifest) as parent:
            _run_trials(study, search, base=base, train=train, parent=parent)
            _write_table(study.rows(), search.folder / "trials.csv", parent=parent)
    say(parent.notes)
    return study.rows()


def apply(name: str, number: int, *, params: Path) -> Mapping[str, Any]:
    """Put the params of a trial into a params file, whose comments stay.

    Returns
    -------
    changed : mapping
        Dotted key to new value.

    Raises
    ------
    SynmlopsError
        If there is no such trial.
    """
    source = trial_folder(search_folder(name), number) / "params.yaml"
    if not source.exists():
        found = sorted(path.parent.name for path in search_folder(name).glob("trial_*/params.yaml"))
        raise SynmlopsError(
            f"{source}: no such trial; "
            + (f"there are {found[0]} to {found[-1]}" if found else "`synmlops tune` makes them")
        )
    wanted = _searched(load_params(source))
    now = _searched(load_params(params))
    changed = {key: value for key, value in wanted.items() if key not in now or now[key] != value}
    rewrite(params, params, changed)
    load_params(params)
    return changed


def trials_table(rows: Sequence[Row]) -> str:
    """Give all trials as an aligned text table, then the params of the best one.

    Examples
    --------
    >>> print(trials_table([Row(0, "complete", 0.5, 20, {"loss.dice": 1.0}, "")]))
    trial  state        F1  at step  loss.dice
        0  complete  0.500       20        1.0
    best: trial 0, validation F1 0.500
      loss.dice: 1.0
    """
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    lines = [["trial", "state", "F1", "at step", *keys]]
    for row in rows:
        score = ["-", "-"] if row.best is None else [f"{row.best:.3f}", str(row.best_step)]
        values = [json.dumps(row.values[key]) if key in row.values else "" for key in keys]
        lines.append([str(row.number), row.state, *score, *values])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    best = best_of(rows)
    if best is not None:
        text.append(f"best: trial {best.number}, validation F1 {best.best or 0:.3f}")
        text += [f"  {key}: {json.dumps(value)}" for key, value in best.values.items()]
    return "\n".join(text)


def _run_trials(
    study: Study, search: Search, *, base: Mapping[str, Any], train: Train, parent: StageRun
) -> None:
    n_failed = 0
    while (attempt := study.next(search.n_trials)) is not None:
        folder = trial_folder(search.folder, attempt.number)
        failure = _run_trial(attempt, search, folder=folder, base=base, train=train, parent=parent)
        row = study.rows()[attempt.number]
        say([_outcome(row)])
        best = best_of(study.rows())
        scores = {"trial_validation_f1": row.best, "best_validation_f1": best.best if best else None}
        parent.log_metrics(
            {name: score for name, score in scores.items() if score is not None}, step=attempt.number
        )
        parent.commit()
        n_failed = n_failed + 1 if failure else 0
        if n_failed == MOST_FAILURES:
            raise SynmlopsError(f"{n_failed} trials in a row failed, the last one so: {failure}")


def _run_trial(
    attempt: Attempt,
    search: Search,
    *,
    folder: Path,
    base: Mapping[str, Any],
    train: Train,
    parent: StageRun,
) -> str:
    """Train a trial and say in the study how it ended; gives why it failed, or nothing."""
    path = folder / "params.yaml"
    try:
        rewrite(search.base, path, {**base, **attempt.values})
        params = load_params(path)
        if not (attempt.has_score and (folder / "models" / RUN_FILE).exists()):  # else it was trained already
            nested = Nested(parent.key, f"{search.name} trial {attempt.number}")
            train(params, out=folder / "models", watch=attempt.watch, nested=nested)
        attempt.complete()
    except Pruned as pruned:
        attempt.prune(str(pruned))
    except SynmlopsError as error:
        attempt.fail(str(error))
        return str(error)
    return ""


def _start_run(search: Search, space: Space, *, manifest: Manifest) -> StageRun:
    """Begin the run that the trials' runs lie below, or go on with it."""
    key_file = search.folder / "key"
    key = key_file.read_text() if key_file.exists() else None
    params: dict[str, Flat] = {f"space.{name}": text for name, text in space.as_text().items()}
    params |= {"tune.name": search.name, "tune.seed": search.seed, "tune.steps": search.steps}
    run = StageRun.start(params=params, data=manifest.digests, key=key, stage="tune", system=False)
    with atomic_path(key_file) as partial:
        partial.write_text(run.key)
    run.set_tags({"synmlops.tune": search.name})
    return run


def _base_values(search: Search, space: Space) -> dict[str, Any]:
    """Give what a trial's params are before its own values, and check that they can be trained."""
    overrides = {} if search.steps is None else {"train.steps": search.steps}
    both = [key for key in space.entries if key in ("train", "train.steps") and overrides]
    if both:
        raise SynmlopsError(f"{search.space}: {both[0]}: and --steps sets train.steps; leave one out")
    return _searched(load_params(search.base, overrides=overrides))


def _searched(params: Params) -> dict[str, Any]:
    """Give the params of training as dotted keys."""
    return leaves(params.model_dump(mode="json", include=set(SEARCHED)))


def _check_validation(manifest: Manifest, prepared: Path) -> None:
    if len(manifest.folds) > 1:
        raise SynmlopsError(
            f"{prepared}: is divided into {len(manifest.folds)} folds, and what they are tested on may "
            "choose no params; give data.train and data.validation volumes, set data.split to null, prepare"
        )
    regions = manifest.folds[0].validation
    if not any(manifest.volumes[region.volume].kind for region in regions):
        raise SynmlopsError(
            f"{prepared}: no labelled validation volume scores the trials; set data.validation"
        )


def _outcome(row: Row) -> str:
    if row.state == "complete":
        return f"trial {row.number}: validation F1 {row.best or 0:.4f} at step {row.best_step}"
    return f"trial {row.number}: {row.reason if row.state == 'pruned' else f'failed: {row.reason}'}"


def _write_table(rows: list[Row], path: Path, *, parent: StageRun) -> None:
    table = pd.DataFrame(
        {
            "trial": row.number,
            "state": row.state,
            "best_validation_f1": row.best,
            "best_step": row.best_step,
            **{key: json.dumps(value) for key, value in row.values.items()},
            "reason": row.reason,
        }
        for row in rows
    )
    with atomic_path(path) as partial:
        table.to_csv(partial, index=False)
    parent.log_artifact(path, "search")
