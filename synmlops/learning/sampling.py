"""Which patch training sees at which step: a look-up, decided by (seed, step, index) alone.

Rejection reads prepared counts, never voxels, and a draw depends on nothing but its seed. So no two ranks
ever draw alike, the number of ranks changes nothing, and any patch of any run can be drawn again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synmlops.params import CHANNELS, SamplingParams, SynmlopsError
from synmlops.volumes.labels import count_in
from synmlops.volumes.prepared import Box, PreparedVolume

_DRAWS_AT_ONCE = 32
MOST_DRAWS = 320_000
"""So many poor patches in a row mean that there are no rich ones."""


@dataclass(frozen=True)
class Patch:
    """One accepted draw: voxels as views, and the generator that augmentation goes on with."""

    image: NDArray[np.uint8] | NDArray[np.uint16]  # (z, y, x)
    sides: NDArray[np.uint8]
    known: tuple[bool, ...]  # channels, in the order of CHANNELS
    volume: int  # index into the sampler's regions
    start_zyx: tuple[int, int, int]
    rng: np.random.Generator


@dataclass(frozen=True)
class LabelledRegion:
    """A box of a labelled volume: patches lie in it, or a model is validated on it."""

    volume: PreparedVolume
    box: Box


class PatchSampler:
    """Draw patches from regions: uniform over positions, poor ones rejected.

    A patch with fewer than `reject_below` trusted foreground voxels is rejected with `reject_probability`
    and drawn again.

    Raises
    ------
    SynmlopsError
        If a region is smaller than a patch, or no region has any foreground.
    """

    def __init__(self, regions: Sequence[LabelledRegion], *, params: SamplingParams, seed: int) -> None:
        self._regions, self._params, self._seed = tuple(regions), params, seed
        for region in regions:
            if any(r < p for r, p in zip(region.box.shape_zyx, params.patch_zyx, strict=True)):
                raise SynmlopsError(
                    f"{region.volume.path}: the training region {region.box.shape_zyx} is smaller than "
                    f"sampling.patch_zyx {params.patch_zyx}; lower the patch or give more tissue"
                )
        shapes = np.array([region.box.shape_zyx for region in regions]).reshape(-1, 3)
        self._spans = shapes - np.array(params.patch_zyx) + 1  # start positions along each axis
        positions = self._spans.prod(axis=1)
        self._shares = positions / positions.sum()
        if not any(self._foreground(region) for region in regions):
            paths = ", ".join(dict.fromkeys(str(region.volume.path) for region in regions))
            raise SynmlopsError(
                f"{paths}: the training regions hold no synapse voxel; give a label with foreground there"
            )

    def draw(self, step: int, index: int) -> Patch:
        """Draw patch `index` of the global batch at `step`."""
        rng = np.random.default_rng([self._seed, step, index])
        for _ in range(MOST_DRAWS // _DRAWS_AT_ONCE):
            which = rng.choice(len(self._regions), size=_DRAWS_AT_ONCE, p=self._shares)
            offsets = rng.integers(0, self._spans[which])
            kept = rng.random(_DRAWS_AT_ONCE) >= self._params.reject_probability
            for draw in range(_DRAWS_AT_ONCE):
                region = self._regions[which[draw]]
                start = offsets[draw] + np.array(region.box.start_zyx)
                if kept[draw] or self._is_rich(region, start):
                    return self._cut(int(which[draw]), start, rng)
        raise SynmlopsError(
            f"no patch of {self._params.patch_zyx} with {self._params.reject_below} foreground voxels in "
            f"{MOST_DRAWS} draws; lower sampling.reject_below or sampling.reject_probability"
        )

    def _is_rich(self, region: LabelledRegion, start: NDArray[np.int_]) -> bool:
        count = count_in(region.volume.foreground_sum, start[None], self._params.patch_zyx)[0]
        return bool(count >= self._params.reject_below)

    def _foreground(self, region: LabelledRegion) -> int:
        return int(
            count_in(region.volume.foreground_sum, np.array([region.box.start_zyx]), region.box.shape_zyx)[0]
        )

    def _cut(self, which: int, start: NDArray[np.int_], rng: np.random.Generator) -> Patch:
        volume = self._regions[which].volume
        slices = tuple(slice(int(s), int(s) + p) for s, p in zip(start, self._params.patch_zyx, strict=True))
        known = tuple(name in volume.channels for name in CHANNELS)
        z, y, x = (int(s) for s in start)
        return Patch(volume.image[slices], volume.sides[slices], known, which, (z, y, x), rng)
