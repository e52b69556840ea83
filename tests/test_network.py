"""The built-in networks: shapes, levels, how far they see, and what their options do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synmlops.learning.networks.fast_norm import SqueezeExcite
from synmlops.learning.networks.layers import Conv3d, ResidualBlock, fold_voxels, unfold_voxels
from synmlops.learning.networks.own import check_network
from synmlops.learning.networks.registry import NETWORKS, build_network
from synmlops.params import NetworkParams, SynmlopsError

SMALL = NetworkParams(
    stem_zyx=(1, 2, 2),
    widths=(4, 6, 8),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    pools=((1, 2, 2), (2, 2, 2)),
    norm="batch",
)
FOLDED = ("residual_unet", "light_unet")


def small(**changes: Any) -> NetworkParams:
    return SMALL.model_copy(update=changes)


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("norm", ["group", "batch", "instance"])
@pytest.mark.parametrize("activation", ["relu", "silu", "elu", "gelu"])
def test_every_norm_and_activation_trains(name: str, norm: str, activation: str) -> None:
    params = small(name=name, norm=norm, activation=activation, squeeze_excite=activation == "elu")
    network = build_network(params)
    logits = network(torch.randn(2, 1, 4, 16, 24))
    assert logits.shape == (2, 3, 4, 16, 24)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_built_in_network_does_what_is_wanted_of_a_users(name: str) -> None:
    for exclusive in (False, True):
        fold = (1, 1, 1) if name in ("plus_unet", "pytc_unet") else (1, 4, 4)
        params = NetworkParams(name=name, exclusive=exclusive, stem_zyx=fold)
        check_network(build_network(params), params)


def _touched(params: NetworkParams) -> list[int]:
    """Width along z, y, x of the input voxels whose change moves the middle output voxel."""
    torch.manual_seed(0)
    network = build_network(params).eval().double()  # exact zeros: fast convolutions round off in float32
    sizes = zip(params.receptive_field_zyx(), params.total_pool_zyx(), strict=True)
    z, y, x = ((field // pool + 3) * pool for field, pool in sizes)  # so that more would be seen
    image = torch.randn(1, 1, z, y, x, dtype=torch.float64, requires_grad=True)
    network(image)[0, :, z // 2, y // 2, x // 2].sum().backward()
    assert image.grad is not None
    at = image.grad[0, 0].nonzero()
    return (at.max(0).values - at.min(0).values + 1).tolist()


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exclusive": True, "deep_supervision": 2, "activation": "elu"},
        {"kernels": ((1, 5, 5), (1, 3, 3), (5, 3, 3)), "stem_zyx": (1, 1, 2)},
        {"blocks": 2, "widths": (4, 6), "kernels": ((3, 3, 3), (1, 3, 3)), "pools": ((1, 2, 2),)},
    ],
    ids=["plain", "supervised", "kernels", "blocks"],
)
def test_receptive_field_bounds_the_gradient(name: str, changes: dict[str, Any]) -> None:
    """No input voxel outside the field that params promise moves an output voxel; some at its edge do."""
    params = small(name=name, **changes)
    field, width = params.receptive_field_zyx(), _touched(params)
    assert all(w <= f for w, f in zip(width, field, strict=True)), (width, field)
    assert all(w > f // 2 for w, f in zip(width, field, strict=True)), (width, field)


@pytest.mark.parametrize("name", FOLDED)
def test_deep_supervision_gives_coarser_logits_while_training(name: str) -> None:
    params = small(name=name, deep_supervision=2)
    network = build_network(params)
    fine, middle, low = network(torch.randn(2, 1, 4, 16, 24))
    assert [tuple(one.shape) for one in (fine, middle, low)] == [
        (2, 3, 4, 16, 24),
        (2, 3, 4, 8, 12),
        (2, 3, 2, 4, 6),
    ]
    assert isinstance(network.eval()(torch.randn(1, 1, 4, 16, 24)), Tensor)


def test_a_coarse_level_lies_where_the_fine_one_does() -> None:
    """An output voxel of a coarser level looks at the input around its own place, however folds unfold."""
    network = build_network(small(kernels=((1, 1, 1),) * 3, deep_supervision=2))
    image = torch.randn(1, 1, 8, 64, 64, requires_grad=True)
    for block in network.modules():
        if isinstance(block, nn.BatchNorm3d):
            block.eval()  # whose statistics would reach everywhere
    for level, factor in enumerate((1, 2, 4)):
        logits = network(image)[level]
        (gradient,) = torch.autograd.grad(logits[0, :, 0, 32 // factor, 16 // factor].sum(), image)
        at = gradient[0, 0].abs().sum(0).nonzero()
        assert at.min(0).values.tolist() == [32, 16]
        assert at.max(0).values.tolist() == [39, 23]  # a voxel of the lowest level is 2 x 8 x 8


def test_exclusive_channels_are_a_softmax_at_every_level() -> None:
    torch.manual_seed(0)
    network = build_network(small(exclusive=True, deep_supervision=1))
    for logits in network(3 * torch.randn(1, 1, 4, 16, 16)):
        pre, post, union = torch.sigmoid(logits)[0]
        torch.testing.assert_close(pre + post, union)
        assert union.max() < 1
        assert (pre - post).abs().max() > 0.01


def test_squeeze_excite_weighs_whole_channels_by_what_all_channels_say() -> None:
    block = ResidualBlock(8, (1, 3, 3), NetworkParams(squeeze_excite=True)).eval()
    assert block.excite is not None
    nn.init.normal_(block.norm2.bias)  # as training makes it; else every mean is 0
    x = torch.randn(1, 8, 2, 4, 4)
    inner = block.norm2(block.conv2(torch.relu(block.norm1(block.conv1(x)))))
    weight = block.excite(inner.mean((2, 3, 4)))
    torch.testing.assert_close(block(x), torch.relu(inner * weight[:, :, None, None, None] + x))
    assert 0 < weight.min() < weight.max() < 1
    one_more = torch.eye(8)[:1] * 3.0
    assert (block.excite(inner.mean((2, 3, 4)) + one_more) != weight)[0, 1:].any()
    with_it, without = build_network(small(squeeze_excite=True)), build_network(SMALL)
    assert sum(isinstance(m, SqueezeExcite) for m in with_it.modules()) == 5
    assert not any(isinstance(m, SqueezeExcite) for m in without.modules())


@pytest.mark.parametrize("shape", [(1, 6, 3, 5, 7), (2, 6, 4, 8, 8)])
@pytest.mark.parametrize(
    "changes", [{}, {"stride": (1, 2, 2), "padding": 0}, {"groups": 6, "bias": False}, {"kernel_size": 1}]
)
def test_a_convolution_is_that_of_torch(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    ours = Conv3d(6, 6, **({"kernel_size": (1, 3, 3), "padding": (0, 1, 1)} | changes)).double().float()
    theirs = copy.deepcopy(ours)
    theirs.__class__ = nn.Conv3d
    gradients = []
    for conv in (ours, theirs):
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).requires_grad_()
        y = conv(x)
        (y * y).sum().backward()
        gradients.append((y, x.grad, conv.weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_bf16_reaches_the_convolutions() -> None:
    network = build_network(SMALL).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert network(torch.zeros(1, 1, 4, 16, 16)).dtype == torch.bfloat16


def test_fold_keeps_neighbouring_voxels_together() -> None:
    image = torch.arange(16.0).reshape(1, 1, 1, 4, 4)
    assert fold_voxels(image, (1, 2, 2))[0, :, 0, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(unfold_voxels(fold_voxels(image, (1, 2, 2)), (1, 2, 2)), image)


@pytest.mark.parametrize(
    ("name", "said"), [("unet9", "residual_unet, light_unet"), ("ligt_unet", "did you mean light_unet")]
)
def test_unknown_name_lists_the_known(name: str, said: str) -> None:
    with pytest.raises(SynmlopsError, match=f"{name}.*{said}"):
        build_network(small(name=name))
