"""The other side of `data_path.py`: the same augmentations as MONAI dictionary transforms in a DataLoader.

Three styles, all flipping on uint8 before anything is converted, all with metadata tracking off:

- "volume": patches are 1 x 8 x 256 x 256, the shape that MONAI documents for volumes; `RandAffined` turns and
  zooms in plane by resampling in three dimensions. Only `Rand2DElasticd` takes sections as channels:
  `Rand3DElasticd`, which PyTorch Connectomics' newest release uses, also bends along z and takes far longer;
- "stock": sections are channels, so that `RandAffined` and `Rand2DElasticd` deform in plane, all sections
  alike, as synmlops does;
- "fused": the fastest that we could write with MONAI's parts: rotation, zoom and elastic deformation share
  one grid and one float32 resampling.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from em_transforms import (
    KEYS,
    CutBlurd,
    CutNoised,
    Defocusd,
    Donor,
    LoseSectionsd,
    Misalignd,
    MotionBlurd,
    PasteSynapsesd,
    WarpInPlaned,
    cut_donors,
    sections_of,
)
from em_volume import EmVolume
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    Identityd,
    Lambdad,
    NormalizeIntensityd,
    OneOf,
    Rand2DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    SqueezeDimd,
)
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from synmlops.learning_params import AugmentParams, SamplingParams
from synmlops.volumes.preparing import sides_of

Rejection = Literal["after all", "after crop"]
Style = Literal["volume", "stock", "fused"]
PADDING = {"mode": ("bilinear", "nearest"), "padding_mode": ("border", "zeros")}


class Patches(IterableDataset[dict[str, Tensor]]):
    """Endless accepted patches; each worker draws its own.

    Parameters
    ----------
    made : EmVolume
        Held in memory, as the incumbent holds it.
    sampling, augment : params
    stats : tuple of float
        Mean and standard deviation of the image, in grey levels.
    style : "volume", "stock" or "fused"
        See the top of this file.
    rejection : "after all" or "after crop"
        Whether a poor patch is thrown away when it is ready, as the incumbent does, or as soon as it is cut.
    seed : int
    """

    def __init__(
        self,
        made: EmVolume,
        *,
        sampling: SamplingParams,
        augment: AugmentParams,
        stats: tuple[float, float],
        style: Style,
        rejection: Rejection,
        seed: int,
    ) -> None:
        set_track_meta(False)
        sides = sides_of(made.labels, "pairs") + np.uint8(1)
        self._volume = {"image": torch.from_numpy(made.image)[None], "sides": torch.from_numpy(sides)[None]}
        self._crop = RandSpatialCropd(KEYS, roi_size=sampling.patch_zyx, random_size=False)
        self._change = pipeline(augment, style=style, stats=stats, donors=cut_donors(made, sides))
        self._sampling, self._rejection, self._seed = sampling, rejection, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield `image` (z, y, x) float32, `sides` uint8 in synmlops' codes, and `crops` that it took."""
        worker = get_worker_info()
        seed = self._seed + (worker.id if worker else 0)
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self._crop.set_random_state(seed)
        self._change.set_random_state(seed)
        crops = 0
        while True:
            crops += 1
            sample = self._crop(self._volume)
            # Counted in the crop, whatever augmentation adds or loses: both orders accept alike, as we do.
            rich = int(torch.count_nonzero(sample["sides"] > 1)) >= self._sampling.reject_below
            accepted = rich or rng.random() >= self._sampling.reject_probability
            if accepted or self._rejection == "after all":
                sample = self._change(sample)
            if accepted:
                image, sides = (sections_of(sample[key]) for key in KEYS)
                # 0, which came from nowhere, becomes 255.
                yield {"image": image, "sides": sides.to(torch.uint8) - 1, "crops": torch.tensor(crops)}
                crops = 0


