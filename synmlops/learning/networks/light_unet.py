"""A network for fast inference: separable convolutions on the same skeleton as the default."""

from torch import Tensor, nn

from synmlops.learning.networks.folded_unet import FoldedUNet
from synmlops.learning.networks.layers import Conv3d, SqueezeExcite, activation_of, norm_of, same_padding
from synmlops.learning_params import NetworkParams


def light_unet(params: NetworkParams) -> nn.Module:
    """Build a folded U-Net of separable residual blocks, `params.blocks` per level and side.

    With the default params it has 0.18 of the parameters and of the arithmetic of `residual_unet`, and a
    forward pass on a CPU takes a third of the time; it sees as far.

    Examples
    --------
    >>> sum(weight.numel() for weight in light_unet(NetworkParams()).parameters())
    200944
    """
    return FoldedUNet(params, down=_level, up=_level)


class SeparableBlock(nn.Module):
    """A residual block whose two convolutions are each taken apart.

    First each channel by itself in plane, then all channels together along z.
    """

    def __init__(self, width: int, kernel: tuple[int, int, int], params: NetworkParams) -> None:
        super().__init__()
        self.conv1 = _separable(width, kernel)
        self.norm1 = norm_of(params.norm, width)
        self.conv2 = _separable(width, kernel)
        self.norm2 = norm_of(params.norm, width)
        self.activation = activation_of(params.activation)
        self.excite = SqueezeExcite(width, params) if params.squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        inner = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        if self.excite is not None:
            inner = self.excite(inner)
        return self.activation(inner + x)  # type: ignore[no-any-return]


def _separable(width: int, kernel: tuple[int, int, int]) -> nn.Module:
    plane, along = (1, *kernel[1:]), (kernel[0], 1, 1)
    return nn.Sequential(
        Conv3d(width, width, plane, padding=same_padding(plane), groups=width, bias=False),
        Conv3d(width, width, along, padding=same_padding(along), bias=False),
    )


def _level(width: int, kernel: tuple[int, int, int], params: NetworkParams) -> nn.Module:
    return nn.Sequential(*(SeparableBlock(width, kernel, params) for _ in range(params.blocks)))
