"""Predictions as the CREMI challenge wants them: partners, clefts and neuron ids in its HDF5."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import SCALE, SynmlopsError
from synmlops.volumes.cremi import Annotations, Layer, annotations_of, grid_of, write_cremi
from synmlops.volumes.store import Volume, open_volume
from synmlops.volumes.table import read_table


@dataclass(frozen=True)
class CremiParts:
    """Volumes that go along with the partners, as `open_volume` takes them.

    Attributes
    ----------
    clefts : str, optional
        Instances, each site one cleft, or probabilities, whose union channel is cut at `threshold`.
    threshold : float, optional
        0 to 1; for probabilities.
    neurons, raw : str, optional
    """

    clefts: str | None = None
    threshold: float | None = None
    neurons: str | None = None
    raw: str | None = None


def export_cremi(table: Path, out: Path, parts: CremiParts, *, least_confidence: float = 0.0) -> Annotations:
    """Write a CREMI file of a partner table, and of volumes where they are given; gives what was annotated.

    Positions are written in nm of the world, exactly as they stand in the table, and ids and comments as an
    import from CREMI found them. Confidence has no place in the format: choose with `least_confidence`.

    Parameters
    ----------
    table : Path
        Partner table, Parquet.
    out : Path
    parts : CremiParts
    least_confidence : float
        Pairs below are left out.

    Raises
    ------
    SynmlopsError
        If a file cannot be read, a volume has no voxel size or is not what it should be, or the place cannot
        be written. Nothing is written then.
    """
    rows = _read(table)
    annotations = annotations_of(rows[rows.confidence >= least_confidence])
    with ExitStack() as stack:

        def opened(source: str | None, ndim: int | None) -> Volume | None:
            volume = None if source is None else stack.enter_context(open_volume(source, ndim=ndim))
            if volume is not None and volume.grid is None:
                raise SynmlopsError(
                    f"{volume.name}: does not say its voxel size, which CREMI's files must; write the HDF5 "
                    "attribute `resolution` (nm, z y x)"
                )
            return volume

        raw, neurons, clefts = opened(parts.raw, 3), opened(parts.neurons, 3), opened(parts.clefts, None)
        if raw is not None and raw.dtype != np.uint8:
            raise SynmlopsError(f"{raw.name}: is {raw.dtype}, CREMI's raw volumes are uint8; leave --raw out")
        if neurons is not None and neurons.dtype.kind not in "ui":
            raise SynmlopsError(f"{neurons.name}: is {neurons.dtype}, neuron ids are whole numbers")
        write_cremi(
            out,
            annotations=annotations,
            raw=None if raw is None else Layer(raw.shape, grid_of(raw), raw.slabs()),
            neurons=None if neurons is None else Layer(neurons.shape, grid_of(neurons), neurons.slabs()),
            clefts=None if clefts is None else _clefts(clefts, parts.threshold),
        )
    return annotations


def _read(table: Path) -> pd.DataFrame:
    try:
        return read_table(table)
    except (OSError, ValueError) as error:
        raise SynmlopsError(
            f"{table}: not a readable partner table ({error}); give a Parquet of ours"
        ) from error


def _clefts(volume: Volume, threshold: float | None) -> Layer:
    """Give cleft ids, 0 for none: of instances their site, of probabilities 1 from the threshold on."""
    shape = volume.shape[-3:]
    if len(volume.shape) == 3:
        if volume.dtype.kind not in "ui":
            raise SynmlopsError(f"{volume.name}: is {volume.dtype}, instances are whole numbers")
        kind = volume.attrs.get("label_kind")
        if kind not in ("pairs", "union"):
            raise SynmlopsError(
                f"{volume.name}: does not say its label_kind (pairs or union), so its ids mean nothing; give "
                "instances as decode and evaluate write them, or write the HDF5 attribute"
            )
        return Layer(shape, grid_of(volume), ((z, _sites(slab, kind)) for z, slab in volume.slabs()))
    channels = list(volume.attrs.get("channels") or [])
    if volume.dtype != np.uint8 or volume.attrs.get("scale") != SCALE or "union" not in channels:
        raise SynmlopsError(
            f"{volume.name}: is no file of probabilities with a union channel (channels {channels}); give "
            "what infer writes, or instances"
        )
    if threshold is None or not 0 < threshold <= 1:
        raise SynmlopsError(
            f"--threshold {threshold}: clefts from probabilities need one above 0, up to 1; "
            "evaluate's metrics.json has the one it chose"
        )
    return Layer(shape, grid_of(volume), _above(volume, channels.index("union"), threshold))


def _sites(slab: NDArray[Any], kind: str) -> NDArray[np.uint64]:
    ids = slab.astype(np.uint64)
    return (ids + np.uint64(1)) // np.uint64(2) if kind == "pairs" else ids


def _above(volume: Volume, channel: int, threshold: float) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    depth = 16
    for z in range(0, volume.shape[1], depth):
        union = volume[channel : channel + 1, z : z + depth][0]
        yield z, (union >= threshold * SCALE - 1e-6).astype(np.uint64)
