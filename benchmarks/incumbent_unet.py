"""The incumbent's polarity network and training step in plain PyTorch, for `training_step.py` to beat.

`unet_plus_3d` of PyTorch Connectomics v1.0 with `residual_se` blocks and group norm: contiguous tensors,
`padding_mode="replicate"`, `nn.GroupNorm`, in-place ELU, `nn.functional.interpolate`, `nn.AdaptiveAvgPool3d`,
Adam. Its names of weights are the incumbent's, so `from_pytc` takes them over.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (32, 64, 96, 128, 192)
IS_ISOTROPIC = (False, False, False, True, True)


def conv_norm_act(
    before: int,
    width: int,
    kernel: tuple[int, int, int],
    *,
    stride: int | tuple[int, int, int] = 1,
    padding: tuple[int, int, int] | None = None,
    act: bool = True,
) -> nn.Sequential:
    """Build the unit that the network is made of."""
    padding = padding or tuple(size // 2 for size in kernel)
    conv = nn.Conv3d(before, width, kernel, stride, padding, bias=False, padding_mode="replicate")
    return nn.Sequential(conv, nn.GroupNorm(8, width), nn.ELU(inplace=True) if act else nn.Identity())


class SqueezeExcite(nn.Module):
    """Weighs channels by their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Sequential(
            nn.Linear(width, width // 4, bias=False),
            nn.ELU(inplace=True),
            nn.Linear(width // 4, width, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return x * self.fc(self.pool(x).flatten(1))[:, :, None, None, None].expand_as(x)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        flat = (1, 3, 3)
        convs = nn.Sequential(conv_norm_act(width, width, flat), conv_norm_act(width, width, flat, act=False))
        self.conv = nn.Sequential(convs, SqueezeExcite(width))
        self.act = nn.ELU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return self.act(self.conv(x) + x)


class NonLocal(nn.Module):
    """Attention over all voxels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.theta, self.phi, self.g = (nn.Conv3d(width, half, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv3d(half, width, 1), nn.GroupNorm(8, width))
        nn.init.zeros_(self.W[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        theta, phi, g = (part(x).flatten(2) for part in (self.theta, self.phi, self.g))
        likeness = functional.softmax(torch.matmul(theta.transpose(1, 2), phi), dim=-1)
        mixed = torch.matmul(likeness, g.transpose(1, 2)).transpose(1, 2).contiguous()
        return self.W(mixed.reshape(len(x), -1, *x.shape[2:])) + x


class PlainPlusUNet(nn.Module):
    """Maps (n, 1, z, y, x) to (n, 3, z, y, x) logits."""

    def __init__(self) -> None:
        super().__init__()
        before = (WIDTHS[0], *WIDTHS)
        kernels = [(3, 3, 3) if iso else (1, 3, 3) for iso in IS_ISOTROPIC]
        strides = [1, *(2 if iso else (1, 2, 2) for iso in IS_ISOTROPIC[1:])]
        self.conv_in = conv_norm_act(1, WIDTHS[0], (1, 5, 5))
        out = nn.Conv3d(WIDTHS[0], 3, (1, 5, 5), padding=(0, 2, 2), padding_mode="replicate")
        self.conv_out = nn.Sequential(out)
        self.down_layers = nn.ModuleList(
            nn.Sequential(nn.Identity(), conv_norm_act(a, w, k, stride=s), Block(w))
            for a, w, k, s in zip(before, WIDTHS, kernels, strides, strict=False)
        )
        self.up_layers = nn.ModuleList(
            nn.ModuleList([conv_norm_act(below, w, k), Block(w)])
            for w, below, k in zip(WIDTHS[:-1], WIDTHS[1:], kernels[1:], strict=True)
        )
        self.feat_layers = nn.ModuleList(
            conv_norm_act(WIDTHS[-1], w, (1, 1, 1), padding=(1, 1, 1)) for w in WIDTHS[:-1]
        )
        self.non_local = NonLocal(WIDTHS[-1])
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.orthogonal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to logits."""
        x = self.conv_in(x)
        skips = []
        for layer in self.down_layers:
            x = layer(x)
            skips.append(x)
        x = feature = self.non_local(skips.pop())
        for up, feat in zip(reversed(self.up_layers), reversed(self.feat_layers), strict=True):
            x = _upsample_add(up[0](x), skips.pop())
            x = up[1](_upsample_add(feat(feature), x))
        return self.conv_out(x)


def _upsample_add(low: Tensor, base: Tensor) -> Tensor:
    return functional.interpolate(low, size=base.shape[2:], mode="trilinear", align_corners=True) + base


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Weighted binary cross-entropy plus half a Dice loss, as `LossParams` has them by default."""
    share = targets.mean((1, 2, 3, 4), keepdim=True).clamp(0.2, 0.8)
    weight = torch.where(targets > 0, ((1 - share) / share).clamp(min=1), (share / (1 - share)).clamp(min=1))
    bce = functional.binary_cross_entropy_with_logits(logits, targets, weight)
    p, axes = torch.sigmoid(logits), (0, 2, 3, 4)
    ratio = (2 * (p * targets).sum(axes) + 100) / ((p * p).sum(axes) + targets.sum(axes) + 100)
    return bce + 0.5 * (1 - ratio).mean()


def plain_step(
    network: nn.Module, learning_rate: float, *, device: torch.device, amp: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """Give the incumbent's training step: takes image and targets, gives the loss.

    Parameters
    ----------
    network : nn.Module
        On the device.
    learning_rate : float
    device : torch.device
    amp : bool
        Its option MIXED_PRECISION, here with bf16; off by default, as there.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    network.train()

    def step(image: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = network(image)
            with torch.profiler.record_function("loss"):
                loss = plain_loss(logits.float(), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
