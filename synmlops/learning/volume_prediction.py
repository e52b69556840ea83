"""A volume of any size through a network, by block: begun, ended, gone on with, and whole at last."""

import math
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synmlops.blockwise.folder import JobFolder
from synmlops.blockwise.grid import BlockGrid
from synmlops.blockwise.here import run_here
from synmlops.blockwise.job import Job, Outcome
from synmlops.blockwise.processes import run_processes
from synmlops.learning.allocator import share_one_heap
from synmlops.learning.block_prediction import (
    BLENDED_BLOCK_VOXELS,
    BLOCK_VOXELS,
    PredictBlocks,
    Source,
    block_shape,
    measure_grey,
)
from synmlops.learning.checkpoint import load_outline
from synmlops.learning.distributed import check_gpus, count_gpus
from synmlops.learning.predict import Predictor
from synmlops.params import IncompleteError, InferParams
from synmlops.progress import track
from synmlops.volumes.block_output import create_output
from synmlops.volumes.files import sha256_of
from synmlops.volumes.prepared import Box
from synmlops.volumes.store import Volume, open_volume

GPU_WRITERS = 2
"""Blocks that the process of a GPU writes at a time, which computes them faster than one thread writes."""
MOST_NAMED = 5
"""Blocks that failed and are named in the error."""


@dataclass(frozen=True)
class Engine:
    """Who computes the blocks of a volume.

    Attributes
    ----------
    gpus : int or None
        Of this machine, a process for each; 0 for the CPU; by default all there are.
    processes : int
        On the CPU.
    scheduler : str or None
        Address of a Dask scheduler, whose workers compute instead of this machine.
    part : tuple of int
        The share of this call, counted from 1, and of how many: for job arrays.
    block_zyx : tuple of int or None
        Least size of a block in voxels; it grows to whole cells of windows.
    """

    gpus: int | None = None
    processes: int = 1
    scheduler: str | None = None
    part: tuple[int, int] = (1, 1)
    block_zyx: tuple[int, int, int] | None = None

    @property
    def shared(self) -> bool:
        """Whether several machines may write one output."""
        return self.scheduler is not None or self.part != (1, 1)

    def block_of(
        self, cell_zyx: tuple[int, int, int], region: Box, *, voxels: int = BLOCK_VOXELS
    ) -> tuple[int, int, int]:
        """Choose the blocks of a region: whole cells."""
        if self.block_zyx is None:
            return block_shape(cell_zyx, region, voxels=voxels)
        z, y, x = (
            math.ceil(min(least, n) / cell) * cell
            for least, n, cell in zip(self.block_zyx, region.shape_zyx, cell_zyx, strict=True)
        )
        return z, y, x

    def run(self, job: Job, todo: Sequence[int], outcome: Outcome) -> None:
        """Do blocks of a job."""
        if self.scheduler is not None:
            from synmlops.blockwise.cluster import run_dask

            run_dask(job, todo, address=self.scheduler, tell=outcome.tell)
            return
        n = min(check_gpus(self.gpus) or self.processes, len(todo))
        if n > 1:
            run_processes(job, todo, n=n, tell=outcome.tell)
        elif todo:
            run_here(job, todo, tell=outcome.tell)


@dataclass(frozen=True)
class Advance:
    """How far a call is with what it has to do of a volume.

    Attributes
    ----------
    blocks, of : int
        Those that have ended, of those that were left to do.
    megavoxels : float
        In them.
    seconds : float
        Since the first was begun.
    """

    blocks: int
    of: int
    megavoxels: float
    seconds: float

    @property
    def rate(self) -> float:
        """Megavoxels per second."""
        return self.megavoxels / max(self.seconds, 1e-9)


