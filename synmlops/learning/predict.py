"""A network over a volume of any size: window by window, out as uint8 probabilities."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synmlops.learning.checkpoint import Model
from synmlops.learning.memory import fits
from synmlops.learning.networks.registry import NETWORKS
from synmlops.learning.replay import Replay
from synmlops.learning.sheets import BlendedSheet, Sheet
from synmlops.learning.views import views_of
from synmlops.learning.windows import blend_weights, strides_over, windows_over
from synmlops.params import CHANNELS, InferParams, SynmlopsError
from synmlops.volumes.prepared import Box

GPU_BATCH_VOXELS = 2**22
"""Voxels of a batch of windows that fill a GPU."""
SLAB_VOXELS = 2**24
"""Voxels that `predict` computes at a time, if a layer of windows has no more."""


class Image(Protocol):
    """Anything that gives a region of a z, y, x volume when indexed: an array, a memory map, a `Volume`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along z, y, x."""

    def __getitem__(self, index: Any, /) -> Any:
        """Read a region."""


@dataclass(frozen=True)
class Pending:
    """What a device may still be computing.

    Attributes
    ----------
    levels : (c, z, y, x) tensor of uint8
    mask : (z, y, x) array of bool, or None
    ready : torch.cuda.Event or None
        When it is computed; None if it is.
    """

    levels: Tensor
    mask: NDArray[np.bool_] | None
    ready: torch.cuda.Event | None

    def result(self) -> NDArray[np.uint8]:
        """Wait for it; another thread may start further work meanwhile, which it does not wait for."""
        levels = self.levels
        if self.ready is not None:
            levels = torch.empty_like(levels, device="cpu", pin_memory=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            beside = torch.cuda.Stream(self.levels.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(beside):
                self.ready.wait()
                levels.copy_(self.levels, non_blocking=True)
                done.record()
            done.synchronize()
        out: NDArray[np.uint8] = levels.numpy()
        if self.mask is not None:
            out *= self.mask
        return out


class Predictor:
    """Networks ready to predict any part of a region of a volume.

    Each part comes out as it would if the whole region were predicted at once, but for what rounding another
    order of windows in a batch may change: a grey level. Where windows are blended, a part computes all those
    that reach into it.

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
        If the models do not know the same channels, or the windows are no size for one of them.

    Attributes
    ----------
    channels : tuple of str
        What is predicted, in this order.
    cell_zyx : tuple of int
        Parts of whole cells, counted from the region's start, cost no window twice; of blended windows, how
        far they lie apart.
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
        self._networks = [
            Replay(model.network, params.precision, record=model.meta.network.name in NETWORKS)
            for model in models
        ]
        self._shape = _three(shape_zyx)
        self._device = next(models[0].network.parameters()).device
        self._kept = [CHANNELS.index(name) for name in self.channels]
        pools = [model.meta.network.total_pool_zyx() for model in models]
        lay = windows_over if params.blend == "none" else strides_over
        self._axes = lay(
            self.region,
            shape_zyx=self._shape,
            pool_zyx=tuple(lcm(*pool) for pool in zip(*pools, strict=True)),
            params=params,
        )
        _check_windows(models, [axis.size for axis in self._axes])
        self._weights: Tensor | None = None
        if params.blend != "none":
            size_zyx = _three([axis.size for axis in self._axes])
            self._weights = torch.from_numpy(blend_weights(size_zyx, params.blend)).to(self._device)
        self.cell_zyx = _three([axis.cell for axis in self._axes])
        self._views = views_of(params.views)
        self._batch = self._first_batch()

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
            Of `channels`, x 255, rounded, or cut off where windows are blended. A cell, or a blended window,
            of one grey level alone is no tissue: 0.
        """
        return self.begin(image, box, mask=mask, progress=progress).result()

    def begin(
        self,
        image: NDArray[Any],
        box: Box,
        *,
        mask: NDArray[np.bool_] | None = None,
        progress: Callable[[int], None] = lambda windows: None,
    ) -> Pending:
        """Predict a box as a call does, without waiting for a GPU to end.

        Where the batch is for this to choose, it becomes smaller until it fits in memory.
        """
        read = self.to_read(box)
        if image.shape != read.shape_zyx:
            raise ValueError(f"image {image.shape} must be of {read.shape_zyx}, the shape of {read}")
        begun: list[Pending] = []
        told = 0

        def tell(windows: int) -> None:
            nonlocal told
            told += windows
            progress(windows)

        def work() -> None:
            begun.append(self._begun(box, self._sheet(box, read, image, mask), tell))

        while self._params.batch_size == "auto" and self._batch > 1:
            if fits(work):
                return begun[0]
            for network in self._networks:
                network.forget()
            self._batch //= 2
            progress(-told)
            told = 0
        work()
        return begun[0]

    def _begun(self, box: Box, sheet: Sheet, progress: Callable[[int], None]) -> Pending:
        windows = list(sheet.windows())
        if left_out := self.count(box) - len(windows):
            progress(left_out)
        for first in range(0, len(windows), self._batch):
            batch = windows[first : first + self._batch]
            seen = [sheet.see(window) for window in batch]
            if self._device.type == "cuda":  # one shape for all batches: one recording
                seen += seen[-1:] * (self._batch - len(batch))
            said = sheet.said(self._probabilities(torch.stack(seen)))
            for window, one in zip(batch, said[: len(batch)], strict=True):
                sheet.add(window, one)
            progress(len(batch))
        ready = None
        levels = sheet.levels()
        if self._device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        return Pending(levels, sheet.mask, ready)

    def _first_batch(self) -> int:
        """How many windows a device is given at a time."""
        if self._params.batch_size != "auto":
            return self._params.batch_size
        if self._device.type != "cuda":
            return 1
        voxels, windows = prod(axis.size for axis in self._axes), prod(len(axis) for axis in self._axes)
        return min(windows, max(1, GPU_BATCH_VOXELS // voxels))

    def _sheet(self, box: Box, read: Box, image: NDArray[Any], mask: NDArray[np.bool_] | None) -> Sheet:
        n, device = len(self._kept), self._device
        if self._weights is None:
            return Sheet(self._axes, box, read, image, mask, n_channels=n, device=device)
        return BlendedSheet(
            self._axes, box, read, image, mask, n_channels=n, device=device, weights=self._weights
        )

    @torch.inference_mode()
    def _probabilities(self, windows: Tensor) -> Tensor:
        """Merge what models and views say of (n, z, y, x) grey levels: (n, c, z, y, x)."""
        merge, merged = _MERGE[self._params.merge], None
        for model, network in zip(self._models, self._networks, strict=True):
            mean, std = self._grey or (model.meta.mean, model.meta.std)
            normal = (windows.float() - mean) / std
            for view in self._views:
                logits = network(view.turn(normal)[:, None])
                seen = view.turn_back(logits[:, self._kept].float().sigmoid_())
                merged = seen if merged is None else merge(merged, seen)
        assert merged is not None
        if self._params.merge == "mean" and (n := len(self._models) * len(self._views)) > 1:
            merged = merged / n
        return merged


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
    layers = max(1, SLAB_VOXELS // (layer * height * width))
    if params.blend != "none":  # windows that reach into two slabs are computed twice
        layers = max(layers, 2 * params.window_zyx[0] // layer)
    step = layers * layer
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


def _check_windows(models: Sequence[Model], size_zyx: Sequence[int]) -> None:
    """See that each network takes the windows: `infer.window_zyx` was checked with the params' own alone."""
    for network in (model.meta.network for model in models):
        for axis, size, pool in zip("zyx", size_zyx, network.total_pool_zyx(), strict=True):
            if not network.takes_size(size, pool):
                raise SynmlopsError(
                    f"infer.window_zyx: {axis}={size} is no multiple of {pool}, the total pooling of "
                    f"the model's {network.name} along {axis}; next: {size + pool - size % pool}"
                )


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = values
    return z, y, x
