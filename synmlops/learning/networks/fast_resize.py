"""Trilinear upsampling, summed with what it is added to in the same pass where there are kernels for it."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn import functional

from synmlops.learning.networks import gpu
from synmlops.learning.networks.fast_conv import dense
from synmlops.learning.networks.kernels import LANE, kernels


def upsample_add(base: Tensor, *lows: Tensor, aligned: bool = True) -> Tensor:
    """Give the sum of `base` and each of `lows`, upsampled to its size.

    Parameters
    ----------
    base : (n, c, z, y, x) tensor
    *lows : (n, c, ., ., .) tensors
        Interpolated linearly.
    aligned : bool
        Whether the corner voxels of both coincide, or their outer borders do.

    Examples
    --------
    >>> low = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 1, 2)
    >>> upsample_add(torch.ones(1, 1, 1, 1, 5), low).flatten()
    tensor([1., 2., 3., 4., 5.])
    """
    if len(lows) in (1, 2) and gpu.takes(base):
        on_gpu: Tensor = _OnGpu.apply(aligned, base, *lows)  # type: ignore[no-untyped-call]
        return on_gpu
    on_cpu = base.device.type == "cpu" and base.dtype != torch.float64
    fits = on_cpu and aligned and base.shape[1] % LANE == 0
    if fits and not torch.compiler.is_compiling() and kernels().library is not None:
        flat = [_along_z(low, base.shape[2]) for low in lows]
        result: Tensor = _UpsampleAdd.apply(base, *flat)  # type: ignore[no-untyped-call]
        return result
    for low in lows:
        base = base + functional.interpolate(low, base.shape[2:], mode="trilinear", align_corners=aligned)
    return base


class _OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, aligned: bool, base: Tensor, *lows: Tensor) -> Tensor:
        ctx.aligned, ctx.sizes = aligned, [low.shape[2:] for low in lows]
        ctx.dtypes = [tensor.dtype for tensor in (base, *lows)]
        return gpu.upsample_add(base, lows, aligned=aligned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_base, *of_lows = ctx.dtypes
        return (
            None,
            grad.to(of_base),
            *(
                _gathered(grad, size, aligned=ctx.aligned).to(dtype)
                for size, dtype in zip(ctx.sizes, of_lows, strict=True)
            ),
        )


def _gathered(grad: Tensor, size: torch.Size, *, aligned: bool) -> Tensor:
    """Give the gradient of what was interpolated: axis by axis a product with the weights, x first."""
    n, channels, depth, height, length = grad.shape
    z, y, x = size
    along_z, along_y, along_x = (
        _weights(low, high, aligned, grad.device, grad.dtype)
        for low, high in zip(size, (depth, height, length), strict=True)
    )
    flat = gpu.dense(grad).permute(0, 2, 3, 4, 1).reshape(n * depth * height, length, channels)
    flat = (along_x.T @ flat).reshape(n * depth, height, x * channels)
    flat = (along_y.T @ flat).reshape(n, depth, y * x * channels)
    return (along_z.T @ flat).reshape(n, z, y, x, channels).permute(0, 4, 1, 2, 3)


@functools.lru_cache(64)  # called in backward alone: no tensor of inference mode is kept
def _weights(low: int, high: int, aligned: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _shares(low, high, aligned=aligned).to(device, dtype)


def _shares(low: int, high: int, *, aligned: bool) -> Tensor:
    """Give the share of each of `low` voxels in each of the `high` that are interpolated: (high, low)."""
    unit = torch.eye(low)[None]
    return functional.interpolate(unit, high, mode="linear", align_corners=aligned)[0].T


def _along_z(low: Tensor, depth: int) -> Tensor:
    """Interpolate along z alone, where tensors are small: a product with a matrix."""
    low = dense(low)
    n, channels, z, y, x = low.shape
    if z == depth:
        return low
    flat = low.permute(0, 2, 3, 4, 1).reshape(n, z, -1)
    mixed = _shares(z, depth, aligned=True) @ flat
    return mixed.reshape(n, depth, y, x, channels).permute(0, 4, 1, 2, 3)


class _UpsampleAdd(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, base: Tensor, *lows: Tensor) -> Tensor:
        base = dense(base)
        n, channels, depth, height, width = base.shape
        result = torch.empty_like(base)
        for low in map(dense, lows):
            form = (n * depth, *low.shape[3:], height, width, channels)
            kernels().call("upsample_add", base, low, result, *form)
            base = result
        ctx.shapes = [low.shape for low in lows]
        return base

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        grad = dense(grad)
        n, channels, depth, height, width = grad.shape
        of_lows = []
        for shape in ctx.shapes:
            of_low = torch.empty(shape, memory_format=torch.channels_last_3d)
            form = (n * depth, *shape[3:], height, width, channels)
            kernels().call("upsample_gradient", grad, of_low, *form)
            of_lows.append(of_low)
        return grad, *of_lows
