"""Which patch training sees at which step: a look-up, decided by (seed, step, index) alone.

Rejection reads prepared counts, never voxels, and a draw depends on nothing but its seed. So no two ranks
ever draw alike, the number of ranks changes nothing, and any patch of any run can be drawn again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import CHANNELS, SamplingParams, SynmlopsError
from synmlops.volumes.labels import count_in
from synmlops.volumes.prepared import Box, Fold, Manifest, PreparedVolume
from synmlops.volumes.sites import MIDDLE

_DRAWS_AT_ONCE = 32
MOST_DRAWS = 320_000
"""So many poor patches in a row mean that there are no rich ones."""


@dataclass(frozen=True)
class LabelledRegion:
    """A box of a labelled volume: patches lie in it, or a model is validated on it."""

    volume: PreparedVolume
    box: Box

    @property
    def known(self) -> tuple[bool, ...]:
        """Which channels the label knows, in the order of `CHANNELS`."""
        return tuple(name in self.volume.channels for name in CHANNELS)

    @cached_property
    def middles_zyx(self) -> NDArray[np.int32]:
        """Middles of the synapses that lie in the box, (N, 3), in voxels of the volume."""
        middles = self.volume.sites[:, MIDDLE]
        inside = (middles >= self.box.start_zyx) & (middles < self.box.stop_zyx)
        return middles[inside.all(axis=1)]


@dataclass(frozen=True)
class Draw:
    """One accepted draw: a place, and the generator that augmentation goes on with."""

    region: LabelledRegion
    box: Box  # in voxels of the volume
    rng: np.random.Generator

    @property
    def volume(self) -> str:
        """Name of the volume."""
        return self.region.volume.name

    @property
    def start_zyx(self) -> tuple[int, int, int]:
        """First voxel, in the volume."""
        return self.box.start_zyx

    @property
    def known(self) -> tuple[bool, ...]:
        """Which channels the label knows, in the order of `CHANNELS`."""
        return self.region.known

    @property
    def image(self) -> NDArray[Any]:
        """The voxels, as a view of the memory map."""
        return self.region.volume.image[self.box.slices]

    @property
    def sides(self) -> NDArray[np.uint8]:
        """What is known of each voxel, as a view of the memory map."""
        return self.region.volume.sides[self.box.slices]


class PatchSampler:
    """Draw patches from regions: uniform over positions but for the volumes' weights, poor ones rejected.

    A patch with fewer than `reject_below` trusted foreground voxels or fewer than `min_synapses` synapses is
    rejected with `reject_probability` and drawn again. A share of the patches is not drawn by position but
    about a synapse, and rejected for nothing; the synapse lies anywhere in the patch's middle half along each
    axis, or nearer to its border where the region ends. No patch has less than `min_trusted` of its voxels
    trusted.

    Raises
    ------
    SynmlopsError
        If a region is smaller than a patch, no region has any foreground, nothing fulfils `min_trusted`, a
        weight is of no volume, or patches are to be centred and no synapse's middle lies in a region.
    """

    def __init__(self, regions: Sequence[LabelledRegion], *, params: SamplingParams, seed: int) -> None:
        self.regions, self.params = tuple(regions), params
        self._seed, self._patch = seed, np.array(params.patch_zyx)
        for region in regions:
            if any(r < p for r, p in zip(region.box.shape_zyx, params.patch_zyx, strict=True)):
                raise SynmlopsError(
                    f"{region.volume.path}: the training region {region.box.shape_zyx} is smaller than "
                    f"sampling.patch_zyx {params.patch_zyx}; lower the patch or give more tissue"
                )
        weights = _weights_of(regions, params)
        self._starts = np.array([region.box.start_zyx for region in regions]).reshape(-1, 3)
        shapes = np.array([region.box.shape_zyx for region in regions]).reshape(-1, 3)
        self._spans = shapes - self._patch + 1  # start positions along each axis
        self._up_to = _cumulative(self._spans.prod(axis=1) * weights)
        self._tables = [np.asarray(region.volume.foreground_sum) for region in regions]
        self._masks = [region.volume.trusted_sum if params.min_trusted else None for region in regions]
        self._least_trusted = params.min_trusted * self._patch.prod() - 1e-6  # a share times a count rounds
        self._counters = [_Counter(region) for region in regions] if params.min_synapses else []
        if params.centred:
            self._sites = _Sites(regions, weights)
        self._check_foreground()
        self._check_trusted()

    def draw(self, step: int, index: int) -> Draw:
        """Draw patch `index` of the global batch at `step`."""
        rng = np.random.default_rng([self._seed, step, index])
        is_centred = rng.random() < self.params.centred
        for _ in range(MOST_DRAWS // _DRAWS_AT_ONCE):
            which, starts = self._about_synapses(rng) if is_centred else self._anywhere(rng)
            kept = rng.random(_DRAWS_AT_ONCE) >= self.params.reject_probability
            taken = self._first_accepted(which, starts, kept | is_centred)
            if taken is not None:
                z, y, x = (int(at) for at in starts[taken])
                dz, dy, dx = self.params.patch_zyx
                box = Box((z, y, x), (z + dz, y + dy, x + dx))
                return Draw(self.regions[which[taken]], box, rng)
        raise SynmlopsError(f"{self._wish()} in {MOST_DRAWS} draws; lower {self._keys()}")

    def _anywhere(self, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        which = np.searchsorted(self._up_to, rng.random(_DRAWS_AT_ONCE), side="right")
        return which, self._starts[which] + rng.integers(0, self._spans[which])

    def _about_synapses(self, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        which, middles = self._sites.draw(rng)
        quarter = self._patch // 4
        jitter = rng.integers(-quarter, quarter + 1, size=middles.shape)
        first = self._starts[which]
        return which, np.clip(middles - self._patch // 2 + jitter, first, first + self._spans[which] - 1)

    def _first_accepted(
        self, which: NDArray[np.intp], starts: NDArray[np.int64], kept: NDArray[np.bool_]
    ) -> int | None:
        """Give the first of the candidates that is kept or rich, and trusted enough."""
        accepted = kept.copy()
        if self.params.min_trusted:
            trusted = self._trusted(which, starts)
            accepted &= trusted
        else:
            trusted = np.ones(len(kept), bool)
        end = int(accepted.argmax()) if accepted.any() else len(kept)
        open_ones = np.flatnonzero(trusted[:end])
        counts = self._count(self._tables, which[open_ones], starts[open_ones])
        for one in open_ones[counts >= self.params.reject_below]:
            if not self._counters or self._counters[which[one]].has(
                self.params.min_synapses, starts[one], self._patch
            ):
                return int(one)
        return end if end < len(kept) else None

    def _count(
        self, tables: Sequence[NDArray[np.integer]], which: NDArray[np.intp], starts: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Count in the patches of several regions, each by its summed-volume table."""
        counts = np.empty(len(which), np.int64)
        for region in np.unique(which) if len(self.regions) > 1 else (0,):
            own = which == region
            counts[own] = count_in(tables[region], starts[own], self.params.patch_zyx)
        return counts

    def _trusted(self, which: NDArray[np.intp], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        trusted = np.ones(len(which), bool)
        masked = np.flatnonzero([self._masks[region] is not None for region in which])
        counts = self._count(self._masks, which[masked], starts[masked])  # type: ignore[arg-type]
        trusted[masked] = counts >= self._least_trusted
        return trusted

    def _check_foreground(self) -> None:
        for region in self.regions:
            if count_in(region.volume.foreground_sum, [region.box.start_zyx], region.box.shape_zyx)[0]:
                return
        raise SynmlopsError(
            f"{_paths_of(self.regions)}: the training regions hold no synapse voxel; give a label with "
            "foreground there"
        )

    def _check_trusted(self) -> None:
        """Look at every position, until one is trusted enough."""
        for region, mask, spans in zip(self.regions, self._masks, self._spans, strict=True):
            if mask is None:
                return
            z0, y0, x0 = region.box.start_zyx
            ys, xs = (slice(at, at + n) for at, n in zip((y0, x0), spans[1:], strict=True))
            (depth, height, width) = self._patch
            for z in range(z0, z0 + spans[0]):
                sums = mask[z + depth].astype(np.int64) - mask[z]
                rows = sums[ys.start + height : ys.stop + height] - sums[ys]
                if (rows[:, xs.start + width : xs.stop + width] - rows[:, xs]).max() >= self._least_trusted:
                    return
        if self.regions and self.params.min_trusted:
            raise SynmlopsError(
                f"sampling.min_trusted: the masks of {_paths_of(self.regions)} leave no patch of "
                f"{self.params.patch_zyx} with {self.params.min_trusted:.0%} of its voxels trusted; "
                "lower it, or sampling.patch_zyx"
            )

    def _wish(self) -> str:
        wish = f"no patch of {self.params.patch_zyx} with {self.params.reject_below} foreground voxels"
        if self.params.min_synapses:
            wish += f", {self.params.min_synapses} synapses"
        return wish + (f", {self.params.min_trusted:.0%} trusted" if self.params.min_trusted else "")

    def _keys(self) -> str:
        keys = ["reject_below", "reject_probability"]
        keys += [key for key in ("min_synapses", "min_trusted") if getattr(self.params, key)]
        return " or ".join(f"sampling.{key}" for key in keys)


def train_regions(fold: Fold, manifest: Manifest, *, patch_zyx: tuple[int, int, int]) -> list[LabelledRegion]:
    """Give the training regions of a fold that can hold a patch.

    Raises
    ------
    SynmlopsError
        If a whole volume is smaller than a patch, or no region can hold one.
    """
    regions = []
    for region in fold.train:
        volume = manifest.volumes[region.volume]
        if any(n < p for n, p in zip(volume.shape_zyx, patch_zyx, strict=True)):
            raise SynmlopsError(
                f"{volume.sources.get('image', volume.path)}: {volume.shape_zyx} voxels are fewer than "
                f"sampling.patch_zyx {patch_zyx}; lower the patch or leave the volume out"
            )
        if all(n >= p for n, p in zip(region.box.shape_zyx, patch_zyx, strict=True)):
            regions.append(LabelledRegion(volume, region.box))
    if not regions:
        raise SynmlopsError(
            f"fold {fold.name}: no training region holds a patch of {patch_zyx}; lower sampling.patch_zyx or "
            "data.split.guard"
        )
    return regions


class _Sites:
    """The synapses of all regions, each as likely but for its volume's weight."""

    def __init__(self, regions: Sequence[LabelledRegion], weights: NDArray[np.float64]) -> None:
        per_region = [region.middles_zyx for region in regions]
        if not any(len(middles) for middles in per_region):
            raise SynmlopsError(
                f"sampling.centred: no synapse of {_paths_of(regions)} has its middle in a training region; "
                "set it to 0"
            )
        self._middles = np.concatenate(per_region)
        self._region = np.repeat(np.arange(len(regions)), [len(middles) for middles in per_region])
        self._up_to = _cumulative(weights[self._region])

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Draw some, and give the region and the middle of each."""
        drawn = np.searchsorted(self._up_to, rng.random(_DRAWS_AT_ONCE), side="right")
        return self._region[drawn], self._middles[drawn]


class _Counter:
    """Counts the synapses of a region by their middles, sorted along its longest axis."""

    def __init__(self, region: LabelledRegion) -> None:
        self._axis = int(np.argmax(region.box.shape_zyx))
        self._middles = region.middles_zyx[np.argsort(region.middles_zyx[:, self._axis])]
        self._along = np.ascontiguousarray(self._middles[:, self._axis])

    def has(self, least: int, start: NDArray[np.int64], size: NDArray[np.int64]) -> bool:
        """Whether at least so many middles lie in a box."""
        span = start[self._axis], start[self._axis] + size[self._axis]
        first, last = np.searchsorted(self._along, span)
        if last - first < least:
            return False
        near = self._middles[first:last]
        return int(((near >= start) & (near < start + size)).all(axis=1).sum()) >= least


def _weights_of(regions: Sequence[LabelledRegion], params: SamplingParams) -> NDArray[np.float64]:
    """Give the weight of each region's volume."""
    names = dict.fromkeys(region.volume.name for region in regions)
    for name in params.volume_weights:
        if name not in names:
            raise SynmlopsError(
                f"sampling.volume_weights: {name} is no training volume; there are {', '.join(names)}"
            )
    return np.array([params.volume_weights.get(region.volume.name, 1.0) for region in regions])


def _cumulative(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give where each share ends between 0 and 1, so that `searchsorted` draws by weight."""
    up_to = np.cumsum(weights)
    shares: NDArray[np.float64] = up_to / up_to[-1]
    return shares


def _paths_of(regions: Sequence[LabelledRegion]) -> str:
    return ", ".join(dict.fromkeys(str(region.volume.path) for region in regions))
