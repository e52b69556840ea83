"""Inference on a GPU: megavoxels per second of a gigavoxel, what the GPU does meanwhile, and MONAI's side.

    pip install --no-deps monai==1.6.1  # or the extra: pip install -e .[bench]
    python benchmarks/gpu_inference.py --model polarity.safetensors light.safetensors

The volume is a Zarr tiled with a phantom. Ours is `synmlops infer`, whole volume in to uint8 out, by window
and overlap: the rate of the whole call, that between its first and its last block, and the share of that time
in which the GPU was busy, as the driver tells. MONAI's side is what the field runs, as in `throughput.py`,
with the first model, on one tile from memory to memory: what it would read and write costs it nothing here.
F1 is that of union voxels of one tile, at the best threshold.

Beside the rates stand the device's ceilings, measured: a matrix product in bf16, a copy, and the model's
convolutions alone, each timed on tensors that are ready for it.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from throughput import WINDOW, plain_network
from torch import Tensor, nn

from synmlops.blockwise.grid import BlockGrid
from synmlops.learning.block_prediction import Source
from synmlops.learning.checkpoint import Model, load_model
from synmlops.learning.networks.fast_conv import convolve
from synmlops.learning.networks.report import gflop_per_megavoxel
from synmlops.learning.replay import Replay
from synmlops.learning.volume_prediction import Advance, Engine, predict_volume
from synmlops.params import CHANNELS, InferParams, PhantomParams
from synmlops.synapses.voxels import voxel_histograms
from synmlops.volumes.phantom import Phantom, make_phantom
from synmlops.volumes.prepared import Box
from synmlops.volumes.preparing import sides_of
from synmlops.volumes.probabilities import open_probabilities
from synmlops.volumes.store import open_volume
from synmlops.volumes.zarr import create_zarr

TILE = (32, 512, 512)
SEED = 101
OURS = ["8,256,256:0.25", "16,512,512:0.125"]
FORWARD = (8, 256, 256)  # of the convolutions alone, 8 at a time


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--tiles", type=int, nargs=3, default=(4, 4, 8), help="Along z, y, x; 2**23 voxels each."
    )
    parser.add_argument("--ours", nargs="+", default=OURS, help="Windows z,y,x:overlap of our side.")
    parser.add_argument("--alone", action="store_true", help="Leave MONAI out.")
    parser.add_argument("--folder", type=Path, help="For the volumes; default: a temporary one.")
    args = parser.parse_args()
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    ceilings(device)
    options = PhantomParams(size_zyx=TILE).model_dump(
        exclude={"train_seeds", "validation_seeds", "test_seeds"}
    )
    made = make_phantom(seed=SEED, **options)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        image = Path(folder) / "em.zarr"
        shape = tuple(n * tile for n, tile in zip(args.tiles, TILE, strict=True))
        _write(image, made, shape)
        print(f"\n{prod(shape) / 1e9:.2f} gigavoxels\n")
        print("| side | s | MVox/s | from first to last block | GPU busy | TFLOP/s | voxel F1 |")
        print("|---|---|---|---|---|---|---|")
        if not args.alone:
            print(monai(args.model[0], made, device), flush=True)
        for path in args.model:
            for given in args.ours:
                print(ours(path, given, image, shape, made, Path(folder)), flush=True)
    for path in args.model:
        print(f"\n{path.stem}: {forward(load_model(path, device=device))}")


def ceilings(device: torch.device) -> None:
    """Print what the device does at best."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    print(f"matrix product in bf16: {2 * 8192**3 / clocked(lambda: a @ a) / 1e12:.0f} TFLOP/s")
    b = torch.randn(2**29, device=device)
    c = torch.empty_like(b)
    print(f"copy: {2 * b.nbytes / clocked(lambda: c.copy_(b)) / 1e12:.2f} TB/s, read and written")


