"""Two CPU processes against one, what communication costs, and what to expect of 8 and 64 GPUs.

    python benchmarks/scaling.py

Runs itself under torch's launcher in two processes of one thread each. In turns, so that a busy machine hits
all alike: one process takes the whole batch while the other waits; both share it under DDP; both share it
without exchanging anything; gradients alone are summed. Data are random, in the shapes of params.yaml; the
step is the trainer's own.

The expected scaling is arithmetic, not measured: a ring all-reduce moves 2 (N - 1) / N gradient bytes over
the slowest link, and DDP hides it behind backward except for the last bucket.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from synmlops.learning.checkpoint import ModelMeta
from synmlops.learning.distributed import Ranks
from synmlops.learning.feed import Batch
from synmlops.learning.trainer import Recipe, Trainer
from synmlops.params import CHANNELS, Params, load_params
from synmlops.volumes.prepared import BACKGROUND, PRE

TURNS = 5
STEPS = 6  # of each kind in a turn
FOREGROUND = 0.01  # share of the voxels

LINKS = {  # bytes per second and direction of one GPU, as the makers give them; what an all-reduce gets of it
    "8 GPUs, one node (NVLink 4, 450 GB/s)": (8, 450e9 * 0.8),
    "64 GPUs, 8 nodes (InfiniBand NDR, 50 GB/s a GPU)": (64, 50e9 * 0.8),
    "64 GPUs, 8 nodes (100 Gbit Ethernet for a node)": (64, 12.5e9 / 8 * 0.8),
}
LATENCY_S = 20e-6  # of one hop of a ring, NCCL over a network
BUCKET_BYTES = 25 * 2**20  # of DDP; what is left over after backward is one bucket at most


class Step:
    """The training loop's own step, over and over on one batch of noise with rare foreground."""

    def __init__(self, params: Params, *, ranks: Ranks, share: int) -> None:
        shape = (share, *params.sampling.patch_zyx)
        sampling = params.sampling.model_copy(update={"batch_size": share * ranks.n_ranks})
        meta = ModelMeta(
            network=params.network, channels=CHANNELS, mean=0.0, std=1.0, voxel_nm=(40.0, 8.0, 8.0)
        )
        self._trainer = Trainer(replace(Recipe.of(params), sampling=sampling), meta=meta, ranks=ranks)
        self._batch = Batch(
            image=torch.randn(shape),
            sides=torch.where(torch.rand(shape) < FOREGROUND, PRE, BACKGROUND).to(torch.uint8),
            known=torch.ones((share, len(CHANNELS)), dtype=torch.bool),
            draws=(),
        )

    def take(self) -> None:
        """Descend once."""
        self._trainer.progress.step += 1
        self._trainer.descend(self._batch)

    @property
    def n_parameters(self) -> int:
        """Of the network."""
        return sum(weight.numel() for weight in self._trainer.network.parameters())


def _timed(run: Callable[[], None], n: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    for _ in range(n):
        run()
    dist.barrier()
    return (time.perf_counter() - began) / n


def work(params: Params) -> None:
    """Measure on this rank, in step with the other; rank 0 prints."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, n_ranks, batch = dist.get_rank(), dist.get_world_size(), params.sampling.batch_size
    cpu, share = torch.device("cpu"), batch // n_ranks
    alone = Ranks(0, 1, cpu)
    whole = Step(params, ranks=alone, share=batch)
    apart = Step(params, ranks=alone, share=share)
    together = Step(params, ranks=Ranks(rank, n_ranks, cpu), share=share)
    gradient = torch.zeros(together.n_parameters)
    kinds: dict[str, Callable[[], None]] = {
        "one": whole.take if rank == 0 else lambda: None,
        "two": together.take,
        "two, nothing exchanged": apart.take,
        "gradients alone": lambda: dist.all_reduce(gradient),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(TURNS + 1):
        for kind, run in kinds.items():
            seconds = _timed(run, STEPS)
            if turn:  # the first warms up
                times[kind].append(seconds)
    if rank == 0:
        _report(params, times, together.n_parameters)
    dist.destroy_process_group()


def _report(params: Params, times: dict[str, list[float]], n_parameters: int) -> None:
    middle = {kind: statistics.median(values) for kind, values in times.items()}
    speed_up = statistics.median(a / b for a, b in zip(times["one"], times["two"], strict=True))
    exchange = statistics.median(
        1 - b / a for a, b in zip(times["two"], times["two, nothing exchanged"], strict=True)
    )
    megabytes = n_parameters * 4 / 1e6
    print(f"{params.network.name}, {n_parameters / 1e6:.2f} M parameters, {megabytes:.1f} MB of gradients")
    print(f"batch {params.sampling.batch_size} of {params.sampling.patch_zyx}, medians of {TURNS} turns\n")
    for kind, seconds in middle.items():
        least, most = 1e3 * min(times[kind]), 1e3 * max(times[kind])
        print(f"{kind:26} {1e3 * seconds:8.1f} ms   ({least:.1f} to {most:.1f})")
    print(f"\nspeed-up of two processes  {speed_up:.2f}")
    print(f"share of communication     {exchange:.1%} of a step of two\n")
    _expect(n_parameters * 4)


def _expect(gradient_bytes: float) -> None:
    """Print the efficiency that arithmetic promises where each GPU keeps its share of patches."""
    steps_ms = (20, 50, 200)
    print(
        "expected share of linear speed-up, if a GPU's step without exchange takes "
        + " / ".join(f"{s} ms" for s in steps_ms)
    )
    for name, (n, bandwidth) in LINKS.items():
        whole = 2 * (n - 1) / n * gradient_bytes / bandwidth + 2 * (n - 1) * LATENCY_S
        last = min(gradient_bytes, BUCKET_BYTES) / gradient_bytes * whole
        shares = [ms / (ms + 1e3 * max(last, whole - 1e-3 * ms * 2 / 3)) for ms in steps_ms]
        print(
            f"{name:52} all-reduce {1e3 * whole:6.2f} ms:  " + " / ".join(f"{share:.1%}" for share in shares)
        )


def main() -> None:
    """Start two processes of this script, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(load_params(options.params))
        return
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={options.processes}",
    ]
    subprocess.run(
        [*command, __file__, "--params", str(options.params)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )


if __name__ == "__main__":
    main()
