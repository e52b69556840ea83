"""Partner F1 of the ways to take touching synapses apart, on phantoms where none, some or most of them touch.

    python benchmarks/decode_modes.py

Volumes of 32 x 384 x 384 voxels of 40 x 8 x 8 nm with as many synapses as there is room for at a given gap
between the balls that hold them; the default phantom keeps 125 nm. The probabilities are no network's: the
true labels, blurred as a network blurs them and with smooth noise, so that all that differs is the decoding.
Scores are pooled over the seeds; `touching` is the share of the true sites that touch another one. Partners
are scored with the neuron ids given (both ends within 400 nm and on the same two neurons) and without (post
pieces by component, distance alone).
"""

import argparse
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from synmlops.params import EvaluateParams
from synmlops.synapses.instances import components_of, sites_of
from synmlops.synapses.metrics import InstanceScores, score_instances, score_partners
from synmlops.synapses.partners import partners_of
from synmlops.synapses.scores import decode
from synmlops.synapses.splitting import SplitMode
from synmlops.synapses.voxels import Counts
from synmlops.volumes import phantom_synapses
from synmlops.volumes.phantom import Phantom, make_phantom

SIZE_ZYX = (32, 384, 384)
VOXEL_NM = (40.0, 8.0, 8.0)
DENSE = 40.0  # synapses per µm³; more than there is room for
MODES: tuple[SplitMode, ...] = ("none", "pre", "watershed")
BLUR = (0.5, 1.5, 1.5)  # voxels
GRAIN = (0.7, 3.0, 3.0)  # voxels, of the noise
PARAMS = EvaluateParams()


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gaps", type=float, nargs="+", default=[125.0, 0.0, -60.0])
    parser.add_argument("--noises", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print("| gap, nm | noise | sites | touching | split | synapse F1 | partner F1, neurons given | without |")
    print("|---|---|---|---|---|---|---|---|")
    for gap in options.gaps:
        phantoms = [_phantom(seed, gap) for seed in range(201, 201 + options.seeds)]
        touching = np.mean([_share_touching(phantom) for phantom in phantoms])
        for noise in options.noises:
            seen = [(phantom, _probabilities(phantom, noise)) for phantom in phantoms]
            for mode in MODES:
                sites, with_neurons, without = _score(seen, mode)
                print(
                    f"| {gap:g} | {noise:g} | {sites.by_iou.true} | {touching:.0%} | {mode} "
                    f"| {sites.by_iou.f1:.3f} | {with_neurons.f1:.3f} | {without.f1:.3f} |",
                    flush=True,
                )


def _phantom(seed: int, gap: float) -> Phantom:
    phantom_synapses.GAP_NM = gap
    return make_phantom(
        size_zyx=SIZE_ZYX, voxel_nm=VOXEL_NM, seed=seed, synapses_per_um3=DENSE, lookalikes=0.0
    )


def _share_touching(phantom: Phantom) -> float:
    """Give the share of the true sites whose component of the label holds another one."""
    sites = sites_of(phantom.labels)
    component = components_of(sites > 0)
    pairs = np.unique(np.stack([component[component > 0], sites[component > 0]]), axis=1)
    crowded = np.bincount(pairs[0].astype(np.int64)) > 1
    return float(np.mean([crowded[component[sites == site]].any() for site in np.unique(pairs[1])]))


def _probabilities(phantom: Phantom, noise: float) -> NDArray[np.uint8]:
    """Blur the truth and add noise, 1 standard deviation of which is `noise`."""
    rng = np.random.default_rng(phantom.labels.max())
    labels = phantom.labels
    masks = [labels % 2 == 1, (labels > 0) & (labels % 2 == 0), labels > 0]
    planes = []
    for mask in masks:
        grain = gaussian_filter(rng.standard_normal(labels.shape), GRAIN)
        planes.append(gaussian_filter(mask.astype(np.float32), BLUR) + noise * grain / grain.std())
    return (255 * np.stack(planes)).clip(0, 255).astype(np.uint8)


def _score(
    seen: list[tuple[Phantom, NDArray[np.uint8]]], mode: SplitMode
) -> tuple[InstanceScores, Counts, Counts]:
    """Give synapse, partner and partner scores without neurons, pooled."""
    params = PARAMS.model_copy(update={"split": mode})
    scores = []
    for phantom, probabilities in seen:
        ids = decode(probabilities, threshold=0.5, params=params, voxel_nm=VOXEL_NM)
        sites = score_instances(
            ids, phantom.labels, pairs=True, voxel_nm=VOXEL_NM, iou=params.iou, centroid_nm=params.centroid_nm
        )
        partners = []
        for neurons in (phantom.neurons, None):
            table = partners_of(
                ids,
                voxel_nm=VOXEL_NM,
                probabilities_czyx=probabilities,
                neurons=neurons,
                min_side_voxels=params.min_side_voxels,
            )
            partners.append(
                score_partners(
                    table,
                    phantom.partners,
                    radius_nm=params.radius_nm,
                    with_neurons=neurons is not None,
                )
            )
        scores.append((sites, *partners))
    one, two, three = (reduce(add, column) for column in zip(*scores, strict=True))
    return one, two, three


if __name__ == "__main__":
    main()
