"""Progress with rate and time left: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 15.0
"""Seconds between two lines where the output is no terminal."""

Report = Callable[[int, str], None]
"""What `track` gives: call it with the work done so far and a word on it, which may be empty."""


@contextmanager
def track(description: str, total: int, *, shown: bool = True) -> Iterator[Report]:
    """Show how far a piece of work is, on standard error.

    Parameters
    ----------
    description : str
        What is being done.
    total : int
        Units of work in all.
    shown : bool
        False on ranks that must be quiet.

    Yields
    ------
    report : callable
        `report(done, note)`.
    """
    console = Console(stderr=True)
    if not shown:
        yield lambda done, note: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
    else:
        lines = _Lines(description, total)
        yield lines.report


def say(notes: Iterable[str]) -> None:
    """Print what the user should know, though nothing failed, on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


class _Lines:
    """Progress as lines of text: at most one every `LINE_EVERY_S`, and one at the end."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total = description, total
        self._began = self._printed = time.monotonic()

    def report(self, done: int, note: str) -> None:
        now = time.monotonic()
        if now - self._printed < LINE_EVERY_S and not (
            done >= self._total and now - self._began > LINE_EVERY_S
        ):
            return
        self._printed = now
        elapsed = now - self._began
        left = elapsed / max(done, 1) * max(self._total - done, 0)
        line = f"{self._description}: {done}/{self._total}, {_clock(elapsed)} gone, {_clock(left)} left"
        print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Give seconds as minutes and seconds.

    Examples
    --------
    >>> _clock(75.2)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
