import pytest
import torch

from synmlops.learning.networks.registry import NETWORKS, build_network, fold_voxels, unfold_voxels
from synmlops.params import NetworkParams, SynmlopsError

SMALL = NetworkParams(
    stem_zyx=(1, 2, 2),
    widths=(4, 6, 8),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    pools=((1, 2, 2), (2, 2, 2)),
    norm="batch",
)


def test_gives_three_logits_per_voxel() -> None:
    network = build_network(SMALL)
    assert network(torch.zeros(2, 1, 4, 16, 24)).shape == (2, 3, 4, 16, 24)


@pytest.mark.parametrize("norm", ["group", "batch", "instance"])
@pytest.mark.parametrize("activation", ["relu", "silu", "elu"])
def test_every_norm_and_activation_trains(norm: str, activation: str) -> None:
    params = SMALL.model_copy(update={"norm": norm, "activation": activation})
    network = build_network(params)
    network(torch.randn(2, 1, 4, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_receptive_field_bounds_the_gradient() -> None:
    """No input voxel outside the field that params promise moves an output voxel; some at its edge do."""
    network = build_network(SMALL).eval()  # batch norm in evaluation mode has no reach of its own
    field = SMALL.receptive_field_zyx()
    image = torch.randn(1, 1, 24, 96, 96, requires_grad=True)
    z, y, x = 12, 48, 48
    network(image)[0, :, z, y, x].sum().backward()
    assert image.grad is not None
    touched = image.grad[0, 0].nonzero()
    width = (touched.max(0).values - touched.min(0).values + 1).tolist()
    assert all(w <= f for w, f in zip(width, field, strict=True))
    assert all(w > f // 2 for w, f in zip(width, field, strict=True))


def test_exclusive_channels_are_a_softmax() -> None:
    torch.manual_seed(0)
    network = build_network(SMALL.model_copy(update={"exclusive": True})).eval()
    pre, post, union = torch.sigmoid(network(3 * torch.randn(1, 1, 4, 16, 16)))[0]
    torch.testing.assert_close(pre + post, union)
    assert union.max() < 1
    assert (pre - post).abs().max() > 0.01


def test_fold_keeps_neighbouring_voxels_together() -> None:
    image = torch.arange(16.0).reshape(1, 1, 1, 4, 4)
    assert fold_voxels(image, (1, 2, 2))[0, :, 0, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(unfold_voxels(fold_voxels(image, (1, 2, 2)), (1, 2, 2)), image)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(SynmlopsError, match=f"unet9.*{next(iter(NETWORKS))}"):
        build_network(SMALL.model_copy(update={"name": "unet9"}))
