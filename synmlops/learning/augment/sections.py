"""What befalls whole sections: blur, smear, loss.

Images are (z, y, x) float32, about mean 0 and deviation 1.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from synmlops.learning.augment.grey import functions
from synmlops.learning_params import Blur, MissingSection, MotionBlur

DARK = -3.0
"""Intensity of a lost section, the other choice being the mean."""


@dataclass(frozen=True)
class GaussianBlur:
    """Blur in plane of sections `first` to before `stop`."""

    first: int
    stop: int
    sigma: float  # voxels

    def apply(self, image: Tensor) -> None:
        """Blur in place; beyond the border, the outermost voxels go on."""
        part = image[self.first : self.stop]
        reach = max(1, math.ceil(3 * self.sigma))
        weights = [math.exp(-0.5 * (offset / self.sigma) ** 2) for offset in range(-reach, reach + 1)]
        weights = [weight / sum(weights) for weight in weights]
        if (compiled := functions(part)) is not None:
            compiled.call("blur", part, *part.shape, torch.tensor(weights), reach)
            return
        padded = pad(part[None], (reach,) * 4, mode="replicate")[0]
        along_y = _weighted(padded, weights, axis=1, size=part.shape[1])
        part.copy_(_weighted(along_y, weights, axis=2, size=part.shape[2]))


@dataclass(frozen=True)
class Smear:
    """Mean along a line through each voxel, in some sections."""

    sections: tuple[int, ...]
    length: int  # voxels
    degrees: float

    def offsets(self) -> list[tuple[int, int]]:
        """Give the voxels of the line, y and x from its middle, one for each voxel of its length.

        Examples
        --------
        >>> Smear((0,), length=3, degrees=90.0).offsets()
        [(-1, 0), (0, 0), (1, 0)]
        """
        angle = math.radians(self.degrees)
        along = range(-(self.length // 2), self.length - self.length // 2)
        return [(round(step * math.sin(angle)), round(step * math.cos(angle))) for step in along]

    def apply(self, image: Tensor) -> None:
        """Smear in place; beyond the border, the outermost voxels go on."""
        height, width = image.shape[1:]
        offsets = self.offsets()
        reach = max(1, *(abs(step) for offset in offsets for step in offset))
        if (compiled := functions(image)) is not None:
            for section in self.sections:
                compiled.call(
                    "smear", image[section], height, width, torch.tensor(offsets), len(offsets), reach
                )
            return
        for section in self.sections:
            padded = pad(image[None, section, None], (reach,) * 4, mode="replicate")[0, 0]
            total = torch.zeros_like(image[section])
            for dy, dx in offsets:
                y, x = reach + dy, reach + dx
                total += padded[y : y + height, x : x + width]
            image[section] = total.div_(self.length)


@dataclass(frozen=True)
class Loss:
    """A section that is lost beyond a line, or wholly."""

    section: int
    fill: float
    line: tuple[float, float, float] | None = None  # normal's y and x, and the voxels from middle to line

    def apply(self, image: Tensor) -> None:
        """Fill in place what is lost."""
        section = image[self.section]
        if self.line is None:
            section.fill_(self.fill)
            return
        height, width = section.shape
        normal_y, normal_x, distance = self.line
        y = torch.arange(height, device=image.device) - (height - 1) / 2
        x = torch.arange(width, device=image.device) - (width - 1) / 2
        section.masked_fill_(y[:, None] * normal_y + x * normal_x > distance, self.fill)


def draw_defocus(rng: np.random.Generator, params: Blur, n_sections: int) -> GaussianBlur | None:
    """Draw a run of sections out of focus: any first one, any last one from there."""
    if rng.random() >= params.probability:
        return None
    first = int(rng.integers(n_sections))
    return GaussianBlur(first, int(rng.integers(first, n_sections)) + 1, draw_sigma(rng, params))


def draw_blur(rng: np.random.Generator, params: Blur, n_sections: int) -> GaussianBlur | None:
    """Draw a blur of the whole patch."""
    if rng.random() >= params.probability:
        return None
    return GaussianBlur(0, n_sections, draw_sigma(rng, params))


def draw_sigma(rng: np.random.Generator, params: Blur) -> float:
    """Draw a width from a third of the greatest on: a narrower blur would hardly be one."""
    return float(rng.uniform(params.sigma / 3, params.sigma))


def draw_smear(rng: np.random.Generator, params: MotionBlur, n_sections: int) -> Smear | None:
    """Draw the sections that motion blurs, all along one direction."""
    if rng.random() >= params.probability:
        return None
    sections = _draw_sections(rng, params.most, n_sections)
    return Smear(sections, int(rng.integers(2, params.length + 1)), float(rng.uniform(0, 180)))


def draw_losses(
    rng: np.random.Generator, params: MissingSection, shape_zyx: tuple[int, int, int]
) -> tuple[Loss, ...]:
    """Draw the sections that are missing, each wholly or beyond a line, at the mean or dark."""
    if rng.random() >= params.probability:
        return ()
    return tuple(
        Loss(section, float(rng.choice([0.0, DARK])), _draw_line(rng, params.partly, shape_zyx[1:]))
        for section in _draw_sections(rng, params.most, shape_zyx[0])
    )


def _draw_line(
    rng: np.random.Generator, partly: float, shape_yx: tuple[int, int]
) -> tuple[float, float, float] | None:
    if rng.random() >= partly:
        return None
    angle = float(rng.uniform(0, 2 * math.pi))
    y, x = math.sin(angle), math.cos(angle)
    half = (shape_yx[0] * abs(y) + shape_yx[1] * abs(x)) / 2  # from the middle to the farthest corner
    return y, x, float(rng.uniform(-half, half)) / 2


def _draw_sections(rng: np.random.Generator, most: int, n_sections: int) -> tuple[int, ...]:
    n = int(rng.integers(1, min(most, n_sections) + 1))
    return tuple(rng.choice(n_sections, size=n, replace=False).tolist())


def _weighted(padded: Tensor, weights: list[float], *, axis: int, size: int) -> Tensor:
    total = padded.narrow(axis, 0, size) * weights[0]
    for offset, weight in enumerate(weights[1:], start=1):
        total.add_(padded.narrow(axis, offset, size), alpha=weight)
    return total
