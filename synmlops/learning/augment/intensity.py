"""What changes grey values of the whole patch or a box of it; labels stay.

Beside `Curve`, which reads raw grey, images are (z, y, x) float32, about mean 0 and deviation 1.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from synmlops.learning.augment.grey import functions
from synmlops.learning_params import CutBlur, CutNoise, Intensity, Noise
from synmlops.volumes.prepared import Box

REACH = 3.0
"""Gamma bends the range from so many standard deviations below the mean to as many above."""


@dataclass(frozen=True)
class Bend:
    """Gamma, then contrast about the mean, then brightness."""

    gamma: float
    contrast: float
    brightness: float  # standard deviations


STRAIGHT = Bend(1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Curve:
    """From grey to the normalised image: inversion about the mean, then bends.

    Examples
    --------
    >>> grey = torch.tensor([[[90, 100, 120]]], dtype=torch.uint8)
    >>> Curve(invert=True).apply(grey.float(), mean=100, std=10).tolist()
    [[[1.0, 0.0, -2.0]]]
    """

    invert: bool = False
    bends: tuple[Bend, ...] = ()  # none, one for all, or one for each section

    def looks_up(self, image: Tensor) -> bool:
        """Whether `look_up` is the cheaper way: 256 values are to be raised to a power, not all voxels."""
        return image.dtype == torch.uint8 and any(bend.gamma != 1 for bend in self.bends)

    def look_up(self, image: Tensor, *, mean: float, std: float) -> Tensor:
        """Do what `apply` does for a (z, y, x) uint8 image, leaving it as it is."""
        tables = self.tables(mean=mean, std=std, device=image.device)
        index = image.int()
        if len(self.bends) > 1:
            index += 256 * torch.arange(len(image), dtype=torch.int32, device=image.device)[:, None, None]
        return tables.flatten().index_select(0, index.flatten()).reshape(image.shape)

    def tables(self, *, mean: float, std: float, device: torch.device) -> Tensor:
        """Give what becomes of each uint8 value: (1, 256), or (sections, 256) where these differ."""
        scale = (-1 if self.invert else 1) / std
        greys = torch.arange(256, dtype=torch.float32, device=device).mul_(scale).sub_(mean * scale)
        if not self.bends:
            return greys[None]
        rows = [(bend.gamma, bend.contrast, bend.brightness) for bend in self.bends]
        gamma, contrast, brightness = torch.tensor(rows, device=device).T[..., None]
        return _raise(greys.repeat(len(rows), 1), gamma).mul_(contrast).add_(brightness)

    def apply(self, grey: Tensor, *, mean: float, std: float) -> Tensor:
        """Change (z, y, x) float32 grey values in place; the same tensor is given back."""
        scale = (-1 if self.invert else 1) / std
        if len(self.bends) < 2:
            return _bend(grey, scale=scale, offset=-mean * scale, bend=next(iter(self.bends), STRAIGHT))
        for section, bend in zip(grey, self.bends, strict=True):
            _bend(section, scale=scale, offset=-mean * scale, bend=bend)
        return grey


@dataclass(frozen=True)
class GaussianNoise:
    """Normal noise in a box, or everywhere."""

    deviation: float
    seed: int
    box: Box | None = None

    def apply(self, image: Tensor) -> None:
        """Add it in place."""
        part = image if self.box is None else image[self.box.slices]
        random = _random_16_bits(part.numel(), self.seed, image.device)
        table = _normal_table(image.device) * self.deviation
        if (compiled := functions(image)) is not None:
            steps = image.stride()[:2]
            compiled.call("add_picked", part, *part.shape, *steps, random, table, _UNUSED_BITS)
            return
        picked = table.index_select(0, random.int() >> _UNUSED_BITS)
        part.add_(picked.reshape(part.shape))


@dataclass(frozen=True)
class Coarsening:
    """A box averaged over square blocks in plane; its sides in plane are multiples of a block's."""

    box: Box
    factor: int  # side of a block, in voxels

    def apply(self, image: Tensor) -> None:
        """Average in place."""
        part = image[self.box.slices]
        means = avg_pool2d(part, self.factor)
        blocks = torch.unflatten(torch.unflatten(part, 2, (-1, self.factor)), 1, (-1, self.factor))
        blocks.copy_(means[:, :, None, :, None].expand_as(blocks))


