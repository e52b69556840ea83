"""What is looked at: volumes and a partner table, checked to lie in one another, and where to begin."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.probabilities import open_probabilities
from synmlops.volumes.store import Grid, Volume, open_volume
from synmlops.volumes.table import points_nm, read_table

Nm = tuple[float, float, float]

_SAME_SHARE = 0.01
"""Voxel sizes that differ by less are the same but for rounding."""

_SIDED_KINDS = ("pairs", "semantic")  # whose pre sides are odd, and whose post sides are even


@dataclass(frozen=True)
class Sources:
    """Files to look at; all but the image may be left out."""

    image: str
    probabilities: Path | None = None
    instances: str | None = None
    partners: Path | None = None
    neurons: str | None = None
    voxel_nm: Nm | None = None  # of the image, where its file does not say it
    threshold: float = 0.5  # where the slider of the probabilities begins


@dataclass(frozen=True, eq=False)
class Placed:
    """An open volume and where its voxels lie."""

    volume: Volume
    grid: Grid

    @property
    def box_nm(self) -> NDArray[np.float64]:
        """Outer corners of the first and of the last voxel, (2, 3)."""
        voxel, offset = np.array(self.grid.voxel_nm), np.array(self.grid.offset_nm)
        ends = np.array([(-0.5,) * 3, np.array(self.volume.shape[-3:]) - 0.5])
        return np.asarray(offset + ends * voxel)


@dataclass(frozen=True, eq=False)
class Scene:
    """What is looked at."""

    image: Placed
    probabilities: Placed | None
    instances: Placed | None
    neurons: Placed | None
    table: pd.DataFrame | None
    threshold: float
    notes: tuple[str, ...] = ()

    @property
    def has_sides(self) -> bool:
        """Whether odd instances are pre sides and even ones post sides; only the file can say so."""
        return self.instances is not None and self.instances.volume.attrs.get("label_kind") in _SIDED_KINDS


@dataclass(frozen=True)
class Start:
    """Where the view begins."""

    zyx: tuple[int, int, int]  # voxel of the image
    site: int | None  # that lies there
    what: str  # in words


@contextmanager
def open_scene(sources: Sources) -> Iterator[Scene]:
    """Open all that is looked at; of the volumes, no more than the headers are read.

    Raises
    ------
    SynmlopsError
        If a file is missing or of another kind, the image's voxel size is unknown, a volume does not lie
        within the image, or the table lacks columns or lies elsewhere.
    """
    with ExitStack() as stack:
        image = _place_image(stack.enter_context(open_volume(sources.image)), sources.voxel_nm)
        others: dict[str, Placed | None] = {"probabilities": None, "instances": None, "neurons": None}
        if sources.probabilities is not None:
            volume = stack.enter_context(open_probabilities(sources.probabilities))
            others["probabilities"] = _place(volume, image)
        for name, source in (("instances", sources.instances), ("neurons", sources.neurons)):
            if source is not None:
                others[name] = _place(_refuse_no_ids(stack.enter_context(open_volume(source)), name), image)
        for placed in others.values():
            if placed is not None:
                _refuse_misfit(placed, image)
        if others["probabilities"] is not None and others["instances"] is not None:
            _refuse_unlike(others["instances"], others["probabilities"])
        table: pd.DataFrame | None = None
        notes: tuple[str, ...] = ()
        if sources.partners is not None:
            table, notes = _read_partners(sources.partners, others["instances"] or image)
        yield Scene(image=image, table=table, threshold=sources.threshold, notes=notes, **others)


def start_of(scene: Scene, *, at_zyx: tuple[int, int, int] | None = None, site: int | None = None) -> Start:
    """Choose where to begin: at a voxel, at a site, else at the most confident synapse, else in the middle.

    Raises
    ------
    SynmlopsError
        If the voxel or the site is not there, or both are given.
    """
    shape = scene.image.volume.shape
    if at_zyx is not None:
        if site is not None:
            raise SynmlopsError("--at and --site both say where to begin; leave one of them out")
        if not all(0 <= at < n for at, n in zip(at_zyx, shape, strict=True)):
            raise SynmlopsError(f"--at {at_zyx}: lies outside the image of {shape} voxels, z y x")
        return Start(at_zyx, None, "--at")
    rows = scene.table
    if site is not None:
        if rows is None:
            raise SynmlopsError(f"--site {site}: a site is looked up in the partner table; give --partners")
        rows = rows[rows.site == site]
        if rows.empty:
            raise SynmlopsError(f"--site {site}: {_known_sites(scene.table)}")
    if rows is None or rows.empty:
        middle = (scene.instances or scene.probabilities or scene.image).box_nm.mean(axis=0)
        return Start(_voxel(scene.image, middle), None, "the middle")
    best = rows.loc[[rows.confidence.idxmax()]]
    zyx = _voxel(scene.image, points_nm(best)[0].mean(axis=0))
    found = int(best.site.iloc[0])
    return Start(zyx, found, f"site {found}, confidence {best.confidence.iloc[0]:.2f}")


def _place_image(volume: Volume, voxel_nm: Nm | None) -> Placed:
    if volume.grid is None and voxel_nm is None:
        raise SynmlopsError(f"{volume.name}: does not say its voxel size; give --voxel-nm z,y,x, as 40,8,8")
    if voxel_nm is not None and not (np.isfinite(voxel_nm).all() and min(voxel_nm) > 0):
        raise SynmlopsError(f"--voxel-nm {voxel_nm}: sizes in nm must be positive numbers")
    if volume.grid is None or voxel_nm is None:
        return Placed(volume, volume.grid or Grid(voxel_nm or (1.0, 1.0, 1.0)))
    if not np.allclose(volume.grid.voxel_nm, voxel_nm, rtol=_SAME_SHARE):
        raise SynmlopsError(
            f"{volume.name}: says its voxels are {_words(volume.grid.voxel_nm)} nm, --voxel-nm says "
            f"{_words(voxel_nm)}; leave --voxel-nm out, or correct the file"
        )
    return Placed(volume, volume.grid)


def _place(volume: Volume, image: Placed) -> Placed:
    """Place a volume; one that does not say where it lies is taken to have the image's voxels."""
    if volume.grid is None and volume.shape[-3:] != image.volume.shape:
        raise SynmlopsError(
            f"{volume.name}: does not say its voxel size, and its shape {volume.shape[-3:]} is not that of "
            f"the image {image.volume.name}, {image.volume.shape}; give the volume of the same voxels"
        )
    return Placed(volume, volume.grid or image.grid)


