"""What lies beside the events of a metric log: its opening, and how far it was sent."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synmlops.params import SynmlopsError
from synmlops.tracking.lineage import tag_name
from synmlops.tracking.metric_log import LogReader
from synmlops.tracking.store import Unreachable

STAGE_TAG = "synmlops.stage."  # + stage: "running HOST PID ATTEMPT", complete, failed or killed


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
    parent_key: str | None = None  # of the run that this one lies below from the start
    name: str | None = None  # of a run that is made, for people; default: from its key

    @property
    def merged_params(self) -> dict[str, Any]:
        """The params of the record and, on top, this stage's own."""
        return {**(self.record or {"params": {}})["params"], **self.params}

    @property
    def stage_tag(self) -> str:
        """The tag of a run that says how far this stage is."""
        return STAGE_TAG + self.stage

    def claim(self) -> str:
        """The value of that tag while this process writes."""
        return f"running {socket.gethostname()} {os.getpid()} {self.attempt}"


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

    def choose(self, key: str) -> None:
        """Settle which run this log goes into, by key."""
        if self.key != key:
            self.key = key
            self.save()

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


def data_tags(data: Mapping[str, str]) -> dict[str, str]:
    """Give the hash of each input as a tag.

    Examples
    --------
    >>> data_tags({"a.h5": "3f9a"})
    {'synmlops.data.a.h5': '3f9a'}
    """
    return {f"synmlops.data.{tag_name(name)}": digest for name, digest in data.items()}


def opened_at(log: Path) -> int:
    """Give when a log was begun, in ms since 1970."""
    return LogReader(log).take(1)[0].time_ms


def runs_folder(log: Path) -> Path:
    """Give the folder of all logs: a log lies in its subfolder of its run's key."""
    return log.parent.parent
