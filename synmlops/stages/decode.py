"""The decode command: probabilities of any size to instances, partner table and edges, block by block."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.blockwise.grid import BlockGrid
from synmlops.layout import WHOLE
from synmlops.params import CHANNELS, EvaluateParams, SynmlopsError
from synmlops.progress import track
from synmlops.synapses.decoding import SharedTarget, Target, decode_blocks, passes_of
from synmlops.synapses.pytc_decoding import Scaled, scaled_shape
from synmlops.volumes.files import atomic_folder, atomic_path
from synmlops.volumes.prepared import Box, box_within
from synmlops.volumes.probabilities import open_probabilities
from synmlops.volumes.store import Grid, hdf5_writer, open_volume
from synmlops.volumes.table import edges_of, write_frame, write_table
from synmlops.volumes.zarr import create_zarr

BLOCK_ZYX = (64, 512, 512)
"""Read and held at once by each process: three channels of it are 50 MB."""

UNSCALED = (1.0, 1.0, 1.0)
_CHUNK_ZYX = (16, 128, 128)  # of a Zarr: what a viewer reads for one look
_FALLBACK = 0.5


@dataclass(frozen=True)
class Threshold:
    """At which probability a volume is decoded, and why there."""

    value: float
    source: str


@dataclass(frozen=True)
class Written:
    """What a decoding wrote."""

    n_sites: int
    n_partners: int | None  # None without sides
    n_edges: int | None  # None without neurons
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """How much was found, in a line."""
        counts = {"sites": self.n_sites, "partners": self.n_partners, "edges": self.n_edges}
        return ", ".join(f"{n} {name}" for name, n in counts.items() if n is not None)


def choose_threshold(
    given: float | None, *, params: EvaluateParams, operating_point: Path, fold: str = WHOLE
) -> Threshold:
    """Settle the threshold: the one given, that of the params, that which evaluate chose, or 0.5.

    Parameters
    ----------
    given : float or None
    params : EvaluateParams
    operating_point : Path
        What evaluate wrote; it need not be there.
    fold : str
        Of a cross-validation.

    Raises
    ------
    SynmlopsError
        If it is not within 0 to 1, or the file is broken or lacks the fold.
    """
    if given is not None:
        if not 0 <= given <= 1:
            raise SynmlopsError(f"--threshold {given}: must be from 0 to 1, a probability")
        return Threshold(given, "--threshold")
    if params.threshold != "auto":
        return Threshold(params.threshold, "evaluate.threshold")
    if not operating_point.exists():
        return Threshold(_FALLBACK, f"there is no {operating_point}; --threshold sets another")
    try:
        points = json.loads(operating_point.read_text())
        value = points[fold]["threshold"]
        if isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"threshold {value!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SynmlopsError(
            f"{operating_point}: says no threshold from 0 to 1 for fold {fold} ({error}); "
            "run `synmlops evaluate`, or give --threshold"
        ) from error
    return Threshold(float(value), str(operating_point))


def run(
    probabilities: Path,
    *,
    out: Path,
    params: EvaluateParams,
    threshold: float,
    neurons: str | None = None,
    roi: Box | None = None,
    block_zyx: tuple[int, int, int] = BLOCK_ZYX,
    processes: int = 1,
    suffix: str | None = None,
) -> Written:
    """Decode probabilities and write OUT/instances, OUT/partners and OUT/edges.

    Parameters
    ----------
    probabilities : Path
        What infer wrote: HDF5 or Zarr.
    out : Path
        Folder; made if missing. Files of the same names are replaced, each once it is complete.
    params : EvaluateParams
    threshold : float
    neurons : str, optional
        Volume of neuron ids on the same voxels.
    roi : Box, optional
        What of the volume is decoded. Instances have its shape, and lie where it does in nm; voxels of the
        table are those of the volume.
    block_zyx : tuple of int
        Voxels read at once by each process.
    processes : int
    suffix : str, optional
        Of the instances: `.h5` or `.zarr`, of which a block is a shard; by default HDF5 for one process, Zarr
        for several.

    Raises
    ------
    SynmlopsError
        If a file cannot be read or written, ends early, the volumes do not fit together, or `roi` leaves
        them.
    """
    with open_probabilities(probabilities) as volume:
        has_sides = _knows_sides(probabilities, volume.attrs["channels"])
        grid, name, identity = volume.grid, volume.name, volume.identity()
        shape = volume.shape[1], volume.shape[2], volume.shape[3]
    scale = params.polarity.scale_zyx if params.rule == "polarity" else UNSCALED
    suffix = suffix or (".h5" if processes == 1 or scale != UNSCALED else ".zarr")
    assert grid is not None  # else it was refused
    blocks = BlockGrid(box_within(roi, shape, name), block_zyx)
    _refuse_scale(scale, blocks.region.shape_zyx, suffix)
    instances = out / f"instances{suffix}"
    kind = "pairs" if has_sides else "union"
    if params.rule == "polarity" and params.polarity.semantic:
        kind = "semantic"
    with (
        _instances(instances, blocks, grid, kind=kind, scale_zyx=scale) as target,
        track("decode", passes_of(params) * len(blocks)) as report,
    ):
        decoding = decode_blocks(
            partial(open_volume, name, ndim=4),
            blocks=blocks,
            grid=grid,
            params=params,
            threshold=threshold,
            out=target,
            neurons=None if neurons is None else _neurons(neurons, shape),
            workers=processes,
            scratch=out,
            inputs=identity,
            report=report,
        )
    files, notes, n_edges = [instances], [], None
    if kind == "semantic":
        notes.append("evaluate.polarity.semantic: pre is 1 and post is 2 throughout, without partners")
    elif decoding.table is None:
        notes.append(f"{probabilities} holds the union alone: instances have one id each, and no partners")
    if scale != UNSCALED:
        notes.append(f"{instances} is scaled by {list(scale)}; voxels of the table are those of {name}")
    if decoding.table is not None:
        files += _write_both(decoding.table, out / "partners", write_table)
    if decoding.table is not None and neurons is not None:
        edges = edges_of(decoding.table)
        files += _write_both(edges, out / "edges", write_frame)
        n_edges = len(edges)
    n_partners = None if decoding.table is None else len(decoding.table)
    return Written(decoding.n_sites, n_partners, n_edges, tuple(files), tuple(notes))


def _refuse_scale(scale: tuple[float, float, float], shape: tuple[int, int, int], suffix: str) -> None:
    if scale == UNSCALED:
        return
    if min(scaled_shape(shape, scale)) < 1:
        raise SynmlopsError(
            f"evaluate.polarity.scale_zyx: {list(scale)} leaves no voxel of {shape}; use greater factors"
        )
    if suffix != ".h5":
        raise SynmlopsError(
            f"--format {suffix[1:]}: instances at the scale {list(scale)} do not fill whole shards; use "
            "--format h5, or evaluate.polarity.scale_zyx: [1.0, 1.0, 1.0]"
        )


def _knows_sides(path: Path, channels: list[str]) -> bool:
    if tuple(channels) == CHANNELS:
        return True
    if tuple(channels) == CHANNELS[-1:]:
        return False
    raise SynmlopsError(
        f"{path}: holds the channels {', '.join(channels)}; decoding needs {', '.join(CHANNELS)}, or "
        f"{CHANNELS[-1]} alone"
    )


def _neurons(source: str, shape: tuple[int, int, int]) -> Callable[[], Any]:
    with open_volume(source) as volume:
        if volume.dtype.kind not in "ui":
            raise SynmlopsError(f"{volume.name}: holds {volume.dtype}; neuron ids are whole numbers")
        if volume.shape != shape:
            raise SynmlopsError(
                f"{volume.name}: has the shape {volume.shape}, the probabilities {shape}; give the "
                "segmentation of the same volume at the same voxel size"
            )
        return partial(open_volume, volume.name)


@dataclass(frozen=True, eq=False)
class _Moved:
    """Takes ids by regions of the volume for what holds a part of it."""

    target: Target
    start_zyx: tuple[int, int, int]

    def __setitem__(self, region: tuple[slice, slice, slice], ids: NDArray[Any], /) -> None:
        self.target[_counted_from(self.start_zyx, region)] = ids


@dataclass(frozen=True, eq=False)
class _MovedShared:
    """The same for what several processes write."""

    target: SharedTarget
    start_zyx: tuple[int, int, int]

    def write(self, region: tuple[slice, slice, slice], array: NDArray[Any]) -> None:
        self.target.write(_counted_from(self.start_zyx, region), array)


def _counted_from(
    start_zyx: tuple[int, int, int], region: tuple[slice, slice, slice]
) -> tuple[slice, slice, slice]:
    z, y, x = (slice(s.start - at, s.stop - at) for s, at in zip(region, start_zyx, strict=True))
    return z, y, x


@contextmanager
def _instances(
    path: Path,
    blocks: BlockGrid,
    grid: Grid,
    *,
    kind: str,
    scale_zyx: tuple[float, float, float] = UNSCALED,
) -> Iterator[Callable[[np.dtype[np.unsignedinteger]], Target | SharedTarget]]:
    """Give what makes the output once the type of the ids is known; it appears when all is written."""
    attrs, start, shape = {"label_kind": kind}, blocks.region.start_zyx, blocks.region.shape_zyx
    if path.suffix == ".h5":
        with ExitStack() as stack:

            def hdf5(dtype: np.dtype[np.unsignedinteger]) -> Target:
                wanted = scaled_shape(shape, scale_zyx)
                z, y, x = (n / max(m, 1) for n, m in zip(shape, wanted, strict=True))
                made = stack.enter_context(
                    hdf5_writer(
                        path,
                        {"main": (wanted, dtype)},
                        grid=grid.cropped(start).pooled((z, y, x)),
                        attrs=attrs,
                        compression="gzip",
                    )
                )
                target: Target = made["main"]
                return _Moved(target if scale_zyx == UNSCALED else Scaled(target, shape, scale_zyx), start)

            yield hdf5
        return
    with atomic_folder(path) as folder:
        folder.rmdir()  # Zarr makes its own

        def zarr(dtype: np.dtype[np.unsignedinteger]) -> SharedTarget:
            chunk = [math.gcd(n, c) for n, c in zip(blocks.block_zyx, _CHUNK_ZYX, strict=True)]
            made = create_zarr(
                folder,
                shape,
                dtype,
                shard=blocks.block_zyx,
                chunk=chunk,
                grid=grid.cropped(start),
                attrs=attrs,
            )
            return _MovedShared(made, start)

        yield zarr


def _write_both(frame: Any, stem: Path, write: Callable[[Any, Path], None]) -> list[Path]:
    files = [stem.with_suffix(suffix) for suffix in (".parquet", ".csv")]
    for file in files:
        with atomic_path(file) as partial_file:
            write(frame, partial_file)
    return files
