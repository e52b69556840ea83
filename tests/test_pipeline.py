"""The pipeline as a user has it: DVC runs the four stages in a project, MLflow keeps the record."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from synmlops.layout import EVALUATED
from synmlops.volumes.table import COLUMNS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
OUTPUTS = (
    "models/model.safetensors",
    "models/history.csv",
    "data/predicted/run.json",
    "data/evaluated/metrics.json",
    "data/evaluated/report.html",
)


class Project:
    """A clone of the repository with params so small that the pipeline takes seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hidden = ("MLFLOW_", "DVC_", "GIT_", "SYNMLOPS_", "TORCHELASTIC_")
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self._env |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "true",
            "OMP_NUM_THREADS": "1",
            "GIT_AUTHOR_NAME": "tester",
            "GIT_AUTHOR_EMAIL": "tester@localhost",
            "GIT_COMMITTER_NAME": "tester",
            "GIT_COMMITTER_EMAIL": "tester@localhost",
        }

    @classmethod
    def make(cls, folder: Path) -> "Project":
        folder.mkdir()
        project = cls(folder)
        shutil.copytree(ROOT / "synmlops", folder / "synmlops", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder)
        (folder / "data").mkdir()
        (folder / "models").mkdir()
        (folder / "params.yaml").write_text(yaml.safe_dump(_small(ROOT / "params.yaml")))
        project.run("git", "init", "-q")
        project.run("dvc", "init", "-q")
        project.run("git", "add", ".")
        project.run("git", "commit", "-qm", "A project")
        return project

    def run(self, *command: str, code: int = 0, **env: str) -> str:
        """Run a command in the project and give all it printed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def runs(self) -> list[Run]:
        """Give all MLflow runs, oldest first."""
        client = MlflowClient(f"sqlite:///{self.folder}/.synmlops/mlflow.db")
        experiment = client.get_experiment_by_name("synmlops")
        assert experiment is not None
        return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])

    def read_json(self, name: str) -> dict[str, float]:
        tree: dict[str, float] = json.loads((self.folder / name).read_text())
        return tree


def _small(params: Path) -> dict[str, object]:
    tree = yaml.safe_load(params.read_text())
    tree["data"]["phantom"] |= {
        "size_zyx": [14, 128, 128], "train_seeds": [1], "validation_seeds": [2], "test_seeds": [3],
    }  # fmt: skip
    tree["network"] |= {
        "stem_zyx": [1, 2, 2], "widths": [8, 12], "kernels": [[1, 3, 3], [3, 3, 3]], "pools": [[1, 2, 2]],
    }  # fmt: skip
    tree["sampling"] |= {"patch_zyx": [8, 64, 64], "batch_size": 2, "reject_below": 20}
    tree["train"] |= {"steps": 12, "validate_every": 6, "checkpoint_every": 6, "warmup_steps": 2}
    tree["train"]["validation"] |= {"window_zyx": [8, 64, 64]}
    tree["infer"] |= {"window_zyx": [8, 64, 64]}
    tree["evaluate"] |= {"threshold": "auto"}
    return dict(tree)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` has run once; the tests below go on from there, in their order."""
    project = Project.make(tmp_path_factory.mktemp("pipeline") / "project")
    printed = project.run("dvc", "repro")
    stages = [line for line in printed.splitlines() if line.startswith("Running stage")]
    assert stages == [f"Running stage '{name}':" for name in ("prepare", "train", "infer", "evaluate")]
    return project


def test_every_output_is_there(project: Project) -> None:
    for name in OUTPUTS:
        assert (project.folder / name).stat().st_size > 0
    metrics = project.read_json("data/evaluated/metrics.json")
    assert {"voxel_union_f1", "detection_f1", "direction_accuracy", "partner_neurons_f1"} <= set(metrics)
    assert all(0 <= value <= 1 for name, value in metrics.items() if name.endswith("f1"))
    table = pd.read_parquet(project.folder / EVALUATED / "partners" / "phantom_3.parquet")
    assert list(table.columns) == list(COLUMNS)


def test_one_run_holds_params_curves_scores_artifacts_and_inputs(project: Project) -> None:
    (run,) = project.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"]
    assert run.data.params["infer.overlap"] == run.data.params["train.validation.overlap"]
    assert run.data.params["evaluate.threshold"] == "auto"
    metrics = project.read_json("data/evaluated/metrics.json")
    assert run.data.metrics["voxel_union_f1"] == pytest.approx(metrics["voxel_union_f1"])
    assert "best_validation_f1" in run.data.metrics
    assert any(name.startswith("system/") for name in run.data.metrics)
    contexts = {tag.value for given in run.inputs.dataset_inputs for tag in given.tags}
    assert {"training", "validation", "test"} <= contexts
    client = MlflowClient(f"sqlite:///{project.folder}/.synmlops/mlflow.db")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [6, 10, 12]  # each checkpoint, and every tenth step
    folders = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"checkpoints", "curves", "evaluation"} <= folders
    assert "synmlops.run_key" in run.data.tags


def test_a_second_repro_does_nothing(project: Project) -> None:
    assert "Running stage" not in project.run("dvc", "repro")


