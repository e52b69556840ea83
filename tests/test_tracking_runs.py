"""Runs and children in the embedded SQLite store, which is the default."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import migrated_store

from synmlops.params import SynmlopsError
from synmlops.tracking.delivery import Delivery
from synmlops.tracking.lineage import tracking_uri
from synmlops.tracking.runs import Nested, RunRecord, StageRun, sync
from synmlops.tracking.store import Store, Unreachable

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 with SQLAlchemy 2.1: theirs to mend
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"
)

TRAIN = {"seed": 0, "train.steps": 4, "data.voxel_nm": None}
DATA = {"train_1.h5": "ab" * 32}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    project = tmp_path / "project"
    monkeypatch.setenv("DVC_ROOT", str(project))
    (project / ".synmlops").mkdir(parents=True)
    shutil.copy(migrated_store(), project / ".synmlops" / "mlflow.db")
    monkeypatch.chdir(project)
    return project


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(root))


def mlflow_run(root: Path, record: RunRecord) -> Any:
    store = Store.open(root, experiment="synmlops")
    found = store.find(key=record.key)
    assert found is not None
    return client(root).get_run(found.run_id)


def all_runs(root: Path) -> list[Any]:
    ids = [e.experiment_id for e in client(root).search_experiments()]
    return list(client(root).search_runs(ids))


def curve(root: Path, record: RunRecord, metric: str) -> list[tuple[int, float]]:
    run = mlflow_run(root, record)
    return [(p.step, p.value) for p in client(root).get_metric_history(run.info.run_id, metric)]


def train(**options: Any) -> RunRecord:
    with StageRun.start(params=TRAIN, data=DATA, system=False, **options) as run:
        for step in range(1, 5):
            run.log_metrics({"loss": 1 / step}, step=step)
            run.commit(step)
    return run.record


def attach(stage: str, record: RunRecord, value: float = 0.5) -> StageRun:
    """Run a stage that logs one metric and one param."""
    with StageRun.attach(stage, params={f"{stage}.x": value}, record=record, system=False) as run:
        run.log_metrics({f"{stage}_score": value})
    return run


def test_one_execution_is_one_run(root: Path) -> None:
    trained = train()
    inferred = attach("infer", trained).record
    evaluated = attach("evaluate", inferred).record
    assert trained.key == inferred.key == evaluated.key
    assert len(all_runs(root)) == 1
    run = mlflow_run(root, trained)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "seed": "0",
        "train.steps": "4",
        "data.voxel_nm": "null",
        "infer.x": "0.5",
        "evaluate.x": "0.5",
    }
    assert run.data.metrics == {"loss": 0.25, "infer_score": 0.5, "evaluate_score": 0.5}
    assert curve(root, trained, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    tags = run.data.tags
    assert {tags[f"synmlops.stage.{stage}"] for stage in ("train", "infer", "evaluate")} == {"complete"}
    assert tags["synmlops.run_key"] == trained.key
    assert tags["synmlops.data.train_1.h5"] == DATA["train_1.h5"]
    assert tags["synmlops.commit"] == trained.commit
    assert evaluated.mlflow_run_id == run.info.run_id
    assert evaluated.params == {**TRAIN, "infer.x": 0.5, "evaluate.x": 0.5}
    assert evaluated.tracking_uri == "sqlite:///.synmlops/mlflow.db"


def test_inputs_artifacts_and_system_metrics(root: Path) -> None:
    (root / "out" / "curves").mkdir(parents=True)
    (root / "out" / "curves" / "pr.csv").write_text("1")
    (root / "report.html").write_text("<html>")
    with StageRun.start(params={}, data={}) as run:
        for context in ("training", "test"):
            run.log_input(
                f"{context}.h5",
                digest="cd" * 32,
                context=context,
                source="a.h5",
                profile={"shape": [1, 2, 3]},
            )
        run.log_artifact(root / "report.html", "evaluation")
        (root / "report.html").write_text("<html>of the next stage")
        run.log_artifact(root / "out")
    found = mlflow_run(root, run.record)
    inputs = {i.dataset.name: i for i in found.inputs.dataset_inputs}
    assert inputs["training.h5"].dataset.digest == ("cd" * 32)[:36]
    assert json.loads(inputs["training.h5"].dataset.profile) == {"shape": [1, 2, 3]}
    assert {t.value for i in inputs.values() for t in i.tags} == {"training", "test"}
    artifacts = root / ".synmlops" / "artifacts" / found.info.run_id / "artifacts"
    assert (artifacts / "evaluation" / "report.html").read_text() == "<html>"
    assert (artifacts / "out" / "curves" / "pr.csv").exists()
    assert found.data.metrics["system/train/system_memory_usage_megabytes"] > 0
    assert not list(root.glob(".synmlops/runs/*/files/*")), "copies go once they are uploaded"
    assert not (root / "mlruns").exists()


def test_only_infer_again_goes_to_a_child_and_evaluate_follows(root: Path) -> None:
    trained = train()
    first = attach("evaluate", attach("infer", trained).record).record
    again = attach("infer", trained, value=0.7)
    inferred = again.record
    assert inferred.key != trained.key
    assert inferred.parent_key == trained.key
    assert "already has a record of infer" in again.notes[0]
    evaluated = attach("evaluate", inferred, value=0.8).record
    assert evaluated.key == inferred.key, "that child has no record of evaluate yet"
    child, parent = mlflow_run(root, inferred), mlflow_run(root, first)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["train.steps"] == "4"
    assert child.data.params["infer.x"] == "0.7"
    assert child.data.params["evaluate.x"] == "0.8"
    assert parent.data.params["infer.x"] == "0.5"
    assert parent.data.metrics["evaluate_score"] == 0.5
    assert len(all_runs(root)) == 2


def test_only_evaluate_again_goes_to_a_child_with_the_full_params(root: Path) -> None:
    inferred = attach("infer", train()).record
    attach("evaluate", inferred)
    before = mlflow_run(root, inferred)
    for n, value in enumerate((0.5, 0.7)):  # with the same params, too
        again = attach("evaluate", inferred, value=value).record
        assert again.parent_key == inferred.key
        child = mlflow_run(root, again)
        assert child.data.params == {**before.data.params, "evaluate.x": str(value)}
        assert child.data.metrics == {"evaluate_score": value}
        assert len(all_runs(root)) == n + 2
    after = mlflow_run(root, inferred)
    assert (after.data.metrics, after.data.params) == (before.data.metrics, before.data.params)


def test_a_second_clone_with_an_empty_store_makes_the_run_from_the_record(root: Path) -> None:
    inferred = attach("infer", train()).record
    shutil.rmtree(root / ".synmlops" / "runs")
    for run in all_runs(root):
        client(root).delete_run(run.info.run_id)
    second = attach("evaluate", inferred)
    assert second.record.key == inferred.key
    assert "made from the record of infer" in second.notes[0]
    assert "the metrics of train, infer are not on this machine" in second.notes[0]
    run = mlflow_run(root, inferred)
    assert run.data.params == {**mlflow_run(root, inferred).data.params, "train.steps": "4", "infer.x": "0.5"}
    assert run.data.metrics == {"evaluate_score": 0.5}
    assert run.data.tags["synmlops.data.train_1.h5"] == DATA["train_1.h5"]
    again = attach("infer", inferred, value=0.9)
    assert again.record.parent_key == inferred.key, "infer is on record, though on another machine"


def test_a_deleted_run_is_made_anew_with_its_curves(root: Path) -> None:
    inferred = attach("infer", train()).record
    old = mlflow_run(root, inferred)
    client(root).delete_run(old.info.run_id)
    evaluation = attach("evaluate", inferred)
    run = mlflow_run(root, inferred)
    assert run.info.run_id != old.info.run_id
    assert "made from the record of infer" in evaluation.notes[0]
    assert "not on this machine" not in evaluation.notes[0]
    assert [step for step, _ in curve(root, inferred, "loss")] == [1, 2, 3, 4]
    assert run.data.metrics == {"loss": 0.25, "infer_score": 0.5, "evaluate_score": 0.5}
    assert run.info.status == "FINISHED"


def test_a_run_deleted_while_training_is_recorded_anew(root: Path) -> None:
    with StageRun.start(params=TRAIN, data=DATA, system=False) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        run.commit(1)
        assert run.flush(30)
        client(root).delete_run(mlflow_run(root, run.record).info.run_id)
        run.log_metrics({"loss": 0.5}, step=2)
    assert curve(root, run.record, "loss") == [(1, 1.0), (2, 0.5)]
    assert any("recorded anew" in note for note in run.notes)


def test_a_failure_is_marked_and_a_later_success_clears_it(root: Path) -> None:
    trained = train()

    def fail() -> None:
        with StageRun.attach("infer", params={"infer.x": 1}, record=trained, system=False) as run:
            run.log_metrics({"half": 1.0})
            raise SynmlopsError("a.h5: image and label differ in shape")

    with pytest.raises(SynmlopsError):
        fail()
    run = mlflow_run(root, trained)
    assert run.info.status == "FAILED"
    assert run.data.tags["synmlops.failure"] == "infer: SynmlopsError: a.h5: image and label differ in shape"
    assert run.data.tags["synmlops.stage.infer"] == "failed"
    assert "half" not in run.data.metrics, "no half measures among those of the attempt that succeeds"
    with StageRun.attach("infer", params={"infer.x": 1}, record=trained, system=False) as again:
        again.log_metrics({"whole": 1.0})
    run = mlflow_run(root, trained)
    assert again.record.key == trained.key
    assert run.info.status == "FINISHED"
    assert "synmlops.failure" not in run.data.tags
    assert run.data.metrics["whole"] == 1.0


def test_an_attempt_with_other_params_does_not_mix_with_a_failed_one(root: Path) -> None:
    trained = train()
    with (
        pytest.raises(ValueError, match="oops"),
        StageRun.attach("infer", params={"infer.x": 1}, record=trained, system=False),
    ):
        raise ValueError("oops")
    assert attach("infer", trained, value=2).record.parent_key == trained.key


def test_a_run_that_another_process_writes_is_left_to_it(root: Path) -> None:
    trained = train()
    store = Store.open(root, experiment="synmlops")
    assert trained.mlflow_run_id is not None
    store.set_tags(trained.mlflow_run_id, {"synmlops.stage.infer": "running another-host 4194400 abcdef"})
    assert attach("infer", trained).record.parent_key == trained.key


def test_a_run_that_a_killed_process_wrote_is_taken_over(root: Path) -> None:
    trained = train()
    store = Store.open(root, experiment="synmlops")
    assert trained.mlflow_run_id is not None
    claim = f"running {socket.gethostname()} 4194400 abcdef"  # no system gives that process number
    store.set_tags(trained.mlflow_run_id, {"synmlops.stage.infer": claim})
    assert attach("infer", trained).record.key == trained.key


def test_training_that_fails_shows_its_curve_and_a_resume_repeats_no_step(root: Path) -> None:
    run = StageRun.start(params=TRAIN, data=DATA, system=False)

    def diverge() -> None:
        with run:
            for step in (1, 2, 3):
                run.log_metrics({"loss": float(step)}, step=step)
                if step == 2:
                    run.commit(2)
            raise ArithmeticError("loss is not finite at step 3")

    with pytest.raises(ArithmeticError):
        diverge()
    key = run.record.key
    assert curve(root, run.record, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    with StageRun.start(params=TRAIN, data=DATA, key=key, from_step=2, system=False) as again:
        assert mlflow_run(root, run.record).info.run_id == again.record.mlflow_run_id or again.flush(30)
        for step in (3, 4):
            again.log_metrics({"loss": float(step)}, step=step)
    assert again.record.key == key
    assert curve(root, again.record, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert mlflow_run(root, again.record).info.status == "FINISHED"
    assert len(all_runs(root)) == 1


_KILLED = """
import os, signal, sys
from synmlops.tracking.runs import StageRun
with StageRun.start(params={"a": 1}, data={}, key="%(key)s", system=False) as run:
    for step in range(1, 8):
        run.log_metrics({"loss": float(step)}, step=step)
        if step == 5:
            run.commit(5)
    run.flush(60)
    os.kill(os.getpid(), %(signal)d)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed_is_as_never_killed(root: Path, number: signal.Signals) -> None:
    key = "f" * 32
    done = subprocess.run([sys.executable, "-c", _KILLED % {"key": key, "signal": number}], check=False)
    assert done.returncode == (143 if number == signal.SIGTERM else -9)
    [run] = all_runs(root)
    metrics = client(root).get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in metrics] == [1, 2, 3, 4, 5], "only what the checkpoint covers"
    if number == signal.SIGTERM:
        assert (run.info.status, run.data.tags["synmlops.stage.train"]) == ("KILLED", "killed")
    else:
        assert sync(root).sent == 1
        assert client(root).get_run(run.info.run_id).info.status == "KILLED"
    with StageRun.start(params={"a": 1}, data={}, key=key, system=False) as again:
        for step in range(6, 11):  # from the checkpoint of step 5, told by the first step
            again.log_metrics({"loss": float(step)}, step=step)
    assert [step for step, _ in curve(root, again.record, "loss")] == list(range(1, 11))
    assert len(all_runs(root)) == 1


