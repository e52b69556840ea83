"""From a metric log into the store: which run it belongs to, and how far it got.

How far is kept in a sidecar beside the log, per run, so that whoever goes on (the same stage after an
outage, a resumed one, a later stage, `synmlops sync`) sends each line once.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synmlops.params import SynmlopsError
from synmlops.tracking.lineage import UNKNOWN, tag_name
from synmlops.tracking.metric_log import Event, LogReader, read_events, reserved
from synmlops.tracking.record import RunRecord
from synmlops.tracking.store import (
    KEY_TAG,
    PARENT_TAG,
    KnownRun,
    Refused,
    RunGone,
    Store,
    Unreachable,
    text_of,
)
from synmlops.volumes.files import sha256_of

STAGE_TAG = "synmlops.stage."  # + stage: "running HOST PID ATTEMPT", complete, failed or killed
FAILURE_TAG = "synmlops.failure"
_POINTS_PER_CALL = 1000
_EVERYTHING = 2**62
_MARKS = {"FINISHED": "complete", "FAILED": "failed", "KILLED": "killed"}


@dataclass(frozen=True)
class Opening:
    """The first line of a log: all that is needed to find or make its run, at any later time."""

    stage: str
    attempt: str  # hex, unique to this log
    key: str  # of the run to go into
    child_key: str | None  # of the child to go into if that run has a record of this stage; None for a start
    experiment: str
    params: Mapping[str, Any]  # this stage's own
    data: Mapping[str, str]
    tags: Mapping[str, str]  # lineage
    record: Mapping[str, Any] | None  # what the stage was given to attach to
    unsure: bool  # resumed without its earlier log: what was sent then is not known here

    @property
    def merged_params(self) -> dict[str, Any]:
        """The params of the record and, on top, this stage's own."""
        return {**(self.record or {"params": {}})["params"], **self.params}

    def data_tags(self) -> dict[str, str]:
        """The hash of each input as a tag."""
        return {f"synmlops.data.{tag_name(name)}": digest for name, digest in self.data.items()}


@dataclass
class Sent:
    """How far a log got into one run."""

    offset: int = 0  # all that is settled before this byte is in the run
    unsure: int = 0  # lines before this byte may be in the run: ask before sending
    later: list[int] = field(default_factory=list)  # offsets of artifacts that could not be uploaded yet


class Progress:
    """The sidecar of a log."""

    def __init__(self, log: Path) -> None:
        self.path = log.with_suffix(".sent.json")
        self.key: str | None = None  # of the run chosen for this log
        self.runs: dict[str, Sent] = {}  # by MLflow id, the latest last
        try:
            fields = json.loads(self.path.read_text())
            self.key = fields["key"]
            self.runs = {run_id: Sent(**sent) for run_id, sent in fields["runs"].items()}
            self.lost = False
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.lost = True  # missing or spoilt: ask the store before sending

    def save(self) -> None:
        """Write the sidecar, replacing it at once."""
        fields = {"key": self.key, "runs": {run_id: asdict(sent) for run_id, sent in self.runs.items()}}
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(fields))
            partial.replace(self.path)
        except OSError as error:
            raise Unreachable(f"{self.path}: {error.strerror}") from error

    @property
    def latest(self) -> str | None:
        """The MLflow id of the run that was last sent to."""
        return next(reversed(self.runs), None)