def test_another_threshold_reruns_evaluate_alone_and_goes_to_a_child_run(project: Project) -> None:
    before = project.runs()
    printed = project.run("dvc", "exp", "run", "--name", "low", "-S", "evaluate.threshold=0.25")
    assert [line for line in printed.splitlines() if "Running stage" in line] == ["Running stage 'evaluate':"]
    assert project.read_json("data/evaluated/metrics.json")["threshold"] == 0.25
    runs = project.runs()
    (child,) = [run for run in runs if run.info.run_id not in {one.info.run_id for one in before}]
    assert child.data.tags["mlflow.parentRunId"] == before[0].info.run_id
    assert child.data.params["evaluate.threshold"] == "0.25"
    assert child.data.params["train.steps"] == "12"
    parent = next(run for run in runs if run.info.run_id == before[0].info.run_id)
    assert parent.data.params["evaluate.threshold"] == "auto"
    assert parent.data.metrics == before[0].data.metrics


def test_only_infer_again_makes_a_child_that_evaluate_writes_into(project: Project) -> None:
    before = {run.info.run_id for run in project.runs()}
    printed = project.run("dvc", "exp", "run", "--name", "dense", "-S", "infer.overlap=0.5")
    ran = [line for line in printed.splitlines() if "Running stage" in line]
    assert ran == ["Running stage 'infer':", "Running stage 'evaluate':"]
    new = [run for run in project.runs() if run.info.run_id not in before]
    assert len(new) == 1
    assert new[0].data.params["infer.overlap"] == "0.5"
    assert "voxel_union_f1" in new[0].data.metrics
    assert new[0].data.metrics["threshold"] == 0.25


def test_another_learning_rate_gives_a_second_run_to_compare(project: Project) -> None:
    before = {run.info.run_id for run in project.runs()}
    project.run("dvc", "exp", "run", "--name", "slow", "-S", "train.learning_rate=0.0001")
    (new,) = [run for run in project.runs() if run.info.run_id not in before]
    assert new.data.params["train.learning_rate"] == "0.0001"
    assert "mlflow.parentRunId" not in new.data.tags
    assert "voxel_union_f1" in new.data.metrics


def test_a_failed_stage_leaves_no_output_and_checkout_brings_back_the_last(project: Project) -> None:
    kept = (project.folder / "models/model.safetensors").read_bytes()
    printed = project.run(
        "dvc", "exp", "run", "--name", "wrong", "-S", "sampling.patch_zyx=[8,640,640]", code=255
    )
    assert "fewer than sampling.patch_zyx" in printed
    assert "dvc checkout" in printed
    assert not (project.folder / "models/model.safetensors").exists()
    project.run("dvc", "checkout")
    assert (project.folder / "models/model.safetensors").read_bytes() == kept


def test_run_directly_a_failing_command_leaves_earlier_outputs_untouched(project: Project) -> None:
    project.run("git", "checkout", "params.yaml")
    before = (project.folder / "models/model.safetensors").read_bytes()
    text = (project.folder / "params.yaml").read_text()
    (project.folder / "wrong.yaml").write_text(
        text.replace("- 64\n  - 64\n  reject", "- 640\n  - 640\n  reject")
    )
    printed = project.run("synmlops", "train", "--params", "wrong.yaml", code=2)
    assert "fewer than sampling.patch_zyx" in printed
    assert "dvc checkout" not in printed
    assert (project.folder / "models/model.safetensors").read_bytes() == before


def test_without_a_server_the_pipeline_finishes_and_sync_sends_the_rest(project: Project) -> None:
    """The server is down from start to end; the embedded store then gets everything by `synmlops sync`."""
    project.run("git", "checkout", "params.yaml")
    nowhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {run.info.run_id for run in project.runs()}
    printed = project.run("dvc", "repro", "--force", "--single-item", "evaluate", **nowhere)
    assert "synmlops sync" in printed
    assert {run.info.run_id for run in project.runs()} == before
    project.run("synmlops", "sync")
    (new,) = [run for run in project.runs() if run.info.run_id not in before]
    assert "voxel_union_f1" in new.data.metrics


def test_a_second_clone_pulls_what_the_first_made_and_goes_on(project: Project, tmp_path: Path) -> None:
    """Outputs come through a DVC remote, the record through run.json: the clone's own store is empty."""
    project.run("git", "checkout", "params.yaml")
    project.run("dvc", "repro")
    project.run("dvc", "remote", "add", "--default", "shelf", str(tmp_path / "shelf"))
    project.run("dvc", "push")
    project.run("git", "add", "dvc.lock", ".dvc/config")
    project.run("git", "commit", "-qm", "Results")
    project.run("git", "clone", "-q", str(project.folder), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    clone.run("dvc", "pull")
    assert "Running stage" not in clone.run("dvc", "repro")
    printed = clone.run("dvc", "exp", "run", "--name", "high", "-S", "evaluate.threshold=0.7")
    assert [line for line in printed.splitlines() if "Running stage" in line] == ["Running stage 'evaluate':"]
    (run,) = clone.runs()
    original = next(one for one in project.runs() if "mlflow.parentRunId" not in one.data.tags)
    assert run.data.tags["synmlops.run_key"] == original.data.tags["synmlops.run_key"]
    assert "synmlops.rebuilt" in run.data.tags
    assert run.data.params["train.steps"] == "12"
    assert run.data.params["evaluate.threshold"] == "0.7"
