"""Volumes and params so small that a test of training takes seconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import (
    DataParams,
    InferParams,
    NetworkParams,
    Params,
    SamplingParams,
    TrainParams,
    VolumeSet,
    WindowParams,
)
from synmlops.volumes.prepared import Manifest
from synmlops.volumes.store import Grid, write_hdf5


@dataclass(frozen=True)
class Blobs:
    """A synthetic volume: synapses are a bright pre next to a dark post."""

    image: NDArray[Any]
    pairs: NDArray[np.uint16]  # pre 2n-1, post 2n

    def write(self, path: Path, **arrays: NDArray[Any]) -> Path:
        """Write the image and other arrays as HDF5 with voxels of 40 x 8 x 8 nm."""
        datasets = {"image": self.image, "label": self.pairs} | arrays
        write_hdf5(path, datasets, grid=Grid((40.0, 8.0, 8.0)))
        return path


def make_blobs(seed: int, *, shape: tuple[int, int, int] = (10, 48, 48), n: int = 6) -> Blobs:
    """Scatter synapses of 2 x 5 x 10 voxels over noise."""
    rng = np.random.default_rng(seed)
    image, pairs = rng.normal(128, 15, shape), np.zeros(shape, np.uint16)
    for site in range(1, n + 1):
        z, y, x = (
            int(rng.integers(0, size - extent)) for size, extent in zip(shape, (2, 5, 10), strict=True)
        )
        for side, grey in ((2 * site - 1, 60), (2 * site, -60)):
            piece = slice(z, z + 2), slice(y, y + 5), slice(x, x + 5)
            image[piece] += grey * (pairs[piece] == 0)
            pairs[piece][pairs[piece] == 0] = side
            x += 5
    return Blobs(image.clip(0, 255).astype(np.uint8), pairs)


def tiny_params(data: DataParams, **train: Any) -> Params:
    """Give params of a network that takes milliseconds."""
    window = InferParams(window_zyx=(4, 32, 32))
    return Params(
        seed=7,
        data=data,
        network=NetworkParams(
            stem_zyx=(1, 2, 2), widths=(4, 6), kernels=((1, 3, 3), (3, 3, 3)), pools=((1, 2, 2),)
        ),
        sampling=SamplingParams(patch_zyx=(4, 24, 24), batch_size=2, reject_below=20),
        train=TrainParams(
            **{
                "steps": 12,
                "learning_rate": 0.01,
                "warmup_steps": 2,
                "validate_every": 6,
                "checkpoint_every": 4,
                "precision": "float32",
                "validation": WindowParams(window_zyx=window.window_zyx),
            }
            | train
        ),
        infer=window,
    )


@dataclass(frozen=True)
class TinyProject:
    """Prepared blobs and the params they were prepared with."""

    prepared: Path
    manifest: Manifest
    params: Params


def pairs_in(path: Path) -> VolumeSet:
    """Name the image and label that `Blobs.write` wrote."""
    return VolumeSet(image=f"{path}::image", label=f"{path}::label", label_kind="pairs")
