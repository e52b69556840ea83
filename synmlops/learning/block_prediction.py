"""The prediction of a volume as work on blocks, for any engine of `synmlops.blockwise`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from synmlops.blockwise.grid import Block
from synmlops.blockwise.job import Place, Worker
from synmlops.learning.allocator import give_back_freed_memory, keep_freed_memory, share_one_heap
from synmlops.learning.checkpoint import load_model
from synmlops.learning.distributed import device_of
from synmlops.learning.memory import is_out_of_memory
from synmlops.learning.predict import Image, Pending, Predictor
from synmlops.params import InferParams, SynmlopsError
from synmlops.volumes.block_output import BlockOutput, open_output
from synmlops.volumes.prepared import Box
from synmlops.volumes.resampled import Resampled
from synmlops.volumes.store import Grid, Volume, open_volume

BLOCK_VOXELS = 2**24
"""Voxels of a block by default: what a lost worker costs, and the size of a shard."""
BLENDED_BLOCK_VOXELS = 2**26
"""The same where windows are blended, and those at the faces of a block are computed by its neighbours too; a
block takes 16 bytes a voxel then, for sums of three channels and of the weights."""
SAMPLES = 64
SAMPLE_ZYX = (4, 128, 128)


@dataclass(frozen=True)
class Source:
    """A volume that is predicted: where it is, at which voxels it is seen, and where it is looked at.

    Attributes
    ----------
    image : str
        As for `open_volume`.
    region : Box
        What is predicted, in the voxels that the network sees.
    grid : Grid
        Of the voxels that the network sees; its origin is voxel 0 of the whole volume.
    factor_zyx : tuple of float
        Size of those voxels in voxels of the file.
    mask : str, optional
        A volume of any voxel size, non-zero where probabilities are wanted.
    """

    image: str
    region: Box
    grid: Grid
    factor_zyx: tuple[float, float, float] = (1.0, 1.0, 1.0)
    mask: str | None = None

    def seen(self, volume: Volume) -> Image:
        """Give the open volume at the voxels that the network sees."""
        return volume if self.factor_zyx == (1, 1, 1) else Resampled(volume, self.factor_zyx)


@dataclass(frozen=True)
class PredictBlocks:
    """Starts a worker that reads, predicts and writes blocks.

    Attributes
    ----------
    source : Source
    models : tuple of Path
        Files that all workers reach.
    params : InferParams
    grey : tuple of float or None
        Mean and deviation of the volume's grey levels; None for those of training.
    out : Path
        What `create_output` made; its voxel 0 is the region's first.
    gpus : int or None
        0 for the CPU; by default a GPU where there is one.
    """

    source: Source
    models: tuple[Path, ...]
    params: InferParams
    grey: tuple[float, float] | None
    out: Path
    gpus: int | None = None

    def __call__(self, place: Place) -> Worker:
        """Open the volumes and load the models, in the process that is to work."""
        device = device_of(place.number, self.gpus)
        if device.type == "cpu":
            share_one_heap()  # before the threads of whatever reads and writes begin
            keep_freed_memory()  # every window allocates the same again
            if place.of > 1:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.of))
        volume = open_volume(self.source.image)
        seen = self.source.seen(volume)
        predictor = Predictor(
            [load_model(path, device=device) for path in self.models],
            shape_zyx=seen.shape,
            region=self.source.region,
            params=self.params,
            grey=self.grey,
        )
        mask = None
        if self.source.mask is not None:
            mask = Mask(open_volume(self.source.mask), self.source.grid, shape_zyx=seen.shape)
        return _Worker(seen, mask, predictor, open_output(self.out))


@dataclass(frozen=True)
class _Read:
    image: NDArray[Any]
    mask: NDArray[np.bool_] | None


@dataclass(frozen=True)
class _Worker:
    image: Image
    mask: "Mask | None"
    predictor: Predictor
    out: BlockOutput

    def read(self, block: Block) -> _Read | None:
        mask = None if self.mask is None else self.mask.read(block.write)
        if mask is not None and not mask.any():
            return None
        return _Read(np.asarray(self.image[self.predictor.to_read(block.write).slices]), mask)

    def compute(self, block: Block, data: _Read | None) -> Pending | None:
        if data is None:
            return None
        try:
            begun = self.predictor.begin(data.image, block.write, mask=data.mask)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SynmlopsError(
                "infer ran out of memory; lower infer.batch_size, infer.window_zyx or --block"
            ) from error
        if begun.ready is None:  # computed here, not on a GPU
            give_back_freed_memory()  # else the memory of the process grows from block to block
        return begun

    def write(self, block: Block, result: Pending | None) -> None:
        levels = None if result is None else result.result()
        if levels is not None and levels.any():  # the output is zero to begin with
            start = self.predictor.region.start_zyx
            self.out.write(block.write.moved(-at for at in start), levels)
        if result is None or result.ready is None:
            give_back_freed_memory()  # what the output took to encode it


class Mask:
    """A volume of any voxel size, looked up at the voxels of another; beyond its ends it is zero.

    Parameters
    ----------
    volume : array-like with a grid
    grid : Grid
        Of the voxels that ask.
    shape_zyx : tuple of int
        How many there are. A mask that does not say its voxel size lies over the same space as they do.
    """

    def __init__(self, volume: Volume, grid: Grid, *, shape_zyx: Sequence[int]) -> None:
        self._volume = volume
        places = []
        for axis in range(3):
            middle = np.arange(shape_zyx[axis], dtype=np.float64)
            if volume.grid is None:
                place = (middle + 0.5) * volume.shape[axis] / shape_zyx[axis] - 0.5
            else:
                world = grid.offset_nm[axis] + middle * grid.voxel_nm[axis]
                place = (world - volume.grid.offset_nm[axis]) / volume.grid.voxel_nm[axis]
            places.append(np.rint(place).astype(np.int64))
        self._places = places

    def read(self, box: Box) -> NDArray[np.bool_]:
        """Tell of each voxel of a box whether the mask is set there."""
        wanted = [places[span] for places, span in zip(self._places, box.slices, strict=True)]
        found = np.zeros(box.shape_zyx, bool)
        inside = [
            np.flatnonzero((at >= 0) & (at < n)) for at, n in zip(wanted, self._volume.shape, strict=True)
        ]
        if not all(one.size for one in inside):
            return found
        ends = [(int(at[one].min()), int(at[one].max()) + 1) for at, one in zip(wanted, inside, strict=True)]
        read = np.asarray(self._volume[tuple(slice(low, high) for low, high in ends)])
        index = np.ix_(*(at[one] - low for at, one, (low, _) in zip(wanted, inside, ends, strict=True)))
        found[np.ix_(*inside)] = read[index] != 0
        return found


def measure_grey(image: Image, region: Box) -> tuple[float, float]:
    """Give mean and deviation of the grey levels of a region, from samples spread over it.

    Voxels of 0 or of the greatest value that the type holds are no tissue and left out, and so are the lowest
    and the highest 0.5 % of the others: charging, dirt and lost sections would stretch the deviation.

    Returns
    -------
    mean, deviation : float
        0 and 1 if there is no tissue.
    """
    per_axis = round(SAMPLES ** (1 / 3))
    starts = [
        np.unique(np.linspace(low, max(low, high - size), per_axis).astype(int)).tolist()
        for low, high, size in zip(region.start_zyx, region.stop_zyx, SAMPLE_ZYX, strict=True)
    ]
    stops = region.stop_zyx
    samples = []
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                ends = (min(at + n, stop) for at, n, stop in zip((z, y, x), SAMPLE_ZYX, stops, strict=True))
                spans = (slice(at, end) for at, end in zip((z, y, x), ends, strict=True))
                sample = np.asarray(image[tuple(spans)])
                samples.append(sample[(sample > 0) & (sample < np.iinfo(sample.dtype).max)])
    values = np.concatenate(samples)
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5))
    kept = values[(values >= low) & (values <= high)].astype(np.float64)
    return float(kept.mean()), float(max(kept.std(), 1e-6))


def block_shape(cell_zyx: Sequence[int], region: Box, *, voxels: int = BLOCK_VOXELS) -> tuple[int, int, int]:
    """Choose blocks of whole cells, near a number of voxels and about as long along each axis in cells.

    Examples
    --------
    >>> block_shape((12, 192, 192), Box((0, 0, 0), (10_000, 10_000, 10_000)))
    (36, 576, 768)
    >>> block_shape((12, 192, 192), Box((0, 0, 0), (20, 300, 10_000)))
    (24, 384, 1728)
    """
    cells = [1, 1, 1]
    most = [-(-n // cell) for n, cell in zip(region.shape_zyx, cell_zyx, strict=True)]
    while True:
        growable = [i for i in range(3) if cells[i] < most[i]]
        if not growable:
            break
        axis = min(growable, key=lambda i: (cells[i], -i))
        grown = [n + (i == axis) for i, n in enumerate(cells)]
        if np.prod([n * cell for n, cell in zip(grown, cell_zyx, strict=True)]) > voxels:
            break
        cells = grown
    z, y, x = (n * cell for n, cell in zip(cells, cell_zyx, strict=True))
    return z, y, x
