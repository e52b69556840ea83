"""The incumbent's network for synaptic polarity: a residual U-Net whose lowest level feeds every other.

Source: `UNetPlus3D` of PyTorch Connectomics v1.0, of which trained weights can be taken over. Written anew on
layers that are several times faster on a CPU.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from synmlops.learning.networks.fast_conv import Conv3d, Sizes
from synmlops.learning.networks.fast_norm import SqueezeExcite, normalise
from synmlops.learning.networks.fast_resize import upsample_add
from synmlops.learning.networks.layers import norm_of
from synmlops.learning_params import NetworkParams
from synmlops.section import CHANNELS, SynmlopsError

_POINT = (1, 1, 1)


def plus_unet(params: NetworkParams) -> nn.Module:
    """Build the network.

    `kernels` are those of the convolutions into and out of each level; residual blocks have the same size in
    plane and 1 along z. `pools` are strides. The incumbent's own is widths 32, 64, 96, 128, 192, kernels
    (1, 3, 3) three times, then (3, 3, 3) twice, pools (1, 2, 2) twice, then (2, 2, 2) twice, group norm, ELU,
    squeeze-excite.

    Raises
    ------
    SynmlopsError
        If params ask for what it does not have: a folding stem, deep supervision, a single level.
    """
    if params.stem_zyx != _POINT:
        raise SynmlopsError(
            f"network.stem_zyx: plus_unet folds nothing, got {list(params.stem_zyx)}; use [1, 1, 1]"
        )
    if params.deep_supervision:
        raise SynmlopsError(
            f"network.deep_supervision: plus_unet has none, got {params.deep_supervision}; use 0, or "
            "residual_unet"
        )
    if len(params.widths) < 2:
        raise SynmlopsError(
            f"network.widths: plus_unet wants at least 2 levels, got {list(params.widths)}; add a width, a "
            "kernel and a pool"
        )
    return PlusUNet(params)


class PlusUNet(nn.Module):
    """A residual U-Net whose lowest level, after a non-local block, is added to each level of the decoder.

    Levels are led into by strided convolutions. Padding replicates; upsampling is trilinear with aligned
    corners; sums instead of concatenation.
    """

    def __init__(self, params: NetworkParams) -> None:
        super().__init__()
        widths, kernels = params.widths, params.kernels
        wide = (5 if all(kernel[0] > 1 for kernel in kernels) else 1, 5, 5)
        steps = (_POINT, *params.pools)
        self.stem = ConvNorm(1, widths[0], wide, params)
        self.downs = nn.ModuleList(
            Level(before, width, kernel, params, stride=step)
            for before, width, kernel, step in zip((widths[0], *widths), widths, kernels, steps, strict=False)
        )
        self.non_local = NonLocal(widths[-1], params.norm)
        self.ups = nn.ModuleList(
            Level(below, width, kernel, params)
            for width, below, kernel in zip(widths[:-1], widths[1:], kernels[1:], strict=True)
        )
        self.features = nn.ModuleList(ConvNorm(widths[-1], width, _POINT, params) for width in widths[:-1])
        self.head = Conv3d(widths[0], len(CHANNELS), wide, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.orthogonal_(module.weight)  # as the incumbent

    def forward(self, image: Tensor) -> Tensor:
        """Map (n, 1, z, y, x) to (n, 3, z, y, x) logits; any size."""
        x = self.stem(image)
        skips: list[Tensor] = []
        for level in self.downs:
            x = level(x)
            skips.append(x)
        x = self.non_local(skips.pop())
        lowest = pad(x, [1] * 6, mode="replicate")  # as the incumbent: its 1 x 1 x 1 convolutions are padded
        for level, feature in zip(reversed(self.ups), reversed(self.features), strict=True):
            x = level(x, skips.pop(), feature(lowest))
        return self.head(x)  # type: ignore[no-any-return]


class ConvNorm(nn.Module):
    """Convolution, norm and activation."""

    def __init__(
        self, before: int, width: int, kernel: Sizes, params: NetworkParams, *, stride: Sizes = _POINT
    ) -> None:
        super().__init__()
        self.conv = Conv3d(before, width, kernel, stride=stride)
        self.norm = norm_of(params.norm, width)
        self.activation = params.activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, z, y, x) to (n, c', z / sz, y / sy, x / sx), rounded up."""
        return normalise(self.conv(x), self.norm, self.activation)


