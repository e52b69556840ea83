"""Two training recipes on real EM for equal time: that of examples/vnc against the incumbent's.

In a folder with `data/raw` of examples/vnc (its README says how to import it):

    python benchmarks/vnc_recipes.py --raw data/raw --out vnc_recipes --jobs 2

Both arms train the network of examples/vnc/params.yaml through the same loop, sampler, augmentation and
prediction, on one thread each, and differ in the sections `sampling`, `augment`, `loss` and `train` alone.
The incumbent's recipe is PyTorch Connectomics v1: Adam at 1e-3, a tenth of it for the last fifth; its default
augmentations as near as params can say; patches of less than 250 foreground voxels rejected with p 0.9;
weighted BCE + Dice; no average of weights. How many steps `--seconds` allow is measured once, the arms taking
turns, in CPU seconds of the process, which other work on the machine disturbs least.

Each job (arm, fold, seed) leaves its probabilities in `--out`, so that the same command goes on where it was
ended. Then everything is scored as in the example: a fold's threshold is the best one for the bands that the
other folds hold out, and scores are pooled over the bands. The interval is a paired bootstrap over tiles of
tissue. A synapse belongs whole to the tile of its centroid; a draw takes both arms and all seeds along.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from synmlops.learning.checkpoint import Model, ModelMeta
from synmlops.learning.distributed import Ranks
from synmlops.learning.loop import Recipe, Silent, fit
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import Predictor
from synmlops.learning.sampling import train_regions
from synmlops.params import Params, load_params
from synmlops.stages.prepare import run as run_prepare
from synmlops.synapses.instances import Instances, components_of, decode_union
from synmlops.synapses.matching import match_overlaps, match_points, overlaps_of
from synmlops.synapses.metrics import centroids_of
from synmlops.synapses.voxels import histogram_of
from synmlops.volumes.files import atomic_path
from synmlops.volumes.prepared import UNTRUSTED, Manifest, Region, read_manifest
from synmlops.volumes.probabilities import probabilities_writer, read_probabilities

EXAMPLE = Path(__file__).parents[1] / "examples/vnc/params.yaml"
TILES_YX = (2, 3)  # of a band
DRAWS = 10_000
ROUNDS, FEW, MANY = 3, 3, 15  # of measuring a step: rounds, and the steps whose difference is measured
FIRST_OF_LAST_FIFTH = 0.8
WARMUP = 0.1  # share of the steps

INCUMBENT: dict[str, Any] = {
    "sampling": {"patch_zyx": (8, 128, 128), "batch_size": 4, "reject_below": 250, "reject_probability": 0.9},
    "augment": {
        "flip": 0.5,
        "quarter_turn": 0.5,
        "scale": {"probability": 0.5, "factor": 1.25},
        "elastic": {"probability": 0.75, "displacement": 0.65, "spacing": 8.0},  # alpha 16, sigma 4
        "misalign": {"probability": 0.5, "shift": 8, "degrees": 5.0, "single": 0.5},
        "intensity": {"probability": 0.75, "brightness": 0.75, "contrast": 0.15, "gamma": 0.5},
        "motion_blur": {"probability": 0.5, "length": 11, "most": 2},
        "cut_blur": {"probability": 0.5, "share": 0.4, "factor": 8},
        "cut_noise": {"probability": 0.75, "share": 0.4, "deviation": 0.85},
        "missing_section": {"probability": 0.9, "most": 4, "partly": 1.0},
        "noise": {"probability": 0.0},
        "blur": {"probability": 0.0},
        "defocus": {"probability": 0.0},
    },
    "loss": {"bce": 1.0, "dice": 0.5, "foreground_weight_clip": (0.05, 0.95)},
    "train": {
        "optimizer": "adam",
        "learning_rate": 0.001,
        "weight_decay": 0.0001,
        "schedule": "multistep",
        "milestone_factor": 0.1,
        "warmup_steps": 0,
        "gradient_clip": 1e9,
        "ema": 0.0,
    },
}
"""The incumbent's recipe; what stands in none of these keys is the default of params."""

