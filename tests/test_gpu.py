"""The kernels and the inference that only a GPU has."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from synmlops.learning.checkpoint import Model, ModelMeta
from synmlops.learning.networks import gpu
from synmlops.learning.networks.fast_norm import normalise
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import Predictor
from synmlops.learning.replay import Replay
from synmlops.params import CHANNELS, InferParams, NetworkParams
from synmlops.volumes.prepared import Box

DEEP = {"widths": (16, 24, 48), "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)), "pools": ((1, 2, 2), (2, 2, 2))}
PLAIN = {"stem_zyx": (1, 1, 1), **DEEP}
NETWORKS = {
    "residual": NetworkParams(**DEEP),
    "light": NetworkParams(name="light_unet", **DEEP),
    "plus": NetworkParams(name="plus_unet", squeeze_excite=True, activation="elu", **PLAIN),
    "pytc": NetworkParams(name="pytc_unet", norm="batch", padding="circular", pooling=True, **PLAIN),
    "instance": NetworkParams(name="pytc_unet", norm="instance", padding="zeros", **PLAIN),
}
TYPES = (torch.float32, torch.bfloat16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, needs_gpu]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to("cuda", dtype)
    return x.contiguous(memory_format=torch.channels_last_3d)


def trained(name: str) -> Model:
    torch.manual_seed(1)
    network = build_network(NETWORKS[name]).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    params = NETWORKS[name]
    return Model(
        network, ModelMeta(network=params, channels=CHANNELS, mean=128.0, std=40.0, voxel_nm=(40, 8, 8))
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [1, 3, 32, 48, 192])
@torch.no_grad()
def test_kernels_give_what_torch_gives(dtype: torch.dtype, channels: int) -> None:
    x, other = (noise(2, channels, 5, 17, 31, dtype=dtype, seed=seed) for seed in (0, 1))
    wide = x.double()
    sums = torch.stack([wide.sum((2, 3, 4)), wide.square().sum((2, 3, 4))], 1)
    assert_close(gpu.moments(x), sums, rtol=1e-5, atol=1e-2)
    scale, shift = (noise(2, channels, 1, 1, 1, seed=seed)[:, :, 0, 0, 0].contiguous() for seed in (2, 3))
    activations = (lambda u: u, functional.relu, functional.elu)
    for kind, activation in enumerate(activations):
        for added in (None, other):
            u = x.float() * scale[:, :, None, None, None] + shift[:, :, None, None, None]
            u = u if added is None else u + added.float()
            assert_close(gpu.scale_shift(x, added, scale, shift, kind), activation(u).to(dtype))
    for widths in ((0, 1, 1), (1, 2, 2), (0, 0, 3)):
        ends = [width for width in reversed(widths) for _ in range(2)]
        assert_close(
            gpu.pad_replicate(x, widths), functional.pad(x.float(), ends, mode="replicate").to(dtype)
        )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sizes", [[(5, 9, 16)], [(1, 1, 1)], [(3, 9, 16), (1, 4, 5)]])
@torch.no_grad()
def test_upsampling_gives_what_torch_gives(
    dtype: torch.dtype, aligned: bool, sizes: list[tuple[int, int, int]]
) -> None:
    base, lows = noise(2, 24, 5, 17, 31, dtype=dtype), [noise(2, 24, *size, dtype=dtype) for size in sizes]
    expected = base.float()
    for low in lows:
        expected = expected + functional.interpolate(
            low.float(), base.shape[2:], mode="trilinear", align_corners=aligned
        )
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    assert_close(gpu.upsample_add(base, lows, aligned=aligned), expected.to(dtype), **close)


@torch.no_grad()
def test_norms_with_an_offset_far_from_zero() -> None:
    x = noise(1, 16, 8, 64, 64) + 300
    for norm in (nn.GroupNorm(8, 16), nn.InstanceNorm3d(16, affine=True)):
        ours = normalise(x, norm.cuda().eval(), "relu")
        assert_close(ours, functional.relu(norm.double()(x.double())).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network, image = trained(name).network.cuda(), noise(2, 1, 8, 48, 64)

    def gradients(network: nn.Module, image: Tensor) -> list[Tensor]:
        network.zero_grad()
        logits: Tensor = network(image)
        weights = torch.linspace(-1, 1, logits.numel(), device="cuda", dtype=logits.dtype)
        (logits * weights.reshape(logits.shape)).sum().backward()
        return [
            logits.detach(),
            *(weight.grad.clone() for weight in network.parameters() if weight.grad is not None),
        ]

    exact = gradients(copy.deepcopy(network).double(), image.double())  # float64, which no kernel takes
    ours = gradients(network, image)
    monkeypatch.setattr(gpu, "takes", lambda x: False)
    theirs = gradients(network, image)
    for mine, torchs, right in zip(ours, theirs, exact, strict=True):
        # instance norm makes float32's own error 0.0015 of some gradients
        assert (mine - right).norm() <= 3 * (torchs - right).norm() + 1e-4 * right.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_training_in_bf16_comes_to_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, losses = noise(2, 1, 8, 48, 64), []
    for takes in (gpu.takes, lambda x: False):
        monkeypatch.setattr(gpu, "takes", takes)
        network = trained(name).network.cuda().train()
        optimizer, course = torch.optim.AdamW(network.parameters(), lr=5e-3), []
        for _ in range(30):
            with torch.autocast("cuda", torch.bfloat16):
                logits = network(image)
            target = (image > 1).float().expand(logits.shape)
            loss = functional.binary_cross_entropy_with_logits(logits.float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        losses.append(course)
    ours, theirs = np.array(losses)
    assert ours[-1] < 0.9 * ours[0]
    assert abs(ours[-1] - theirs[-1]) < 0.1 * theirs[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_what_a_cpu_gives(name: str) -> None:
    network, image = trained(name).network, noise(2, 1, 8, 48, 64)
    with torch.inference_mode():
        here = network(image.cpu())
        precise = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        there = network.cuda()(image).cpu()
        torch.backends.cudnn.allow_tf32 = precise
        with torch.autocast("cuda", torch.bfloat16):
            rough = network(image).float().cpu()
    assert_close(there, here, atol=1e-3, rtol=1e-3)
    assert (rough - here).abs().mean() < 0.05 * here.abs().mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recording_gives_what_was_recorded(name: str) -> None:
    network = trained(name).network.cuda()
    replay = Replay(network, "bf16")
    for seed in range(4):
        image = noise(2, 1, 8, 32, 48, seed=seed)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            expected = network(image)
        assert_close(replay(image), expected, rtol=0, atol=0)
    other = noise(1, 1, 8, 32, 32)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        expected = network(other)
    assert_close(replay(other), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"fade": 0.5}, {"views": 16}, {"blend": "gaussian"}, {"batch_size": 3}]
)
def test_a_volume_is_as_on_a_cpu_within_a_grey_level(changes: dict[str, Any]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (21, 70, 90), dtype=np.uint8)
    image[:8, :32, :32] = 0
    mask = np.ones(image.shape, bool)
    mask[:, 50:] = False
    params = InferParams(window_zyx=(8, 32, 32), precision="float32", **changes)
    box = Box((0, 0, 0), (21, 70, 90))
    model = trained("residual")
    here = Predictor([model], shape_zyx=image.shape, params=params)(image, box, mask=mask)
    there = Predictor([Model(model.network.cuda(), model.meta)], shape_zyx=image.shape, params=params)
    pending = [there.begin(image, box, mask=mask) for _ in range(3)]  # none waits for another
    for one in pending:
        difference = np.abs(one.result().astype(int) - here)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_a_batch_becomes_smaller_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    run = Replay.__call__

    def limited(self: Replay, image: Tensor) -> Tensor:
        tried.append(len(image))
        if len(image) > 20:
            raise torch.OutOfMemoryError
        return run(self, image)

    monkeypatch.setattr(Replay, "__call__", limited)
    image = np.random.default_rng(0).integers(0, 256, (8, 256, 256), dtype=np.uint8)
    box, model = Box((0, 0, 0), (8, 256, 256)), trained("residual")
    model.network.cuda()

    def predictor(**changes: Any) -> Predictor:
        params = InferParams(window_zyx=(8, 32, 32), precision="float32", **changes)
        return Predictor([model], shape_zyx=image.shape, params=params)

    done: list[int] = []
    out = predictor()(image, box, progress=done.append)
    assert tried[0] == predictor().count(box)  # all there are, which do not fill a GPU
    assert tried[-1] <= 20
    assert sum(done) == predictor().count(box)
    assert np.abs(predictor(batch_size=1)(image, box).astype(int) - out).max() <= 1
    with pytest.raises(torch.OutOfMemoryError):  # what the user asked for is not changed
        predictor(batch_size=64)(image, box)
