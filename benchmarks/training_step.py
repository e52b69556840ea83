"""A training step on the incumbent's polarity network: this package's loop against plain PyTorch.

Both sides start from the same weights and take the same batches in turns, each in a process of its own, since
how memory is kept is a setting of the process; the loss curves have to agree.
`python benchmarks/training_step.py --plot curves.png` prints medians, the share of the machine's measured
matrix peak, where the time goes, and the greatest difference between the curves. On a machine with other work
on it, trust CPU seconds more than seconds.
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from incumbent_unet import PlainPlusUNet, plain_step
from step_profile import breakdown
from torch import Tensor

from synmlops.learning.allocator import keep_freed_memory
from synmlops.learning.checkpoint import ModelMeta
from synmlops.learning.distributed import Ranks, pick_device
from synmlops.learning.feed import Batch
from synmlops.learning.networks.kernels import kernels
from synmlops.learning.networks.report import gflop_per_megavoxel
from synmlops.learning.pytc_weights import from_pytc
from synmlops.learning.trainer import Recipe, Row, Silent, Trainer
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
    """One way to train, in a process of its own, and what was seen of it."""

    name: str
    turns: int
    pipe: Connection
    process: BaseProcess
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gibibytes: float = 0.0  # the most memory that the process held

    @classmethod
    def start(cls, name: str, kind: str, options: argparse.Namespace, *, turns: int) -> "Side":
        """Start the process, and wait until it is ready."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, kind, options), daemon=True)
        process.start()
        there.close()  # so that an end of the process ends the wait
        assert here.recv() == "ready"
        return cls(name, turns, here, process)

    def take_turn(self) -> None:
        """Have the process take a step, while all others wait."""
        self.pipe.send("step")
        seconds, cpu_seconds, loss, self.gibibytes = self.pipe.recv()
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)
        self.losses.append(loss)

    def finish(self) -> str:
        """End the process; give its table of where the time goes in a step."""
        self.pipe.send("profile")
        table: str = self.pipe.recv()
        self.process.join()
        return table

    @property
    def median(self) -> float:
        """Seconds of a step; the first, which warms up, is left out."""
        return statistics.median(self.seconds[1:])


def _work(pipe: Connection, kind: str, options: argparse.Namespace) -> None:
    """Take steps as told, in a process of a side."""
    torch.set_num_threads(options.threads)
    device = pick_device()
    step = _step_of(kind, options, device=device)
    batches = _batches(n=options.batch, patch_zyx=options.patch, device=device)
    pipe.send("ready")
    while pipe.recv() == "step":
        batch = next(batches)
        _wait()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(batch)
        _wait()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu, loss, most))
    pipe.send(breakdown(lambda: step(batch), device))


class _Curves(Silent):
    """Keeps the last loss that the trainer logs; a few steps may raise alarms."""

    loss = float("nan")

    def logged(self, step: int, row: Row) -> None:
        """Hear of a point of a curve."""
        self.loss = row["loss"]


def main() -> None:
    """Measure and print."""
    options = _parse()
    torch.set_num_threads(options.threads)
    device = pick_device()
    middle = {
        "cpu": ("the same, freed memory kept", "kept", min(options.steps, 4)),
        "cuda": ("the same, bf16 autocast", "amp", options.steps),
    }[device.type]
    named = [("plain float32 loop", "plain", options.steps), middle, ("synmlops", "synmlops", options.steps)]
    sides = [Side.start(name, kind, options, turns=turns) for name, kind, turns in named]
    peak = matrix_peak(device)
    for turn in range(options.steps):
        for side in sides:
            if turn < side.turns:
                side.take_turn()
        seconds = ", ".join(f"{side.name} {side.seconds[-1]:.2f} s" for side in sides if turn < side.turns)
        losses = f"losses {sides[0].losses[-1]:.5f} {sides[-1].losses[-1]:.5f}"
        print(f"step {turn + 1}: {seconds}; {losses}", flush=True)
    peak = max(peak, matrix_peak(device))
    _print_results(sides, options, peak=peak)
    _print_curves(sides[0], sides[-1])
    for side in sides:
        print(f"\nwhere the time goes, {side.name} (one profiled step):\n{side.finish()}")
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


def _step_of(kind: str, options: argparse.Namespace, *, device: torch.device) -> Callable[[Batch], float]:
    """Build what takes a step and gives the loss; all kinds start from the same weights."""
    torch.manual_seed(options.seed)
    network = PlainPlusUNet()
    if kind == "synmlops":
        return _ours(options, network.state_dict(), device=device)
    if kind == "kept":
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 as on a CPU
    step = plain_step(network.to(device), LEARNING_RATE, device=device, amp=kind == "amp")
    return lambda batch: float(step(batch.image[:, None], _targets(batch)))


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


def _batches(*, n: int, patch_zyx: Sequence[int], device: torch.device) -> Iterator[Batch]:
    """Make patches of noise with dark discs, each half pre and half post; the same in every process."""
    z, y, x = (torch.arange(size, dtype=torch.float32) for size in patch_zyx)
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
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
    heads = f"{'s/step':>8}{'patches/s':>11}{'ratio':>7}{'CPU s':>8}{'ratio':>7}{'of peak':>9}{'GiB':>6}"
    print(f"{'':32}{heads}")
    least = statistics.median(sides[0].cpu_seconds[1:])
    for side in sides:
        cpu = statistics.median(side.cpu_seconds[1:])
        ratio, share = sides[0].median / side.median, gflop / side.median / peak
        rate = options.batch / side.median
        row = f"{side.median:8.3f}{rate:11.3f}{ratio:7.2f}{cpu:8.2f}{least / cpu:7.2f}{share:9.0%}"
        print(f"{side.name:32}{row}{side.gibibytes:6.1f}")
    print("medians; arithmetic counted as direct convolution, of which Winograd does a quarter")


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
