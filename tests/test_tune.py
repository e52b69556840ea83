"""A search on blobs: its space, its trials in SQLite and in MLflow, and params files with their looks."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import TinyProject
from tracking_tools import migrated_store

from synmlops.params import Params, load_params
from synmlops.section import SynmlopsError
from synmlops.stages import tune
from synmlops.stages.train import run as run_train
from synmlops.stages.tune import Search, apply, search_folder, trial_folder
from synmlops.tracking.runs import Nested
from synmlops.tuning.params_file import rewrite
from synmlops.tuning.space import Choices, Range, Space, read_space
from synmlops.tuning.study import Row, Study, alone

SPACE = {
    "train.learning_rate": [1e-7, 0.02],
    "loss.dice": {"low": 0.0, "high": 1.0, "step": 0.25},
    "network": [{"widths": [4, 6]}, {"widths": [4, 8]}],
}


def make_project(folder: Path, patch: pytest.MonkeyPatch, params: Params) -> Path:
    """Give a project with params.yaml, tune.yaml and an empty MLflow store."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME"):
        patch.delenv(name, raising=False)
    patch.setenv("DVC_ROOT", str(folder))
    patch.chdir(folder)
    (folder / ".synmlops").mkdir()
    shutil.copy(migrated_store(), folder / ".synmlops" / "mlflow.db")
    text = yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)
    text = text.replace("  learning_rate:", "  # tuned by hand\n  learning_rate:")
    (folder / "params.yaml").write_text(text)
    (folder / "tune.yaml").write_text(yaml.safe_dump(SPACE))
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_project: TinyProject) -> Path:
    return make_project(tmp_path, monkeypatch, tiny_project.params)


@pytest.fixture
def offline(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a project whose MLflow server is away, which must not matter to a search."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return project


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, tiny_project: TinyProject) -> tuple[Path, list[Row]]:
    """Search once, with nothing that goes wrong; nothing may write there."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        make_project(folder, patch, tiny_project.params)
        return folder, tune.run(search(folder, tiny_project.prepared), train=trained(tiny_project.prepared))


def search(project: Path, prepared: Path, **options: Any) -> Search:
    files = {"base": project / "params.yaml", "space": project / "tune.yaml", "prepared": prepared}
    return Search(**{"name": "s", "n_trials": 3, "spare": 1, **files, **options})


def trained(prepared: Path) -> tune.Train:
    return partial(run_train, prepared=prepared, gpus=0)


def scored(score: Callable[[Params], float], *, trials: list[Params] | None = None) -> tune.Train:
    """Give a training that only validates, twice; what a study decides does not depend on more."""

    def train(params: Params, *, out: Path, watch: Callable[[int, float], None], nested: Nested) -> None:
        if trials is not None:
            trials.append(params)
        for step in (6, 12):
            watch(step, score(params))

    return train


def mlflow_client(project: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{project / '.synmlops' / 'mlflow.db'}")


def mlflow_runs(project: Path) -> tuple[Any, list[Any]]:
    """Give the run of the search, and those below it in the order of the trials."""
    client = mlflow_client(project)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert len(children) == len(runs) - 1
    return parent, sorted(children, key=lambda run: str(run.info.run_name))


def scores_of(project: Path, run: Any) -> list[tuple[int, float]]:
    found = mlflow_client(project).get_metric_history(run.info.run_id, "validation_f1")
    return [(point.step, point.value) for point in found]


def test_a_search_completes_the_good_and_prunes_the_bad(searched: tuple[Path, list[Row]]) -> None:
    _, rows = searched
    assert [row.number for row in rows] == [0, 1, 2]
    assert {row.state for row in rows} == {"complete", "pruned"}
    slow = [row for row in rows if row.values["train.learning_rate"] == 1e-7]
    assert slow
    for row in slow:
        assert (row.state, row.best_step) == ("pruned", 6)  # at the first score
    assert not list((searched[0] / ".synmlops" / "checkpoints").iterdir())


def test_each_trial_is_a_run_below_that_of_the_search(searched: tuple[Path, list[Row]]) -> None:
    folder, rows = searched
    parent, children = mlflow_runs(folder)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["synmlops.tune"] == "s"
    best = max(row.best or 0 for row in rows if row.state == "complete")
    assert parent.data.metrics["best_validation_f1"] == best
    assert parent.data.params["space.loss.dice"].startswith("{")
    assert [run.info.run_name for run in children] == [f"s trial {number}" for number in range(3)]
    for row, run in zip(rows, children, strict=True):
        assert run.info.status == ("FINISHED" if row.state == "complete" else "KILLED")
        assert max(score for _, score in scores_of(folder, run)) == row.best
        assert float(run.data.params["loss.dice"]) == row.values["loss.dice"]
        if row.state == "pruned":
            assert row.reason.startswith(f"pruned at step {row.best_step}: ")
            assert row.reason in run.data.tags["synmlops.failure"]


def test_a_trial_can_be_applied_and_trained_to_the_same_score(
    searched: tuple[Path, list[Row]], project: Path, tiny_project: TinyProject
) -> None:
    folder, rows = searched
    shutil.copytree(search_folder_of(folder), search_folder("s"))
    row = next(row for row in rows if row.state == "complete")
    changed = apply("s", row.number, params=project / "params.yaml")
    assert changed.keys() <= {"train.learning_rate", "loss.dice", "network.widths"}
    params = load_params(project / "params.yaml")
    assert params.train.learning_rate == row.values["train.learning_rate"]
    assert list(params.network.widths) == row.values["network.widths"]
    assert params == load_params(trial_folder(search_folder("s"), row.number) / "params.yaml")
    assert "# tuned by hand" in (project / "params.yaml").read_text()
    heard: list[float] = []
    run_train(
        params, prepared=tiny_project.prepared, out=project / "models", gpus=0,
        watch=lambda step, score: heard.append(score),
    )  # fmt: skip
    assert max(heard) == row.best
    with pytest.raises(SynmlopsError, match="no such trial; there are trial_0000 to trial_0002"):
        apply("s", 9, params=project / "params.yaml")


def search_folder_of(project: Path) -> Path:
    return project / ".synmlops" / "tune" / "s"


KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
from synmlops.stages import tune
from synmlops.stages.train import run

def killed(params, *, out, watch, nested):
    def watch_and_die(step, score):
        if step == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        watch(step, score)
    run(params, out=out, watch=watch_and_die, nested=nested, prepared=Path(sys.argv[1]), gpus=0)

search = tune.Search("s", Path("params.yaml"), Path("tune.yaml"), Path(sys.argv[1]), n_trials=3, spare=1)
tune.run(search, train=killed)
"""