def make_loader(patches: Patches, *, batch_size: int, workers: int) -> DataLoader[dict[str, Tensor]]:
    """Load batches in so many processes, each of one torch thread."""
    return DataLoader(patches, batch_size=batch_size, num_workers=workers, prefetch_factor=2)


def pipeline(
    augment: AugmentParams, *, style: Style, stats: tuple[float, float], donors: list[Donor]
) -> Compose:
    """Chain all augmentations of synmlops at the same chances and strengths."""
    mean, std = stats

    def to_float(voxels: Tensor) -> Tensor:
        return (voxels if style == "volume" else voxels[0]).float()

    return Compose(
        [
            PasteSynapsesd(augment.copy_paste, donors),
            *(RandFlipd(KEYS, prob=augment.flip, spatial_axis=axis) for axis in range(3)),
            RandRotate90d(KEYS, prob=augment.quarter_turn, max_k=1, spatial_axes=(1, 2)),
            Lambdad(KEYS, to_float),
            NormalizeIntensityd("image", subtrahend=mean, divisor=std),
            *_geometry(augment, style),
            Misalignd(augment.misalign),
            _blur(augment, style),
            Defocusd(augment.defocus),
            MotionBlurd(augment.motion_blur),
            CutBlurd(augment.cut_blur),
            *_intensity(augment),
            RandGaussianNoised("image", std=augment.noise.deviation, prob=augment.noise.probability),
            CutNoised(augment.cut_noise),
            LoseSectionsd(augment.missing_section),
        ]
    )


def _geometry(augment: AugmentParams, style: Style) -> list[Any]:
    if style == "fused":
        return [WarpInPlaned(augment.rotate, augment.scale, augment.elastic)]
    turned, zoomed = augment.rotate.probability, augment.scale.probability
    around_z = (np.deg2rad(augment.rotate.degrees), *((0.0, 0.0) if style == "volume" else ()))
    in_plane = ((1 / augment.scale.factor - 1, augment.scale.factor - 1),) * 2
    turn = {"rotate_range": around_z}
    zoom = {"scale_range": (0.0, *in_plane) if style == "volume" else in_plane}
    affine = OneOf(  # each by its own chance, both in one resampling
        [RandAffined(KEYS, prob=1.0, **PADDING, **ranges) for ranges in (turn, zoom, turn | zoom)]
        + [Identityd(KEYS)],
        weights=[
            turned * (1 - zoomed),
            zoomed * (1 - turned),
            turned * zoomed,
            (1 - turned) * (1 - zoomed),
        ],
    )
    bent = {"prob": augment.elastic.probability, **PADDING}
    spacing, displacement = (int(augment.elastic.spacing),) * 2, (augment.elastic.displacement,) * 2
    elastic = Rand2DElasticd(KEYS, spacing=spacing, magnitude_range=displacement, **bent)
    if style == "stock":
        return [affine, elastic]
    return [affine, SqueezeDimd(KEYS), elastic, Lambdad(KEYS, lambda voxels: voxels[None])]


def _blur(augment: AugmentParams, style: Style) -> RandGaussianSmoothd:
    across, within = (1e-3, 1e-3), (0.5, augment.blur.sigma)
    sigmas = (across, within, within) if style == "volume" else (within, within)
    named = dict(zip(("sigma_x", "sigma_y", "sigma_z"), sigmas, strict=False))
    return RandGaussianSmoothd("image", prob=augment.blur.probability, **named)


def _intensity(augment: AugmentParams) -> list[Any]:
    grey = augment.intensity
    chance = {"prob": grey.probability}
    return [
        RandAdjustContrastd("image", gamma=(1 - grey.gamma, 1 + grey.gamma), **chance),
        RandScaleIntensityd("image", factors=grey.contrast, **chance),
        RandShiftIntensityd("image", offsets=grey.brightness, **chance),
        RandScaleIntensityd("image", factors=(-2, -2), prob=augment.invert),  # times 1 - 2
    ]
