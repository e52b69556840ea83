"""What the phantom's tissue looks like under the microscope: a darkness field, then sections, then noise.

Every structure is drawn with its size in nm. What is smaller than the thickness of a section is averaged over
the section, and a membrane that lies flat in it is broad and faint, as in real sections.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from synmlops.volumes.phantom_organelles import background_vesicles, draw_mitochondria, site_vesicles
from synmlops.volumes.phantom_synapses import Site
from synmlops.volumes.phantom_tissue import Tissue, smooth_noise

_Floats = NDArray[np.float32]

LIGHT, DARK = 198.0, 48.0  # grey levels of darkness 0 and 1
MEMBRANE_NM = 9.5  # standard deviation of the dark line of two membranes and their cleft
VESICLE_NM = (17.0, 5.0)  # radius of the dark ring and its standard deviation
BARE_PEDESTALS = 0.5  # share of the densities without vesicles that have a pedestal all the same
NOISE_GREY = 11.0
GAIN, SHADE_GREY = 0.05, 6.0  # standard deviations of the contrast and brightness of a section


def darkness(
    rng: np.random.Generator,
    tissue: Tissue,
    sites: list[Site],
    *,
    voxel_nm: tuple[float, float, float],
    shift_nm: NDArray[np.float64],
) -> _Floats:
    """Draw cytoplasm, organelles, densities and membranes: 0 is light, 1 is dark; zyx."""
    field = _cytoplasm(rng, tissue, voxel_nm)
    field = draw_mitochondria(rng, field, tissue, sites, voxel_nm=voxel_nm)
    spots = background_vesicles(rng, tissue, sites, voxel_nm=voxel_nm)
    clouds = [
        site_vesicles(rng, tissue, s, voxel_nm=voxel_nm) for s in sites if s.kind in ("synapse", "cloud")
    ]
    strength = 0.95
    radius, spread = VESICLE_NM

    def ring(distance: _Floats) -> _Floats:
        lumen = np.where(distance < radius, 0.3, 0.0)
        return np.asarray(strength * np.maximum(np.exp(-0.5 * ((distance - radius) / spread) ** 2), lumen))

    reach = radius + 2.5 * spread
    _stamp(field, np.concatenate([spots, *clouds]), ring, reach, voxel_nm=voxel_nm, shift_nm=shift_nm)
    _draw_granules(rng, field, tissue, voxel_nm=voxel_nm, shift_nm=shift_nm)
    grain = smooth_noise(rng, _size(field), voxel_nm=voxel_nm, sigma_nm=11.0)
    for site in sites:
        _draw_density(rng, field, grain, site, voxel_nm=voxel_nm)
    thickness = (
        0.29 * voxel_nm[0] * tissue.tilt
    )  # standard deviation of a section's depth across the membrane
    width = np.sqrt(MEMBRANE_NM**2 + thickness**2)
    line = np.sqrt(MEMBRANE_NM / width) * np.exp(-0.5 * np.square(tissue.membrane_nm / width))
    return np.asarray(np.maximum(field, 0.95 * line + 0.05 * field), dtype=np.float32)


def _size(field: _Floats) -> tuple[int, int, int]:
    z, y, x = field.shape
    return z, y, x


def _cytoplasm(rng: np.random.Generator, tissue: Tissue, voxel_nm: tuple[float, float, float]) -> _Floats:
    """Give light cytoplasm with fine grain, of a tone of its own in each neurite, and scraps of reticulum."""
    size = _size(tissue.membrane_nm)
    n = int(tissue.neurons.max()) + 1
    tone = np.clip(rng.normal(0.14, 0.06, n), 0.02, 0.5) + 0.2 * (rng.random(n) < 0.04)
    roughness = rng.uniform(0.07, 0.14, n)
    fine = smooth_noise(rng, size, voxel_nm=voxel_nm, sigma_nm=9.0)
    coarse = smooth_noise(rng, size, voxel_nm=voxel_nm, sigma_nm=28.0)
    field = tone.astype(np.float32)[tissue.neurons]
    field += roughness.astype(np.float32)[tissue.neurons] * (fine + 0.6 * coarse)
    sheet = smooth_noise(rng, size, voxel_nm=voxel_nm, sigma_nm=45.0)
    where = smooth_noise(rng, size, voxel_nm=voxel_nm, sigma_nm=90.0)
    reticulum = np.exp(-0.5 * np.square(sheet / 0.14)) * np.clip(2 * where - 2.2, 0, 0.5)
    return np.asarray(np.maximum(field, reticulum), dtype=np.float32)


def _stamp(
    field: _Floats,
    centres_nm: NDArray[np.float64],
    profile: Callable[[_Floats], _Floats],
    reach_nm: float,
    *,
    voxel_nm: tuple[float, float, float],
    shift_nm: NDArray[np.float64],
) -> None:
    """Darken the field around each centre by a profile over the distance, averaged over the section."""
    voxel, size = np.asarray(voxel_nm), np.asarray(field.shape)
    reach = np.ceil((reach_nm + 0.5 * voxel) / voxel).astype(int)
    offsets = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), -1).reshape(-1, 3)
    depths = voxel[0] * section_depths(voxel[0])
    for part in np.array_split(centres_nm, max(1, len(centres_nm) // 2000)):
        index = np.round(part / voxel).astype(int)[:, None] + offsets
        part_of, place = np.nonzero(np.all((index >= 0) & (index < size), axis=2))
        index = index[part_of, place]
        away = (index * voxel - part[part_of]).astype(np.float32)
        away[:, 1:] += shift_nm[index[:, 0]].astype(np.float32)
        flat = np.square(away[:, 1:]).sum(1)
        dark = np.mean([profile(np.sqrt(flat + np.square(away[:, 0] + d))) for d in depths], axis=0)
        np.maximum.at(field, tuple(index.T), dark.astype(np.float32))


def section_depths(thickness_nm: float) -> NDArray[np.float64]:
    """Give the depths, as shares of a section's thickness, over which a fine structure is averaged.

    Examples
    --------
    >>> section_depths(8.0), len(section_depths(40.0))
    (array([0.]), 3)
    """
    n = max(1, round(float(thickness_nm) / 13.0))
    return (np.arange(n) + 0.5) / n - 0.5


def _draw_granules(
    rng: np.random.Generator,
    field: _Floats,
    tissue: Tissue,
    *,
    voxel_nm: tuple[float, float, float],
    shift_nm: NDArray[np.float64],
) -> None:
    """Strew dark granules of 25 to 50 nm radius through the cytoplasm."""
    count = rng.poisson(6.0 * 1e-9 * float(np.prod(voxel_nm)) * field.size)
    for radius in (25.0, 35.0, 50.0):
        at = rng.integers(0, field.shape, (count // 3, 3))
        at = at[tissue.membrane_nm[tuple(at.T)] > radius + 8]

        def disc(distance: _Floats, radius: float = radius) -> _Floats:
            return np.asarray(0.85 / (1 + np.exp((distance - radius) / 5.0)))

        _stamp(field, at * np.asarray(voxel_nm), disc, radius + 16, voxel_nm=voxel_nm, shift_nm=shift_nm)


def _draw_density(
    rng: np.random.Generator,
    field: _Floats,
    grain: _Floats,
    site: Site,
    *,
    voxel_nm: tuple[float, float, float],
) -> None:
    """Darken both sides of a site as its kind has it."""
    view, depth = field[site.box], site.depth_nm
    pre, post = site.side == 1, site.side == 2
    strength = rng.uniform(0.78, 0.95)
    if site.kind in ("synapse", "bare"):
        dark = strength * (post * _fade(depth, 26.0, 48.0) + 0.65 * pre * _fade(depth, 8.0, 22.0))
        if site.kind == "synapse" or rng.random() < BARE_PEDESTALS:
            dark = np.maximum(dark, strength * pre * _pedestal(site, voxel_nm))
    elif site.kind == "junction":
        dark = strength * (pre | post) * _fade(depth, 14.0, 36.0)
    elif site.kind == "blob":
        radius = rng.uniform(45.0, 85.0)
        dark = strength * _fade(np.linalg.norm(_away(site, voxel_nm), axis=0), radius - 15, radius + 15)
    else:
        return
    np.maximum(view, (dark * (1 + 0.12 * grain[site.box])).astype(np.float32), out=view)


def _fade(distance: NDArray[np.floating], full: float, none: float) -> NDArray[np.float64]:
    """Fall from 1 at `full` to 0 at `none`."""
    return np.asarray(np.clip((none - distance) / (none - full), 0.0, 1.0), dtype=np.float64)


def _away(site: Site, voxel_nm: tuple[float, float, float]) -> NDArray[np.float64]:
    """Give the way in nm from the site's centre to each voxel of its box: (3, z, y, x)."""
    axes = [
        (np.arange(part.start, part.stop) - c) * v
        for part, c, v in zip(site.box, site.centre_zyx, voxel_nm, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _pedestal(site: Site, voxel_nm: tuple[float, float, float]) -> NDArray[np.float64]:
    """Give the presynaptic density: a foot on the membrane and a platform above it, a T in section."""
    away = _away(site, voxel_nm)
    parts = []
    for depth in section_depths(voxel_nm[0]) * voxel_nm[0]:
        moved = away + np.array([depth, 0.0, 0.0])[:, None, None, None]
        height = np.tensordot(site.inward, moved, 1)
        across = np.sqrt(np.maximum(np.square(moved).sum(0) - np.square(height), 0))
        foot = _fade(across, 12.0, 22.0) * _fade(np.abs(height - 25), 30.0, 38.0)
        platform = _fade(across, 45.0, 58.0) * _fade(np.abs(height - 52), 8.0, 17.0)
        parts.append(np.maximum(foot, platform))
    return np.asarray(np.mean(parts, axis=0))


def expose(
    rng: np.random.Generator,
    field: _Floats,
    *,
    voxel_nm: tuple[float, float, float],
    noise: float,
    drift: float,
) -> NDArray[np.uint8]:
    """Turn darkness into grey levels: blur, drift of contrast and brightness, noise.

    Parameters
    ----------
    rng : numpy Generator
    field : array of float32, zyx
        From `darkness`.
    voxel_nm : tuple of float
    noise, drift : float
        Multiply the noise, and the drift from section to section and across them; 0 turns them off.
    """
    image = LIGHT - (LIGHT - DARK) * gaussian_filter(field, (0.0, 0.5, 0.5))
    gain, shade = (_wander(rng, len(field)) for _ in range(2))
    image = 125.0 + (image - 125.0) * (1 + drift * GAIN * gain[:, None, None])
    image += drift * SHADE_GREY * shade[:, None, None]
    image += drift * SHADE_GREY * smooth_noise(rng, _size(field), voxel_nm=voxel_nm, sigma_nm=700.0)
    image += noise * NOISE_GREY * rng.standard_normal(field.shape, dtype=np.float32)
    return np.asarray(np.clip(np.round(image), 0, 255), dtype=np.uint8)


def _wander(rng: np.random.Generator, n: int) -> _Floats:
    """Give a random walk that is drawn back to 0, of unit variance."""
    walk = np.zeros(n, np.float32)
    value = float(rng.standard_normal())
    for i, step in enumerate(rng.standard_normal(n)):
        value = 0.8 * value + 0.6 * float(step)
        walk[i] = value
    return walk
