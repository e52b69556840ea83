"""What the engines cost, the network replaced by a stand-in that sleeps, so that nothing else is measured.

    python benchmarks/engines.py                  # efficiency with 1, 2 and 4 workers
    python benchmarks/engines.py --blocks 100000  # Dask's scheduler with very many blocks

Efficiency is the time that the stand-ins alone would take on so many workers over the time that passed, from
the first block that ended to the last, so that starting processes does not count. Each block is read (a tenth
of the computing time), computed, and written as a real Zarr shard of 1 MB with its mark.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from distributed import LocalCluster
from numpy.typing import NDArray

from synmlops.blockwise.cluster import run_dask
from synmlops.blockwise.grid import Block, BlockGrid
from synmlops.blockwise.here import run_here
from synmlops.blockwise.job import Job, Place
from synmlops.blockwise.processes import run_processes
from synmlops.volumes.block_output import create_output, open_output
from synmlops.volumes.prepared import Box
from synmlops.volumes.store import Grid

BLOCK = (16, 256, 256)


@dataclass(frozen=True)
class StandIn:
    """Starts workers that take a fixed time; without an output they write nothing."""

    seconds: float
    out: Path | None

    def __call__(self, place: Place) -> "Sleeper":
        """Start one."""
        return Sleeper(self)


@dataclass(frozen=True)
class Sleeper:
    """A worker that sleeps instead of computing."""

    spec: StandIn

    def read(self, block: Block) -> None:
        """Take a tenth of the time."""
        time.sleep(self.spec.seconds / 10)

    def compute(self, block: Block, data: None) -> NDArray[np.uint8] | None:
        """Take the time."""
        time.sleep(self.spec.seconds)
        return None if self.spec.out is None else np.full((1, *BLOCK), block.index % 255 + 1, np.uint8)

    def write(self, block: Block, result: NDArray[np.uint8] | None) -> None:
        """Write a shard."""
        if self.spec.out is not None:
            open_output(self.spec.out).write(block.write, result)  # type: ignore[arg-type]


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, help="Simulate so many blocks that take no time, on Dask.")
    parser.add_argument("--seconds", type=float, default=0.5, help="Computing time of a block.")
    parser.add_argument("--per-worker", type=int, default=40, help="Blocks for each worker.")
    args = parser.parse_args()
    if args.blocks:
        print_scheduler(args.blocks)
    else:
        print_efficiency(args.seconds, args.per_worker)


def print_efficiency(seconds: float, per_worker: int) -> None:
    """Compare engines and numbers of workers."""
    print("| engine | workers | blocks | efficiency |\n|---|---|---|---|")
    print(f"| one process | 1 | {per_worker} | {_efficiency(run_here, 1, seconds, per_worker):.2f} |")
    for n in (1, 2, 4):
        share = _efficiency(
            lambda job, todo, tell, n=n: run_processes(job, todo, n=n, tell=tell), n, seconds, n * per_worker
        )
        print(f"| processes | {n} | {n * per_worker} | {share:.2f} |", flush=True)
    for n in (1, 2, 4):
        with LocalCluster(n_workers=n, threads_per_worker=2, dashboard_address=":0") as cluster:
            address = cluster.scheduler_address
            share = _efficiency(
                lambda job, todo, tell, address=address: run_dask(job, todo, address=address, tell=tell),
                n,
                seconds,
                n * per_worker,
            )
        print(f"| Dask, two threads a worker | {n} | {n * per_worker} | {share:.2f} |", flush=True)


def print_scheduler(n_blocks: int) -> None:
    """Measure what very many blocks cost Dask's scheduler, which runs in this process."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster,
    ):
        job = _job(Path(folder), StandIn(0, None), n_blocks)
        memory = psutil.Process(os.getpid()).memory_info
        before, greatest, ended = memory().rss, 0, 0

        def tell(index: int, reason: str | None) -> None:
            nonlocal greatest, ended
            ended += 1
            if ended % 500 == 0:
                greatest = max(greatest, memory().rss)
            if ended % 10_000 == 0:
                print(f"{ended} blocks, {memory().rss / 2**20:.0f} MiB", flush=True)

        began = time.monotonic()
        run_dask(job, range(n_blocks), address=cluster.scheduler_address, tell=tell)
        took = time.monotonic() - began
    print("| blocks | ms a block | scheduler and client, MiB before | greatest |\n|---|---|---|---|")
    print(f"| {n_blocks} | {took / n_blocks * 1000:.2f} | {before / 2**20:.0f} | {greatest / 2**20:.0f} |")


def _efficiency(run: Callable[..., None], n: int, seconds: float, n_blocks: int) -> float:
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), StandIn(seconds, Path(folder) / "out.zarr"), n_blocks)
        run(job, range(n_blocks), tell=lambda index, reason: ends.append(time.monotonic()))
    assert len(ends) == n_blocks
    return (n_blocks - n) * seconds / n / (ends[-1] - ends[n - 1])


def _job(folder: Path, start: StandIn, n_blocks: int) -> Job:
    shape = (BLOCK[0] * n_blocks, *BLOCK[1:])
    if start.out is not None:
        create_output(
            start.out, shape, channels=["union"], grid=Grid((40, 8, 8)), block_zyx=BLOCK, cell_zyx=BLOCK
        )
    return Job("stand-in", BlockGrid(Box((0, 0, 0), shape), BLOCK), start, folder / "done")


if __name__ == "__main__":
    main()
