"""The MLflow side: one store, reached without retries that would make anybody wait.

`Store` says what was wrong in one of two ways: `Unreachable` (try again later, nothing is lost) or
`Refused` (the store will never take this item). MLflow itself is imported when the first store is opened.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synmlops.tracking.lineage import is_embedded, public_uri, state_folder, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY_TAG = "synmlops.run_key"
PARENT_TAG = "mlflow.parentRunId"
_SHOWN_AS = {"mlflow.experimentKind": "custom_model_development"}  # not the UI's view of chats and prompts
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"})
_MISSING = frozenset({"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"})
_REQUEST_SECONDS = "15"
_NO_ANSWER = {  # what requests and urllib3 say at length
    "Connection refused": "does not answer (connection refused)",
    "Failed to resolve": "does not answer (no such host)",
    "timed out": f"does not answer in time (MLFLOW_HTTP_REQUEST_TIMEOUT, by default {_REQUEST_SECONDS} s)",
    "Connection aborted": "broke the connection",
    "Connection reset": "broke the connection",
}
_PER_CALL = 100  # params or tags MLflow takes in one call
_MAX_PARAM = 6000  # characters


class Unreachable(Exception):
    """The store cannot be reached, is too slow or refuses us altogether; nothing was lost, try later."""


class Refused(Exception):
    """The store will not take this item, now or later."""


class RunGone(Exception):
    """The run was deleted, or is not in this store."""


@dataclass(frozen=True)
class KnownRun:
    """A run as it stands in the store."""

    run_id: str
    key: str | None
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]


def prepare_mlflow() -> None:
    """Set what must stand before MLflow is imported: no usage data leaves, no chatter. Safe to repeat.

    MLflow reports usage to its makers unless told otherwise; a lab's data are private, so it is told
    otherwise unless the user has set `MLFLOW_DISABLE_TELEMETRY` themselves.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow asks git itself, and complains without it
    import mlflow  # noqa: F401  (its import sets the levels of its loggers)

    for name, level in (
        ("mlflow", logging.WARNING),
        ("alembic", logging.WARNING),  # a line per migration of a new SQLite store
        ("mlflow.store.db.utils", logging.CRITICAL),  # a traceback whenever the database is busy
        ("urllib3.connectionpool", logging.ERROR),  # a line per request while the server is away
    ):
        logging.getLogger(name).setLevel(level)


