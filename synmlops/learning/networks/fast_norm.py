"""Normalisation, squeeze-excite, residual sum and activation in one pass over memory, and its adjoint in two.

All three norms and squeeze-excite come to x * scale + shift, with a scale and a shift for each sample and
channel that depend on x by the sums of x and of its square alone. So the kernels pass over x, and torch's
autograd differentiates the few numbers between sums and scales.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn import functional

from synmlops.learning.networks import gpu
from synmlops.learning.networks.fast_conv import dense
from synmlops.learning.networks.kernels import LANE, kernels

_KINDS = {"none": 0, "relu": 1, "elu": 2}  # as kernels.cpp numbers them
_NORMS = (nn.GroupNorm, nn.BatchNorm3d, nn.InstanceNorm3d)
_REDUCTION = 4  # Source: PyTorch Connectomics v1
_LEAK = 0.2  # likewise

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Gives scale and shift, (n, c) each, from (n, 2, c) sums of x and of its square."""


class SqueezeExcite(nn.Module):
    """Weighs each channel by what the means of all channels over the patch say, without biases.

    Source: Hu et al. 2018, arXiv:1709.01507; reduction and activation as PyTorch Connectomics v1.
    """

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        narrow = max(1, width // _REDUCTION)
        self.squeeze = nn.Linear(width, narrow, bias=False)
        self.weigh = nn.Linear(narrow, width, bias=False)
        self.activation = activation

    def forward(self, means: Tensor) -> Tensor:
        """Map (n, c) means to (n, c) weights from 0 to 1."""
        return torch.sigmoid(self.weigh(activate(self.squeeze(means), self.activation)))


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply "none", "relu", "leaky_relu" (slope 0.2), "elu", "gelu" or "silu".

    Examples
    --------
    >>> activate(torch.tensor([-1.0, 2.0]), "relu")
    tensor([0., 2.])
    """
    if kind == "none":
        return x
    if kind == "leaky_relu":
        return functional.leaky_relu(x, _LEAK)
    result: Tensor = getattr(functional, kind)(x)
    return result


def normalise(
    x: Tensor,
    norm: nn.Module,
    activation: str,
    *,
    other: Tensor | None = None,
    excite: SqueezeExcite | None = None,
) -> Tensor:
    """Give activation(excite(norm(x)) + other).

    Parameters
    ----------
    x : (n, c, z, y, x) tensor
    norm : nn.Module
        Group, batch or instance norm run in the kernels; any other as it is.
    activation : {"none", "relu", "leaky_relu", "elu", "gelu", "silu"}
    other : (n, c, z, y, x) tensor, optional
        A shortcut.
    excite : SqueezeExcite, optional

    Examples
    --------
    >>> norm, x = nn.GroupNorm(8, 8), torch.tensor([3.0, 5.0]).expand(1, 8, 1, 1, 2)
    >>> [round(value, 3) for value in normalise(x, norm, "relu")[0, 0].flatten().tolist()]
    [0.0, 1.0]
    """
    if not _is_native(x, norm):
        y: Tensor = norm(x)
        if excite is not None:
            y = y * excite(y.mean((2, 3, 4)))[:, :, None, None, None]
        return activate(y if other is None else y + other, activation)
    params = [*norm.parameters(), *(excite.parameters() if excite else ())]
    voxels = x.shape[2:].numel()

    def coefficients(sums: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = _scale_and_shift(norm, sums, voxels)
        if excite is not None:
            weight = excite((scale * sums[:, 0] / voxels + shift).float())
            scale, shift = scale * weight, shift * weight
        return scale.float().contiguous(), shift.float().contiguous()

    kind = activation if activation in _KINDS else "none"
    fused: Tensor = _ScaleShift.apply(x, other, coefficients, kind, *params)  # type: ignore[no-untyped-call]
    return fused if kind == activation else activate(fused, activation)


def _is_native(x: Tensor, norm: nn.Module) -> bool:
    if not isinstance(norm, _NORMS):
        return False
    return gpu.takes(x) or (
        x.device.type == "cpu"
        and x.dtype != torch.float64
        and x.shape[1] % LANE == 0
        and not torch.compiler.is_compiling()
        and kernels().library is not None
    )


def _scale_and_shift(norm: nn.Module, sums: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    """Write a norm as a scale and a shift of each sample and channel; (n, c) tensors of float64."""
    assert isinstance(norm, _NORMS)
    if isinstance(norm, nn.BatchNorm3d):
        mean, variance = _of_batch(norm, sums, voxels)
    else:
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else sums.shape[2]
        of_group = sums.reshape(len(sums), 2, groups, -1).mean(3) / voxels
        mean, square = (m.repeat_interleave(sums.shape[2] // groups, 1) for m in of_group.unbind(1))
        variance = square - mean * mean
    scale = (variance.clamp(min=0) + norm.eps).rsqrt() * norm.weight
    return scale, norm.bias - mean * scale


def _of_batch(norm: nn.BatchNorm3d, sums: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the batch, or in evaluation mode those kept."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    shape = (len(sums), -1)
    if not norm.training:
        return norm.running_mean.double().expand(shape), norm.running_var.double().expand(shape)
    count = voxels * len(sums)
    mean, square = (sums.sum(0) / count).unbind()
    variance = square - mean * mean
    with torch.no_grad():
        norm.running_mean.lerp_(mean.float(), norm.momentum)
        norm.running_var.lerp_((variance * (count / max(1, count - 1))).float(), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
    return mean.expand(shape), variance.expand(shape)


class _OnCpu:
    """What `gpu` has, in kernels.cpp; float32."""

    @staticmethod
    def dense(x: Tensor) -> Tensor:
        return dense(x)

    @staticmethod
    def moments(x: Tensor) -> Tensor:
        sums = torch.empty(len(x), 2, x.shape[1], dtype=torch.float64)
        kernels().call("moments", x, sums, *_form(x))
        return sums

    @staticmethod
    def scale_shift(x: Tensor, other: Tensor | None, scale: Tensor, shift: Tensor, kind: int) -> Tensor:
        y = torch.empty_like(x)
        kernels().call("scale_shift", x, other, scale, shift, y, *_form(x), kind)
        return y

    @staticmethod
    def scale_shift_sums(
        grad: Tensor, y: Tensor, x: Tensor, kind: int, *, keep: bool
    ) -> tuple[Tensor | None, Tensor]:
        before = torch.empty_like(x) if keep else None
        sums = torch.empty(len(x), 2, x.shape[1], dtype=torch.float64)
        kernels().call("scale_shift_sums", grad, y, x, before, sums, *_form(x), kind)
        return before, sums

    @staticmethod
    def scale_shift_gradient(
        grad: Tensor, y: Tensor | None, x: Tensor, scale: Tensor, constant: Tensor, slope: Tensor, kind: int
    ) -> Tensor:
        of_x = torch.empty_like(x)
        kernels().call("scale_shift_gradient", grad, y, x, scale, constant, slope, of_x, *_form(x), kind)
        return of_x


def _form(x: Tensor) -> tuple[int, int, int]:
    """Samples, voxels and channels, as the kernels want them."""
    return len(x), x.shape[2:].numel(), x.shape[1]


class _ScaleShift(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, x: Tensor, other: Tensor | None, coefficients: Coefficients, kind: str, *params: Tensor
    ) -> Tensor:
        on: Any = gpu if gpu.takes(x) else _OnCpu
        ctx.dtypes = x.dtype, None if other is None else other.dtype
        x, other = on.dense(x), None if other is None else on.dense(other)
        sums = on.moments(x)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            sums.requires_grad_(any(ctx.needs_input_grad))
            scale, shift = coefficients(sums)
        y: Tensor = on.scale_shift(x, other, scale, shift, _KINDS[kind])
        ctx.save_for_backward(x, y)
        ctx.on, ctx.graph, ctx.kind = on, (sums, params, scale, shift), _KINDS[kind]
        return y

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        grad, kind, on = ctx.on.dense(grad), ctx.kind, ctx.on
        before, totals = on.scale_shift_sums(grad, y, x, kind, keep=ctx.needs_input_grad[1])
        sums, params, scale, shift = ctx.graph
        ctx.graph = None
        of_shift, of_scale = totals.float().unbind(1)
        of_sums, *of_params = torch.autograd.grad(
            (scale, shift), (sums, *params), (of_scale, of_shift), allow_unused=True
        )
        of_sums = torch.zeros_like(sums) if of_sums is None else of_sums
        constant, slope = of_sums[:, 0].float().contiguous(), (2 * of_sums[:, 1]).float().contiguous()
        source, through = (grad, y) if before is None else (before, None)
        dx = on.scale_shift_gradient(source, through, x, scale.detach(), constant, slope, kind)
        of_x, of_other = ctx.dtypes
        return dx.to(of_x), before if before is None else before.to(of_other), None, None, *of_params
