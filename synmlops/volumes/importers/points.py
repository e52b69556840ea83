"""Pre and post points of a table become `pairs` labels: balls, or halves of balls, of a radius in nm."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.balls import Balls, blocks_of, paint, voxels_of
from synmlops.volumes.files import atomic_path
from synmlops.volumes.importers.point_columns import Units
from synmlops.volumes.importers.point_labels import Ends, Labelled, write_labels
from synmlops.volumes.importers.point_pairs import (
    BallShape,
    Opened,
    Pairs,
    PointSource,
    collect,
    count_note,
    first_of_each,
    opened_for,
)
from synmlops.volumes.importers.survey import Survey, draw_synapses, name_of_outputs
from synmlops.volumes.origin import made_by
from synmlops.volumes.sections import Region
from synmlops.volumes.store import Grid
from synmlops.volumes.table import COLUMNS, write_table

__all__ = [
    "BallShape",
    "PointSource",
    "Units",
    "Written",
    "import_points",
    "one_of",
    "params_lines",
    "stem_of",
    "survey_points",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """What an import wrote."""

    label: Path
    mask: Path | None  # None where nothing is ambiguous
    partners: Path
    sites: int
    rows: int
    notes: tuple[str, ...]


def import_points(source: PointSource, dest: Path, *, name: str | None = None) -> Written:
    """Write DEST/NAME_label.h5, DEST/NAME_partners.parquet and, where a side is not known, DEST/NAME_mask.h5.

    Parameters
    ----------
    source : PointSource
    dest : Path
    name : str, optional
        Default: the table's name without suffix.

    Returns
    -------
    written : Written

    Raises
    ------
    SynmlopsError
        If the table or a volume is not what it should be, points lie outside, or no synapse is left; nothing
        is written.
    """
    stem = stem_of(source, name)
    files = (dest / f"{stem}_{part}" for part in ("label.h5", "mask.h5", "partners.parquet"))
    label, mask, partners = files
    with opened_for(source) as opened:
        found = collect(source, opened)
        ends = _ends(found, source)
        done = write_labels(
            ends,
            label=label,
            mask=mask,
            radius_nm=source.radius_nm,
            grid=opened.grid,
            shape=opened.image.shape,
            neurons=opened.neurons,
            attrs=made_by("import points", asdict(source) | asdict(found.reading)),
            write_beside=lambda done: _write_partners(_table(found, done, opened.grid), partners),
        )
    if not done.masked:
        mask.unlink(missing_ok=True)  # of an earlier import, whose label is replaced
    kept = done.kept
    return Written(
        label=label,
        mask=mask if done.masked else None,
        partners=partners,
        sites=len(np.unique(found.site[kept])),
        rows=int(kept.sum()),
        notes=(*found.notes, *_painting_notes(done)),
    )


def survey_points(source: PointSource, picture: Path | None) -> Survey:
    """Say what an import would read and find, and draw a few synapses to `picture`; nothing else is written.

    Raises
    ------
    SynmlopsError
        As `import_points`.
    """
    with opened_for(source) as opened:
        found = collect(source, opened)
        balls = _ends(found, source).balls
        if picture is not None:
            at = (found.points_nm - opened.grid.offset_nm) / opened.grid.voxel_nm
            draw_synapses(
                picture,
                image=opened.image,
                sides=_sides_in(balls, source, opened),
                points_zyx=at,
                voxel_nm=opened.grid.voxel_nm,
                titles=[f"site {site + 1}" for site in found.site],
            )
        return Survey(f"{source.table}", tuple(_rows(source, found, opened)), found.notes)


def stem_of(source: PointSource, name: str | None) -> str:
    """Give what the files are called: the name, else the table's without suffixes; see `name_of_outputs`."""
    return name_of_outputs(source.table.name.partition(".")[0], name)


def one_of(option: str, value: str, allowed: tuple[T, ...]) -> T:
    """Give the value if it is allowed.

    Raises
    ------
    SynmlopsError
        If it is not, with what is.
    """
    for one in allowed:
        if one == value:
            return one
    raise SynmlopsError(f"{option} {value}: must be {' or '.join(map(str, allowed))}")


def params_lines(source: PointSource, written: Written) -> list[str]:
    """Give the lines of params.yaml that name what an import wrote."""
    paths = {
        "image": source.image,
        "label": written.label,
        "label_kind": "pairs",
        "neurons": source.neurons,
        "mask": written.mask,
        "partners": written.partners,
    }
    lines = ["data:", *([f"  voxel_nm: {list(source.voxel_nm)}"] if source.voxel_nm else []), "  train:"]
    return lines + [f"    {key}: {path}" for key, path in paths.items() if path is not None]


