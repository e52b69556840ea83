"""Overlapping windows, weighed and summed: against a plain implementation, and by block."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from synmlops.blockwise.grid import BlockGrid
from synmlops.learning.checkpoint import Model, ModelMeta
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import Predictor, predict_array
from synmlops.learning.windows import Strides, blend_weights
from synmlops.params import CHANNELS, InferParams, NetworkParams
from synmlops.volumes.prepared import Box

NETWORK = NetworkParams(stem_zyx=(1, 2, 2), widths=(4,), kernels=((3, 3, 3),), pools=(), norm="batch")
SHAPE = (9, 22, 27)


@pytest.fixture(scope="module")
def model() -> Model:
    """Give a network with random weights, so strong that probabilities differ from voxel to voxel."""
    torch.manual_seed(1)
    network = build_network(NETWORK)
    with torch.no_grad():
        network.head.weight *= 8  # type: ignore[union-attr, operator]
    meta = ModelMeta(network=NETWORK, channels=CHANNELS, mean=127.5, std=127.5, voxel_nm=(40.0, 8.0, 8.0))
    return Model(network.eval(), meta)


def params(**own: Any) -> InferParams:
    windows = {"window_zyx": (4, 12, 12), "overlap": 0.5, "blend": "gaussian", "precision": "float32"}
    return InferParams.model_validate(windows | own)


def made_up(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plainly(
    model: Model,
    image: NDArray[np.uint8],
    *,
    stride: tuple[int, int, int],
    kind: Any,
    views: int,
    window: tuple[int, int, int] = (4, 12, 12),
) -> NDArray[np.uint8]:
    """Blend as PyTorch Connectomics v1 does: all windows into arrays of the whole volume, then cut off."""
    total, weight = np.zeros((3, *image.shape), np.float32), np.zeros(image.shape, np.float32)
    weights = blend_weights(window, kind)
    starts = (
        [min(i * step, n - size) for i in range(1 + -(-(n - size) // step))]
        for n, size, step in zip(image.shape, window, stride, strict=True)
    )
    for z, y, x in product(*starts):
        at = (slice(z, z + window[0]), slice(y, y + window[1]), slice(x, x + window[2]))
        seen = torch.from_numpy((image[at] / np.float32(255) - np.float32(0.5)) / np.float32(0.5))[None, None]
        said = []
        flips = product((False, True), (False, True), (False, True)[: 1 + (views == 16)])
        turns = product(flips, (False, True)[: 1 + (views >= 8)]) if views > 1 else [((False,) * 3, False)]
        for (flip_x, flip_y, flip_z), swap in turns:
            axes = [axis for axis, on in ((4, flip_x), (3, flip_y), (2, flip_z)) if on]
            turned = seen.flip(axes).transpose(3, 4) if swap else seen.flip(axes)
            with torch.inference_mode():
                p = model.network(turned.contiguous()).sigmoid()
            said.append((p.transpose(3, 4) if swap else p).flip(axes)[0].numpy())
        total[(slice(None), *at)] += np.mean(said, axis=0) * weights
        weight[at] += weights
    return (total / weight * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "stride", "views"),
    [
        ("gaussian", (2, 6, 6), 1),
        ("bump", (3, 5, 7), 4),
        ("gaussian", (4, 12, 9), 8),
        ("bump", (2, 6, 12), 16),
    ],
)
def test_blending_is_that_of_the_plain_way(
    model: Model, kind: str, stride: tuple[int, int, int], views: int
) -> None:
    image = made_up()
    own = params(blend=kind, stride_zyx=stride, views=views)
    found = predict_array(model, image, params=own).astype(int)
    expected = plainly(model, image, stride=stride, kind=kind, views=views)
    assert np.ptp(expected) > 40
    assert np.abs(found - expected).max() <= 1  # where rounding of the sums meets the cutting off
    assert (found != expected).mean() < 1e-3


def test_the_default_stride_is_what_the_overlap_leaves(model: Model) -> None:
    image = made_up()
    given = predict_array(model, image, params=params(stride_zyx=(2, 6, 6)))
    np.testing.assert_array_equal(predict_array(model, image, params=params()), given)


@pytest.mark.parametrize("block_zyx", [(2, 11, 14), (3, 22, 10), (9, 7, 27)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_blocks_equal_the_whole(model: Model, block_zyx: tuple[int, int, int], batch_size: int) -> None:
    image = made_up()
    image[:4, :14, :14] = 90  # no tissue in some windows
    mask = np.ones(SHAPE, bool)
    mask[:, 15:, :13] = False
    own = params(stride_zyx=(3, 6, 9), batch_size=batch_size)
    predictor = Predictor([model], shape_zyx=SHAPE, params=own)
    whole = predictor(image, Box((0, 0, 0), SHAPE), mask=mask)
    assert whole[:, mask].any(axis=0).mean() > 0.9
    assert not whole[:, ~mask].any()
    for block in BlockGrid(predictor.region, block_zyx):
        read = predictor.to_read(block.write)
        part = predictor(image[read.slices], block.write, mask=mask[block.write.slices])
        if batch_size == 1:
            np.testing.assert_array_equal(part, whole[(slice(None), *block.write.slices)])
        else:  # other windows share a batch then
            difference = part.astype(int) - whole[(slice(None), *block.write.slices)]
            assert np.abs(difference).max() <= 1


def test_a_region_is_blended_as_a_volume_of_its_own(model: Model) -> None:
    image, region = made_up(), Box((2, 4, 3), (8, 20, 25))
    predictor = Predictor([model], shape_zyx=SHAPE, region=region, params=params())
    found = predictor(image[predictor.to_read(region).slices], region)
    cut = np.ascontiguousarray(image[region.slices])
    np.testing.assert_array_equal(found, predict_array(model, cut, params=params()))


def test_a_volume_smaller_than_a_window_is_one_window(model: Model) -> None:
    image = made_up((3, 7, 10))
    found = predict_array(model, image, params=params())
    padded = np.pad(image, ((0, 0), (0, 1), (0, 0)), mode="edge")
    with torch.inference_mode():
        p = model.network((torch.from_numpy(padded).float() - 127.5)[None, None] / 127.5).sigmoid()
    np.testing.assert_allclose(found, p[0, :, :, :7].numpy() * 255, atol=1)


def test_windows_of_no_tissue_say_no(model: Model) -> None:
    image = np.full(SHAPE, 90, np.uint8)
    assert not predict_array(model, image, params=params()).any()


def test_every_voxel_is_seen_and_only_by_windows_that_are_named() -> None:
    for extent, start, stop, size, stride in product((30,), (0, 3), (9, 20, 29), (8, 16), (3, 8)):
        axis = Strides(extent, start, stop, size, stride, fade=0)
        spans = [axis.support(window) for window in range(len(axis))]
        assert all(0 <= axis.first_voxel(window) <= extent - size for window in range(len(axis)))
        for low, high in ((start, start + 1), (start + 2, stop), (stop - 1, stop), (start + 1, start + 4)):
            meeting = [n for n, (a, b) in enumerate(spans) if a < high and b > low]
            assert list(axis.meeting(low, high)) == meeting
            assert meeting


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"fade": 0.5}, r"infer\.fade: 0\.5 and infer\.blend: gaussian are two ways"),
        ({"blend": "none", "stride_zyx": (2, 6, 6)}, r"infer\.stride_zyx: \[2, 6, 6\] is read where"),
        ({"stride_zyx": (2, 13, 6)}, r"infer\.stride_zyx: y=13 leaves gaps between windows of 12; use 12"),
    ],
)
def test_what_makes_no_sense_is_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**own)
