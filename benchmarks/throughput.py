"""Megavoxels per second, whole volume in to uint8 out: `synmlops infer` against MONAI's sliding window.

    pip install --no-deps monai==1.6.1  # or the extra: pip install -e .[bench]
    python benchmarks/throughput.py --model polarity.safetensors

Both sides predict phantoms of 32 x 512 x 512 voxels with the same weights of the incumbent's polarity
network (plus U-Net, residual squeeze-excite, widths 32, 64, 96, 128, 192, group norm) from an HDF5 file into
an HDF5 file. MONAI's side is what the field runs: `sliding_window_inference`, windows of 8 x 256 x 256,
overlap 0.5, Gaussian blending, float32, the network in plain PyTorch. Ours is run with several overlaps; F1
says what they cost: of union voxels at the best threshold, of synapses (IoU 0.5) and of partners at that
threshold, each the mean of the phantoms. The sides take turns, each in a process of its own. With `--alone`
any model will do.

If the model file is not there, it is trained first, on the phantoms of params.yaml, for `--steps` steps.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from incumbent_unet import PlainPlusUNet
from numpy.typing import NDArray
from phantom_f1 import score
from training_step import NETWORK

from synmlops.learning.block_prediction import Source
from synmlops.learning.checkpoint import Model, ModelMeta, load_model, save_model
from synmlops.learning.distributed import Ranks, pick_device
from synmlops.learning.loop import Recipe, Silent, fit
from synmlops.learning.networks.registry import build_network
from synmlops.learning.networks.report import gflop_per_megavoxel
from synmlops.learning.pytc_weights import from_pytc
from synmlops.learning.sampling import train_regions
from synmlops.learning.volume_prediction import Engine, predict_volume
from synmlops.params import CHANNELS, InferParams, Params, PhantomParams, load_params
from synmlops.stages.prepare import run as run_prepare
from synmlops.synapses.voxels import voxel_histograms
from synmlops.volumes.phantom import Phantom, make_phantom
from synmlops.volumes.prepared import Box
from synmlops.volumes.preparing import sides_of
from synmlops.volumes.probabilities import probabilities_writer, read_probabilities
from synmlops.volumes.store import open_volume, write_hdf5

PARAMS = Path(__file__).parents[1] / "params.yaml"
WINDOW = (8, 256, 256)
OURS = [f"{z},256,256:{overlap}" for z in (8, 16, 32) for overlap in (0, 0.125, 0.25)]


@dataclass
class Side:
    """One way to predict, and what was seen of it."""

    name: str
    run: Callable[[Path, Path, Path], None]  # model, image, output
    seconds: list[list[float]]  # of each phantom, a turn each
    mebibytes: float = 0.0
    scores: list[Sequence[float]] = field(default_factory=list)  # of each phantom


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("polarity.safetensors"))
    parser.add_argument("--steps", type=int, default=400, help="Of the training, if the model is not there.")
    parser.add_argument("--batch-size", type=int, default=2, help="Of the training: patches.")
    parser.add_argument("--ours", nargs="+", default=OURS, help="Windows z,y,x:overlap of our side.")
    parser.add_argument("--alone", action="store_true", help="Leave MONAI out.")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, nargs="+", default=[101], help="Of the phantoms.")
    parser.add_argument("--size", default="32,512,512", help="Of a phantom: z,y,x.")
    args = parser.parse_args()
    if not args.model.exists():
        train(args.model, args.steps, args.batch_size)
    model = load_model(args.model)
    params = PhantomParams(size_zyx=tuple(map(int, args.size.split(",")))).model_dump(
        exclude={"train_seeds", "validation_seeds", "test_seeds"}
    )
    sides = _sides(args)
    for at, seed in enumerate(args.seed):
        made = make_phantom(seed=seed, **params)
        with tempfile.TemporaryDirectory() as folder:
            image, out = Path(folder) / "em.h5", Path(folder) / "out.h5"
            write_hdf5(image, {"main": made.image}, grid=made.grid)
            for turn in range(args.turns):
                for side in sides:
                    out.unlink(missing_ok=True)
                    _take_turn(side, args.model, image, out, phantom=at)
                    if turn == 0:
                        side.scores.append(_scores(read_probabilities(out).values_czyx, made))
    print(_table(sides, made.image.size * len(args.seed) / 1e6))
    gflop = gflop_per_megavoxel(build_network(model.meta.network), patch_zyx=WINDOW)
    print(f"\n{gflop:.0f} GFLOP a megavoxel, {torch.get_num_threads()} threads")


def _sides(args: argparse.Namespace) -> list[Side]:
    sides = [] if args.alone else [Side("MONAI 8,256,256:0.5", monai, [[] for _ in args.seed])]
    for given in args.ours:
        window, _, overlap = given.partition(":")
        params = InferParams(window_zyx=tuple(map(int, window.split(","))), overlap=float(overlap))
        sides.append(Side(f"synmlops {given}", Ours(params), [[] for _ in args.seed]))
    return sides


@dataclass(frozen=True)
class Ours:
    """Our side with a window and an overlap."""

    params: InferParams

    def __call__(self, model: Path, image: Path, out: Path) -> None:
        """Predict as `synmlops infer` does."""
        with open_volume(image) as volume:
            assert volume.grid is not None
            source = Source(str(image), Box((0, 0, 0), volume.shape), volume.grid)
        assert predict_volume(source, [model], out, params=self.params, engine=Engine())


def monai(model: Path, image: Path, out: Path) -> None:
    """Predict as MONAI's documentation does."""
    from monai.inferers import sliding_window_inference

    device = pick_device()
    loaded = load_model(model)
    network = plain_network(loaded).to(device)
    with open_volume(image) as volume:
        grid, voxels = volume.grid, volume.read()
    assert grid is not None
    normal = (torch.from_numpy(voxels).float() - loaded.meta.mean) / loaded.meta.std
    with torch.inference_mode():
        logits = sliding_window_inference(
            normal[None, None].to(device), WINDOW, 1, network, overlap=0.5, mode="gaussian"
        )
        levels = (torch.sigmoid(logits[0]) * 255).round().to(torch.uint8).cpu().numpy()
    with probabilities_writer(out, voxels.shape, channels=CHANNELS, grid=grid) as written:
        written[...] = levels


