"""What a volume must be before it is trained on, and what training reads off its label.

Every check reads slab by slab, so that a volume may be larger than memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import cc3d
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from synmlops.params import LabelKind, SynmlopsError
from synmlops.volumes.store import Volume

IMAGE_DTYPES = ("uint8", "uint16")


@dataclass(frozen=True)
class Intensities:
    """How often each grey level occurs in an image."""

    counts: NDArray[np.int64]  # one per grey level of the dtype

    @property
    def lowest(self) -> int:
        """The lowest grey level that occurs."""
        return int(np.flatnonzero(self.counts)[0])

    @property
    def highest(self) -> int:
        """The highest grey level that occurs."""
        return int(np.flatnonzero(self.counts)[-1])

    @cached_property
    def mean(self) -> float:
        """Mean grey level."""
        return float(np.average(np.arange(len(self.counts)), weights=self.counts))

    @cached_property
    def std(self) -> float:
        """Standard deviation of the grey levels."""
        squares = (np.arange(len(self.counts)) - self.mean) ** 2
        return float(np.sqrt(np.average(squares, weights=self.counts)))

    def percentile(self, percent: float) -> int:
        """Give the lowest grey level that this per cent of the voxels do not pass.

        Examples
        --------
        >>> Intensities(np.array([50, 30, 20])).percentile(60)
        1
        """
        reached = np.cumsum(self.counts)
        return int(np.searchsorted(reached, percent / 100 * reached[-1]))


@dataclass(frozen=True)
class LabelSummary:
    """What a label holds."""

    kind: LabelKind
    voxels: int  # of the volume
    foreground: int  # voxels that are not zero
    ids: NDArray[np.uint64]  # non-zero values, ascending
    sizes: NDArray[np.int64]  # voxels of each
    problems: tuple[str, ...]  # what is odd, though no reason to refuse it

    @property
    def sites(self) -> int | None:
        """Synaptic sites of a `pairs` label; None for other kinds, whose sites share values."""
        return len(np.unique((self.ids + 1) // 2)) if self.kind == "pairs" else None

    @property
    def largest_id(self) -> int:
        """The largest value."""
        return int(self.ids[-1])


def check_image(image: Volume) -> Intensities:
    """Refuse an image that cannot be trained on, and count its grey levels.

    Raises
    ------
    SynmlopsError
        If the image is neither uint8 nor uint16, holds NaN or infinity, or is the same everywhere.
    """
    if image.dtype.kind == "f":
        _refuse_float_image(image)
    if image.dtype.name not in IMAGE_DTYPES:
        raise SynmlopsError(
            f"{image.name}: is {image.dtype}, an image must be {' or '.join(IMAGE_DTYPES)}; convert it, "
            "or check that it is the image and not the label"
        )
    counts = np.zeros(np.iinfo(image.dtype).max + 1, np.int64)
    for _, slab in image.slabs():
        counts += np.bincount(slab.ravel(), minlength=len(counts))
    intensities = Intensities(counts)
    if intensities.lowest == intensities.highest:
        raise SynmlopsError(
            f"{image.name}: is {intensities.lowest} everywhere; check that it is the right file"
        )
    return intensities


def check_label(label: Volume, kind: LabelKind) -> LabelSummary:
    """Refuse a label that is not of this kind, and count what it holds.

    Raises
    ------
    SynmlopsError
        If the label is float or negative or holds no foreground, a `pairs` or `semantic` label has no
        pre or no post side, or a `semantic` label holds other values than 0, 1 and 2.
    """
    if kind not in get_args(LabelKind):
        raise ValueError(f"label kind {kind!r} is none of {get_args(LabelKind)}")
    if label.dtype.kind == "f":
        raise SynmlopsError(
            f"{label.name}: is {label.dtype}, a label holds whole numbers; convert it to an unsigned integer"
        )
    refuse_negative(label)
    ids, sizes = count_ids(label)
    if len(ids) == 0:
        raise SynmlopsError(
            f"{label.name}: has no foreground, every voxel is 0; leave the volume out or check the file"
        )
    if kind == "semantic" and ids[-1] > 2:
        odd = ", ".join(str(i) for i in ids[ids > 2][:5])
        raise SynmlopsError(
            f"{label.name}: holds {odd}, a semantic label knows 0, 1 (pre) and 2 (post); "
            "set label_kind to pairs or union"
        )
    if kind != "union":
        _refuse_one_sided(label.name, kind, ids)
    problems = unmatched_ids(ids) if kind == "pairs" else ()
    n_voxels = int(np.prod(label.shape, dtype=np.int64))
    return LabelSummary(kind, n_voxels, int(sizes.sum()), ids, sizes, problems)


def refuse_negative(label: Volume) -> None:
    """Raise SynmlopsError with the first negative voxel, if there is one."""
    if label.dtype.kind != "i":
        return
    for z, slab in label.slabs():
        if slab.min() < 0:
            at = first_where(slab < 0, z)
            raise SynmlopsError(
                f"{label.name}: is {slab.min()} somewhere, first negative at z y x = {at}; "
                "a label holds 0 for nothing and positive ids, set the others to 0 or mask them"
            )


def count_ids(label: Volume) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Give the non-zero values of a label, ascending, and the voxels of each."""
    parts = [np.unique(slab[slab != 0], return_counts=True) for _, slab in label.slabs()]
    values = np.concatenate([ids.astype(np.uint64) for ids, _ in parts])
    ids, place = np.unique(values, return_inverse=True)
    sizes = np.zeros(len(ids), np.int64)
    np.add.at(sizes, place, np.concatenate([counts for _, counts in parts]))
    return ids, sizes


