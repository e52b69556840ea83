"""The incumbent's plain network, and what it shares with its polarity network: a residual U-Net that sums.

Source: `UNet3D` of PyTorch Connectomics v1.0, of which trained weights can be taken over. Written anew on
layers that are several times faster on a CPU.
"""

from torch import Tensor, nn
from torch.nn.functional import max_pool3d

from synmlops.learning.networks.fast_conv import Border, Conv3d, Sizes
from synmlops.learning.networks.fast_norm import SqueezeExcite, normalise
from synmlops.learning.networks.fast_resize import upsample_add
from synmlops.learning.networks.layers import norm_of
from synmlops.learning_params import NetworkParams
from synmlops.section import CHANNELS, SynmlopsError

POINT = (1, 1, 1)


def pytc_unet(params: NetworkParams) -> nn.Module:
    """Build the network: `plus_unet` without its non-local block and without what its lowest level feeds.

    Raises
    ------
    SynmlopsError
        If params ask for what it does not have: a folding stem, deep supervision, a single level.

    Examples
    --------
    >>> network = pytc_unet(NetworkParams(name="pytc_unet", stem_zyx=(1, 1, 1), widths=(8, 8),
    ...     kernels=((1, 3, 3), (1, 3, 3)), pools=((1, 2, 2),)))
    >>> sum(weight.numel() for weight in network.parameters())
    6147
    """
    check_has(params)
    return PytcUNet(params)


def check_has(params: NetworkParams) -> None:
    """See that params ask for nothing that these networks do not have.

    Raises
    ------
    SynmlopsError
        If they ask for a folding stem, deep supervision or a single level.
    """
    name = params.name
    if params.stem_zyx != POINT:
        raise SynmlopsError(
            f"network.stem_zyx: {name} folds nothing, got {list(params.stem_zyx)}; use [1, 1, 1]"
        )
    if params.deep_supervision:
        raise SynmlopsError(
            f"network.deep_supervision: {name} has none, got {params.deep_supervision}; use 0, or "
            "residual_unet"
        )
    if len(params.widths) < 2:
        raise SynmlopsError(
            f"network.widths: {name} wants at least 2 levels, got {list(params.widths)}; add a width, a "
            "kernel and a pool"
        )


class PytcUNet(nn.Module):
    """A residual U-Net with sums instead of concatenation.

    Levels are led into by strided convolutions, and upsampling is trilinear with aligned corners. With
    `pooling` it is max pooling and a convolution, and corners are not aligned.
    """

    def __init__(self, params: NetworkParams) -> None:
        super().__init__()
        self.stem = ConvNorm(1, params.widths[0], ends_of(params), params)
        self.downs = levels_down(params)
        self.ups = levels_up(params)
        self.head = head_of(params)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """Map (n, 1, z, y, x) to (n, 3, z, y, x) logits; any size."""
        skips = encoded(image, self.stem, self.downs)
        x = skips.pop()
        for level in reversed(self.ups):
            x = level(x, skips.pop())
        return self.head(x)  # type: ignore[no-any-return]


def encoded(image: Tensor, stem: nn.Module, downs: nn.ModuleList) -> list[Tensor]:
    """Give what each level of the encoder makes of an image, the finest first."""
    x, levels = stem(image), []
    for level in downs:
        x = level(x)
        levels.append(x)
    return levels


def border_of(params: NetworkParams) -> Border:
    """Give what lies beyond the image: the nearest voxel, unless the params say otherwise."""
    return params.padding or "replicate"


def ends_of(params: NetworkParams) -> Sizes:
    """Give the kernel of the first and the last convolution: five voxels, along z where all levels mix it."""
    return (5 if all(kernel[0] > 1 for kernel in params.kernels) else 1, 5, 5)


def levels_down(params: NetworkParams) -> nn.ModuleList:
    """Build the encoder's levels, the finest first."""
    widths = params.widths
    each = zip((widths[0], *widths), widths, params.kernels, (POINT, *params.pools), strict=False)
    return nn.ModuleList(
        Level(before, width, kernel, params, step=step) for before, width, kernel, step in each
    )


def levels_up(params: NetworkParams) -> nn.ModuleList:
    """Build the decoder's levels, the finest first; each has the kernel of the level below it."""
    each = zip(params.widths[1:], params.widths[:-1], params.kernels[1:], strict=True)
    return nn.ModuleList(Level(below, width, kernel, params) for below, width, kernel in each)


def head_of(params: NetworkParams) -> Conv3d:
    """Build the last convolution."""
    return Conv3d(params.widths[0], len(CHANNELS), ends_of(params), border=border_of(params), bias=True)


def initialise(network: nn.Module) -> None:
    """Draw orthogonal weights, as the incumbent."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            nn.init.orthogonal_(module.weight)


class ConvNorm(nn.Module):
    """Convolution, norm and activation."""

    def __init__(
        self, before: int, width: int, kernel: Sizes, params: NetworkParams, *, stride: Sizes = POINT
    ) -> None:
        super().__init__()
        self.conv = Conv3d(before, width, kernel, stride=stride, border=border_of(params))
        self.norm = norm_of(params.norm, width)
        self.activation = params.activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, z, y, x) to (n, c', z / sz, y / sy, x / sx), rounded up."""
        return normalise(self.conv(x), self.norm, self.activation)


class Level(nn.Module):
    """What leads into a level from its neighbour, and the residual blocks there; on one side of the U."""

    def __init__(
        self, before: int, width: int, kernel: Sizes, params: NetworkParams, *, step: Sizes = POINT
    ) -> None:
        super().__init__()
        self.aligned = not params.pooling
        self.pool = step if params.pooling else POINT
        self.entry = ConvNorm(before, width, kernel, params, stride=POINT if params.pooling else step)
        flat = (1, *kernel[1:])
        self.blocks = nn.Sequential(*(ResidualBlock(width, flat, params) for _ in range(params.blocks)))

    def forward(self, x: Tensor, skip: Tensor | None = None, feature: Tensor | None = None) -> Tensor:
        """Go one level down, or up to the size of `skip`; `feature` comes from the lowest level."""
        x = self.entry(x if self.pool == POINT else max_pool3d(x, self.pool))
        if skip is not None:
            lows = (x,) if feature is None else (x, feature)
            x = upsample_add(skip, *lows, aligned=self.aligned)
        return self.blocks(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions with norms; their result, weighed by channel, is added to the input."""

    def __init__(self, width: int, kernel: Sizes, params: NetworkParams) -> None:
        super().__init__()
        self.first = ConvNorm(width, width, kernel, params)
        self.second = ConvNorm(width, width, kernel, params)
        self.excite = SqueezeExcite(width, params.activation) if params.squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        inner, second = self.second.conv(self.first(x)), self.second
        excite = self.excite if isinstance(self.excite, SqueezeExcite) else None
        return normalise(inner, second.norm, second.activation, other=x, excite=excite)
