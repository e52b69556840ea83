"""What prepare writes and every later stage reads: one file per volume, and a manifest of regions and roles.

A prepared volume is an HDF5 file with uncompressed, contiguous datasets, so that a patch is a view of a
memory map:

- `image`: uint8 or uint16;
- `sides`: uint8, what is known of each voxel (`BACKGROUND`, `PRE`, `POST`, `SIDE_UNKNOWN`, `UNTRUSTED`);
- `foreground_sum`: summed-volume table of the trusted foreground, one longer along each axis;
- `trusted_sum`: the same of the trusted voxels, where a mask was given;
- `sites`: (N, 9) int32, where each synapse is (see `synmlops.volumes.sites`);
- `label`: instance ids in the volume's own label kind; `neurons`, where a segmentation was given.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import CHANNELS, LabelKind, SynmlopsError
from synmlops.volumes.files import atomic_path
from synmlops.volumes.hdf5 import Hdf5Dataset, list_datasets
from synmlops.volumes.store import Grid, open_volume

BACKGROUND, PRE, POST, SIDE_UNKNOWN, UNTRUSTED = 0, 1, 2, 3, 255
"""Codes of the `sides` dataset."""

ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class Box:
    """A region of a volume in voxels, half open: `start_zyx <= voxel < stop_zyx`."""

    start_zyx: tuple[int, int, int]
    stop_zyx: tuple[int, int, int]

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        z, y, x = (stop - start for start, stop in zip(self.start_zyx, self.stop_zyx, strict=True))
        return z, y, x

    def moved(self, by_zyx: Iterable[int]) -> "Box":
        """Give the box shifted by these voxels.

        Examples
        --------
        >>> Box((0, 0, 5), (1, 2, 6)).moved((0, 1, -5))
        Box(start_zyx=(0, 1, 0), stop_zyx=(1, 3, 1))
        """
        steps = tuple(by_zyx)
        (z0, y0, x0), (z1, y1, x1) = (
            (at + step for at, step in zip(corner, steps, strict=True))
            for corner in (self.start_zyx, self.stop_zyx)
        )
        return Box((z0, y0, x0), (z1, y1, x1))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an index of a z, y, x array."""
        z, y, x = (slice(start, stop) for start, stop in zip(self.start_zyx, self.stop_zyx, strict=True))
        return z, y, x


def box_within(roi: Box | None, shape_zyx: Sequence[int], name: str) -> Box:
    """Give the region that `--roi` names of a volume; all of it where it names none.

    Raises
    ------
    SynmlopsError
        If it reaches beyond the volume.
    """
    z, y, x = shape_zyx
    if roi is None:
        return Box((0, 0, 0), (z, y, x))
    if any(stop > n for stop, n in zip(roi.stop_zyx, shape_zyx, strict=True)):
        raise SynmlopsError(f"--roi ends at {roi.stop_zyx}, beyond {name} of {(z, y, x)} voxels")
    return roi


@dataclass(frozen=True)
class Region:
    """A box of a prepared volume."""

    name: str  # of the files that are computed of it
    volume: str
    box: Box


@dataclass(frozen=True)
class Fold:
    """One division of the tissue; a single fold unless the params split by region."""

    name: str
    train: tuple[Region, ...]
    validation: tuple[Region, ...]
    test: tuple[Region, ...]


