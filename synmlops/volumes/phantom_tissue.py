"""The tissue of the phantom: neurites packed without gaps, and how far each voxel is from a membrane.

Neurites are chains of balls of varied calibre, packed by dart throwing. Space is shared out among the balls
by their power distance, so that every voxel belongs to one neurite and the membrane between two is a plane
whose distance is known below the voxel size; a smooth warp bends the planes.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

_Floats = NDArray[np.float32]
_Scalar = TypeVar("_Scalar", bound=np.generic)

CALIBRE_NM = (50.0, 105.0, 290.0)  # least, median and greatest radius of a neurite
CALIBRE_SPREAD = 0.5  # of the logarithm of the radius
STARTS_PER_UM3 = 80.0  # attempts to begin a neurite
MARGIN_NM = 350.0  # neurites are packed this far beyond the volume, so that they enter from outside
SHORTEST_NM = 450.0  # a shorter neurite is not kept
WARP_NM = ((420.0, 75.0), (130.0, 17.0))  # wavelength and amplitude of the bends
BLOCK_NM = 64.0  # voxels of one block share their candidate balls
CANDIDATES = 16


@dataclass(frozen=True)
class Tissue:
    """What each voxel belongs to; all arrays are zyx.

    Attributes
    ----------
    neurons : array of uint32
        Neuron id, from 1 without gaps; no voxel is 0.
    across : array of uint32
        Neuron on the other side of the nearest membrane; 0 deep inside a neurite.
    membrane_nm : array of float32
        Distance to the nearest membrane.
    tilt : array of float32
        Share of that membrane's normal along z: 0 where the section cuts it upright, 1 where it lies flat.
    """

    neurons: NDArray[np.uint32]
    across: NDArray[np.uint32]
    membrane_nm: _Floats
    tilt: _Floats


@dataclass(frozen=True)
class Balls:
    """Chains of balls: (N, 3) centres in nm, (N,) radii in nm, (N,) neurite index from 0."""

    centre_nm: NDArray[np.float64]
    radius_nm: NDArray[np.float64]
    neurite: NDArray[np.int64]


def smooth_noise(
    rng: np.random.Generator,
    size_zyx: tuple[int, int, int],
    *,
    voxel_nm: tuple[float, float, float],
    sigma_nm: float,
) -> _Floats:
    """Draw Gaussian noise of unit variance, correlated over `sigma_nm`.

    Long correlations are drawn on a coarse grid and interpolated, which costs little.

    Examples
    --------
    >>> noise = smooth_noise(np.random.default_rng(0), (4, 64, 64), voxel_nm=(40, 8, 8), sigma_nm=30)
    >>> noise.shape, bool(0.7 < noise.std() < 1.3)
    ((4, 64, 64), True)
    """
    steps = [max(1, int(sigma_nm / (1.5 * v))) for v in voxel_nm]
    sigma = [sigma_nm / (step * v) for step, v in zip(steps, voxel_nm, strict=True)]
    coarse_size = [-(-n // step) + 1 for n, step in zip(size_zyx, steps, strict=True)]
    pad = [int(np.ceil(3 * s)) if s > 0.3 else 0 for s in sigma]
    noise = rng.standard_normal([n + 2 * p for n, p in zip(coarse_size, pad, strict=True)], dtype=np.float32)
    noise = gaussian_filter(noise, [s if p else 0 for s, p in zip(sigma, pad, strict=True)], truncate=3.0)
    noise = noise[tuple(slice(p, p + n) for p, n in zip(pad, coarse_size, strict=True))]
    noise *= np.prod([_gain(s) for s, p in zip(sigma, pad, strict=True) if p])
    for axis, step in enumerate(steps):
        noise = _stretch(noise, axis, size_zyx[axis], step)
    return np.ascontiguousarray(noise, dtype=np.float32)


def _gain(sigma: float) -> float:
    """Give the factor that brings white noise back to unit variance after a Gaussian along one axis."""
    reach = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    return float(kernel.sum() / np.sqrt((kernel**2).sum()))


def _stretch(noise: _Floats, axis: int, size: int, step: int) -> _Floats:
    """Interpolate linearly along one axis, `step` samples for one."""
    if step == 1:
        return np.take(noise, np.arange(size), axis=axis)
    low, part = np.divmod(np.arange(size), step)
    weight = (part / step).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    below = np.take(noise, low, axis=axis)
    return below + weight * (np.take(noise, low + 1, axis=axis) - below)


def grow_neurites(rng: np.random.Generator, extent_nm: NDArray[np.float64]) -> Balls:
    """Pack neurites into the box from 0 to `extent_nm` and a margin around it, wide ones first."""
    low, high = -np.full(3, MARGIN_NM), extent_nm + MARGIN_NM
    starts = int(np.ceil(np.prod(high - low) * 1e-9 * STARTS_PER_UM3))
    least, median, greatest = CALIBRE_NM
    radii = np.clip(median * np.exp(CALIBRE_SPREAD * rng.standard_normal(starts)), least, greatest)
    packing = _Packing(rng, low, high)
    for radius in np.sort(radii)[::-1]:
        packing.grow(float(radius))
    return packing.balls()


class _Packing:
    """Balls placed so far, found again by the cell of a coarse grid they lie in."""

    def __init__(self, rng: np.random.Generator, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        self._rng, self._low, self._high = rng, low, high
        self._cell_nm = 2 * CALIBRE_NM[2]
        self._cells: dict[tuple[int, ...], list[tuple[float, ...]]] = defaultdict(list)
        self._placed: list[tuple[float, ...]] = []  # z, y, x, radius, neurite
        self._n = 0

    def balls(self) -> Balls:
        table = np.array(self._placed, dtype=np.float64).reshape(-1, 5)
        return Balls(table[:, :3], table[:, 3], table[:, 4].astype(np.int64))

    def grow(self, radius: float) -> None:
        """Walk both ways from a free spot until the way is blocked; keep the chain if it is long enough."""
        start = self._rng.uniform(self._low, self._high)
        if not self._free(start, radius):
            return
        heading = self._rng.standard_normal(3)
        chain = [(start, radius)]
        for sign in (1.0, -1.0):
            chain += self._walk(start, sign * heading / np.linalg.norm(heading), radius)
        length = sum(0.55 * r for _, r in chain)
        if length < SHORTEST_NM and self._n > 1:
            return
        for point, r in chain:
            ball = (*map(float, point), r, float(self._n))
            self._placed.append(ball)
            self._cells[self._cell(point)].append(ball)
        self._n += 1

    def _walk(
        self, point: NDArray[np.float64], heading: NDArray[np.float64], radius: float
    ) -> list[tuple[NDArray[np.float64], float]]:
        chain: list[tuple[NDArray[np.float64], float]] = []
        swell = 0.0
        while len(chain) < 400:
            swell = 0.85 * swell + 0.12 * float(self._rng.standard_normal())
            r = float(np.clip(radius * np.exp(swell), 0.7 * CALIBRE_NM[0], 1.15 * CALIBRE_NM[2]))
            for turn in (0.22, 0.5, 0.8, 1.2):
                bent = heading + turn * self._rng.standard_normal(3)
                bent /= np.linalg.norm(bent)
                there = point + 0.55 * r * bent
                if self._free(there, r):
                    break
            else:
                return chain
            point, heading = there, bent
            chain.append((point, r))
            if np.any(point < self._low) or np.any(point > self._high):
                return chain
        return chain

    def _free(self, point: NDArray[np.float64], radius: float) -> bool:
        z, y, x = (float(p) for p in point)
        cz, cy, cx = self._cell(point)
        for dz, dy, dx in product((-1, 0, 1), repeat=3):
            for bz, by, bx, br, _ in self._cells.get((cz + dz, cy + dy, cx + dx), ()):
                if (z - bz) ** 2 + (y - by) ** 2 + (x - bx) ** 2 < (0.82 * (radius + br)) ** 2:
                    return False
        return True

    def _cell(self, point: NDArray[np.float64]) -> tuple[int, int, int]:
        z, y, x = (int(p // self._cell_nm) for p in point)
        return z, y, x


def make_tissue(
    rng: np.random.Generator,
    size_zyx: tuple[int, int, int],
    *,
    voxel_nm: tuple[float, float, float],
    shift_nm: NDArray[np.float64],
) -> Tissue:
    """Fill a volume with neurites.

    Parameters
    ----------
    rng : numpy Generator
    size_zyx : tuple of int
    voxel_nm : tuple of float
    shift_nm : (z, 2) array of float
        How far the tissue of each section is displaced along y and x, as by imperfect alignment.
    """
    extent_nm = np.asarray(size_zyx) * np.asarray(voxel_nm)
    balls = grow_neurites(rng, extent_nm)
    warp = [_warp(rng, size_zyx, voxel_nm) for _ in range(3)]
    tree = cKDTree(_lifted(balls))
    step = tuple(max(1, round(BLOCK_NM / v)) for v in voxel_nm[1:])
    sections = [
        _section(z, [w[z] for w in warp], tree, balls, step=step, voxel_nm=voxel_nm, shift=shift_nm[z])
        for z in range(size_zyx[0])
    ]
    neurite, across, membrane, tilt = (np.stack(part) for part in zip(*sections, strict=True))
    present, neurons = np.unique(neurite, return_inverse=True)
    ids = np.zeros(int(balls.neurite.max()) + 2, np.uint32)
    ids[present] = np.arange(1, len(present) + 1)
    return Tissue((neurons.reshape(size_zyx) + 1).astype(np.uint32), ids[across], membrane, tilt)


def _warp(
    rng: np.random.Generator, size_zyx: tuple[int, int, int], voxel_nm: tuple[float, float, float]
) -> _Floats:
    """Give how far each voxel is displaced along one axis, in nm."""
    warp = np.zeros(size_zyx, np.float32)
    for wavelength, amplitude in WARP_NM:
        warp += amplitude * smooth_noise(rng, size_zyx, voxel_nm=voxel_nm, sigma_nm=wavelength / 4)
    return warp


def _lifted(balls: Balls) -> NDArray[np.float64]:
    """Give centres a fourth coordinate, so that the nearest neighbour is the least power distance."""
    depth = np.sqrt(np.square(balls.radius_nm.max()) - np.square(balls.radius_nm))
    return np.column_stack([balls.centre_nm, depth])


def _section(
    z: int,
    warp: list[_Floats],
    tree: cKDTree,
    balls: Balls,
    *,
    step: tuple[int, ...],
    voxel_nm: tuple[float, float, float],
    shift: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], _Floats, _Floats]:
    """Give neurite, neurite across, membrane distance and tilt of one section.

    The power distances of a voxel to the candidates of its block differ by a function that is linear in the
    voxel's position, so that one product of matrices gives them all.
    """
    ny, nx = warp[0].shape
    sy, sx = step
    my, mx = -(-ny // sy), -(-nx // sx)
    y, x = np.mgrid[: my * sy, : mx * sx].astype(np.float32)
    pad = ((0, my * sy - ny), (0, mx * sx - nx))
    wz, wy, wx = (np.pad(w, pad, mode="edge") for w in warp)
    place = np.stack([z * voxel_nm[0] + wz, y * voxel_nm[1] + wy + shift[0], x * voxel_nm[2] + wx + shift[1]])
    place = place.reshape(3, my, sy, mx, sx).transpose(1, 3, 2, 4, 0).reshape(my * mx, sy * sx, 3)
    middle = place.mean(axis=1)
    n = min(CANDIDATES, len(balls.neurite))
    _, near = tree.query(np.column_stack([middle, np.zeros(len(middle))]), k=n)
    near = np.asarray(near, dtype=np.int64).reshape(len(middle), n)
    own, across, membrane, tilt = _nearest_two(
        (place - middle[:, None]).astype(np.float32), near, middle, balls
    )

    def unblocked(values: NDArray[_Scalar]) -> NDArray[_Scalar]:
        return values.reshape(my, mx, sy, sx).swapaxes(1, 2).reshape(my * sy, mx * sx)[:ny, :nx]

    return unblocked(own), unblocked(across), unblocked(membrane), unblocked(tilt)


def _nearest_two(
    place: _Floats, near: NDArray[np.int64], middle: NDArray[np.float64], balls: Balls
) -> tuple[NDArray[np.int64], NDArray[np.int64], _Floats, _Floats]:
    """Compare the candidates `near` (blocks, K) at the positions `place` (blocks, voxels, 3)."""
    centre = (balls.centre_nm[near] - middle[:, None]).astype(np.float32)  # (blocks, K, 3)
    constant = np.square(centre).sum(axis=2) - np.square(balls.radius_nm[near]).astype(np.float32)
    power = np.matmul(place, -2 * centre.swapaxes(1, 2)) + constant[:, None]
    neurite = balls.neurite[near]
    first = power.argmin(axis=2)
    own = np.take_along_axis(neurite, first, axis=1)
    least = np.take_along_axis(power, first[..., None], axis=2)[..., 0]
    power[neurite[:, None, :] == own[..., None]] = np.inf
    second = power.argmin(axis=2)
    gap = np.take_along_axis(power, second[..., None], axis=2)[..., 0] - least
    normal = np.take_along_axis(centre, second[..., None], axis=1) - np.take_along_axis(
        centre, first[..., None], axis=1
    )
    length = np.sqrt(np.square(normal).sum(axis=2)) + np.float32(1e-3)
    alone = np.isinf(gap)
    membrane = np.where(alone, np.float32(1e3), gap / (2 * length)).astype(np.float32)
    across = np.where(alone, balls.neurite.max() + 1, np.take_along_axis(neurite, second, axis=1))
    return own, across, membrane, (np.abs(normal[..., 0]) / length).astype(np.float32)