class Store:
    """An MLflow tracking store and the experiment in it that runs go to."""

    def __init__(self, client: "MlflowClient", *, uri: str, shown: str, experiment: str) -> None:
        self._client = client
        self.uri = uri
        self.shown = shown  # the address without credentials
        self._experiment = experiment

    @classmethod
    def open(cls, root: Path, *, experiment: str) -> "Store":
        """Open the store that is in force for the project at `root`; make the experiment if it is new.

        Raises
        ------
        Unreachable
            If the store does not answer, or cannot be used; the message says why.
        """
        uri = tracking_uri(root)
        shown = public_uri(uri, root)
        prepare_mlflow()
        # the sender has its own patience, and its own order of what is tried when
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_SECONDS)
        location = None
        if is_embedded(uri, root):
            state_folder(root).mkdir(parents=True, exist_ok=True)
            location = (state_folder(root) / "artifacts").as_uri()
        from mlflow import MlflowClient

        with _store_errors(shown):
            client = MlflowClient(tracking_uri=uri)
            identity = _experiment_of(client, experiment, location=location, shown=shown)
        return cls(client, uri=uri, shown=shown, experiment=identity)

    def find(self, *, key: str, run_id: str | None = None) -> KnownRun | None:
        """Find a run that was not deleted: by MLflow's id if that run has our key, else by key."""
        with _store_errors(self.shown):
            if run_id is not None:
                found = self.get(run_id)
                if found is not None and found.key == key:
                    return found
            experiments = [e.experiment_id for e in self._client.search_experiments()]
            runs = self._client.search_runs(
                experiments,
                filter_string=f"tags.`{KEY_TAG}` = '{key}'",
                order_by=["attributes.start_time ASC"],
            )
        return _known(runs[0]) if runs else None

    def get(self, run_id: str) -> KnownRun | None:
        """Give a run by id; None if it was deleted or is not in this store."""
        try:
            with _store_errors(self.shown):
                run = self._client.get_run(run_id)
        except RunGone:
            return None
        return _known(run) if run.info.lifecycle_stage == "active" else None

    def create(self, *, name: str, tags: Mapping[str, str], time_ms: int) -> KnownRun:
        """Make a run, status RUNNING."""
        with _store_errors(self.shown):
            return _known(
                self._client.create_run(self._experiment, start_time=time_ms, tags=_cut(tags), run_name=name)
            )

    def log_metrics(self, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log up to 1000 points: name, value, time in ms, step."""
        from mlflow.entities import Metric

        with _store_errors(self.shown):
            self._client.log_batch(run_id, metrics=[Metric(*point) for point in points])

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log params; one already there with the same value is no error, with another one is Refused."""
        from mlflow.entities import Param

        refused = []
        items = [Param(name, text_of(value)) for name, value in params.items()]
        batches = [items[first : first + _PER_CALL] for first in range(0, len(items), _PER_CALL)]
        while batches:
            batch = batches.pop(0)
            try:
                with _store_errors(self.shown):
                    self._client.log_batch(run_id, params=batch)
            except Refused as error:
                if len(batch) == 1:
                    refused.append(str(error))
                else:
                    batches = [[item] for item in batch] + batches
        if refused:
            raise Refused("; ".join(refused))

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags; an empty value removes the tag."""
        from mlflow.entities import RunTag

        items = [RunTag(name, value) for name, value in _cut(tags).items() if value]
        emptied = {name for name, value in tags.items() if not value}
        with _store_errors(self.shown):
            for first in range(0, len(items), _PER_CALL):
                self._client.log_batch(run_id, tags=items[first : first + _PER_CALL])
            if emptied:
                for name in emptied & set(self._client.get_run(run_id).data.tags):
                    self._client.delete_tag(run_id, name)

    def log_input(
        self, run_id: str, *, name: str, digest: str, context: str, source: str, profile: str
    ) -> None:
        """Log a volume as an MLflow dataset."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name[:500],
            digest=digest[:36],  # the longest MLflow takes
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=profile,
        )
        given = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
        with _store_errors(self.shown):
            self._client.log_inputs(run_id, datasets=[given])

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Upload a file."""
        try:
            with _store_errors(self.shown):
                self._client.log_artifact(run_id, str(path), folder)
        except (Unreachable, Refused, RunGone):
            raise
        # artifact stores are plug-ins (S3, Azure, SFTP ...), each with exceptions of its own that cannot be
        # listed here, and no stage may fail because one of them does
        except Exception as error:
            raise Unreachable(f"{path.name}: {_one_line(error)}") from error

    def set_status(self, run_id: str, status: str, *, time_ms: int | None = None) -> None:
        """Set RUNNING, FINISHED, FAILED or KILLED; `time_ms` is the end time of a run that has ended."""
        with _store_errors(self.shown):
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                self._client.set_terminated(run_id, status, end_time=time_ms)

    def points_of(self, run_id: str, metric: str) -> set[tuple[int, int]]:
        """Give the points of a metric that are in the run: step and time in ms."""
        with _store_errors(self.shown):
            return {
                (point.step, point.timestamp) for point in self._client.get_metric_history(run_id, metric)
            }


def text_of(value: object) -> str:
    """Give a param's value as params.yaml writes it, cut where MLflow would not take more.

    Examples
    --------
    >>> text_of(None), text_of(True), text_of(0.5), text_of("a")
    ('null', 'true', '0.5', 'a')
    """
    if value is None:
        return "null"
    return (str(value).lower() if isinstance(value, bool) else str(value))[:_MAX_PARAM]


def _experiment_of(client: "MlflowClient", name: str, *, location: str | None, shown: str) -> str:
    """Give the id of an experiment, which is made if it is new."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=_SHOWN_AS))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if error.error_code not in _REFUSALS or found is None:
                raise  # else somebody made it at the same moment
    if found.lifecycle_stage != "active":
        raise Unreachable(
            f"{shown}: the experiment {name} was deleted; restore it (mlflow experiments restore "
            f"-x {found.experiment_id}) or set MLFLOW_EXPERIMENT_NAME to another"
        )
    return str(found.experiment_id)


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value[:_MAX_PARAM] for name, value in tags.items()}


@contextmanager
def _store_errors(shown: str) -> Iterator[None]:
    """Turn what MLflow raises into the three cases a sender tells apart."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        if error.error_code in _MISSING or "must be in the 'active' state" in str(error):
            raise RunGone(_one_line(error)) from error
        kind = Refused if error.error_code in _REFUSALS else Unreachable
        raise kind(f"{shown}: {_one_line(error)}") from error
    except (SQLAlchemyError, OSError, ImportError) as error:  # requests' errors are OSErrors
        raise Unreachable(f"{shown}: {_one_line(error)}") from error


def _known(run: "Run") -> KnownRun:
    tags = dict(run.data.tags)
    return KnownRun(run.info.run_id, tags.get(KEY_TAG), run.info.status, tags, dict(run.data.params))


def _one_line(error: BaseException) -> str:
    """Put an error in one line without credentials.

    Examples
    --------
    >>> _one_line(OSError("http://ann:secret@host/api: Connection refused"))
    'does not answer (connection refused)'
    >>> _one_line(OSError("GET http://ann:secret@host/api gave 502"))
    'GET http://host/api gave 502'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    for sign, plain in _NO_ANSWER.items():
        if sign in text:
            return plain
    text = re.sub(r"://[^/@\s]+@", "://", text)  # credentials in an address
    return text if len(text) <= 300 else text[:297] + "..."