def clocked(work: Callable[[], object], times: int = 10) -> float:
    """Give the median of the seconds that work takes on the GPU."""
    seconds = []
    for turn in range(times + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        if turn >= 3:
            seconds.append(began.elapsed_time(ended) / 1000)
    return statistics.median(seconds)


@dataclass
class Busy:
    """Asks the driver in which share of the time a kernel ran, ten times a second."""

    shares: list[tuple[float, int]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Busy":
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.1):
            self.shares.append((time.monotonic(), torch.cuda.utilization()))

    def share(self, began: float, ended: float) -> float:
        """Give the share between two times, the driver's last answer counting for the time before it."""
        inside = [share for at, share in self.shares if began + 0.2 < at < ended]
        return statistics.mean(inside) / 100 if inside else float("nan")


def ours(path: Path, given: str, image: Path, shape: tuple[int, ...], made: Phantom, folder: Path) -> str:
    """Predict the whole volume."""
    window, _, overlap = given.partition(":")
    z, y, x = map(int, window.split(","))
    params = InferParams(window_zyx=(z, y, x), overlap=float(overlap))
    with open_volume(image) as volume:
        assert volume.grid is not None
        source = Source(str(image), Box((0, 0, 0), (shape[0], shape[1], shape[2])), volume.grid)
    times: list[tuple[float, float]] = []

    def told(advance: Advance) -> None:
        times.append((time.monotonic(), advance.megavoxels))

    out = folder / f"{path.stem}_{given.replace(',', '_').replace(':', '_')}.zarr"
    with Busy() as busy:
        began = time.monotonic()
        assert predict_volume(source, [path], out, params=params, engine=Engine(gpus=1), told=told)
        seconds = time.monotonic() - began
    (first, before), (last, after) = times[0], times[-1]
    rate = (after - before) / (last - first)
    seen = prod(z_ / (z_ - 2 * round(z_ * float(overlap) / 2)) for z_ in (z, y, x))
    gflop = gflop_per_megavoxel(load_model(path).network, patch_zyx=(z, y, x)) * seen
    with open_probabilities(out) as volume:
        tile = np.asarray(volume[:, TILE[0] : 2 * TILE[0], TILE[1] : 2 * TILE[1], TILE[2] : 2 * TILE[2]])
    return (
        f"| synmlops {path.stem} {given} | {seconds:.1f} | {prod(shape) / 1e6 / seconds:.1f} | {rate:.1f} "
        f"| {busy.share(first, last):.0%} | {gflop * rate / 1000:.0f} | {f1(tile, made):.3f} |"
    )


def monai(path: Path, made: Phantom, device: torch.device) -> str:
    """Predict a tile as MONAI's documentation does."""
    from monai.inferers import sliding_window_inference

    loaded = load_model(path)
    network = plain_network(loaded).to(device)
    levels: list[NDArray[np.uint8]] = []

    def predict() -> None:
        normal = (torch.from_numpy(made.image).float() - loaded.meta.mean) / loaded.meta.std
        with torch.inference_mode():
            logits = sliding_window_inference(
                normal[None, None].to(device), WINDOW, 1, network, overlap=0.5, mode="gaussian"
            )
            levels[:] = [(torch.sigmoid(logits[0]) * 255).round().to(torch.uint8).cpu().numpy()]

    seconds = clocked(predict, times=3)
    return (
        f"| MONAI {path.stem} 8,256,256:0.5 | {seconds:.1f} | {prod(TILE) / 1e6 / seconds:.1f} | - | - | - "
        f"| {f1(levels[0], made):.3f} |"
    )


def f1(levels: NDArray[np.uint8], made: Phantom) -> float:
    """Score the union voxels of a tile at their best threshold."""
    sides = sides_of(made.labels, "pairs")
    histograms = voxel_histograms(levels, sides, names=CHANNELS, known=CHANNELS)
    union = histograms["union"]
    return union.at(union.best_threshold()).f1


def forward(model: Model) -> str:
    """Time the network alone as inference runs it, and the convolutions that it is made of."""
    network, device = model.network, torch.device("cuda")
    image = torch.randn(8, 1, *FORWARD, device=device)
    shapes: list[tuple[Tensor, nn.Conv3d]] = []

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Conv3d)
        shapes.append((inputs[0], module))

    hooks = [m.register_forward_hook(seen) for m in network.modules() if isinstance(m, nn.Conv3d)]
    replay = Replay(network, "bf16")
    replay(image)
    for hook in hooks:
        hook.remove()
    whole, megavoxels = clocked(lambda: replay(image)), image.numel() / 1e6
    alone = 0.0
    with torch.inference_mode():
        for given, module in shapes:
            ready = torch.randn_like(given, dtype=torch.bfloat16)
            ready = ready.contiguous(memory_format=torch.channels_last_3d)
            weight = module.weight.bfloat16()
            padding = [size // 2 if module.stride != module.kernel_size else 0 for size in module.kernel_size]
            alone += clocked(
                lambda ready=ready, weight=weight, module=module, padding=padding: convolve(
                    ready, weight, None, module.stride, padding, module.groups
                ),
                times=5,
            )
    gflop = gflop_per_megavoxel(network, patch_zyx=FORWARD)
    return (
        f"{gflop:.0f} GFLOP a megavoxel; forward {megavoxels / whole:.0f} MVox/s, "
        f"{gflop * megavoxels / whole / 1000:.0f} TFLOP/s; its convolutions alone "
        f"{megavoxels / alone:.0f} MVox/s, {gflop * megavoxels / alone / 1000:.0f} TFLOP/s"
    )


def _write(path: Path, made: Phantom, shape: tuple[int, ...]) -> None:
    writer = create_zarr(path, shape, np.uint8, shard=TILE, chunk=(32, 128, 128), grid=made.grid)
    for block in BlockGrid(Box((0, 0, 0), (shape[0], shape[1], shape[2])), TILE):
        writer.write(block.write.slices, made.image)


if __name__ == "__main__":
    main()
