"""From the files a user has to prepared volumes: checked, pooled, and with the counts that sampling needs."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import LabelKind, SynmlopsError, VolumeSet
from synmlops.volumes.chunk_headers import bare_address, is_chunked
from synmlops.volumes.files import sha256_of
from synmlops.volumes.labels import (
    Intensities,
    LabelSummary,
    check_image,
    check_label,
    foreground_sums,
    refuse_negative,
    smallest_unsigned,
)
from synmlops.volumes.phantom import Phantom
from synmlops.volumes.pooling import pool_image, pool_label, pool_mask, pooled_slabs
from synmlops.volumes.prepared import BACKGROUND, POST, PRE, SIDE_UNKNOWN, UNTRUSTED, PreparedVolume
from synmlops.volumes.sites import find_sites
from synmlops.volumes.store import (
    SLAB_BYTES,
    Grid,
    Volume,
    hdf5_writer,
    open_volume,
    split_joined,
    write_hdf5,
)
from synmlops.volumes.table import read_table, write_table

Nm = tuple[float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One volume as the user has it: paths, as `open_volume` takes them."""

    name: str
    image: str
    label: str | None = None
    kind: LabelKind | None = None
    neurons: str | None = None
    mask: str | None = None
    partners: str | None = None

    @property
    def paths(self) -> dict[str, str]:
        """The paths that are given, by what they are."""
        names = ("image", "label", "neurons", "mask", "partners")
        return {name: path for name in names if (path := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Preparation:
    """A prepared volume and what was seen on the way."""

    volume: PreparedVolume
    intensities: Intensities  # of the image, after pooling
    label: LabelSummary | None
    notes: tuple[str, ...] = field(default=())


def list_sources(volumes: VolumeSet, *, role: str) -> list[Source]:
    """Turn the lists of one role into one source per volume.

    Raises
    ------
    SynmlopsError
        If the lists differ in length, a label is given without its kind or a kind without its label, or a
        training volume has no label.

    Examples
    --------
    >>> [s.label for s in list_sources(VolumeSet(image="a.h5@b.h5", label="c.h5@d.h5", label_kind="pairs"),
    ...                                role="train")]
    ['c.h5', 'd.h5']
    """
    images = split_joined(volumes.image)
    if volumes.label is not None and volumes.label_kind is None:
        raise SynmlopsError(
            f"data.{role}.label_kind is missing; say pairs, semantic or union "
            "(`synmlops inspect` shows what a label looks like)"
        )
    if volumes.label is None and (role == "train" or volumes.label_kind is not None):
        raise SynmlopsError(f"data.{role}.label is missing; give a label for each image")
    kinds: Sequence[LabelKind] = (
        (volumes.label_kind,) if isinstance(volumes.label_kind, str) else volumes.label_kind or ()
    )
    lists = {
        name: _one_each(split_joined(getattr(volumes, name)), len(images), f"data.{role}.{name}")
        for name in ("label", "neurons", "mask", "partners")
    }
    each_kind = _one_each(
        list(kinds) * (len(images) if len(kinds) == 1 else 1), len(images), f"data.{role}.label_kind"
    )
    names = distinct_names([Path(image.partition("::")[0]).stem for image in images])
    return [
        Source(
            name=name,
            image=images[n],
            kind=each_kind[n],
            **{name: values[n] for name, values in lists.items()},
        )
        for n, name in enumerate(names)
    ]


def distinct_names(names: Sequence[str]) -> list[str]:
    """Number names that come up more than once.

    Examples
    --------
    >>> distinct_names(["raw", "raw", "other", "raw_1"])
    ['raw_2', 'raw_3', 'other', 'raw_1']
    """
    taken = {name for name in names if names.count(name) == 1}
    distinct = []
    for name in names:
        if names.count(name) > 1:
            numbered = (f"{name}_{n}" for n in count(1))
            name = next(one for one in numbered if one not in taken)
            taken.add(name)
        distinct.append(name)
    return distinct


def write_phantom(phantom: Phantom, folder: Path, name: str) -> Source:
    """Write FOLDER/NAME.h5 (image, label, neurons) and FOLDER/NAME.partners.parquet."""
    path, partners = folder / f"{name}.h5", folder / f"{name}.partners.parquet"
    arrays: dict[str, NDArray[Any]] = {
        "image": phantom.image,
        "label": phantom.labels,
        "neurons": phantom.neurons,
    }
    write_hdf5(path, arrays, grid=phantom.grid, attrs={"label_kind": "pairs"})
    write_table(phantom.partners, partners)
    return Source(
        name=name,
        image=f"{path}::image",
        label=f"{path}::label",
        kind="pairs",
        neurons=f"{path}::neurons",
        partners=str(partners),
    )


def prepare_volume(
    source: Source, folder: Path, *, voxel_nm: Nm | None, pool_zyx: tuple[int, int, int]
) -> Preparation:
    """Check one volume and write FOLDER/NAME.h5 (see `synmlops.volumes.prepared`), slab by slab.

    Parameters
    ----------
    source : Source
    folder : Path
    voxel_nm : tuple of float, optional
        Voxel size before pooling; overrides what the image file says.
    pool_zyx : tuple of int
        Voxels of the source that make one prepared voxel.

    Raises
    ------
    SynmlopsError
        If a file cannot be read or is not what it should be, shapes differ, or the voxel size is unknown.
    """
    path = folder / f"{source.name}.h5"
    with ExitStack() as stack:
        parts = {
            name: stack.enter_context(open_volume(where))
            for name, where in source.paths.items()
            if name != "partners"
        }
        _check_shapes(parts, pool_zyx)
        grid = _grid_of(parts["image"], voxel_nm).pooled(pool_zyx)
        table = _read_partners(source, grid=grid, pool_zyx=pool_zyx)
        summary = _check_parts(parts, source.kind)
        shape = tuple(n // p for n, p in zip(parts["image"].shape, pool_zyx, strict=True))
        forms = _forms(parts, summary, shape)
        with hdf5_writer(path, forms, grid=grid, attrs={"label_kind": source.kind or "none"}) as out:
            intensities = _write_image(parts["image"], out["image"], pool_zyx)
            if summary is not None:
                _write_label(parts["label"], parts.get("mask"), out, kind=summary.kind, pool_zyx=pool_zyx)
                sites = find_sites(partial(_trusted_label, out), summary.kind, voxel_nm=grid.voxel_nm)
                out["label"].file.create_dataset("sites", data=sites)
            if "neurons" in parts:
                for z, slab in pooled_slabs(parts["neurons"], pool_zyx, pool_label):
                    out["neurons"][z : z + len(slab)] = slab
    partners = None
    if table is not None:
        partners = folder / f"{source.name}.partners.parquet"
        write_table(table, partners)
    volume = PreparedVolume(
        path=path,
        shape_zyx=(shape[0], shape[1], shape[2]),
        kind=source.kind,
        grid=grid,
        sources=source.paths,
        sha256=_digests_of(source),
        partners=partners,
    )
    return Preparation(volume, intensities, summary, summary.problems if summary else ())


def sides_of(label: NDArray[Any], kind: LabelKind, mask: NDArray[Any] | None = None) -> NDArray[np.uint8]:
    """Code what a label says of each voxel.

    Examples
    --------
    >>> label = np.array([[[0, 1, 2, 3]]])
    >>> sides_of(label, "pairs").tolist(), sides_of(label, "union", np.array([[[1, 1, 0, 1]]])).tolist()
    ([[[0, 1, 2, 1]]], [[[0, 3, 255, 3]]])
    """
    foreground = label != 0
    if kind == "union":
        sides = np.where(foreground, SIDE_UNKNOWN, BACKGROUND)
    else:
        is_pre = label % 2 == 1
        sides = np.where(foreground, np.where(is_pre, PRE, POST), BACKGROUND)
    if mask is not None:
        sides = np.where(mask != 0, sides, UNTRUSTED)
    return sides.astype(np.uint8)


def digest_of(source: str) -> str:
    """Give the SHA-256 of a source: of a file, or of the names and digests of a folder's files.

    Of what is on a server, it is that of the address: another content there goes unnoticed.
    """
    address = bare_address(source.partition("::")[0])
    if "://" in address:
        return hashlib.sha256(address.encode()).hexdigest()
    path = Path(address)
    if path.is_file():
        return sha256_of(path)
    inside = path.rglob("*") if is_chunked(address) else path.iterdir()
    names = sorted(file for file in inside if file.is_file())
    listing = "\n".join(f"{file.relative_to(path)} {sha256_of(file)}" for file in names)
    return hashlib.sha256(listing.encode()).hexdigest()


def _digests_of(source: Source) -> dict[str, str]:
    """Give the digest of each part's file, reading a file that holds several parts once."""
    files = {name: where.partition("::")[0] for name, where in source.paths.items()}
    digests = {file: digest_of(file) for file in set(files.values())}
    return {name: digests[file] for name, file in files.items()}


def _check_parts(parts: dict[str, Volume], kind: LabelKind | None) -> LabelSummary | None:
    """Refuse what cannot be trained on, and say what the label holds."""
    check_image(parts["image"])
    if "neurons" in parts:
        _check_neurons(parts["neurons"])
    return check_label(parts["label"], kind) if "label" in parts and kind is not None else None


def _forms(
    parts: dict[str, Volume], summary: LabelSummary | None, shape: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Give shape and dtype of each dataset of a prepared volume."""
    forms: dict[str, tuple[tuple[int, ...], Any]] = {"image": (shape, parts["image"].dtype)}
    if summary is not None:
        sum_type = np.int32 if summary.foreground <= np.iinfo(np.int32).max else np.int64
        forms["label"] = (shape, smallest_unsigned(summary.largest_id))
        forms["sides"] = (shape, np.uint8)
        forms["foreground_sum"] = (tuple(n + 1 for n in shape), sum_type)
        if "mask" in parts:
            many = math.prod(shape) > np.iinfo(np.int32).max
            forms["trusted_sum"] = (tuple(n + 1 for n in shape), np.int64 if many else np.int32)
    if "neurons" in parts:
        forms["neurons"] = (shape, parts["neurons"].dtype)
    return forms


def _write_image(image: Volume, out: Any, pool_zyx: tuple[int, int, int]) -> Intensities:
    counts = np.zeros(np.iinfo(image.dtype).max + 1, np.int64)
    for z, slab in pooled_slabs(image, pool_zyx, pool_image):
        out[z : z + len(slab)] = slab
        counts += np.bincount(slab.ravel(), minlength=len(counts))
    return Intensities(counts)


def _write_label(
    label: Volume,
    mask: Volume | None,
    out: dict[str, Any],
    *,
    kind: LabelKind,
    pool_zyx: tuple[int, int, int],
) -> None:
    def trusted_foreground() -> Iterator[NDArray[np.bool_]]:
        for z, slab in pooled_slabs(label, pool_zyx, pool_label):
            span = slice(z * pool_zyx[0], (z + len(slab)) * pool_zyx[0])
            sides = sides_of(slab, kind, None if mask is None else pool_mask(mask[span], pool_zyx))
            out["label"][z : z + len(slab)] = slab
            out["sides"][z : z + len(slab)] = sides
            yield (sides != BACKGROUND) & (sides != UNTRUSTED)

    _write_sum(trusted_foreground(), out["foreground_sum"])
    if "trusted_sum" in out:
        _write_sum((sides != UNTRUSTED for _, sides in _slabs_of(out["sides"])), out["trusted_sum"])
    if not out["foreground_sum"][-1, -1, -1]:
        raise SynmlopsError(
            f"{label.name}: has no foreground left where the mask trusts it and pooling keeps it; "
            "check the mask, or leave the volume out"
        )


def _write_sum(slabs: Iterator[NDArray[np.bool_]], out: Any) -> None:
    row = 0
    for sums in foreground_sums(slabs, dtype=out.dtype):
        out[row : row + len(sums)] = sums
        row += len(sums)


def _trusted_label(out: dict[str, Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Read back what was written of the label, in slabs, without what is not to be trusted."""
    for z, label in _slabs_of(out["label"]):
        yield z, np.where(out["sides"][z : z + len(label)] == UNTRUSTED, 0, label)


def _slabs_of(dataset: Any) -> Iterator[tuple[int, NDArray[Any]]]:
    depth = max(1, SLAB_BYTES * len(dataset) // dataset.nbytes)
    for z in range(0, len(dataset), depth):
        yield z, dataset[z : z + depth]


def _check_shapes(parts: dict[str, Volume], pool_zyx: tuple[int, int, int]) -> None:
    image = parts["image"]
    for name, part in parts.items():
        if part.shape != image.shape:
            raise SynmlopsError(
                f"{part.name}: {name} has shape {part.shape} but the image {image.name} has {image.shape}; "
                "both must cover the same voxels"
            )
    if any(n < p for n, p in zip(image.shape, pool_zyx, strict=True)):
        raise SynmlopsError(f"{image.name}: shape {image.shape} is smaller than data.pool_zyx {pool_zyx}")


def _check_neurons(neurons: Volume) -> None:
    if neurons.dtype.kind not in "ui":
        raise SynmlopsError(f"{neurons.name}: is {neurons.dtype}, neuron ids are whole numbers; convert it")
    refuse_negative(neurons)


def _grid_of(image: Volume, voxel_nm: Nm | None) -> Grid:
    if voxel_nm is not None:
        return Grid(voxel_nm, image.grid.offset_nm if image.grid else (0.0, 0.0, 0.0))
    if image.grid is None:
        raise SynmlopsError(
            f"{image.name}: does not say its voxel size; set data.voxel_nm to [z, y, x] in nm, "
            "or the HDF5 attribute `resolution`"
        )
    return image.grid


def _read_partners(source: Source, *, grid: Grid, pool_zyx: tuple[int, int, int]) -> pd.DataFrame | None:
    """Read the true table; its voxel indices and boxes become those of the pooled volume."""
    if source.partners is None:
        return None
    try:
        table = read_table(Path(source.partners))
    except (OSError, ValueError) as error:
        raise SynmlopsError(
            f"{source.partners}: not a readable partner table ({error}); make it again"
        ) from error
    for axis, n, offset, size in zip("zyx", pool_zyx, grid.offset_nm, grid.voxel_nm, strict=True):
        if n > 1:
            for side in ("pre", "post"):
                table[f"{side}_{axis}"] = np.rint((table[f"{side}_{axis}_nm"] - offset) / size)
            table[f"{axis}0"] //= n
            table[f"{axis}1"] = -(-table[f"{axis}1"] // n)
    return table


def _one_each(values: Sequence[T], n: int, key: str) -> list[T | None]:
    if not values:
        return [None] * n
    if len(values) != n:
        raise SynmlopsError(f"{key}: {len(values)} given for {n} images; give one for each")
    return list(values)
