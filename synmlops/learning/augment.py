"""Augmentation of a batch on its device.

Each patch draws its own parameters from the generator that its sampling left, so a patch looks the same
whichever rank or position in the batch it lands in. Geometry moves image and side codes together; a voxel
that a shift brings in from nowhere becomes `UNTRUSTED`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from synmlops.params import AugmentParams
from synmlops.volumes.prepared import UNTRUSTED

GREATEST_SHIFT = 12  # voxels, of a misaligned section
CONTRAST, BRIGHTNESS, GAMMA = 0.25, 0.25, 0.25  # greatest change; brightness in standard deviations
NOISE = 0.5  # greatest standard deviation, in standard deviations of the image
MISSING = -3.0  # intensity of a lost section, the other choice being the mean


def augment(
    image: Tensor, sides: Tensor, *, rngs: Sequence[np.random.Generator], params: AugmentParams
) -> tuple[Tensor, Tensor]:
    """Change each patch of a batch by chance.

    Parameters
    ----------
    image : (n, z, y, x) float tensor
        Normalised intensity, about mean 0 and deviation 1.
    sides : (n, z, y, x) uint8 tensor
        Codes of `synmlops.volumes.prepared`.
    rngs : n generators
        Where each patch's chances come from.
    params : AugmentParams

    Returns
    -------
    image, sides
        New tensors of the same shapes.
    """
    changed = [
        _augment_patch(one_image, one_sides, rng=rng, params=params)
        for one_image, one_sides, rng in zip(image, sides, rngs, strict=True)
    ]
    return torch.stack([one for one, _ in changed]), torch.stack([one for _, one in changed])


def _augment_patch(
    image: Tensor, sides: Tensor, *, rng: np.random.Generator, params: AugmentParams
) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(3) if rng.random() < params.flip]
    transpose = rng.random() < params.transpose and image.shape[1] == image.shape[2]
    image, sides = torch.flip(image, axes), torch.flip(sides, axes)
    if transpose:
        image, sides = image.transpose(1, 2), sides.transpose(1, 2)
    if rng.random() < params.misalign:
        image, sides = _misalign(image, sides, rng)
    if rng.random() < params.blur:
        image = _defocus(image, rng)
    if rng.random() < params.intensity:
        image = _change_intensity(image, rng)
    if rng.random() < params.noise:
        image = image + float(rng.uniform(0, NOISE)) * _normal(image, rng)
    if rng.random() < params.missing_section:
        image = image.clone()
        image[int(rng.integers(image.shape[0]))] = float(rng.choice([0.0, MISSING]))
    return image, sides


def _misalign(image: Tensor, sides: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Shift every section from one onward; what the shift brings in has no trusted label."""
    if image.shape[0] < 2:
        return image, sides
    onward = int(rng.integers(1, image.shape[0]))
    dy, dx = (int(shift) for shift in rng.integers(-GREATEST_SHIFT, GREATEST_SHIFT + 1, size=2))
    image = torch.cat([image[:onward], torch.roll(image[onward:], (dy, dx), dims=(1, 2))])
    moved = torch.roll(sides[onward:], (dy, dx), dims=(1, 2))
    for axis, shift in ((1, dy), (2, dx)):
        if shift:
            strip = slice(0, shift) if shift > 0 else slice(shift, None)
            moved[(slice(None),) * axis + (strip,)] = UNTRUSTED
    return image, torch.cat([sides[:onward], moved])


def _defocus(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur one run of sections with a Gaussian of up to 1.5 voxels."""
    first = int(rng.integers(image.shape[0]))
    last = int(rng.integers(first, image.shape[0])) + 1
    sigma = float(rng.uniform(0.5, 1.5))
    offsets = torch.arange(-3, 4, device=image.device, dtype=image.dtype)
    line = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    blurred = conv2d(pad(image[first:last, None], (3, 3, 3, 3), mode="replicate"), kernel)[:, 0]
    return torch.cat([image[:first], blurred, image[last:]])


def _change_intensity(image: Tensor, rng: np.random.Generator) -> Tensor:
    contrast = 1 + float(rng.uniform(-CONTRAST, CONTRAST))
    brightness = float(rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    gamma = 1 + float(rng.uniform(-GAMMA, GAMMA))
    low, high = image.aminmax()
    span = (high - low).clamp(min=1e-6)
    curved = ((image - low) / span) ** gamma * span + low
    return curved * contrast + brightness


def _normal(like: Tensor, rng: np.random.Generator) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(int(rng.integers(2**62)))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
