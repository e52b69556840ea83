from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synmlops.blockwise.grid import BlockGrid
from synmlops.learning import predict as predict_module
from synmlops.learning.checkpoint import Model, ModelMeta
from synmlops.learning.networks.registry import build_network
from synmlops.learning.precision import autocast
from synmlops.learning.predict import Predictor, predict, predict_array
from synmlops.learning.windows import GROWTH
from synmlops.params import CHANNELS, InferParams, NetworkParams, SynmlopsError
from synmlops.volumes.prepared import Box

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


class OfTheWindow(nn.Module):
    """Answers one logit throughout a window: its mean intensity."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, image: Tensor) -> Tensor:
        return (self.scale * image.mean((1, 2, 3, 4), keepdim=True)).expand(-1, 3, *image.shape[2:]).clone()


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
    assert all(
        n <= w * (1 + GROWTH) for seen in network.seen for n, w in zip(seen[2:], (8, 32, 32), strict=True)
    )


def test_slabs_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_module, "SLAB_VOXELS", 1)
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
    image[0, 0, 0] = 160
    out = predict_array(_model(Brightness(), mean=100, std=200), image, params=_params((2, 8, 8)))
    assert (out[:, 1] == round(0.25 * 255)).all()


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
    parts = predict_array(model, image, params=_params((4, 24, 24), 0)).astype(int)
    assert np.ptp(whole) > 100
    inner = np.ones(48, bool)
    for edge in (0, 24, 48):  # every border of a window
        inner[max(0, edge - field[1] // 2) : edge + field[1] // 2] = False
    away = np.abs(whole - parts)[:, :, inner][..., inner]
    assert away.size
    assert away.max() <= 1
    assert np.abs(whole - parts)[:, :, ~inner].max() > 1  # at the borders of windows context is missing
    enough = predict_array(model, image, params=_params((4, 24, 24), 0.5)).astype(int)
    assert np.abs(whole - enough).max() <= 1  # each window sees 6 voxels beyond what it answers for


def test_context_hides_window_borders() -> None:
    """The more of a window is context alone, the less do borders show."""
    model, image = _trained(FLAT), _image(4, 64, 64, seed=5)
    whole = predict_array(model, image, params=_params((4, 64, 64))).astype(int)

    def error(overlap: float, fade: float = 0) -> float:
        parts = predict_array(model, image, params=_params((4, 16, 16), overlap, fade=fade))
        return float(np.abs(whole - parts).mean())

    assert error(0) > 2 * error(0.25) > 2 * error(0.5)
    assert error(0.5) == 0  # four voxels of context, three are needed
    assert error(0.25, fade=1) < error(0)


def test_fading_makes_slopes_of_steps() -> None:
    """Where windows disagree, as those of a network that looks at all of its window do."""
    image = np.broadcast_to(np.arange(64, dtype=np.uint8) * 3, (4, 16, 64)).copy()
    image[0, 0, ::2] += 1  # tissue, not one grey level
    steps = []
    for fade in (0, 1):
        out = predict_array(_model(OfTheWindow()), image, params=_params((4, 16, 16), 0.5, fade=fade))
        steps.append(np.abs(np.diff(out[0, 2, 8].astype(int))))
    assert (steps[0] > 0).sum() == (steps[0] > 5).sum() > 2  # from cell to cell alone
    assert 0 < steps[1].max() < steps[0].max() / 3
    assert steps[1].sum() == steps[0].sum()


@pytest.mark.parametrize("fade", [0, 1])
@pytest.mark.parametrize("block", [(3, 9, 9), (4, 16, 40), (7, 33, 100), (100, 10, 100)])
def test_blocks_equal_the_whole(block: tuple[int, int, int], fade: float) -> None:
    """In steps of any size, of a region within a volume, with views and a batch of several windows."""
    model, image = _trained(POOLED), _image(13, 61, 47)
    image[:, :20, 30:] = 7  # no tissue
    region = Box((1, 0, 5), (12, 61, 46))
    params = _params((8, 24, 32), 0.4, fade=fade, views=4, batch_size=3)
    predictor = Predictor([model], shape_zyx=image.shape, region=region, params=params)
    whole = predictor(image[predictor.to_read(region).slices], region)
    assert np.ptp(whole) > 50
    out = np.zeros((3, *image.shape), np.uint8)
    for one in BlockGrid(region, block):
        read = predictor.to_read(one.write)
        out[(slice(None), *one.write.slices)] = predictor(image[read.slices], one.write)
    parts = out[(slice(None), *region.slices)]
    assert np.abs(parts.astype(int) - whole).max() <= 1
    assert (parts == whole).mean() > 0.99


def test_a_slab_of_one_grey_level_is_no_tissue() -> None:
    image = _image(4, 16, 64)
    image[:, :, :32] = 200
    model = _model(Constant(0.0, 1.0, 2.0))
    out = predict_array(model, image, params=_params((4, 16, 16), 0))
    assert not out[..., :32].any()
    assert out[..., 32:].all()
    assert len(model.network.seen) == 2  # type: ignore[arg-type]


def test_a_mask_leaves_windows_out() -> None:
    image, mask = _image(4, 16, 64), np.zeros((4, 16, 64), bool)
    mask[1, 3, 17] = mask[:, :, 60:] = True
    model = _model(Constant(0.0, 1.0, 2.0))
    box = Box((0, 0, 0), image.shape)
    out = Predictor([model], shape_zyx=image.shape, params=_params((4, 16, 16), 0))(image, box, mask=mask)
    assert ((out > 0) == mask).all()
    assert len(model.network.seen) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("views", [4, 8, 16])
def test_views_are_turned_back(views: Literal[4, 8, 16]) -> None:
    """A network that looks at single voxels says the same from every side; one that looks about does not."""
    image = _image(5, 40, 40)
    plain, turned = (
        predict_array(_model(Brightness()), image, params=_params((4, 16, 16), views=n)) for n in (1, views)
    )
    assert np.abs(plain.astype(int) - turned).max() <= 1
    model = _trained(POOLED)
    whole = predict_array(model, image, params=_params((4, 16, 16), views=views))
    flipped = predict_array(model, image[:, ::-1].copy(), params=_params((6, 40, 40), views=views))
    straight = predict_array(model, image, params=_params((6, 40, 40), views=views))
    assert np.abs(flipped[:, :, ::-1].astype(int) - straight).max() <= 1
    assert np.abs(whole.astype(int) - predict_array(model, image, params=_params((4, 16, 16)))).max() > 20


@pytest.mark.parametrize(("merge", "expected"), [("mean", 0.5), ("min", 0.25), ("max", 0.75)])
def test_models_are_merged(merge: Literal["mean", "min", "max"], expected: float) -> None:
    models = [_model(Constant(*[float(np.log(p / (1 - p)))] * 3)) for p in (0.25, 0.75)]
    out = predict_array(models, _image(2, 8, 8), params=_params((2, 8, 8), merge=merge))
    assert (out == round(expected * 255)).all()


def test_models_of_different_channels_are_not_merged() -> None:
    one = _model(Constant(0, 0, 0))
    other = Model(one.network, one.meta.model_copy(update={"channels": ("union",)}))
    with pytest.raises(SynmlopsError, match="pre, post, union and union"):
        predict_array([one, other], _image(2, 8, 8), params=_params((2, 8, 8)))


def test_only_what_the_model_knows_comes_out() -> None:
    one = _model(Constant(0.0, 1.0, 2.0))
    known = Model(one.network, one.meta.model_copy(update={"channels": ("post", "union")}))
    image = _image(2, 8, 8)
    every = predict_array(one, image, params=_params((2, 8, 8)))
    np.testing.assert_array_equal(predict_array(known, image, params=_params((2, 8, 8))), every[1:])


def test_grey_levels_of_the_volume_may_replace_those_of_training() -> None:
    image = _image(2, 8, 8)
    box = Box((0, 0, 0), image.shape)
    plain = Predictor([_model(Brightness())], shape_zyx=image.shape, params=_params((2, 8, 8)))
    other = Predictor(
        [_model(Brightness())], shape_zyx=image.shape, params=_params((2, 8, 8)), grey=(10, 510)
    )
    expected = np.clip((image.astype(float) - 10) / 510, 0, 1) * 255
    assert np.abs(other(image, box)[0] - expected).max() <= 0.51
    assert (other(image, box) != plain(image, box)).any()


def test_an_image_of_another_shape_is_refused() -> None:
    predictor = Predictor([_model(Constant(0, 0, 0))], shape_zyx=(2, 8, 8), params=_params((2, 8, 8)))
    with pytest.raises(ValueError, match=r"\(2, 8, 7\) must be of \(2, 8, 8\)"):
        predictor(_image(2, 8, 7), Box((0, 0, 0), (2, 8, 8)))


def test_depth_is_read_and_kept_a_slab_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is read at once nor what is computed grows with the depth of the volume."""
    monkeypatch.setattr(predict_module, "SLAB_VOXELS", 12 * 20 * 20)
    read: list[int] = []

    class Deep:
        shape = (90, 20, 20)

        def __getitem__(self, index: tuple[slice, ...]) -> NDArray[np.uint8]:
            read.append(index[0].stop - index[0].start)
            return _image(read[-1], 20, 20)

    model = _model(Constant(0.0, 0.0, 0.0))
    slabs = [slab.shape[1] for _, slab in predict(model, Deep(), params=_params((8, 16, 16)))]
    assert sum(slabs) == 90
    assert max(slabs) == 12
    assert max(read) == 14  # a voxel of context on either side


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
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({done for done, _ in seen}) > 5


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


def test_windows_that_a_model_cannot_take_are_refused() -> None:
    """The params' own network may take them: 2n + 1 voxels, say."""
    with pytest.raises(SynmlopsError, match=r"infer\.window_zyx: y=33 is no multiple of 4.*next: 36"):
        predict_array(_model(Constant(0, 0, 0), POOLED), _image(9, 70, 70), params=_params((8, 33, 32)))
