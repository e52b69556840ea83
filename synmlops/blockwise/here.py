"""The engine of one process: the next block is read while one is computed and the last ones are written."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from synmlops.blockwise.grid import Block
from synmlops.blockwise.job import Job, Place, Tell, Worker
from synmlops.blockwise.marks import Marks
from synmlops.params import SynmlopsError


def run_here(job: Job, indices: Iterable[int], *, tell: Tell) -> None:
    """Do blocks in this process.

    Parameters
    ----------
    job : Job
    indices : iterable of int
        Blocks to do, in this order. It may wait for more to come: nothing else waits for it.
    tell : callable
        Called as each block ends, from other threads.

    Raises
    ------
    SynmlopsError
        If a block cannot be computed or written. One that cannot be read is told of, and the others go on.
    """
    work(job, indices, worker=job.start(Place()), tell=tell)


def work(job: Job, indices: Iterable[int], *, worker: Worker, tell: Tell) -> None:
    """Do blocks with a worker; see `run_here`."""
    numbers = iter(indices)

    def read_next() -> tuple[Block, Any] | None:
        for index in numbers:
            block = job.grid[index]
            try:
                return block, worker.read(block)
            except SynmlopsError as error:
                tell(index, str(error))
        return None

    def finish(block: Block, result: Any) -> None:
        worker.write(block, result)
        marks.add(block.index)
        tell(block.index, None)

    reader, writer = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(job.writers, "write")
    with Marks(job.marks) as marks:
        try:
            behind: deque[Future[None]] = deque()
            ahead = reader.submit(read_next)
            while (item := ahead.result()) is not None:
                ahead = reader.submit(read_next)
                result = worker.compute(*item)
                if len(behind) == job.writers:  # no result waits for a writer but the last
                    behind.popleft().result()
                behind.append(writer.submit(finish, item[0], result))
                del item, result
            for last in behind:
                last.result()
        finally:  # not to wait for a reader that waits for more to do
            writer.shutdown(cancel_futures=True)
            reader.shutdown(wait=False, cancel_futures=True)
