"""What EM wants and MONAI lacks, as a careful user would add it: dictionary transforms in torch.

All take sections as the first axis, or as the second behind a channel axis of one. `sides` is one higher than
in synmlops, so that the 0 which padding brings in means `UNTRUSTED`.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from em_volume import MARGIN_ZYX, EmVolume
from monai.transforms import AffineGrid, GaussianSmooth, MapTransform, RandDeformGrid, Randomizable, Resample
from monai.transforms.utils import create_grid
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate

from synmlops.learning_params import (
    Blur,
    CopyPaste,
    CutBlur,
    CutNoise,
    Elastic,
    FreeRotation,
    Misalignment,
    MissingSection,
    MotionBlur,
    Scaling,
)

Data = dict[Hashable, Any]
KEYS = ("image", "sides")
DARK = -3.0  # normalised intensity of a dark section


@dataclass(frozen=True)
class Donor:
    """A synapse cut out with its surroundings, each (z, y, x)."""

    image: Tensor  # float32 grey levels
    sides: Tensor
    weight: Tensor  # 0 to 1, how much of it covers what was there


def sections_of(voxels: Tensor) -> Tensor:
    """Give a view with sections first, without the channel axis if there is one."""
    return voxels[0] if voxels.ndim == 4 else voxels


class WarpInPlaned(MapTransform, Randomizable):
    """Rotate, zoom and deform all sections alike, in one resampling; each by its own chance."""

    def __init__(self, rotate: FreeRotation, scale: Scaling, elastic: Elastic) -> None:
        super().__init__(KEYS)
        self._rotate, self._scale, self._elastic = rotate, scale, elastic
        spacing = (elastic.spacing, elastic.spacing)
        self._deform = RandDeformGrid(spacing, (elastic.displacement, elastic.displacement))
        self._image = Resample("bilinear", padding_mode="border", dtype=torch.float32)
        self._sides = Resample("nearest", padding_mode="zeros", dtype=torch.float32)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Any:
        """Seed the deformation too."""
        super().set_random_state(seed, state)
        self._deform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """Warp if any of the three is drawn."""
        changed = dict(data)
        turned = self.R.random() < self._rotate.probability
        zoomed = self.R.random() < self._scale.probability
        bent = self.R.random() < self._elastic.probability
        if not (turned or zoomed or bent):
            return changed
        size = changed["image"].shape[1:]
        grid = self._deform(size) if bent else create_grid(size, backend="torch")
        if turned or zoomed:
            angle = self.R.uniform(-1, 1) * np.deg2rad(self._rotate.degrees) * turned
            factor = self._scale.factor ** (self.R.uniform(-1, 1) * zoomed)
            grid, _ = AffineGrid(rotate_params=(angle,), scale_params=(factor, factor))(grid=grid)
        if bent:
            step = int(self._elastic.spacing)
            grid = interpolate(grid[None], scale_factor=(step, step), mode="bicubic", align_corners=False)[0]
            top, left = ((grid.shape[axis + 1] - size[axis]) // 2 for axis in range(2))
            grid = grid[:, top : top + size[0], left : left + size[1]]
        changed["image"] = self._image(changed["image"], grid)
        changed["sides"] = self._sides(changed["sides"], grid)
        return changed


class Misalignd(MapTransform, Randomizable):
    """Shift and rotate every section from one onward, or one alone."""

    def __init__(self, params: Misalignment) -> None:
        super().__init__(KEYS)
        self._params = params

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """Misalign by chance."""
        changed = dict(data)
        if self.R.random() >= self._params.probability:
            return changed
        depth, *size = sections_of(changed["image"]).shape
        first = int(self.R.randint(1, depth))
        last = first + 1 if self.R.random() < self._params.single else depth
        angle = np.deg2rad(self.R.uniform(-1, 1) * self._params.degrees)
        dy, dx = self.R.randint(-self._params.shift, self._params.shift + 1, size=2)
        cos, sin = np.cos(angle), np.sin(angle)
        matrix = torch.tensor(
            [[[cos, -sin, 2 * dx / size[1]], [sin, cos, 2 * dy / size[0]]]], dtype=torch.float32
        )
        grid = affine_grid(matrix, [1, 1, *size], align_corners=False)
        for key, mode, fill in (("image", "bilinear", "border"), ("sides", "nearest", "zeros")):
            out_of_place = sections_of(changed[key])[first:last]
            out_of_place[:] = grid_sample(
                out_of_place[None], grid, mode=mode, padding_mode=fill, align_corners=False
            )[0]
        return changed


class _ImageTransform(MapTransform, Randomizable):
    """Changes the image in place by chance."""

    def __init__(self, probability: float) -> None:
        super().__init__("image")
        self._probability = probability

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """Change the image by chance."""
        changed = dict(data)
        if self.R.random() < self._probability:
            self._change(sections_of(changed["image"]))
        return changed

    def _change(self, image: Tensor) -> None:
        raise NotImplementedError

    def _sections(self, n: int, most: int) -> NDArray[np.int_]:
        return self.R.choice(n, min(n, self.R.randint(1, most + 1)), replace=False)

    def _box(self, shape: tuple[int, ...], share: float) -> tuple[slice, ...]:
        sides = [max(1, round(size * self.R.uniform(0, share))) for size in shape]
        starts = [int(self.R.randint(0, size - side + 1)) for size, side in zip(shape, sides, strict=True)]
        return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


class Defocusd(_ImageTransform):
    """Blur a run of sections."""

    def __init__(self, params: Blur) -> None:
        super().__init__(params.probability)
        self._sigma = params.sigma

    def _change(self, image: Tensor) -> None:
        first = int(self.R.randint(len(image)))
        last = int(self.R.randint(first, len(image))) + 1
        image[first:last] = GaussianSmooth(self.R.uniform(0.5, self._sigma))(image[first:last])


class MotionBlurd(_ImageTransform):
    """Average some sections along y or x."""

    def __init__(self, params: MotionBlur) -> None:
        super().__init__(params.probability)
        self._params = params

    def _change(self, image: Tensor) -> None:
        length = int(self.R.randint(2, self._params.length + 1)) | 1
        kernel = (length, 1) if self.R.random() < 0.5 else (1, length)
        padding = (kernel[0] // 2, kernel[1] // 2)
        for section in self._sections(len(image), self._params.most):
            image[section] = avg_pool2d(
                image[None, section], kernel, stride=1, padding=padding, count_include_pad=False
            )[0]


class CutBlurd(_ImageTransform):
    """Lower the resolution of a box."""

    def __init__(self, params: CutBlur) -> None:
        super().__init__(params.probability)
        self._params = params

    def _change(self, image: Tensor) -> None:
        box = self._box(tuple(image.shape), self._params.share)
        factor = int(self.R.randint(2, self._params.factor + 1))
        low = avg_pool2d(image[box], factor, ceil_mode=True)
        image[box] = interpolate(low[None], size=image[box].shape[1:])[0]


class CutNoised(_ImageTransform):
    """Add noise in a box."""

    def __init__(self, params: CutNoise) -> None:
        super().__init__(params.probability)
        self._params = params

    def _change(self, image: Tensor) -> None:
        box = self._box(tuple(image.shape), self._params.share)
        image[box] += self.R.uniform(0, self._params.deviation) * torch.randn(image[box].shape)


class LoseSectionsd(_ImageTransform):
    """Fill sections, or what lies on one side of a line across them, with the mean or dark."""

    def __init__(self, params: MissingSection) -> None:
        super().__init__(params.probability)
        self._params = params

    def _change(self, image: Tensor) -> None:
        for section in self._sections(len(image), self._params.most):
            fill = float(self.R.choice([0.0, DARK]))
            if self.R.random() < self._params.partly:
                angle, at = self.R.uniform(0, 2 * np.pi), self.R.uniform(-0.5, 0.5)
                y, x = (torch.linspace(-1, 1, size) for size in image.shape[1:])
                image[section][y[:, None] * np.cos(angle) + x * np.sin(angle) > at] = fill
            else:
                image[section] = fill


class PasteSynapsesd(MapTransform, Randomizable):
    """Paste synapses of other places where the patch has none."""

    def __init__(self, params: CopyPaste, donors: list[Donor]) -> None:
        super().__init__(KEYS)
        self._params, self._donors = params, donors

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """Paste by chance."""
        changed = dict(data)
        if self.R.random() < self._params.probability:
            changed |= {key: changed[key].clone() for key in KEYS}  # the crop is a view of the volume
            for _ in range(self.R.randint(1, self._params.most + 1)):
                self._paste(*(sections_of(changed[key]) for key in KEYS))
        return changed

    def _paste(self, image: Tensor, sides: Tensor) -> None:
        donor = self._donors[self.R.randint(len(self._donors))]
        axes = [axis for axis in (1, 2) if self.R.random() < 0.5]
        grey, codes, weight = (part.flip(axes) for part in (donor.image, donor.sides, donor.weight))
        for _ in range(10):
            start = [self.R.randint(0, n - m + 1) for n, m in zip(image.shape, grey.shape, strict=True)]
            box = tuple(slice(s, s + m) for s, m in zip(start, grey.shape, strict=True))
            if (sides[box] == 1).all():
                there = image[box].float()
                matched = grey - grey.mean() + there.mean()
                image[box] = (there + weight * (matched - there)).clamp(0, 255).to(torch.uint8)
                sides[box] = torch.where(codes > 1, codes, sides[box])
                return


def cut_donors(made: EmVolume, sides: NDArray[np.uint8], most: int = 64) -> list[Donor]:
    """Cut some synapses out, once, before training."""
    donors = []
    for middle in made.middles[:most]:
        box = tuple(slice(m - s, m + s) for m, s in zip(middle, MARGIN_ZYX, strict=True))
        weight = np.clip(2 * gaussian_filter((sides[box] > 1).astype(np.float32), (0.5, 2, 2)), 0, 1)
        donors.append(
            Donor(
                torch.from_numpy(made.image[box]).float(),
                torch.from_numpy(sides[box].copy()),
                torch.from_numpy(weight),
            )
        )
    return donors
