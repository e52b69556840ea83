"""Peak resident memory and speed of `synmlops infer` and `synmlops decode` by size of the volume.

    python benchmarks/inference_memory.py --gigavoxels 0.25 1 4

The network is the cheapest there is, one weight for each channel, so that reading, quantising, writing and
decoding are what is measured. The volume is a Zarr of 256 sections with a few hundred synapses for each
quarter of a gigavoxel, tiled; its grey levels say what the network is to find. Each command runs in a process
of its own, whose greatest memory the system reports at its end.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from synmlops.blockwise.grid import BlockGrid
from synmlops.learning.checkpoint import ModelMeta, save_model
from synmlops.learning.networks.registry import build_network
from synmlops.params import CHANNELS, NetworkParams
from synmlops.volumes.prepared import Box
from synmlops.volumes.store import Grid
from synmlops.volumes.zarr import create_zarr

DEPTH = 256
TILE = (64, 512, 512)
TISSUE, PRE, POST = 100, 180, 230  # grey levels
GRID = Grid((40.0, 8.0, 8.0))
MODULE = '''
from torch import nn

def build(params):
    """Give logits that are linear in the grey level."""
    return nn.Conv3d(1, 3, 1)
'''


@dataclass(frozen=True)
class Ended:
    """What a command took."""

    seconds: float
    mebibytes: float


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigavoxels", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument(
        "--folder", type=Path, help="For the volumes, 4 bytes a voxel; default: a temporary one."
    )
    args = parser.parse_args()
    print("| gigavoxels | infer: MVox/s | MiB | decode: MVox/s | MiB |\n|---|---|---|---|---|")
    for size in args.gigavoxels:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            infer, decode, voxels = measure(Path(name), size)
        rates = [voxels / 1e6 / one.seconds for one in (infer, decode)]
        print(
            f"| {size:g} | {rates[0]:.1f} | {infer.mebibytes:.0f} "
            f"| {rates[1]:.1f} | {decode.mebibytes:.0f} |",
            flush=True,
        )


def measure(folder: Path, gigavoxels: float) -> tuple[Ended, Ended, int]:
    """Run both commands on a volume of so many voxels."""
    side = round((gigavoxels * 2**30 / DEPTH) ** 0.5 / TILE[1]) * TILE[1]
    shape = (DEPTH, side, side)
    make_volume(folder / "em.zarr", shape)
    make_model(folder)
    infer = run(
        folder,
        *("infer", "--image", folder / "em.zarr", "--model", folder / "model.safetensors"),
        *("--out", folder / "predicted", "--format", "zarr", "--gpus", "0"),
    )
    probabilities, decoded = folder / "predicted/em.zarr", folder / "decoded.zarr"
    decode = run(folder, "decode", probabilities, "--out", decoded, "--threshold", "0.5")
    return infer, decode, DEPTH * side * side


def run(folder: Path, *arguments: str | Path) -> Ended:
    """Run a command, and have the system tell its greatest memory."""
    began = time.monotonic()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "synmlops", *map(str, arguments), "--params", str(folder / "params.yaml")],
        os.environ,
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return Ended(time.monotonic() - began, usage.ru_maxrss / 1024)


def make_volume(path: Path, shape: tuple[int, int, int]) -> None:
    """Write a volume tiled with the same tissue."""
    writer = create_zarr(path, shape, np.uint8, shard=TILE, chunk=(16, 256, 256), grid=GRID)
    tile = make_tile()
    for block in BlockGrid(Box((0, 0, 0), shape), TILE):
        writer.write(block.write.slices, tile)


def make_tile() -> NDArray[np.uint8]:
    """Paint synapses, pre beside post, on noise."""
    rng = np.random.default_rng(0)
    tile = rng.integers(TISSUE - 20, TISSUE + 20, TILE, dtype=np.uint8)
    for z in range(4, TILE[0] - 8, 16):
        for y, x in rng.integers(20, TILE[1] - 60, (8, 2)):
            tile[z : z + 5, y : y + 24, x : x + 16] = PRE
            tile[z : z + 5, y : y + 24, x + 16 : x + 28] = POST
    return tile


def make_model(folder: Path) -> None:
    """Write the network, its weights and the params that go with it."""
    (folder / "linear_in_grey.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    params = NetworkParams(name="linear_in_grey:build")
    network = build_network(params)
    middle = (PRE + POST) / 2
    with torch.no_grad():
        network.weight.copy_(torch.tensor([-0.2, 0.2, 0.2]).reshape(3, 1, 1, 1, 1))
        network.bias.copy_(torch.tensor([0.2 * middle, -0.2 * middle, -0.2 * (TISSUE + PRE) / 2]))
    meta = ModelMeta(network=params, channels=CHANNELS, mean=0.0, std=1.0, voxel_nm=GRID.voxel_nm)
    save_model(folder / "model.safetensors", network.state_dict(), meta)
    tree = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    tree["network"]["name"] = "linear_in_grey:build"
    tree["infer"] |= {"window_zyx": [32, 256, 256], "overlap": 0.125}
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))


if __name__ == "__main__":
    main()
