"""All that happens to a patch: drawn first, without a voxel, then applied on the voxels' device.

What is drawn depends on nothing but the generator, so a patch looks the same whichever rank, worker or
place in the batch it lands in, and whoever reads voxels knows beforehand how large a box to read.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synmlops.learning.augment import resample
from synmlops.learning.augment.geometry import Geometry, draw_geometry
from synmlops.learning.augment.intensity import (
    Coarsening,
    Curve,
    GaussianNoise,
    draw_coarsening,
    draw_curve,
    draw_cut_noise,
    draw_noise,
)
from synmlops.learning.augment.sections import (
    GaussianBlur,
    Loss,
    Smear,
    draw_blur,
    draw_defocus,
    draw_losses,
    draw_smear,
)
from synmlops.learning_params import AugmentParams


@dataclass(frozen=True)
class Plan:
    """What was drawn for one patch; None or empty where chance passed it by."""

    geometry: Geometry
    curve: Curve
    blur: GaussianBlur | None = None
    defocus: GaussianBlur | None = None
    motion_blur: Smear | None = None
    cut_blur: Coarsening | None = None
    noise: GaussianNoise | None = None
    cut_noise: GaussianNoise | None = None
    missing: tuple[Loss, ...] = ()

    @property
    def source_zyx(self) -> tuple[int, int, int]:
        """Size in voxels of the box to read, whose middle is the patch's.

        It starts `(source - patch) // 2` voxels before the patch, rounded down, along each axis. Quarter
        turns can make it shorter than the patch along an axis, and zooming in makes it smaller.
        """
        return self.geometry.source_zyx

    def names(self) -> tuple[str, ...]:
        """Keys of `augment` in params whose chance fell on this patch.

        Examples
        --------
        >>> params = AugmentParams(flip=0, quarter_turn=1, invert=1)
        >>> rng = np.random.default_rng(4)
        >>> draw_plan(rng, params=params, patch_zyx=(8, 32, 32), isotropic=False).names()
        ('quarter_turn', 'invert')
        """
        geometry = self.geometry
        drawn = {
            "flip": geometry.orientation.flips,
            "quarter_turn": geometry.orientation.axes != (0, 1, 2),
            "rotate": geometry.degrees,
            "scale": geometry.zoom != 1,
            "elastic": geometry.elastic is not None,
            "misalign": geometry.slip is not None,
            "blur": self.blur is not None,
            "defocus": self.defocus is not None,
            "motion_blur": self.motion_blur is not None,
            "intensity": self.curve.bends,
            "invert": self.curve.invert,
            "noise": self.noise is not None,
            "cut_noise": self.cut_noise is not None,
            "cut_blur": self.cut_blur is not None,
            "missing_section": self.missing,
        }
        return tuple(name for name, value in drawn.items() if value)


def draw_plan(
    rng: np.random.Generator,
    *,
    params: AugmentParams,
    patch_zyx: tuple[int, int, int],
    isotropic: bool,
) -> Plan:
    """Draw every chance of a patch; no voxel is needed.

    Parameters
    ----------
    rng : numpy.random.Generator
        The patch's own.
    params : AugmentParams
        All but `copy_paste`, which takes voxels of elsewhere.
    patch_zyx : tuple of int
        Voxels.
    isotropic : bool
        Whether flips and quarter turns may change z with y and x.
    """
    n = patch_zyx[0]
    return Plan(
        geometry=draw_geometry(rng, params=params, patch_zyx=patch_zyx, isotropic=isotropic),
        curve=draw_curve(rng, intensity=params.intensity, invert=params.invert, n_sections=n),
        blur=draw_blur(rng, params.blur, n),
        defocus=draw_defocus(rng, params.defocus, n),
        motion_blur=draw_smear(rng, params.motion_blur, n),
        cut_blur=draw_coarsening(rng, params.cut_blur, patch_zyx),
        noise=draw_noise(rng, params.noise),
        cut_noise=draw_cut_noise(rng, params.cut_noise, patch_zyx),
        missing=draw_losses(rng, params.missing_section, patch_zyx),
    )


def apply_plan(plan: Plan, image: Tensor, sides: Tensor, *, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Make a patch of its source: turn, normalise, resample, blur, add noise, lose sections.

    Parameters
    ----------
    plan : Plan
    image : tensor of `plan.source_zyx`
        Raw grey values: uint8, uint16 or float32.
    sides : tensor of `plan.source_zyx`
        Labels of any integer type, on the same device. What lies beyond the volume is `UNTRUSTED` already:
        the source holds every voxel that is read, so geometry brings in nothing from elsewhere.
    mean, std : float
        Of the image's grey values; the result is about mean 0 and deviation 1.

    Returns
    -------
    image : float32 tensor of the patch's shape
        New.
    sides : tensor of the patch's shape and the labels' type
        May be a view of what came in.

    Raises
    ------
    ValueError
        If `image` or `sides` is not of the shape `plan.source_zyx`.
    """
    if not tuple(image.shape) == tuple(sides.shape) == plan.source_zyx:
        raise ValueError(
            f"image {tuple(image.shape)} and sides {tuple(sides.shape)} must both be {plan.source_zyx}, "
            "the plan's source_zyx"
        )
    read = resample.read if resample.suits(image, sides) else _read
    value, sides = read(plan.geometry, plan.curve, image, sides, mean=mean, std=std)
    for change in (
        plan.blur,
        plan.defocus,
        plan.motion_blur,
        plan.cut_blur,
        plan.noise,
        plan.cut_noise,
        *plan.missing,
    ):
        if change is not None:
            change.apply(value)
    return value, sides


def _read(
    geometry: Geometry, curve: Curve, image: Tensor, sides: Tensor, *, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """Do in torch, on any device, what `resample.read` does."""
    image, sides = (geometry.orientation.apply(voxels) for voxels in (image, sides))
    if not geometry.is_sampled:
        image, sides = geometry.move(image), geometry.move(sides)
    looked_up = curve.looks_up(image)  # before values are sampled, while there are 256
    value = curve.look_up(image, mean=mean, std=std) if looked_up else _floats(image)
    if geometry.is_sampled:
        value, sides = geometry.sample(value, sides)
    if not looked_up:
        curve.apply(value, mean=mean, std=std)
    return value, sides


def _floats(image: Tensor) -> Tensor:
    return image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
