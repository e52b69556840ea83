"""What a stage logs, in a file first: one JSON line per event, appended and never changed.

A line of metrics may be *held*: it names the training step up to which the work behind it must be durable
before anybody sends it. `commit` says that a step is durable, `rewind` that work began anew after a step,
`close` that the stage ended. `LogReader` gives the events that are settled, that is free to be sent.

The file is locked as long as its stage runs, so that `synmlops sync` keeps off it.
"""

import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from synmlops.params import SynmlopsError
from synmlops.volumes.files import plain_write_errors

_CONTROL = frozenset({"commit", "rewind"})  # lines that settle others and are not sent themselves


@dataclass(frozen=True)
class Event:
    """One line of a metric log."""

    kind: str  # open, metrics, params, tags, artifact, input, close, resume, commit or rewind
    time_ms: int
    body: Mapping[str, Any]
    hold: int | None  # the step that must be durable first; None: free
    start: int  # byte offset of the line in its file
    end: int  # byte offset from which to read on once this event is dealt with


class MetricLog:
    """The writing end of a metric log. Its methods may be called from several threads.

    Parameters
    ----------
    path : Path
        The file; made with its folders if missing. An unfinished last line (a crash in mid-write) is cut off.

    Raises
    ------
    SynmlopsError
        If the place cannot be written, or another process writes this log.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> with MetricLog(path) as log:
    ...     log.append("metrics", {"metrics": {"loss": 0.5}, "step": 1}, hold=1)
    ...     log.append("metrics", {"metrics": {"loss": 0.4}, "step": 2}, hold=2)
    ...     log.commit(1)
    >>> [event.body["step"] for event in LogReader(path).take(10)]
    [1]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        with plain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._size, self._lines = 0, 0
            self._held: list[tuple[int | None, int, int]] = []  # hold, start and end of what is unsettled
            for event in iter_events(path):
                self._size, self._lines = event.end, self._lines + 1
                self._replay(event)
            os.ftruncate(self._file, self._size)
        except BaseException:
            os.close(self._file)
            raise
        self.is_new = self._lines == 0

    def append(self, kind: str, body: Mapping[str, Any], *, hold: int | None = None) -> None:
        """Write one event; it is in the file when this returns.

        Raises
        ------
        SynmlopsError
            If the disk is full or the file cannot be written.
        """
        with self._mutex:
            start = self._size
            self._write(kind, body, hold=hold)
            if hold is not None or self._held:
                self._held.append((hold, start, self._size))

    def commit(self, step: int | None = None) -> None:
        """Settle what is held up to `step` (default: everything so far), and have the disk keep it."""
        with self._mutex:
            settled = self._size
            for hold, start, _ in self._held:
                if step is not None and hold is not None and hold > step:
                    settled = start
                    break
            self._write("commit", {"step": step, "upto": settled})
            self._held = [held for held in self._held if held[2] > settled]
            os.fsync(self._file)

    def rewind(self, step: int) -> None:
        """Void what is held beyond `step`, since that work is done again, and settle the rest."""
        with self._mutex:
            self._write("rewind", {"step": step})
            self._held = []

    def finish(self, body: Mapping[str, Any], *, keep_held: bool | None) -> None:
        """Write the closing event.

        Parameters
        ----------
        body : mapping
            Status and reason.
        keep_held : bool or None
            True settles what is held, False voids it, None leaves it held for a later resume.
        """
        with self._mutex:
            self._write("close", {**body, "keep_held": keep_held})
            self._held = self._held if keep_held is None else []
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file and give up its lock."""
        with self._mutex:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, kind: str, body: Mapping[str, Any], *, hold: int | None = None) -> None:
        if self._file < 0:
            raise ValueError(f"{self.path}: is closed; the stage has finished")
        line: dict[str, Any] = {"seq": self._lines, "time": time.time_ns() // 1_000_000, "kind": kind}
        if hold is not None:
            line["hold"] = hold
        data = (json.dumps(line | {"body": body}, separators=(",", ":")) + "\n").encode()
        try:
            with plain_write_errors(self.path):
                written = os.write(self._file, data)
                if written < len(data):
                    os.write(self._file, data[written:])  # says why the first stopped short
        except SynmlopsError:
            os.ftruncate(self._file, self._size)  # half a line would spoil the next
            raise
        self._size += len(data)
        self._lines += 1

    def _replay(self, event: Event) -> None:
        """Take in a line that is in the file already."""
        if event.kind == "commit":
            self._held = [held for held in self._held if held[2] > event.body["upto"]]
        elif event.kind == "rewind" or (event.kind == "close" and event.body["keep_held"] is not None):
            self._held = []
        elif event.kind != "close" and (event.hold is not None or self._held):
            self._held.append((event.hold, event.start, event.end))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SynmlopsError(
                f"{self.path}: another process writes this metric log; is the same stage running already? "
                "Wait for it or end it"
            ) from error


class LogReader:
    """The reading end: settled events in the order of the file, from a byte offset on.

    It reads on as the file grows. Memory is bounded by what is held plus what `take` asks for.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.path = path
        self._position = start  # read up to here
        self._pending: deque[Event] = deque()
        self._settled: deque[Event] = deque()

    def take(self, limit: int) -> list[Event]:
        """Give up to `limit` settled events that were not given before; empty if there are none."""
        if len(self._settled) < limit and self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._add(_parse(line, self._position, path=self.path))
                    self._position += len(line)
                    if len(self._settled) >= limit:
                        break
        return [self._settled.popleft() for _ in range(min(limit, len(self._settled)))]

    def put_back(self, events: list[Event]) -> None:
        """Return events that could not be sent; `take` gives them again first."""
        self._settled.extendleft(reversed(events))

    def _add(self, event: Event) -> None:
        if event.kind == "commit":
            while self._pending and self._pending[0].end <= event.body["upto"]:
                self._settled.append(self._pending.popleft())
        elif event.kind == "rewind":
            self._settle_all(upto=event.body["step"])
        elif event.kind == "close":
            keep = event.body["keep_held"]
            if keep is None:
                # the stage has ended all the same, so this line overtakes what is held; but whoever reads
                # again must find the held lines, so it moves the offset no further than to their start
                end = self._pending[0].start if self._pending else event.end
                self._settled.append(replace(event, end=end))
                return
            self._settle_all(upto=None if keep else -1)
        if event.kind not in _CONTROL:
            self._pending.append(event)
        while self._pending and self._pending[0].hold is None:
            self._settled.append(self._pending.popleft())

    def _settle_all(self, *, upto: int | None) -> None:
        """Settle what is pending; what is held beyond `upto` is void (-1: all that is held)."""
        for event in self._pending:
            if event.hold is None or upto is None or event.hold <= upto:
                self._settled.append(event)
        self._pending.clear()


def iter_events(path: Path) -> Iterator[Event]:
    """Read all whole lines of a metric log, settled or not.

    Raises
    ------
    SynmlopsError
        If a line is damaged.
    """
    position = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield _parse(line, position, path=path)
                    position += len(line)


def settled_steps(path: Path) -> dict[str, int]:
    """Give the highest step of each metric among the settled events of a log."""
    reader, steps = LogReader(path), dict[str, int]()
    while events := reader.take(1000):
        for event in events:
            for name in event.body.get("metrics", ()) if event.kind == "metrics" else ():
                steps[name] = max(steps.get(name, 0), event.body["step"])
    return steps


@contextmanager
def reserved(path: Path) -> Iterator[bool]:
    """Keep stages off a log while it is sent; False if one is running and holds it."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _parse(line: bytes, start: int, *, path: Path) -> Event:
    try:
        fields = json.loads(line)
        return Event(
            kind=fields["kind"],
            time_ms=fields["time"],
            body=fields["body"],
            hold=fields.get("hold"),
            start=start,
            end=start + len(line),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SynmlopsError(
            f"{path}: the line at byte {start} is damaged ({error}); move the file away to go on"
        ) from error
