"""A network over a volume of any size: window by window, out as uint8 probabilities."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import product
from math import lcm, prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synmlops.learning.checkpoint import Model
from synmlops.learning.views import views_of
from synmlops.learning.windows import AxisWindows, windows_over
from synmlops.params import CHANNELS, SCALE, InferParams, Precision, SynmlopsError
from synmlops.volumes.prepared import Box

SLAB_VOXELS = 2**24
"""Voxels that `predict` computes at a time, if a layer of windows has no more."""


class Image(Protocol):
    """Anything that gives a region of a z, y, x volume when indexed: an array, a memory map, a `Volume`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along z, y, x."""

    def __getitem__(self, index: Any, /) -> Any:
        """Read a region."""


class Predictor:
    """Networks ready to predict any part of a region of a volume.

    Each part comes out as it would if the whole region were predicted at once, but for what rounding another
    order of windows in a batch may change: a grey level.

    Parameters
    ----------
    models : sequence of Model
        Of one voxel size, on one device; their probabilities are merged.
    shape_zyx : tuple of int
        Of the volume.
    region : Box, optional
        What is to be predicted; by default all of the volume.
    params : InferParams
    grey : tuple of float, optional
        Mean and deviation of the volume's grey levels, instead of those that each model was trained on.

    Raises
    ------
    SynmlopsError
        If the models do not know the same channels.

    Attributes
    ----------
    channels : tuple of str
        What is predicted, in this order.
    cell_zyx : tuple of int
        Parts of whole cells, counted from the region's start, cost no window twice.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        shape_zyx: tuple[int, ...],
        region: Box | None = None,
        params: InferParams,
        grey: tuple[float, float] | None = None,
    ) -> None:
        self.channels = _common_channels(models)
        self.region = Box((0, 0, 0), _three(shape_zyx)) if region is None else region
        self._models, self._params, self._grey = models, params, grey
        self._shape = _three(shape_zyx)
        self._device = next(models[0].network.parameters()).device
        self._kept = [CHANNELS.index(name) for name in self.channels]
        pools = [model.meta.network.total_pool_zyx() for model in models]
        self._axes = windows_over(
            self.region,
            shape_zyx=self._shape,
            pool_zyx=tuple(lcm(*pool) for pool in zip(*pools, strict=True)),
            params=params,
        )
        self.cell_zyx = _three([axis.cell for axis in self._axes])
        self._views = views_of(params.views)

    def to_read(self, box: Box) -> Box:
        """Give the part of the volume that the windows of a box see."""
        starts, stops = [], []
        for axis, low, high in zip(self._axes, box.start_zyx, box.stop_zyx, strict=True):
            windows = axis.meeting(low, high)
            starts.append(axis.first_voxel(windows[0]))
            stops.append(min(axis.extent, axis.first_voxel(windows[-1]) + axis.size))
        return Box(_three(starts), _three(stops))

    def count(self, box: Box) -> int:
        """Count the windows of a box."""
        spans = zip(self._axes, box.start_zyx, box.stop_zyx, strict=True)
        return prod(len(axis.meeting(low, high)) for axis, low, high in spans)

    def __call__(
        self,
        image: NDArray[Any],
        box: Box,
        *,
        mask: NDArray[np.bool_] | None = None,
        progress: Callable[[int], None] = lambda windows: None,
    ) -> NDArray[np.uint8]:
        """Predict a box of the region.

        Parameters
        ----------
        image : (z, y, x) array of uint8 or uint16
            The voxels of `to_read(box)`.
        box : Box
        mask : array of bool of the box's shape, optional
            Where probabilities are wanted; elsewhere they are 0, and windows without any are left out.
        progress : callable
            Called with a number of further windows that are done, in all those of `count`.

        Returns
        -------
        probabilities : (c, z, y, x) array of uint8
            Of `channels`, x 255, rounded. A cell of one grey level alone is no tissue: 0.
        """
        read = self.to_read(box)
        if image.shape != read.shape_zyx:
            raise ValueError(f"image {image.shape} must be of {read.shape_zyx}, the shape of {read}")
        sheet = _Sheet(self._axes, box, read, image, mask, n_channels=len(self._kept), device=self._device)
        windows = list(sheet.windows())
        if left_out := self.count(box) - len(windows):
            progress(left_out)
        for first in range(0, len(windows), self._params.batch_size):
            batch = windows[first : first + self._params.batch_size]
            probabilities = self._probabilities(torch.stack([sheet.see(window) for window in batch]))
            for window, probability in zip(batch, probabilities, strict=True):
                sheet.add(window, probability)
            progress(len(batch))
        return sheet.finish()

    @torch.inference_mode()
    def _probabilities(self, windows: Tensor) -> Tensor:
        """Merge what models and views say of (n, z, y, x) grey levels: (n, c, z, y, x)."""
        merge, merged = _MERGE[self._params.merge], None
        for model in self._models:
            mean, std = self._grey or (model.meta.mean, model.meta.std)
            normal = (windows.float() - mean) / std
            for view in self._views:
                with autocast(windows.device, self._params.precision):
                    logits = model.network(view.turn(normal)[:, None])
                seen = view.turn_back(logits[:, self._kept].float().sigmoid_())
                merged = seen if merged is None else merge(merged, seen)
        assert merged is not None
        if self._params.merge == "mean" and (n := len(self._models) * len(self._views)) > 1:
            merged = merged / n
        return merged


