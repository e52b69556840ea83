"""From a metric log into its run: what was not sent yet, each line once."""

import shutil
from collections.abc import Callable
from pathlib import Path

from synmlops.params import SynmlopsError
from synmlops.tracking.metric_log import Event, LogReader, iter_events
from synmlops.tracking.sidecar import Progress, Sent, data_tags, read_opening, runs_folder
from synmlops.tracking.store import KnownRun, Refused, RunGone, Store, Unreachable
from synmlops.volumes.files import sha256_of

FAILURE_TAG = "synmlops.failure"
_POINTS_PER_CALL = 1000
_EVERYTHING = 2**62
_MARKS = {"FINISHED": "complete", "FAILED": "failed", "KILLED": "killed"}


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
        self.note = note
        self._reader: LogReader | None = None
        self._seen: dict[str, set[tuple[int, int]]] = {}  # points of a metric the store has, while unsure

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
        events = {event.start: event for event in iter_events(self.log)} if sent.later else {}
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
            self.note(f"not recorded ({event.kind}): {error}")

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
                self.note(f"not recorded (metrics at step {batch[0].body['step']}): {error}")
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
            self.note(f"artifact not recorded: {error}")
        shutil.rmtree(copy.parent, ignore_errors=True)

    def _send_other(self, store: Store, run: KnownRun, event: Event) -> None:
        body = event.body
        if event.kind == "open":
            self._send_open(store, run)
        elif event.kind == "resume":
            store.set_tags(run.run_id, {self.opening.stage_tag: self.opening.claim()})
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
        tags = {self.opening.stage_tag: self.opening.claim(), **data_tags(opening.data)}
        tags[f"synmlops.commit.{opening.stage}"] = opening.tags.get("synmlops.commit", "")
        store.set_tags(run.run_id, tags)
        store.log_params(run.run_id, opening.params if attached else opening.merged_params)
        store.set_status(run.run_id, "RUNNING")

    def _send_close(self, store: Store, run: KnownRun, event: Event) -> None:
        status, reason = event.body["status"], event.body["reason"]
        tags = {self.opening.stage_tag: _MARKS[status]}
        if status != "FINISHED":
            tags[FAILURE_TAG] = f"{self.opening.stage}: {reason}"
        else:
            now = store.get(run.run_id)
            if now is not None and now.tags.get(FAILURE_TAG, "").startswith(f"{self.opening.stage}:"):
                tags[FAILURE_TAG] = ""
        store.set_tags(run.run_id, tags)
        store.set_status(run.run_id, status, time_ms=event.time_ms)


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
