"""The networks, by name: image patch in, one logit per channel and voxel out.

A network is a `torch.nn.Module` that maps (n, 1, z, y, x) normalised intensity to (n, 3, z, y, x) logits in
the order of `params.CHANNELS`, for sizes that are multiples of the params' `total_pool_zyx`.
"""

import math

import torch
from torch import Tensor, nn

from synmlops.params import CHANNELS, NetworkParams, SynmlopsError


def build_network(params: NetworkParams) -> nn.Module:
    """Build the network that `params.name` names, in channels-last memory format.

    Raises
    ------
    SynmlopsError
        If the name is not known.
    """
    if params.name not in NETWORKS:
        raise SynmlopsError(f"network.name: {params.name!r} is not known; choose from {', '.join(NETWORKS)}")
    network = NETWORKS[params.name](params).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if params.exclusive:
        network = Exclusive(network)
    for weight in network.parameters():
        if weight.dim() == 5 and weight.shape[2:].numel() == 1:  # strides as its gradient has them, for DDP
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return network  # type: ignore[no-any-return]


class ResidualUNet(nn.Module):
    """An anisotropic residual 3-D U-Net whose stem folds neighbouring voxels into channels.

    The stem turns each block of `stem_zyx` voxels into channels and the head turns channels back into voxels,
    so that no convolution runs at full resolution, where a U-Net spends most of its time. Skips are added,
    not concatenated. Source for the residual anisotropic form: Lee et al. 2017, arXiv:1706.00120.
    """

    def __init__(self, params: NetworkParams) -> None:
        super().__init__()
        widths, kernels, pools = params.widths, params.kernels, params.pools
        self.fold = params.stem_zyx
        folded = math.prod(self.fold)
        self.stem = nn.Conv3d(folded, widths[0], kernels[0], padding=_same(kernels[0]))
        self.down_blocks = nn.ModuleList(_level(w, k, params) for w, k in zip(widths, kernels, strict=True))
        self.up_blocks = nn.ModuleList(
            _level(w, k, params) for w, k in zip(widths[:-1], kernels[:-1], strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Conv3d(a, b, p, stride=p) for a, b, p in zip(widths[:-1], widths[1:], pools, strict=True)
        )
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv3d(b, a, 1), nn.Upsample(scale_factor=tuple(float(s) for s in p)))
            for a, b, p in zip(widths[:-1], widths[1:], pools, strict=True)
        )
        self.head = nn.Conv3d(widths[0], len(CHANNELS) * folded, 1)
        nn.init.constant_(self.head.bias, -2.0)  # type: ignore[arg-type]  # most voxels are background

    def forward(self, image: Tensor) -> Tensor:
        """Map (n, 1, z, y, x) to (n, 3, z, y, x) logits; sizes are multiples of the total pooling."""
        x = self.stem(fold_voxels(image, self.fold))
        skips: list[Tensor] = []
        for block, down in zip(self.down_blocks, self.downs, strict=False):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.down_blocks[-1](x)
        for up, block in zip(reversed(self.ups), reversed(self.up_blocks), strict=True):
            x = block(up(x) + skips.pop())
        return unfold_voxels(self.head(x), self.fold)


class Exclusive(nn.Module):
    """Makes pre, post and background exclude each other: a softmax, given as one logit per channel.

    The sigmoid of what comes out is the softmax probability of pre and of post, and of either for the union.
    So losses, prediction and decoding need not know which kind a network is.

    Parameters
    ----------
    network : nn.Module
        Its third output counts against the background class.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Map (n, 1, z, y, x) to (n, 3, z, y, x) logits of pre, post and union."""
        pre, post, union = self.network(image).float().unbind(1)
        background = -union
        return torch.stack(
            [
                pre - torch.logaddexp(background, post),
                post - torch.logaddexp(background, pre),
                torch.logaddexp(pre, post) - background,
            ],
            dim=1,
        )


class ResidualBlock(nn.Module):
    """Two convolutions with normalisation; their result is added to the input."""

    def __init__(self, width: int, kernel: tuple[int, int, int], params: NetworkParams) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, kernel, padding=_same(kernel), bias=False)
        self.norm1 = _norm(params.norm, width)
        self.conv2 = nn.Conv3d(width, width, kernel, padding=_same(kernel), bias=False)
        self.norm2 = _norm(params.norm, width)
        self.activation = _ACTIVATIONS[params.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        inner = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(inner + x)  # type: ignore[no-any-return]


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


def _level(width: int, kernel: tuple[int, int, int], params: NetworkParams) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width, kernel, params) for _ in range(params.blocks)))


def _same(kernel: tuple[int, int, int]) -> tuple[int, int, int]:
    z, y, x = (size // 2 for size in kernel)
    return z, y, x


def _norm(name: str, width: int) -> nn.Module:
    if name == "group":
        return nn.GroupNorm(math.gcd(8, width), width)
    if name == "batch":
        return nn.BatchNorm3d(width)
    return nn.InstanceNorm3d(width, affine=True)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU}

NETWORKS: dict[str, type[nn.Module]] = {"residual_unet": ResidualUNet}
"""Networks by the name that params.yaml gives; each is built from the network section."""