def test_resumed_where_the_metric_file_is_gone_repeats_no_step(root: Path) -> None:
    trained = train()
    shutil.rmtree(root / ".synmlops" / "runs")
    with StageRun.start(params=TRAIN, data=DATA, key=trained.key, from_step=2, system=False) as run:
        for step in (3, 4, 5):
            run.log_metrics({"loss": 1 / step}, step=step)
    assert curve(root, run.record, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 0.2)]


def test_an_experiment_of_dvc_names_its_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "lucid-fern")
    record = train()
    assert record.dvc_experiment == "lucid-fern"
    run = mlflow_run(root, record)
    assert run.info.run_name == "lucid-fern"
    assert run.data.tags["synmlops.dvc_experiment"] == "lucid-fern"


def test_two_runs_at_once_do_not_mix(root: Path) -> None:
    with (
        StageRun.start(params={}, data={}, system=False) as a,
        StageRun.start(params={}, data={}, system=False) as b,
    ):
        for step in range(50):
            a.log_metrics({"loss": 1.0}, step=step)
            b.log_metrics({"loss": 2.0}, step=step)
    assert {value for _, value in curve(root, a.record, "loss")} == {1.0}
    assert len(curve(root, b.record, "loss")) == 50


def test_nan_and_infinity_do_not_stop_a_run(root: Path) -> None:
    with StageRun.start(params={}, data={}, system=False) as run:
        run.log_metrics({"a": float("nan"), "b": float("inf"), "c": 1.0}, step=0)
    assert mlflow_run(root, run.record).data.metrics["c"] == 1.0
    assert run.notes == ()


