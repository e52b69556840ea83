"""Convolutions that are several times faster on a CPU, forward and backward, and plain torch elsewhere."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn import functional

from synmlops.learning.networks import gpu
from synmlops.learning.networks.kernels import LANE, kernels, panel_width

Sizes = tuple[int, int, int]
Border = Literal["zeros", "replicate", "reflect", "circular"]


class Conv3d(nn.Conv3d):
    """A convolution over (n, c, z, y, x) whose output has the input's size, divided by the stride.

    On a CPU it runs compiled kernels in float32, whatever autocast asks for; what they cannot do, and
    every other device, runs torch's convolutions. Parameters, names and results are those of
    `torch.nn.Conv3d`.

    Parameters
    ----------
    channels_in, channels_out : int
    kernel : (3,) tuple of int
        Odd sizes along z, y and x.
    stride : (3,) tuple of int
    border : {"zeros", "replicate", "reflect", "circular"}
        What lies beyond the image; the kernels know the first two.
    bias : bool
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: Sizes,
        *,
        stride: Sizes = (1, 1, 1),
        border: Border = "replicate",
        bias: bool = False,
    ) -> None:
        z, y, x = (size // 2 for size in kernel)
        super().__init__(channels_in, channels_out, kernel, stride, (z, y, x), padding_mode=border, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (n, c, z, y, x) to (n, c', z / sz, y / sy, x / sx), rounded up."""
        if input.device.type == "cpu" and self.kernel_size == self.stride == (1, 1, 1):
            flat = functional.linear(input.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
            return flat.permute(0, 4, 1, 2, 3)
        if not self._is_native(input):
            return self._in_torch(input)
        form = _Form(self.kernel_size, self.stride, clamp=self.padding_mode == "replicate")  # type: ignore[arg-type]
        result: Tensor = _Convolution.apply(input, self.weight, self.bias, form)  # type: ignore[no-untyped-call]
        return result

    def _in_torch(self, image: Tensor) -> Tensor:
        padded: Tensor
        if self.padding_mode == "zeros" or not any(self.padding):
            return convolve(image, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
        if self.padding_mode == "replicate" and gpu.takes(image):
            padded = _Padded.apply(image, self.padding)  # type: ignore[no-untyped-call]
        elif self.kernel_size[0] == self.stride[0] == 1:
            _, y, x = (size // 2 for size in self.kernel_size)
            planes = functional.pad(_planes(image), (x, x, y, y), mode=self.padding_mode)
            padded = _volume(planes, len(image))
        else:
            return super().forward(image)
        return convolve(padded, self.weight, self.bias, self.stride)

    def _is_native(self, image: Tensor) -> bool:
        return (
            image.device.type == "cpu"
            and torch.float64 not in (image.dtype, self.weight.dtype)
            and self.padding_mode in ("zeros", "replicate")
            and max(self.in_channels, self.out_channels) % LANE == 0
            and not torch.compiler.is_compiling()
            and kernels().library is not None
        )


def convolve(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    groups: int = 1,
) -> Tensor:
    """Convolve (n, c, z, y, x) as torch does, in two dimensions where sections do not mix.

    Sections are samples then: a view in channels-last order. cuDNN has faster kernels for that.
    """
    if weight.shape[2] == stride[0] == 1:
        flat = functional.conv2d(_planes(image), weight.squeeze(2), bias, stride[1:], padding[1:], 1, groups)
        return _volume(flat, len(image))
    return functional.conv3d(image, weight, bias, stride, padding, 1, groups)


class _Padded(torch.autograd.Function):
    """An image with its outermost voxels repeated, on a GPU."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, widths_zyx: Sizes) -> Tensor:
        ctx.widths = widths_zyx
        return gpu.pad_replicate(image, widths_zyx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Add what reaches a repeated voxel to what reaches the voxel itself."""
        for axis, width in zip((2, 3, 4), ctx.widths, strict=True):
            if not width:
                continue
            inner = grad.shape[axis] - 2 * width
            low, middle, high = torch.split(grad, [width, inner, width], axis)
            grad = middle.clone()
            grad.narrow(axis, 0, 1).add_(low.sum(axis, keepdim=True))
            grad.narrow(axis, inner - 1, 1).add_(high.sum(axis, keepdim=True))
        return grad, None


def _planes(image: Tensor) -> Tensor:
    """Give sections as samples: (n, c, z, y, x) to (n * z, c, y, x)."""
    n, channels, depth, *plane = image.shape
    return image.transpose(1, 2).reshape(n * depth, channels, *plane)


def _volume(planes: Tensor, n: int) -> Tensor:
    """Undo `_planes` for n samples."""
    return planes.reshape(n, -1, *planes.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class _Form:
    """Shape of a convolution apart from its channels."""

    kernel: Sizes
    stride: Sizes
    clamp: bool

    def is_winograd(self, channels_in: int, channels_out: int) -> bool:
        plane = self.kernel[1:] == (3, 3) and self.stride == (1, 1, 1)
        return plane and channels_in % LANE == 0 and channels_out % LANE == 0

    def output_of(self, shape: torch.Size) -> Sizes:
        z, y, x = (-(-size // step) for size, step in zip(shape[2:], self.stride, strict=True))
        return z, y, x

    @property
    def padding(self) -> list[int]:
        """As `torch.nn.functional.pad` wants it: the last axis first."""
        return [size // 2 for size in reversed(self.kernel) for _ in range(2)]

    def pad(self, x: Tensor) -> Tensor:
        return functional.pad(x, self.padding, mode="replicate" if self.clamp else "constant")


class _Convolution(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None, form: _Form) -> Tensor:
        image = dense(image)
        ctx.form, ctx.has_bias = form, bias is not None
        ctx.save_for_backward(image, weight)
        c_out, c_in = weight.shape[:2]
        if form.is_winograd(c_in, c_out):
            result = _winograd(image, weight, clamp=form.clamp, transposed=False)
            return result if bias is None else result.add_(bias[:, None, None, None])
        if c_out % LANE == 0:
            return _gathered(image, weight, bias, form)
        return functional.conv3d(form.pad(image), weight, bias, form.stride)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, weight = ctx.saved_tensors
        form: _Form = ctx.form
        grad = dense(grad)
        of_image = _image_gradient(image, weight, grad, form) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:  # in the weight's own order of axes, as DDP wants it
            of_weight = torch.empty_like(weight).copy_(_weight_gradient(image, weight, grad, form))
        of_bias = grad.sum((0, 2, 3, 4)) if ctx.has_bias else None
        return of_image, of_weight, of_bias, None


def _image_gradient(image: Tensor, weight: Tensor, grad: Tensor, form: _Form) -> Tensor:
    c_out, c_in = weight.shape[:2]
    if form.is_winograd(c_in, c_out):
        return _winograd(grad, weight.transpose(0, 1).flip(3, 4), clamp=form.clamp, transposed=True)
    if form.stride == (1, 1, 1) and c_in % LANE == 0 and c_out < LANE:
        flipped = weight.transpose(0, 1).flip(2, 3, 4)
        return _gathered(grad, flipped, None, replace(form, clamp=False), fold=form.clamp)
    n, _, z, y, x = image.shape
    size = [a + 2 * (k // 2) for a, k in zip((z, y, x), form.kernel, strict=True)]
    of_padded: Tensor = torch.ops.aten.convolution_backward(
        grad, empty(n, c_in, size), weight, None, form.stride, (0, 0, 0), (1, 1, 1), False, (0, 0, 0), 1,
        (True, False, False),
    )[0]  # fmt: skip
    if not form.clamp:
        return functional.pad(of_padded, [-width for width in form.padding])
    of_image: Tensor = torch.ops.aten.replication_pad3d_backward(of_padded, image, form.padding)
    return of_image


def _weight_gradient(image: Tensor, weight: Tensor, grad: Tensor, form: _Form) -> Tensor:
    c_out, c_in = weight.shape[:2]
    if form.is_winograd(c_in, c_out):
        return _winograd_weight_gradient(image, grad, weight, clamp=form.clamp)
    if c_out % LANE and form.stride == (1, 1, 1):  # gather from the few channels of the gradient instead
        swapped = replace(form, clamp=False)
        product = _gathered_weight_gradient(grad, image, swapped, fold=form.clamp)
        return product.flip(2, 3, 4).transpose(0, 1)
    return _gathered_weight_gradient(image, grad, form)


def dense(x: Tensor) -> Tensor:
    """Give float32 in channels-last order, without a copy where it is so already."""
    return x.float().contiguous(memory_format=torch.channels_last_3d)


def empty(n: int, channels: int, size: Sequence[int]) -> Tensor:
    """Give an uninitialised (n, c, z, y, x) tensor in channels-last order."""
    return torch.empty((n, channels, *size), memory_format=torch.channels_last_3d)


# Winograd: 3 x 3 in plane, any odd size along z


@functools.cache
def _transform() -> Tensor:
    """Map 3 x 3 weights to values at 6 x 6 points, along each axis 0, 1, -1, 2, -2 and infinity: (36, 9)."""
    line = torch.tensor(
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ]
    )
    return torch.kron(line, line)


@functools.lru_cache(64)
def _pairs(n: int, depth: int, taps: int, *, clamp: bool, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each plane of the output, which planes of the input meet which weights along z."""
    met: list[list[tuple[int, int]]] = [[] for _ in range(depth)]
    for z, tap in ((z, tap) for z in range(depth) for tap in range(taps)):
        source = z + tap - taps // 2
        if clamp:
            source = min(max(source, 0), depth - 1)
        if 0 <= source < depth:
            to, of = (source, z) if transposed else (z, source)
            met[to].append((of, tap))
    first, sources, tap_of = [0], [], []
    for sample, z in ((sample, z) for sample in range(n) for z in range(depth)):
        sources += [sample * depth + of for of, _ in met[z]]
        tap_of += [tap for _, tap in met[z]]
        first.append(len(sources))
    return torch.tensor(first), torch.tensor(sources), torch.tensor(tap_of)


def _winograd(image: Tensor, weight: Tensor, *, clamp: bool, transposed: bool) -> Tensor:
    """Convolve; transposed, from gradient to gradient, what was read beyond a border goes back to it."""
    n, c_in, *size = image.shape
    c_out, taps = weight.shape[0], weight.shape[2]
    depth, height, width = size
    result = empty(n, c_out, (depth, height, width))
    in_plane = weight.detach().flatten(3).permute(2, 3, 1, 0).reshape(taps, 9, -1)
    at_points = (_transform() @ in_plane).reshape(taps, 36, c_in, c_out)
    fold = clamp and transposed
    kernels().call(
        "convolve", image, _packed(at_points), result,
        *_pairs(n, depth, taps, clamp=clamp, transposed=transposed),
        n * depth, height, width, c_in, c_out, int(clamp and not transposed), int(fold),
    )  # fmt: skip
    return result


def _winograd_weight_gradient(image: Tensor, grad: Tensor, weight: Tensor, *, clamp: bool) -> Tensor:
    n, c_in, depth, height, width = image.shape
    c_out, taps = weight.shape[0], weight.shape[2]
    at_points = torch.empty(taps, 36, c_in, _padded(c_out))
    kernels().call(
        "weight_gradient", image, grad, at_points, *_pairs(n, depth, taps, clamp=clamp, transposed=False),
        taps, n * depth, height, width, c_in, c_out, int(clamp),
    )  # fmt: skip
    in_plane = (_transform().T @ at_points.flatten(2)).reshape(taps, 3, 3, c_in, -1)
    return in_plane[..., :c_out].permute(4, 3, 0, 1, 2)


# Windows gathered for a matrix product: any size and stride


def _gathered(
    image: Tensor, weight: Tensor, bias: Tensor | None, form: _Form, *, fold: bool = False
) -> Tensor:
    n, _, *_ = image.shape
    c_out = weight.shape[0]
    size = form.output_of(image.shape)
    result = empty(n, c_out, size)
    if fold:
        result.zero_()
    rows = weight.detach().permute(2, 3, 4, 1, 0).reshape(-1, c_out)
    shape, samples = _windows(image, size, form, fold=fold)
    kernels().call("gather_convolve", image, _packed(rows), bias, result, shape, samples, c_out)
    return result


def _gathered_weight_gradient(image: Tensor, grad: Tensor, form: _Form, *, fold: bool = False) -> Tensor:
    """Give the gradient of (out, in, z, y, x) weights for windows of `image` and the gradient beside them."""
    c_in, c_out = image.shape[1], grad.shape[1]
    size = form.output_of(image.shape)
    shape, samples = _windows(image, size, form, fold=fold)
    rows = torch.empty(*form.kernel, c_in, _padded(c_out))
    kernels().call("gather_weight_gradient", image, grad, rows, shape, samples, c_out)
    return rows[..., :c_out].permute(4, 3, 0, 1, 2)


def _windows(image: Tensor, size: Sizes, form: _Form, *, fold: bool) -> tuple[Tensor, int]:
    """Describe to the kernels where windows lie; planes are samples of their own where they do not mix."""
    n, channels, depth, height, width = image.shape
    flat = form.kernel[0] == form.stride[0] == 1
    halo = [k // 2 if fold else 0 for k in form.kernel]
    depths = (1, 1) if flat else (depth, size[0])
    numbers = (
        depths[0], height, width, channels, depths[1], *size[1:], *form.kernel, *form.stride,
        int(form.clamp), *halo,
    )  # fmt: skip
    return torch.tensor(numbers), n * depth if flat else n


def _padded(channels: int) -> int:
    panel = panel_width()
    return -(-channels // panel) * panel


def _packed(rows: Tensor) -> Tensor:
    """Lay out (..., rows, columns) in panels of columns: (..., panels, rows, panel)."""
    *lead, n_rows, n_columns = rows.shape
    filled = functional.pad(rows, (0, _padded(n_columns) - n_columns))
    panels = filled.reshape(*lead, n_rows, -1, panel_width())
    return panels.transpose(-3, -2).contiguous()
