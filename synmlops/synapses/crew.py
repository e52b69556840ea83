"""Functions of blocks run one after another in this process, or on several at once, results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

from synmlops.params import SynmlopsError
from synmlops.synapses.blocks import Source

Opener = Callable[[], Source]
_Result = TypeVar("_Result")

AHEAD = 3
"""Blocks handed out for each worker before the first one is back."""


@dataclass(frozen=True)
class Sources:
    """What is read, open in this process."""

    probabilities: Source
    neurons: Source | None


class Crew:
    """Who decodes the blocks; made by `crew`."""

    def __init__(self, sources: Sources, pool: ProcessPoolExecutor | None, workers: int) -> None:
        self.sources, self._pool, self._ahead = sources, pool, AHEAD * workers

    def map(
        self, function: Callable[..., _Result], items: Iterable[tuple[Any, ...]], *common: Any
    ) -> Iterator[_Result]:
        """Call `function(sources, *common, *item)` for each item; results come in the order of the items.

        No more than a few items are under way at a time, so that their results do not pile up.

        Raises
        ------
        SynmlopsError
            If a worker process dies.
        """
        if self._pool is None:
            for item in items:
                yield function(self.sources, *common, *item)
            return
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(_call, function, *common, *item))
                if len(waiting) >= self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise SynmlopsError(
                "a worker process was killed, most likely for lack of memory; use smaller blocks or fewer "
                "processes"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def crew(probabilities: Source | Opener, neurons: Source | Opener | None, workers: int) -> Iterator[Crew]:
    """Open the sources in as many processes as asked for; 1 is this one alone."""
    openers = _opener(probabilities), None if neurons is None else _opener(neurons)
    with ExitStack() as stack:
        pool = None
        if workers > 1:
            # spawned, since the threads of some readers do not survive a fork
            pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_open, initargs=openers)
            stack.callback(pool.shutdown, cancel_futures=True)
        yield Crew(_opened(*openers), pool, workers)


def _opener(source: Source | Opener) -> Opener:
    return source if callable(source) else partial(_itself, source)


def _itself(source: Source) -> Source:
    return source


def _opened(probabilities: Opener, neurons: Opener | None) -> Sources:
    return Sources(probabilities(), None if neurons is None else neurons())


_open_here: list[Sources] = []  # of a worker process: one, opened once


def _open(probabilities: Opener, neurons: Opener | None) -> None:
    _open_here[:] = [_opened(probabilities, neurons)]


def _call(function: Callable[..., _Result], *arguments: Any) -> _Result:
    return function(_open_here[0], *arguments)
