"""What a dry run shows of the volumes that an imported config names, beside the table of its keys."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import DataParams, VolumeSet
from synmlops.section import LabelKind, SynmlopsError
from synmlops.volumes.importers.survey import Survey, draw_synapses
from synmlops.volumes.inspect import VolumeReport, inspect_volume
from synmlops.volumes.preparing import Source, list_sources, sides_of
from synmlops.volumes.sites import MIDDLE, START, STOP, find_sites
from synmlops.volumes.store import Volume, open_volume

_ASSUMED_NM = (40.0, 8.0, 8.0)
_SHOWN = 6


def survey_volumes(data: DataParams) -> Survey:
    """Read every volume that is there and say what it holds; one that is missing is a remark.

    Raises
    ------
    SynmlopsError
        If roles and labels do not fit each other.
    """
    rows: list[tuple[str, str]] = []
    odd: list[str] = []
    for role, source in _sources(data):
        for part, path in source.paths.items():
            if not _is_there(path):
                odd.append(f"data.{role}.{part}: {path} is not there")
                continue
            report = inspect_volume(path)
            rows.append((f"{role} {part}", f"{path}: {_words(report)}"))
            odd += [f"{path}: {problem}" for problem in report.problems if not _is_known(problem, data)]
            if part == "label":
                odd += _other_kind(path, report, source.kind)
    return Survey("volumes", tuple(rows), tuple(odd))


def draw_first(data: DataParams, picture: Path) -> bool:
    """Draw a few synapses of the first training volume whose image and label are there.

    Returns
    -------
    drawn : bool
        False, and nothing is written, where there is none.
    """
    for role, source in _sources(data):
        both = source.label is not None and source.kind is not None and _is_there(source.image)
        if role != "train" or not both or not _is_there(str(source.label)):
            continue
        with open_volume(source.image) as image, open_volume(str(source.label)) as label:
            if image.shape == label.shape and _draw(image, label, source.kind, data=data, picture=picture):
                return True
    return False


def _sources(data: DataParams) -> Iterator[tuple[str, Source]]:
    for role in ("train", "validation", "test"):
        volumes: VolumeSet | None = getattr(data, role)
        if volumes is not None:
            for source in list_sources(volumes, role=role):
                yield role, source


def _is_there(path: str) -> bool:
    bare = path.partition("::")[0]
    return "://" in bare or Path(bare).exists()


def _words(report: VolumeReport) -> str:
    if not report.readable:
        return "cannot be read"
    size = "no voxel size"
    if report.grid is not None:
        size = f"voxels of {' x '.join(f'{nm:g}' for nm in report.grid.voxel_nm)} nm"
    parts = [f"{' x '.join(map(str, report.shape))} {report.dtype}", size, report.label]
    return ", ".join(part for part in parts if part)


def _is_known(problem: str, data: DataParams) -> bool:
    return data.voxel_nm is not None and problem.startswith("no voxel size")


def _other_kind(path: str, report: VolumeReport, kind: LabelKind | None) -> list[str]:
    """Say where a label looks like another kind than the config's target makes of it, or like no label."""
    if report.role in ("image", "probabilities"):
        return [
            f"{path}: is named as a label, but it looks like {report.role}; name the dataset: a.h5::label"
        ]
    looks = "a mask" if report.role == "mask" else report.label.removeprefix("looks like ").partition(":")[0]
    if kind is None or kind == "union" or not report.label or looks in (kind, "instances"):
        return []
    return [f"{path}: is taken for {kind}, but it looks like {looks}"]


@dataclass(frozen=True)
class _Sides:
    """Codes of a label's sides, box by box."""

    label: Volume
    kind: LabelKind

    def __call__(self, box: tuple[slice, slice, slice]) -> NDArray[np.uint8]:
        return sides_of(self.label[box], self.kind)


def _draw(image: Volume, label: Volume, kind: LabelKind | None, *, data: DataParams, picture: Path) -> bool:
    assert kind is not None
    voxel_nm = data.voxel_nm or (image.grid.voxel_nm if image.grid else _ASSUMED_NM)
    try:
        sites = find_sites(label.slabs, kind, voxel_nm=voxel_nm)
    except (SynmlopsError, ValueError):  # what is odd stands in the survey
        return False
    if not len(sites):
        return False
    points = np.full((len(sites), 2, 3), np.nan)
    points[:, 0] = sites[:, MIDDLE]
    for n in np.unique(np.linspace(0, len(sites) - 1, _SHOWN).round().astype(int)):  # those that are drawn
        points[n] = _ends(label, sites[n], kind)
    draw_synapses(picture, image=image, sides=_Sides(label, kind), points_zyx=points, voxel_nm=voxel_nm)
    return True


def _ends(label: Volume, site: NDArray[Any], kind: LabelKind) -> NDArray[np.float64]:
    """Give a voxel of pre and one of post near the middle of each; the synapse's middle where not known."""
    if kind != "pairs":
        return np.array([site[MIDDLE], [np.nan] * 3], np.float64)
    z, y, x = (slice(int(a), int(b)) for a, b in zip(site[START], site[STOP], strict=True))
    ids = label[(z, y, x)]
    own = int(ids[tuple(site[MIDDLE] - site[START])])
    ends = np.full((2, 3), np.nan)
    for side, one in enumerate((own - 1 + own % 2, own + own % 2)):
        at = np.argwhere(ids == one)
        if len(at):
            ends[side] = at[((at - at.mean(axis=0)) ** 2).sum(axis=1).argmin()] + site[START]
    return ends
