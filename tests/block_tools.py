"""Work on blocks that is cheap, and can be slow, fail or die where a test wants it to."""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.blockwise.grid import Block, BlockGrid
from synmlops.blockwise.here import run_here
from synmlops.blockwise.job import Job, Outcome, Place
from synmlops.blockwise.processes import run_processes
from synmlops.params import SynmlopsError
from synmlops.volumes.block_output import create_output, open_output
from synmlops.volumes.prepared import Box
from synmlops.volumes.store import Grid

SHAPE = (8, 24, 40)
BLOCK = (4, 8, 8)


@dataclass(frozen=True)
class Squares:
    """Starts workers that write a function of the voxel's place, so that a block in the wrong place shows."""

    out: Path
    seconds: float = 0.0
    unreadable: tuple[int, ...] = ()
    deadly: tuple[int, ...] = ()  # blocks at which the process dies, always
    deadly_once: Path | None = None  # a file that the first process to compute block 5 takes along
    full_at: int | None = None
    bug_at: int | None = None

    def __call__(self, place: Place) -> "Squarer":
        (self.out.parent / f"started_{place.number}_{os.getpid()}").touch()
        return Squarer(self, place)


@dataclass(frozen=True)
class Squarer:
    spec: Squares
    place: Place
    output: Any = field(default=None)

    def read(self, block: Block) -> Block:
        if block.index in self.spec.unreadable:
            raise SynmlopsError(f"chunk {block.index} is damaged")
        return block

    def compute(self, block: Block, data: Block) -> NDArray[np.uint8]:
        assert data == block
        time.sleep(self.spec.seconds)
        if block.index in self.spec.deadly:
            os._exit(7)
        if block.index == 5 and self.spec.deadly_once is not None and self.spec.deadly_once.exists():
            self.spec.deadly_once.unlink()
            os._exit(7)
        if block.index == self.spec.bug_at:
            raise ZeroDivisionError("a bug")
        return expected(block.write)

    def write(self, block: Block, result: NDArray[np.uint8]) -> None:
        if block.index == self.spec.full_at:
            raise SynmlopsError("the disk is full")
        open_output(self.spec.out).write(block.write, result)


def expected(box: Box) -> NDArray[np.uint8]:
    """What belongs into a box: (1, z, y, x)."""
    z, y, x = np.ogrid[box.slices]
    return (np.asarray(z * 7919 + y * 131 + x * 17 + 1) % 251 + 1).astype(np.uint8)[None]


def a_job(folder: Path, *, suffix: str = ".h5", **spec: Any) -> Job:
    """Give a job whose output is made."""
    out = folder / f"out{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    create_output(out, SHAPE, channels=["union"], grid=Grid((40, 8, 8)), block_zyx=BLOCK, cell_zyx=BLOCK)
    return Job("squares", BlockGrid(Box((0, 0, 0), SHAPE), BLOCK), Squares(out, **spec), folder / "done")


def main() -> None:
    """Run what is left of a job, for tests that kill this process: FOLDER PROCESSES SECONDS."""
    folder, n, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    job, outcome = a_job(folder, seconds=seconds), Outcome()
    if n == 1:
        run_here(job, job.todo(), tell=outcome.tell)
    else:
        run_processes(job, job.todo(), n=n, tell=outcome.tell)
    assert not outcome.failed


if __name__ == "__main__":
    main()
