"""run.json: what a stage hands on beside its output, so that the next one finds or rebuilds the run."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_path

Flat = str | int | float | bool | None
"""A flattened parameter (see `synmlops.params.flatten`)."""


@dataclass(frozen=True)
class RunRecord:
    """One run as its last stage left it.

    Attributes
    ----------
    key : str
        Our own name of the run, also its tag `synmlops.run_key`. Unlike MLflow's id it exists before the
        store has been reached, and holds in every store.
    stage : str
        The stage that wrote this record.
    mlflow_run_id : str or None
        The run's id in `tracking_uri`; None if the store had not been reached when the stage ended.
    tracking_uri : str
        The store, without credentials.
    parent_key : str or None
        Key of the parent run, for a child.
    params : mapping
        Flattened params of all stages that led here: the parent record's and this stage's own.
    data : mapping
        Name of each input to its SHA-256.
    logs : mapping
        Stage to the metric file of what it wrote into this run, relative to ROOT/.synmlops/runs.
    created : str
        When the stage ended, ISO 8601, UTC.
    """

    key: str
    stage: str
    mlflow_run_id: str | None
    tracking_uri: str
    parent_key: str | None
    commit: str
    dirty: bool
    dvc_experiment: str | None
    data: Mapping[str, str]
    params: Mapping[str, Flat]
    logs: Mapping[str, str]
    created: str

    def write(self, path: Path) -> None:
        """Write this record as JSON; the file appears only when complete."""
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain, JSON-ready values."""
        plain = {name: getattr(self, name) for name in _FIELDS}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RunRecord":
        """Build a record from `to_dict`'s fields.

        Raises
        ------
        ValueError
            If a field is missing, unknown, or of another type than it should be.
        """
        if set(fields) != set(_FIELDS):
            odd = sorted(set(fields) ^ set(_FIELDS))
            raise ValueError(f"missing or unknown fields: {', '.join(odd)}")
        for name, kind in _FIELDS.items():
            if not isinstance(fields[name], kind):
                raise ValueError(f"{name} is {fields[name]!r}")
        return cls(**fields)

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read a record.

        Raises
        ------
        SynmlopsError
            If the file is missing or is no run record.
        """
        try:
            fields = json.loads(path.read_text())
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
            return cls.from_dict(fields)
        except OSError as error:
            raise SynmlopsError(
                f"{path}: {error.strerror}; run the stage that writes it (`dvc repro`), or `dvc pull` it"
            ) from error
        except ValueError as error:
            raise SynmlopsError(
                f"{path}: is no run record ({error}); `dvc checkout` brings back the whole one"
            ) from error


_FIELDS: dict[str, Any] = {
    "key": str,
    "stage": str,
    "mlflow_run_id": str | None,
    "tracking_uri": str,
    "parent_key": str | None,
    "commit": str,
    "dirty": bool,
    "dvc_experiment": str | None,
    "data": Mapping,
    "params": Mapping,
    "logs": Mapping,
    "created": str,
}
assert set(_FIELDS) == {field.name for field in dataclasses.fields(RunRecord)}
