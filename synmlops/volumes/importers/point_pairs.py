"""Pairs of points in the world of an image: read, placed, grouped into sites, looked up in a segmentation."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from synmlops.params import SynmlopsError
from synmlops.volumes.balls import inside, values_at, voxels_of
from synmlops.volumes.importers.point_checks import Reading, check_places, choose_reading
from synmlops.volumes.importers.point_columns import PointTable, Units, read_points
from synmlops.volumes.store import Grid, Volume, open_volume

Nm = tuple[float, float, float]
BallShape = Literal["ball", "half-ball"]


@dataclass(frozen=True)
class PointSource:
    """A table of points, the volumes that it belongs to, and how it is read.

    Attributes
    ----------
    table : Path
    image : str
    neurons : str, optional
        Segmentation of the same voxels; balls are clipped to the neuron under their point.
    radius_nm : float
    shape : "ball" or "half-ball"
        A ball about each point, or a ball about the middle of the two whose half on the pre point's side is
        the pre side.
    units, point_nm, swap_xz
        See `synmlops.volumes.importers.point_checks.Reading`; None takes what tables of this kind have.
    voxel_nm : tuple of float, optional
        Of the image, where its file does not say it.
    columns : mapping
        See `synmlops.volumes.importers.point_columns.read_points`.
    crop : bool
        Leave out synapses of which an end lies outside the image; else they are an error.
    merge_nm : float
        Pre points of one neuron that lie no farther apart are one site, and so are chains of such; 0 takes
        each for a site of its own. Not for tables with a column that names the site.
    """

    table: Path
    image: str
    radius_nm: float
    neurons: str | None = None
    shape: BallShape = "ball"
    units: Units | None = None
    point_nm: Nm | None = None
    voxel_nm: Nm | None = None
    swap_xz: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    crop: bool = False
    merge_nm: float = 0.0


@dataclass(frozen=True, eq=False)
class Pairs:
    """Points that are ready to be painted, a row for each pair: what `collect` gives."""

    points_nm: NDArray[np.float64]  # (N, 2, 3)
    site: NDArray[np.int64]  # from 0, without gaps
    neurons: NDArray[np.uint64]  # (N, 2)
    confidence: NDArray[np.float64]
    score: NDArray[np.float64] | None  # as the table has it, where that is no confidence
    unsure_nm: NDArray[np.float64]  # (M, 2, 3), pairs left out, about which the label is not to be trusted
    read: PointTable
    reading: Reading
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Opened:
    """The open volumes of a table."""

    image: Volume
    neurons: Volume | None
    grid: Grid


@contextmanager
def opened_for(source: PointSource) -> Iterator[Opened]:
    """Open the volumes of a table; nothing but their headers is read.

    Raises
    ------
    SynmlopsError
        If a volume cannot be read, the voxel size is not known, the segmentation has other voxels, or the
        radius is less than half a voxel.
    """
    with ExitStack() as stack:
        image = stack.enter_context(open_volume(source.image))
        grid = image.grid
        if source.voxel_nm is not None:
            if not (np.isfinite(source.voxel_nm).all() and min(source.voxel_nm) > 0):
                raise SynmlopsError(f"--voxel-nm {source.voxel_nm}: sizes in nm must be positive numbers")
            grid = Grid(source.voxel_nm, grid.offset_nm if grid else (0.0, 0.0, 0.0))
        if grid is None:
            raise SynmlopsError(
                f"{image.name}: does not say its voxel size; give --voxel-nm z,y,x, as 40,8,8"
            )
        _refuse_radius(source.radius_nm, grid)
        neurons = None
        if source.neurons is not None:
            neurons = stack.enter_context(open_volume(source.neurons))
            _refuse_unlike(neurons, image)
        yield Opened(image, neurons, grid)


def _refuse_radius(radius_nm: float, grid: Grid) -> None:
    least = max(grid.voxel_nm) / 2
    if not np.isfinite(radius_nm) or radius_nm < least:
        raise SynmlopsError(
            f"--radius-nm {radius_nm:g}: must be at least {least:g}, half of the image's longest voxel side"
        )


def _refuse_unlike(neurons: Volume, image: Volume) -> None:
    if neurons.dtype.kind not in "ui":
        raise SynmlopsError(f"{neurons.name}: holds {neurons.dtype}; ids of neurons are whole numbers")
    if neurons.shape != image.shape:
        raise SynmlopsError(
            f"{neurons.name}: has {neurons.shape} voxels, the image {image.name} has {image.shape}; give the "
            "segmentation of the same voxels"
        )
    if neurons.grid is None or image.grid is None:
        return
    ours, theirs = (np.ravel([grid.voxel_nm, grid.offset_nm]) for grid in (neurons.grid, image.grid))
    if not np.allclose(ours, theirs, rtol=0.01):
        raise SynmlopsError(
            f"{neurons.name}: lies at {neurons.grid}, the image {image.name} at {image.grid}; give the "
            "segmentation of the same voxels"
        )


def collect(source: PointSource, opened: Opened) -> Pairs:
    """Read the table, place its points, and choose the pairs whose sides are known.

    Raises
    ------
    SynmlopsError
        If the table is not what it should be (see `read_points`), its points do not fit the image (see
        `check_places`), or no pair is left.
    """
    read, where, shape = (
        read_points(source.table, columns=source.columns),
        str(source.table),
        opened.image.shape,
    )
    reading = choose_reading(
        read, units=source.units, point_nm=source.point_nm, swap_xz=source.swap_xz, where=where
    )
    points = check_places(read.raw, reading, grid=opened.grid, shape=shape, where=where, crop=source.crop)
    there = np.asarray(inside(voxels_of(points, opened.grid), shape).all(axis=1))
    under = _under(points, there, opened)
    site, merged = _merged(
        _sites(read), read, points[:, 0], under=under, merge_nm=source.merge_nm, where=where
    )
    alone = first_of_each(np.column_stack([site, points[:, 1]]))
    notes = merged
    notes += count_note(
        (~there).sum(), len(points), "have an end outside the image and are left out (--crop)"
    )
    notes += count_note((~alone).sum(), len(points), "stand there twice and count once")
    kept = there & alone
    near = ~there & _near(points, source.radius_nm, opened.grid, shape)
    neurons, no_neuron, more = _neurons_of(read, under, kept, opened)
    notes += more
    kept &= ~no_neuron
    if not kept.any():
        raise SynmlopsError(f"{where}: no synapse is left to write: {'; '.join(notes)}")
    confidence, score = _confidence(read.confidence, len(points))
    if score is not None:
        notes += (f"{read.columns['confidence']}: is no confidence from 0 to 1; kept as the column score",)
    return Pairs(
        points_nm=points[kept],
        site=np.unique(site[kept], return_inverse=True)[1].astype(np.int64),
        neurons=neurons[kept],
        confidence=confidence[kept],
        score=None if score is None else score[kept],
        unsure_nm=points[near | no_neuron],
        read=read,
        reading=reading,
        notes=notes,
    )


def _under(
    points: NDArray[np.float64], there: NDArray[np.bool_], opened: Opened
) -> NDArray[np.uint64] | None:
    """Give the neurons that a segmentation has under both ends of the pairs inside; None without one."""
    if opened.neurons is None:
        return None
    under = np.zeros((len(points), 2), np.uint64)
    ends = voxels_of(points[there], opened.grid)
    under[there] = values_at(opened.neurons, ends.reshape(-1, 3)).reshape(-1, 2)
    return under


def _neurons_of(
    read: PointTable, under: NDArray[np.uint64] | None, kept: NDArray[np.bool_], opened: Opened
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], tuple[str, ...]]:
    """Give the neurons of both ends, which pairs have an end in none, and notes.

    The segmentation, where there is one, goes before the ids of the table.
    """
    n = len(read.raw)
    given = np.zeros((n, 2), np.uint64) if read.neurons is None else read.neurons
    if under is None or opened.neurons is None:
        return given, np.zeros(n, bool), ()
    none = kept & (under == 0).any(axis=1)
    both = kept & ~none
    other = both & ((under != given) & (given > 0)).any(axis=1)
    self_contact = both & (under[:, 0] == under[:, 1])
    notes = count_note(
        none.sum(),
        n,
        f"have an end in the background of {opened.neurons.name}: left out and masked",
    )
    notes += count_note(
        self_contact.sum(), n, "have both ends in one neuron (self_contact in the partner table)"
    )
    notes += count_note(other.sum(), n, "name another neuron than the segmentation, whose ids are taken")
    return under, none, notes


def _sites(read: PointTable) -> NDArray[np.int64]:
    """Number the synapses in the order of their first rows: those of one pre point, unless a column tells."""
    if read.site is not None:
        _, first, number = np.unique(read.site, return_index=True, return_inverse=True)
    else:
        keys = read.raw[:, 0]
        if read.neurons is not None:  # by rank, for a float does not hold all digits of an id
            keys = np.column_stack([keys, np.unique(read.neurons[:, 0], return_inverse=True)[1]])
        _, first, number = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return _in_order(number.ravel(), first)


def _in_order(number: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number anew by the first row of each."""
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return np.asarray(rank[number])