ARMS = ("ours", "incumbent")
SCORES = ("average precision", "voxel F1", "detection F1, IoU", "detection F1, centroid")

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One training and the prediction of the band that it did not see."""

    arm: str
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}_fold{self.fold + 1}_seed{self.seed}"


@dataclass(frozen=True, eq=False)
class Tally:
    """What one arm and seed found, by tile of tissue; everything adds up over tiles.

    Attributes
    ----------
    voxels : (T, 2, 256) array
        Background and foreground voxels by uint8 probability.
    counts : (T, 3, 3) array
        Of voxels, of synapses by overlap and by centroid: true positives, false positives, false negatives.
    """

    voxels: Table
    counts: Table


class _Alarms(Silent):
    """Training tells of nothing else."""

    def alarm(self, step: int, message: str) -> None:
        print(f"step {step}: {message}", flush=True)


def main() -> None:
    """Prepare, measure the time of a step, run what is left to run, score."""
    args = _arguments()
    prepared = args.out / "prepared"
    base = load_params(EXAMPLE, overrides=_sources(args.raw))
    if not prepared.exists():
        run_prepare(base.data, out=prepared)
    manifest = read_manifest(prepared)
    steps = _steps(base, manifest, seconds=args.seconds, path=args.out / "steps.json")
    seeds = range(args.seeds)
    jobs = [Job(*one) for one in product(ARMS, range(len(manifest.folds)), seeds)]
    left = [job for job in jobs if not (args.out / f"{job.name}.json").exists()]
    print(f"steps: {steps}; {len(left)} of {len(jobs)} jobs to run", flush=True)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(run_job, job, base, prepared, steps[job.arm], args.out) for job in left]
        for task in tasks:
            print(task.result(), flush=True)
    tallies = [[tally(arm, seed, manifest, base, args.out) for seed in seeds] for arm in ARMS]
    print(report(tallies, draws=DRAWS))


def recipe_of(arm: str, base: Params, *, steps: int, seed: int) -> Recipe:
    """Give an arm's recipe for so many steps."""
    sections: dict[str, Any] = {
        name: getattr(base, name).model_dump() for name in ("sampling", "augment", "loss", "train")
    }
    if arm == "incumbent":
        sections = {name: {**INCUMBENT[name]} for name in sections}
        sections["train"]["milestones"] = (max(1, round(FIRST_OF_LAST_FIFTH * steps)),)
    else:
        sections["train"]["warmup_steps"] = round(WARMUP * steps)
    never = {"validate_every": steps, "checkpoint_every": steps}
    sections["train"] |= {"steps": steps, "precision": "float32", **never}
    network = base.network.model_dump()
    return Recipe.of(Params.model_validate({"data": base.data, "network": network, "seed": seed, **sections}))


def train(job: Job, base: Params, manifest: Manifest, *, steps: int) -> tuple[Model, float]:
    """Train on one thread; give the model and the CPU seconds that it took."""
    torch.set_num_threads(1)
    recipe = recipe_of(job.arm, base, steps=steps, seed=job.seed)
    fold = manifest.folds[job.fold]
    regions = train_regions(fold, manifest, patch_zyx=recipe.sampling.patch_zyx)
    meta = ModelMeta(
        network=base.network,
        channels=("union",),
        mean=manifest.mean,
        std=manifest.std,
        voxel_nm=regions[0].volume.grid.voxel_nm,
        fold=fold.name,
    )
    ranks = Ranks(0, 1, torch.device("cpu"))
    with TemporaryDirectory() as scratch:
        begin = time.process_time()
        states = Path(scratch) / "states"
        fitted = fit(
            recipe, regions, meta=meta, ranks=ranks, states=states, validate=None, observer=_Alarms()
        )
        seconds = time.process_time() - begin
    network = build_network(base.network)
    network.load_state_dict(fitted.last)
    return Model(network.eval(), meta), seconds


def run_job(job: Job, base: Params, prepared: Path, steps: int, out: Path) -> str:
    """Train, predict the fold's band, write both; the JSON file says that the job is done."""
    manifest = read_manifest(prepared)
    model, seconds = train(job, base, manifest, steps=steps)
    region = _band(manifest, job.fold)
    path = out / f"{job.name}.h5"
    volume = manifest.volumes[region.volume]
    predictor = Predictor([model], shape_zyx=volume.shape_zyx, region=region.box, params=base.infer)
    read = predictor.to_read(region.box)
    with probabilities_writer(
        path,
        region.box.shape_zyx,
        channels=predictor.channels,
        grid=volume.grid.cropped(region.box.start_zyx),
    ) as written:
        written[...] = predictor(np.asarray(volume.image[read.slices]), region.box)
    with atomic_path(out / f"{job.name}.json") as temporary:
        temporary.write_text(json.dumps({"steps": steps, "cpu_seconds": round(seconds, 1)}) + "\n")
    return f"{job.name}: {steps} steps in {seconds:.0f} CPU s"


