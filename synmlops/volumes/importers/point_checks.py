"""Points of a table in the world of an image: units, order of axes, and what tells that one is wrong."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.balls import inside, voxels_of
from synmlops.volumes.importers.point_columns import PointTable, Units
from synmlops.volumes.store import Grid

Nm = tuple[float, float, float]
Points = NDArray[np.float64]

_FEW = 8
"""Ends from which on it is no chance that all of them lie in a corner."""

_CORNER = 0.01  # share of the volume
_MOST_INSIDE = 0.8  # share of the ends inside up to which another reading may be the right one
_ALL_INSIDE = 0.95  # ... if it has so many inside


@dataclass(frozen=True)
class Reading:
    """How the positions of a table are read.

    Attributes
    ----------
    units : "nm" or "voxel"
    point_nm : tuple of float, optional
        Voxel size that positions count in, from the origin of the world; without it they count the voxels of
        the image, from its first.
    swap_xz : bool
        Whether what the table calls x is z, and the other way round.
    """

    units: Units
    point_nm: Nm | None = None
    swap_xz: bool = False

    def to_nm(self, raw: Points, grid: Grid) -> Points:
        """Give positions, z y x in the last axis, in nm of the world.

        Examples
        --------
        >>> grid = Grid((40.0, 4.0, 4.0), (400.0, 0.0, 0.0))
        >>> Reading("voxel").to_nm(np.array([1.0, 2.0, 3.0]), grid).tolist()
        [440.0, 8.0, 12.0]
        >>> Reading("voxel", (30.0, 8.0, 8.0)).to_nm(np.array([1.0, 2.0, 3.0]), grid).tolist()
        [30.0, 16.0, 24.0]
        """
        ordered = raw[..., ::-1] if self.swap_xz else raw
        if self.units == "nm":
            return ordered
        if self.point_nm is not None:
            return np.asarray(ordered * self.point_nm)
        return np.asarray(ordered * grid.voxel_nm + grid.offset_nm)


def choose_reading(
    table: PointTable, *, units: Units | None, point_nm: Nm | None, swap_xz: bool, where: str
) -> Reading:
    """Settle the units: those given, else those that tables of this kind have.

    Raises
    ------
    SynmlopsError
        If units and point size contradict each other, or nothing tells the units.
    """
    if point_nm is not None:
        if not (np.isfinite(point_nm).all() and min(point_nm) > 0):
            raise SynmlopsError(f"--point-nm {point_nm}: sizes in nm must be positive numbers, z,y,x")
        if units == "nm":
            raise SynmlopsError(
                "--point-nm is the size of the voxels that positions count; not with --units nm"
            )
        return Reading("voxel", point_nm, swap_xz)
    found = units or table.units
    if found is None:
        kind = "CAVE gives nm or voxels of a viewer's resolution" if table.name == "cave" else "nothing tells"
        raise SynmlopsError(
            f"{where}: are its positions nm or voxels? {kind}; add --units nm, --units voxel (of the "
            "image) or --point-nm z,y,x (voxels of that size, such as 40,4,4)"
        )
    return Reading(found, None, swap_xz)


def check_places(
    raw: Points, reading: Reading, *, grid: Grid, shape: tuple[int, ...], where: str, crop: bool
) -> Points:
    """Give the points in nm, or say what is wrong with how they are read.

    Parameters
    ----------
    raw : (N, 2, 3) array of float
    reading : Reading
    grid, shape
        Of the image.
    where : str
        The table, for messages.
    crop : bool
        Whether points outside are to be left out later; else they are refused.

    Raises
    ------
    SynmlopsError
        If points lie outside, unless `crop`; if most do while with x and z swapped, or in other units, they
        would not; if all lie where they would as voxels although they are read as nm; if both ends of a row
        are one point.
    """
    points = reading.to_nm(raw, grid)
    there = _lie_inside(points, grid, shape)
    if there.mean() <= _MOST_INSIDE:
        _say_the_better_reading(raw, reading, there, grid=grid, shape=shape, where=where)
    if not there.any() or not (there.all() or crop):
        row, side = (int(n) for n in np.argwhere(~there)[0])
        raise SynmlopsError(
            f"{where}: {np.count_nonzero(~there)} of {there.size} points lie outside the image, first the "
            f"{('pre', 'post')[side]} of row {row + 1} at z y x = {_words(points[row, side])} nm; the image "
            f"is from {_words(grid.offset_nm)} to {_words(_far_end(grid, shape))} nm. "
            + (
                "Give the image of the same tissue"
                if not there.any()
                else "Add --crop to leave such synapses out, or give the image of the same tissue"
            )
        )
    _refuse_corner(raw, reading, grid=grid, shape=shape, where=where)
    same = np.flatnonzero((points[:, 0] == points[:, 1]).all(axis=1))
    if len(same):
        raise SynmlopsError(
            f"{where}: pre and post of row {same[0] + 1} are one point, as in {len(same)} of {len(points)} "
            "rows; remove them, or name other columns with --columns"
        )
    return points


def _say_the_better_reading(
    raw: Points,
    reading: Reading,
    there: NDArray[np.bool_],
    *,
    grid: Grid,
    shape: tuple[int, ...],
    where: str,
) -> None:
    for other, what, option in _other_readings(reading):
        n = np.count_nonzero(_lie_inside(other.to_nm(raw, grid), grid, shape))
        if n >= _ALL_INSIDE * there.size:
            raise SynmlopsError(
                f"{where}: {np.count_nonzero(~there)} of {there.size} points lie outside the image as they "
                f"are read, but {n} lie inside {what}; {option}"
            )


def _other_readings(reading: Reading) -> Iterator[tuple[Reading, str, str]]:
    """Give what may have been meant instead, in words, and what to do about it."""
    for swap, change in list(product((False, True), repeat=2))[1:]:
        swapped, changed = reading.swap_xz ^ swap, "voxel" if reading.units == "nm" else "nm"
        other = replace(reading, swap_xz=swapped)
        words, options = [], []
        if swap:
            words.append("with x and z swapped")
            options.append("add --swap-xz" if swapped else "leave out --swap-xz")
        if change:
            other = Reading("voxel" if changed == "voxel" else "nm", None, swapped)
            words.append(f"as {'voxels of the image' if changed == 'voxel' else 'nm'}")
            options.append(f"use --units {changed}" + (", no --point-nm" if reading.point_nm else ""))
        yield other, " and ".join(words), " and ".join(options)


def _refuse_corner(raw: Points, reading: Reading, *, grid: Grid, shape: tuple[int, ...], where: str) -> None:
    """Refuse points in nm that fill the corner in which they would lie had voxels been taken for nm."""
    corner = 1 / float(np.prod(grid.voxel_nm))
    if reading.units != "nm" or corner > _CORNER or raw.size < 3 * _FEW:
        return
    if _lie_inside(Reading("voxel", None, reading.swap_xz).to_nm(raw, grid), grid, shape).all():
        raise SynmlopsError(
            f"{where}: all {raw.size // 3} points lie in a corner of the image, {corner:.2g} of it, "
            f"and would fill it as voxels; use --units voxel (if they are nm, --point-nm 1,1,1 says so)"
        )


def _lie_inside(points_nm: Points, grid: Grid, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return inside(voxels_of(points_nm, grid), shape)


def _far_end(grid: Grid, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.array(grid.offset_nm) + (np.array(shape) - 1) * grid.voxel_nm


def _words(numbers: object) -> str:
    return " ".join(f"{number:g}" for number in np.asarray(numbers).tolist())
