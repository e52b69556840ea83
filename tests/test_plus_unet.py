import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from synmlops.learning import native
from synmlops.learning.native import without_kernels
from synmlops.learning.networks.fast_conv import Conv3d
from synmlops.learning.networks.fast_norm import SqueezeExcite, normalise
from synmlops.learning.networks.fast_resize import upsample_add
from synmlops.learning.networks.kernels import kernels
from synmlops.learning.networks.registry import build_network
from synmlops.learning.pytc_weights import from_pytc
from synmlops.learning_params import NetworkParams
from synmlops.section import SynmlopsError

PLUS = NetworkParams(
    name="plus_unet",
    stem_zyx=(1, 1, 1),
    widths=(8, 16, 24, 32, 40),
    kernels=((1, 3, 3), (1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    pools=((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    activation="elu",
    squeeze_excite=True,
)
GOLDEN = {
    "unet_plus_3d_residual_se_gn": PLUS,
    "unet_plus_3d_residual_bn_swa": PLUS.model_copy(
        update={"widths": (8, 12, 16, 20, 24), "norm": "batch", "squeeze_excite": False}
    ),
}
needs_kernels = pytest.mark.skipif(kernels().library is None, reason=kernels().reason)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("size", ["", "_odd"])
def test_gives_what_the_incumbent_gives(shared: Callable[[str], Path], name: str, size: str) -> None:
    folder = shared("golden/pytc")
    weights = torch.load(folder / f"{name}.pth.tar", weights_only=True)["state_dict"]
    network = build_network(GOLDEN[name]).eval()
    network.load_state_dict(from_pytc(weights))
    with np.load(folder / f"{name}_io.npz") as arrays:
        image, logits = (torch.from_numpy(arrays[key + size]) for key in ("input", "logits"))
    with torch.no_grad():
        torch.testing.assert_close(network(image), logits, atol=1e-4, rtol=1e-5)
        with without_kernels():
            torch.testing.assert_close(network(image), logits, atol=3e-5, rtol=1e-5)


def test_a_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(SynmlopsError, match=r"encoder\.weight.*unet_plus_3d"):
        from_pytc({"encoder.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stem_zyx": (1, 4, 4)}, r"stem_zyx.*\[1, 4, 4\].*\[1, 1, 1\]"),
        ({"deep_supervision": 2}, "deep_supervision.*2.*residual_unet"),
        ({"widths": (8,), "kernels": ((1, 3, 3),), "pools": ()}, r"widths.*\[8\]"),
    ],
)
def test_what_it_does_not_have_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(SynmlopsError, match=match):
        build_network(PLUS.model_copy(update=change))


def test_receptive_field_bounds_the_gradient() -> None:
    """Outside the promised field no input voxel moves an output voxel; the widest reach is near it."""
    params = PLUS.model_copy(
        update={
            "widths": (8, 8),
            "kernels": ((1, 3, 3), (3, 3, 3)),
            "pools": ((2, 2, 2),),
            "norm": "batch",
            "squeeze_excite": False,
        }
    )
    network = build_network(params).eval()  # the non-local block starts without effect
    field = params.receptive_field_zyx()
    size = tuple(f + 4 - f % 2 for f in field)
    widest = np.zeros(3, int)
    for shift in range(2):  # where a voxel lies in the grid of the lowest level decides how far it sees
        image = torch.randn(1, 1, *size, requires_grad=True)
        z, y, x = (s // 2 + shift for s in size)
        with without_kernels():  # whose round-off leaks across a tile
            network(image)[0, :, z, y, x].sum().backward()
        assert image.grad is not None
        touched = image.grad[0, 0].nonzero()
        widest = np.maximum(widest, (touched.max(0).values - touched.min(0).values + 1).numpy())
    assert (widest <= field).all()
    assert (widest > np.array(field) * 0.6).all()


def _agree(fast: nn.Module, image: Tensor, *more: Tensor) -> None:
    """Compare output and all gradients of a layer with plain torch in double precision."""
    torch.manual_seed(1)
    results = []
    for dtype, is_plain in ((torch.float32, False), (torch.float64, True)):
        layer = fast.to(dtype).requires_grad_()
        layer.zero_grad()
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (image, *more)]
        if is_plain:
            with without_kernels():
                output = layer(*inputs)
        else:
            output = layer(*inputs)
        direction = torch.linspace(-1, 1, output.numel(), dtype=dtype).sin().reshape(output.shape)
        (output * direction).sum().backward()
        gradients = [tensor.grad for tensor in (*inputs, *layer.parameters())]
        results.append([output.detach(), *(g for g in gradients if g is not None)])
    assert len(results[0]) == 1 + 1 + len(more) + len(list(fast.parameters()))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 2e-5 * exact.abs().max()


@needs_kernels
@pytest.mark.parametrize("border", ["zeros", "replicate"])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size"),
    [
        ((8, 16), (1, 3, 3), (1, 1, 1), (3, 9, 13)),
        ((40, 8), (1, 3, 3), (1, 1, 1), (1, 34, 35)),  # several bands, and a row alone in the last tiles
        ((8, 8), (1, 3, 3), (1, 1, 1), (2, 3, 1)),  # smaller than a tile
        ((16, 24), (3, 3, 3), (1, 1, 1), (3, 6, 7)),
        ((8, 8), (3, 3, 3), (1, 1, 1), (1, 4, 5)),  # one section alone
        ((1, 8), (1, 5, 5), (1, 1, 1), (2, 9, 33)),
        ((8, 3), (1, 5, 5), (1, 1, 1), (2, 9, 33)),
        ((8, 3), (5, 5, 5), (1, 1, 1), (3, 7, 6)),
        ((8, 24), (1, 3, 3), (1, 2, 2), (2, 9, 30)),
        ((16, 8), (3, 3, 3), (2, 2, 2), (5, 8, 27)),
    ],
)
def test_a_convolution_and_its_gradients(
    border: str,
    channels: tuple[int, int],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    size: tuple[int, int, int],
) -> None:
    conv = Conv3d(*channels, kernel, stride=stride, border=border, bias=True)
    _agree(conv, torch.randn(2, channels[0], *size))


class _Normalise(nn.Module):
    def __init__(self, norm: nn.Module, activation: str, excite: SqueezeExcite | None) -> None:
        super().__init__()
        self.norm, self.activation, self.excite = norm, activation, excite
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return normalise(x, self.norm, self.activation, other=other, excite=self.excite)


@needs_kernels
@pytest.mark.parametrize("activation", ["none", "relu", "elu", "silu"])
@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(4, 16), nn.BatchNorm3d(16), nn.InstanceNorm3d(16, affine=True)]
)
def test_a_norm_with_all_that_follows_and_its_gradients(norm: nn.Module, activation: str) -> None:
    layer = _Normalise(norm, activation, SqueezeExcite(16, "elu"))
    image, other = torch.randn(2, 2, 16, 3, 5, 6).unbind()
    _agree(layer, 3 * image + 1, other)
    _agree(_Normalise(norm, activation, None), image)


