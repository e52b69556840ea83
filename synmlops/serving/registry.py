"""The model registry: put a trained model in under an alias, and take it out again by that name."""

import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from synmlops.learning.checkpoint import Model, ModelMeta, load_model, read_meta
from synmlops.params import InferParams, SynmlopsError, flatten
from synmlops.tracking.lineage import experiment_name, project_root, tag_name
from synmlops.tracking.runs import RunRecord, StageRun
from synmlops.tracking.store import KEY_TAG, Refused, RunGone, Store, Unreachable, prepare_mlflow
from synmlops.volumes.files import sha256_of

# MLflow is imported inside the functions, after `prepare_mlflow` has said that no usage data may leave.
if TYPE_CHECKING:
    from synmlops.serving.bundle import Bundle

NAME = "synmlops"
CHAMPION = "champion"

_TRACKING_URI = "MLFLOW_TRACKING_URI"
_NAME = re.compile(r"[^/:@\s][^/:@]*")
_ALIAS = re.compile(r"(?!v\d+$|latest$)[a-z][\w-]{0,99}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class RegisteredVersion:
    """A model in the registry."""

    name: str
    version: int
    alias: str
    run_id: str  # of the MLflow run it was logged into
    store: str  # address of the registry, without credentials
    notes: tuple[str, ...] = ()  # lines for the user: a run that had to be made anew

    @property
    def uri(self) -> str:
        """What `mlflow models serve -m` and `synmlops infer --model` take; it follows the alias."""
        return f"models:/{self.name}@{self.alias}"


def register(
    model_path: Path,
    *,
    record: RunRecord,
    infer: InferParams,
    operating_point: Path | None = None,
    metrics: Path | None = None,
    threshold: float | None = None,
    name: str = NAME,
    alias: str = CHAMPION,
) -> RegisteredVersion:
    """Log a model into its pipeline's run, register it as a new version and point the alias at it.

    The version carries the code, the weights (safetensors) and everything serving needs to answer as
    `synmlops infer` does; nothing in it is a pickle. An alias that another version had moves to this one.

    Parameters
    ----------
    model_path : Path
        A file of `synmlops train`.
    record : RunRecord
        The run the model belongs to (`models/run.json`). A store that does not know it gets it from here.
    infer : InferParams
        The sliding window, as `infer` uses it.
    operating_point : Path, optional
        JSON of `synmlops evaluate`: for each fold its `threshold` (0 to 1) and how it was chosen. That of the
        model's fold travels in the weights' header, in an artifact, in the metadata and as a tag.
    metrics : Path, optional
        JSON of scores; its F1 scores become tags of the version.
    threshold : float, optional
        In place of `operating_point`, where nothing was evaluated.
    name, alias : str

    Raises
    ------
    SynmlopsError
        If a file is missing or broken, the name or alias cannot be used, or the registry cannot be reached.
    """
    _check_names(name, alias)
    meta = read_meta(model_path)
    if meta.run_key and meta.run_key != record.key:
        raise SynmlopsError(
            f"{model_path}: was trained by run {meta.run_key}, and the record given is of run {record.key}; "
            "`dvc checkout` brings back a model and a record that belong together"
        )
    chosen = None if threshold is None else {"threshold": threshold, "source": "given"}
    if operating_point is not None:
        chosen = _read_operating_point(operating_point, meta.fold)
    digest = sha256_of(model_path)
    if chosen is not None and chosen.get("model_sha256", digest) != digest:
        raise SynmlopsError(
            f"{operating_point}: was chosen for another model than {model_path}; run `dvc repro`, or "
            "`synmlops infer` and `synmlops evaluate`, so that both are of one model"
        )
    scores = {} if metrics is None else _f1_scores(metrics)
    remedy = "is MLFLOW_TRACKING_URI right and the server up? Then register again"
    with _registry(str(model_path), remedy) as store, tempfile.TemporaryDirectory() as folder:
        from synmlops.serving.bundle import write_bundle

        bundle = write_bundle(Path(folder), model_path, infer=infer, operating_point=chosen)
        run_id, notes = _run_of(record, store)
        tags = {
            KEY_TAG: record.key,
            "synmlops.model_sha256": digest,
            **_tags(meta, chosen, scores),
        }
        model_id = _log_model(bundle, run_id=run_id, name=name, tags=tags)
        _check_answer(model_id)
        version = _add_version(name, model_id=model_id, run_id=run_id, tags=tags, alias=alias)
        return RegisteredVersion(name, version, alias, run_id, store.shown, notes)


def register_file(
    model_path: Path,
    *,
    infer: InferParams,
    threshold: float | None = None,
    name: str = NAME,
    alias: str = CHAMPION,
) -> RegisteredVersion:
    """Register a model that no run of this project trained, such as an imported one, with a run made for it.

    Parameters
    ----------
    model_path : Path
    infer : InferParams
    threshold : float, optional
        Operating point, 0 to 1. Without one the version has none, and programs that decode ask for it.
    name, alias : str

    Raises
    ------
    SynmlopsError
        If a run trained the model, or as `register`.
    """
    _check_names(name, alias)
    if threshold is not None and not 0 <= threshold <= 1:
        raise SynmlopsError(f"--threshold: must be from 0 to 1, got {threshold}")
    meta = read_meta(model_path)
    if meta.run_key:
        raise SynmlopsError(
            f"{model_path}: was trained by run {meta.run_key}; give the folder of it and its run.json "
            "with --models"
        )
    params = flatten(
        {"network": meta.network.model_dump(mode="json"), "infer": infer.model_dump(mode="json")}
    )
    digests = {model_path.name: sha256_of(model_path)}
    with StageRun.start(params=params, data=digests, stage="register", system=False) as run:
        run.set_tags({"synmlops.imported": meta.imported})
    version = register(
        model_path, record=run.record, infer=infer, threshold=threshold, name=name, alias=alias
    )
    return replace(version, notes=(*run.notes, *version.notes))


def load_registered(uri: str, *, device: str | torch.device = "cpu") -> Model:
    """Load a registered model's weights, with the operating point in its meta.

    Parameters
    ----------
    uri : str
        `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
    device : str or torch.device

    Raises
    ------
    SynmlopsError
        If there is no such model, it is not one of `synmlops register`, or the registry cannot be reached.
    """
    if re.fullmatch(r"models:/[^/@]+(@[^/@]+|/\d+)", uri) is None:
        raise SynmlopsError(
            f"{uri}: names no registered model; write models:/{NAME}@{CHAMPION} or models:/{NAME}/1"
        )
    remedy = "`synmlops register` puts a model there"
    with _registry(uri, remedy), tempfile.TemporaryDirectory() as folder:
        from mlflow.artifacts import download_artifacts

        from synmlops.serving.bundle import WEIGHTS_FILE

        path = download_artifacts(artifact_uri=f"{uri}/artifacts/{WEIGHTS_FILE}", dst_path=folder)
        return load_model(Path(path), device=device)


def _check_names(name: str, alias: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise SynmlopsError(f"--name: {name!r} cannot name a model; leave out / : @ and choose e.g. {NAME}")
    if _ALIAS.fullmatch(alias) is None:
        raise SynmlopsError(
            f"--alias: {alias!r} cannot be an alias; start with a letter, go on with letters, digits, - and "
            "_ (latest and v1, v2 ... are MLflow's own), e.g. champion or challenger"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise SynmlopsError(
            f"{path}: {error.strerror}; run `synmlops evaluate` or `dvc checkout` first"
        ) from error
    except ValueError as error:
        raise SynmlopsError(f"{path}: not whole JSON ({error}); `dvc checkout` brings it back") from error
    if not isinstance(tree, dict):
        raise SynmlopsError(f"{path}: holds no JSON object; give a file of `synmlops evaluate`")
    return tree


def _read_operating_point(path: Path, fold: str) -> dict[str, Any]:
    tree = _read_json(path)
    point = tree.get(fold)
    if not isinstance(point, dict):
        raise SynmlopsError(
            f"{path}: has no fold {fold!r}, to which the model belongs; it has {', '.join(tree) or 'none'}. "
            "Run `synmlops evaluate` on this model's predictions"
        )
    threshold = point.get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise SynmlopsError(f"{path}: threshold of fold {fold} is {threshold!r}; it must be from 0 to 1")
    return {**point, "threshold": float(threshold)}


def _f1_scores(path: Path) -> dict[str, float]:
    """Pick the F1 scores from a tree of metrics, by dotted key."""
    return {
        key: float(value)
        for key, value in flatten(_read_json(path)).items()
        if "f1" in key.lower() and isinstance(value, int | float) and math.isfinite(value)
    }


def _tags(
    meta: ModelMeta, operating_point: Mapping[str, Any] | None, scores: Mapping[str, float]
) -> dict[str, str]:
    """Give what tells one version from another in the registry's table."""
    tags = {
        "synmlops.channels": ",".join(meta.channels),
        "synmlops.voxel_nm": ",".join(f"{size:g}" for size in meta.voxel_nm),
        "synmlops.step": str(meta.step),
    }
    if meta.imported:
        tags["synmlops.imported"] = meta.imported
    if meta.score is not None:
        tags["synmlops.validation_f1"] = f"{meta.score:.4f}"
    if operating_point is not None:
        tags["synmlops.threshold"] = f"{operating_point['threshold']:g}"
    return tags | {f"synmlops.{tag_name(key)}": f"{value:.4f}" for key, value in scores.items()}


def _run_of(record: RunRecord, store: Store) -> tuple[str, tuple[str, ...]]:
    """Give the id of the record's run, made anew where the store does not know it, and notes for the user."""
    found = store.find(key=record.key, run_id=record.mlflow_run_id)
    if found is not None:
        return found.run_id, ()
    run = StageRun.attach("register", params={}, record=record, system=False)
    made = run.finish()
    if made.mlflow_run_id is None:
        raise Unreachable(f"{store.shown}: does not say which run {record.key[:8]} is")
    return made.mlflow_run_id, run.notes


def _log_model(bundle: "Bundle", *, run_id: str, name: str, tags: Mapping[str, str]) -> str:
    """Log through the run's id, since entering a run that has ended would move its end time."""
    import mlflow.pyfunc
    from mlflow import MlflowClient
    from mlflow.models import Model as LoggedModel

    from synmlops.serving.bundle import input_example, signature

    run = MlflowClient().get_run(run_id)
    model_id: str = (
        MlflowClient()
        .create_logged_model(
            run.info.experiment_id, name=name, source_run_id=run_id, params=run.data.params, tags=dict(tags)
        )
        .model_id
    )
    LoggedModel.log(
        artifact_path=None,
        flavor=mlflow.pyfunc,
        name=name,
        model_id=model_id,
        run_id=run_id,
        python_model=str(bundle.script),
        code_paths=[str(path) for path in bundle.code],
        artifacts=bundle.artifacts,
        signature=signature(),
        input_example=input_example(),
        pip_requirements=list(bundle.requirements),
        metadata={**bundle.settings, **tags},
    )
    return model_id


def _check_answer(model_id: str) -> None:
    """Have the logged model answer its example before an alias points at it; MLflow's check only warns."""
    import mlflow.pyfunc

    from synmlops.serving.bundle import input_example

    answer = mlflow.pyfunc.load_model(f"models:/{model_id}").predict(input_example())
    if not len(answer):
        raise SynmlopsError(
            f"models:/{model_id}: gave no answer to its example; the alias stays where it was"
        )


def _add_version(name: str, *, model_id: str, run_id: str, tags: Mapping[str, str], alias: str) -> int:
    """Make a version of a logged model and point the alias at it."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    made = client.create_model_version(
        name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=dict(tags)
    )
    client.set_registered_model_alias(name, alias, str(made.version))
    return int(made.version)


@contextmanager
def _registry(what: str, remedy: str) -> Iterator[Store]:
    """Open the project's store and have MLflow's own functions use it; they take none as an argument.

    What MLflow raises inside becomes one message: what was asked for, what the store says, what to do.
    """
    prepare_mlflow()
    import mlflow
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    with warnings.catch_warnings(), _unchanged():
        warnings.filterwarnings("ignore", module=r"mlflow\.")  # of its own use of pandas and SQLAlchemy
        try:
            store = Store.open(project_root(), experiment=experiment_name())
            mlflow.set_tracking_uri(store.uri)  # which sets the variable too
            yield store
        except (Unreachable, Refused, RunGone) as error:
            raise SynmlopsError(f"{what}: {error}; {remedy}") from error
        except (MlflowException, SQLAlchemyError, RequestException) as error:
            text = " ".join(str(error).split())[:300]
            raise SynmlopsError(f"{what}: the registry says: {text}; {remedy}") from error
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # forgets it, and clears the variable


@contextmanager
def _unchanged() -> Iterator[None]:
    """Undo what MLflow leaves behind: the tracking variable, and temporary folders on the import path."""
    uri, path = os.environ.get(_TRACKING_URI), list(sys.path)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a few files; a bar says nothing
    try:
        yield
    finally:
        sys.path[:] = path
        if uri is not None:
            os.environ[_TRACKING_URI] = uri
