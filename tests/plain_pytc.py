"""PyTorch Connectomics' U-Nets in plain torch, with its names of weights; converted models equal them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Sizes = tuple[int, int, int]
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "efficient_swish": nn.SiLU,
    "none": nn.Identity,
}
NORMS = {
    "bn": nn.BatchNorm3d,
    "sync_bn": nn.BatchNorm3d,
    "in": nn.InstanceNorm3d,
    "gn": lambda width: nn.GroupNorm(8, width),
}


@dataclass(frozen=True)
class Form:
    """Settings as its MODEL section and DATASET.IS_ISOTROPIC have them."""

    plus: bool = False
    excite: bool = False
    filters: tuple[int, ...] = (8, 16, 24)
    isotropy: tuple[bool, ...] = (False, False, True)
    is_isotropic: bool = False
    norm: str = "bn"
    act: str = "elu"
    pad: str = "replicate"
    pooling: bool = False
    planes: int = 3

    def config(self) -> dict[str, dict[str, object]]:
        """Give the sections of its YAML file."""
        model = {
            "ARCHITECTURE": "unet_plus_3d" if self.plus else "unet_3d",
            "BLOCK_TYPE": "residual_se" if self.excite else "residual",
            "FILTERS": list(self.filters),
            "ISOTROPY": list(self.isotropy),
            "NORM_MODE": self.norm,
            "ACT_MODE": self.act,
            "PAD_MODE": self.pad,
            "POOLING_LAYER": self.pooling,
            "OUT_PLANES": self.planes,
        }
        return {"MODEL": model, "DATASET": {"IS_ISOTROPIC": self.is_isotropic}}


def unit(
    form: Form, before: int, width: int, kernel: Sizes, *, stride: Sizes = (1, 1, 1), act: bool = True
) -> nn.Sequential:
    """Build convolution, norm and activation."""
    padding = (1, 1, 1) if kernel == (1, 1, 1) else tuple(size // 2 for size in kernel)
    conv = nn.Conv3d(before, width, kernel, stride, padding, bias=False, padding_mode=form.pad)
    return nn.Sequential(conv, NORMS[form.norm](width), ACTIVATIONS[form.act]() if act else nn.Identity())


class Excite(nn.Module):
    def __init__(self, form: Form, width: int) -> None:
        super().__init__()
        narrow, wide = nn.Linear(width, width // 4, bias=False), nn.Linear(width // 4, width, bias=False)
        self.fc = nn.Sequential(narrow, ACTIVATIONS[form.act](), wide)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3, 4))).sigmoid()[:, :, None, None, None]


class Block(nn.Module):
    def __init__(self, form: Form, width: int) -> None:
        super().__init__()
        flat = (1, 3, 3)
        convs = nn.Sequential(unit(form, width, width, flat), unit(form, width, width, flat, act=False))
        self.conv = nn.Sequential(convs, Excite(form, width)) if form.excite else convs
        self.act = ACTIVATIONS[form.act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + x)


class NonLocal(nn.Module):
    def __init__(self, form: Form, width: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv3d(width, width // 2, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv3d(width // 2, width, 1), NORMS[form.norm](width))

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (part(x).flatten(2) for part in (self.theta, self.phi, self.g))
        mixed = (theta.transpose(1, 2) @ phi).softmax(-1) @ g.transpose(1, 2)
        return self.W(mixed.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])) + x


class PlainUNet(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, w = form, form.filters
        cubic = [form.is_isotropic or level for level in form.isotropy]
        kernels = [(3, 3, 3) if level else (1, 3, 3) for level in cubic]
        self.steps = [(1, 1, 1), *((2, 2, 2) if level else (1, 2, 2) for level in cubic[1:])]
        strides = [(1, 1, 1) if form.pooling else step for step in self.steps]
        wide = (5, 5, 5) if form.is_isotropic else (1, 5, 5)
        self.conv_in = unit(form, 1, w[0], wide)
        padding = tuple(size // 2 for size in wide)
        self.conv_out = nn.Sequential(
            nn.Conv3d(w[0], form.planes, wide, padding=padding, padding_mode=form.pad)
        )
        each = zip((w[0], *w), w, kernels, strides, strict=False)
        self.down_layers = nn.ModuleList(
            nn.Sequential(nn.Identity(), unit(form, a, b, k, stride=s), Block(form, b)) for a, b, k, s in each
        )
        self.up_layers = nn.ModuleList(
            nn.ModuleList([unit(form, b, a, k), Block(form, a)])
            for a, b, k in zip(w[:-1], w[1:], kernels[1:], strict=True)
        )
        if form.plus:
            self.feat_layers = nn.ModuleList(unit(form, w[-1], a, (1, 1, 1)) for a in w[:-1])
            self.non_local = NonLocal(form, w[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        skips = []
        for layer, step in zip(self.down_layers, self.steps, strict=True):
            x = layer(functional.max_pool3d(x, step) if self.form.pooling else x)
            skips.append(x)
        x = skips.pop()
        x = lowest = self.non_local(x) if self.form.plus else x
        for n in reversed(range(len(skips))):
            x = self._upsampled(self.up_layers[n][0](x), skips[n]) + skips[n]
            if self.form.plus:
                x = x + self._upsampled(self.feat_layers[n](lowest), x)
            x = self.up_layers[n][1](x)
        return self.conv_out(x)

    def _upsampled(self, low: Tensor, base: Tensor) -> Tensor:
        aligned = not self.form.pooling
        return functional.interpolate(low, base.shape[2:], mode="trilinear", align_corners=aligned)


def plain_unet(form: Form) -> PlainUNet:
    """Build one in evaluation mode, with norms that scale and shift as after training."""
    torch.manual_seed(3)
    network = PlainUNet(form).eval()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.dim() == 1:
            value.add_(0.3 * torch.randn(len(value)))
    return network
