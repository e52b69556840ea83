"""Training by several processes: started for real, compared with one, killed, and refused."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import TinyProject

from synmlops.learning.distributed import Ranks, check_gpus, count_gpus, device_of, joined_ranks, pick_device
from synmlops.learning.launch import is_worker, leave_if_stopped, tell_launcher
from synmlops.params import SynmlopsError
from synmlops.tracking.metric_log import iter_events

NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}

DIE_ONCE = """
import os
import signal
from pathlib import Path

if "RANK" in os.environ:  # a worker, not its launcher
    from synmlops.learning.feed import Feed

    batch, rank, notes = Feed.batch, os.environ["RANK"], Path(__file__).parent

    def batch_or_die(self, step):
        with (notes / f"seen_{rank}").open("a") as file:
            file.write(f"{step}\\n")
        dies = notes / f"die_{rank}_{step}"
        if dies.exists():
            dies.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)

    Feed.batch = batch_or_die
"""

SLOW = """
import os, time
from pathlib import Path

if "RANK" in os.environ:
    from synmlops.learning.feed import Feed

    batch = Feed.batch

    def slow_batch(self, step):
        (Path(__file__).parent / f"at_{os.environ['RANK']}_{step}").touch()
        time.sleep(0.2)
        return batch(self, step)

    Feed.batch = slow_batch
"""

STUMBLE = """
import os

if os.environ.get("RANK") == "1":
    from synmlops.learning.feed import Feed

    batch = Feed.batch

    def batch_or_stumble(self, step):
        if step == 6:
            raise TypeError("a bug")
        return batch(self, step)

    Feed.batch = batch_or_stumble
"""


@pytest.fixture(scope="module")
def root(tiny_project: TinyProject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a project folder: params.yaml, and below it the MLflow store that all runs of this file share."""
    root = tmp_path_factory.mktemp("project")
    _write_params(root, tiny_project)
    return root


def _write_params(folder: Path, project: TinyProject, **sampling: int) -> None:
    tree = project.params.model_dump(mode="json")
    tree["sampling"] |= sampling
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))


