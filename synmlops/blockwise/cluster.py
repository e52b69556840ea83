"""The engine of a cluster: Dask workers, each of which makes its own worker of a job once."""

import time
import uuid
from collections.abc import Iterable, Iterator
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
        token, waiting = uuid.uuid4().hex, iter(indices)
        try:
            for index, future in _completed(client, job, token, waiting):
                tell(index, _outcome_of(future))
        finally:
            if client.status == "running":
                client.run(_forget, token)


def _completed(client: Client, job: Job, token: str, waiting: Iterator[int]) -> Iterator[tuple[int, Future]]:
    """Keep the workers busy and give the blocks as they end."""
    from distributed import as_completed

    running: dict[str, int] = {}  # block by the key of its future
    futures, looked, room = as_completed(loop=client.loop), -LOOK_EVERY_S, 0
    shared = client.scatter(job, broadcast=True, hash=False)

    def submit(n: int) -> None:
        for index in islice(waiting, max(0, n)):
            future = client.submit(_do, shared, token, index, pure=False, retries=RETRIES)
            running[future.key] = index
            futures.add(future)

    submit(1)
    for future in futures:
        if time.monotonic() - looked > LOOK_EVERY_S:
            looked, room = time.monotonic(), AHEAD * sum(client.nthreads().values())
        index = running.pop(future.key)
        submit(max(1, room) - len(running))
        yield index, future


def _outcome_of(future: Future) -> str | None:
    """Give why a block failed, or None; an error that concerns all blocks is raised."""
    from concurrent.futures import CancelledError

    from distributed import KilledWorker

    try:
        reason: str | None = future.result()
    except KilledWorker:
        return "the workers that tried it died; is there enough memory?"
    except CancelledError as error:
        raise SynmlopsError(
            "the Dask scheduler went away; start again when it is back, finished blocks are kept"
        ) from error
    return reason


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


def _do(job: Job, token: str, index: int) -> str | None:
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
