"""The engine of one machine: a process for each GPU, or several on the CPU, which may die."""

import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Lock

from synmlops.blockwise.here import work
from synmlops.blockwise.job import Job, Place, Tell
from synmlops.params import SynmlopsError

AHEAD = 3
"""Blocks that a process has at a time: one to read, one to compute, one to write."""
MOST_DEATHS = 3
"""Deaths of processes that did it, after which a block is given up."""
MOST_BARREN = 5
"""Processes that die one after the other without finishing a block, after which nothing is tried any more."""


@dataclass
class _Member:
    """A process and the blocks that it has."""

    place: Place
    process: BaseProcess
    connection: Connection
    blocks: list[int] = field(default_factory=list)
    barren: int = 1  # processes at this place, it included, since one finished a block


def run_processes(job: Job, indices: Iterable[int], *, n: int, tell: Tell) -> None:
    """Do blocks in several processes of this machine.

    A process that dies is replaced, and what it had is done again, one block at a time. A block at which
    processes keep dying has failed.

    Parameters
    ----------
    job : Job
    indices : iterable of int
    n : int
        Processes.
    tell : callable
        Called as each block ends.

    Raises
    ------
    SynmlopsError
        If a block cannot be computed or written, or processes die before they have done anything.
    """
    rest, todo, deaths = iter(indices), deque[int](), Counter[int]()
    _fill(todo, rest, AHEAD * n)
    team = [_start(job, Place(i, n)) for i in range(min(n, len(todo)))]
    try:
        while _fill(todo, rest, AHEAD * n) or any(member.blocks for member in team):
            for member in team:
                _hand_out(member, todo, deaths)
            ready = wait([one for member in team for one in (member.connection, member.process.sentinel)])
            for i, member in enumerate(team):
                heard = member.connection in ready or member.process.sentinel in ready
                if heard and not _listen(member, tell):
                    _take_back(member, todo, deaths, tell)
                    team[i] = _start(job, member.place, barren=member.barren + 1)
        for member in team:
            member.connection.send(None)
        for member in team:
            member.process.join()
    finally:
        for member in team:
            member.connection.close()
            member.process.terminate()
            member.process.join()


def _start(job: Job, place: Place, *, barren: int = 1) -> _Member:
    context = get_context("spawn")  # threads and GPUs do not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_live, args=(job, place, theirs), daemon=True, name=f"blocks_{place.number}"
    )
    process.start()
    theirs.close()
    return _Member(place, process, ours, barren=barren)


def _fill(todo: deque[int], rest: Iterator[int], n: int) -> bool:
    """Have so many blocks at hand, if there are; there may be far too many to hold them all."""
    todo.extend(islice(rest, max(0, n - len(todo))))
    return bool(todo)


def _hand_out(member: _Member, todo: deque[int], deaths: Counter[int]) -> None:
    """Give a process more to do; what processes have died of goes alone, to find out which block it is."""
    while todo:
        suspect = any(deaths[index] for index in (todo[0], *member.blocks))
        if len(member.blocks) >= (1 if suspect else AHEAD):
            return
        try:
            member.connection.send(todo[0])
        except OSError:  # it has died; its sentinel will say so
            return
        member.blocks.append(todo.popleft())


def _listen(member: _Member, tell: Tell) -> bool:
    """Hear what a process has to say, and whether it lives."""
    try:
        while member.connection.poll():
            message = member.connection.recv()
            if isinstance(message, Exception):
                raise message
            index, reason = message
            member.blocks.remove(index)
            member.barren = 0
            tell(index, reason)
    except (EOFError, ConnectionError):
        member.process.join()
    return member.process.is_alive()


def _take_back(member: _Member, todo: deque[int], deaths: Counter[int], tell: Tell) -> None:
    """Have others do what a dead process had."""
    code = member.process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    advice = f"is there enough memory for {member.place.of} process(es)?"
    member.connection.close()
    if member.barren >= MOST_BARREN:
        raise SynmlopsError(f"{member.barren} processes died ({how}) and none finished a block; {advice}")
    for index in reversed(member.blocks):
        deaths[index] += 1
        if deaths[index] < MOST_DEATHS:
            todo.appendleft(index)
        else:
            tell(index, f"{MOST_DEATHS} processes died at it ({how}); {advice}")


def _live(job: Job, place: Place, connection: Connection) -> None:
    """Be one of the processes, until told that there is no more to do or nobody is there to tell."""

    def numbers() -> Iterator[int]:
        try:
            while (index := connection.recv()) is not None:
                yield index
        except EOFError:
            return

    def tell(index: int, reason: str | None) -> None:
        with one_at_a_time:  # reader and writer are different threads
            connection.send((index, reason))

    one_at_a_time = Lock()
    try:
        work(job, numbers(), worker=job.start(place), tell=tell)
    except BrokenPipeError:
        return  # who started us is gone
    except SynmlopsError as error:
        connection.send(error)
    except Exception:  # noqa: BLE001 - told where it is raised again
        connection.send(RuntimeError(f"in process {place.number}:\n{traceback.format_exc()}"))