def _start(root: Path, *command: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    threads = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    without = {name: value for name, value in os.environ.items() if name not in ("DVC_STAGE", "DVC_ROOT")}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env=without | NO_GPUS | threads | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(root: Path, *command: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    process = _start(root, *command, env=env)
    try:
        stdout, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _runs(root: Path) -> list[tuple[str, str]]:
    """Give status and reason of failure of all runs of a project."""
    store = root / ".synmlops" / "mlflow.db"
    if not store.exists():
        return []
    with sqlite3.connect(store) as connection:
        return connection.execute(
            "select status, value from runs left join tags on tags.run_uuid = runs.run_uuid "
            "and tags.key = 'synmlops.failure' order by start_time"
        ).fetchall()


def _train(root: Path, project: TinyProject, out: str, *flags: str, **more: object) -> Path:
    command = ("-m", "synmlops", "train", "--prepared", str(project.prepared), "--out", out, *flags)
    done = _run(root, *command, **more)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return root / out


@pytest.fixture(scope="module")
def one(root: Path, tiny_project: TinyProject) -> Path:
    """Train in this way: one process."""
    return _train(root, tiny_project, "one")


@pytest.fixture(scope="module")
def two(root: Path, tiny_project: TinyProject) -> Path:
    """Train in this way: two processes that share each batch."""
    return _train(root, tiny_project, "two", "--processes", "2")


def _assert_close(folder: Path, other: Path) -> None:
    for name in ("model.safetensors", "last.safetensors"):
        torch.testing.assert_close(load_file(folder / name), load_file(other / name), rtol=1e-3, atol=1e-5)
    curves, others = (pd.read_csv(path / "history.csv") for path in (folder, other))
    scores = "validation_f1"  # counts voxels, so it jumps
    pd.testing.assert_series_equal(curves.pop(scores), others.pop(scores), atol=0.01)
    pd.testing.assert_frame_equal(curves, others, rtol=1e-3)


def _assert_equal(folder: Path, other: Path, *, exactly: bool = True) -> None:
    for name in ("model.safetensors", "last.safetensors"):
        weights, others = load_file(folder / name), load_file(other / name)
        assert all(torch.equal(weights[key], others[key]) for key in weights | others)
    curves, others = (pd.read_csv(path / "history.csv") for path in (folder, other))
    pd.testing.assert_frame_equal(curves, others, check_exact=exactly, rtol=0 if exactly else 1e-6)


@pytest.mark.slow
def test_two_processes_are_one(one: Path, two: Path) -> None:
    """The same weights and losses within float32: a masked loss and its gradient know the whole batch."""
    _assert_close(one, two)
    assert (one / "last.safetensors").read_bytes() != (two / "last.safetensors").read_bytes()  # else no test


@pytest.mark.slow
def test_torchrun_is_our_launcher(root: Path, tiny_project: TinyProject, two: Path) -> None:
    done = _run(
        root,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "synmlops", "train", "--prepared", str(tiny_project.prepared), "--out", "by_torchrun"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("models in by_torchrun") == 1  # only the first rank talks
    _assert_equal(root / "by_torchrun", two)


@pytest.mark.slow
def test_killed_and_restarted_is_never_killed(
    root: Path, tiny_project: TinyProject, two: Path, tmp_path: Path
) -> None:
    """One worker is killed at step 6, the first one at step 10: the group goes on from steps 4 and 8."""
    (tmp_path / "sitecustomize.py").write_text(DIE_ONCE)
    for dies in ("die_1_6", "die_0_10"):
        (tmp_path / dies).touch()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ("-m", "synmlops", "train", "--prepared", str(tiny_project.prepared), "--out", "killed")
    done = _run(root, *command, "--processes", "2", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("die_*"))
    assert [f"restart {n} of 3 goes on" in done.stderr for n in (1, 2, 3)] == [True, True, False]
    seen = [int(step) for step in (tmp_path / "seen_0").read_text().split()]
    assert [seen.count(step) for step in (4, 5, 8, 9)] == [1, 2, 1, 2]
    _assert_equal(root / "killed", two)
    assert not list((root / ".synmlops" / "checkpoints").iterdir())
    with sqlite3.connect(root / ".synmlops" / "mlflow.db") as store:
        points = store.execute(
            "select m.step, m.value from metrics m join runs r using (run_uuid) "
            "where m.key = 'loss' and r.start_time = (select max(start_time) from runs) order by m.step"
        ).fetchall()
    losses = pd.read_csv(root / "killed" / "history.csv").dropna(subset="loss")
    assert points == list(zip(losses["step"], losses["loss"], strict=True))  # each step sent once


@pytest.mark.slow
def test_a_bug_is_not_started_again_and_again(tiny_project: TinyProject, tmp_path: Path) -> None:
    """The same exception at the same step, twice: the second restart, which would meet it again, is none."""
    (tmp_path / "sitecustomize.py").write_text(STUMBLE)
    _write_params(tmp_path, tiny_project)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ("-m", "synmlops", "train", "--prepared", str(tiny_project.prepared), "--processes", "2")
    done = _run(tmp_path, *command, env={"PYTHONPATH": path})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "synmlops: a worker ended twice with TypeError: a bug (at step 6); its traceback stands above"
    )
    assert done.stderr.count("going on") + done.stderr.count("goes on from the last checkpoint") == 1
    [(status, reason)] = _runs(tmp_path)
    assert status == "FAILED"
    assert re.fullmatch(r"train: RuntimeError: process 1 on \S+: TypeError: a bug", reason)


@pytest.mark.slow
def test_nodes_that_disagree_stop_with_one_message(
    root: Path, tiny_project: TinyProject, tmp_path: Path
) -> None:
    """Two torchrun launchers, of which the second has other params: said once, by the first process."""
    nodes = [tmp_path / "first", tmp_path / "second"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for node, seed in zip(nodes, (7, 8), strict=True):
        node.mkdir()
        params = tiny_project.params.model_copy(update={"seed": seed}).model_dump(mode="json")
        (node / "params.yaml").write_text(yaml.safe_dump(params))
        torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
        meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
        train = ("-m", "synmlops", "train", "--prepared", str(tiny_project.prepared))
        processes.append(_start(node, *torchrun, *meet, *train))
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode for process in processes)
    messages = [line for text in said for line in text.splitlines() if line.startswith("synmlops: ")]
    assert len(messages) == 1, said
    assert re.search(
        r"process 1 on \S+ disagrees with process 0 on \S+: seed is [78], not [78];", messages[0]
    )
    [log] = tmp_path.glob("*/.synmlops/runs/*/train.jsonl")  # what the store gets, now or by `synmlops sync`
    *_, last = iter_events(log)
    assert (last.kind, last.body["status"]) == ("close", "FAILED")
    assert "disagrees with process 0" in last.body["reason"]


@pytest.mark.slow
def test_an_error_in_the_workers_is_one_message(tiny_project: TinyProject, tmp_path: Path) -> None:
    _write_params(tmp_path, tiny_project, batch_size=3)
    command = ("-m", "synmlops", "train", "--prepared", str(tiny_project.prepared), "--processes", "2")
    done = _run(tmp_path, *command)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "synmlops: sampling.batch_size: 3 cannot be shared by 2 processes; use a multiple of 2"
    ]
    assert done.stdout == ""
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
@pytest.mark.parametrize("start", [(), ("-m", "torch.distributed.run", "--max-restarts", "1")])
def test_gpus_that_are_not_there(root: Path, tiny_project: TinyProject, start: tuple[str, ...]) -> None:
    """Torchrun starts its processes again whatever they ended with; these end at once and say nothing."""
    command = (*start, "-m", "synmlops", "train", "--prepared", str(tiny_project.prepared), "--gpus", "2")
    done = _run(root, *command)
    messages = [line for line in done.stderr.splitlines() if line.startswith("synmlops: ")]
    assert messages == [
        "synmlops: --gpus 2: this machine has 0 CUDA GPU(s) that torch can see; use --gpus 0, "
        "or --processes N for several CPU processes"
    ]
    assert done.returncode != 0
    if not start:
        assert done.returncode == 2
        assert done.stderr.splitlines() == messages


def _end_once(process: subprocess.Popen[str], is_there: Callable[[], bool]) -> str:
    """Send SIGTERM when the time has come, which ends the process quietly; give what it said."""
    try:
        deadline = time.monotonic() + 120
        while not is_there() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in stderr
    return stderr


@pytest.mark.slow
def test_ended_from_outside_without_a_traceback(tiny_project: TinyProject, tmp_path: Path) -> None:
    """A scheduler's SIGTERM ends launcher and workers quietly, and leaves no model behind."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nfrom pathlib import Path\nif 'RANK' in os.environ:\n"
        "    (Path(__file__).parent / ('up_' + os.environ['RANK'])).touch()\n    time.sleep(60)\n"
    )
    _write_params(tmp_path, tiny_project)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    train = ("-m", "synmlops", "train", "--prepared", str(tiny_project.prepared), "--processes", "2")
    process = _start(tmp_path, *train, env={"PYTHONPATH": path})
    _end_once(process, lambda: len(list(tmp_path.glob("up_*"))) == 2)
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_sigterm_saves_the_step_on_all_processes(
    root: Path, tiny_project: TinyProject, two: Path, tmp_path: Path
) -> None:
    """A scheduler takes the machine: the step is finished and saved, and the next start goes on from it."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    train = ("-m", "synmlops", "train", "--prepared", str(tiny_project.prepared), "--processes", "2")
    process = _start(root, *train, "--out", "ended", env={"PYTHONPATH": path})
    stderr = _end_once(process, (tmp_path / "at_0_6").exists)
    [saved] = re.findall(r"asked to end; step (\d+) is saved", stderr)
    assert saved in ("6", "7")
    assert [path.name for path in root.glob(f".synmlops/checkpoints/*/*/step_*{saved}.pt")]
    assert _runs(root)[-1][0] == "KILLED"
    _assert_equal(_train(root, tiny_project, "ended", "--processes", "2"), two, exactly=False)
    assert _runs(root)[-1][0] == "FINISHED"


def test_gpus_are_settled_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synmlops.learning.distributed.count_gpus", lambda: 2)
    assert [check_gpus(wanted) for wanted in (None, 0, 1, 2)] == [2, 0, 1, 2]
    assert pick_device(0) == torch.device("cpu")
    assert pick_device() == torch.device("cuda")
    with pytest.raises(SynmlopsError, match=r"--gpus 3: this machine has 2 CUDA GPU\(s\).*use --gpus 2$"):
        check_gpus(3)


def test_a_process_of_its_own_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined_ranks(gpus=0) as ranks:
        assert ranks == Ranks(0, 1, torch.device("cpu"))
        assert ranks.is_first
        assert ranks.sum(torch.tensor(3)) == 3
        assert ranks.from_first("x") == "x"


@pytest.mark.parametrize(
    ("gpus", "message"), [(2, "--gpus 2: this machine has 1"), (None, "process 1 wants a GPU")]
)
def test_a_worker_without_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, message: str
) -> None:
    monkeypatch.setattr("synmlops.learning.distributed.count_gpus", lambda: 1)
    with pytest.raises(SynmlopsError, match=message):
        device_of(1, gpus)