def test_a_killed_search_goes_on_as_if_nothing_had_been(
    searched: tuple[Path, list[Row]], project: Path, tiny_project: TinyProject
) -> None:
    """Killed at the last validation of the first trial; it goes on from its checkpoint, as the same run."""
    command = [sys.executable, "-c", KILLED, str(tiny_project.prepared)]
    ended = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    steps: list[int] = []

    def train(params: Params, *, out: Path, watch: Callable[[int, float], None], nested: Nested) -> None:
        def listen(step: int, score: float) -> None:
            steps.append(step)
            watch(step, score)

        run_train(params, prepared=tiny_project.prepared, gpus=0, out=out, watch=listen, nested=nested)

    rows = tune.run(search(project, tiny_project.prepared), train=train)
    assert steps[0] == 12
    assert rows == searched[1]
    parent, children = mlflow_runs(project)
    assert parent.info.status == "FINISHED"
    assert len(children) == 3
    assert [step for step, _ in scores_of(project, children[0])] == [6, 12]


# -- what a search decides, without the hours ----------------------------------------------------------------


def better_with_less_dice(params: Params) -> float:
    return 1 - params.loss.dice


def small_study(folder: Path, *, seed: int = 0) -> Study:
    space = Space(
        {
            "loss.dice": Range(0.0, 1.0, log=False, step=None, whole=False),
            "train.optimizer": Choices(("adamw", "sgd")),
        }
    )
    return Study(folder, space=space, facts={}, seed=seed, spare=1, first_prunable=0)


def play(study: Study, n_trials: int) -> list[Row]:
    """Run trials that are good at first and better with less Dice."""
    while (attempt := study.next(n_trials)) is not None:
        attempt.watch(1, 0.5)
        attempt.watch(2, 1 - attempt.values["loss.dice"])
        attempt.complete()
    return study.rows()


def test_the_same_seed_tries_the_same_however_often_it_is_interrupted(tmp_path: Path) -> None:
    """Beyond the first few, which are drawn at random, too."""
    rows = play(small_study(tmp_path / "whole"), 8)
    for n_trials in (3, 6, 8):
        again = play(small_study(tmp_path / "parts"), n_trials)
    assert again == rows
    assert len(rows) == 8
    assert len({row.values["loss.dice"] for row in rows}) == 8
    assert all(row.best == max(0.5, 1 - row.values["loss.dice"]) for row in rows)
    assert play(small_study(tmp_path / "other", seed=1), 1)[0].values != rows[0].values


def test_a_trial_that_ends_its_process_again_and_again_is_given_up(tmp_path: Path) -> None:
    values = []
    for _ in range(3):
        attempt = small_study(tmp_path).next(2)
        assert attempt is not None
        values.append(attempt.values)
    assert values == values[:1] * 3
    rows = play(small_study(tmp_path), 2)
    assert [row.state for row in rows] == ["failed", "complete"]
    assert rows[0].reason == "was ended from outside 3 times"


def test_trials_that_fail_are_left_until_three_in_a_row_end_the_search(
    project: Path, tiny_project: TinyProject
) -> None:
    tried: list[Params] = []

    def fussy(params: Params) -> float:
        if len(tried) != 2:
            raise SynmlopsError("too much dice")
        return 0.5

    with pytest.raises(SynmlopsError, match="3 trials in a row failed, the last one so: too much dice"):
        tune.run(search(project, tiny_project.prepared, n_trials=50), train=scored(fussy, trials=tried))
    assert len(tried) == 5
    parent, _ = mlflow_runs(project)
    assert parent.info.status == "FAILED"
    assert parent.data.metrics["best_validation_f1"] == 0.5


