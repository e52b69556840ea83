"""One process or several: who this process is, what it adds up with the others, and how they are started."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from synmlops.learning.launch import is_worker, restarts_so_far
from synmlops.learning.watch import Watch, open_watch
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
    watch: Watch | None = field(default=None, compare=False)  # where there are several

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

    def highest(self, value: Tensor) -> Tensor:
        """Give the highest value over all ranks, element by element."""
        if self.n_ranks > 1:
            value = value.clone()
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def together(self) -> AbstractContextManager[None]:
        """Let the first error of any rank be the error of all, raised on rank 0."""
        return nullcontext() if self.watch is None else self.watch.together()

    def at_step(self, step: int) -> None:
        """Say how far this rank is, for the note that a crash leaves."""
        if self.watch is not None:
            self.watch.step = step

    def when_ended(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called with the reason if this rank must be ended where no exception reaches it."""
        if self.watch is not None:
            self.watch.at_the_end = tell

    def agree(self, facts: Mapping[str, object]) -> None:
        """Refuse to go on unless all ranks hold the same facts, and run the same code.

        Parameters
        ----------
        facts : mapping
            Name to value: params by their dotted names, digests of data.

        Raises
        ------
        SynmlopsError
            On rank 0, with the names and values that differ.
        """
        if self.watch is None:
            return
        everyone: list[tuple[str, dict[str, object]]] = [("", {})] * self.n_ranks
        mine = {**facts, "code of synmlops": _digest_of_code(), "torch": torch.__version__}
        dist.all_gather_object(everyone, (socket.gethostname(), mine))
        first_host, first = everyone[0]
        for rank, (host, other) in enumerate(everyone):
            if other != first:
                if not self.is_first:
                    self.watch.wait_for_reason(60)  # rank 0 says it
                raise SynmlopsError(
                    f"process {rank} on {host} disagrees with process 0 on {first_host}: "
                    f"{name_differences(other, first)}; give all nodes the same params, data and version"
                )

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
    """Join the group that the environment names, or stand alone; leave it at the end.

    Whatever goes wrong from here on in one process ends all of them within seconds.
    """
    if not is_worker():
        yield Ranks(rank=0, n_ranks=1, device=pick_device(gpus))
        return
    rank, n_ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    prefix = f"start_{restarts_so_far()}"  # torch shares the store between restarts, with what the dead wrote
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    watch = open_watch(rank=rank, n_ranks=n_ranks, prefix=prefix)
    if watch.is_over():
        raise SystemExit(2)
    with watch, watch.together(last=True):
        device = device_of(local, gpus)
        if rank == 0 and (n := restarts_so_far()):
            most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", n)
            say([f"a process died; restart {n} of {most} goes on from the last checkpoint"])
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(prefix, store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=n_ranks,
            timeout=PATIENCE,
        )
        yield Ranks(rank, n_ranks, device, watch)
        dist.barrier()
    dist.destroy_process_group()  # after an error the process ends, and waiting for the others is no use


def name_differences(one: Mapping[str, object], other: Mapping[str, object], *, most: int = 5) -> str:
    """Say which keys differ, with the values of both.

    Examples
    --------
    >>> name_differences({"seed": 1, "a": 2}, {"seed": 3, "a": 2})
    'seed is 1, not 3'
    """
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    parts = [f"{key} is {one.get(key, 'missing')}, not {other.get(key, 'missing')}" for key in keys[:most]]
    return ", ".join(parts) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _digest_of_code() -> str:
    """Name the code of the package, wherever it is installed."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    sources = {
        path.relative_to(root).as_posix(): path for kind in ("*.py", "*.cpp") for path in root.rglob(kind)
    }
    for name, path in sorted(sources.items()):
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def device_of(local: int, gpus: int | None) -> torch.device:
    """Give a worker the device of its own.

    Raises
    ------
    SynmlopsError
        If this machine has no GPU for it.
    """
    if check_gpus(gpus) == 0:
        return torch.device("cpu")
    if local >= count_gpus():
        raise SynmlopsError(
            f"process {local} wants a GPU of its own, this machine has {count_gpus()}; start fewer, or use "
            "--gpus 0"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
