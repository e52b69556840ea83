"""Patches per second that training can draw, against the same augmentations in MONAI: both sides in one run.

    pip install --no-deps monai==1.6.1  # or the extra: pip install -e .[bench]
    python benchmarks/data_path.py --foreground 0.006
    python benchmarks/data_path.py --foreground 0.0006

Patches of 8 x 256 x 256 from a 64 x 1024 x 1024 volume. Ours: `Feed` over a prepared volume, two threads.
Theirs: a DataLoader with two worker processes over arrays in memory (`monai_pipeline.py` says in which
styles). Each of these threads and processes computes alone (one torch thread). All sides take turns, each
turn warmed up and with its own seed; the table gives medians over turns. On a machine with other work on
it, trust the CPU time of a patch (all processes of a side) rather than patches per second.

Every augmentation of synmlops is on: at the incumbent's chance where the incumbent (PyTorch Connectomics
v1) has it on by default, else at one in four. Rejection is that of its CREMI recipe. It decides after
augmentation ("after all"); a careful user decides as soon as the patch is cut ("after crop"). All sides
accept the same patches, so their foreground agrees but for chance.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import get_args

import numpy as np
import psutil
import torch
from em_volume import EmVolume, make_em_volume, prepare_em_volume
from monai_pipeline import Patches, Rejection, Style, make_loader
from torch import Tensor

from synmlops.learning.allocator import keep_freed_memory
from synmlops.learning.feed import Feed
from synmlops.learning.sampling import LabelledRegion, PatchSampler
from synmlops.learning_params import AugmentParams, SamplingParams
from synmlops.section import Section
from synmlops.volumes.prepared import BACKGROUND, UNTRUSTED, Box, PreparedVolume

SHAPE_ZYX = (64, 1024, 1024)
CORES = 2
WARM_UP = 4  # batches
OTHERS = 0.25  # chance of what the incumbent lacks or leaves off
SAMPLING = SamplingParams(patch_zyx=(8, 256, 256), batch_size=2, reject_below=1000, reject_probability=0.95)
AUGMENT = AugmentParams.model_validate(
    {
        "flip": 0.5,
        "quarter_turn": 0.5,
        "rotate": {"probability": OTHERS},
        "scale": {"probability": 0.5},
        "elastic": {"probability": 0.75},
        "misalign": {"probability": 0.5, "degrees": 5.0, "single": 0.5},
        "copy_paste": {"probability": OTHERS},
        "blur": {"probability": OTHERS},
        "defocus": {"probability": OTHERS},
        "motion_blur": {"probability": 0.5},
        "intensity": {"probability": 0.75},
        "invert": OTHERS,
        "noise": {"probability": OTHERS},
        "cut_noise": {"probability": 0.75},
        "cut_blur": {"probability": 0.5},
        "missing_section": {"probability": 0.5, "most": 2, "partly": 0.5},
    }
)


@dataclass(frozen=True)
class Turn:
    """What one side did in one turn."""

    patches_per_s: float
    cpu_ms: float  # of all processes, for one patch
    foreground: float  # share of the trusted voxels
    crops: float  # drawn for one patch that was accepted


@dataclass(frozen=True)
class Case:
    """One volume, in memory and prepared."""

    made: EmVolume
    prepared: PreparedVolume
    stats: tuple[float, float]  # mean and standard deviation of the image

    def feed(self, augment: AugmentParams, seed: int) -> Feed:
        """Give our side."""
        region = LabelledRegion(self.prepared, Box((0, 0, 0), self.prepared.shape_zyx))
        return Feed(
            PatchSampler([region], params=SAMPLING, seed=seed),
            augment=augment,
            batch_size=SAMPLING.batch_size,
            rank=0,
            n_ranks=1,
            mean=self.stats[0],
            std=self.stats[1],
            isotropic=False,
            device=torch.device("cpu"),
        )


def take_our_turn(case: Case, *, seconds: float, seed: int) -> Turn:
    """Draw from our side for so long."""

    def batches(feed: Feed) -> Iterator[tuple[Tensor, int]]:
        step = 0
        while True:
            step += 1
            yield feed.batch(step).sides, 0

    keep_freed_memory()  # as training does
    try:
        with case.feed(AUGMENT, seed) as feed:
            return _clocked(batches(feed), seconds)
    finally:
        keep_freed_memory(False)


def take_their_turn(case: Case, *, style: Style, rejection: Rejection, seconds: float, seed: int) -> Turn:
    """Draw from a MONAI pipeline for so long."""
    patches = Patches(
        case.made,
        sampling=SAMPLING,
        augment=AUGMENT,
        stats=case.stats,
        style=style,
        rejection=rejection,
        seed=seed,
    )
    loader = make_loader(patches, batch_size=SAMPLING.batch_size, workers=CORES)
    return _clocked(((batch["sides"], int(batch["crops"].sum())) for batch in loader), seconds)


def _clocked(batches: Iterator[tuple[Tensor, int]], seconds: float) -> Turn:
    for _ in range(WARM_UP):
        next(batches)
    patches, crops, foreground, trusted = 0, 0, 0, 0
    start, start_cpu = time.perf_counter(), _cpu_seconds()
    now = start
    while now - start < seconds:
        sides, crops_taken = next(batches)
        now = time.perf_counter()
        patches, crops = patches + len(sides), crops + crops_taken
        looked_at = sides[0, ::4]  # a part, so that looking costs next to nothing
        foreground += int(torch.count_nonzero((looked_at != UNTRUSTED) & (looked_at != BACKGROUND)))
        trusted += int(torch.count_nonzero(looked_at != UNTRUSTED))
    cpu_ms = 1000 * (_cpu_seconds() - start_cpu) / patches
    return Turn(patches / (now - start), cpu_ms, foreground / trusted, crops / patches)


def _cpu_seconds() -> float:
    """CPU time so far of this process and the workers that it has now."""
    process = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children()))


def compare(case: Case, *, styles: Sequence[Style], turns: int, seconds: float) -> None:
    """Let all sides take turns and print the table."""
    takers: dict[str, Callable[[int], Turn]] = {
        "synmlops": lambda seed: take_our_turn(case, seconds=seconds, seed=seed)
    }
    for style in styles:
        for rejection in get_args(Rejection):
            takers[f"MONAI, {style}, rejected {rejection}"] = lambda seed, style=style, rejection=rejection: (
                take_their_turn(case, style=style, rejection=rejection, seconds=seconds, seed=seed)
            )
    results: dict[str, list[Turn]] = {name: [] for name in takers}
    for turn in range(turns):
        for name, take in takers.items():
            results[name].append(take(1000 * turn))
    _print_table(results)


def _print_table(results: dict[str, list[Turn]]) -> None:
    print("| side | patches/s | range | ours is faster | CPU ms | ours needs less | crops | foreground |")
    print("|---|---|---|---|---|---|---|---|")
    (ours, our_cpu), *_ = medians = [
        (median(row.patches_per_s for row in rows), median(row.cpu_ms for row in rows))
        for rows in results.values()
    ]
    for (name, rows), (speed, cpu) in zip(results.items(), medians, strict=True):
        speeds = [row.patches_per_s for row in rows]
        crops, foreground = fmean(row.crops for row in rows), fmean(row.foreground for row in rows)
        print(
            f"| {name} | {speed:.1f} | {min(speeds):.1f} to {max(speeds):.1f} | x {ours / speed:.1f} "
            f"| {cpu:.1f} | x {cpu / our_cpu:.1f} | {f'{crops:.2f}' if crops else '-'} | {foreground:.3%} |"
        )


def table_costs(case: Case, *, patches: int) -> None:
    """Print what each augmentation of ours costs when it always happens, in one thread."""
    nothing = with_chances(AUGMENT, dict.fromkeys(AugmentParams.model_fields, 0.0))
    rows = {"nothing": nothing}
    for name in AugmentParams.model_fields:
        rows[name] = with_chances(nothing, {name: 1.0})
    rows["all of them"] = with_chances(AUGMENT, dict.fromkeys(AugmentParams.model_fields, 1.0))
    rows["all at the chances above"] = AUGMENT
    print("| augmentation, always | CPU ms a patch | more than nothing |\n|---|---|---|")
    base = 0.0
    for name, augment in rows.items():
        cost = _milliseconds(case, augment, patches, lambda feed, step: feed.patch(step, 0))
        base = base or cost
        print(f"| {name} | {cost:.2f} | {cost - base:+.2f} |")
    draw = _milliseconds(case, AUGMENT, 20 * patches, lambda feed, step: feed.chances(step, 0))
    print(f"| of it, drawing place and chances | {draw:.3f} | |")


def with_chances(augment: AugmentParams, chances: dict[str, float]) -> AugmentParams:
    """Set the probability of some augmentations, leaving their strengths.

    Examples
    --------
    >>> changed = with_chances(AugmentParams(), {"flip": 1.0, "noise": 0.0})
    >>> changed.flip, changed.noise.probability, changed.noise.deviation
    (1.0, 0.0, 0.5)
    """
    update: dict[str, object] = {}
    for name, chance in chances.items():
        part = getattr(augment, name)
        is_section = isinstance(part, Section)
        update[name] = part.model_copy(update={"probability": chance}) if is_section else chance
    return augment.model_copy(update=update)


def _milliseconds(case: Case, augment: AugmentParams, n: int, work: Callable[[Feed, int], object]) -> float:
    with case.feed(augment, seed=7) as feed:
        times = []
        for step in range(n + 3):
            start = time.thread_time()
            work(feed, step)
            times.append(time.thread_time() - start)
    return 1000 * fmean(times[3:])


def chances_of(augment: AugmentParams) -> str:
    """Give the chance of each augmentation in words."""
    parts = ((name, getattr(augment, name)) for name in AugmentParams.model_fields)
    return ", ".join(
        f"{name} {part.probability if isinstance(part, Section) else part}" for name, part in parts
    )


def main(argv: Sequence[str]) -> None:
    """Make the volume, compare, and print what each augmentation of ours costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--foreground", type=float, default=0.006, help="share of the voxels")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    parser.add_argument("--styles", nargs="*", choices=get_args(Style), default=list(get_args(Style)))
    parser.add_argument("--cost-patches", type=int, default=40, help="patches for each row of the cost table")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # of the main process and, by inheritance, of all others
    made = make_em_volume(SHAPE_ZYX, foreground=options.foreground, seed=1)
    stats = float(made.image.mean()), float(made.image.std())
    print(f"{len(made.middles)} synapses, {np.count_nonzero(made.labels) / made.labels.size:.3%} foreground")
    print(f"chances on all sides: {chances_of(AUGMENT)}")
    print(f"rejection: below {SAMPLING.reject_below} voxels with p {SAMPLING.reject_probability}\n")
    with tempfile.TemporaryDirectory() as folder:
        case = Case(made, prepare_em_volume(made, Path(folder)), stats)
        if options.turns:
            compare(case, styles=options.styles, turns=options.turns, seconds=options.seconds)
            print()
        if options.cost_patches:
            table_costs(case, patches=options.cost_patches)


if __name__ == "__main__":
    main(sys.argv[1:])
