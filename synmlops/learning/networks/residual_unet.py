"""The default network: residual blocks on the way down and up."""

from torch import nn

from synmlops.learning.networks.folded_unet import FoldedUNet
from synmlops.learning.networks.layers import ResidualBlock
from synmlops.learning_params import NetworkParams


def residual_unet(params: NetworkParams) -> nn.Module:
    """Build a folded U-Net with `params.blocks` residual blocks per level and side.

    Examples
    --------
    >>> sum(weight.numel() for weight in residual_unet(NetworkParams()).parameters())
    1104496
    """
    return FoldedUNet(params, down=_level, up=_level)


def _level(width: int, kernel: tuple[int, int, int], params: NetworkParams) -> nn.Module:
    return nn.Sequential(*(ResidualBlock(width, kernel, params) for _ in range(params.blocks)))
