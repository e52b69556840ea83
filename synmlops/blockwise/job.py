"""What is to be done to each block, whoever does it, and what came of it."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from synmlops.blockwise.grid import Block, BlockGrid
from synmlops.blockwise.marks import Marks
from synmlops.params import SynmlopsError

MOST_FAILED_IN_A_ROW = 20
"""Blocks that cannot be read one after the other, after which the input is taken to be gone."""


class Worker(Protocol):
    """Does the work; each process has one of its own, which may hold a model and open files."""

    def read(self, block: Block) -> Any:
        """Read what a block needs; called ahead, in another thread than `compute`.

        Raises
        ------
        SynmlopsError
            If it cannot be read; the block has failed, and the others go on. All other errors end the work.
        """

    def compute(self, block: Block, data: Any) -> Any:
        """Turn what was read into what is written."""

    def write(self, block: Block, result: Any) -> None:
        """Write the block's own region; called in another thread. It is on the disk when this returns."""


@dataclass(frozen=True)
class Place:
    """Which of the processes on its machine a worker is in, counted from 0, and of how many."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Job:
    """Work on the blocks of a grid; it can be sent to other processes and machines.

    Attributes
    ----------
    name : str
        For people.
    grid : BlockGrid
    start : callable
        Makes a worker, in the process that is to work. It can be pickled: a function of a module, or an
        instance of a module's class.
    marks : Path
        Folder of the marks of finished blocks, which all workers reach.
    writers : int
        Blocks that a process writes at a time; more than one where a block is packed and forced to the disk
        more slowly than the next is computed.
    """

    name: str
    grid: BlockGrid
    start: Callable[[Place], Worker]
    marks: Path
    writers: int = 1

    def todo(self, part: tuple[int, int] = (1, 1)) -> "array[int]":
        """Give the numbers of the blocks that are not done, of one of several equal parts.

        Parameters
        ----------
        part : tuple of int
            Which part, counted from 1, and of how many. Part 2 of 3 has the blocks 1, 4, 7 ...

        Returns
        -------
        numbers : array of int
            Ascending; 8 bytes each, since there may be many millions.
        """
        number, of = part
        done = Marks(self.marks).done(len(self.grid))
        left = np.flatnonzero(~done[number - 1 :: of])
        left *= of
        left += number - 1
        numbers = array("q")
        numbers.frombytes(left.data.cast("B"))
        return numbers


Tell = Callable[[int, str | None], None]
"""What engines call, from any thread, as a block ends: its number, and why it failed, if it did."""


@dataclass
class Outcome:
    """What came of blocks; `tell` is what engines call.

    Attributes
    ----------
    done : int
        Blocks that were finished.
    failed : dict
        Number of each block that could not be read, and why.
    """

    done: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    report: Callable[[int], None] = lambda blocks: None  # is called with the blocks that have ended so far
    _in_a_row: int = 0
    _telling: Lock = field(default_factory=Lock, repr=False, compare=False)

    def tell(self, index: int, reason: str | None) -> None:
        """Count a block, from any thread.

        Raises
        ------
        SynmlopsError
            If it is the last of very many in a row that failed.
        """
        with self._telling:
            if reason is None:
                self.done, self._in_a_row = self.done + 1, 0
            else:
                self.failed[index], self._in_a_row = reason, self._in_a_row + 1
            self.report(self.done + len(self.failed))
        if self._in_a_row >= MOST_FAILED_IN_A_ROW:
            raise SynmlopsError(
                f"{self._in_a_row} blocks in a row failed; the last one: {reason}. Start again when that is "
                "mended; finished blocks are kept"
            )