def unmatched_ids(ids: NDArray[np.uint64]) -> tuple[str, ...]:
    """Describe pre sides without a post side and the reverse, in the `pairs` convention.

    Examples
    --------
    >>> unmatched_ids(np.array([1, 2, 3], np.uint64))
    ('1 of 2 sites have a pre but no post side, first id 3',)
    """
    odd, even = ids[ids % 2 == 1], ids[ids % 2 == 0]
    lonely = {
        "pre but no post": odd[~np.isin(odd + 1, even)],
        "post but no pre": even[~np.isin(even - 1, odd)],
    }
    n_sites = len(np.unique((ids + 1) // 2))
    return tuple(
        f"{len(alone)} of {n_sites} sites have a {what} side, first id {alone[0]}"
        for what, alone in lonely.items()
        if len(alone)
    )


def smallest_unsigned(largest: int) -> np.dtype[Any]:
    """Give the narrowest unsigned type that holds this value.

    Examples
    --------
    >>> smallest_unsigned(255), smallest_unsigned(256), smallest_unsigned(2**32)
    (dtype('uint8'), dtype('uint16'), dtype('uint64'))
    """
    if largest < 0:
        raise ValueError(f"an id cannot be negative, got {largest}")
    return np.min_scalar_type(largest)


def count_components(slabs: Iterable[NDArray[Any]]) -> int:
    """Count the 26-connected components of the non-zero voxels of a volume given as slabs along z.

    Examples
    --------
    >>> diagonal = np.eye(3, dtype=np.uint8)[:, None]
    >>> count_components([diagonal]), count_components([diagonal[:1], diagonal[1:]])
    (1, 1)
    """
    total = 0
    edges: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]
    last: NDArray[np.int64] | None = None
    for slab in slabs:
        found, n = cc3d.connected_components(slab != 0, connectivity=26, return_N=True)
        labels = np.where(found > 0, found.astype(np.int64) + total, 0)
        if last is not None:
            edges.append(touching(last, labels[0]))
        total, last = total + int(n), labels[-1]
    if total == 0:
        return 0
    a, b = np.concatenate(edges, axis=1) - 1
    return int(connected_components(coo_array((np.ones(len(a)), (a, b)), (total, total)), directed=False)[0])


def foreground_sum(foreground: NDArray[Any], mask: NDArray[Any] | None = None) -> NDArray[Any]:
    """Give the summed-volume table of a foreground, from which `count_in` counts any box.

    Parameters
    ----------
    foreground : (z, y, x) array
        Non-zero where there is foreground.
    mask : (z, y, x) array, optional
        Zero where the label is not to be trusted; foreground there does not count.

    Returns
    -------
    table : (z + 1, y + 1, x + 1) array of int32, or int64 where the count needs it
        Entry z, y, x is the number of foreground voxels before it along all three axes.
    """
    trusted = foreground != 0 if mask is None else (foreground != 0) & (mask != 0)
    dtype = np.int32 if np.count_nonzero(trusted) <= np.iinfo(np.int32).max else np.int64
    return np.concatenate(list(foreground_sums([trusted], dtype=dtype)))


def foreground_sums(slabs: Iterable[NDArray[Any]], *, dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """Give `foreground_sum` of a volume in slabs along z, as slabs: one more section in the first."""
    before: NDArray[Any] | None = None
    for slab in slabs:
        depth, height, width = slab.shape
        table = np.zeros((depth + 1, height + 1, width + 1), dtype)
        table[1:, 1:, 1:] = slab != 0
        np.cumsum(table, axis=2, out=table)
        np.cumsum(table, axis=1, out=table)
        if before is not None:
            table[0] = before
        np.cumsum(table, axis=0, out=table)
        yield table if before is None else table[1:]
        before = table[-1].copy()


_CORNERS = np.array(list(np.ndindex(2, 2, 2)), bool)
_SIGNS = np.where(_CORNERS.sum(axis=1) % 2, 1, -1)
"""Of the eight corners of a box in a summed-volume table: 1 where the number of upper ends is odd."""


def count_in(table: NDArray[Any], start_zyx: ArrayLike, size_zyx: tuple[int, int, int]) -> NDArray[np.int64]:
    """Count foreground voxels in boxes of one size.

    Parameters
    ----------
    table : (z + 1, y + 1, x + 1) array of int
        From `foreground_sum`.
    start_zyx : (N, 3) array of int
        First voxel of each box.
    size_zyx : tuple of int

    Raises
    ------
    ValueError
        If a box leaves the volume.

    Examples
    --------
    >>> table = foreground_sum(np.ones((4, 4, 4), bool))
    >>> count_in(table, [[0, 0, 0], [2, 2, 2]], (2, 2, 2))
    array([8, 8])
    """
    low = np.asarray(start_zyx, np.int64).reshape(-1, 3)
    high = low + np.asarray(size_zyx, np.int64)
    if len(low) and (low.min() < 0 or (high.max(axis=0) > np.array(table.shape) - 1).any()):
        raise ValueError(f"a box of {size_zyx} leaves the volume of {tuple(n - 1 for n in table.shape)}")
    at = np.where(_CORNERS, high[:, None], low[:, None])
    count: NDArray[np.int64] = table[at[..., 0], at[..., 1], at[..., 2]].astype(np.int64) @ _SIGNS
    return count


def first_where(found: NDArray[np.bool_], first_z: int = 0) -> tuple[int, int, int]:
    """Give z, y, x of the first true voxel of a slab."""
    z, y, x = (int(i) for i in np.unravel_index(int(found.argmax()), found.shape))
    return first_z + z, y, x


def _refuse_float_image(image: Volume) -> None:
    for z, slab in image.slabs():
        if not (finite := np.isfinite(slab)).all():
            at = first_where(~finite, z)
            raise SynmlopsError(
                f"{image.name}: holds NaN or infinity, first at z y x = {at}; "
                "replace such voxels and convert the image to uint8"
            )
    raise SynmlopsError(
        f"{image.name}: is {image.dtype}, an image must be {' or '.join(IMAGE_DTYPES)}; "
        "scale its grey values to 0 to 255 and convert it to uint8"
    )


def _refuse_one_sided(name: str, kind: LabelKind, ids: NDArray[np.uint64]) -> None:
    values = {"pairs": ("odd", "even"), "semantic": ("1", "2")}[kind]
    for rest, side, value in zip((1, 0), ("pre", "post"), values, strict=True):
        if not (ids % 2 == rest).any():
            raise SynmlopsError(
                f"{name}: has no {side} side, a {kind} label needs {value} values for it; "
                "set label_kind to union if the label does not tell sides apart"
            )


def touching(above: NDArray[np.int64], below: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give pairs of labels of two neighbouring sections that touch, diagonals included, as (2, N)."""
    height, width = above.shape
    pairs = []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            a = above[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            b = below[max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)]
            both = (a > 0) & (b > 0)
            pairs.append(np.stack([a[both], b[both]]))
    return np.unique(np.concatenate(pairs, axis=1), axis=1)