@needs_kernels
def test_batch_norm_keeps_the_statistics_that_torch_keeps() -> None:
    ours, plain = nn.BatchNorm3d(8), nn.BatchNorm3d(8)
    image = 2 * torch.randn(2, 8, 2, 3, 4) + 1
    normalise(image, ours, "relu")
    plain(image)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    normalise(image, ours.eval(), "relu")
    torch.testing.assert_close(ours.running_mean, plain.running_mean)


class _Upsample(nn.Module):
    def forward(self, base: Tensor, *lows: Tensor) -> Tensor:
        return upsample_add(base, *lows)


@needs_kernels
def test_upsampling_and_its_gradients() -> None:
    _agree(_Upsample(), torch.randn(2, 8, 4, 9, 12), torch.randn(2, 8, 2, 5, 6), torch.randn(2, 8, 4, 1, 3))


@needs_kernels
def test_under_autocast_kernels_compute_in_float32() -> None:
    """Weights in bf16 would be taken for float32 by what knows float32 alone."""
    network, image = build_network(PLUS), torch.randn(1, 1, 4, 32, 32)
    results = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = network(image)
            logits.square().mean().backward()
        assert logits.dtype == torch.float32
        results.append([logits.detach(), *(w.grad for w in network.parameters() if w.grad is not None)])
    for exact, rough in zip(*results, strict=True):
        assert (exact - rough).norm() <= 0.05 * exact.norm() + 1e-6


@needs_kernels
def test_results_do_not_vary_between_runs() -> None:
    """A resumed run has to go the way that an uninterrupted one goes."""
    network, image = build_network(PLUS), torch.randn(1, 1, 4, 48, 48)
    gradients = []
    for _ in range(2):
        network.zero_grad()
        network(image).square().mean().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native._built.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    missing = kernels()
    native._built.cache_clear()
    assert missing.library is None
    assert "false could not build them" in missing.reason
    assert list((tmp_path / "synmlops").iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_a_cpu_gives() -> None:
    torch.manual_seed(0)
    network, image = build_network(PLUS).eval(), torch.randn(1, 1, 8, 64, 64)
    with torch.no_grad():
        here = network(image)
        there = network.cuda()(image.cuda()).cpu()
        with torch.autocast("cuda", torch.bfloat16):
            rough = network(image.cuda()).float().cpu()
    torch.testing.assert_close(here, there, atol=2e-2, rtol=1e-2)  # TF32
    assert (rough - here).abs().mean() < 0.05 * here.abs().mean()


@needs_kernels
def test_kernels_leave_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native._built.cache_clear()
    assert kernels().library is not None
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_a_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise PermissionError

    monkeypatch.setattr(native, "_cache_folder", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native._built.cache_clear()
    assert kernels().library is not None
    assert len(list(tmp_path.glob("synmlops_*/kernels_*.so"))) == 1