def _refuse_no_ids(volume: Volume, role: str) -> Volume:
    if volume.dtype.kind not in "ui":
        raise SynmlopsError(f"{volume.name}: holds {volume.dtype}; ids of {role} are whole numbers")
    return volume


def _refuse_misfit(placed: Placed, image: Placed) -> None:
    """Refuse what is no part of the image: of other voxels without being the whole, or outside."""
    voxel, of_image = np.array(placed.grid.voxel_nm), np.array(image.grid.voxel_nm)
    beyond = np.abs(placed.box_nm - image.box_nm)
    larger = np.maximum(voxel, of_image) * (1 + _SAME_SHARE)
    if not np.allclose(voxel, of_image, rtol=_SAME_SHARE) and (beyond > larger).any():
        raise SynmlopsError(
            f"{placed.volume.name}: its {_words(placed.volume.shape[-3:])} voxels of {_words(voxel)} nm do "
            f"not fit the image {image.volume.name}, {_words(image.volume.shape)} voxels of "
            f"{_words(of_image)} nm: voxels of another size must cover the whole image"
        )
    inside_nm = placed.box_nm - image.box_nm
    if (inside_nm[0] < -larger).any() or (inside_nm[1] > larger).any():
        raise SynmlopsError(
            f"{placed.volume.name}: does not lie within the image {image.volume.name}; from z y x "
            f"{_words(placed.box_nm[0])} to {_words(placed.box_nm[1])} nm, the image from "
            f"{_words(image.box_nm[0])} to {_words(image.box_nm[1])}; give volumes of the same tissue"
        )


def _refuse_unlike(instances: Placed, probabilities: Placed) -> None:
    ours, theirs = instances.volume.shape, probabilities.volume.shape[-3:]
    near = np.allclose(instances.box_nm, probabilities.box_nm, atol=max(instances.grid.voxel_nm))
    if ours != theirs or not near:
        raise SynmlopsError(
            f"{instances.volume.name}: {_words(ours)} voxels from {_words(instances.grid.offset_nm)} nm are "
            f"not decoded from {probabilities.volume.name}, {_words(theirs)} voxels from "
            f"{_words(probabilities.grid.offset_nm)} nm; give the two of one decoding"
        )


def _read_partners(path: Path, within: Placed) -> tuple[pd.DataFrame, tuple[str, ...]]:
    if not path.exists():
        raise SynmlopsError(f"{path}: there is no such file; check the path")
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise SynmlopsError(
            f"{path}: is no partner table in Parquet ({error}); run `synmlops decode`"
        ) from error
    if table.empty:
        return table, (f"{path}: holds no partners",)
    points = points_nm(table)
    slack = np.array(within.grid.voxel_nm)
    inside = ((points >= within.box_nm[0] - slack) & (points <= within.box_nm[1] + slack)).all(axis=(1, 2))
    if not inside.any():
        raise SynmlopsError(
            f"{path}: none of its {len(table)} partners lies in {within.volume.name}; they are from z y x "
            f"{_words(points.min(axis=(0, 1)))} to {_words(points.max(axis=(0, 1)))} nm, the volume from "
            f"{_words(within.box_nm[0])} to {_words(within.box_nm[1])}"
        )
    if inside.all():
        return table, ()
    note = f"{path}: {np.count_nonzero(~inside)} of {len(table)} partners lie outside {within.volume.name}"
    return pd.DataFrame(table[inside]).reset_index(drop=True), (f"{note} and are not shown",)


def _known_sites(table: pd.DataFrame | None) -> str:
    if table is None or table.empty:
        return "the partner table is empty"
    return (
        f"is not in the partner table, whose {table.site.nunique()} sites are from {table.site.min()} to "
        f"{table.site.max()}"
    )


def _voxel(placed: Placed, at_nm: NDArray[np.float64]) -> tuple[int, int, int]:
    """Give the voxel at a point, or the nearest."""
    at = np.rint((at_nm - np.array(placed.grid.offset_nm)) / np.array(placed.grid.voxel_nm)).astype(int)
    z, y, x = (int(n) for n in np.clip(at, 0, np.array(placed.volume.shape) - 1))
    return z, y, x


def _words(numbers: object) -> str:
    return " x ".join(f"{number:g}" for number in np.asarray(numbers).tolist())