def tally(arm: str, seed: int, manifest: Manifest, base: Params, out: Path) -> Tally:
    """Count what an arm found with a seed, each band at the threshold that is best on the other bands."""
    n = len(manifest.folds)
    bands = [_read_band(Job(arm, fold, seed), manifest, out) for fold in range(n)]
    whole = [histogram_of(values, true != 0) for values, true in bands]
    tallies = []
    for fold, (values, true) in enumerate(bands):
        others = [whole[other] for other in range(n) if other != fold]
        threshold = sum(others[1:], start=others[0]).best_threshold()
        grid = manifest.volumes[_band(manifest, fold).volume].grid
        tallies.append(
            tally_band(values, true, threshold=threshold, voxel_nm=grid.voxel_nm, params=base.evaluate)
        )
    return Tally(
        np.concatenate([one.voxels for one in tallies]), np.concatenate([one.counts for one in tallies])
    )


def tally_band(
    values_zyx: NDArray[np.uint8],
    true_zyx: Instances,
    *,
    threshold: float,
    voxel_nm: Sequence[float],
    params: Any,
) -> Tally:
    """Count by tile in one band.

    Parameters
    ----------
    values_zyx : (Z, Y, X) array of uint8
        Union probability; 255 is 1.
    true_zyx : (Z, Y, X) array of unsigned int
        One id per synapse, from 1 without gaps.
    threshold : float
    voxel_nm : sequence of 3 float
    params : EvaluateParams
        Limits of decoding and matching.
    """
    n_tiles = math.prod(TILES_YX)
    predicted = decode_union(values_zyx, threshold=threshold, min_voxels=params.min_voxels)
    found_nm, true_nm = (centroids_of(one, pairs=False, voxel_nm=voxel_nm) for one in (predicted, true_zyx))
    found_tile, true_tile = (tile_of(one / voxel_nm, true_zyx.shape) for one in (found_nm, true_nm))
    tile = np.broadcast_to(tile_grid(true_zyx.shape), true_zyx.shape).copy()
    tile[true_zyx != 0] = true_tile[true_zyx[true_zyx != 0].astype(np.int64) - 1]
    each = [histogram_of(values_zyx, true_zyx != 0, mask_zyx=tile == one) for one in range(n_tiles)]
    overlaps = match_overlaps(overlaps_of(predicted, true_zyx), iou=params.iou)
    near = match_points(found_nm, true_nm, radius_nm=params.centroid_nm)
    voxels = np.array([[one.background, one.foreground] for one in each], np.float64)
    at = [one.at(threshold) for one in each]
    counts = np.stack(
        [
            np.array([(one.tp, one.fp, one.fn) for one in at], np.float64),
            *(_matched(matches, found_tile, true_tile, n_tiles) for matches in (overlaps, near)),
        ],
        axis=1,
    )
    return Tally(voxels, counts)


