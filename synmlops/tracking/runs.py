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

import signal
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

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
from synmlops.tracking.recorder import Recorder
from synmlops.tracking.sender import Sender, Synced, sync
from synmlops.tracking.sidecar import Opening, Progress
from synmlops.tracking.system_metrics import SystemMetrics

__all__ = ["Ended", "Nested", "RunRecord", "StageRun", "Synced", "sync"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
_FLUSH_SECONDS = 30.0
_KILLED_FLUSH_SECONDS = 5.0  # whoever sends SIGTERM soon sends SIGKILL
_RUN_SECONDS = 20.0  # for the store to say which run a stage goes into, the first use of SQLite included


@dataclass(frozen=True)
class Nested:
    """A place below another run, as that of a trial below its search."""

    parent_key: str
    name: str  # for people


class Ended(Exception):
    """Raised in the block of a run to end it early on purpose; the message says why."""


class StageRun(Recorder):
    """A stage on record; made by `start` or `attach`, used as a context manager.

    Leaving the block without an exception finishes the run as complete, an exception as FAILED (its message
    in the tag `synmlops.failure`), Ctrl-C and SIGTERM as KILLED; `Ended` too, with all that was logged.
    """

    def __init__(
        self, root: Path, log: MetricLog, opening: Opening, *, lineage: Lineage, system: bool
    ) -> None:
        self._notes: list[str] = []
        self._delivery = Delivery(log.path, note=self._notes.append)
        super().__init__(log, Sender(root, self._delivery))
        self._root = root
        self._opening = opening
        self._lineage = lineage
        self._finished = False
        self._system: SystemMetrics | None = None
        if system:
            steps = {} if log.is_new else settled_steps(log.path)
            before = max((n for name, n in steps.items() if name.startswith("system/")), default=-1)
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
        nested: Nested | None = None,
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
        nested : Nested, optional
            Where the run lies below another.

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
            parent_key=nested.parent_key if nested else None,
            name=nested.name if nested else None,
        )
        return cls._open(root, log, opening, lineage=lineage, system=system)._begin(from_step)

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
        return cls._open(root, log, opening, lineage=lineage, system=system)._begin(None)

    @classmethod
    def _open(
        cls, root: Path, log: MetricLog, opening: Opening, *, lineage: Lineage, system: bool
    ) -> "StageRun":
        try:
            if log.is_new:
                log.append("open", asdict(opening))
                Progress(log.path).save()
            return cls(root, log, opening, lineage=lineage, system=system)
        except BaseException:
            log.close()
            raise

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
        above = opening.parent_key if before is None else before.parent_key
        parent = before.key if before is not None and is_child else above
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
            if not self._sender.is_alive():  # else it goes on until the process ends: nobody else may send
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
            elif isinstance(error, Ended):
                self.commit()
                self.finish("KILLED", str(error))
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
