"""The prepare stage: every volume checked and converted, and the division into train, validation and test."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from synmlops.layout import WHOLE
from synmlops.params import DataParams, PhantomParams, SplitParams, SynmlopsError
from synmlops.progress import track
from synmlops.volumes.files import atomic_folder
from synmlops.volumes.labels import Intensities
from synmlops.volumes.phantom import make_phantom
from synmlops.volumes.prepared import (
    ROLES,
    Box,
    Fold,
    Manifest,
    PreparedVolume,
    Region,
    read_manifest,
    write_manifest,
)
from synmlops.volumes.preparing import (
    Preparation,
    Source,
    distinct_names,
    list_sources,
    prepare_volume,
    write_phantom,
)

WORTH_A_PROCESS = 2_000_000
"""Voxels of a phantom that takes longer to make than a process takes to start."""

VOXEL_TOLERANCE = 0.1
"""Greatest relative difference between the voxel sizes of volumes that one model is trained on."""


def run(data: DataParams, *, out: Path) -> tuple[Manifest, list[str]]:
    """Prepare all volumes into OUT, which appears when everything is done.

    Returns
    -------
    manifest : Manifest
    notes : list of str
        What is odd about a volume, though no reason to refuse it.

    Raises
    ------
    SynmlopsError
        If a volume is not what it should be; an earlier OUT stays as it was.
    """
    with TemporaryDirectory(prefix="synmlops-") as scratch, atomic_folder(out) as folder:
        plan = _plan(data)
        done: dict[str, list[Preparation]] = {role: [] for role in ROLES}
        job = partial(_prepare, data=data, scratch=Path(scratch), folder=folder)
        with track("prepare", len(plan)) as report, _mapper(data) as map_jobs:
            preparations = map_jobs(job, [planned for _, planned in plan])
            for n, ((role, _), one) in enumerate(zip(plan, preparations, strict=True), start=1):
                done[role].append(one)
                report(n, one.volume.path.stem)
        prepared = [one for role in ROLES for one in done[role]]
        _refuse_mixture(prepared)
        grey = Intensities(np.sum([one.intensities.counts for one in done["train"]], axis=0))
        volumes = {one.volume.path.stem: _without_scratch(one.volume, Path(scratch)) for one in prepared}
        regions = {role: [_whole(one.volume) for one in done[role]] for role in ROLES}
        folds = (
            tuple(folds_by_band(regions["train"], data.split))
            if data.split is not None
            else (Fold(WHOLE, *(tuple(regions[role]) for role in ROLES)),)
        )
        mean, std = data.grey or (grey.mean, grey.std)
        manifest = Manifest(volumes, folds, mean=mean, std=std)
        write_manifest(manifest, folder)
    notes = [f"{one.volume.sources['label']}: {note}" for one in prepared for note in one.notes]
    return _moved(manifest, out), notes


def _prepare(planned: Source | int, *, data: DataParams, scratch: Path, folder: Path) -> Preparation:
    """Prepare one volume; a phantom is made first."""
    source = _source(planned, data, scratch)
    return prepare_volume(source, folder, voxel_nm=data.voxel_nm, pool_zyx=data.pool_zyx)


@contextmanager
def _mapper(data: DataParams) -> Iterator[Callable[..., Iterable[Preparation]]]:
    """Give `map`, over one process per core where phantoms are made that are worth the start of processes."""
    cores = os.cpu_count() or 1
    if data.phantom is None or math.prod(data.phantom.size_zyx) < WORTH_A_PROCESS or cores == 1:
        yield map
        return
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        yield pool.map


def folds_by_band(regions: list[Region], split: SplitParams) -> Iterator[Fold]:
    """Cut regions into bands along an axis and give one fold per band, in which it is the test region.

    Training takes what lies at least `split.guard` voxels away from the band.

    Examples
    --------
    >>> whole = Region("a", "a", Box((0, 0, 0), (10, 400, 100)))
    >>> for fold in folds_by_band([whole], SplitParams(axis="y", bands=4, guard=30)):
    ...     spans = [(r.box.start_zyx[1], r.box.stop_zyx[1]) for r in (*fold.test, *fold.train)]
    ...     print(fold.name, spans)
    1 [(0, 100), (130, 400)]
    2 [(100, 200), (0, 70), (230, 400)]
    3 [(200, 300), (0, 170), (330, 400)]
    4 [(300, 400), (0, 270)]
    """
    axis = "zyx".index(split.axis)
    for band in range(split.bands):
        test, train = [], []
        for region in regions:
            begin, n = region.box.start_zyx[axis], region.box.shape_zyx[axis]
            low, high = (begin + n * edge // split.bands for edge in (band, band + 1))
            test.append(_cut(region, axis, low, high))
            for span in ((begin, low - split.guard), (high + split.guard, begin + n)):
                if span[0] < span[1]:
                    train.append(_cut(region, axis, *span))
        yield Fold(str(band + 1), train=tuple(train), validation=(), test=tuple(test))


def _cut(region: Region, axis: int, start: int, stop: int) -> Region:
    starts, stops = list(region.box.start_zyx), list(region.box.stop_zyx)
    starts[axis], stops[axis] = start, stop
    box = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    return Region(f"{region.volume}_{'zyx'[axis]}{start}", region.volume, box)


def _plan(data: DataParams) -> list[tuple[str, Source | int]]:
    """List what is to be prepared, with its role: volumes in files, or seeds of phantoms yet to be made."""
    if data.phantom is not None:
        return [(role, seed) for role in ROLES for seed in getattr(data.phantom, f"{role}_seeds")]
    given = {role: volumes for role in ROLES if (volumes := getattr(data, role)) is not None}
    sources = [(role, one) for role, volumes in given.items() for one in list_sources(volumes, role=role)]
    _refuse_shared(sources)
    names = distinct_names([one.name for _, one in sources])
    return [(role, replace(one, name=name)) for (role, one), name in zip(sources, names, strict=True)]


def _source(planned: Source | int, data: DataParams, scratch: Path) -> Source:
    """Give a planned volume; a phantom is made when its turn comes."""
    if isinstance(planned, Source):
        return planned
    assert data.phantom is not None  # only a phantom plans seeds
    return phantom_source(data.phantom, planned, scratch)


def phantom_source(phantom: PhantomParams, seed: int, folder: Path) -> Source:
    """Make the phantom of one seed and write it to a folder as a volume with label, neurons and partners."""
    roles = {f"{role}_seeds" for role in ROLES}
    made = make_phantom(seed=seed, **phantom.model_dump(exclude=roles))
    return write_phantom(made, folder, f"phantom_{seed}")


def _whole(volume: PreparedVolume) -> Region:
    return Region(volume.path.stem, volume.path.stem, Box((0, 0, 0), volume.shape_zyx))


def _refuse_shared(sources: list[tuple[str, Source]]) -> None:
    """Refuse one image in two roles: what is tested on must not be trained on."""
    role_of: dict[str, str] = {}
    for role, source in sources:
        first = role_of.setdefault(source.image, role)
        if first != role:
            raise SynmlopsError(
                f"data.{role}.image: {source.image} stands in data.{first}.image too; give each role tissue "
                "of its own, or set data.split to divide it by region"
            )


def _refuse_mixture(prepared: list[Preparation]) -> None:
    """Refuse volumes that one model cannot serve: grey levels and voxel size are those of the first."""
    first = prepared[0]
    for one in prepared[1:]:
        image, other = one.volume.sources["image"], first.volume.sources["image"]
        dtypes = one.volume.image.dtype, first.volume.image.dtype
        if dtypes[0] != dtypes[1]:
            raise SynmlopsError(
                f"{image}: is {dtypes[0]}, but {other} is {dtypes[1]}; convert all images to one type"
            )
        sizes = one.volume.grid.voxel_nm, first.volume.grid.voxel_nm
        if not np.allclose(*sizes, rtol=VOXEL_TOLERANCE):
            raise SynmlopsError(
                f"{image}: voxels of {sizes[0]} nm, but {other} has {sizes[1]}; resample it, or leave it out"
            )


def _without_scratch(volume: PreparedVolume, scratch: Path) -> PreparedVolume:
    """Name a phantom's files without their temporary folder, so that a seed always gives the same bytes."""
    sources = {part: path.removeprefix(f"{scratch}/") for part, path in volume.sources.items()}
    return replace(volume, sources=sources)


def _moved(manifest: Manifest, folder: Path) -> Manifest:
    """Give the manifest with its files where the finished folder is."""
    volumes = {
        name: replace(
            volume,
            path=folder / volume.path.name,
            partners=volume.partners and folder / volume.partners.name,
        )
        for name, volume in manifest.volumes.items()
    }
    return replace(manifest, volumes=volumes)


def voxel_nm_of(data: DataParams, prepared: Path) -> tuple[float, float, float] | None:
    """Give the voxel size that training sees: of prepared volumes, else what the params say, if they do."""
    if (prepared / "manifest.json").exists():
        return next(iter(read_manifest(prepared).volumes.values())).grid.voxel_nm
    phantom = data.phantom
    given = data.voxel_nm or (None if phantom is None else phantom.voxel_nm)
    if given is None:
        return None
    z, y, x = (size * n for size, n in zip(given, data.pool_zyx, strict=True))
    return z, y, x
