"""A part of a volume that is being predicted: what its windows see, and what they have said so far."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synmlops.learning.windows import AxisWindows
from synmlops.params import SCALE
from synmlops.volumes.mapped import mapped_zeros
from synmlops.volumes.prepared import Box


class Sheet:
    """The box that is being predicted, of which each window says what its cell holds.

    Parameters
    ----------
    axes : tuple of AxisWindows
    box, read : Box
        What is predicted, and what was read for it.
    image : (z, y, x) array
        The voxels of `read`.
    mask : array of bool of the box's shape, or None
        Where probabilities are wanted.
    n_channels : int
    device : torch.device
    """

    def __init__(
        self,
        axes: tuple[AxisWindows, AxisWindows, AxisWindows],
        box: Box,
        read: Box,
        image: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        *,
        n_channels: int,
        device: torch.device,
    ) -> None:
        self._axes, self._box, self._read, self._device = axes, box, read, device
        self.mask = mask
        self._image = image
        self._on_device = _to_device(_padded(image, axes), device)
        self._fades = any(axis.fade for axis in axes)
        dtype = torch.float32 if self._fades else torch.uint8
        self._sum = _zeros((n_channels, *box.shape_zyx), dtype, device)

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """Give the windows with a say in the box, those of no tissue left out."""
        z, y, x = (
            axis.meeting(low, high)
            for axis, low, high in zip(self._axes, self._box.start_zyx, self._box.stop_zyx, strict=True)
        )
        for window in product(z, y, x):
            wanted = self.mask is None or self.mask[self._part(window)[0][1:]].any()
            if not wanted:
                continue
            if _is_blank(self._image[self._support(window)]):
                self._leave_out(window)
            else:
                yield window

    def see(self, window: tuple[int, int, int]) -> Tensor:
        """Cut what a window sees."""
        starts = [
            axis.first_voxel(i) - at
            for axis, i, at in zip(self._axes, window, self._read.start_zyx, strict=True)
        ]
        z, y, x = (slice(at, at + axis.size) for at, axis in zip(starts, self._axes, strict=True))
        return self._on_device[z, y, x]

    def said(self, probabilities: Tensor) -> Tensor:
        """Turn (n, c, z, y, x) probabilities of windows into what `add` takes of each."""
        return probabilities if self._fades else _grey_levels(probabilities)

    def add(self, window: tuple[int, int, int], said: Tensor) -> None:
        """Take in what a window says of the voxels in which it has a say."""
        here, there = self._part(window)
        if not self._fades:
            self._sum[here] = said[there]
            return
        said = said[there]
        for dim, (axis, i, part) in enumerate(zip(self._axes, window, here[1:], strict=True)):
            low = axis.support(i)[0]
            first = part.start + self._box.start_zyx[dim] - low
            say = torch.from_numpy(axis.weights(i)[first : first + part.stop - part.start])
            said = said * say.to(self._device).reshape([-1 if d == dim else 1 for d in range(3)])
        self._sum[here] += said

    def levels(self) -> Tensor:
        """Give the probabilities as grey levels, on the device; the mask is left to the caller."""
        return _grey_levels(self._sum) if self._fades else self._sum

    def _leave_out(self, window: tuple[int, int, int]) -> None:
        """Let a window of no tissue say 0, which is there to begin with."""

    def _support(self, window: tuple[int, int, int]) -> tuple[slice, ...]:
        """Where a window has a say, in what was read."""
        spans = [axis.support(i) for axis, i in zip(self._axes, window, strict=True)]
        return tuple(
            slice(low - at, high - at) for (low, high), at in zip(spans, self._read.start_zyx, strict=True)
        )

    def _part(self, window: tuple[int, int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the say of a window lies in the box, and where in the window; all channels."""
        here, there = [slice(None)], [slice(None)]
        for axis, i, low, high in zip(
            self._axes, window, self._box.start_zyx, self._box.stop_zyx, strict=True
        ):
            start, stop = axis.support(i)
            start, stop, first = max(start, low), min(stop, high), axis.first_voxel(i)
            here.append(slice(start - low, stop - low))
            there.append(slice(start - first, stop - first))
        return tuple(here), tuple(there)


class BlendedSheet(Sheet):
    """The box that is being predicted, of which overlapping windows each say something of all that they see.

    What they say is weighed, summed in the order of the windows, whatever the box, and divided by the sum of
    the weights; the grey level is cut off, not rounded. Source: PyTorch Connectomics v1.

    Parameters
    ----------
    weights : (z, y, x) tensor
        Of the voxels of a window.
    """

    def __init__(self, *args: Any, weights: Tensor, **options: Any) -> None:
        super().__init__(*args, **options)
        self._weights = weights
        self._sum = _zeros(self._sum.shape, torch.float32, self._device)
        self._weight = _zeros(self._sum.shape[1:], torch.float32, self._device)

    def said(self, probabilities: Tensor) -> Tensor:
        """Leave probabilities as they are."""
        return probabilities

    def add(self, window: tuple[int, int, int], said: Tensor) -> None:
        """Take in what a window says."""
        here, there = self._part(window)
        self._sum[here] += said[there] * self._weights[there[1:]]
        self._weight[here[1:]] += self._weights[there[1:]]

    def _leave_out(self, window: tuple[int, int, int]) -> None:
        """Let a window of no tissue say 0, with its weight."""
        here, there = self._part(window)
        self._weight[here[1:]] += self._weights[there[1:]]

    def levels(self) -> Tensor:
        """Give the weighted means."""
        mean = self._sum.div_(self._weight.clamp_(min=1e-6))  # 0 where no window was wanted
        return mean.mul_(SCALE).clamp_(0, SCALE).to(torch.uint8)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give what a block keeps until it is written; on a CPU beside the heap."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.from_numpy(mapped_zeros(shape, np.uint8 if dtype == torch.uint8 else np.float32))


def _is_blank(voxels: NDArray[Any]) -> bool:
    """Whether there is one grey level alone; looks at few voxels where there is tissue."""
    first = voxels.flat[0]
    return bool((voxels[:1] == first).all() and (voxels == first).all())


def _padded(image: NDArray[Any], axes: Sequence[AxisWindows]) -> NDArray[Any]:
    """Repeat the far edges of an image that is shorter than a window."""
    missing = [max(0, axis.size - n) for axis, n in zip(axes, image.shape, strict=True)]
    return np.pad(image, [(0, n) for n in missing], mode="edge") if any(missing) else image


def _to_device(image: NDArray[Any], device: torch.device) -> Tensor:
    """Take raw voxels to the device; on a CPU they are not copied."""
    voxels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    return voxels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else voxels


def _grey_levels(probability: Tensor) -> Tensor:
    return (probability * SCALE).round_().clamp_(0, SCALE).to(torch.uint8)
