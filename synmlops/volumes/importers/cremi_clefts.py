"""Clefts of a CREMI file: their connected pieces, and the tissue beside each."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, uniform_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from synmlops.volumes.cremi import is_id

Nm = tuple[float, float, float]
Box = tuple[slice, slice, slice]

_RIM_NM = 120.0  # how far about a cleft voxel its piece is looked at: more than a cleft is thick
_LOPSIDED = 0.42  # of that: at a straight rim the rest is 0.5 away, on a face of a 50 nm cleft 0.2
_SIDEWAYS = 0.6  # cosine to the way off the piece from which a step leads past the rim
_PAST_RIM_NM = 20.0  # tissue this far past the rim still belongs to the synapse

_KEPT_BYTES = 256 << 20  # of distances about clefts, which are wanted twice


@dataclass(frozen=True, eq=False)
class Clefts:
    """Connected pieces of clefts; the voxels of piece k are `voxels[starts[k] : starts[k + 1]]`."""

    voxels: NDArray[np.int32]  # (M, 3)
    starts: NDArray[np.intp]  # (K + 1,)
    ids: NDArray[np.uint64]  # (K,) which cleft of the file
    low: NDArray[np.int32]  # (K, 3) box of each, half open
    high: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, k: int | np.integer) -> NDArray[np.int32]:
        """Give the voxels of one piece."""
        return self.voxels[self.starts[k] : self.starts[k + 1]]


def pieces_of(slabs: Iterable[tuple[int, NDArray[np.uint64]]], shape: tuple[int, ...]) -> Clefts:
    """Find the 26-connected pieces of each cleft of a label given in slabs along z.

    Examples
    --------
    >>> found = pieces_of([(0, np.array([[[7, 0, 7, 7, 8]]], np.uint64))], (1, 1, 5))
    >>> found.ids.tolist(), found.low[:, 2].tolist(), found.high[:, 2].tolist()
    ([7, 7, 8], [0, 2, 4], [1, 4, 5])
    """
    section = shape[1] * shape[2]
    parts: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []
    for z, slab in slabs:
        here = np.flatnonzero(is_id(slab))
        parts.append((here + z * section, slab.reshape(-1)[here]))
    flat, ids = (np.concatenate(each) for each in zip(*parts, strict=True))
    piece = _connected(flat, ids, shape)
    order = np.argsort(piece, kind="stable")
    starts = np.flatnonzero(np.diff(piece[order], prepend=-1))
    voxels = np.stack(np.unravel_index(flat[order], shape), axis=1).astype(np.int32)
    none = np.empty((0, 3), np.int32)
    return Clefts(
        voxels=voxels,
        starts=np.append(starts, len(flat)),
        ids=ids[order][starts].astype(np.uint64),
        low=np.minimum.reduceat(voxels, starts) if len(starts) else none,
        high=np.maximum.reduceat(voxels, starts) + 1 if len(starts) else none,
    )


def _connected(flat: NDArray[np.int64], ids: NDArray[np.uint64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Number the connected pieces of equal id among voxels given by their ascending place."""
    at = np.stack(np.unravel_index(flat, shape))
    edges = [np.empty((2, 0), np.int64)]
    for step in np.ndindex(3, 3, 3):
        move = np.array(step) - 1
        if tuple(move) <= (0, 0, 0):  # the other half are the same edges
            continue
        there = at + move[:, None]
        inside = ((there >= 0) & (there < np.array(shape)[:, None])).all(axis=0)
        rows = np.flatnonzero(inside)
        wanted = flat[rows] + (move[0] * shape[1] + move[1]) * shape[2] + move[2]
        place = np.searchsorted(flat, wanted).clip(max=max(0, len(flat) - 1))
        same = (flat[place] == wanted) & (ids[place] == ids[rows])
        edges.append(np.stack((rows[same], place[same])))
    a, b = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(flat), len(flat)))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


class Surroundings:
    """The tissue beside each piece of a cleft, worked out when asked for and kept while there is room.

    Calling it gives the box around a piece and the distance to the piece there in nm, infinite beyond the
    thickness and past the rim of the piece.
    """

    def __init__(self, clefts: Clefts, shape: tuple[int, ...], *, voxel_nm: Nm, thickness_nm: float) -> None:
        self.clefts, self.shape, self.voxel_nm, self.thickness_nm = clefts, shape, voxel_nm, thickness_nm
        self._kept: dict[int, tuple[Box, NDArray[np.float32]]] = {}
        self._room = _KEPT_BYTES

    def __call__(self, k: int) -> tuple[Box, NDArray[np.float32]]:
        """Give box and distances of one piece."""
        if k in self._kept:
            return self._kept[k]
        found = self._work_out(k)
        self._room -= found[1].nbytes
        if self._room > 0:
            self._kept[k] = found
        return found

    def neurons(self, k: int, neurons: NDArray[np.unsignedinteger]) -> set[int]:
        """Give the neurons in the tissue beside a piece."""
        box, near = self(k)
        return set(np.unique(neurons[box][np.isfinite(near)]).tolist()) - {0}

    def _work_out(self, k: int) -> tuple[Box, NDArray[np.float32]]:
        margin = np.ceil(self.thickness_nm / np.asarray(self.voxel_nm)).astype(int)
        low = (self.clefts.low[k] - margin).clip(min=0)
        high = np.minimum(self.clefts.high[k] + margin, self.shape)
        piece = np.zeros(high - low, bool)
        piece[tuple((self.clefts.of(k) - low).T)] = True
        away, foot = distance_transform_edt(~piece, sampling=self.voxel_nm, return_indices=True)
        near = np.flatnonzero((away > 0) & (away <= self.thickness_nm))
        beside = near[~_past_rim(piece, near, foot.reshape(3, -1)[:, near], self.voxel_nm)]
        distance = np.where(piece, np.float32(0), np.float32(np.inf))
        distance.reshape(-1)[beside] = away.reshape(-1)[beside]
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return (z, y, x), distance


def _past_rim(
    piece: NDArray[np.bool_], near: NDArray[np.intp], foot: NDArray[np.integer], voxel_nm: Nm
) -> NDArray[np.bool_]:
    """Tell which voxels lie past the rim of a piece and not beside it.

    At its rim a piece lies all to one side. A voxel whose nearest cleft voxel (`foot`) is of the rim is past
    it if the way from there leads away from the rest of the piece, and not along the normal.
    """
    size = np.asarray(voxel_nm)
    span = tuple(2 * int(_RIM_NM // each) + 1 for each in voxel_nm)
    at = np.stack(np.nonzero(piece))
    weight = uniform_filter(piece.astype(np.float64), span, mode="constant")[tuple(at)]
    inward = np.zeros((3, *piece.shape), np.float32)
    for axis, edge in enumerate(voxel_nm):
        place = np.arange(piece.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        mean = uniform_filter(piece * (place * edge), span, mode="constant")[tuple(at)] / weight
        inward[axis][tuple(at)] = mean - at[axis] * edge
    towards = inward[:, foot[0], foot[1], foot[2]]
    step = (np.stack(np.unravel_index(near, piece.shape)) - foot) * size[:, None]
    length = np.linalg.norm(towards, axis=0)
    outward = -(step * towards).sum(axis=0) / np.maximum(length, 1)
    limit = np.maximum(_PAST_RIM_NM, _SIDEWAYS * np.linalg.norm(step, axis=0))
    past: NDArray[np.bool_] = (length > _LOPSIDED * _RIM_NM) & (outward > limit)
    return past
