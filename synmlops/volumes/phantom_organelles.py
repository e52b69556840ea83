"""Vesicles and mitochondria of the phantom: where they lie, and what a mitochondrion looks like."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from synmlops.volumes.phantom_synapses import Site
from synmlops.volumes.phantom_tissue import Tissue

_Floats = NDArray[np.float32]

VESICLE_SPACING_NM = 34.0
CLOUD_PER_UM3 = 26000.0  # vesicles, before those that overlap are dropped
MITOCHONDRIA_PER_UM3 = 3.0
MITOCHONDRION_NM = (85.0, 150.0)  # radius across
CRISTA_NM = 58.0  # from one crista to the next


def site_vesicles(
    rng: np.random.Generator, tissue: Tissue, site: Site, *, voxel_nm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Give (N, 3) vesicle centres in nm: a cloud on the pre side, thinner away from the cleft."""
    voxel, size = np.asarray(voxel_nm), np.asarray(tissue.neurons.shape)
    centre, reach = site.centre_zyx * voxel, site.radius_nm + 90.0
    middle = centre + 95.0 * site.inward
    count = rng.poisson(CLOUD_PER_UM3 * 1e-9 * 4.19 * reach**3)
    way = rng.standard_normal((count, 3))
    way *= reach * np.cbrt(rng.random((count, 1))) / np.linalg.norm(way, axis=1, keepdims=True)
    points = middle + way
    voxels = np.round(points / voxel).astype(int)
    points = points[(kept := np.all((voxels >= 0) & (voxels < size), axis=1))]
    at = tuple(voxels[kept].T)
    height = (points - centre) @ site.inward
    fits = (tissue.neurons[at] == site.pre) & (tissue.membrane_nm[at] > 25.0) & (height > 22.0)
    fits &= rng.random(len(points)) < np.clip(1.3 - height / 300.0, 0.1, 1.0)
    return _apart(points[fits])


def background_vesicles(
    rng: np.random.Generator, tissue: Tissue, sites: list[Site], *, voxel_nm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Give (N, 3) centres in nm of single vesicles that some neurites hold, away from all sites."""
    count = int(900.0 * 1e-9 * np.prod(voxel_nm) * tissue.neurons.size)
    voxels = rng.integers(0, tissue.neurons.shape, (count, 3))
    at = tuple(voxels.T)
    share = np.where((draw := rng.random(int(tissue.neurons.max()) + 1)) < 0.35, draw / 0.35, 0.03)
    fits = (tissue.membrane_nm[at] > 25.0) & (rng.random(count) < share[tissue.neurons[at]])
    points = voxels[fits] * np.asarray(voxel_nm)
    for site in sites:
        away = np.linalg.norm(points - site.centre_zyx * np.asarray(voxel_nm), axis=1)
        points = points[away > site.radius_nm + 130.0]
    return _apart(points)


def _apart(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Drop the later of every two vesicles that overlap."""
    if len(points) == 0:
        return points
    pairs = cKDTree(points).query_pairs(VESICLE_SPACING_NM, output_type="ndarray")
    kept = np.ones(len(points), bool)
    for a, b in pairs[np.lexsort(pairs.T[::-1])]:
        if kept[a]:
            kept[b] = False
    return points[kept]


def draw_mitochondria(
    rng: np.random.Generator,
    field: _Floats,
    tissue: Tissue,
    sites: list[Site],
    *,
    voxel_nm: tuple[float, float, float],
) -> _Floats:
    """Draw mitochondria into wide parts of neurites, clear of all sites; changes and returns the field."""
    voxel = np.asarray(voxel_nm)
    wanted = round(MITOCHONDRIA_PER_UM3 * 1e-9 * float(np.prod(voxel)) * field.size)
    taken = [(s.centre_zyx * voxel, s.radius_nm + 60.0) for s in sites]
    voxels = rng.integers(0, field.shape, (400 * max(wanted, 1), 3))
    voxels = voxels[tissue.membrane_nm[tuple(voxels.T)] > MITOCHONDRION_NM[0]]
    for at in voxels:
        if wanted == 0:
            break
        radius = float(min(rng.uniform(*MITOCHONDRION_NM), tissue.membrane_nm[tuple(at)] + 10))
        length = radius * float(rng.uniform(1.0, 2.6))
        centre = at * voxel
        if any(np.linalg.norm(centre - c) < r + length for c, r in taken):
            continue
        taken.append((centre, length + 60.0))
        _draw_mitochondrion(rng, field, tissue, at, radius=radius, length=length, voxel=voxel)
        wanted -= 1
    return field


def _draw_mitochondrion(
    rng: np.random.Generator,
    field: _Floats,
    tissue: Tissue,
    centre: NDArray[np.int64],
    *,
    radius: float,
    length: float,
    voxel: NDArray[np.float64],
) -> None:
    """Draw a double membrane, a grey matrix and cristae within an ellipsoid that keeps off the membrane."""
    reach = np.ceil(length / voxel).astype(int)
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, field.shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    axes = [(np.arange(a, b) - c) * v for a, b, c, v in zip(low, high, centre, voxel, strict=True)]
    away = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    frame, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    u, v, w = np.tensordot(frame.astype(np.float32), away, 1)
    bend = 14.0 * np.sin(v / 60.0 + rng.uniform(0, 6.3)) + 10.0 * np.sin(w / 45.0 + rng.uniform(0, 6.3))
    round_nm = radius * (
        1 - np.sqrt((u / length) ** 2 + ((v + 0.5 * bend) / radius) ** 2 + (w / radius) ** 2)
    )
    own = tissue.neurons[box] == tissue.neurons[tuple(centre)]
    depth = np.where(own, np.minimum(round_nm, tissue.membrane_nm[box] - 24.0), -1e3)
    crista = np.exp(-0.5 * np.square((((u + bend) / CRISTA_NM) % 1.0 - 0.5) * CRISTA_NM / 8.0))
    matrix = 0.50 + 0.28 * crista * np.clip((depth - 20) / 12, 0, 1)
    shell = np.maximum(
        np.exp(-0.5 * np.square((depth - 3) / 5)), 0.7 * np.exp(-0.5 * np.square((depth - 21) / 5))
    )
    view = field[box]
    grain = view - view[own].mean()
    view[:] = np.where(
        depth > 0, np.maximum(matrix + 0.7 * grain, 0.85 * shell), np.maximum(view, 0.85 * shell)
    )