def predict_volume(
    source: Source,
    models: Sequence[Path],
    out: Path,
    *,
    params: InferParams,
    engine: Engine,
    told: Callable[[Advance], None] = lambda advance: None,
) -> bool:
    """Predict a volume by block, going on where an earlier call was ended.

    Parameters
    ----------
    source : Source
    models : sequence of Path
        Files of train, of one voxel size; their probabilities are merged.
    out : Path
        `.h5` or `.zarr`. It appears when all blocks are done; until then a hidden folder beside it has them.
    params : InferParams
    engine : Engine
    told : callable, optional
        Called as each block ends.

    Returns
    -------
    whole : bool
        False if others have blocks of it left to do.

    Raises
    ------
    SynmlopsError
        If OUT is there, or was begun with another input, model or setting.
    IncompleteError
        If blocks cannot be read. All others are kept, and another call tries those again.
    """
    share_one_heap()
    folder, region = JobFolder(out), source.region
    digests = [sha256_of(path) for path in models]
    kept = [folder.path / "models" / f"{digest[:16]}.safetensors" for digest in digests]
    with open_volume(source.image) as volume:
        seen = source.seen(volume)
        predictor = Predictor(
            [load_outline(path) for path in models], shape_zyx=seen.shape, region=region, params=params
        )
        voxels = BLOCK_VOXELS if params.blend == "none" else BLENDED_BLOCK_VOXELS
        block = engine.block_of(predictor.cell_zyx, region, voxels=voxels)
        own = {"models": digests, "block_zyx": block, "shape_zyx": seen.shape}
        folder.begin(_facts(source, volume, params) | own)
        grey = measure_grey(seen, region) if params.intensity == "volume" else None
    for path, copy in zip(models, kept, strict=True):
        _copy(path, copy)
    create_output(
        folder.data,
        region.shape_zyx,
        channels=predictor.channels,
        grid=source.grid.cropped(region.start_zyx),
        block_zyx=block,
        cell_zyx=predictor.cell_zyx,
    )
    start = PredictBlocks(source, tuple(kept), params, grey, folder.data, engine.gpus)
    writers = GPU_WRITERS if engine.gpus != 0 and count_gpus() else 1
    job = Job(f"infer {out.stem}", BlockGrid(region, block), start, folder.marks, writers)
    outcome = _run(job, engine, told)
    if outcome.failed:
        raise IncompleteError(_what_failed(job, outcome, folder))
    if job.todo() and not out.exists():
        return False
    folder.finish()
    return True


def _facts(source: Source, image: Volume, params: InferParams) -> dict[str, Any]:
    """Give what decides the output beside models and blocks; a volume that was changed is another input."""
    mask = None
    if source.mask is not None:
        with open_volume(source.mask) as volume:
            mask = volume.identity()
    return {
        "image": image.identity(),
        "region": [source.region.start_zyx, source.region.stop_zyx],
        "voxel_nm": source.grid.voxel_nm,
        "factor_zyx": source.factor_zyx,
        "mask": mask,
        "params": params.model_dump(mode="json"),
    }


def _copy(path: Path, copy: Path) -> None:
    """Keep a model with the job, so that who goes on with it has the same one, and workers find it."""
    if copy.exists():
        return
    copy.parent.mkdir(exist_ok=True)
    partial = copy.with_name(uuid.uuid4().hex)
    shutil.copyfile(path, partial)
    partial.replace(copy)


def _run(job: Job, engine: Engine, told: Callable[[Advance], None]) -> Outcome:
    """Do what is left of a job, and show how far it is."""
    todo = job.todo(engine.part)
    megavoxels = float(np.prod(job.grid.block_zyx)) / 1e6
    with track(f"{job.name}, blocks", len(todo)) as report:
        began = time.monotonic()

        def show(n: int) -> None:
            advance = Advance(n, len(todo), n * megavoxels, time.monotonic() - began)
            report(n, f"{advance.rate:.3g} MVox/s")
            told(advance)

        outcome = Outcome(report=show)
        engine.run(job, todo, outcome)
    return outcome


def _what_failed(job: Job, outcome: Outcome, folder: JobFolder) -> str:
    named = [
        f"block {index} at z y x = {', '.join(map(str, job.grid[index].write.start_zyx))}: {reason}"
        for index, reason in list(outcome.failed.items())[:MOST_NAMED]
    ]
    more = len(outcome.failed) - len(named)
    named += [f"and {more} more"] if more else []
    return (
        f"{folder.out}: incomplete, {len(outcome.failed)} of {len(job.grid)} blocks failed; run again to try "
        f"them once more, {folder.data} has the others\n  " + "\n  ".join(named)
    )
