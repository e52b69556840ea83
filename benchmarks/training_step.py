"""A training step on the incumbent's polarity network: this package's loop against plain PyTorch.

Both sides start from the same weights and take the same batches in turns, in one process; the loss curves
have to agree. `python benchmarks/training_step.py --plot curves.png` prints medians, the share of the
machine's measured matrix peak, where the time goes, and the greatest difference between the curves.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from incumbent_unet import PlainPlusUNet, plain_step
from step_profile import breakdown
from torch import Tensor

from synmlops.learning.allocator import keep_freed_memory
from synmlops.learning.checkpoint import ModelMeta
from synmlops.learning.distributed import Ranks
from synmlops.learning.feed import Batch
from synmlops.learning.networks.native import kernels
from synmlops.learning.networks.plus_unet import from_pytc
from synmlops.learning.networks.report import gflop_per_megavoxel
from synmlops.learning.trainer import Recipe, Row, Trainer
from synmlops.params import CHANNELS, AugmentParams, LossParams, NetworkParams, SamplingParams, TrainParams

LEARNING_RATE = 1e-3
NETWORK = NetworkParams(
    name="plus_unet",
    stem_zyx=(1, 1, 1),
    widths=(32, 64, 96, 128, 192),
    kernels=((1, 3, 3), (1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    pools=((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    activation="elu",
    squeeze_excite=True,
)
TRAIN = TrainParams(
    optimizer="adam",
    learning_rate=LEARNING_RATE,
    weight_decay=0.0,
    schedule="constant",
    warmup_steps=0,
    gradient_clip=1e9,  # the incumbent clips nothing
)


@dataclass
class Side:
    """One way to train, and what was seen of it."""

    name: str
    step: Callable[[Batch], float]  # gives the loss
    keeps_memory: bool
    turns: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def take_turn(self, batch: Batch) -> None:
        """Take a step and the time."""
        keep_freed_memory(self.keeps_memory)
        _wait()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.step(batch)
        _wait()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)
        self.losses.append(loss)

    @property
    def median(self) -> float:
        """Seconds of a step; the first, which warms up, is left out."""
        return statistics.median(self.seconds[1:])


class _Curves:
    """Keeps the last loss that the trainer logs."""

    loss = float("nan")

    def logged(self, step: int, row: Row) -> None:
        """Hear of a point of a curve."""
        self.loss = row["loss"]

    def saved(self, step: int) -> None:
        """Hear of a checkpoint; there is none."""

    def alarm(self, step: int, message: str) -> None:
        """Hear of collapsed channels, which a few steps may have."""


def main() -> None:
    """Measure and print."""
    options = _parse()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    patch_zyx = tuple(options.patch)
    batches = list(_batches(options.steps, n=options.batch, patch_zyx=patch_zyx, device=device))
    sides = _sides(options, device=device)
    peak = matrix_peak(device)
    for turn, batch in enumerate(batches):
        for side in sides:
            if turn < side.turns:
                side.take_turn(batch)
        seconds = ", ".join(f"{s.name} {s.seconds[-1]:.2f}" for s in sides if turn < s.turns)
        print(
            f"step {turn + 1}: {seconds} s; losses {sides[0].losses[-1]:.5f} {sides[-1].losses[-1]:.5f}",
            flush=True,
        )
    peak = max(peak, matrix_peak(device))
    _print_results(sides, options, peak=peak)
    _print_curves(sides[0], sides[-1])
    for side in (sides[0], sides[-1]):
        keep_freed_memory(side.keeps_memory)
        print(f"\nwhere the time goes, {side.name} (profiled step):")
        print(breakdown(lambda side=side: side.step(batches[0]), device))
    if options.plot:
        _plot(sides[0], sides[-1], options.plot)


def matrix_peak(device: torch.device) -> float:
    """Measure GFLOP/s of matrix products: float32 on a CPU, bf16 on a GPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        _wait()
        start = time.perf_counter()
        a @ a
        _wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _sides(options: argparse.Namespace, *, device: torch.device) -> list[Side]:
    torch.manual_seed(options.seed)
    weights = PlainPlusUNet().state_dict()

    def plain(amp: bool = False) -> Callable[[Batch], float]:
        network = PlainPlusUNet().to(device)
        network.load_state_dict(weights)
        step = plain_step(network, LEARNING_RATE, device=device, amp=amp)
        return lambda batch: float(step(batch.image[:, None], _targets(batch)))

    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        second = Side("the same, bf16 autocast", plain(amp=True), False, options.steps)
    else:
        second = Side("the same, freed memory kept", plain(), True, min(options.steps, 4))
    return [
        Side("plain float32 loop", plain(), False, options.steps),
        second,
        Side("synmlops", _ours(options, weights, device=device), True, options.steps),
    ]


