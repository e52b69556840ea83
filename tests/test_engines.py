"""Who does the blocks: each engine does each block once, and what dies is done again."""

import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pytest
from block_tools import SHAPE, a_job, expected
from distributed import LocalCluster

from synmlops.blockwise.cluster import run_dask
from synmlops.blockwise.grid import BlockGrid
from synmlops.blockwise.here import run_here
from synmlops.blockwise.job import MOST_FAILED_IN_A_ROW, Job, Outcome
from synmlops.blockwise.marks import Marks
from synmlops.blockwise.processes import run_processes
from synmlops.params import SynmlopsError
from synmlops.volumes.prepared import Box
from synmlops.volumes.store import open_volume

Run = Callable[..., None]
TOOLS = Path(__file__).with_name("block_tools.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as made:
        made.get_client().run(sys.path.append, str(TOOLS.parent))
        yield made


@pytest.fixture(params=["here", "processes", "dask"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "here":
        return run_here
    if request.param == "processes":
        return partial(run_processes, n=2)
    return partial(run_dask, address=request.getfixturevalue("cluster").scheduler_address)


def written(job: Job) -> np.ndarray:
    with open_volume(job.start.out, ndim=4) as volume:  # type: ignore[attr-defined]
        return volume.read()


def right(job: Job) -> np.ndarray:
    return expected(Box((0, 0, 0), SHAPE))


def started(job: Job) -> int:
    return len(list(job.marks.parent.glob("started_*")))


@pytest.mark.parametrize("suffix", [".h5", ".zarr"])
def test_every_block_is_done_once(run: Run, suffix: str, tmp_path: Path) -> None:
    job, outcome, seen = a_job(tmp_path, suffix=suffix), Outcome(), []
    run(job, job.todo(), tell=lambda index, reason: (seen.append(index), outcome.tell(index, reason)))
    assert sorted(seen) == list(range(len(job.grid)))
    assert (outcome.done, outcome.failed) == (len(job.grid), {})
    np.testing.assert_array_equal(written(job), right(job))
    assert not job.todo()
    assert started(job) <= 2  # a model is loaded once, not for each block


def test_what_is_done_is_not_done_again(run: Run, tmp_path: Path) -> None:
    job = a_job(tmp_path)
    with Marks(job.marks) as marks:
        for index in range(0, len(job.grid), 2):
            marks.add(index)
    todo = job.todo()
    assert list(todo) == list(range(1, len(job.grid), 2))
    run(job, todo, tell=Outcome().tell)
    for block in job.grid:
        part = written(job)[(slice(None), *block.write.slices)]
        assert part.any() == (block.index % 2 == 1)


def test_a_block_that_cannot_be_read_is_named_and_the_others_are_done(run: Run, tmp_path: Path) -> None:
    job, outcome = a_job(tmp_path, unreadable=(0, 7)), Outcome()
    run(job, job.todo(), tell=outcome.tell)
    assert outcome.failed == {0: "chunk 0 is damaged", 7: "chunk 7 is damaged"}
    assert outcome.done == len(job.grid) - 2
    assert list(job.todo()) == [0, 7]


def test_an_input_that_is_gone_ends_the_work(run: Run, tmp_path: Path) -> None:
    job = a_job(tmp_path, unreadable=tuple(range(1000)))
    with pytest.raises(SynmlopsError, match=f"{MOST_FAILED_IN_A_ROW} blocks in a row failed"):
        run(job, job.todo(), tell=Outcome().tell)


def test_a_full_disk_ends_the_work(run: Run, tmp_path: Path) -> None:
    job = a_job(tmp_path, full_at=3)
    with pytest.raises(SynmlopsError, match="the disk is full"):
        run(job, job.todo(), tell=Outcome().tell)
    assert 3 in job.todo()


def test_a_bug_is_raised(run: Run, tmp_path: Path) -> None:
    job = a_job(tmp_path, bug_at=4)
    with pytest.raises((ZeroDivisionError, RuntimeError), match="a bug"):
        run(job, job.todo(), tell=Outcome().tell)


def test_a_process_that_dies_costs_one_block(tmp_path: Path) -> None:
    deadly = tmp_path / "deadly"
    deadly.touch()
    job, outcome = a_job(tmp_path, deadly_once=deadly), Outcome()
    run_processes(job, job.todo(), n=2, tell=outcome.tell)
    assert not deadly.exists()
    assert (outcome.done, outcome.failed) == (len(job.grid), {})
    np.testing.assert_array_equal(written(job), right(job))
    assert started(job) == 3


def test_a_block_that_kills_is_given_up(tmp_path: Path) -> None:
    job, outcome = a_job(tmp_path, deadly=(6,)), Outcome()
    run_processes(job, job.todo(), n=2, tell=outcome.tell)
    assert list(outcome.failed) == [6]
    assert "3 processes died at it (exit code 7)" in outcome.failed[6]
    assert outcome.done == len(job.grid) - 1


def test_processes_that_all_die_end_the_work(tmp_path: Path) -> None:
    job = a_job(tmp_path, deadly=tuple(range(1000)))
    with pytest.raises(SynmlopsError, match=r"5 processes died \(exit code 7\) and none finished a block"):
        run_processes(job, job.todo(), n=1, tell=Outcome().tell)


def test_parts_do_each_block_once(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    parts = [job.todo((number, 4)) for number in (1, 2, 3, 4)]
    assert sorted(index for part in parts for index in part) == list(range(len(job.grid)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        run_here(job, part, tell=Outcome().tell)
    np.testing.assert_array_equal(written(job), right(job))


def test_reading_and_writing_go_on_while_a_block_is_computed(tmp_path: Path) -> None:
    """The second block is read before the first is computed, and written while the third is."""
    job = a_job(tmp_path)
    order: list[tuple[str, int]] = []
    read_two, wrote_one = Event(), Event()

    class Slow:
        def read(self, block):  # type: ignore[no-untyped-def]
            if block.index == 1:
                read_two.set()
            return block

        def compute(self, block, data):  # type: ignore[no-untyped-def]
            assert block.index != 0 or read_two.wait(20)
            assert block.index != 1 or wrote_one.wait(20)
            return block.index

        def write(self, block, result):  # type: ignore[no-untyped-def]
            order.append(("write", result))
            if result == 0:
                wrote_one.set()

    run_here(Job("slow", job.grid, lambda place: Slow(), job.marks), range(4), tell=Outcome().tell)
    assert order == [("write", index) for index in range(4)]


def test_blocks_are_drawn_as_they_are_needed(run: Run, tmp_path: Path) -> None:
    """There may be more of them than memory holds."""
    job, drawn, ended, ahead = a_job(tmp_path), 0, 0, []

    def numbers() -> Iterator[int]:
        nonlocal drawn
        for index in range(len(job.grid)):
            drawn += 1
            yield index

    def tell(index: int, reason: str | None) -> None:
        nonlocal ended
        ahead.append(drawn - ended)
        ended += 1

    run(job, numbers(), tell=tell)
    assert ended == len(job.grid) == 30
    assert max(ahead) <= 12  # three for each of two workers of two threads


def test_marks_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(0).permutation(2000)
    (tmp_path / "a.txt").write_text("".join(f"{index}\n" for index in order[:900]))
    (tmp_path / "b.txt").write_text("".join(f"{index}\n" for index in order[900:1500]) + str(order[1500]))
    monkeypatch.setattr("synmlops.blockwise.marks.PIECE_BYTES", 50)
    assert np.flatnonzero(Marks(tmp_path).done(2000)).tolist() == sorted(order[:1500].tolist())


def test_numbers_of_blocks_take_eight_bytes(tmp_path: Path) -> None:
    """As a list, a hundred million of them would take four gigabytes."""
    n = 300_000
    job = Job("many", BlockGrid(Box((0, 0, 0), (n, 8, 8)), (1, 8, 8)), lambda place: None, tmp_path)
    tracemalloc.start()
    todo = job.todo((2, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(todo), todo[0], todo[-1]) == (n // 2, 1, n - 1)
    assert peak < 2 * n + 3 * 8 * n / 2  # marks, and no more than three arrays of the numbers


def test_a_torn_mark_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"1\n2\n17")
    (tmp_path / "b.txt").write_bytes(b"3\n99\n\0\0\0")
    assert np.flatnonzero(Marks(tmp_path).done(20)).tolist() == [1, 2, 3]
    assert not Marks(tmp_path / "none").done(20).any()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moments_is_never_killed(processes: int, tmp_path: Path) -> None:
    """The command or one of its processes, again and again: all is done, and right."""
    random.seed(processes)
    command = [sys.executable, str(TOOLS), str(tmp_path), str(processes), "0.05"]
    kills = 0
    for _ in range(30):
        process = subprocess.Popen(command)
        until_start = time.monotonic() + 20
        n_before = started(a_job(tmp_path))
        while started(a_job(tmp_path)) == n_before and process.poll() is None:
            assert time.monotonic() < until_start
            time.sleep(0.02)
        time.sleep(0.1 + random.random() * 0.3)
        if process.poll() is not None:
            break
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        if workers:
            random.choice(workers).kill()
            time.sleep(random.random() * 0.1)
        process.kill()
        process.wait()
        kills += 1
        psutil.wait_procs(workers, timeout=20)  # they end once nobody is there to tell
        assert not [child for child in workers if child.is_running()]
    assert process.poll() == 0
    assert kills >= 2
    job = a_job(tmp_path)
    assert not job.todo()
    np.testing.assert_array_equal(written(job), right(job))


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_costs_no_block(tmp_path: Path) -> None:
    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:
        cluster.get_client().run(sys.path.append, str(TOOLS.parent))
        job, outcome = a_job(tmp_path, seconds=0.1), Outcome()
        pids = list(cluster.get_client().run(os.getpid).values())

        def tell(index: int, reason: str | None) -> None:
            outcome.tell(index, reason)
            if outcome.done == 5:
                os.kill(pids[0], signal.SIGKILL)

        import_path = partial(sys.path.append, str(TOOLS.parent))
        cluster.get_client().register_worker_callbacks(import_path)  # of the worker's successor
        run_dask(job, job.todo(), address=cluster.scheduler_address, tell=tell)
    assert (outcome.done, outcome.failed) == (len(job.grid), {})
    np.testing.assert_array_equal(written(job), right(job))


@pytest.mark.slow
def test_a_dask_scheduler_that_goes_away_is_one_message(tmp_path: Path) -> None:
    address, quiet = "tcp://127.0.0.1:18787", {"stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m"]
    scheduler = subprocess.Popen(
        [*dask, "distributed.cli.dask_scheduler", "--host", address, "--no-dashboard"], **quiet
    )
    worker = subprocess.Popen(
        [*dask, "distributed.cli.dask_worker", address, "--nthreads", "2", "--no-dashboard", "--no-nanny"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TOOLS.parent), *sys.path])},
        cwd=tmp_path,
        **quiet,
    )
    job, outcome = a_job(tmp_path, seconds=0.2), Outcome()

    def tell(index: int, reason: str | None) -> None:
        outcome.tell(index, reason)
        if outcome.done == 3:
            scheduler.kill()

    try:
        _until_workers(address)
        with pytest.raises(SynmlopsError, match="scheduler went away; start again"):
            run_dask(job, job.todo(), address=address, tell=tell)
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()
    assert 0 < len(job.todo()) < len(job.grid)
    run_here(job, job.todo(), tell=Outcome().tell)
    np.testing.assert_array_equal(written(job), right(job))


def _until_workers(address: str) -> None:
    from distributed import Client

    with Client(address, timeout=30, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=30)


def test_a_dask_scheduler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synmlops.blockwise.cluster.CONNECT_S", 1)
    job = a_job(tmp_path)
    with pytest.raises(SynmlopsError, match="no Dask scheduler answers there"):
        run_dask(job, job.todo(), address="tcp://127.0.0.1:1", tell=Outcome().tell)
