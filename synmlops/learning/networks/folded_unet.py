"""The skeleton of the built-in networks: a U-Net over voxels that are folded into channels."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from synmlops.learning.networks.layers import Conv3d, fold_voxels, same_convolution, unfold_voxels
from synmlops.learning_params import NetworkParams
from synmlops.section import CHANNELS

MakeLevel = Callable[[int, tuple[int, int, int], NetworkParams], nn.Module]
"""Builds what a level computes, from its width and kernel; it keeps the shape."""


class FoldedUNet(nn.Module):
    """An anisotropic 3-D U-Net whose stem folds neighbouring voxels into channels.

    The stem turns each block of `stem_zyx` voxels into channels and the head turns channels back into voxels,
    so that no convolution runs at full resolution, where a U-Net spends most of its time. Skips are added,
    not concatenated. Source for the residual anisotropic form: Lee et al. 2017, arXiv:1706.00120.

    Parameters
    ----------
    params : NetworkParams
    down, up : callable
        What a level computes on the way down (the lowest level included) and on the way up.
    """

    def __init__(self, params: NetworkParams, *, down: MakeLevel, up: MakeLevel) -> None:
        super().__init__()
        widths, kernels, pools = params.widths, params.kernels, params.pools
        self.fold = params.stem_zyx
        folded = math.prod(self.fold)
        self.stem = same_convolution(folded, widths[0], kernels[0])
        self.down_blocks = nn.ModuleList(down(w, k, params) for w, k in zip(widths, kernels, strict=True))
        self.up_blocks = nn.ModuleList(
            up(w, k, params) for w, k in zip(widths[:-1], kernels[:-1], strict=True)
        )
        self.downs = nn.ModuleList(
            Conv3d(a, b, p, stride=p) for a, b, p in zip(widths[:-1], widths[1:], pools, strict=True)
        )
        self.ups = nn.ModuleList(
            nn.Sequential(Conv3d(b, a, 1), nn.Upsample(scale_factor=tuple(float(s) for s in p)))
            for a, b, p in zip(widths[:-1], widths[1:], pools, strict=True)
        )
        self.head = _head(widths[0], folded)
        coarser = widths[1 : 1 + params.deep_supervision]
        self.coarse_heads = nn.ModuleList(_head(width, folded) for width in coarser)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map an image to logits.

        Parameters
        ----------
        image : (n, 1, z, y, x) tensor
            Sizes are multiples of the total pooling.

        Returns
        -------
        logits : (n, 3, z, y, x) tensor, or a tuple of these in training mode with deep supervision
            Then the finest comes first, and level k is smaller by the pools of the k levels above it.
        """
        x = self.stem(fold_voxels(image, self.fold))
        skips: list[Tensor] = []
        for block, down in zip(self.down_blocks, self.downs, strict=False):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.down_blocks[-1](x)
        coarse: list[Tensor] = []  # from the lowest level up
        for up, block in zip(reversed(self.ups), reversed(self.up_blocks), strict=True):
            coarse = [*coarse, x] if self.training else coarse
            x = block(up(x) + skips.pop())
        fine = unfold_voxels(self.head(x), self.fold)
        if not (self.training and self.coarse_heads):
            return fine
        supervised = zip(self.coarse_heads, reversed(coarse), strict=False)
        return (fine, *(unfold_voxels(head(level), self.fold) for head, level in supervised))


def _head(width: int, folded: int) -> Conv3d:
    head = Conv3d(width, len(CHANNELS) * folded, 1)
    nn.init.constant_(head.bias, -2.0)  # type: ignore[arg-type]  # most voxels are background
    return head