def _ours(
    options: argparse.Namespace, weights: dict[str, Tensor], *, device: torch.device
) -> Callable[[Batch], float]:
    sampling = SamplingParams(patch_zyx=tuple(options.patch), batch_size=options.batch)
    recipe = Recipe(NETWORK, sampling, AugmentParams(), LossParams(), TRAIN, options.seed)
    meta = ModelMeta(network=NETWORK, channels=CHANNELS, mean=0.0, std=1.0, voxel_nm=(40.0, 8.0, 8.0))
    trainer = Trainer(recipe, meta=meta, ranks=Ranks(rank=0, n_ranks=1, device=device))
    trainer.network.load_state_dict(from_pytc(weights))
    curves = _Curves()

    def step(batch: Batch) -> float:
        trainer.progress.step += 1
        trainer.descend(batch)
        trainer.log(curves)
        return curves.loss

    return step


def _batches(steps: int, *, n: int, patch_zyx: Sequence[int], device: torch.device) -> Iterator[Batch]:
    """Make patches of noise with dark discs, each half pre and half post."""
    z, y, x = (torch.arange(size, dtype=torch.float32) for size in patch_zyx)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        sides = torch.zeros(n, *patch_zyx, dtype=torch.uint8)
        for patch in sides:
            for centre in torch.rand(12, 3, generator=generator) * torch.tensor(patch_zyx):
                dz, dy, dx = z[:, None, None] - centre[0], y[:, None] - centre[1], x - centre[2]
                disc = (4 * dz) ** 2 + dy**2 + dx**2 < 14**2
                patch[disc & (dx < 0)], patch[disc & (dx >= 0)] = 1, 2
        image = torch.randn(sides.shape, generator=generator) - (sides == 1).float() - 2 * (sides == 2)
        known = torch.ones(n, len(CHANNELS), dtype=torch.bool)
        yield Batch(image.to(device), sides.to(device), known.to(device), ())


def _targets(batch: Batch) -> Tensor:
    sides = batch.sides
    return torch.stack([sides == 1, sides == 2, sides > 0], dim=1).float()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print_results(sides: Sequence[Side], options: argparse.Namespace, *, peak: float) -> None:
    voxels = options.batch * options.patch[0] * options.patch[1] * options.patch[2]
    gflop = 3 * gflop_per_megavoxel(PlainPlusUNet(), tuple(options.patch)) * voxels / 1e6
    print(
        f"\nbatch {options.batch} of {options.patch}, {torch.get_num_threads()} threads, {gflop:.0f} GFLOP,"
    )
    print(f"matrix peak {peak:.0f} GFLOP/s; kernels: {kernels().reason or 'compiled'}")
    print(f"{'':32}{'s/step':>8}{'patches/s':>11}{'CPU s':>8}{'ratio':>7}{'of peak':>9}")
    for side in sides:
        cpu = statistics.median(side.cpu_seconds[1:])
        ratio, share = sides[0].median / side.median, gflop / side.median / peak
        rate = options.batch / side.median
        print(f"{side.name:32}{side.median:8.3f}{rate:11.3f}{cpu:8.2f}{ratio:7.2f}{share:9.0%}")
    print("ratio: of the medians; arithmetic counted as direct convolution, of which Winograd does a quarter")


def _print_curves(plain: Side, ours: Side) -> None:
    pairs = list(zip(plain.losses, ours.losses, strict=True))
    worst = max(abs(a - b) / a for a, b in pairs)
    print(f"loss {pairs[0][0]:.5f} to {pairs[-1][0]:.5f} and {pairs[0][1]:.5f} to {pairs[-1][1]:.5f};")
    print(f"greatest relative difference of the curves over {len(pairs)} steps: {worst:.1e}")


def _plot(plain: Side, ours: Side, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for side, style in ((plain, "-"), (ours, "--")):
        elapsed = torch.tensor(side.seconds).cumsum(0)
        by_step.plot(range(1, 1 + len(side.losses)), side.losses, style, label=side.name)
        by_time.plot(elapsed, side.losses, style, label=side.name)
    by_step.set(xlabel="step", ylabel="loss, same weights and batches")
    by_time.set(xlabel="seconds")
    by_step.legend()
    figure.savefig(path, dpi=120)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=15, help="turns, and points of the curves (default 15)")
    parser.add_argument("--batch", type=int, default=2, help="patches (default 2)")
    parser.add_argument("--patch", type=int, nargs=3, default=[8, 256, 256], metavar=("Z", "Y", "X"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write the loss curves as a picture")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: at least 2, since the first warms up")
    return options


if __name__ == "__main__":
    main()
