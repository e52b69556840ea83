"""The prepare stage: every volume checked and converted, and the division into train, validation and test."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from synmlops.layout import WHOLE
from synmlops.params import DataParams, PhantomParams, SplitParams, SynmlopsError
from synmlops.progress import track
from synmlops.volumes.files import atomic_folder
from synmlops.volumes.labels import Intensities
from synmlops.volumes.phantom import make_phantom
from synmlops.volumes.prepared import ROLES, Box, Fold, Manifest, PreparedVolume, Region, write_manifest
from synmlops.volumes.preparing import Preparation, Source, list_sources, prepare_volume, write_phantom


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
        by_role = {role: list(_sources(data, role, Path(scratch))) for role in ROLES}
        _refuse_same_name(by_role)
        done: dict[str, Preparation] = {}
        with track("prepare", sum(map(len, by_role.values()))) as report:
            for source in (source for sources in by_role.values() for source in sources):
                done[source.name] = prepare_volume(
                    source, folder, voxel_nm=data.voxel_nm, pool_zyx=data.pool_zyx
                )
                report(len(done), source.name)
        train = [done[source.name] for source in by_role["train"]]
        grey = _pooled_intensities(train)
        volumes = {name: one.volume for name, one in done.items()}
        regions = {role: [_whole(volumes[source.name]) for source in by_role[role]] for role in ROLES}
        folds = (
            tuple(folds_by_band(regions["train"], data.split))
            if data.split is not None
            else (Fold(WHOLE, *(tuple(regions[role]) for role in ROLES)),)
        )
        manifest = Manifest(volumes, folds, mean=grey.mean, std=grey.std)
        write_manifest(manifest, folder)
    notes = [f"{one.volume.sources['label']}: {note}" for one in done.values() for note in one.notes]
    return _moved(manifest, out), notes


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


def _sources(data: DataParams, role: str, scratch: Path) -> Iterator[Source]:
    if data.phantom is not None:
        seeds: tuple[int, ...] = getattr(data.phantom, f"{role}_seeds")
        for seed in seeds:
            yield phantom_source(data.phantom, seed, scratch)
    else:
        volumes = getattr(data, role)
        if volumes is not None:
            yield from list_sources(volumes, role=role)


def phantom_source(phantom: PhantomParams, seed: int, folder: Path) -> Source:
    """Make the phantom of one seed and write it to a folder as a volume with label, neurons and partners."""
    roles = {f"{role}_seeds" for role in ROLES}
    made = make_phantom(seed=seed, **phantom.model_dump(exclude=roles))
    return write_phantom(made, folder, f"phantom_{seed}")


def _whole(volume: PreparedVolume) -> Region:
    return Region(volume.path.stem, volume.path.stem, Box((0, 0, 0), volume.shape_zyx))


def _pooled_intensities(preparations: list[Preparation]) -> Intensities:
    """Add the grey levels of the training images up: the model's fixed normalisation."""
    counts = [one.intensities.counts for one in preparations]
    if len({len(c) for c in counts}) > 1:
        raise SynmlopsError("data.train: some images are uint8 and some uint16; convert them to one type")
    return Intensities(np.sum(counts, axis=0))


def _refuse_same_name(by_role: dict[str, list[Source]]) -> None:
    names = [source.name for sources in by_role.values() for source in sources]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise SynmlopsError(
            f"data: two volumes of different roles are called {double}; rename one, or check that test "
            "tissue is not trained on"
        )


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
