"""What the networks are built of: folding voxels into channels, residual blocks, norms and activations."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from synmlops.learning.networks import fast_conv
from synmlops.learning.networks.fast_norm import SqueezeExcite, normalise
from synmlops.learning.networks.kernels import LANE
from synmlops.learning_params import NetworkParams

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


MakeConvolution = Callable[[int, tuple[int, int, int]], nn.Module]


class ResidualBlock(nn.Module):
    """Two convolutions with normalisation; their result is added to the input.

    With `squeeze_excite` in the params the result is weighed by channel first.

    Parameters
    ----------
    width : int
        Channels in and out.
    kernel : tuple of int
        Odd sizes of both convolutions.
    params : NetworkParams
    convolution : callable
        Builds a convolution without bias from width and kernel; it keeps the shape.
    """

    def __init__(
        self,
        width: int,
        kernel: tuple[int, int, int],
        params: NetworkParams,
        *,
        convolution: MakeConvolution | None = None,
    ) -> None:
        super().__init__()
        make = convolution or _unbiased
        self.conv1 = make(width, kernel)
        self.norm1 = norm_of(params.norm, width)
        self.conv2 = make(width, kernel)
        self.norm2 = norm_of(params.norm, width)
        self.activation = params.activation
        self.excite = SqueezeExcite(width, params.activation) if params.squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        inner = self.conv2(normalise(self.conv1(x), self.norm1, self.activation))
        return normalise(inner, self.norm2, self.activation, other=x, excite=self.excite)


class Conv3d(nn.Conv3d):
    """A convolution that a CPU computes with oneDNN for every size, and a GPU in plane where it can.

    On a CPU torch gives small single patches to its own convolution, which takes four to seven times as long.
    On a GPU the separable ones of `light_unet` take a tenth of the time in two dimensions.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (n, c, z, y, x)."""
        is_plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if x.device.type == "cpu" and is_plain and is_float32 and _HAS_ONEDNN:
            return torch.mkldnn_convolution(
                x,
                self.weight,
                self.bias,
                self.padding,  # type: ignore[arg-type]  # numbers, as is_plain says
                self.stride,
                self.dilation,
                self.groups,
            )
        if x.device.type == "cuda" and is_plain and self.dilation == (1, 1, 1):
            padding: tuple[int, ...] = self.padding  # type: ignore[assignment]  # numbers, as is_plain says
            return fast_conv.convolve(x, self.weight, self.bias, self.stride, padding, self.groups)
        return super().forward(x)


class Exclusive(nn.Module):
    """Makes pre, post and background exclude each other: a softmax, given as one logit per channel.

    The sigmoid of what comes out is the softmax probability of pre and of post, and of either for the union.
    So losses, prediction and decoding need not know which kind a network is.

    Parameters
    ----------
    network : nn.Module
        Its third output counts against the background class. Of a tuple, as deep supervision gives, each
        level is made exclusive.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map (n, 1, z, y, x) to (n, 3, z, y, x) logits of pre, post and union."""
        logits = self.network(image)
        if isinstance(logits, tuple):
            return tuple(_exclude(level) for level in logits)
        return _exclude(logits)


def _exclude(logits: Tensor) -> Tensor:
    pre, post, union = logits.float().unbind(1)
    background = -union
    return torch.stack(
        [
            pre - torch.logaddexp(background, post),
            post - torch.logaddexp(background, pre),
            torch.logaddexp(pre, post) - background,
        ],
        dim=1,
    )


def fold_voxels(x: Tensor, block_zyx: tuple[int, int, int]) -> Tensor:
    """Turn each block of voxels into channels: (n, c, z, y, x) to (n, c * block, z / bz, y / by, x / bx).

    Examples
    --------
    >>> fold_voxels(torch.zeros(1, 1, 2, 4, 4), (1, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """
    n, c, z, y, x_size = x.shape
    bz, by, bx = block_zyx
    blocks = x.reshape(n, c, z // bz, bz, y // by, by, x_size // bx, bx)
    folded = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(
        n, c * bz * by * bx, z // bz, y // by, x_size // bx
    )
    return folded.contiguous(memory_format=torch.channels_last_3d)


def unfold_voxels(x: Tensor, block_zyx: tuple[int, int, int]) -> Tensor:
    """Undo `fold_voxels`.

    Examples
    --------
    >>> x = torch.arange(64.).reshape(1, 2, 2, 4, 4)
    >>> bool((unfold_voxels(fold_voxels(x, (1, 2, 2)), (1, 2, 2)) == x).all())
    True
    """
    bz, by, bx = block_zyx
    n, c, z, y, x_size = x.shape
    blocks = x.reshape(n, c // (bz * by * bx), bz, by, bx, z, y, x_size)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, -1, z * bz, y * by, x_size * bx)


def same_convolution(
    channels_in: int, channels_out: int, kernel: tuple[int, int, int], *, bias: bool = True
) -> nn.Conv3d:
    """Build a convolution that keeps the shape, with zeros beyond the border.

    Where the channels suit the compiled kernels it runs those: on a CPU they take about half the time of
    oneDNN's convolutions, backward included.
    """
    if channels_in % LANE == channels_out % LANE == 0:
        return fast_conv.Conv3d(channels_in, channels_out, kernel, border="zeros", bias=bias)
    return Conv3d(channels_in, channels_out, kernel, padding=same_padding(kernel), bias=bias)


def _unbiased(width: int, kernel: tuple[int, int, int]) -> nn.Module:
    return same_convolution(width, width, kernel, bias=False)


def same_padding(kernel: tuple[int, int, int]) -> tuple[int, int, int]:
    """Give the padding with which a convolution of odd sizes keeps the shape."""
    z, y, x = (size // 2 for size in kernel)
    return z, y, x


def norm_of(name: str, width: int) -> nn.Module:
    """Build a normalisation: "group" has 8 groups, or fewer where 8 do not divide the width."""
    if name == "group":
        return nn.GroupNorm(math.gcd(8, width), width)
    if name == "batch":
        return nn.BatchNorm3d(width)
    return nn.InstanceNorm3d(width, affine=True)
