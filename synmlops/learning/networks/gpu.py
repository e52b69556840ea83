"""The networks' functions on GPUs: each passes over memory once where torch's own take several passes.

Gradients go through none of them: `fast_conv`, `fast_norm` and `fast_resize` put forward and backward
together. Tensors are (n, c, z, y, x) in channels-last order and of any floating type; sums and products are
taken in float32. Triton, which comes with torch where that is built for CUDA, compiles them at first use.
"""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

TILE = 4096
"""Values that a program works on at a time."""
PROGRAMS = 1024
"""Programs that fill any GPU; with more work than they have, each does several tiles."""
MOST_TILES = 16
MOST_CHANNELS = 1024


@functools.cache
def _kernels() -> Any:
    from synmlops.learning.networks import triton_kernels

    return triton_kernels


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes(x: Tensor) -> bool:
    """Whether a tensor is for the kernels: on a GPU, and of a type and width that they know."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.shape[1] <= MOST_CHANNELS
        and not torch.compiler.is_compiling()
        and _has_triton()
    )


def dense(x: Tensor) -> Tensor:
    """Give channels-last order, without a copy where it is so already."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def moments(x: Tensor) -> Tensor:
    """Sum x and its square over the voxels of each sample and channel.

    Returns
    -------
    sums : (n, 2, c) tensor of float64
    """
    form = _Form.of(x)
    parts = form.parts(x)
    _kernels().moments[form.grid(form.steps)](x, parts, form.voxels, **form.tile, STEPS=form.steps)
    return parts.sum(1, dtype=torch.float64)


def scale_shift(x: Tensor, other: Tensor | None, scale: Tensor, shift: Tensor, kind: int) -> Tensor:
    """Give activation(x * scale + shift + other), of x's type.

    Parameters
    ----------
    x, other : (n, c, z, y, x) tensors
    scale, shift : (n, c) tensors of float32
    kind : {0, 1, 2}
        No activation, ReLU, ELU.
    """
    form, y = _Form.of(x), torch.empty_like(x)
    _kernels().scale_shift[form.grid()](
        x, x if other is None else other, scale, shift, y, form.voxels,
        **form.tile, ALONE=other is None, KIND=kind,
    )  # fmt: skip
    return y


def scale_shift_sums(
    grad: Tensor, y: Tensor, x: Tensor, kind: int, *, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """Take a gradient back through the activation of `scale_shift`, and sum it.

    Parameters
    ----------
    grad, y, x : (n, c, z, y, x) tensors
        The gradient of y, y, and what y was made from.
    kind : {0, 1, 2}
    keep : bool
        Whether the gradient before the activation is wanted itself.

    Returns
    -------
    before : (n, c, z, y, x) tensor or None
    sums : (n, 2, c) tensor of float64
        Of the gradient before the activation, and of that times x.
    """
    form = _Form.of(x)
    parts, before = form.parts(x), torch.empty_like(grad) if keep else None
    _kernels().scale_shift_sums[form.grid(form.steps)](
        grad, y, x, grad if before is None else before, parts, form.voxels,
        **form.tile, STEPS=form.steps, KEEP=keep, KIND=kind,
    )  # fmt: skip
    return before, parts.sum(1, dtype=torch.float64)


def scale_shift_gradient(
    grad: Tensor, y: Tensor | None, x: Tensor, scale: Tensor, constant: Tensor, slope: Tensor, kind: int
) -> Tensor:
    """Give before * scale + constant + slope * x: the gradient of what was scaled and shifted.

    Parameters
    ----------
    grad : (n, c, z, y, x) tensor
        The gradient of y, or before its activation where y is None.
    y, x : (n, c, z, y, x) tensors
    scale, constant, slope : (n, c) tensors of float32
    kind : {0, 1, 2}
    """
    form, of_x = _Form.of(x), torch.empty_like(x)
    _kernels().scale_shift_gradient[form.grid()](
        grad, grad if y is None else y, x, scale, constant, slope, of_x, form.voxels,
        **form.tile, KIND=0 if y is None else kind,
    )  # fmt: skip
    return of_x


def pad_replicate(x: Tensor, widths_zyx: Sequence[int]) -> Tensor:
    """Repeat the outermost voxels, as many times at both ends of an axis."""
    x = dense(x)
    n, channels, *size = x.shape
    z, y, length = (a + 2 * b for a, b in zip(size, widths_zyx, strict=True))
    padded = torch.empty(
        (n, channels, z, y, length), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    )
    block = _span(length * channels)
    _kernels().pad[(n * z * y, _cut(length * channels, block))](
        x, padded, *size, z, y, length, *widths_zyx, CHANNELS=channels, BLOCK=block
    )
    return padded


def upsample_add(base: Tensor, lows: Sequence[Tensor], *, aligned: bool) -> Tensor:
    """Give the sum of base and of one or two tensors that are interpolated linearly to its size.

    Parameters
    ----------
    base : (n, c, z, y, x) tensor
    lows : sequence of (n, c, ., ., .) tensors
    aligned : bool
        Whether the corner voxels of both coincide, or their outer borders do.
    """
    base, lows = dense(base), [dense(low) for low in lows]
    n, channels, *size = base.shape
    result = torch.empty_like(base)
    first, second = lows[0], lows[-1]
    block = _span(size[2] * channels)
    _kernels().upsample_add[(n * size[0] * size[1], _cut(size[2] * channels, block))](
        base, first, second, result, *size, *first.shape[2:], *second.shape[2:],
        CHANNELS=channels, BLOCK=block, TWO=len(lows) == 2, ALIGNED=aligned,
    )  # fmt: skip
    return result


@dataclass(frozen=True)
class _Form:
    """How a tensor is cut into tiles: all channels of some voxels of a sample."""

    samples: int
    voxels: int
    channels: int
    width: int
    rows: int

    @classmethod
    def of(cls, x: Tensor) -> Self:
        width = _power_of_2(x.shape[1])
        return cls(len(x), x.shape[2:].numel(), x.shape[1], width, max(1, TILE // width))

    @property
    def tile(self) -> dict[str, int]:
        return {"CHANNELS": self.channels, "WIDTH": self.width, "ROWS": self.rows}

    @property
    def steps(self) -> int:
        """Tiles that one program sums."""
        steps = 1
        while steps < MOST_TILES and self.grid()[0] * self.samples >= 2 * steps * PROGRAMS:
            steps *= 2
        return steps

    def grid(self, steps: int = 1) -> tuple[int, int]:
        """Count the programs of a sample, and the samples."""
        return _cut(_cut(self.voxels, self.rows), steps), self.samples

    def parts(self, x: Tensor) -> Tensor:
        """Make room for two sums of each program and channel."""
        return torch.empty(self.samples, self.grid(self.steps)[0], 2, self.channels, device=x.device)


def _span(values: int) -> int:
    return min(TILE // 2, _power_of_2(values))


def _cut(values: int, size: int) -> int:
    """Count the parts of at most a size."""
    return -(-values // size)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()
