"""A phantom of synaptic tissue under the electron microscope, with labels that are known to be true.

It holds what makes synapses hard to find in real volumes: anisotropic voxels, sections that jitter and drift,
sites of one pre and several posts, and look-alikes that no grey level tells from a synapse: densities without
vesicles, vesicles without a density. What makes a synapse is both at once, on opposite sides of a membrane.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.phantom_imaging import darkness, expose
from synmlops.volumes.phantom_synapses import Site, label_sites, partner_table, place_sites
from synmlops.volumes.phantom_tissue import make_tissue
from synmlops.volumes.store import Grid

JITTER_NM = 4.0  # standard deviation of a section's displacement


@dataclass(frozen=True)
class Phantom:
    """A volume of EM and the truth about it.

    Attributes
    ----------
    image : array of uint8, zyx
    labels : array of uint32, zyx
        Of kind `pairs`: site n has pre 2n-1 and post 2n; all posts of a site share 2n.
    neurons : array of uint32, zyx
        Neuron of each voxel, from 1.
    partners : DataFrame
        The true partner table (`synmlops.volumes.table.COLUMNS`): one row per site and post neuron.
    grid : Grid
    sites : tuple of Site
        Synapses in the order of their labels, then the look-alikes.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint32]
    neurons: NDArray[np.uint32]
    partners: pd.DataFrame
    grid: Grid
    sites: tuple[Site, ...]


def make_phantom(
    *,
    size_zyx: tuple[int, int, int],
    voxel_nm: tuple[float, float, float],
    seed: int,
    synapses_per_um3: float = 2.0,
    polyadic: float = 0.6,
    lookalikes: float = 2.0,
    noise: float = 1.0,
    jitter: float = 1.0,
    offset_nm: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Phantom:
    """Make a phantom; the same arguments give the same bytes.

    Parameters
    ----------
    size_zyx : tuple of int
        Voxels. From about 500 nm along each axis a synapse fits.
    voxel_nm : tuple of float
        Size of a voxel; structures keep their size in nm whatever it is.
    seed : int
        Of tissue, sites and noise, each with a random stream of its own: another `noise` leaves the tissue.
    synapses_per_um3 : float
        At least one is placed; fewer than asked where the tissue has no room.
    polyadic : float
        Share of the synapses with two to four posts, 0 to 1.
    lookalikes : float
        Look-alikes per synapse.
    noise : float
        Multiplies the noise.
    jitter : float
        Multiplies the displacement of sections and the drift of contrast and brightness.
    offset_nm : tuple of float
        World position of the first voxel.

    Raises
    ------
    SynmlopsError
        If the volume is too small for a single synapse.

    Examples
    --------
    >>> phantom = make_phantom(size_zyx=(16, 80, 80), voxel_nm=(40, 8, 8), seed=1)
    >>> phantom.image.shape, phantom.image.dtype, len(phantom.partners) > 0
    ((16, 80, 80), dtype('uint8'), True)
    """
    jitter_rng, tissue_rng, site_rng, draw_rng, expose_rng = np.random.default_rng(seed).spawn(5)
    shift_nm = jitter * JITTER_NM * jitter_rng.standard_normal((size_zyx[0], 2))
    tissue = make_tissue(tissue_rng, size_zyx, voxel_nm=voxel_nm, shift_nm=shift_nm)
    synapses = max(1, round(synapses_per_um3 * 1e-9 * float(np.prod(voxel_nm)) * tissue.neurons.size))
    sites = place_sites(
        site_rng,
        tissue,
        voxel_nm=voxel_nm,
        synapses=synapses,
        lookalikes=round(lookalikes * synapses),
        polyadic=polyadic,
    )
    if not any(site.kind == "synapse" for site in sites):
        raise SynmlopsError(
            f"data.phantom: {size_zyx} voxels of {voxel_nm} nm hold no place for a synapse (seed {seed}); "
            "use a larger size_zyx, from about 600 nm along each axis, or another seed"
        )
    grid = Grid(voxel_nm, offset_nm)
    field = darkness(draw_rng, tissue, sites, voxel_nm=voxel_nm, shift_nm=shift_nm)
    return Phantom(
        image=expose(expose_rng, field, voxel_nm=voxel_nm, noise=noise, drift=jitter),
        labels=label_sites(sites, tissue.neurons.shape),
        neurons=tissue.neurons,
        partners=partner_table(sites, tissue, grid=grid),
        grid=grid,
        sites=tuple(sites),
    )
