"""The train stage as a process: killed at any moment, full disks, other params; and the run it leaves."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import TinyProject
from tracking_tools import migrated_store

TOOLS = Path(__file__).parent

# Imports once, then trains in children that it kills: seconds are spent on training, not on imports.
KILLER = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import mlflow, torch._dynamo  # which optimisers import
from synmlops.params import load_params
from synmlops.stages.train import run

def begin(out):
    child = os.fork()
    if child:
        return child
    try:
        run(load_params(Path("params.yaml")), prepared=Path(sys.argv[1]), out=Path(out), gpus=0)
        os._exit(0)
    except SystemExit as left:
        os._exit(left.code)
    except BaseException:
        traceback.print_exc()
        os._exit(99)

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

began = time.monotonic()
assert end(begin("whole")) == 0
needed = time.monotonic() - began
random.seed(seed := int(sys.argv[2]))
for number in (signal.SIGKILL, signal.SIGTERM) * 2:
    child = begin("killed")
    time.sleep(random.uniform(0.1, 0.7) * needed)
    os.kill(child, number)
    left = end(child)
    print(number.name, left, *(path.name for path in Path(".synmlops/checkpoints").glob("*/*/*.pt")))
    assert left in (0, -signal.SIGKILL, 128 + signal.SIGTERM), left
    if left == 0:
        break
else:
    assert end(begin("killed")) == 0
"""


@dataclass(frozen=True)
class Project:
    """A folder with params.yaml, in which `synmlops` runs."""

    root: Path
    prepared: Path

    @classmethod
    def make(cls, root: Path, tiny: TinyProject, **sections: Mapping[str, object]) -> "Project":
        project = cls(root, tiny.prepared)
        tree = tiny.params.model_dump(mode="json")
        for name, values in sections.items():
            tree[name] |= values
        (root / "params.yaml").write_text(yaml.safe_dump(tree))
        (root / ".synmlops").mkdir()
        shutil.copy(migrated_store(), root / ".synmlops" / "mlflow.db")
        return project

    def change(self, **sections: Mapping[str, object]) -> None:
        tree = yaml.safe_load((self.root / "params.yaml").read_text())
        for name, values in sections.items():
            tree[name] |= values
        (self.root / "params.yaml").write_text(yaml.safe_dump(tree))

    def start(self, *command: str, **env: str) -> "subprocess.Popen[str]":
        hidden = ("MLFLOW_", "DVC_", "TORCHELASTIC_")
        plain = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=plain | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, code: int = 0, **env: str) -> str:
        process = self.start(*command, **env)
        try:
            said, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == code, said
        return said

    def train(self, out: str, *flags: str, code: int = 0, **env: str) -> str:
        command = (sys.executable, "-m", "synmlops", "train", "--prepared", str(self.prepared), "--out", out)
        return self.run(*command, *flags, code=code, **env)

    def query(self, sql: str) -> list[tuple[object, ...]]:
        with sqlite3.connect(self.root / ".synmlops" / "mlflow.db") as store:
            return store.execute(sql).fetchall()

    def runs(self) -> list[tuple[object, ...]]:
        """Give id and status of all runs, oldest first."""
        return self.query("select run_uuid, status from runs order by start_time")

    def points(self, run_id: object) -> list[tuple[object, ...]]:
        """Give all points of a run that training decides, sorted."""
        return self.query(
            f"select key, step, value from metrics where run_uuid = '{run_id}' and key not like 'system/%' "
            "and key != 'patches_per_s' order by key, step"
        )

    def tag(self, run_id: object, name: str) -> object:
        found = self.query(f"select value from tags where run_uuid = '{run_id}' and key = '{name}'")
        return found[0][0] if found else None


def _assert_same_models(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "last.safetensors"):
        weights, others = load_file(one / name), load_file(other / name)
        assert all(torch.equal(weights[key], others[key]) for key in weights | others)
    assert (one / "history.csv").read_text() == (other / "history.csv").read_text()


@pytest.mark.slow
def test_killed_at_any_moments_is_never_killed(tiny_project: TinyProject, tmp_path: Path) -> None:
    """SIGKILL and SIGTERM in turn: the same weights bit by bit, one run, each of its steps once."""
    train = {"steps": 90, "validate_every": 30, "checkpoint_every": 7}
    project = Project.make(tmp_path, tiny_project, train=train)
    (tmp_path / "killer.py").write_text(KILLER)
    seed = time.time_ns() % 10**6
    said = project.run(sys.executable, "killer.py", str(project.prepared), str(seed))
    _assert_same_models(tmp_path / "whole", tmp_path / "killed")
    [(whole, status), (killed, killed_status)] = project.runs()
    assert (status, killed_status) == ("FINISHED", "FINISHED"), f"seed {seed}: {said}"
    points = project.points(killed)
    assert points == project.points(whole), f"seed {seed}: {said}"
    curve = pd.read_csv(tmp_path / "whole" / "history.csv").dropna(subset="loss")
    assert [(step, value) for key, step, value in points if key == "loss"] == list(
        zip(curve["step"], curve["loss"], strict=True)
    )
    assert not list((tmp_path / ".synmlops" / "checkpoints").iterdir())