def _ends(found: Pairs, source: PointSource) -> Ends:
    """Give the balls: of the pre ends, which rows of a site share, then of the post ends, one a row."""
    n, site = len(found.site), found.site
    n_sites = int(site.max()) + 1
    rows = np.arange(n)
    middle = found.points_nm.mean(axis=1)
    along = found.points_nm[:, 0] - found.points_nm[:, 1]
    sides = []
    for side, end, sign in ((0, site, 1.0), (1, n_sites + rows, -1.0)):
        point, half = found.points_nm[:, side], source.shape == "half-ball"
        clip = found.neurons[:, side] if source.neurons is not None else np.zeros(n, np.uint64)
        centre, facing = (middle, sign * along) if half else (point, np.zeros_like(point))
        once = first_of_each(np.column_stack([end, centre])) if side == 0 else np.ones(n, bool)
        sides.append(Balls(end, site, point, centre, facing, clip).where(once))
    pre, post = sides
    unsure = found.unsure_nm.reshape(-1, 3)
    if source.shape == "half-ball":
        unsure = np.concatenate([unsure, found.unsure_nm.mean(axis=1)])
    return Ends(pre.and_(post), site_of_row=site, unsure_nm=unsure)


def _sides_in(balls: Balls, source: PointSource, opened: Opened) -> Callable[[Region], NDArray[np.uint8]]:
    """Give a function that paints a box as sides: 1 pre, 2 post."""

    def sides(box: Region) -> NDArray[np.uint8]:
        size = tuple(axis.stop - axis.start for axis in box)
        grid = opened.grid.cropped(tuple(axis.start for axis in box))
        here = [rows for _, rows in blocks_of(balls, radius_nm=source.radius_nm, grid=grid, shape=size)]
        if not here:
            return np.zeros(size, np.uint8)
        some = balls.where(np.unique(np.concatenate(here)))
        neurons = None if opened.neurons is None else opened.neurons[box]
        painted = paint(some, box, radius_nm=source.radius_nm, grid=opened.grid, neurons=neurons)
        n_sites = int(balls.site.max()) + 1
        code = np.concatenate([[0], np.where(painted.ends < n_sites, 1, 2)]).astype(np.uint8)
        return np.asarray(code[painted.owner])

    return sides


def _write_partners(table: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as partial:
        write_table(table, partial)


def _table(found: Pairs, done: Labelled, grid: Grid) -> pd.DataFrame:
    """Lay out the partner table of the rows that have both sides."""
    kept, n_sites = done.kept, int(found.site.max()) + 1
    pre, post = found.site[kept], n_sites + np.flatnonzero(kept)
    columns: dict[str, NDArray[np.generic]] = {"site": pre + 1, "partner": np.arange(1, len(pre) + 1)}
    index = voxels_of(found.points_nm, grid)
    for k, (side, end) in enumerate((("pre", pre), ("post", post))):
        columns |= {f"{side}_{axis}_nm": found.points_nm[kept, k, i] for i, axis in enumerate("zyx")}
        columns |= {f"{side}_{axis}": index[kept, k, i] for i, axis in enumerate("zyx")}
        columns[f"{side}_voxels"] = done.voxels[end]
        columns[f"{side}_neuron"] = found.neurons[kept, k]
    low, high = np.minimum(done.low[pre], done.low[post]), np.maximum(done.high[pre], done.high[post])
    for i, axis in enumerate("zyx"):
        columns |= {f"{axis}0": low[:, i], f"{axis}1": high[:, i]}
    columns["confidence"] = found.confidence[kept]
    ids = found.neurons[kept]
    columns["self_contact"] = (ids[:, 0] == ids[:, 1]) & (ids[:, 0] > 0)
    table = pd.DataFrame({name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()})
    if found.score is not None:
        table["score"] = found.score[kept]
    return table


def _rows(source: PointSource, found: Pairs, opened: Opened) -> Iterator[tuple[str, str]]:
    """Give what a survey tells."""
    grid, read = opened.grid, found.read
    per_site = np.bincount(found.site)
    reading = found.reading
    units = "nm" if reading.units == "nm" else f"voxels of {reading.point_nm or grid.voxel_nm} nm"
    yield "columns", f"{read.name}'s: " + "; ".join(f"{key}: {names}" for key, names in read.columns.items())
    yield "positions", units + (", x and z swapped" if source.swap_xz else "")
    yield "pairs", f"{len(found.site)} of {len(read.raw)} rows"
    yield "sites", f"{len(per_site)}, with {per_site.mean():.2f} posts on average, {per_site.max()} at most"
    low, high = found.points_nm.min(axis=(0, 1)), found.points_nm.max(axis=(0, 1))
    yield "from, to", f"{low.round(1).tolist()} to {high.round(1).tolist()} nm, z y x"
    gap = np.linalg.norm(found.points_nm[:, 0] - found.points_nm[:, 1], axis=1)
    yield "pre to post", f"{np.median(gap):.0f} nm (median), {gap.max():.0f} at most"
    yield (
        "image",
        f"{opened.image.name}: {opened.image.shape} voxels of {grid.voxel_nm} nm from {grid.offset_nm}",
    )
    yield (
        "neurons",
        f"{opened.neurons.name}, {opened.neurons.dtype}" if opened.neurons else "none: balls are whole",
    )
    yield "label", f"pairs, {source.shape} of {source.radius_nm:g} nm"


def _painting_notes(done: Labelled) -> tuple[str, ...]:
    lost = int(np.count_nonzero(~done.kept))
    notes = count_note(
        lost, len(done.kept), "have a side without a voxel of its own, since other points lie nearer: masked"
    )
    if done.contested:
        notes += (f"{done.contested} voxels lie in balls of several sites: each is of the nearest point",)
    return notes