@pytest.mark.parametrize("name", ["loss (train)", "", "/a", "a/../b"])
def test_a_name_mlflow_would_not_take_is_the_callers_mistake(root: Path, name: str) -> None:
    with (
        StageRun.start(params={}, data={}, system=False) as run,
        pytest.raises(ValueError, match="MLflow takes"),
    ):
        run.log_metrics({name: 1.0}, step=0)


def test_what_the_store_refuses_is_noted_and_the_rest_goes_on(root: Path) -> None:
    with StageRun.start(params={"a": 1}, data={}, system=False) as run:
        run.log_params({"a": 2, "b": 3})
        run.log_metrics({"loss": 1.0}, step=0)
    assert any("not recorded (params)" in note for note in run.notes)
    found = mlflow_run(root, run.record)
    assert found.data.params == {"a": "1", "b": "3"}
    assert found.data.metrics == {"loss": 1.0}


def test_a_deleted_experiment_is_named_and_nothing_is_lost(root: Path) -> None:
    train()
    experiment = client(root).get_experiment_by_name("synmlops")
    client(root).delete_experiment(experiment.experiment_id)
    with StageRun.start(params=TRAIN, data=DATA, system=False) as run:
        run.log_metrics({"loss": 1.0}, step=1)
    assert "the experiment synmlops was deleted; restore it" in run.notes[0]
    assert "synmlops sync" in run.notes[0]
    client(root).restore_experiment(experiment.experiment_id)
    assert sync(root).sent == 1
    assert curve(root, run.record, "loss") == [(1, 1.0)]


