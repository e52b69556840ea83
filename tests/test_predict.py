from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synmlops.learning.checkpoint import Model, ModelMeta
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import autocast, predict, predict_array
from synmlops.params import CHANNELS, InferParams, NetworkParams

FLAT = NetworkParams(stem_zyx=(1, 1, 1), widths=(4,), kernels=((1, 3, 3),), pools=(), norm="batch")
POOLED = NetworkParams(stem_zyx=(1, 2, 2), widths=(4, 6), kernels=((1, 3, 3), (3, 3, 3)), pools=((2, 2, 2),))


class Constant(nn.Module):
    """Answers the same logits everywhere and keeps the shapes it was asked for."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        return self.logits[:, None, None, None].expand(len(image), -1, *image.shape[2:]).clone()


class Brightness(nn.Module):
    """Answers the logit of the (already normalised) intensity, in every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return torch.logit(image * self.scale, eps=1e-6).expand(-1, len(CHANNELS), -1, -1, -1)


def _model(network: nn.Module, params: NetworkParams = FLAT, *, mean: float = 0, std: float = 255) -> Model:
    meta = ModelMeta(network=params, channels=CHANNELS, mean=mean, std=std, voxel_nm=(40.0, 8.0, 8.0))
    return Model(network.eval(), meta)


def _trained(params: NetworkParams) -> Model:
    """Random weights, strong enough that probabilities differ from voxel to voxel."""
    torch.manual_seed(1)
    network = build_network(params)
    with torch.no_grad():
        network.head.weight *= 8  # type: ignore[union-attr, operator]
    return _model(network, params, mean=128, std=40)


def _params(window: tuple[int, int, int], overlap: float = 0.25, **more: Any) -> InferParams:
    return InferParams(**({"window_zyx": window, "overlap": overlap, "precision": "float32"} | more))


def _image(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 32, 32),  # the window
        (16, 64, 64),
        (9, 33, 47),  # one voxel more
        (3, 5, 7),  # smaller than the window, and no multiple of the pooling
        (1, 100, 31),
        (23, 32, 61),
    ],
)
def test_constant_network_gives_constants(shape: tuple[int, int, int], overlap: float) -> None:
    """The blending weights add up to one in every voxel, whatever the size."""
    network = Constant(0.0, 2.0, -30.0)
    slabs = list(predict(_model(network, POOLED), _image(*shape), params=_params((8, 32, 32), overlap)))
    out = np.concatenate([slab for _, slab in slabs], axis=1)
    assert out.shape == (3, *shape)
    assert out.dtype == np.uint8
    for channel, logit in enumerate((0.0, 2.0, -30.0)):
        exact = 255 / (1 + np.exp(-logit))
        assert set(np.unique(out[channel])) <= {np.floor(exact), np.ceil(exact)}
    assert (out[2] == 0).all()
    pool = POOLED.total_pool_zyx()
    assert all(n % p == 0 for seen in network.seen for n, p in zip(seen[2:], pool, strict=True))
    assert all(n <= w for seen in network.seen for n, w in zip(seen[2:], (8, 32, 32), strict=True))


def test_slabs_follow_each_other() -> None:
    slabs = list(predict(_model(Constant(0, 0, 0)), _image(21, 20, 20), params=_params((8, 16, 16))))
    starts = [z for z, _ in slabs]
    ends = [z + slab.shape[1] for z, slab in slabs]
    assert starts == [0, *ends[:-1]]
    assert ends[-1] == 21
    assert len(slabs) > 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_voxel_lands_where_it_came_from(dtype: Any) -> None:
    """Intensity in, intensity out: exact in uint8, rounded to the nearest in uint16."""
    top = np.iinfo(dtype).max
    image = np.random.default_rng(3).integers(0, top + 1, (11, 37, 29), dtype=dtype)
    out = predict_array(_model(Brightness(), std=top), image, params=_params((4, 16, 16), 0.3))
    for channel in out:
        assert np.abs(channel - image / top * 255).max() <= 0.5 + 1e-3


def test_normalises_by_the_model() -> None:
    image = np.full((2, 8, 8), 150, np.uint8)
    out = predict_array(_model(Brightness(), mean=100, std=200), image, params=_params((2, 8, 8)))
    assert (out == round(0.25 * 255)).all()


