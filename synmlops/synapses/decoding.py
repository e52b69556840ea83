"""Probabilities of any size to instances and the partner table, block by block, in bounded memory.

The result does not depend on the blocks: ids, numbering and table are those of a single block that holds all.
What stays in memory besides a block is a few numbers for each component that may be a site.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, fields
from itertools import tee
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.blockwise.grid import Block, BlockGrid
from synmlops.params import CHANNELS, EvaluateParams, SynmlopsError
from synmlops.progress import Report
from synmlops.synapses.blocks import (
    Decoded,
    Given,
    Links,
    Source,
    Summary,
    Task,
    decode_block,
    each_block,
    join_block,
    label_block,
    nearest_in_block,
)
from synmlops.synapses.crew import Crew, Opener, Sources, crew
from synmlops.synapses.foreground import Levels
from synmlops.synapses.instances import id_type, level_of
from synmlops.synapses.joining import Sites, settle
from synmlops.synapses.partners import rows_of
from synmlops.synapses.pieces import Pieces, joined, merge
from synmlops.synapses.pytc_decoding import PolarityRule, label_marked, levels_of
from synmlops.synapses.sparse import places
from synmlops.synapses.splitting import SplitRules
from synmlops.synapses.spool import Spool, lasting_spool, temporary_spool
from synmlops.synapses.touching import Crowd, crowds, part_crowds, renumbered
from synmlops.volumes.store import Grid
from synmlops.volumes.table import empty_table

Ids = np.dtype[np.unsignedinteger]

_DONE = "done"  # the summary of a block: laid aside last, it says that the block was read
_Result = TypeVar("_Result")


class Target(Protocol):
    """What takes ids by region, such as an array or an HDF5 dataset of zeros."""

    def __setitem__(self, region: tuple[slice, slice, slice], ids: NDArray[Any], /) -> None:
        """Put the ids of a block."""
        ...


@runtime_checkable
class SharedTarget(Protocol):
    """What takes ids by region from several processes at once, and can be pickled."""

    def write(self, region: tuple[slice, slice, slice], array: NDArray[Any]) -> None:
        """Put the ids of a block."""
        ...


@dataclass(frozen=True, eq=False)
class Decoding:
    """What was found.

    Attributes
    ----------
    n_sites : int
        Synapses: the largest id, or half of it where there are two for each. By the rule `polarity` numbers
        have gaps, for those of which no side is left, and these are not counted.
    table : DataFrame or None
        The partner table, as of `partners_of` with the instances; None where the sides are not known, or ids
        are semantic.
    """

    n_sites: int
    table: pd.DataFrame | None


def decode_blocks(
    probabilities: Source | Opener,
    *,
    blocks: BlockGrid,
    grid: Grid,
    params: EvaluateParams,
    threshold: float,
    out: Callable[[Ids], Target | SharedTarget],
    neurons: Source | Opener | None = None,
    join_voxels: int = 0,
    workers: int = 1,
    scratch: Path | None = None,
    inputs: Mapping[str, Any] | None = None,
    report: Report = lambda done, note: None,
) -> Decoding:
    """Decode a volume of any size into instances and partner table.

    Parameters
    ----------
    probabilities : (3 or 1, Z, Y, X) source of uint8, or a function that opens one
        Pre, post, union, or union alone. With several workers a function that can be pickled, or an array.
    blocks : BlockGrid
        The region to decode, within the volume, and its blocks. Each is read once, without a margin.
    grid : Grid
        Voxel size, and where voxel (0, 0, 0) of the volume lies.
    params : EvaluateParams
        `rule`, and what it reads: `min_voxels`, `side_threshold`, `split`, or `polarity` without its
        `scale_zyx`; of both `min_side_voxels`.
    threshold : float
        Least union probability of the foreground, inclusive; by the rule `polarity` it is exclusive.
    out : function
        Called once with the type of the ids; gives what takes them, by regions of the volume, zero to begin
        with. What has a method `write(region, ids)` is written by the workers, anything else by this process.
        Blocks without a site are not written.
    neurons : (Z, Y, X) source of int, or a function that opens one, optional
    join_voxels : int, default 0
        As in `decode_pairs`.
    workers : int, default 1
        Processes; 1 is this one alone.
    scratch : Path, optional
        Folder for what is laid aside between the passes: about 14 bytes for each foreground voxel. None keeps
        it in memory, for one worker.
    inputs : mapping, optional
        What tells the probabilities from others, such as `Volume.identity` gives. Where it is given, what a
        process that was killed had read and laid aside in `scratch` is not read again (rule `sites`).
    report : function, optional
        Called with the passes over blocks done so far, of about `passes_of` for each block.

    Returns
    -------
    decoding : Decoding

    Raises
    ------
    SynmlopsError
        If the probabilities end early, the neurons have another shape, `scratch` is full, or another process
        decodes there.
    ValueError
        If the threshold is not within 0 to 1, the region leaves the volume, the probabilities are not of 1 or
        3 channels, or several workers have no scratch.

    Examples
    --------
    >>> from synmlops.volumes.prepared import Box
    >>> p = np.zeros((3, 1, 1, 8), np.uint8)
    >>> p[0, 0, 0, 1:3], p[1, 0, 0, 3:5], p[2, 0, 0, 1:5] = 200, 220, 250
    >>> ids = np.zeros((1, 1, 8), np.uint16)
    >>> decoding = decode_blocks(
    ...     p, blocks=BlockGrid(Box((0, 0, 0), (1, 1, 8)), (1, 1, 3)), grid=Grid((40, 4, 4)),
    ...     params=EvaluateParams(min_voxels=2), threshold=0.5, out=lambda kind: ids
    ... )
    >>> ids.tolist(), decoding.table[["pre_x", "post_x"]].values.tolist()
    ([[[0, 1, 1, 2, 2, 0, 0, 0]]], [[1, 3]])
    """
    if join_voxels and params.split == "watershed":
        raise ValueError("a watershed would part again what join_voxels joins; use split: pre or none")
    if workers > 1 and scratch is None:
        raise ValueError(f"{workers} workers need a scratch folder")
    levels, rule = _levels(params, threshold, join_voxels)
    facts = None
    if inputs is not None and rule is None:
        box = blocks.region.start_zyx, blocks.region.stop_zyx, blocks.block_zyx
        facts = {"inputs": inputs, "blocks": box, "levels": astuple(levels), "least": params.min_voxels}
    with _spool(scratch, facts) as spool, crew(probabilities, neurons, workers) as hands:
        task = Task(
            blocks=blocks,
            levels=levels,
            min_voxels=params.min_voxels,
            has_sides=_check(hands.sources, blocks, rule=params.rule),
            by_neuron=neurons is not None,
            voxel_nm=grid.voxel_nm,
            spool=spool,
            keeps_all=rule is not None,
            semantic=rule is not None and params.polarity.semantic,
        )
        counted = _Count(report)
        mode = params.split if rule is None else "none"
        rules = SplitRules(mode, params.min_voxels, params.min_side_voxels, grid.voxel_nm)
        sites = _label(hands, task, rules, counted, rule)
        n_sites = sites.n if rule is None else sites.n_sided
        pieces = _write(hands, task, sites, out, counted)
    if pieces is None:
        return Decoding(n_sites, empty_table() if task.has_sides and not task.semantic else None)
    table = rows_of(
        pieces,
        voxel_nm=grid.voxel_nm,
        offset_nm=grid.offset_nm,
        by_neuron=task.by_neuron,
        min_side_voxels=params.min_side_voxels,
    )
    return Decoding(n_sites, table)


def passes_of(params: EvaluateParams) -> int:
    """Give how often `decode_blocks` goes over a block, about."""
    return 3 if params.rule == "sites" else 5


def _levels(params: EvaluateParams, threshold: float, join_voxels: int) -> tuple[Levels, PolarityRule | None]:
    side = level_of(params.side_threshold * threshold)
    if params.rule == "sites":
        return Levels(level_of(threshold), side, join_voxels), None
    if join_voxels:
        raise ValueError("the rule polarity joins by polarity.dilate_yx; leave join_voxels at 0")
    return levels_of(params.polarity), PolarityRule.of(threshold, params.polarity)


def _check(sources: Sources, blocks: BlockGrid, *, rule: str) -> bool:
    """Refuse what does not go together; tell whether the probabilities know the sides."""
    shape = sources.probabilities.shape
    if len(shape) != 4 or shape[0] not in (1, len(CHANNELS)):
        raise ValueError(f"probabilities must be (3 or 1, z, y, x), got {shape}")
    if rule == "polarity" and shape[0] == 1:
        raise SynmlopsError(
            "evaluate.rule: polarity decodes pre, post and union, but these probabilities are of the union "
            "alone; use rule: sites"
        )
    outside = any(
        start < 0 or stop > n
        for start, stop, n in zip(blocks.region.start_zyx, blocks.region.stop_zyx, shape[1:], strict=True)
    )
    if outside:
        raise ValueError(f"the region {blocks.region} leaves the volume of {shape[1:]}")
    if sources.neurons is not None and tuple(sources.neurons.shape) != tuple(shape[1:]):
        raise SynmlopsError(
            f"the neurons have the shape {sources.neurons.shape}, the probabilities {shape[1:]}; "
            "give the segmentation of the same volume at the same voxel size"
        )
    return shape[0] == len(CHANNELS)


class _Count:
    """Reports how many passes over blocks are done."""

    def __init__(self, report: Report) -> None:
        self._report, self._done = report, 0

    def __call__(self, result: _Result) -> _Result:
        self._done += 1
        self._report(self._done, "")
        return result


def _spool(scratch: Path | None, facts: Mapping[str, Any] | None) -> AbstractContextManager[Spool]:
    if scratch is None:
        return nullcontext(Spool(None))
    return temporary_spool(scratch) if facts is None else lasting_spool(scratch, facts)


def _label(hands: Crew, task: Task, rules: SplitRules, counted: _Count, rule: PolarityRule | None) -> Sites:
    """Read every block, join what goes on from one into the next, and take touching synapses apart."""
    if rule is None:
        labelled = map(counted, hands.map(_label_one, each_block(task), task))
        summaries = [one.slight() for one in labelled]
    else:
        summaries = label_marked(hands, task, rule, counted)
    joined_blocks = map(counted, hands.map(_join_one, each_block(task, least=2), task))
    links = [one for one in joined_blocks if one.any]
    sites = settle(
        summaries,
        links,
        min_voxels=task.min_voxels,
        min_pre_voxels=max(rules.min_side_voxels, 1),
        keeps_all=task.keeps_all,
    )
    if rules.mode == "none":
        return sites
    jobs = list(crowds(task, sites, rules))
    parted = hands.map(_part_one, [(*job, rules) for job in jobs], task)
    return renumbered(sites, ((home, *result) for (home, _), result in zip(jobs, parted, strict=True)))


def _write(
    hands: Crew, task: Task, sites: Sites, out: Callable[[Ids], Target | SharedTarget], counted: _Count
) -> Pieces | None:
    """Write the ids, and give the pieces of all sites, sorted; None if there are none."""
    kind = id_type(2 if task.semantic else 2 * sites.n if task.has_sides else sites.n)
    target = out(kind)
    shared = target if isinstance(target, SharedTarget) else None
    jobs, ahead = tee(  # made as they are asked for: memory goes by the sites, not by the blocks
        (block, given, shared)
        for block in task.blocks
        if (given := sites.given(block.index)).any  # else it stays as it is, all zero
    )
    whole: list[Pieces] = []
    shares: list[tuple[Block, Pieces]] = []
    for (block, *_), decoded in zip(jobs, hands.map(_decode_one, ahead, task, kind), strict=True):
        counted(decoded)
        if not isinstance(target, SharedTarget):
            _put(target, block, decoded, kind)
        whole += [] if decoded.whole is None else [decoded.whole]
        shares += [] if decoded.shares is None or not len(decoded.shares) else [(block, decoded.shares)]
    if shares:
        whole.append(_meet(hands, task, shares))
    if not whole:
        return None
    pieces = joined(whole)
    return pieces.where(np.lexsort((pieces.part, pieces.side, pieces.site)))


def _meet(hands: Crew, task: Task, shares: list[tuple[Block, Pieces]]) -> Pieces:
    """Add up the shares of several blocks, and find the point of each piece among their voxels."""
    whole, number = merge(joined([share for _, share in shares]))
    ends = np.cumsum([len(share) for _, share in shares])[:-1]
    jobs = [
        (block, whole.centroid[its]) for (block, _), its in zip(shares, np.split(number, ends), strict=True)
    ]
    distances, points = zip(*hands.map(_nearest_one, jobs, task), strict=True)
    distance, point = np.concatenate(distances), np.concatenate(points)
    order = np.lexsort((*point.T[::-1], distance, number))  # of equally near ones the first in scan order
    first = order[np.flatnonzero(np.diff(number[order], prepend=-1))]
    whole.point[:] = point[first]
    return whole


def _put(target: Target, block: Block, decoded: Decoded, kind: Ids) -> None:
    if isinstance(target, np.ndarray):  # spares all but the pages that hold a voxel
        target[block.write.slices][places(decoded.flat, block.write.shape_zyx)] = decoded.ids
    else:
        target[block.write.slices] = _painted(block, decoded, kind)


def _painted(block: Block, decoded: Decoded, kind: Ids) -> NDArray[Any]:
    ids = np.zeros(block.write.shape_zyx, kind)
    ids.reshape(-1)[decoded.flat] = decoded.ids
    return ids


def _label_one(sources: Sources, task: Task, block: Block) -> Summary:
    """Label a block, unless a process that was killed has done so."""
    kept = task.spool.get(_DONE, block.index)
    if kept is not None:
        return Summary(*kept)
    summary = label_block(task, block, sources.probabilities)
    if task.spool.lasts:  # the last of the block's files
        task.spool.put(_DONE, block.index, tuple(getattr(summary, one.name) for one in fields(Summary)))
    return summary


def _part_one(_: Sources, task: Task, home: Block, crowded: tuple[Crowd, ...], rules: SplitRules) -> Any:
    return part_crowds(task, home, crowded, rules)


def _join_one(_: Sources, task: Task, block: Block) -> Links:
    return join_block(task, block)


def _decode_one(
    sources: Sources, task: Task, kind: Ids, block: Block, given: Given, shared: SharedTarget | None
) -> Decoded:
    decoded = decode_block(task, block, given, sources.neurons)
    if shared is None:
        return decoded
    shared.write(block.write.slices, _painted(block, decoded, kind))
    return decoded.without_voxels()


def _nearest_one(_: Sources, task: Task, block: Block, centroid: NDArray[np.float64]) -> Any:
    return nearest_in_block(task, block, centroid)