@dataclass(frozen=True)
class PreparedVolume:
    """One prepared file. Arrays are memory maps, opened when first asked for."""

    path: Path
    shape_zyx: tuple[int, int, int]
    kind: LabelKind | None
    grid: Grid
    sources: dict[str, str] = field(default_factory=dict)  # "image", "label", ... to the file it came from
    sha256: dict[str, str] = field(default_factory=dict)  # the same keys, digest of that file
    partners: Path | None = None  # true partner table

    @cached_property
    def image(self) -> NDArray[Any]:
        """The image, (z, y, x)."""
        return self._map("image")

    @cached_property
    def sides(self) -> NDArray[np.uint8]:
        """What is known of each voxel, (z, y, x)."""
        return self._map("sides")

    @cached_property
    def foreground_sum(self) -> NDArray[Any]:
        """Summed-volume table of the trusted foreground, (z + 1, y + 1, x + 1)."""
        return self._map("foreground_sum")

    @cached_property
    def trusted_sum(self) -> NDArray[Any] | None:
        """Summed-volume table of the trusted voxels; None if all are."""
        return self._map("trusted_sum") if "trusted_sum" in list_datasets(self.path) else None

    @cached_property
    def label(self) -> NDArray[Any]:
        """Instance ids in the volume's own label kind, (z, y, x)."""
        return self._map("label")

    @cached_property
    def sites(self) -> NDArray[np.int32]:
        """Where each synapse is, (N, 9); in memory."""
        dataset = Hdf5Dataset(self.path, "sites")
        try:
            return dataset.read((slice(None), slice(None)))
        finally:
            dataset.close()

    @property
    def name(self) -> str:
        """The volume's key in the manifest."""
        return self.path.stem

    def read(self, name: str, box: Box) -> NDArray[Any] | None:
        """Read a box of `label` or `neurons`; None if the volume has no such dataset."""
        if name not in list_datasets(self.path):
            return None
        with open_volume(f"{self.path}::{name}") as volume:
            return volume[box.slices]

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that this volume's label knows."""
        return known_channels(self.kind)

    def _map(self, name: str) -> NDArray[Any]:
        with open_volume(f"{self.path}::{name}") as volume:
            mapped = volume.memmap()
        assert mapped is not None  # prepare compresses nothing
        return mapped


@dataclass(frozen=True)
class Manifest:
    """All prepared volumes and the folds over them, with the intensity statistics of training images."""

    volumes: dict[str, PreparedVolume]
    folds: tuple[Fold, ...]
    mean: float  # of the training images, in grey levels
    std: float

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every source file, by volume and the first part that it holds: `phantom_1/image`."""
        found: dict[str, str] = {}
        for name, volume in self.volumes.items():
            first_parts = {digest: part for part, digest in reversed(volume.sha256.items())}
            found |= {f"{name}/{part}": digest for digest, part in reversed(first_parts.items())}
        return found


def known_channels(kind: LabelKind | None) -> tuple[str, ...]:
    """Name the channels that a label of this kind knows.

    Examples
    --------
    >>> known_channels("union"), known_channels("semantic")
    (('union',), ('pre', 'post', 'union'))
    """
    if kind is None:
        return ()
    return ("union",) if kind == "union" else CHANNELS


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write FOLDER/manifest.json; paths in it are relative to the folder."""
    tree = asdict(manifest)
    for volume in tree["volumes"].values():
        volume["path"] = Path(volume["path"]).name
        volume["partners"] = volume["partners"] and Path(volume["partners"]).name
    with atomic_path(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(tree, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read what `write_manifest` wrote.

    Raises
    ------
    SynmlopsError
        If the folder holds no complete prepared data.
    """
    path = folder / "manifest.json"
    try:
        manifest = _manifest_from(json.loads(path.read_text()), folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SynmlopsError(
            f"{path}: is missing or broken ({error}); run `synmlops prepare`, or `dvc checkout` the last one"
        ) from error
    for volume in manifest.volumes.values():
        if not volume.path.exists():
            raise SynmlopsError(f"{volume.path}: is missing; run `synmlops prepare` or `dvc checkout` again")
    return manifest


def _manifest_from(tree: dict[str, Any], folder: Path) -> Manifest:
    volumes = {name: _volume_from(tree, folder) for name, tree in tree["volumes"].items()}
    folds = tuple(
        Fold(
            name=fold["name"],
            **{role: tuple(_region_from(region) for region in fold[role]) for role in ROLES},
        )
        for fold in tree["folds"]
    )
    return Manifest(volumes, folds, tree["mean"], tree["std"])


def _volume_from(tree: dict[str, Any], folder: Path) -> PreparedVolume:
    grid = Grid(*(tuple(tree["grid"][key]) for key in ("voxel_nm", "offset_nm")))
    return PreparedVolume(
        path=folder / tree["path"],
        shape_zyx=tuple(tree["shape_zyx"]),
        kind=tree["kind"],
        grid=grid,
        sources=tree["sources"],
        sha256=tree["sha256"],
        partners=folder / tree["partners"] if tree["partners"] else None,
    )


def _region_from(tree: dict[str, Any]) -> Region:
    box = tree["box"]
    return Region(tree["name"], tree["volume"], Box(tuple(box["start_zyx"]), tuple(box["stop_zyx"])))
