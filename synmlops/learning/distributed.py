"""One process or several: who this process is, what it adds up with the others, and how they are started."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from synmlops.learning.launch import is_worker, restarts_so_far
from synmlops.params import SynmlopsError
from synmlops.progress import say

PATIENCE = timedelta(hours=1)
"""How long ranks wait for the first to validate; that one has died is noticed by the launcher, at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together."""

    rank: int
    n_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to MLflow."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor over all ranks."""
        if self.n_ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def from_first(self, value: object) -> object:
        """Give every rank what rank 0 holds."""
        if self.n_ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def count_gpus() -> int:
    """Count the GPUs that torch sees."""
    return torch.cuda.device_count()


def check_gpus(wanted: int | None) -> int:
    """Settle `--gpus`: all there are by default.

    Raises
    ------
    SynmlopsError
        If more are wanted than there are.
    """
    there = count_gpus()
    if wanted is None:
        return there
    if wanted > there:
        raise SynmlopsError(
            f"--gpus {wanted}: this machine has {there} CUDA GPU(s) that torch can see; use --gpus {there}"
            + ("" if there else ", or --processes N for several CPU processes")
        )
    return wanted


def pick_device(gpus: int | None = None) -> torch.device:
    """Give a GPU where there is one and `gpus` is not 0, else the CPU."""
    return torch.device("cuda" if check_gpus(gpus) else "cpu")


@contextmanager
def joined_ranks(gpus: int | None = None) -> Iterator[Ranks]:
    """Join the group that the environment names, or stand alone; leave it at the end."""
    if not is_worker():
        yield Ranks(rank=0, n_ranks=1, device=pick_device(gpus))
        return
    rank, n_ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = check_gpus(gpus) > 0
    if on_gpu and local >= count_gpus():
        raise SynmlopsError(
            f"process {local} wants a GPU of its own, this machine has {count_gpus()}; start fewer, or use "
            "--gpus 0"
        )
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if rank == 0 and (n := restarts_so_far()):
        most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", n)
        say([f"a process died; restart {n} of {most} goes on from the last checkpoint"])
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        # torch shares the store between restarts, and it still holds the addresses of the dead
        store=dist.PrefixStore(f"start_{restarts_so_far()}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=n_ranks,
        timeout=PATIENCE,
    )
    try:
        yield Ranks(rank, n_ranks, device)
    finally:
        if sys.exc_info()[0] is None:
            dist.barrier()
        dist.destroy_process_group()
