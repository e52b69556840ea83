"""What a stage says while it runs: metrics, params, tags, artifacts and inputs, into its metric log."""

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from synmlops.params import SynmlopsError
from synmlops.tracking.metric_log import MetricLog, iter_events, settled_steps
from synmlops.tracking.record import Flat
from synmlops.tracking.sender import Sender
from synmlops.tracking.sidecar import runs_folder
from synmlops.volumes.files import plain_write_errors, sha256_of

Context = Literal["training", "validation", "test"]
_METRIC_NAME = re.compile(r"[\w\-./: ]{1,250}", re.ASCII)
_FLUSH_SECONDS = 30.0


class Recorder:
    """The logging half of a `StageRun`: each call writes to the file and returns."""

    def __init__(self, log: MetricLog, sender: Sender) -> None:
        self._log = log
        self._sender = sender
        self._step = 0  # the last one logged, which system metrics share
        self._sent_steps: dict[str, int] = {}  # of a resumed run: done again, but already in the store
        self._must_rewind = False

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

        What was sent already (a run that failed sends all it has) is not sent again, nor is what a training
        that was ended after its last step says at its end.
        """
        self._must_rewind = False
        self._log.rewind(step)
        self._sent_steps = settled_steps(self._log.path)
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
        body = {"copy": str(copy.relative_to(runs_folder(self._log.path))), "origin": str(path.resolve())}
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
