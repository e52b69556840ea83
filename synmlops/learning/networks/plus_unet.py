"""The incumbent's network for synaptic polarity: a residual U-Net whose lowest level feeds every other.

Source: `UNetPlus3D` of PyTorch Connectomics v1.0, of which trained weights can be taken over. Written anew on
layers that are several times faster on a CPU.
"""

from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from synmlops.learning.networks.fast_conv import Conv3d
from synmlops.learning.networks.fast_norm import normalise
from synmlops.learning.networks.layers import norm_of
from synmlops.learning.networks.pytc_unet import (
    POINT,
    ConvNorm,
    border_of,
    check_has,
    encoded,
    ends_of,
    head_of,
    initialise,
    levels_down,
    levels_up,
)
from synmlops.learning_params import NetworkParams


def plus_unet(params: NetworkParams) -> nn.Module:
    """Build the network.

    `kernels` are those of the convolutions into and out of each level; residual blocks have the same size in
    plane and 1 along z. `pools` are strides, or with `pooling` those of max pooling. The incumbent's own is
    widths 32, 64, 96, 128, 192, kernels (1, 3, 3) three times, then (3, 3, 3) twice, pools (1, 2, 2) twice,
    then (2, 2, 2) twice, group norm, ELU, squeeze-excite.

    Raises
    ------
    SynmlopsError
        If params ask for what it does not have: a folding stem, deep supervision, a single level.
    """
    check_has(params)
    return PlusUNet(params)


class PlusUNet(nn.Module):
    """`PytcUNet` whose lowest level, after a non-local block, is added to each level of the decoder."""

    def __init__(self, params: NetworkParams) -> None:
        super().__init__()
        widths = params.widths
        self.border = "constant" if params.padding == "zeros" else border_of(params)
        self.stem = ConvNorm(1, widths[0], ends_of(params), params)
        self.downs = levels_down(params)
        self.non_local = NonLocal(widths[-1], params.norm)
        self.ups = levels_up(params)
        self.features = nn.ModuleList(ConvNorm(widths[-1], width, POINT, params) for width in widths[:-1])
        self.head = head_of(params)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """Map (n, 1, z, y, x) to (n, 3, z, y, x) logits; any size."""
        skips = encoded(image, self.stem, self.downs)
        x = self.non_local(skips.pop())
        lowest = pad(x, [1] * 6, mode=self.border)  # as the incumbent: its 1 x 1 x 1 convolutions are padded
        for level, feature in zip(reversed(self.ups), reversed(self.features), strict=True):
            x = level(x, skips.pop(), feature(lowest))
        return self.head(x)  # type: ignore[no-any-return]


class NonLocal(nn.Module):
    """Adds to each voxel what all voxels hold, weighed by likeness: at first, before training, nothing.

    Source: Wang et al. 2018, arXiv:1711.07971; as PyTorch Connectomics v1.0, without subsampling.
    """

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        narrow = max(1, width // 2)
        self.query, self.key, self.value = (Conv3d(width, narrow, POINT, bias=True) for _ in range(3))
        self.out = Conv3d(narrow, width, POINT, bias=True)
        self.norm = norm_of(norm, width)
        nn.init.zeros_(self.norm.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.norm.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        q, k, v = (part(x).flatten(2).transpose(1, 2)[:, None] for part in (self.query, self.key, self.value))
        mixed = scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]
        out = self.out(mixed.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))
        return normalise(out, self.norm, "none", other=x)
