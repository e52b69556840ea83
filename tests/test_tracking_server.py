"""Runs on a real `mlflow server` over HTTP: there, away, slow, and forgetful of its answers."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking_tools import Line, Server, free_port

from synmlops.tracking.runs import RunRecord, StageRun, sync
from synmlops.tracking.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), free_port())
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    project = tmp_path / "project"
    project.mkdir()
    line = Line(server.port)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", line.url)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"lab-{tmp_path.name}")
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.chdir(project)
    yield line
    line.close()


@pytest.fixture
def store(server: Server, line: Line) -> Any:
    """A client that goes to the server directly, whatever the line does."""
    from mlflow import MlflowClient

    return MlflowClient(server.url)


def runs_of(store: Any) -> list[Any]:
    experiment = store.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    return [] if experiment is None else list(store.search_runs([experiment.experiment_id]))


def curve(store: Any, run_id: str) -> list[int]:
    return [point.step for point in store.get_metric_history(run_id, "loss")]


def log_steps(run: StageRun, first: int, last: int) -> float:
    """Log and commit some steps; gives the longest time one of them took, in seconds."""
    longest = 0.0
    for step in range(first, last + 1):
        began = time.perf_counter()
        run.log_metrics({"loss": 1 / step, "score": float(step)}, step=step)
        run.commit(step)
        longest = max(longest, time.perf_counter() - began)
    return longest


def train(steps: int = 4) -> StageRun:
    with StageRun.start(params={"a": 1}, data={"v.h5": "ab" * 32}, system=False) as run:
        log_steps(run, 1, steps)
    return run


def attach(stage: str, record: RunRecord) -> StageRun:
    with StageRun.attach(stage, params={f"{stage}.x": 1}, record=record, system=False) as run:
        run.log_metrics({f"{stage}_score": 0.5})
    return run


def test_a_pipeline_on_a_server(line: Line, store: Any) -> None:
    report = Path("report.html")
    report.write_text("<html>")
    trained = train().record
    with StageRun.attach("infer", params={"infer.x": 1}, record=trained, system=False) as inferring:
        inferring.log_artifact(report, "evaluation")
        inferring.log_input("v", digest="ab" * 32, context="test", source="v.h5")
    evaluated = attach("evaluate", inferring.record)
    [run] = runs_of(store)
    assert run.info.run_id == evaluated.record.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 0.25, "score": 4.0, "evaluate_score": 0.5}
    assert run.data.params == {"a": "1", "infer.x": "1", "evaluate.x": "1"}
    assert curve(store, run.info.run_id) == [1, 2, 3, 4]
    assert [f.path for f in store.list_artifacts(run.info.run_id, "evaluation")] == ["evaluation/report.html"]
    assert evaluated.notes == ()
    again = attach("evaluate", inferring.record)
    assert again.record.parent_key == trained.key


def test_a_server_that_is_away_at_the_start_gets_all_from_the_next_stage(line: Line, store: Any) -> None:
    line.set("cut")
    training = train()
    assert training.record.mlflow_run_id is None
    assert "lines were not sent" in training.notes[0]
    assert "synmlops sync" in training.notes[0]
    assert runs_of(store) == []
    line.set("good")
    inferring = attach("infer", training.record)
    [run] = runs_of(store)
    assert inferring.notes == (f"sent what train could not, to run {training.record.key[:8]}",)
    assert inferring.record.key == training.record.key
    assert run.data.metrics == {"loss": 0.25, "score": 4.0, "infer_score": 0.5}
    assert curve(store, run.info.run_id) == [1, 2, 3, 4]
    assert run.data.tags["synmlops.data.v.h5"] == "ab" * 32
    assert sync().sent == 0


def test_a_child_made_while_the_server_was_away_is_found_by_its_evaluate(line: Line, store: Any) -> None:
    line.set("cut")
    trained = train().record
    attach("evaluate", attach("infer", trained).record)
    again = attach("infer", trained).record
    line.set("good")
    evaluated = attach("evaluate", again).record
    assert (evaluated.key, evaluated.parent_key) == (again.key, trained.key)
    assert sync().left == 0
    child, parent = sorted(runs_of(store), key=lambda run: "mlflow.parentRunId" not in run.data.tags)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics == {"infer_score": 0.5, "evaluate_score": 0.5}
    assert parent.data.metrics == {"loss": 0.25, "score": 4.0, "infer_score": 0.5, "evaluate_score": 0.5}


def test_a_server_that_is_away_all_along_gets_all_from_sync(line: Line, store: Any) -> None:
    line.set("cut")
    trained = train().record
    inferred = attach("infer", trained).record
    attach("evaluate", inferred)
    again = attach("infer", trained).record
    assert again.parent_key == trained.key, "told from the files alone"
    attach("evaluate", again)
    line.set("good")
    assert (sync().left, sync().sent) == (0, 0)
    child, parent = sorted(runs_of(store), key=lambda run: "mlflow.parentRunId" not in run.data.tags)
    assert parent.data.metrics == {"loss": 0.25, "score": 4.0, "infer_score": 0.5, "evaluate_score": 0.5}
    assert child.data.metrics == {"infer_score": 0.5, "evaluate_score": 0.5}
    assert child.data.params == {"a": "1", "infer.x": "1", "evaluate.x": "1"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert curve(store, parent.info.run_id) == [1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["silent", "forgetful"])
def test_a_line_that_fails_in_the_middle_costs_no_time_and_no_step(
    line: Line, store: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with StageRun.start(params={}, data={}, system=False) as run:
        log_steps(run, 1, 20)
        assert run.flush(30)
        line.set(mode)
        longest = log_steps(run, 21, 40)
        for _ in range(2):  # the second time over a new connection
            assert not run.flush(10), "and what it was sent is in doubt"
        longest = max(longest, log_steps(run, 41, 60))
        line.set("good")
    assert longest < 1
    assert run.notes == ()
    assert curve(store, str(run.record.mlflow_run_id)) == list(range(1, 61))


def test_a_killed_server_gets_the_rest_when_it_is_back(line: Line, server: Server, store: Any) -> None:
    with StageRun.start(params={}, data={}, system=False) as run:
        log_steps(run, 1, 10)
        assert run.flush(30)
        server.kill()
        longest = log_steps(run, 11, 20)
    assert longest < 1
    assert "lines were not sent" in run.notes[0]
    assert sync().left == 1
    server.start()
    synced = sync()
    assert (synced.sent, synced.left) == (1, 0)
    assert sync().sent == 0
    assert curve(store, str(run.record.mlflow_run_id)) == list(range(1, 21))
    assert store.get_run(run.record.mlflow_run_id).info.status == "FINISHED"


def test_a_second_clone_finds_the_run_of_the_first_on_a_shared_server(
    line: Line, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_file = tmp_path / "run.json"
    train().record.write(record_file)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "second"))
    inferring = attach("infer", RunRecord.read(record_file))
    assert inferring.notes == ()
    [run] = runs_of(store)
    assert run.data.metrics["infer_score"] == 0.5


def test_credentials_stay_out_of_the_record(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", line.url.replace("http://", "http://ann:secret@"))
    run = train()
    assert run.record.tracking_uri == line.url
    everything = [path.read_text() for path in Path(".synmlops").rglob("*") if path.is_file()]
    assert everything
    assert not any("secret" in text for text in everything)
    line.set("cut")
    assert "secret" not in train().notes[0]


def test_an_unknown_outcome_is_asked_for_and_not_repeated(
    line: Line, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own SQL store drops exact repeats; others need not, so none may be sent."""
    points: list[tuple[str, int]] = []
    send = Store.log_metrics

    def counted(self: Store, run_id: str, batch: Any) -> None:
        points.extend((point[0], point[3]) for point in batch)
        send(self, run_id, batch)

    monkeypatch.setattr(Store, "log_metrics", counted)
    with StageRun.start(params={}, data={}, system=False) as run:
        assert run.flush(30)
        line.set("forgetful")
        log_steps(run, 1, 3)
        assert not run.flush(10)
        line.set("good")
        assert run.flush(10)
        log_steps(run, 4, 5)
    assert sorted(points) == sorted((name, step) for name in ("loss", "score") for step in range(1, 6))
    assert curve(store, str(run.record.mlflow_run_id)) == [1, 2, 3, 4, 5]
