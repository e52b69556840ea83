"""The engine of a cluster: Dask workers, each of which makes its own worker of a job once."""

import math
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import Any

from synmlops.blockwise.job import Job, Place, Tell, Worker
from synmlops.blockwise.marks import Marks
from synmlops.params import SynmlopsError

Client = Any  # of distributed, which is imported where it is needed and gives few types
Future = Any

AHEAD = 3
"""Blocks that each thread of a worker has at a time: the scheduler never holds more."""
RETRIES = 2
"""Times that a block is done again after an error of the system, such as a file server that is away."""
CONNECT_S = 10
"""Seconds in which the scheduler must answer."""
LOOK_EVERY_S = 5.0
"""Seconds after which we look whether there are more workers now, or fewer."""
_GONE = "the Dask scheduler went away; start again when it is back, finished blocks are kept"


def run_dask(job: Job, indices: Iterable[int], *, address: str, tell: Tell) -> None:
    """Do blocks on the workers of a Dask scheduler.

    Workers have this package and reach input, output and marks under the same paths. A worker with two
    threads reads and writes while it computes; it computes one block at a time.

    Parameters
    ----------
    job : Job
    indices : iterable of int
    address : str
        Of the scheduler, such as `tcp://node7:8786`.
    tell : callable
        Called as each block ends.

    Raises
    ------
    SynmlopsError
        If the scheduler is not there or goes away, or a block cannot be computed or written.
    """
    with _connected(address) as client:
        token = uuid.uuid4().hex
        try:
            for index, reason in _ended(client, job, token, iter(indices)):
                tell(index, reason)
        finally:
            if client.status == "running":
                client.run(_forget, token)


def _ended(client: Client, job: Job, token: str, waiting: Iterator[int]) -> Iterator[tuple[int, str | None]]:
    """Keep the workers busy; give the blocks as they end, and why they failed, if they did.

    Blocks that end together are asked about and replaced together: a message costs the scheduler more than a
    block does.
    """
    from distributed import as_completed

    running, looked, room = 0, -math.inf, 0
    futures = as_completed(loop=client.loop)
    with _scheduler_there():
        shared = client.scatter(job, broadcast=True, hash=False)
    while True:
        with _scheduler_there():
            if time.monotonic() - looked > LOOK_EVERY_S:
                looked, room = time.monotonic(), max(1, AHEAD * sum(client.nthreads().values()))
            if fresh := list(islice(waiting, max(0, room - running))):
                keys = [(f"{job.name}-{token}", index) for index in fresh]
                futures.update(
                    client.map(_do, fresh, job=shared, token=token, key=keys, pure=False, retries=RETRIES)
                )
                running += len(fresh)
        if not running:
            return
        batch = futures.next_batch()
        running -= len(batch)
        yield from _outcomes(client, batch)


def _outcomes(client: Client, futures: Sequence[Future]) -> Iterator[tuple[int, str | None]]:
    """Give numbers of blocks that ended and why they failed; an error that concerns all blocks is raised."""
    from distributed import KilledWorker

    with _scheduler_there():  # gives None for those that did not finish
        reasons = client.gather({future.key: future for future in futures}, errors="skip")
    for future in futures:
        _, index = future.key
        if future.cancelled():
            raise SynmlopsError(_GONE)
        try:
            yield index, reasons[future.key] if future.status == "finished" else future.result()
        except KilledWorker:
            yield index, "the workers that tried it died; is there enough memory?"


@contextmanager
def _scheduler_there() -> Iterator[None]:
    """Say in one message what the silence of a scheduler raises."""
    from concurrent.futures import CancelledError

    try:
        yield
    except (CancelledError, OSError) as error:
        raise SynmlopsError(_GONE) from error


def _connected(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError as error:
        raise SynmlopsError("a Dask scheduler needs the extra: pip install 'synmlops[cluster]'") from error
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise SynmlopsError(
            f"--scheduler {address}: no Dask scheduler answers there ({error}); start one with "
            "`dask scheduler`"
        ) from error
    if not client.nthreads():
        client.close()
        raise SynmlopsError(
            f"--scheduler {address}: has no workers; start some with `dask worker {address} --nthreads 2`"
        )
    return client


# What runs on the workers

_workers: dict[str, tuple[Worker, Marks]] = {}
_starting, _computing = Lock(), Lock()


def _do(index: int, *, job: Job, token: str) -> str | None:
    """Do a block; why it failed, if it cannot be read."""
    with _starting:
        if token not in _workers:
            _workers[token] = job.start(Place()), Marks(job.marks)
    (worker, marks), block = _workers[token], job.grid[index]
    try:
        data = worker.read(block)
    except SynmlopsError as error:
        return str(error)
    with _computing:
        result = worker.compute(block, data)
    worker.write(block, result)
    marks.add(index)
    return None


def _forget(token: str) -> None:
    if token in _workers:
        _workers.pop(token)[1].close()