def tile_grid(shape_zyx: tuple[int, ...]) -> NDArray[np.intp]:
    """Number the tiles of a band: (Y, X).

    Examples
    --------
    >>> tile_grid((1, 4, 6))[::2, ::2].tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    y, x = (np.arange(n) * tiles // n for n, tiles in zip(shape_zyx[1:], TILES_YX, strict=True))
    grid: NDArray[np.intp] = y[:, None] * TILES_YX[1] + x
    return grid


def tile_of(points_zyx: Table, shape_zyx: tuple[int, ...]) -> NDArray[np.intp]:
    """Give the tile that each point (in voxels) lies in."""
    y, x = np.round(points_zyx[:, 1:]).astype(np.intp).T
    tiles: NDArray[np.intp] = tile_grid(shape_zyx)[y, x]
    return tiles


def scores_of(tally: Tally, weights: Table) -> Table:
    """Score tiles taken so many times each.

    Parameters
    ----------
    tally : Tally
    weights : (B, T) array

    Returns
    -------
    scores : (B, 4) array
        In the order of `SCORES`.
    """
    background, foreground = np.moveaxis(np.einsum("bt,tcp->bcp", weights, tally.voxels), 1, 0)
    tp, fp = (np.cumsum(one[:, ::-1], axis=1)[:, ::-1] for one in (foreground, background))
    precision = tp / np.maximum(tp + fp, 1)
    average = (precision * foreground).sum(axis=1) / np.maximum(tp[:, 0], 1)
    counts = np.einsum("bt,tks->bks", weights, tally.counts)
    f1 = 2 * counts[..., 0] / np.maximum(2 * counts[..., 0] + counts[..., 1] + counts[..., 2], 1)
    return np.concatenate([average[:, None], f1], axis=1)


def report(tallies: Sequence[Sequence[Tally]], *, draws: int) -> str:
    """Give a Markdown table: each arm's mean over seeds, the difference, and its 95 % bootstrap interval."""
    n_tiles = len(tallies[0][0].voxels)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n_tiles, np.full(n_tiles, 1 / n_tiles), size=draws).astype(np.float64)
    weights = np.concatenate([np.ones((1, n_tiles)), drawn])  # the first row is the tissue as it is
    per_seed = np.array([[scores_of(one, weights) for one in arm] for arm in tallies])
    ours, theirs = per_seed.mean(axis=1)
    low, high = np.percentile((ours - theirs)[1:], (2.5, 97.5), axis=0)
    lines = [
        f"| score ({per_seed.shape[1]} seeds, {n_tiles} tiles) | ours | incumbent's recipe | ahead by "
        "| 95 % interval | by seed |",
        "|---|---|---|---|---|---|",
    ]
    for n, name in enumerate(SCORES):
        seeds = ", ".join(f"{ahead:+.3f}" for ahead in per_seed[0, :, 0, n] - per_seed[1, :, 0, n])
        ahead = ours[0, n] - theirs[0, n]
        lines.append(
            f"| {name} | {ours[0, n]:.3f} | {theirs[0, n]:.3f} | {ahead:+.3f} "
            f"| {low[n]:+.3f} to {high[n]:+.3f} | {seeds} |"
        )
    return "\n".join(lines)


def _matched(
    matches: NDArray[np.intp], found_tile: NDArray[np.intp], true_tile: NDArray[np.intp], n_tiles: int
) -> Table:
    """Count matches and true ones without a match where the true one lies, false ones where they lie."""
    found, true = matches.T
    tp = np.bincount(true_tile[true], minlength=n_tiles)
    fp = np.bincount(np.delete(found_tile, found), minlength=n_tiles)
    fn = np.bincount(np.delete(true_tile, true), minlength=n_tiles)
    return np.stack([tp, fp, fn], axis=1).astype(np.float64)


def _steps(base: Params, manifest: Manifest, *, seconds: float, path: Path) -> dict[str, int]:
    """Give the steps that take `seconds` of CPU in each arm: measured in turns, and kept."""
    if path.exists():
        kept: dict[str, int] = json.loads(path.read_text())
        return kept
    costs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn, arm in product(range(ROUNDS), ARMS):
        few, many = (train(Job(arm, 0, turn), base, manifest, steps=n)[1] for n in (FEW, MANY))
        costs[arm].append((many - few) / (MANY - FEW))
    steps = {arm: max(10, round(seconds / median(cost))) for arm, cost in costs.items()}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(steps) + "\n")
    return steps


def _read_band(job: Job, manifest: Manifest, out: Path) -> tuple[NDArray[np.uint8], Instances]:
    region = _band(manifest, job.fold)
    sides = np.asarray(manifest.volumes[region.volume].sides[region.box.slices])
    if (sides == UNTRUSTED).any():
        raise ValueError(f"{region.name}: this script knows no untrusted voxels")
    return read_probabilities(out / f"{job.name}.h5").values_czyx[0], components_of(sides != 0)


def _band(manifest: Manifest, fold: int) -> Region:
    (region,) = manifest.folds[fold].test
    return region


def _sources(raw: Path) -> dict[str, Any]:
    return {f"data.train.{part}": str(raw / f"stack1_{part}.h5") for part in ("image", "label")}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Two training recipes on real EM for equal time.")
    parser.add_argument("--raw", type=Path, default=Path("data/raw"), help="what `synmlops import vnc` wrote")
    parser.add_argument("--out", type=Path, default=Path("vnc_recipes"), help="folder of finished jobs")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, of one thread each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
