"""The trials of a search, in a SQLite file that survives whatever ends the process."""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from synmlops.section import SynmlopsError
from synmlops.tracking.runs import Ended
from synmlops.tuning.space import Space
from synmlops.volumes.files import plain_write_errors

MOST_ATTEMPTS = 3
"""Times that a trial is begun or gone on with before what ends it is taken for its fault."""

_AT_RANDOM = 5  # trials before the sampler learns from those before
_ATTEMPTS, _REASON = "attempts", "reason"

State = Literal["running", "complete", "pruned", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Pruned(Ended):
    """A trial is worse than the others were at that step."""


@dataclass(frozen=True)
class Row:
    """A trial as it stands."""

    number: int
    state: State
    best: float | None  # validation F1
    best_step: int | None
    values: Mapping[str, Any]
    reason: str  # why it failed or was pruned


def best_of(rows: Sequence[Row]) -> Row | None:
    """Give the best complete trial, the first of equals; None where none is complete."""
    complete = [row for row in rows if row.state == "complete"]
    return max(complete, key=lambda row: row.best or 0.0, default=None)


class Study:
    """Trials one after the other, each decided by the seed, its number and the outcomes before it.

    Parameters
    ----------
    folder : Path
        Holds study.db; made if it is not there. Only one process at a time, see `alone`.
    space : Space
    facts : mapping
        What else must be the same when a search goes on, by name.
    seed : int
    spare : int
        Trials that must be complete before any is pruned.
    first_prunable : int
        Step before which no trial is pruned.

    Raises
    ------
    SynmlopsError
        If the folder holds a search with another space or other facts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        space: Space,
        facts: Mapping[str, str],
        seed: int,
        spare: int,
        first_prunable: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._seed = space, seed
        with plain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._study = optuna.create_study(
            storage=f"sqlite:///{(folder / 'study.db').resolve()}",
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=spare, n_warmup_steps=first_prunable),
        )
        self._agree({**{f"space {key}": text for key, text in space.as_text().items()}, **facts}, folder)

    def rows(self) -> list[Row]:
        """Give all trials, in their order."""
        return [self._row(trial) for trial in self._study.get_trials(deepcopy=False)]

    def next(self, n_trials: int) -> "Attempt | None":
        """Go on with the trial that was interrupted, or begin one; None once `n_trials` have ended."""
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                self._seed_sampler(trial.number)  # it may have been ended before all its values were drawn
                attempt = Attempt(self._study, Trial(self._study, trial._trial_id), space=self._space)
                if attempt.begin():
                    return attempt
        if len(trials) >= n_trials:
            return None
        self._seed_sampler(len(trials))
        attempt = Attempt(self._study, self._study.ask(), space=self._space)
        attempt.begin()
        return attempt

    def _seed_sampler(self, number: int) -> None:
        """Seed each trial by its number: the state of one sampler would start over with the process."""
        digest = hashlib.sha256(f"{self._seed} {number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_AT_RANDOM)

    def _agree(self, facts: Mapping[str, str], folder: Path) -> None:
        """Keep the facts of a new search, compare those of one that goes on."""
        before = self._study.user_attrs.get("facts")
        if before is None:
            self._study.set_user_attr("facts", dict(facts))
            return
        changed = sorted(name for name in {*facts, *before} if facts.get(name) != before.get(name))
        if changed:
            raise SynmlopsError(
                f"{folder}: this search was begun with other values of {', '.join(changed)}; give another "
                "--name, or put them back"
            )

    def _row(self, trial: FrozenTrial) -> Row:
        scores = trial.intermediate_values
        best_step = max(scores, key=lambda step: (scores[step], -step), default=None)
        is_drawn = len(trial.params) == len(self._space.entries)
        return Row(
            number=trial.number,
            state=_STATES[trial.state],
            best=None if best_step is None else scores[best_step],
            best_step=best_step,
            values=self._space.draw(optuna.trial.FixedTrial(trial.params)) if is_drawn else {},
            reason=trial.user_attrs.get(_REASON, ""),
        )


class Attempt:
    """A trial at work; exactly one of `complete`, `prune` and `fail` ends it."""

    def __init__(self, study: optuna.Study, trial: Trial, *, space: Space) -> None:
        self._study, self._trial = study, trial
        self.values = space.draw(trial)
        self.number = trial.number

    def begin(self) -> bool:
        """Count the attempt; False if there were too many, which ends the trial as failed."""
        n = self._trial.user_attrs.get(_ATTEMPTS, 0)
        if n >= MOST_ATTEMPTS:
            self.fail(f"was ended from outside {n} times")
            return False
        self._trial.set_user_attr(_ATTEMPTS, n + 1)
        return True

    def watch(self, step: int, score: float) -> None:
        """Take a validation score.

        Raises
        ------
        Pruned
            If the best score so far is below the median of the complete trials at this step.
        """
        if step not in self._now().intermediate_values:  # a training that goes on validates again
            self._trial.report(score, step)
        if self._trial.should_prune():
            raise Pruned(f"pruned at step {step}: validation F1 {score:.3f} is below the median there")

    def complete(self) -> float:
        """End with the best score."""
        best = max(self._now().intermediate_values.values())
        self._study.tell(self._trial, best)
        return best

    def prune(self, reason: str) -> None:
        """End as not worth going on with."""
        self._trial.set_user_attr(_REASON, reason)
        self._study.tell(self._trial, state=TrialState.PRUNED)

    def fail(self, reason: str) -> None:
        """End without a score."""
        self._trial.set_user_attr(_REASON, reason)
        self._study.tell(self._trial, state=TrialState.FAIL)

    @property
    def has_score(self) -> bool:
        """Whether a validation was heard of, in this process or one before."""
        return bool(self._now().intermediate_values)

    def _now(self) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[self.number]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a search for this process.

    Raises
    ------
    SynmlopsError
        If another process holds it.
    """
    with plain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SynmlopsError(
                f"{folder}: process {file.read().strip() or 'another'} runs this search; wait for it, or "
                "give another --name"
            ) from None
        with suppress(OSError):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield
