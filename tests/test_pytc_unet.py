from typing import Any

import pytest
import torch
from pydantic import ValidationError

from synmlops.learning.native import without_kernels
from synmlops.learning.networks.registry import build_network
from synmlops.learning.networks.report import measured_field
from synmlops.learning.windows import windows_over
from synmlops.learning_params import InferParams, NetworkParams, SamplingParams, TrainParams, WindowParams
from synmlops.params import DataParams, Params, PhantomParams
from synmlops.section import SynmlopsError
from synmlops.volumes.prepared import Box

UNET = NetworkParams(
    name="pytc_unet",
    stem_zyx=(1, 1, 1),
    widths=(8, 8, 16),
    kernels=((1, 3, 3), (1, 3, 3), (3, 3, 3)),
    pools=((1, 2, 2), (2, 2, 2)),
    norm="batch",
    activation="elu",
)
NAMES = ("pytc_unet", "plus_unet")


def unet(**changes: Any) -> NetworkParams:
    return NetworkParams(**UNET.model_dump() | changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {"padding": "zeros", "activation": "leaky_relu"},
        {"padding": "reflect", "activation": "gelu", "norm": "group"},
        {"padding": "circular", "activation": "none", "squeeze_excite": True},
        {"pooling": True, "activation": "silu", "norm": "instance", "blocks": 2},
    ],
)
def test_every_choice_trains_and_kernels_change_nothing(name: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, image = build_network(unet(name=name, **changes)), torch.randn(2, 1, 5, 18, 23)
    results = []
    for plain in (False, True):
        network.zero_grad()
        if plain:
            with without_kernels():
                logits = network(image)
                logits.square().mean().backward()
        else:
            logits = network(image)
            logits.square().mean().backward()
        assert logits.shape == (2, 3, 5, 18, 23)
        results.append([logits.detach(), *(w.grad for w in network.parameters() if w.grad is not None)])
    assert len(results[0]) == 1 + len(list(network.parameters()))
    for fast, exact in zip(*results, strict=True):
        assert (fast - exact).abs().max() <= 1e-3 * exact.abs().max() + 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {"widths": (1, 1, 1)},
        {"widths": (1, 1, 1), "pooling": True},
        {"kernels": ((3, 3, 3), (3, 3, 3)), "pools": ((2, 2, 2),), "pooling": True},
        {"kernels": ((1, 3, 3), (3, 3, 3)), "pools": ((2, 1, 2),), "padding": "zeros", "blocks": 2},
        {"kernels": ((3, 3, 3), (1, 3, 3)), "pools": ((1, 2, 2),), "padding": "reflect"},
    ],
)
def test_receptive_field_bounds_the_gradient(name: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    params = unet(**{"name": name, "widths": (1, 1), "activation": "silu"} | changes)
    network = build_network(params)
    for weight in network.parameters():
        torch.nn.init.uniform_(weight, 0.1, 1)  # so that no gradient vanishes by chance
    measured = measured_field(network, params, gflop_per_megavoxel=1.0)
    field = params.receptive_field_zyx()
    assert measured is not None
    assert all(m <= f for m, f in zip(measured, field, strict=True)), (measured, field)
    assert all(m > f // 2 for m, f in zip(measured, field, strict=True)), (measured, field)


def test_plus_unet_adds_to_pytc_unet_what_it_has_more() -> None:
    plain, plus = (set(build_network(unet(name=name)).state_dict()) for name in NAMES)
    more = {name.partition(".")[0] for name in plus - plain}
    assert (more, plain - plus) == ({"non_local", "features"}, set())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stem_zyx": (1, 4, 4)}, r"stem_zyx: pytc_unet.*\[1, 4, 4\].*\[1, 1, 1\]"),
        ({"deep_supervision": 2}, r"deep_supervision: pytc_unet.*2.*residual_unet"),
        ({"widths": (8,), "kernels": ((1, 3, 3),), "pools": ()}, r"widths: pytc_unet.*\[8\]"),
    ],
)
def test_what_it_does_not_have_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(SynmlopsError, match=match):
        build_network(unet(**change))


@pytest.mark.parametrize("name", ["residual_unet", "light_unet"])
def test_networks_without_these_choices_refuse_them(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"network\.padding: {name}.*reflect.*null"):
        NetworkParams(name=name, padding="reflect")
    with pytest.raises(ValidationError, match=rf"network\.pooling: {name}.*false"):
        NetworkParams(name=name, pooling=True)
    assert NetworkParams(name=name, padding="zeros") != NetworkParams(name=name)


def _params(network: NetworkParams, patch_zyx: tuple[int, int, int]) -> Params:
    window = WindowParams(window_zyx=(4, 32, 32))
    return Params(
        data=DataParams(phantom=PhantomParams()),
        network=network,
        sampling=SamplingParams(patch_zyx=patch_zyx),
        train=TrainParams(validation=window),
        infer=InferParams(window_zyx=(4, 32, 32)),
    )


def test_sizes_may_be_one_more_than_a_multiple_where_corners_are_aligned() -> None:
    assert _params(UNET, (5, 33, 33)).sampling.patch_zyx == (5, 33, 33)
    for network, patch in ((unet(pooling=True), (5, 33, 33)), (UNET, (4, 34, 32))):
        with pytest.raises(ValidationError, match=r"sampling\.patch_zyx: .* is not a multiple of"):
            _params(network, patch)


def test_windows_of_one_voxel_more_stay_so_in_small_volumes() -> None:
    params = WindowParams(window_zyx=(5, 33, 33))
    box = Box((0, 0, 0), (3, 20, 100))
    axes = windows_over(box, shape_zyx=(3, 20, 100), pool_zyx=(2, 4, 4), params=params)
    assert [axis.size for axis in axes] == [3, 21, 33]


def test_a_single_voxel_cannot_be_reflected() -> None:
    assert _params(unet(padding="reflect"), (4, 32, 32))
    with pytest.raises(ValidationError, match=r"sampling\.patch_zyx: z=2 leaves one voxel.*use 4 or more"):
        _params(unet(padding="reflect"), (2, 32, 32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, {"padding": "circular", "pooling": True}, {"padding": "reflect"}])
def test_a_gpu_gives_what_a_cpu_gives(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, image = build_network(unet(**changes)).eval(), torch.randn(1, 1, 6, 40, 44)
    with torch.no_grad():
        here = network(image)
        there = network.cuda()(image.cuda()).cpu()
    torch.testing.assert_close(here, there, atol=2e-2, rtol=1e-2)  # TF32