class _Sheet:
    """The box that is being predicted: its windows, what they see, and what they have said so far."""

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
        self._axes, self._box, self._read, self._mask, self._device = axes, box, read, mask, device
        self._image = image
        self._on_device = _to_device(_padded(image, axes), device)
        self._fades = any(axis.fade for axis in axes)
        dtype = torch.float32 if self._fades else torch.uint8
        self._sum = torch.zeros((n_channels, *box.shape_zyx), dtype=dtype, device=device)

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """Give the windows with a say in the box, those of no tissue left out."""
        z, y, x = (
            axis.meeting(low, high)
            for axis, low, high in zip(self._axes, self._box.start_zyx, self._box.stop_zyx, strict=True)
        )
        for window in product(z, y, x):
            wanted = self._mask is None or self._mask[self._part(window)[0][1:]].any()
            if wanted and not _is_blank(self._image[self._support(window)]):
                yield window

    def see(self, window: tuple[int, int, int]) -> Tensor:
        """Cut what a window sees."""
        starts = [
            axis.first_voxel(i) - at
            for axis, i, at in zip(self._axes, window, self._read.start_zyx, strict=True)
        ]
        z, y, x = (slice(at, at + axis.size) for at, axis in zip(starts, self._axes, strict=True))
        return self._on_device[z, y, x]

    def add(self, window: tuple[int, int, int], probability: Tensor) -> None:
        """Take in what a window says of the voxels in which it has a say."""
        here, there = self._part(window)
        if not self._fades:
            self._sum[here] = _grey_levels(probability[there])
            return
        said = probability[there]
        for dim, (axis, i, part) in enumerate(zip(self._axes, window, here[1:], strict=True)):
            low = axis.support(i)[0]
            first = part.start + self._box.start_zyx[dim] - low
            say = torch.from_numpy(axis.weights(i)[first : first + part.stop - part.start])
            said = said * say.to(self._device).reshape([-1 if d == dim else 1 for d in range(3)])
        self._sum[here] += said

    def finish(self) -> NDArray[np.uint8]:
        """Give the probabilities."""
        levels = _grey_levels(self._sum) if self._fades else self._sum
        out: NDArray[np.uint8] = levels.cpu().numpy()
        if self._mask is not None:
            out *= self._mask
        return out

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


def predict(
    models: Model | Sequence[Model],
    image: Image,
    *,
    params: InferParams,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Predict a volume and give it out by slabs of sections.

    Parameters
    ----------
    models : Model or sequence of Model
    image : array-like, (z, y, x) uint8 or uint16
        Read by slabs of sections. A side shorter than a window is padded by repeating its edge.
    params : InferParams
    progress : callable
        Called with (windows done, windows in all).

    Yields
    ------
    z, slab : int, (c, n, y, x) uint8 array
        First section and probabilities x 255, rounded, of the channels that the models know; the slabs follow
        each other without gap or overlap.
    """
    models = [models] if isinstance(models, Model) else models
    predictor = Predictor(models, shape_zyx=image.shape, params=params)
    depth, height, width = _three(image.shape)
    layer = predictor.cell_zyx[0]
    step = max(1, SLAB_VOXELS // (layer * height * width)) * layer
    boxes = [Box((z, 0, 0), (min(z + step, depth), height, width)) for z in range(0, depth, step)]
    done, total = 0, sum(map(predictor.count, boxes))

    def further(windows: int) -> None:
        nonlocal done
        done += windows
        progress(done, total)

    for box in boxes:
        voxels = np.asarray(image[predictor.to_read(box).slices])
        yield box.start_zyx[0], predictor(voxels, box, progress=further)


def predict_array(
    models: Model | Sequence[Model], image: NDArray[Any], *, params: InferParams
) -> NDArray[np.uint8]:
    """Predict a volume that fits in memory: (z, y, x) in, (c, z, y, x) uint8 out."""
    return np.concatenate([slab for _, slab in predict(models, image, params=params)], axis=1)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Give the autocast context for a precision; "auto" is bf16 where the device computes in it natively."""
    wanted = has_native_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is faster than float32 on this device, not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


def _common_channels(models: Sequence[Model]) -> tuple[str, ...]:
    channels = models[0].meta.channels
    for model in models[1:]:
        if model.meta.channels != channels:
            raise SynmlopsError(
                f"the models know different channels, {', '.join(channels)} and "
                f"{', '.join(model.meta.channels)}; merge models that were trained on labels of one kind"
            )
    return channels


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


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = values
    return z, y, x
