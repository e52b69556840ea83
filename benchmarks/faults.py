"""Kill -9 at random moments of `synmlops infer`: what comes out, against a run that nothing disturbed.

    python benchmarks/faults.py --rounds 20

In turns the victim is the whole command, one of its worker processes, a Dask worker, and the Dask scheduler
(which is then started anew, as a cluster's would be). After the kill the same command runs again until it
ends well. Then every file of the output must hold the same bytes as that of the undisturbed run; the script
ends with exit code 1 if one does not. The network is the default one with random weights.
"""

import argparse
import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from distributed import Client

from synmlops.blockwise.marks import Marks
from synmlops.learning.checkpoint import ModelMeta, save_model
from synmlops.learning.networks.registry import build_network
from synmlops.params import CHANNELS, NetworkParams
from synmlops.volumes.store import Grid, write_hdf5

SHAPE, BLOCK = (32, 512, 512), "16,128,128"
VICTIMS = ("command", "worker process", "Dask worker", "Dask scheduler")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
START_S = 400.0  # time that a command has to finish its first block
MOST_STARTS = 10


@dataclass(frozen=True)
class Round:
    """What came of one kill."""

    kept: int  # blocks that were done when it fell
    starts: int  # of the command, the killed one included
    seconds: float
    same: bool


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        subprocess.run(infer(folder, "undisturbed", "--processes", "2"), check=True, **QUIET)
        wanted = digests(folder / "undisturbed")
        per_axis = [-(-n // int(b)) for n, b in zip(SHAPE, BLOCK.split(","), strict=True)]
        print(f"{len(wanted)} files, {math.prod(per_axis)} blocks\n")
        print("| killed | blocks done then | starts | s | same bytes |\n|---|---|---|---|---|")
        differing = 0
        for number in range(args.rounds):
            victim = VICTIMS[number % len(VICTIMS)]
            found = one_round(folder, victim, number, wanted)
            differing += not found.same
            same = "yes" if found.same else "NO"
            row = victim, found.kept, found.starts, round(found.seconds), same
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    raise SystemExit(1 if differing else 0)


def one_round(folder: Path, victim: str, number: int, wanted: dict[str, str]) -> Round:
    """Disturb one run, and run the command again until it is through."""
    out, began = f"out{number}", time.monotonic()
    with ExitStack() as stack:
        cluster = stack.enter_context(dask(folder)) if victim.startswith("Dask") else None
        how = ("--processes", "2") if cluster is None else ("--scheduler", cluster.address)
        command = infer(folder, out, *how)
        process = subprocess.Popen(command, start_new_session=True, **QUIET)
        kept = wait_until_some_are_done(folder / out, process)
        kill(victim, process, cluster)
        starts = 1
        while process.wait() != 0:
            starts += 1
            if starts > MOST_STARTS:
                raise SystemExit(f"{victim}: the command does not get through")
            if cluster is not None:
                cluster.mend()
            process = subprocess.Popen(command, start_new_session=True, **QUIET)
    same = digests(folder / out) == wanted
    return Round(kept, starts, time.monotonic() - began, same)


def wait_until_some_are_done(out: Path, process: "subprocess.Popen[bytes]") -> int:
    """Wait for a random number of blocks and a moment more; give how many are done."""
    wanted, marks = random.randint(1, 20), Marks(out / ".em.zarr.blocks" / "done")
    until = time.monotonic() + START_S
    while (done := int(marks.done(1000).sum())) < wanted and process.poll() is None:
        if not done and time.monotonic() > until:
            raise SystemExit("no block was done in time; is the machine overloaded?")
        time.sleep(0.01)
    time.sleep(random.random() * 0.3)
    return int(marks.done(1000).sum())


def kill(victim: str, process: "subprocess.Popen[bytes]", cluster: "Cluster | None") -> None:
    """Kill -9, unless all is over already."""
    if process.poll() is not None:
        return
    if victim == "command":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "worker process":
        children = psutil.Process(process.pid).children()
        workers = [one for one in children if "spawn_main" in " ".join(one.cmdline())]
        random.choice(workers).kill()
    elif cluster is not None:
        (cluster.scheduler if victim == "Dask scheduler" else random.choice(cluster.workers)).kill()


class Cluster:
    """A scheduler and two workers, as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.address = f"tcp://127.0.0.1:{random.randint(20000, 40000)}"
        self._folder = folder
        self.scheduler = self._dask("scheduler", "--host", self.address)
        self.workers = [self._worker(), self._worker()]
        self._wait()

    def mend(self) -> None:
        """Start anew whatever has died."""
        if self.scheduler.poll() is not None:
            self.scheduler = self._dask("scheduler", "--host", self.address)
            for worker in self.workers:  # they notice late that theirs is gone
                worker.kill()
                worker.wait()
        self.workers = [one if one.poll() is None else self._worker() for one in self.workers]
        self._wait()

    def end(self) -> None:
        """Kill all that is left."""
        for process in (self.scheduler, *self.workers):
            process.kill()
            process.wait()

    def _wait(self) -> None:
        with Client(self.address, timeout=START_S, set_as_default=False) as client:
            client.wait_for_workers(len(self.workers), timeout=START_S)

    def _worker(self) -> "subprocess.Popen[bytes]":
        return self._dask("worker", self.address, "--nthreads", "2", "--no-nanny")

    def _dask(self, what: str, *options: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *options, "--no-dashboard"]
        # one thread, as a nanny would set it: on a busy machine more of them only spin
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=self._folder, env=environment, **QUIET)


@contextmanager
def dask(folder: Path) -> Iterator[Cluster]:
    """Have a cluster while the block lasts."""
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.end()


def infer(folder: Path, out: str, *options: str) -> list[str]:
    """Give the command."""
    files = {"--image": "em.h5", "--model": "model.safetensors", "--params": "params.yaml", "--out": out}
    paths = [part for option, name in files.items() for part in (option, str(folder / name))]
    return [sys.executable, "-m", "synmlops", "infer", *paths, "--format", "zarr", "--block", BLOCK, *options]


def digests(folder: Path) -> dict[str, str]:
    """Give the digest of each file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepare(folder: Path) -> None:
    """Write image, model and params."""
    image = np.random.default_rng(0).integers(60, 200, SHAPE, np.uint8)
    write_hdf5(folder / "em.h5", {"main": image}, grid=Grid((40.0, 8.0, 8.0)))
    torch.manual_seed(0)
    params = NetworkParams()
    meta = ModelMeta(network=params, channels=CHANNELS, mean=128.0, std=40.0, voxel_nm=(40.0, 8.0, 8.0))
    save_model(folder / "model.safetensors", build_network(params).state_dict(), meta)
    tree = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    tree["infer"] |= {"window_zyx": [8, 64, 64], "overlap": 0.25}
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))


if __name__ == "__main__":
    main()