def _merged(
    site: NDArray[np.int64],
    read: PointTable,
    pre_nm: NDArray[np.float64],
    *,
    under: NDArray[np.uint64] | None,
    merge_nm: float,
    where: str,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Make one site of those whose pre points lie near each other in one neuron; a note says of how many."""
    if not (merge_nm >= 0 and np.isfinite(merge_nm)):
        raise SynmlopsError(f"--merge-nm {merge_nm:g}: must be a number of nm, 0 or more")
    if merge_nm == 0:
        return site, ()
    if read.site is not None:
        raise SynmlopsError(
            f"{where}: its column {read.columns['site']} says which rows are one site; leave out --merge-nm"
        )
    first = np.flatnonzero(first_of_each(site[:, None].astype(np.float64)))  # a row for each site, in order
    near = cKDTree(pre_nm[first]).query_pairs(merge_nm, output_type="ndarray")
    neurons = read.neurons if under is None else under
    if neurons is not None:
        near = near[neurons[first[near[:, 0]], 0] == neurons[first[near[:, 1]], 0]]
    n = len(first)
    joined = coo_array((np.ones(len(near)), (near[:, 0], near[:, 1])), (n, n))
    n_merged, group = connected_components(joined, directed=False)
    begins = np.unique(group, return_index=True)[1]
    note = f"{n} pre points became {n_merged} sites (--merge-nm {merge_nm:g})"
    return _in_order(group.astype(np.int64), begins)[site], (note,) if n_merged < n else ()


def first_of_each(keys: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say which rows are the first of their kind."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, axis=0, return_index=True)[1]] = True
    return first


def _near(
    points: NDArray[np.float64], radius_nm: float, grid: Grid, shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Say which pairs reach into the image although an end lies outside."""
    reach = radius_nm / np.array(grid.voxel_nm)
    at = (points - grid.offset_nm) / np.array(grid.voxel_nm)
    return np.asarray(((at >= -reach) & (at <= np.array(shape) - 1 + reach)).all(axis=2).any(axis=1))


def _confidence(
    given: NDArray[np.float64] | None, n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Give confidences from 0 to 1, and the table's scores where they are none."""
    if given is None:
        return np.ones(n), None
    if np.isfinite(given).all() and given.min() >= 0 and given.max() <= 1:
        return given, None
    return np.ones(n), given


def count_note(n: int, total: int, what: str) -> tuple[str, ...]:
    """Say how many rows are odd in some way, or nothing where none is.

    Examples
    --------
    >>> count_note(2, 9, "stand there twice"), count_note(0, 9, "stand there twice")
    (('2 of 9 rows stand there twice',), ())
    """
    return (f"{n} of {total} rows {what}",) if n else ()
