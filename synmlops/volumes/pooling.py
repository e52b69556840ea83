"""Volumes made smaller: what `data.pool_zyx` does to image, labels and mask in prepare."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.volumes.store import Volume

Pool = tuple[int, int, int]
_GROUPS_AT_ONCE = 1 << 15  # bounds the memory of counting votes


def pool_image(image: NDArray[Any], pool_zyx: Pool) -> NDArray[Any]:
    """Give the mean of each group of voxels, rounded, in the image's dtype; a rest at the end is left out.

    Examples
    --------
    >>> pool_image(np.array([[[1, 2, 9]]], np.uint8), (1, 1, 2))
    array([[[2]]], dtype=uint8)
    """
    n = int(np.prod(pool_zyx))
    total: NDArray[np.uint64] = _windows(image, pool_zyx).sum(axis=-1, dtype=np.uint64)
    return np.asarray((total + n // 2) // n, image.dtype)


def pool_label(label: NDArray[Any], pool_zyx: Pool) -> NDArray[Any]:
    """Give the most frequent non-zero value of each group of voxels, 0 only if all are; the larger on a tie.

    Thin densities survive, and ids of `pairs` are kept as they are.

    Examples
    --------
    >>> pool_label(np.array([[[0, 7, 0, 0, 3, 4]]]), (1, 1, 2))
    array([[[7, 0, 4]]])
    """
    if tuple(pool_zyx) == (1, 1, 1):
        return label
    windows = _windows(label, pool_zyx)
    pooled: NDArray[Any] = windows.max(axis=-1)
    mixed = ((windows != pooled[..., None]) & (windows != 0)).any(axis=-1)
    pooled[mixed] = _most_frequent(windows[mixed])
    return pooled


def pool_mask(mask: NDArray[Any], pool_zyx: Pool) -> NDArray[Any]:
    """Give the least value of each group of voxels: trusted only where all are."""
    pooled: NDArray[Any] = _windows(mask, pool_zyx).min(axis=-1)
    return pooled


def pooled_slabs(
    volume: Volume, pool_zyx: Pool, pool: Callable[[NDArray[Any], Pool], NDArray[Any]]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Give a volume pooled, as slabs along z with their first pooled z."""
    for z, slab in volume.slabs(multiple=pool_zyx[0]):
        pooled = pool(slab, pool_zyx)
        if len(pooled):
            yield z // pool_zyx[0], pooled


def _most_frequent(groups: NDArray[Any]) -> NDArray[Any]:
    """Give the most frequent non-zero value of each row; the larger on a tie."""
    winners = np.empty(len(groups), groups.dtype)
    for first in range(0, len(groups), _GROUPS_AT_ONCE):
        rows = np.sort(groups[first : first + _GROUPS_AT_ONCE], axis=-1)[:, ::-1]
        votes = (rows[:, :, None] == rows[:, None, :]).sum(axis=-1) * (rows != 0)
        winners[first : first + len(rows)] = rows[np.arange(len(rows)), votes.argmax(axis=-1)]
    return winners


def _windows(volume: NDArray[Any], pool_zyx: Pool) -> NDArray[Any]:
    """Give (z, y, x, n): the n voxels of each group along the last axis."""
    (pz, py, px), (z, y, x) = pool_zyx, (n // p for n, p in zip(volume.shape, pool_zyx, strict=True))
    whole: NDArray[Any] = volume[: z * pz, : y * py, : x * px].reshape(z, pz, y, py, x, px)
    return np.asarray(whole.transpose(0, 2, 4, 1, 3, 5).reshape(z, y, x, pz * py * px))
