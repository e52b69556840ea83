import subprocess
from pathlib import Path

import pytest

from synmlops.params import SynmlopsError
from synmlops.tracking.lineage import (
    experiment_name,
    project_root,
    public_uri,
    read_lineage,
    tracking_uri,
    ui_command,
)
from synmlops.tracking.record import RunRecord

RECORD = RunRecord(
    key="a" * 32,
    stage="train",
    mlflow_run_id=None,
    tracking_uri="https://mlflow.lab.org",
    parent_key=None,
    commit="unknown",
    dirty=False,
    dvc_experiment=None,
    data={"a.h5": "0" * 64},
    params={"seed": 0, "data.voxel_nm": None, "train.learning_rate": 0.002},
    logs={"train": "aa/train.jsonl"},
    created="2026-01-01T00:00:00+00:00",
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "DVC_ROOT",
        "DVC_EXP_NAME",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "DVC_EXP_BASELINE_REV",
    ):
        monkeypatch.delenv(name, raising=False)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_root_is_the_same_within_and_without_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "examples" / "vnc"
    inner.mkdir(parents=True)
    assert project_root(inner) == inner
    (tmp_path / "params.yaml").touch()
    assert project_root(inner) == tmp_path
    (inner / "dvc.yaml").touch()
    assert project_root(inner) == inner
    (tmp_path / ".dvc").mkdir()
    assert project_root(inner) == inner  # a .dvc without config is a cache, not a project
    (tmp_path / ".dvc" / "config").touch()
    assert project_root(inner) == tmp_path  # what DVC would say
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))
    assert project_root(inner) == tmp_path / "elsewhere"


def test_the_store_is_embedded_unless_the_user_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/.synmlops/mlflow.db"
    assert experiment_name() == "synmlops"
    monkeypatch.chdir(tmp_path)
    assert ui_command(tmp_path).endswith("mlflow ui --backend-store-uri sqlite:///.synmlops/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@mlflow.lab.org")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "fafb")
    assert tracking_uri(tmp_path) == "https://ann:secret@mlflow.lab.org"
    assert public_uri(tracking_uri(tmp_path), tmp_path) == "https://mlflow.lab.org"
    assert ui_command(tmp_path) == "open https://mlflow.lab.org"
    assert experiment_name() == "fafb"


def test_no_git_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    lineage = read_lineage(tmp_path)
    assert (lineage.commit, lineage.dirty, lineage.dvc_experiment) == ("unknown", False, None)
    assert "mlflow.source.git.commit" not in lineage.tags()
    monkeypatch.setenv("PATH", "")
    assert read_lineage(tmp_path).commit == "unknown"


def test_commit_and_what_makes_it_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "params.yaml").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "params.yaml").write_text("2")
    (tmp_path / "notes.txt").write_text("untracked, and no code")
    monkeypatch.setenv("DVC_EXP_NAME", "lucid-fern")
    lineage = read_lineage(tmp_path)
    assert lineage.commit == git(tmp_path, "rev-parse", "HEAD")
    assert not lineage.dirty
    assert lineage.tags()["mlflow.source.git.commit"] == lineage.commit
    assert lineage.tags()["synmlops.dvc_experiment"] == "lucid-fern"
    (tmp_path / "code.py").write_text("2")
    (tmp_path / "new.py").write_text("2")
    lineage = read_lineage(tmp_path)
    assert lineage.dirty
    assert lineage.tags()["synmlops.dirty_files"] == "code.py, new.py"


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "models" / "run.json"
    RECORD.write(path)
    assert RunRecord.read(path) == RECORD


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no run record"),
        ("[]", "not a JSON object"),
        ('{"key": "a"}', "missing or unknown fields: commit, created"),
    ],
)
def test_a_spoilt_record_says_what_to_do(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(SynmlopsError, match=r"run\.json: No such file.*dvc repro"):
        RunRecord.read(path)
    path.write_text(text)
    with pytest.raises(SynmlopsError, match=rf"run\.json: .*{problem}.*dvc checkout"):
        RunRecord.read(path)


def test_a_record_field_of_a_wrong_type_is_named() -> None:
    with pytest.raises(ValueError, match="key is 3"):
        RunRecord.from_dict(RECORD.to_dict() | {"key": 3})
