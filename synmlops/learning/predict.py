"""A network over a whole volume: overlapping windows, blended, out as uint8 probabilities."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synmlops.learning.checkpoint import Model
from synmlops.params import CHANNELS, SCALE, InferParams, Precision


class Image(Protocol):
    """Anything that gives a region of a z, y, x volume when indexed: an array, a memory map, a `Volume`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along z, y, x."""

    def __getitem__(self, index: Any, /) -> Any:
        """Read a region."""


def predict(
    model: Model,
    image: Image,
    *,
    params: InferParams,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Predict a volume and give it out by slabs of sections.

    Windows of `params.window_zyx` step by their size less the overlap, the last one tucked in at the border.
    The blending weights fall towards a window's border and add up to one in every voxel. Memory holds one
    window's height of sections, whatever the volume's depth.

    Parameters
    ----------
    model : Model
        Network, intensity statistics and device.
    image : array-like, (z, y, x) uint8 or uint16
        Read by slabs of sections. A side shorter than a window is padded by repeating its edge.
    params : InferParams
    progress : callable
        Called with (windows done, windows in all).

    Yields
    ------
    z, slab : int, (3, n, y, x) uint8 array
        First section and probabilities x 255, rounded; the slabs follow each other without gap or overlap.
    """
    pool = model.meta.network.total_pool_zyx()
    depth, *plane = image.shape
    window = tuple(
        min(w, math.ceil(n / p) * p) for w, n, p in zip(params.window_zyx, image.shape, pool, strict=True)
    )
    padded = tuple(max(w, n) for w, n in zip(window, image.shape, strict=True))
    starts = [_starts(n, w, params.overlap) for n, w in zip(padded, window, strict=True)]
    device = next(model.network.parameters()).device
    blend = [_blend(s, w, n, device) for s, w, n in zip(starts, window, padded, strict=True)]
    corners = [(iy, ix) for iy in range(len(starts[1])) for ix in range(len(starts[2]))]
    total = len(starts[0]) * len(corners)
    ahead = torch.zeros((len(CHANNELS), window[0], padded[1], padded[2]), device=device)
    for iz, z0 in enumerate(starts[0]):
        slab = _read_padded(image, z0, window[0], padded[1:], device)
        slab = (slab - model.meta.mean) / model.meta.std
        for first in range(0, len(corners), params.batch_size):
            batch = corners[first : first + params.batch_size]
            views = [_window_slices(starts, window, iy, ix) for iy, ix in batch]
            logits = _forward(model, torch.stack([slab[:, y, x] for y, x in views]), params.precision)
            for (iy, ix), (y, x), probability in zip(batch, views, torch.sigmoid(logits), strict=True):
                weight = blend[0][iz][:, None, None] * blend[1][iy][:, None] * blend[2][ix]
                ahead[:, :, y, x] += probability * weight
            progress(iz * len(corners) + first + len(batch), total)
        following = starts[0][iz + 1] if iz + 1 < len(starts[0]) else z0 + window[0]
        done = min(following, depth) - z0
        yield z0, _to_uint8(ahead[:, :done, : plane[0], : plane[1]])
        ahead = torch.cat([ahead[:, following - z0 :], torch.zeros_like(ahead[:, : following - z0])], dim=1)


def predict_array(model: Model, image: NDArray[Any], *, params: InferParams) -> NDArray[np.uint8]:
    """Predict a volume that fits in memory: (z, y, x) in, (3, z, y, x) uint8 out."""
    slabs = predict(model, image, params=params)
    return np.concatenate([slab for _, slab in slabs], axis=1)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Give the autocast context for a precision; "auto" is bf16 where the device computes in it natively."""
    wanted = has_native_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is faster than float32 on this device, not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@torch.inference_mode()
def _forward(model: Model, windows: Tensor, precision: Precision) -> Tensor:
    with autocast(windows.device, precision):
        logits: Tensor = model.network(windows[:, None])
    return logits.float()


def _starts(n: int, window: int, overlap: float) -> list[int]:
    """First voxel of each window along an axis; the last window ends at the border.

    Examples
    --------
    >>> _starts(20, 8, 0.25), _starts(8, 8, 0.25)
    ([0, 6, 12], [0])
    """
    stride = max(1, round(window * (1 - overlap)))
    inner = list(range(0, n - window, stride))
    return [*inner, n - window]


def _blend(starts: list[int], window: int, n: int, device: torch.device) -> list[Tensor]:
    """Weights of each window along an axis; over all windows they add up to 1 in every voxel."""
    rise = torch.arange(1, window + 1, dtype=torch.float32, device=device)
    tent = torch.minimum(rise, rise.flip(0)) ** 2  # a window's border sees least context, so it counts least
    total = torch.zeros(n, device=device)
    for start in starts:
        total[start : start + window] += tent
    return [tent / total[start : start + window] for start in starts]


def _window_slices(starts: list[list[int]], window: tuple[int, ...], iy: int, ix: int) -> tuple[slice, slice]:
    y, x = starts[1][iy], starts[2][ix]
    return slice(y, y + window[1]), slice(x, x + window[2])


def _read_padded(image: Image, z0: int, n: int, plane: tuple[int, ...], device: torch.device) -> Tensor:
    """Read sections z0 to z0 + n as float, repeating the border where the volume ends."""
    block = np.asarray(image[z0 : min(z0 + n, image.shape[0])])
    missing = [size - have for size, have in zip((n, *plane), block.shape, strict=True)]
    if any(missing):
        block = np.pad(block, [(0, more) for more in missing], mode="edge")
    return torch.from_numpy(np.array(block)).to(device).float()


def _to_uint8(probability: Tensor) -> NDArray[np.uint8]:
    return (probability * SCALE).round().clamp(0, SCALE).to(torch.uint8).cpu().numpy()