def test_a_trial_that_was_trained_but_not_yet_scored_is_not_trained_again(
    offline: Path, tiny_project: TinyProject
) -> None:
    def ended_at_the_last_moment(
        params: Params, *, out: Path, watch: Callable[[int, float], None], nested: Nested
    ) -> None:
        watch(12, 0.25)
        out.mkdir()
        (out / "run.json").touch()  # the last that training writes
        raise KeyboardInterrupt

    one = search(offline, tiny_project.prepared, n_trials=1)
    with pytest.raises(KeyboardInterrupt):
        tune.run(one, train=ended_at_the_last_moment)
    tried: list[Params] = []
    rows = tune.run(one, train=scored(better_with_less_dice, trials=tried))
    assert not tried
    assert [(row.state, row.best) for row in rows] == [("complete", 0.25)]


def test_a_search_does_not_go_on_with_another_space_or_at_the_same_time(
    offline: Path, tiny_project: TinyProject
) -> None:
    one = search(offline, tiny_project.prepared, n_trials=1)
    tune.run(one, train=scored(better_with_less_dice))
    with alone(one.folder), pytest.raises(SynmlopsError, match="runs this search"):
        tune.run(one, train=scored(better_with_less_dice))
    rewrite(offline / "params.yaml", offline / "params.yaml", {"loss.bce": 3.0})
    with pytest.raises(SynmlopsError, match=r"begun with other values of loss\.bce; give another --name"):
        tune.run(one, train=scored(better_with_less_dice))


# -- the space -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"loss.bec": [1, 2]}, r"loss.bec: unknown key; did you mean loss.bce\?"),
        ({"data.pool_zyx": [[1, 1, 1], [1, 2, 2]]}, "data.pool_zyx: the prepared data depend on it"),
        ({"evaluate.iou": [0.3, 0.5]}, "evaluate.iou: no training depends on it"),
        ({"loss.bce": [1.0]}, r"loss.bce: \[1.0\] leaves no choice"),
        ({"loss.bce": 2}, "loss.bce: must be a list of choices or {low: ..., high: ...}, got 2"),
        ({"loss.bce": {"low": 2, "high": 1}}, "loss.bce: low 2 must be less than high 1"),
        ({"loss.bce": {"low": 0, "high": 1, "log": True}}, "loss.bce: low 0 has no logarithm"),
        ({"loss.bce": {"low": 0, "hihg": 1}}, "loss.bce.hihg: unknown key; did you mean high"),
        ({"loss.bce": {"low": -1, "high": 1}}, "loss.bce: -1.0 does not work.*must be at least 0, got -1"),
        ({"network.blocks": {"low": 1, "high": 2.5}}, "network.blocks: is a whole number"),
        ({"network.norm": {"low": 1, "high": 2}}, "network.norm: is no number .now 'group'."),
        ({"network.widths": [[4, 6], [4, 6, 8]]}, "give both as the choices of their section"),
        ({"network": [{"widths": [4, 6]}, 3]}, "network: is a section; each choice must be a section"),
        (
            {"network": [{"blocks": 1}, {"blocks": 2}], "network.blocks": [1, 2]},
            "network.blocks stands below",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(
    space: dict[str, Any], message: str, project: Path
) -> None:
    (project / "tune.yaml").write_text(yaml.safe_dump(space))
    with pytest.raises(SynmlopsError, match=message):
        read_space(project / "tune.yaml", base=project / "params.yaml")


def test_the_space_of_the_project_fits_its_params() -> None:
    root = Path(__file__).parents[1]
    assert read_space(root / "tune.yaml", base=root / "params.yaml").entries


def test_folds_and_a_missing_validation_are_refused(project: Path, tiny_project: TinyProject) -> None:
    manifest = json.loads((tiny_project.prepared / "manifest.json").read_text())
    for folds, message in (
        ([{**fold, "validation": []} for fold in manifest["folds"]], "no labelled validation volume"),
        ([{**fold, "name": name} for fold in manifest["folds"] for name in "12"], "divided into 2 folds"),
    ):
        prepared = project / message.split()[0]
        shutil.copytree(tiny_project.prepared, prepared)
        (prepared / "manifest.json").write_text(json.dumps(manifest | {"folds": folds}))
        with pytest.raises(SynmlopsError, match=message):
            tune.run(search(project, prepared), train=scored(better_with_less_dice))


def test_a_params_file_keeps_its_looks(tmp_path: Path) -> None:
    """The project's own: nothing changes but the values, and what is written is read as numbers."""
    source, target = Path(__file__).parents[1] / "params.yaml", tmp_path / "params.yaml"
    rewrite(source, target, {})
    assert target.read_text() == source.read_text()
    rewrite(source, target, {"train.learning_rate": 1e-5, "train.milestones": [5, 9], "seed": 3})
    before, after = source.read_text().splitlines(), target.read_text().splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["seed: 3", "  learning_rate: 1.0e-05", "  milestones: [5, 9]"]
    assert yaml.safe_load(target.read_text())["train"]["learning_rate"] == 1e-5