def draw_curve(rng: np.random.Generator, *, intensity: Intensity, invert: float, n_sections: int) -> Curve:
    """Draw inversion and the bends, of the patch or of each section."""
    inverted = bool(rng.random() < invert)
    if rng.random() >= intensity.probability:
        return Curve(inverted)
    n = n_sections if rng.random() < intensity.per_section else 1
    greatest = np.array([intensity.gamma, intensity.contrast, intensity.brightness])
    changes = np.array([1, 1, 0]) + rng.uniform(-greatest, greatest, size=(n, 3))
    return Curve(inverted, tuple(Bend(*row) for row in changes.tolist()))


def draw_noise(rng: np.random.Generator, params: Noise) -> GaussianNoise | None:
    """Draw noise everywhere."""
    if rng.random() >= params.probability:
        return None
    return GaussianNoise(float(rng.uniform(0, params.deviation)), int(rng.integers(2**62)))


def draw_cut_noise(
    rng: np.random.Generator, params: CutNoise, shape_zyx: tuple[int, int, int]
) -> GaussianNoise | None:
    """Draw noise in a box."""
    if rng.random() >= params.probability:
        return None
    box = _draw_box(rng, share=params.share, shape_zyx=shape_zyx, block_zyx=(1, 1, 1))
    return GaussianNoise(float(rng.uniform(0, params.deviation)), int(rng.integers(2**62)), box)


def draw_coarsening(
    rng: np.random.Generator, params: CutBlur, shape_zyx: tuple[int, int, int]
) -> Coarsening | None:
    """Draw a box of lower resolution, and how much lower."""
    if rng.random() >= params.probability:
        return None
    factor = min(int(rng.integers(2, params.factor + 1)), *shape_zyx[1:])
    return Coarsening(
        _draw_box(rng, share=params.share, shape_zyx=shape_zyx, block_zyx=(1, factor, factor)), factor
    )


def _draw_box(
    rng: np.random.Generator,
    *,
    share: float,
    shape_zyx: tuple[int, int, int],
    block_zyx: tuple[int, int, int],
) -> Box:
    """Draw a box anywhere: each side from one block to `share` of the whole, in blocks."""
    shape, block = np.array(shape_zyx), np.array(block_zyx)
    sides = block * rng.integers(1, np.maximum(1, (share * shape).astype(int) // block) + 1)
    starts = rng.integers(0, shape - sides + 1)
    (z, y, x), (z_stop, y_stop, x_stop) = starts.tolist(), (starts + sides).tolist()
    return Box((z, y, x), (z_stop, y_stop, x_stop))


def _bend(grey: Tensor, *, scale: float, offset: float, bend: Bend) -> Tensor:
    """Normalise and bend in place."""
    if bend.gamma == 1:
        return grey.mul_(scale * bend.contrast).add_(offset * bend.contrast + bend.brightness)
    value = _raise(grey.mul_(scale).add_(offset), bend.gamma)
    return value.mul_(bend.contrast).add_(bend.brightness)


def _raise(value: Tensor, gamma: float | Tensor) -> Tensor:
    """Apply gamma within `REACH`, in place."""
    share = (value + REACH) / (2 * REACH)
    curved = share.clamp(0, 1).pow_(gamma).mul_(2 * REACH).sub_(REACH)
    return value.copy_(torch.where((share > 0) & (share < 1), curved, value))


def _random_16_bits(n: int, seed: int, device: torch.device) -> Tensor:
    """Draw n uint16; on a CPU by SFC64, which takes half the time of torch's generator."""
    n_words = (n + 3) // 4
    if device.type == "cpu":
        return torch.from_numpy(np.random.SFC64(seed).random_raw(n_words).view(np.uint16))[:n]
    words = torch.empty(n_words, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    return words.view(torch.uint16)[:n]


_UNUSED_BITS = 4
"""Of 16; the table of the others fits the first-level cache."""


@lru_cache(maxsize=8)
def _normal_table(device: torch.device) -> Tensor:
    """Values of the normal distribution with equal shares between them, scaled to a deviation of 1."""
    n = 2 ** (16 - _UNUSED_BITS)
    shares = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    values: Tensor = torch.special.ndtri(shares)
    return (values / values.square().mean().sqrt()).to(device, torch.float32)