def test_sync_has_nothing_to_do_after_a_good_run(root: Path) -> None:
    attach("infer", train())
    done = sync(root)
    assert (done.sent, done.left, done.notes) == (0, 0, ())


def test_sync_does_not_bring_back_a_deleted_run(root: Path) -> None:
    trained = train()
    client(root).delete_run(trained.mlflow_run_id)
    assert sync(root).sent == 0
    assert all_runs(root) == []


def test_sync_leaves_a_running_stage_alone(root: Path) -> None:
    with StageRun.start(params={}, data={}, system=False):
        done = sync(root)
    assert done.sent == 0
    assert "a running stage holds it" in done.notes[0]


def test_an_artifact_store_that_fails_holds_nothing_else_up(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.txt").write_text("a")
    good: Callable[..., None] = Store.log_artifact

    def bad(self: Store, run_id: str, path: Path, folder: str | None) -> None:
        raise Unreachable("no credentials for the bucket")

    monkeypatch.setattr(Store, "log_artifact", bad)
    with StageRun.start(params={}, data={}, system=False) as run:
        run.log_artifact(root / "a.txt")
        run.log_metrics({"loss": 1.0}, step=0)
    assert curve(root, run.record, "loss") == [(0, 1.0)]
    assert "1 lines were not sent (no credentials for the bucket)" in run.notes[0]
    (root / "a.txt").unlink()
    monkeypatch.setattr(Store, "log_artifact", good)
    assert sync(root).sent == 1
    artifacts = root / ".synmlops" / "artifacts" / str(run.record.mlflow_run_id) / "artifacts"
    assert (artifacts / "a.txt").read_text() == "a"


def test_a_lost_sidecar_repeats_nothing(root: Path) -> None:
    trained = train()
    log = root / ".synmlops" / "runs" / trained.logs["train"]
    log.with_suffix(".sent.json").write_text("{")
    assert sync(root).sent == 1
    assert [step for step, _ in curve(root, trained, "loss")] == [1, 2, 3, 4]
    assert Delivery(log, note=print).unsent() == 0


def test_usage_is_not_reported_to_anybody(root: Path) -> None:
    train()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_run_below_another_is_sent_below_it_whichever_goes_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is away until both have ended; the one below ended first, and one is begun afterwards."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with StageRun.start(params={}, data={}, stage="tune", system=False) as above:
        below = train(nested=Nested(above.key, "trial 1"))
    assert below.parent_key == above.key
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(root).left == 0
    train(nested=Nested(above.key, "trial 2"))
    parent = mlflow_run(root, above.record)
    found = [run for run in all_runs(root) if run.info.run_id != parent.info.run_id]
    assert sorted(run.info.run_name for run in found) == ["trial 1", "trial 2"]
    assert {run.data.tags["mlflow.parentRunId"] for run in found} == {parent.info.run_id}
