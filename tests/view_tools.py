"""A painted volume to look at, the command that shows it, and what it serves."""

import io
import json
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synmlops.synapses.partners import partners_of
from synmlops.view.scene import Sources
from synmlops.volumes.probabilities import probabilities_writer
from synmlops.volumes.store import Grid, write_hdf5
from synmlops.volumes.table import write_table

GRID = Grid((40.0, 8.0, 8.0), (80.0, 16.0, 24.0))
SHAPE = (12, 96, 112)  # z y x, no two alike
CORNER_XYZ = [3.0, 2.0, 2.0]  # the offset in voxels


@dataclass(frozen=True, eq=False)
class Files:
    """A painted volume with two synapses, the second one more confident."""

    folder: Path
    image: NDArray[np.uint8]
    instances: NDArray[np.uint16]

    @property
    def sources(self) -> Sources:
        names = ("image.h5", "probabilities.h5", "instances.h5", "partners.parquet", "neurons.h5")
        image, probabilities, instances, partners, neurons = (self.folder / name for name in names)
        return Sources(str(image), probabilities, str(instances), partners, str(neurons))

    @property
    def options(self) -> list[str]:
        fields = ("image", "probabilities", "instances", "partners", "neurons")
        return [word for name in fields for word in (f"--{name}", str(getattr(self.sources, name)))]


def paint(folder: Path) -> Files:
    """Write the painted volume and all that is known of it."""
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random(SHAPE), (0, 2, 2))
    image = ((image - image.min()) / np.ptp(image) * 255).astype(np.uint8)
    instances = np.zeros(SHAPE, np.uint16)
    for site, (z, y, x) in ((1, (2, 20, 20)), (2, (6, 50, 60))):
        instances[z : z + 4, y : y + 12, x : x + 20] = 2 * site - 1
        instances[z : z + 4, y + 12 : y + 24, x : x + 20] = 2 * site
    certain = np.where(instances > 2, 240, 180)
    sides = [instances % 2 == 1, (instances > 0) & (instances % 2 == 0), instances > 0]
    values = np.stack([certain * side for side in sides]).astype(np.uint8)
    write_hdf5(folder / "image.h5", {"main": image}, grid=GRID, compression="gzip")
    write_hdf5(folder / "instances.h5", {"main": instances}, grid=GRID, attrs={"label_kind": "pairs"})
    write_hdf5(folder / "neurons.h5", {"main": instances.astype(np.int64)}, grid=None)
    with probabilities_writer(
        folder / "probabilities.h5", SHAPE, channels=("pre", "post", "union"), grid=GRID
    ) as data:
        data[...] = values
    table = partners_of(
        instances, voxel_nm=GRID.voxel_nm, offset_nm=GRID.offset_nm, probabilities_czyx=values
    )
    write_table(table, folder / "partners.parquet")
    return Files(folder, image, instances)


@contextmanager
def viewing(*options: str, end_by: int = signal.SIGTERM) -> Iterator[tuple[str, int]]:
    """Run the command; give URL and process id. It must end in order."""
    command = [sys.executable, "-m", "synmlops", "view", "--no-browser", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        else:
            raise AssertionError("".join(said))
        yield next(line.strip() for line in said if line.startswith("http")), process.pid
        process.send_signal(end_by)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def state_of(url: str) -> dict[str, Any]:
    """Give the state as the page is told it."""
    root, _, token = url.rstrip("/").rpartition("/v/")
    with urlopen(f"{root}/events/{token}?c=test&gc=&gs=", timeout=20) as events:
        for line in events:
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("k") == "s":
                state: dict[str, Any] = message["s"]
                return state
    raise AssertionError("no state came")


def layer_of(state: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer for layer in state["layers"] if layer["name"] == name)


def address(url: str, layer: dict[str, Any], kind: str) -> str:
    """Give the start of the address of a layer's data."""
    key = layer["source"][0]["url"].removeprefix("python://volume/")
    return f"{url.partition('/v/')[0]}/neuroglancer/{kind}/{key}"


def voxels_of(
    url: str, layer: dict[str, Any], start: tuple[int, ...], stop: tuple[int, ...], scale: str = "1,1,1"
) -> NDArray[Any]:
    corners = "/".join(",".join(map(str, corner)) for corner in (start, stop))
    with urlopen(f"{address(url, layer, 'npz')}/{scale}/{corners}", timeout=20) as answer:
        voxels: NDArray[Any] = np.load(io.BytesIO(zlib.decompress(answer.read())))
    return voxels
