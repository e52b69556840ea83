"""The run of a stage: what train, infer and evaluate log through.

    with StageRun.start(params=flatten(params), data=hashes) as run:  # train
        run.log_metrics({"loss": 0.5}, step=1)
        run.commit(1)  # the checkpoint of step 1 is on disk
        run.record.write(out / "run.json")

    with StageRun.attach("infer", params=..., record=RunRecord.read(models / "run.json")) as run:
        ...

Every call writes to a file under ROOT/.synmlops/runs and returns; a thread sends from there. A server that is
slow, away or full of errors never stops, slows or fails a stage: what could not be sent waits for the next
stage or for `synmlops sync`.
"""

import json
import re
import shutil
import signal
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from synmlops.params import SynmlopsError
from synmlops.tracking.delivery import Delivery
from synmlops.tracking.lineage import (
    Lineage,
    experiment_name,
    project_root,
    public_uri,
    read_lineage,
    state_folder,
    tracking_uri,
)
from synmlops.tracking.metric_log import MetricLog, iter_events, settled_steps
from synmlops.tracking.record import Flat, RunRecord
from synmlops.tracking.sender import Sender, Synced, sync
from synmlops.tracking.sidecar import Opening, Progress
from synmlops.tracking.system_metrics import SystemMetrics
from synmlops.volumes.files import plain_write_errors, sha256_of