def test_rounds_to_the_nearest_grey_level() -> None:
    for probability, level in ((0.4, 102), (100.4 / 255, 100), (100.6 / 255, 101), (0.9999, 255)):
        logit = float(np.log(probability / (1 - probability)))
        out = predict_array(_model(Constant(*[logit] * 3)), _image(2, 4, 4), params=_params((2, 4, 4)))
        assert (out == level).all()


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    model, image = _trained(POOLED), _image(6, 50, 41)
    one = predict_array(model, image, params=_params((4, 16, 16)))
    many = predict_array(model, image, params=_params((4, 16, 16), batch_size=batch_size))
    assert np.ptp(one) > 50
    assert np.abs(one.astype(int) - many).max() <= 1  # another order of sums


def test_windows_agree_with_one_window_away_from_borders() -> None:
    """A network that sees 7 voxels: in windows or in one, the same where no window border is in sight.

    The image is one window wide in z, so only borders along y and x cut context off.
    """
    model, image = _trained(FLAT), _image(4, 48, 48)
    field = FLAT.receptive_field_zyx()
    assert field == (1, 7, 7)
    whole = predict_array(model, image, params=_params((4, 48, 48))).astype(int)
    parts = predict_array(model, image, params=_params((4, 24, 24), 0.5)).astype(int)
    assert np.ptp(whole) > 100
    inner = np.ones(48, bool)
    for edge in (0, 12, 24, 36, 48):  # every border of a window: 24 wide, in steps of 12
        inner[max(0, edge - field[1] // 2) : edge + field[1] // 2] = False
    away = np.abs(whole - parts)[:, :, inner][..., inner]
    assert away.size
    assert away.max() <= 1
    assert np.abs(whole - parts)[:, :, ~inner].max() > 1  # at the borders of windows context is missing


def test_blending_hides_window_borders() -> None:
    """Where windows overlap, the one whose border is farther away counts more."""
    model, image = _trained(FLAT), _image(4, 64, 64, seed=5)
    whole = predict_array(model, image, params=_params((4, 64, 64))).astype(int)
    errors = [
        np.abs(whole - predict_array(model, image, params=_params((4, 16, 16), overlap))).mean()
        for overlap in (0, 0.25, 0.5)
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_depth_is_read_and_kept_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is read at once nor what is summed up grows with the depth of the volume."""
    read: list[int] = []
    made: list[tuple[int, ...]] = []

    class Deep:
        shape = (90, 20, 20)

        def __getitem__(self, index: slice) -> NDArray[np.uint8]:
            read.append(index.stop - index.start)
            return _image(index.stop - index.start, 20, 20)

    zeros, concatenate = torch.zeros, torch.cat

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(tuple((out := zeros(*args, **kwargs)).shape))
        return out

    def joined(parts: Any, dim: int = 0) -> Tensor:
        made.append(tuple((out := concatenate(parts, dim=dim)).shape))
        return out

    monkeypatch.setattr(torch, "zeros", noted)
    monkeypatch.setattr(torch, "cat", joined)
    model = _model(Constant(0.0, 0.0, 0.0))
    n = sum(slab.shape[1] for _, slab in predict(model, Deep(), params=_params((8, 16, 16))))
    assert n == 90
    assert max(read) == 8
    kept = [shape for shape in made if len(shape) == 4]
    assert kept
    assert {shape[1] for shape in kept} == {8}


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    params = _params((4, 16, 16), batch_size=4)
    for _ in predict(
        _model(Constant(0, 0, 0)),
        _image(9, 40, 40),
        params=params,
        progress=lambda done, total: seen.append((done, total)),
    ):
        pass
    assert seen[-1] == (3 * 9, 3 * 9)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_precision() -> None:
    cpu = torch.device("cpu")
    x = torch.randn(8, 8)
    with autocast(cpu, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(cpu, "float32"):
        assert (x @ x).dtype == torch.float32
    model, image = _trained(POOLED), _image(4, 32, 32)
    exact = predict_array(model, image, params=_params((4, 32, 32)))
    rough = predict_array(model, image, params=_params((4, 32, 32), precision="bf16"))
    assert exact.dtype == rough.dtype == np.uint8
    difference = np.abs(exact.astype(int) - rough)
    assert difference.max() > 0
    assert difference.mean() < 2


def test_prediction_leaves_no_gradient_and_the_image_alone() -> None:
    model, image = _trained(FLAT), _image(2, 8, 8)
    before = image.copy()
    predict_array(model, image, params=_params((2, 8, 8)))
    np.testing.assert_array_equal(image, before)
    assert all(p.grad is None for p in model.network.parameters())
