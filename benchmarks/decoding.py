"""Seconds from probabilities to instances and partner table, and how time and memory grow with the volume.

    pip install -e .[bench]
    python benchmarks/decoding.py                         # against the usual recipe, the sides in turns
    python benchmarks/decoding.py --gigavoxels 0.25 1 4   # by size

**Against the usual recipe** on 3 x 128 x 1024 x 1024 in memory, several hundred synapses: that of PyTorch
Connectomics' `polarity2instance` with the fastest labelling that it can have: threshold, scikit-image's
`remove_small_objects` for either side, dilation by 1 x 5 x 5, cc3d, and arithmetic with masks of the whole
volume. It ends with the instances; a second line adds a table by `scipy.ndimage.find_objects` and a mask for
each instance. Ours is `decode_blocks` with `join_voxels=2`, which is the same dilation, and always with the
partner table. The floor is threshold and cc3d of the union alone. Medians over turns. What the sides find is
compared first; the recipe drops small objects of a side, we drop small sites, hence a few voxels. By the rule
`polarity` we do as v1 does, which labels by faces, and all ids have to be the same.

**By size**: volumes of 256 sections that are made up while they are read (what that takes is taken off), with
gzipped HDF5 out, each in a process of its own whose peak resident memory is read at its end. CPU seconds of
that process, one thread, are what to trust where other work runs on the machine.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cc3d
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import dilation, remove_small_objects
from synthetic_probabilities import Synthetic

from synmlops.blockwise.grid import BlockGrid
from synmlops.params import EvaluateParams
from synmlops.stages.decode import BLOCK_ZYX
from synmlops.synapses.decoding import decode_blocks
from synmlops.volumes.prepared import Box
from synmlops.volumes.store import Grid, hdf5_writer

SHAPE_ZYX = (128, 1024, 1024)
GRID = Grid((40.0, 8.0, 8.0))
THRESHOLD = 0.5
JOIN = 2  # voxels that the foreground grows by in plane before it is labelled
PARAMS = EvaluateParams(min_voxels=128, side_threshold=1.0, min_side_voxels=0, split="none")
POLARITY = EvaluateParams(rule="polarity", min_side_voxels=0)
SECTION_YX = {0.25: (1024, 1024), 1.0: (2048, 2048), 4.0: (4096, 4096)}


@dataclass(frozen=True)
class Result:
    """Instances, and a table where one was made."""

    ids: NDArray[np.unsignedinteger]
    table: pd.DataFrame | None


def usual(probabilities: NDArray[np.uint8], *, connectivity: int = 26) -> Result:
    """Decode as the field does, whole volume at a time."""
    pre, post, union = (probabilities > int(255 * THRESHOLD)).astype(np.uint8)
    pre = remove_small_objects((pre * union).astype(bool), max_size=PARAMS.min_voxels - 1, connectivity=1)
    post = remove_small_objects((post * union).astype(bool), max_size=PARAMS.min_voxels - 1, connectivity=1)
    grown = dilation(union, np.ones((1, 2 * JOIN + 1, 2 * JOIN + 1), np.uint8))
    sites = cc3d.connected_components(grown, connectivity=connectivity)
    ids = np.maximum((2 * sites - 1) * pre, 2 * sites * post)
    return Result(ids.astype(np.uint32), None)


def usual_with_table(probabilities: NDArray[np.uint8]) -> Result:
    """Decode as the field does, and list middle and size of every side from its mask."""
    ids = usual(probabilities).ids
    rows = []
    for instance, box in enumerate(ndimage.find_objects(ids.astype(np.int32)), start=1):
        if box is None:
            continue
        mask = ids[box] == instance
        middle = np.argwhere(mask).mean(axis=0) + [s.start for s in box]
        confidence = probabilities[2][box][mask].mean() / 255
        rows.append((instance, *middle, mask.sum(), confidence))
    return Result(ids, pd.DataFrame(rows, columns=["id", "z", "y", "x", "voxels", "confidence"]))


def floor(probabilities: NDArray[np.uint8]) -> Result:
    """Threshold and label the union: what no recipe with cc3d goes without."""
    return Result(cc3d.connected_components(probabilities[2] >= 128, connectivity=26), None)


def ours(
    probabilities: NDArray[np.uint8],
    *,
    block_zyx: tuple[int, int, int],
    join: int = JOIN,
    params: EvaluateParams = PARAMS,
) -> Result:
    """Decode by block, in this process, with the partner table."""
    blocks = BlockGrid(Box((0, 0, 0), SHAPE_ZYX), block_zyx)
    made = []

    def out(dtype: Any) -> NDArray[Any]:
        made.append(np.zeros(SHAPE_ZYX, dtype))
        return made[0]

    decoding = decode_blocks(
        probabilities, blocks=blocks, grid=GRID, params=params, threshold=THRESHOLD, out=out, join_voxels=join
    )
    return Result(made[0], decoding.table)


def compare(turns: int) -> None:
    """Print the table of both sides."""
    probabilities = Synthetic(SHAPE_ZYX)[:, :, :, :]
    print(f"{(probabilities[2] >= 128).mean():.2%} of the voxels are foreground\n")
    sides: dict[str, Callable[[NDArray[np.uint8]], Result]] = {
        "usual recipe, instances alone": usual,
        "usual recipe with a table": usual_with_table,
        "floor: threshold and cc3d of the union": floor,
        "synmlops, one block, rule polarity": lambda p: ours(p, block_zyx=SHAPE_ZYX, join=0, params=POLARITY),
        "synmlops, one block": lambda p: ours(p, block_zyx=SHAPE_ZYX),
        f"synmlops, blocks of {' x '.join(map(str, BLOCK_ZYX))}": lambda p: ours(p, block_zyx=BLOCK_ZYX),
        "the same, nothing joined": lambda p: ours(p, block_zyx=BLOCK_ZYX, join=0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Result] = {}
    for _ in range(turns):
        for name, decode in sides.items():
            began = time.perf_counter()
            results[name] = decode(probabilities)
            seconds[name].append(time.perf_counter() - began)
    _check(results["usual recipe, instances alone"], results["synmlops, one block"])
    same = usual(probabilities, connectivity=6).ids == results["synmlops, one block, rule polarity"].ids
    print(f"rule polarity: {np.count_nonzero(~same)} voxels differ from the recipe with labels by faces\n")
    theirs = median(seconds["usual recipe, instances alone"])
    print("| side | s, median | s, least | usual recipe's instances / this |\n|---|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {median(taken):.2f} | {min(taken):.2f} | {theirs / median(taken):.1f} |")


def _check(theirs: Result, mine: Result) -> None:
    """Expect the same voxels in the same sites."""
    assert mine.table is not None
    n = [len(np.unique((one.ids[one.ids > 0] + 1) // 2)) for one in (theirs, mine)]
    differing = np.count_nonzero((theirs.ids > 0) != (mine.ids > 0))
    together = np.stack([theirs.ids, mine.ids])[:, (theirs.ids > 0) & (mine.ids > 0)]
    pairs = len(np.unique(together, axis=1).T)
    print(f"sites: {n[0]} usual, {n[1]} synmlops; {differing} voxels differ; {pairs} pairs of ids; "
          f"{len(mine.table)} rows\n")  # fmt: skip


def by_size(gigavoxels: list[float]) -> None:
    """Print time and memory for volumes of several sizes."""
    print(f"blocks of {BLOCK_ZYX}, one process\n")
    print("| gigavoxels | sites | s | CPU s without making the volume | Mvox per CPU s | peak memory, GiB |")
    print("|---|---|---|---|---|---|")
    for size in gigavoxels:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            n, taken, own, peak = pool.submit(_decode_size, size).result()
        rate = size * 2**30 / 1e6 / own
        print(f"| {size:g} | {n} | {taken:.1f} | {own:.1f} | {rate:.0f} | {peak:.2f} |", flush=True)


def _decode_size(gigavoxels: float) -> tuple[int, float, float, float]:
    """Decode a volume to a file that is thrown away; give sites, seconds, own CPU seconds, peak GiB."""
    height, width = SECTION_YX[gigavoxels]
    shape = round(gigavoxels * 2**30 / height / width), height, width
    source = Synthetic(shape)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "instances.h5"

        def out(dtype: Any) -> Any:
            forms = {"main": (shape, dtype)}
            return stack.enter_context(hdf5_writer(path, forms, grid=GRID, compression="gzip"))["main"]

        began, began_cpu = time.perf_counter(), time.process_time()
        decoding = decode_blocks(
            source,
            blocks=BlockGrid(Box((0, 0, 0), shape), BLOCK_ZYX),
            grid=GRID,
            params=PARAMS,
            threshold=THRESHOLD,
            out=out,
            scratch=Path(folder),
        )
        taken, used = time.perf_counter() - began, time.process_time() - began_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return decoding.n_sites, taken, used - source.made_s, peak / 2**20


def main() -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--gigavoxels", type=float, nargs="*", choices=sorted(SECTION_YX))
    options = parser.parse_args()
    if options.gigavoxels:
        by_size(options.gigavoxels)
    else:
        compare(options.turns)


if __name__ == "__main__":
    main()