__all__ = ["RunRecord", "StageRun", "Synced", "sync"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
Context = Literal["training", "validation", "test"]
_FLUSH_SECONDS = 30.0
_KILLED_FLUSH_SECONDS = 5.0  # whoever sends SIGTERM soon sends SIGKILL
_RUN_SECONDS = 20.0  # for the store to say which run a stage goes into, the first use of SQLite included
_METRIC_NAME = re.compile(r"[\w\-./: ]{1,250}", re.ASCII)


class StageRun:
    """A stage on record; made by `start` or `attach`, used as a context manager.

    Leaving the block without an exception finishes the run as complete, an exception as FAILED (its message
    in the tag `synmlops.failure`), Ctrl-C and SIGTERM as KILLED.
    """

    def __init__(
        self, root: Path, log: MetricLog, opening: Opening, *, lineage: Lineage, system: bool
    ) -> None:
        self._root = root
        self._log = log
        self._opening = opening
        self._lineage = lineage
        self._notes: list[str] = []
        self._finished = False
        self._step = 0  # the last one logged, which system metrics share
        self._sent_steps: dict[str, int] = {}  # of a resumed run: done again, but already in the store
        self._must_rewind = False
        if log.is_new:
            log.append("open", asdict(opening))
            Progress(log.path).save()
        self._delivery = Delivery(log.path, note=self._notes.append)
        self._sender = Sender(root, self._delivery)
        self._system: SystemMetrics | None = None
        if system:
            before = max(
                (n for name, n in self._steps_before().items() if name.startswith("system/")), default=-1
            )
            self._system = SystemMetrics(opening.stage, first_step=before + 1, log=self._log_system)
        self._old_handler: Any = None

    # -- beginning ---------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        *,
        params: Mapping[str, Flat],
        data: Mapping[str, str],
        key: str | None = None,
        from_step: int | None = None,
        stage: str = "train",
        root: Path | None = None,
        system: bool = True,
    ) -> "StageRun":
        """Begin a new run, or go on with one.

        Parameters
        ----------
        params : mapping
            Flattened params; all are logged.
        data : mapping
            Name of each input to its SHA-256; tags `synmlops.data.NAME`.
        key : str, optional
            Of the run that a resumed training goes on with; default: a new one.
        from_step : int, optional
            Step of the checkpoint that training goes on from: what was logged beyond it and not sent is
            void. Default: told from the first step that is logged.
        stage : str, optional
            Default: train.
        root : Path, optional
            Project root; default: `project_root()`.
        system : bool, optional
            Whether to sample CPU, memory and GPU.

        Raises
        ------
        SynmlopsError
            If the metric file cannot be written, or another process is writing it.
        """
        root = root or project_root()
        lineage = read_lineage()
        resumed = key is not None
        key = key or uuid.uuid4().hex
        log = MetricLog(_logs(root) / key / f"{stage}.jsonl")
        opening = Opening(
            stage=stage,
            attempt=uuid.uuid4().hex[:8],
            key=key,
            child_key=None,
            experiment=experiment_name(),
            params=dict(params),
            data=dict(data),
            tags=lineage.tags(),
            record=None,
            unsure=resumed and log.is_new,
        )
        return cls(root, log, opening, lineage=lineage, system=system)._begin(from_step)

    @classmethod
    def attach(
        cls,
        stage: str,
        *,
        params: Mapping[str, Flat],
        record: RunRecord,
        data: Mapping[str, str] | None = None,
        root: Path | None = None,
        system: bool = True,
    ) -> "StageRun":
        """Write into the run of an earlier stage, or into a child of it.

        It is a child if the run has a complete record of this stage, is being written by another process, or
        was given other values for `params` or `data`. Nothing that is in a run is ever overwritten.

        Parameters
        ----------
        stage : str
        params : mapping
            Flattened params of this stage's own sections. A child gets those of `record` too.
        record : RunRecord
            What the stage before wrote.
        data, root, system
            As for `start`.
        """
        root = root or project_root()
        lineage = read_lineage()
        folder = _logs(root) / record.key
        attempt = uuid.uuid4().hex[:8]
        opening = Opening(
            stage=stage,
            attempt=attempt,
            key=record.key,
            child_key=uuid.uuid4().hex,
            experiment=experiment_name(),
            params=dict(params),
            data=dict(data or {}),
            tags=lineage.tags(),
            record=record.to_dict(),
            unsure=False,
        )
        log = MetricLog(folder / f"{stage}-{attempt}.jsonl")
        return cls(root, log, opening, lineage=lineage, system=system)._begin(None)

    def _begin(self, from_step: int | None) -> Self:
        if not self._log.is_new:
            self._must_rewind = True
            self._log.append("resume", {})
            if from_step is not None:
                self.rewind(from_step)
        self._sender.start()
        if self._system is not None:
            self._system.start()
        return self

    def _steps_before(self) -> dict[str, int]:
        return {} if self._log.is_new else settled_steps(self._log.path)

    # -- what a stage logs -------------------------------------------------------------------------------

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log values of one step; they are sent once `commit` covers it, or when the stage is complete.

        Parameters
        ----------
        metrics : mapping
            Name to value; NaN and infinity are taken.
        step : int
            At least 0. In evaluate and infer, which have no steps, leave it.

        Raises
        ------
        ValueError
            If a name has more than letters, digits, `_ - . / :` and spaces, or a step is negative.
        SynmlopsError
            If the disk is full.
        """
        for name in metrics:
            if not _METRIC_NAME.fullmatch(name) or name.startswith("/") or ".." in name:
                raise ValueError(f"metric {name!r}: MLflow takes letters, digits, _ - . / : and spaces")
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        if self._must_rewind:
            self.rewind(max(step - 1, self._last_commit()))
        self._step = max(self._step, step)
        values = {n: float(v) for n, v in metrics.items() if step > self._sent_steps.get(n, -1)}
        if values:
            self._log.append("metrics", {"metrics": values, "step": step}, hold=step)

    def commit(self, step: int | None = None) -> None:
        """Say that the work up to and including `step` is durable, so that its metrics may be sent.

        Call it after the checkpoint of `step` is on disk. Default: all that was logged so far.
        """
        self._log.commit(step)
        self._sender.nudge()

    def rewind(self, step: int) -> None:
        """Say that work goes on from the checkpoint of `step`: what is unsent beyond it will come again.

        What is beyond it and was sent already (a run that failed sends all it has) is not sent again.
        """
        self._must_rewind = False
        self._log.rewind(step)
        steps = settled_steps(self._log.path)
        self._sent_steps = {name: last for name, last in steps.items() if last > step}
        self._sender.nudge()

    def log_params(self, params: Mapping[str, Flat]) -> None:
        """Log more params; one that the run has with another value is left as it is, with a note."""
        self._append("params", dict(params))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        self._append("tags", dict(tags))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or all files of a folder, into the run's artifact folder `folder`.

        A copy is kept under ROOT/.synmlops until it is uploaded, since the next stage may replace the file.

        Raises
        ------
        SynmlopsError
            If the file is not there, or there is no room for the copy.
        """
        if path.is_dir():
            for below in sorted(p for p in path.rglob("*") if p.is_file()):
                inner = below.parent.relative_to(path).as_posix()
                parts = [part for part in (folder, path.name, inner) if part and part != "."]
                self.log_artifact(below, "/".join(parts))
            return
        digest = sha256_of(path)
        copy = self._log.path.parent / "files" / uuid.uuid4().hex / path.name
        with plain_write_errors(copy):
            copy.parent.mkdir(parents=True)
            shutil.copyfile(path, copy)
        body = {"copy": str(copy.relative_to(_logs(self._root))), "origin": str(path.resolve())}
        self._append("artifact", {**body, "sha256": digest, "folder": folder})

    def log_input(
        self,
        name: str,
        *,
        digest: str,
        context: Context,
        source: str | Path,
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Log a volume as an MLflow dataset of the run.

        Parameters
        ----------
        name : str
            A volume that is used in two contexts needs two names, since MLflow keeps one context each.
        digest : str
            SHA-256 of the file; MLflow shows its first 36 digits.
        context : str
            training, validation or test.
        source : str or Path
            Where it was read from.
        profile : mapping, optional
            What else to show: shape, voxel size, counts.
        """
        body = {"name": name, "digest": digest[:36], "context": context, "source": str(source)}
        self._append("input", {**body, "profile": json.dumps(dict(profile or {}))})

    def flush(self, seconds: float = _FLUSH_SECONDS) -> bool:
        """Wait until all that may be sent is sent; False if that takes longer or the store is away."""
        return self._sender.wait_idle(seconds)

    # -- what it tells -----------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """The run's key. After `attach` it is known once the store has answered; see `record`."""
        return self.record.key

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: a run made anew, a child, something the store would not take."""
        return tuple(self._notes)

    @property
    def record(self) -> RunRecord:
        """The record to write beside the stage's outputs. Take it at the end of the stage.

        After `attach` this waits for the store to say which run it is; if it does not answer, the record
        names the run that the stage goes into unless that one turns out to have a record of the stage.
        """
        opening = self._opening
        attached = opening.record is not None
        known = self._sender.wait_for_run(_RUN_SECONDS) if attached else self._sender.run_known
        key = (known.key if known else None) or self._likely_key()
        before = RunRecord.from_dict(opening.record) if opening.record is not None else None
        is_child = before is not None and key != before.key
        log = str(self._log.path.relative_to(_logs(self._root)))
        earlier = {} if before is None or is_child else before.logs
        parent = None if before is None else before.key if is_child else before.parent_key
        return RunRecord(
            key=key,
            stage=opening.stage,
            mlflow_run_id=known.run_id if known else None,
            tracking_uri=public_uri(tracking_uri(self._root), self._root),
            parent_key=parent,
            commit=self._lineage.commit,
            dirty=self._lineage.dirty,
            dvc_experiment=self._lineage.dvc_experiment,
            data={**(before.data if before else {}), **opening.data},
            params=opening.merged_params,
            logs={**earlier, opening.stage: log},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    # -- the end -----------------------------------------------------------------------------------------

    def finish(
        self, status: Status = "FINISHED", reason: str = "", *, seconds: float = _FLUSH_SECONDS
    ) -> RunRecord:
        """End the stage on record and send what is left; leaving the `with` block does it too.

        Parameters
        ----------
        status : str
            FINISHED marks the run's record of this stage complete. FAILED and KILLED leave it open to another
            attempt.
        reason : str
            Why it failed, one line.
        seconds : float
            How long to wait for the store; the rest stays in the file, and `notes` say so.
        """
        if not self._finished:
            self._finished = True
            if self._system is not None:
                self._system.stop()
            if self._must_rewind:
                self.rewind(self._last_commit())
            self._log.finish({"status": status, "reason": reason[:500]}, keep_held=self._keep_held(status))
            if not self._sender.end(seconds):
                self._note_unsent()
            self._log.close()
        return self.record

    def __enter__(self) -> Self:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ):
            self._old_handler = signal.signal(signal.SIGTERM, _terminated)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.finish()
            elif isinstance(error, Exception):
                self.finish("FAILED", " ".join(f"{type(error).__name__}: {error}".split()))
            else:
                self.finish("KILLED", type(error).__name__, seconds=_KILLED_FLUSH_SECONDS)
        finally:
            if self._old_handler is not None:
                signal.signal(signal.SIGTERM, self._old_handler)

    def _keep_held(self, status: Status) -> bool | None:
        """What becomes of metrics that no checkpoint covers: see `MetricLog.finish`."""
        if status == "FINISHED":
            return True
        if self._opening.record is not None:
            return False  # infer and evaluate begin anew: no half measures among those of the next attempt
        return True if status == "FAILED" else None  # the curve into a failure is worth seeing

    def _append(self, kind: str, body: Mapping[str, Any]) -> None:
        self._log.append(kind, body)
        self._sender.nudge()

    def _log_system(self, values: dict[str, float], sample: int) -> bool:
        try:
            self._log.append("metrics", {"metrics": values, "step": sample}, hold=self._step)
        except (SynmlopsError, ValueError):  # disk full, which the stage itself will say; or finished
            return False
        return True

    def _last_commit(self) -> int:
        steps = [e.body["step"] for e in iter_events(self._log.path) if e.kind == "commit"]
        return max((step for step in steps if step is not None), default=0)

    def _likely_key(self) -> str:
        """Tell, without the store, which run this goes into."""
        opening = self._opening
        folder = self._log.path.parent
        others = (log for log in folder.glob(f"{opening.stage}-*.jsonl") if log != self._log.path)
        if opening.child_key is not None and any(_is_complete(log) for log in others):
            if self._finished and not self._sender.is_alive():
                self._delivery.progress.choose(opening.child_key)
            return opening.child_key
        return opening.key

    def _note_unsent(self) -> None:
        why = self._sender.trouble or "the store is slow"
        n = self._delivery.unsent()
        self._notes.append(
            f"{n} lines were not sent ({why}); they are safe in {self._log.path}, and the next stage or "
            "`synmlops sync` sends them"
        )


def _logs(root: Path) -> Path:
    return state_folder(root) / "runs"


def _is_complete(log: Path) -> bool:
    complete = False
    for event in iter_events(log):
        if event.kind == "close":
            complete = event.body["status"] == "FINISHED"
    return complete


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