def test_a_worker_says_why_it_stops_and_the_others_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop = tmp_path / "stop"
    monkeypatch.setenv("SYNMLOPS_STOP_FILE", str(stop))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not is_worker()
    assert not tell_launcher(SynmlopsError("mine"))  # nobody waits: it is printed
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    leave_if_stopped()
    assert tell_launcher(SynmlopsError("no more patches"))
    assert stop.read_text() == "no more patches"
    with pytest.raises(SystemExit) as caught:
        leave_if_stopped()
    assert caught.value.code == 2
    monkeypatch.delenv("SYNMLOPS_STOP_FILE")  # under the user's own torchrun
    assert not tell_launcher(SynmlopsError("mine"))
    leave_if_stopped()


@pytest.mark.gpu
@pytest.mark.skipif(count_gpus() == 0, reason="needs a CUDA device")
def test_gpu_trains_like_the_cpu(root: Path, tiny_project: TinyProject, one: Path) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    on_gpu = _train(
        root, tiny_project, "gpu", "--gpus", "1", env={"CUDA_VISIBLE_DEVICES": visible.split(",")[0]}
    )
    curves, others = (pd.read_csv(path / "history.csv") for path in (on_gpu, one))
    assert curves["loss"].iloc[0] == pytest.approx(others["loss"].iloc[0], rel=0.02)