class Level(nn.Module):
    """What leads into a level from its neighbour, and the residual blocks there; on one side of the U."""

    def __init__(
        self, before: int, width: int, kernel: Sizes, params: NetworkParams, *, stride: Sizes = _POINT
    ) -> None:
        super().__init__()
        flat = (1, *kernel[1:])
        self.entry = ConvNorm(before, width, kernel, params, stride=stride)
        self.blocks = nn.Sequential(*(ResidualBlock(width, flat, params) for _ in range(params.blocks)))

    def forward(self, x: Tensor, skip: Tensor | None = None, feature: Tensor | None = None) -> Tensor:
        """Go one level down, or up to the size of `skip`; `feature` comes from the lowest level."""
        x = self.entry(x)
        if skip is not None:
            assert feature is not None
            x = upsample_add(skip, x, feature)
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


class NonLocal(nn.Module):
    """Adds to each voxel what all voxels hold, weighed by likeness: at first, before training, nothing.

    Source: Wang et al. 2018, arXiv:1711.07971; as PyTorch Connectomics v1.0, without subsampling.
    """

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        narrow = max(1, width // 2)
        self.query, self.key, self.value = (Conv3d(width, narrow, _POINT, bias=True) for _ in range(3))
        self.out = Conv3d(narrow, width, _POINT, bias=True)
        self.norm = norm_of(norm, width)
        nn.init.zeros_(self.norm.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.norm.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        q, k, v = (part(x).flatten(2).transpose(1, 2)[:, None] for part in (self.query, self.key, self.value))
        mixed = scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]
        out = self.out(mixed.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))
        return normalise(out, self.norm, "none", other=x)


def from_pytc(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a PyTorch Connectomics v1 `unet_plus_3d` for `PlusUNet`.

    Parameters
    ----------
    weights : mapping of str to tensor
        The `state_dict` of its checkpoint, with or without a `module.` before each name; blocks `residual`
        or `residual_se`.

    Raises
    ------
    SynmlopsError
        If a name is none of that network's.

    Examples
    --------
    >>> import torch
    >>> list(from_pytc({"module.up_layers.0.1.conv.1.0.weight": torch.zeros(8, 8, 1, 3, 3)}))
    ['ups.0.blocks.0.second.conv.weight']
    """
    names = {key: key.removeprefix("module.") for key in weights}
    excited = any(".conv.1.fc." in name for name in names.values())
    return {_our_name(names[key], excited=excited): value for key, value in weights.items()}


_BLOCK = r"(down|up)_layers\.(\d+)\.[12]\.conv"
_RULES = (
    (r"conv_in\.(\d\.\w+)", r"stem.@\1"),
    (r"conv_out\.0\.(\w+)", r"head.\1"),
    (r"feat_layers\.(\d+)\.(\d\.\w+)", r"features.\1.@\2"),
    (r"down_layers\.(\d+)\.1\.(\d\.\w+)", r"downs.\1.entry.@\2"),
    (r"up_layers\.(\d+)\.0\.(\d\.\w+)", r"ups.\1.entry.@\2"),
    (_BLOCK + r"\.0\.(\d\.\w+)", r"\1s.\2.blocks.0.first.@\3"),
    (_BLOCK + r"\.1\.(\d\.\w+)", r"\1s.\2.blocks.0.second.@\3"),
    (_BLOCK + r"\.1\.fc\.0\.weight", r"\1s.\2.blocks.0.excite.squeeze.weight"),
    (_BLOCK + r"\.1\.fc\.2\.weight", r"\1s.\2.blocks.0.excite.weigh.weight"),
    (r"non_local\.theta\.(\w+)", r"non_local.query.\1"),
    (r"non_local\.phi\.(\w+)", r"non_local.key.\1"),
    (r"non_local\.g\.(\w+)", r"non_local.value.\1"),
    (r"non_local\.W\.0\.(\w+)", r"non_local.out.\1"),
    (r"non_local\.W\.1\.(\w+)", r"non_local.norm.\1"),
)
"""Its names and ours; @0 stands for a convolution and @1 for the norm after it."""


def _our_name(name: str, *, excited: bool) -> str:
    if excited:  # there, the convolutions of a block lie one level deeper, beside squeeze-excite
        name = re.sub(r"\.conv\.0\.([01])\.([01])\.", r".conv.\1.\2.", name)
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours).replace("@0", "conv").replace("@1", "norm")
    raise SynmlopsError(
        f"weights: {name!r} is no part of PyTorch Connectomics' unet_plus_3d with residual or residual_se "
        "blocks; give a checkpoint of that network"
    )