def plain_network(model: Model) -> torch.nn.Module:
    """Give the incumbent's network in plain PyTorch with our weights."""
    plain = PlainPlusUNet()
    names = plain.state_dict()
    ours = model.network.state_dict()
    plain.load_state_dict({key: ours[name] for key, name in zip(names, from_pytc(names), strict=True)})
    return plain.eval()


def train(path: Path, steps: int, batch_size: int) -> None:
    """Train the polarity network on the phantoms of params.yaml."""
    base = load_params(PARAMS)
    with tempfile.TemporaryDirectory() as folder:
        manifest, _ = run_prepare(base.data, out=Path(folder) / "prepared")
        recipe = _recipe(base, steps, batch_size)
        regions = train_regions(manifest.folds[0], manifest, patch_zyx=recipe.sampling.patch_zyx)
        meta = ModelMeta(
            network=NETWORK,
            channels=CHANNELS,
            mean=manifest.mean,
            std=manifest.std,
            voxel_nm=regions[0].volume.grid.voxel_nm,
        )
        ranks = Ranks(0, 1, pick_device())
        fitted = fit(
            recipe,
            regions,
            meta=meta,
            ranks=ranks,
            states=Path(folder) / "states",
            validate=None,
            observer=Silent(),
        )
    save_model(path, fitted.last, meta)


def _recipe(base: Params, steps: int, batch_size: int) -> Recipe:
    tree = base.model_dump()
    tree["network"] = NETWORK.model_dump()
    tree["infer"]["window_zyx"] = tree["train"]["validation"]["window_zyx"] = WINDOW
    tree["sampling"] |= {"patch_zyx": (8, 128, 128), "batch_size": batch_size}
    tree["train"] |= {"steps": steps, "learning_rate": 0.002, "warmup_steps": steps // 10}
    tree["train"] |= {"validate_every": steps, "checkpoint_every": steps}
    return Recipe.of(Params.model_validate(tree))


def _take_turn(side: Side, model: Path, image: Path, out: Path, *, phantom: int) -> None:
    """Run a side in a process of its own, whose greatest memory is its own too."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_clocked, args=(side.run, model, image, out, theirs))
    process.start()
    theirs.close()
    seconds, mebibytes = ours.recv()
    process.join()
    side.seconds[phantom].append(seconds)
    side.mebibytes = max(side.mebibytes, mebibytes)
    print(f"{side.name}: {seconds:.1f} s, {mebibytes:.0f} MiB", flush=True)


def _clocked(run: Callable[..., None], model: Path, image: Path, out: Path, told: Any) -> None:
    began = time.perf_counter()
    run(model, image, out)
    seconds = time.perf_counter() - began
    # not ru_maxrss, which a process takes over from the one that started it
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    told.send((seconds, int(status["VmHWM"].split()[0]) / 1024))


def _table(sides: list[Side], megavoxels: float) -> str:
    lines = [
        "| side | s | MVox/s | times the first | MiB | voxel F1 | synapse F1 | partner F1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    took = [sum(map(statistics.median, side.seconds)) for side in sides]
    for side, seconds in zip(sides, took, strict=True):
        lines.append(
            f"| {side.name} | {seconds:.1f} | {megavoxels / seconds:.3f} "
            f"| {took[0] / seconds:.1f} | {side.mebibytes:.0f} | "
            + " | ".join(f"{np.mean(scores):.3f}" for scores in zip(*side.scores, strict=True))
            + " |"
        )
    return "\n".join(lines)


def _scores(probabilities: NDArray[np.uint8], made: Phantom) -> tuple[float, float, float]:
    """Give F1 of union voxels at their best threshold, of synapses and of partners at that."""
    sides = sides_of(made.labels, "pairs")
    histograms = voxel_histograms(probabilities, sides, names=CHANNELS, known=CHANNELS)
    threshold = histograms["union"].best_threshold()
    found = score(probabilities, made, threshold=threshold, params=load_params(PARAMS).evaluate).flat()
    return found["voxel_union_f1"], found["detection_f1"], found["partner_neurons_f1"]


if __name__ == "__main__":
    main()
