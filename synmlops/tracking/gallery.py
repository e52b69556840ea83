"""Which views a report shows: the telling sections of each region, and the gravest mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.synapses.instances import Instances
from synmlops.tracking.mistakes import (
    Kind,
    Mistake,
    SiteVoxels,
    mistakes_of,
    telling_sections,
    telling_window,
    window_round,
)
from synmlops.tracking.overlays import Box, View, draw

_MOST_SECTIONS = 10  # in all, and of one region at most ...
_MOST_OF_REGION = 4
_MOST_CASES = 12  # of each kind
_SECTION_VOXELS = 640  # along a side; of a larger section a window is shown
_CASE_NM = 1000.0
_ARROW_NM = 200.0  # a partner is drawn in sections no further than this from its points
_SECTION_CSS, _CASE_CSS = 560, 212


@dataclass(frozen=True, eq=False)
class RegionView:
    """One scored region.

    Attributes
    ----------
    name, fold : str
    image : (Z, Y, X) array of uint8 or uint16
        May be a memory map: only what is shown is read.
    predicted, true : (Z, Y, X) array of unsigned int
        Pairs convention if `sides`, else one id per synapse; 0 where voxels are not to be scored. `true` is
        None where it is not known.
    sides : bool
    predicted_partners, true_partners : DataFrame or None
        Partner tables (`synmlops.volumes.table.COLUMNS`).
    voxel_nm, offset_nm : tuple of float
        Voxel size, and world position of voxel (0, 0, 0); nm, z y x.
    """

    name: str
    fold: str
    image: NDArray[np.integer]
    predicted: Instances
    true: Instances | None
    sides: bool
    predicted_partners: pd.DataFrame | None
    true_partners: pd.DataFrame | None
    voxel_nm: tuple[float, float, float]
    offset_nm: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Section:
    """A section, or a window of one."""

    view: View
    z: int
    where: str
    n_predicted: int
    n_true: int | None


@dataclass(frozen=True)
class RegionSections:
    """The sections of one region."""

    name: str
    fold: str  # empty if all regions are of one
    shape: tuple[int, ...]
    size_nm: str  # of a voxel, z y x
    sides: bool
    scored: bool
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Case:
    """A mistake and where to find it."""

    mistake: Mistake
    view: View
    region: str
    zyx: tuple[int, int, int]
    nm: str


@dataclass(frozen=True)
class CaseGroup:
    """The mistakes of one kind: the gravest, and how many there are."""

    kind: Kind
    cases: tuple[Case, ...]
    total: int


@dataclass(frozen=True)
class Gallery:
    """All views of a report."""

    regions: tuple[RegionSections, ...] = ()
    cases: tuple[CaseGroup, ...] = ()  # of each kind that can occur; none without a truth
    n_not_shown: int = 0  # regions


def gallery_of(regions: Sequence[RegionView], *, iou: float) -> Gallery:
    """Choose and draw what is shown of the regions.

    Parameters
    ----------
    regions : sequence of RegionView
    iou : float
        Least intersection over union of a match; what does not reach it is a mistake.

    Raises
    ------
    ValueError
        If the volumes of a region differ in shape.
    """
    scenes = [_Scene.of(region) for region in regions]
    shown = scenes[:_MOST_SECTIONS]
    several_folds = len({region.fold for region in regions}) > 1
    per_region = min(_MOST_OF_REGION, _MOST_SECTIONS // max(len(shown), 1))
    return Gallery(
        regions=tuple(_sections_of(scene, most=per_region, with_fold=several_folds) for scene in shown),
        cases=_case_groups(scenes, iou=iou),
        n_not_shown=len(scenes) - len(shown),
    )


@dataclass(frozen=True, eq=False)
class _Scene:
    """A region with the voxels of its sites."""

    region: RegionView
    predicted: SiteVoxels
    true: SiteVoxels | None

    @classmethod
    def of(cls, region: RegionView) -> "_Scene":
        shapes = {region.image.shape, region.predicted.shape}
        shapes |= set() if region.true is None else {region.true.shape}
        if len(shapes) != 1 or region.image.ndim != 3:
            raise ValueError(
                f"{region.name}: image, predicted and true must have one shape z, y, x; got {shapes}"
            )
        true = None if region.true is None else SiteVoxels.of(region.true, sides=region.sides)
        return cls(region, SiteVoxels.of(region.predicted, sides=region.sides), true)

    def view(self, z: int, box: Box, *, css_width: int, framed: Box | None = None) -> View:
        region = self.region
        return draw(
            np.asarray(region.image[z][box]),
            box=box,
            voxel_nm=region.voxel_nm[1:],
            predicted=_marks(region.predicted[z][box], sides=region.sides),
            true={} if region.true is None else _marks(region.true[z][box], sides=region.sides),
            predicted_partners=_partners_in(region.predicted_partners, z, box, z_nm=region.voxel_nm[0]),
            true_partners=_partners_in(region.true_partners, z, box, z_nm=region.voxel_nm[0]),
            css_width=css_width,
            framed=framed,
        )


def _sections_of(scene: _Scene, *, most: int, with_fold: bool) -> RegionSections:
    region = scene.region
    volumes = [scene.predicted] if scene.true is None else [scene.predicted, scene.true]
    chosen = telling_sections(volumes, most=most) or [region.image.shape[0] // 2]
    return RegionSections(
        name=region.name,
        fold=f"fold {region.fold}" if with_fold else "",
        shape=region.image.shape,
        size_nm=" x ".join(f"{nm:g}" for nm in region.voxel_nm),
        sides=region.sides,
        scored=region.true is not None,
        sections=tuple(_section(scene, z) for z in chosen),
    )


def _section(scene: _Scene, z: int) -> Section:
    region = scene.region
    marked = region.predicted[z] != 0
    if region.true is not None:
        marked = marked | (region.true[z] != 0)
    box = telling_window(marked, size_yx=(_SECTION_VOXELS, _SECTION_VOXELS))
    whole = all(part == slice(0, n) for part, n in zip(box, marked.shape, strict=True))
    return Section(
        view=scene.view(z, box, css_width=_SECTION_CSS),
        z=z,
        where=""
        if whole
        else f"y {box[0].start} to {box[0].stop - 1}, x {box[1].start} to {box[1].stop - 1}",
        n_predicted=_n_sites(region.predicted[z][box], sides=region.sides),
        n_true=None if region.true is None else _n_sites(region.true[z][box], sides=region.sides),
    )


def _case_groups(scenes: Sequence[_Scene], *, iou: float) -> tuple[CaseGroup, ...]:
    found: dict[Kind, list[tuple[Mistake, _Scene]]] = {"missed": [], "false": [], "reversed": []}
    for scene in scenes:
        region = scene.region
        if region.true is None:
            continue
        for mistake in mistakes_of(region.predicted, region.true, sides=region.sides, iou=iou):
            found[mistake.kind].append((mistake, scene))
    known = {scene.region.sides for scene in scenes if scene.true is not None}
    if not known:
        return ()
    groups = []
    for kind, mistakes in found.items():
        if kind == "reversed" and True not in known:
            continue
        worst = sorted(mistakes, key=lambda item: item[0].gravity)[:_MOST_CASES]
        groups.append(CaseGroup(kind, tuple(_case(*item) for item in worst), len(mistakes)))
    return tuple(groups)


def _case(mistake: Mistake, scene: _Scene) -> Case:
    region = scene.region
    voxels = scene.true if mistake.kind != "false" else scene.predicted
    assert voxels is not None, "a region without truth has no mistakes"
    (z, y, x), framed = voxels.centre_of(mistake.site)
    size = tuple(max(round(_CASE_NM / nm), 1) for nm in region.voxel_nm[1:])
    box = window_round((y, x), size_yx=(size[0], size[1]), shape_yx=region.image.shape[1:])
    nm = [o + i * v for o, i, v in zip(region.offset_nm, (z, y, x), region.voxel_nm, strict=True)]
    return Case(
        mistake=mistake,
        view=scene.view(z, box, css_width=_CASE_CSS, framed=framed),
        region=region.name,
        zyx=(z, y, x),
        nm=", ".join(f"{value:.0f}" for value in nm),
    )


def _marks(instances_yx: Instances, *, sides: bool) -> dict[str, NDArray[np.bool_]]:
    if not sides:
        return {"union": instances_yx != 0}
    return {"pre": instances_yx % 2 == 1, "post": (instances_yx != 0) & (instances_yx % 2 == 0)}


def _n_sites(instances_yx: Instances, *, sides: bool) -> int:
    ids = np.unique(instances_yx[instances_yx != 0])
    return len(np.unique((ids >> 1) + (ids & 1))) if sides else len(ids)


def _partners_in(table: pd.DataFrame | None, z: int, box: Box, *, z_nm: float) -> pd.DataFrame | None:
    """Give the partners of a section: voxels in it, its points near it in z and within the window."""
    if table is None:
        return None
    near = _ARROW_NM / z_nm
    points = table[["pre_z", "post_z"]]
    inside = (table["z0"] <= z) & (table["z1"] > z)
    inside &= (points.min(axis=1) - near <= z) & (points.max(axis=1) + near >= z)
    for side in ("pre", "post"):
        for axis, part in zip("yx", box, strict=True):
            inside &= table[f"{side}_{axis}"].between(part.start, part.stop - 1)
    return table[inside]