class Delivery:
    """One log on its way into a store.

    Parameters
    ----------
    log : Path
        A metric log whose first line is its `Opening`.
    note : callable
        Takes one line for the user.
    """

    def __init__(self, log: Path, *, note: Callable[[str], None]) -> None:
        self.log = log
        self.opening = read_opening(log)
        self.progress = Progress(log)
        self._note = note
        self._reader: LogReader | None = None
        self._seen: dict[str, set[tuple[int, int]]] = {}  # points of a metric the store has, while unsure

    # -- which run ---------------------------------------------------------------------------------------

    def resolve(self, store: Store) -> KnownRun:
        """Find the run this log goes into, or make it.

        Raises
        ------
        Unreachable
            If the store does not answer.
        """
        opening = self.opening
        if opening.record is None:
            run = store.find(key=opening.key, run_id=self.progress.latest)
            if run is None:
                if self.progress.runs:
                    self._note(
                        f"run {opening.key[:8]} is not in {store.shown} (deleted, or another store): "
                        f"recorded anew from {self.log}"
                    )
                run = store.create(name=self._run_name(), tags=self._tags(), time_ms=_opened_at(self.log))
        else:
            run = self._attach(store, RunRecord.from_dict(opening.record))
        self.choose(run.key or opening.key)
        return run

    def _attach(self, store: Store, record: RunRecord) -> KnownRun:
        opening = self.opening
        assert opening.child_key is not None
        if self.progress.key == opening.child_key:
            child = store.find(key=opening.child_key, run_id=self.progress.latest)
            if child is not None:
                return child
        parent = store.find(key=record.key, run_id=record.mlflow_run_id) or self._rebuild(store, record)
        self._deliver_earlier(store, parent, record)
        if self.progress.key == record.key:
            return parent
        if self.progress.key != opening.child_key and self._is_free(parent):
            store.set_tags(parent.run_id, {self._stage_tag: self._claim()})
            return parent
        child = store.find(key=opening.child_key)
        if child is None:
            self._note(
                f"run {record.key[:8]} already has a record of {opening.stage}: "
                f"this one goes to its child {opening.child_key[:8]}"
            )
            tags = self._tags() | {KEY_TAG: opening.child_key, PARENT_TAG: parent.run_id}
            child = store.create(name=self._run_name(), tags=tags, time_ms=_opened_at(self.log))
        return child

    def _is_free(self, run: KnownRun) -> bool:
        """Whether this stage may write into the run without overwriting or mixing anything."""
        mark = run.tags.get(self._stage_tag, "")
        if mark == "complete" or (mark.startswith("running") and not self._may_take_over(mark)):
            return False
        same_params = all(
            run.params.get(name) in (None, text_of(value)) for name, value in self.opening.params.items()
        )
        return same_params and all(
            run.tags.get(name) in (None, value) for name, value in self.opening.data_tags().items()
        )

    def _may_take_over(self, mark: str) -> bool:
        """Whether a claim is ours or that of a process of this machine which is no more."""
        host, pid, attempt = ([*mark.split()[1:], "", "", ""])[:3]
        if attempt == self.opening.attempt:
            return True
        if host != socket.gethostname() or not pid.isdigit():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return int(pid) == os.getpid()  # an earlier attempt of this process, which has ended

    def _rebuild(self, store: Store, record: RunRecord) -> KnownRun:
        """Make the run of a record in a store that does not know it."""
        here = [stage for stage, log in record.logs.items() if (runs_folder(self.log) / log).exists()]
        away = [stage for stage in record.logs if stage not in here]
        self._note(
            f"run {record.key[:8]} is not in {store.shown} (another machine, a deleted run, or the server "
            f"was away): made from the record of {record.stage}"
            + (f"; the metrics of {', '.join(away)} are not on this machine" if away else "")
        )
        tags = {
            KEY_TAG: record.key,
            "synmlops.rebuilt": f"from the record of {record.stage}, {record.created}",
            "synmlops.commit": record.commit,
            "mlflow.source.name": "synmlops",
            "mlflow.source.type": "PROJECT",
            **({} if record.commit == UNKNOWN else {"mlflow.source.git.commit": record.commit}),
            "synmlops.dirty": str(record.dirty).lower(),
            **{f"synmlops.data.{tag_name(name)}": digest for name, digest in record.data.items()},
            **{STAGE_TAG + stage: "complete" for stage in record.logs},
        }
        if record.dvc_experiment:
            tags["synmlops.dvc_experiment"] = record.dvc_experiment
        if record.parent_key and (parent := store.find(key=record.parent_key)):
            tags[PARENT_TAG] = parent.run_id
        name = record.dvc_experiment or f"{next(iter(record.logs), record.stage)} {record.key[:8]}"
        run = store.create(name=name, tags=tags, time_ms=_opened_at(self.log))
        store.log_params(run.run_id, record.params)
        store.set_status(run.run_id, "FINISHED", time_ms=_opened_at(self.log))
        return store.get(run.run_id) or run

    def _deliver_earlier(self, store: Store, run: KnownRun, record: RunRecord) -> None:
        """Send what earlier stages could not, or had sent to a run that is no more."""
        for name in record.logs.values():
            log = runs_folder(self.log) / name
            if not log.exists():
                continue
            with reserved(log) as ours:
                if ours:
                    earlier = Delivery(log, note=self._note)
                    earlier.choose(record.key)
                    earlier.push(store, run)
                    earlier.push_later(store, run)

    def choose(self, key: str) -> None:
        """Settle which run this log goes into, by key."""
        if self.progress.key != key:
            self.progress.key = key
            self.progress.save()

    # -- what is in it -----------------------------------------------------------------------------------

    def push(self, store: Store, run: KnownRun) -> None:
        """Send all that is settled and was not sent.

        Raises
        ------
        Unreachable, RunGone
            What was not sent stays in the log; call again.
        """
        sent = self._sent(run)
        if self._reader is None:
            self._reader = LogReader(self.log, start=sent.offset)
        while events := self._reader.take(_POINTS_PER_CALL):
            done = 0
            try:
                while done < len(events):
                    batch = _batch(events[done:])
                    self._send(store, run, batch)
                    done += len(batch)
                    sent.offset = batch[-1].end
                    self.progress.save()
            except (Unreachable, RunGone):
                self._reader.put_back(events[done:])
                self._seen.clear()
                raise

    def push_later(self, store: Store, run: KnownRun) -> None:
        """Try again to upload the artifacts that failed."""
        sent = self._sent(run)
        events = {event.start: event for event in read_events(self.log)} if sent.later else {}
        trouble = None
        for start in list(sent.later):
            try:
                self._send_artifact(store, run, events[start])
            except Unreachable as error:
                trouble = error
                continue
            sent.later.remove(start)
            self.progress.save()
        if trouble is not None:
            raise trouble

    def forget(self) -> None:
        """Read the log anew, since the run has become another one."""
        self._reader = None
        self._seen.clear()

    def unsent(self) -> int:
        """Count the lines that should be in the store and are not."""
        latest = self.progress.latest
        sent = self.progress.runs[latest] if latest else Sent()
        events = LogReader(self.log, start=sent.offset).take(_EVERYTHING)
        return sum(event.end > sent.offset for event in events) + len(sent.later)

    def _sent(self, run: KnownRun) -> Sent:
        if run.run_id not in self.progress.runs:
            unsure = _EVERYTHING if self.progress.lost or self.opening.unsure else 0
            self.progress.runs[run.run_id] = Sent(unsure=unsure)
            self.progress.save()
        return self.progress.runs[run.run_id]

    def _send(self, store: Store, run: KnownRun, batch: list[Event]) -> None:
        event = batch[0]
        if event.kind == "metrics":
            self._send_metrics(store, run, batch)
            return
        if event.kind == "artifact":
            try:
                self._send_artifact(store, run, event)
            except Unreachable:  # metrics must not wait for an artifact store
                later = self._sent(run).later
                if event.start not in later:
                    later.append(event.start)
            return
        try:
            self._send_other(store, run, event)
        except Refused as error:
            self._note(f"not recorded ({event.kind}): {error}")

    def _send_metrics(self, store: Store, run: KnownRun, batch: list[Event]) -> None:
        sent = self._sent(run)
        points = []
        for event in batch:
            step = event.body["step"]
            for name, value in event.body["metrics"].items():
                if event.end > sent.unsure or not self._is_there(store, run, name, step, event.time_ms):
                    points.append((name, value, event.time_ms, step))
        if sent.unsure < batch[-1].end:  # from here to the answer nobody knows whether they are in
            sent.unsure = batch[-1].end
            self.progress.save()
        try:
            for first in range(0, len(points), _POINTS_PER_CALL):
                store.log_metrics(run.run_id, points[first : first + _POINTS_PER_CALL])
        except Refused as error:
            if len(batch) == 1:
                self._note(f"not recorded (metrics at step {batch[0].body['step']}): {error}")
                return
            for event in batch:
                self._send_metrics(store, run, [event])

    def _is_there(self, store: Store, run: KnownRun, name: str, step: int, time_ms: int) -> bool:
        if name not in self._seen:
            self._seen[name] = store.points_of(run.run_id, name)
        if self.opening.unsure:  # that work was done again, at another time
            return any(step == there for there, _ in self._seen[name])
        return (step, time_ms) in self._seen[name]

    def _send_artifact(self, store: Store, run: KnownRun, event: Event) -> None:
        body = event.body
        copy, origin = runs_folder(self.log) / body["copy"], Path(body["origin"])
        path = copy if copy.is_file() else origin
        try:
            if path is origin and sha256_of(origin) != body["sha256"]:
                raise SynmlopsError(f"{origin}: changed since")
            store.log_artifact(run.run_id, path, body["folder"])
        except (SynmlopsError, Refused) as error:
            self._note(f"artifact not recorded: {error}")
        shutil.rmtree(copy.parent, ignore_errors=True)

    def _send_other(self, store: Store, run: KnownRun, event: Event) -> None:
        body = event.body
        if event.kind == "open":
            self._send_open(store, run)
        elif event.kind == "resume":
            store.set_tags(run.run_id, {self._stage_tag: self._claim()})
            store.set_status(run.run_id, "RUNNING")
        elif event.kind == "params":
            store.log_params(run.run_id, body)
        elif event.kind == "tags":
            store.set_tags(run.run_id, body)
        elif event.kind == "input":
            store.log_input(run.run_id, **body)
        elif event.kind == "close":
            self._send_close(store, run, event)
        else:
            raise SynmlopsError(f"{self.log}: unknown line {event.kind!r}; written by a newer synmlops?")

    def _send_open(self, store: Store, run: KnownRun) -> None:
        opening = self.opening
        attached = opening.record is not None and run.key == opening.key
        tags = {self._stage_tag: self._claim(), **opening.data_tags()}
        tags[f"synmlops.commit.{opening.stage}"] = opening.tags.get("synmlops.commit", "")
        store.set_tags(run.run_id, tags)
        store.log_params(run.run_id, opening.params if attached else opening.merged_params)
        store.set_status(run.run_id, "RUNNING")

    def _send_close(self, store: Store, run: KnownRun, event: Event) -> None:
        status, reason = event.body["status"], event.body["reason"]
        tags = {self._stage_tag: _MARKS[status]}
        if status != "FINISHED":
            tags[FAILURE_TAG] = f"{self.opening.stage}: {reason}"
        else:
            now = store.get(run.run_id)
            if now is not None and now.tags.get(FAILURE_TAG, "").startswith(f"{self.opening.stage}:"):
                tags[FAILURE_TAG] = ""
        store.set_tags(run.run_id, tags)
        store.set_status(run.run_id, status, time_ms=event.time_ms)

    # -- names -------------------------------------------------------------------------------------------

    @property
    def _stage_tag(self) -> str:
        return STAGE_TAG + self.opening.stage

    def _claim(self) -> str:
        return f"running {socket.gethostname()} {os.getpid()} {self.opening.attempt}"

    def _run_name(self) -> str:
        name = self.opening.tags.get("synmlops.dvc_experiment")
        key = self.opening.child_key or self.opening.key
        return f"{name} {self.opening.stage}" if name else f"{self.opening.stage} {key[:8]}"

    def _tags(self) -> dict[str, str]:
        return {KEY_TAG: self.opening.key, **self.opening.tags, **self.opening.data_tags()}


def read_opening(log: Path) -> Opening:
    """Read the first line of a log.

    Raises
    ------
    SynmlopsError
        If it is not there or damaged.
    """
    first = LogReader(log).take(1)
    try:
        return Opening(**first[0].body)
    except (IndexError, TypeError) as error:
        raise SynmlopsError(f"{log}: does not begin as a metric log does; move the file away") from error


def runs_folder(log: Path) -> Path:
    """Give the folder of all logs: a log lies in its subfolder of its run's key."""
    return log.parent.parent


def _opened_at(log: Path) -> int:
    return LogReader(log).take(1)[0].time_ms


def _batch(events: list[Event]) -> list[Event]:
    """Give the events at the front that go in one call: consecutive metrics, or a single other one."""
    batch, points = [events[0]], len(events[0].body.get("metrics", ()))
    if events[0].kind != "metrics":
        return batch
    for event in events[1:]:
        points += len(event.body["metrics"]) if event.kind == "metrics" else _POINTS_PER_CALL + 1
        if points > _POINTS_PER_CALL:
            break
        batch.append(event)
    return batch
