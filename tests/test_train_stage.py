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
from tracking_tools import Server, free_port, migrated_store

from synmlops.learning.checkpoint import ModelMeta, save_model
from synmlops.learning.distributed import name_differences
from synmlops.learning.networks.registry import build_network
from synmlops.params import CHANNELS
from synmlops.stages.train import _facts_of, _unlike_start

TOOLS = Path(__file__).parent

FULL_DISK = """
mount -t tmpfs -o size=8m tmpfs . && cd "$PWD"
cp -r "$1"/. . && shift
dd if=/dev/zero of=fill bs=1k count=$(( $(df -k --output=avail . | tail -1) - ROOM )) 2>/dev/null
"$@"; echo "left with $?"
ls .synmlops/checkpoints/*/all; echo; cp .synmlops/mlflow.db "$OUT/full.db"
rm fill
"$@"; echo "left with $?"
cp .synmlops/mlflow.db "$OUT/after.db"
"""

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
class Record:
    """What MLflow was told, as it lies in its store."""

    store: Path

    def query(self, sql: str) -> list[tuple[object, ...]]:
        with sqlite3.connect(self.store) as store:
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

    @property
    def record(self) -> "Record":
        return Record(self.root / ".synmlops" / "mlflow.db")


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
    [(whole, status), (killed, killed_status)] = project.record.runs()
    assert (status, killed_status) == ("FINISHED", "FINISHED"), f"seed {seed}: {said}"
    points = project.record.points(killed)
    assert points == project.record.points(whole), f"seed {seed}: {said}"
    curve = pd.read_csv(tmp_path / "whole" / "history.csv").dropna(subset="loss")
    assert [(step, value) for key, step, value in points if key == "loss"] == list(
        zip(curve["step"], curve["loss"], strict=True)
    )
    assert not list((tmp_path / ".synmlops" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_full_disk_is_one_error_a_failed_run_and_no_lost_step(
    tiny_project: TinyProject, tmp_path: Path
) -> None:
    """On a real disk with room for one checkpoint and a half; with more room the same run goes on."""
    source, disk, out = (tmp_path / name for name in ("source", "disk", "out"))
    for folder in (source, disk, out):
        folder.mkdir()
    network = tiny_project.params.network.model_copy(update={"widths": (16, 24)})
    weights = sum(weight.numel() for weight in build_network(network).parameters())
    script = FULL_DISK.replace("ROOM", str(round(1.5 * 4 * 4 * weights / 1024)))  # optimiser and average too
    train = {"steps": 20, "validate_every": 100}
    Project.make(source, tiny_project, train=train, network={"widths": [16, 24]})
    where = Project(disk, tiny_project.prepared)
    command = (sys.executable, "-m", "synmlops", "train", "--prepared", str(where.prepared), "--gpus", "0")
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no namespaces for users here")
    said = where.run(
        *("unshare", "-rm", "sh", "-c", script, "sh", str(source), *command, "--out", str(out)), OUT=str(out)
    )
    full, _, after = said.partition("left with 2\n")
    errors = [line for line in full.splitlines() if line.startswith("synmlops: ")]
    [(path, _, text)] = [error.partition(".pt: ") for error in errors]
    assert text.startswith("cannot be written (No space left on device): the disk is full; free some space")
    assert "Traceback" not in said
    kept = [int(line[5:13]) for line in after.splitlines() if line.startswith("step_")]
    assert kept == [4]
    assert path.endswith("step_00000008")
    assert after.splitlines()[-1] == "left with 0"
    [(run, status)] = Record(out / "full.db").runs()
    assert status == "FAILED"
    assert "the disk is full" in str(Record(out / "full.db").tag(run, "synmlops.failure"))
    assert Record(out / "after.db").runs() == [(run, "FINISHED")]
    losses = [step for key, step, _ in Record(out / "after.db").points(run) if key == "loss"]
    assert losses == [10, 20]


@pytest.mark.slow
def test_a_server_killed_in_mid_training_costs_no_step_and_no_metric(
    tiny_project: TinyProject, tmp_path: Path
) -> None:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server", free_port())
    record = Record(tmp_path / "server" / "server.db")
    train = {"steps": 300, "validate_every": 100, "checkpoint_every": 10}
    project = Project.make(tmp_path, tiny_project, train=train)
    env = {"MLFLOW_TRACKING_URI": server.url}
    command = (
        sys.executable,
        "-m",
        "synmlops",
        "train",
        "--prepared",
        str(project.prepared),
        "--out",
        "models",
    )
    server.start()
    process = project.start(*command, **env)
    try:
        deadline = time.monotonic() + 100
        while process.poll() is None and not _losses(record) and time.monotonic() < deadline:
            time.sleep(0.02)
        server.kill()
        there = _losses(record)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        curve = pd.read_csv(tmp_path / "models" / "history.csv").dropna(subset="loss")
        losses = list(zip(curve["step"], curve["loss"], strict=True))
        assert there == losses[: len(there)]
        assert 0 < len(there) < len(losses), "killed too late for this test"
        assert "lines were not sent" in said
        server.start()
        project.run(sys.executable, "-m", "synmlops", "sync", **env)
    finally:
        process.kill()
        server.kill()
    assert _losses(record) == losses
    [(_, status)] = record.runs()
    assert status == "FINISHED"


def _losses(record: Record) -> list[tuple[object, ...]]:
    return [
        (step, value) for run, _ in record.runs() for key, step, value in record.points(run) if key == "loss"
    ]


def test_what_training_begins_with_is_a_fact_of_it(tiny_project: TinyProject, tmp_path: Path) -> None:
    """Another file at the same path makes another training; other grey levels are told."""
    path, network = tmp_path / "start.safetensors", tiny_project.params.network
    manifest = tiny_project.manifest
    train = tiny_project.params.train.model_copy(update={"start_from": str(path)})
    params = tiny_project.params.model_copy(update={"train": train})
    facts = []
    for mean in (manifest.mean, 0.0):
        meta = ModelMeta(network=network, channels=CHANNELS, mean=mean, std=manifest.std, voxel_nm=(40, 8, 8))
        save_model(path, build_network(network).state_dict(), meta)
        facts.append(_facts_of(params, manifest))
        told = _unlike_start(str(path), manifest)
        assert ["data.grey: [0, " in line for line in told] == ([True] if mean == 0 else [])
    assert name_differences(*facts).startswith("train.start_from.sha256")
    assert _unlike_start(None, manifest) == []
