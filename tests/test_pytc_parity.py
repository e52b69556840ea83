"""What PyTorch Connectomics computes from the same inputs, value for value."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from synmlops.blockwise.grid import BlockGrid
from synmlops.learning.losses import compute_loss
from synmlops.learning.optim import learning_rate_at
from synmlops.learning.targets import targets_of
from synmlops.learning.weighting import voxel_weights
from synmlops.learning.windows import blend_weights, strides_over
from synmlops.params import EvaluateParams, InferParams, LossParams, PolarityParams, TrainParams
from synmlops.synapses.decoding import decode_blocks
from synmlops.synapses.matching import match_overlaps, overlaps_of
from synmlops.synapses.pytc_decoding import Scaled, scaled_shape
from synmlops.volumes.prepared import Box
from synmlops.volumes.preparing import sides_of
from synmlops.volumes.store import Grid

Reference = Callable[[str], Any]
CLIP = (0.05, 0.95)


@pytest.fixture
def reference(shared: Callable[[str], Path]) -> Reference:
    """Give arrays that PyTorch Connectomics v1 computed."""
    return lambda name: np.load(shared(f"golden/pytc/{name}.npz"))


# -- targets, weights and losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 3])
def test_targets(number: int, reference: Reference) -> None:
    golden = reference(f"target_{number}")
    sides = sides_of(golden["label"], "pairs")
    targets, _ = targets_of(torch.from_numpy(sides)[None], torch.ones(1, 3, dtype=torch.bool))
    np.testing.assert_array_equal(targets[0], golden["target_1"])
    np.testing.assert_array_equal(sides, golden["target_1_1"])  # of which cross-entropy makes its classes


def test_a_crop_keeps_its_polarity(reference: Reference) -> None:
    """The incumbent numbers the ids of a crop anew, and so swaps pre and post where one is missing."""
    golden = reference("target_3")
    label, relabelled = golden["label"], golden["reduced_label"]
    whole = sides_of(label, "pairs")
    assert (sides_of(relabelled, "pairs") != whole).any()
    rng = np.random.default_rng(0)
    for _ in range(50):
        z, y, x = rng.integers(0, (6, 32, 32))
        crop = slice(z, z + 6), slice(y, y + 32), slice(x, x + 32)
        np.testing.assert_array_equal(sides_of(label[crop], "pairs"), whole[crop])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("1", {"foreground_weight_clip": CLIP}),
        ("1_1", {"foreground_weight_clip": CLIP, "foreground_margin": 1}),
        ("0", {"foreground_weight_clip": (0.5, 0.5)}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_weights(number: int, masked: bool, name: str, own: dict[str, Any], reference: Reference) -> None:
    """Its margin grows from foreground that the mask hides, too; that of a prepared volume cannot."""
    golden = reference(f"target_{number}")
    mask = golden["valid_mask"] if masked else None
    hidden = mask is not None and name == "1_1"
    sides = sides_of(golden["label"], "pairs", None if hidden else mask)
    targets, valid = targets_of(torch.from_numpy(sides)[None], torch.ones(1, 3, dtype=torch.bool))
    if hidden:
        valid = valid * torch.from_numpy(mask)
    params = LossParams.model_validate({"foreground_share": "voxels" if masked else "planes"} | own)
    expected = golden[f"weight_{name}_masked" if masked else f"weight_{name}"]
    if name == "0" and not masked:
        expected = np.ones(1)  # it writes a 0 for "none"
    weights = voxel_weights(targets, valid, params=params)[0].numpy()
    np.testing.assert_allclose(weights, np.broadcast_to(expected, weights.shape), rtol=1e-6)


def test_losses(reference: Reference) -> None:
    """Its weights are 1 and 4 there."""
    golden = reference("losses")
    logits, targets = (torch.from_numpy(golden[name]) for name in ("pred", "target"))
    params = LossParams(bce=1, dice=0.5, dice_form="sample", overlap=1, foreground_weight_clip=(0.2, 0.2))
    loss = compute_loss(logits, targets, torch.ones_like(targets), params=params)
    found = {
        "bce": loss.terms["bce"],
        "dice_x0p5": 0.5 * loss.terms["dice"],
        "nonoverlap_x4": loss.terms["overlap"],
        "total": loss.total - loss.terms["overlap"],
        "total_with_nonoverlap_x4": loss.total,
    }
    for name, value in found.items():
        assert float(value) == pytest.approx(float(golden[name]), rel=5e-7), name


# -- decoding and scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("block_zyx", [None, (5, 24, 40)], ids=["whole", "by block"])
def test_decoding(number: int, block_zyx: tuple[int, int, int] | None, reference: Reference) -> None:
    golden = reference(f"decode_{number}")
    options = json.loads(str(golden["options"]))
    names = {"thres_small": "min_voxels", "dilate_sz": "dilate_yx", "scale_factors": "scale_zyx"}
    polarity = PolarityParams.model_validate(
        {names.get(key, key): value for key, value in options.items() if key != "thres"}
    )
    planes = golden["volume"]
    if polarity.exclusive:  # its channels are background, pre and post then
        planes = np.stack([planes[1], planes[2], 255 - planes[0]])
    shape = planes.shape[1:]
    ids = np.zeros(scaled_shape(shape, polarity.scale_zyx), np.uint16)
    decode_blocks(
        planes,
        blocks=BlockGrid(Box((0, 0, 0), shape), block_zyx or shape),
        grid=Grid((40.0, 8.0, 8.0)),
        params=EvaluateParams(rule="polarity", polarity=polarity),
        threshold=options.get("thres", 0.5),
        out=lambda kind: Scaled(ids, shape, polarity.scale_zyx),
    )
    np.testing.assert_array_equal(ids, golden["output"])


def test_instance_f1(reference: Reference) -> None:
    golden = reference("instance_matching")
    table = overlaps_of(golden["pred"], golden["gt"])
    n_predicted, n_true = len(table.predicted_ids), len(table.true_ids)
    n = len(match_overlaps(table, iou=0.5))
    assert [n, n_predicted - n, n_true - n] == golden["counts_05"].tolist()
    assert 2 * n / (n_predicted + n_true) == golden["f1_05"]


# -- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("multistep", {"learning_rate": 0.01, "schedule": "multistep", "milestones": (30, 35)}),
        ("cosine", {"learning_rate": 0.04, "schedule": "cosine"}),
    ],
)
def test_learning_rates(name: str, own: dict[str, Any], reference: Reference) -> None:
    expected = reference("schedule_blend_windows")[f"warmup_{name}"]
    train = TrainParams.model_validate(
        {"steps": 45, "warmup_steps": 10, "warmup_from": 0.001, "warmup_form": "within"} | own
    )
    rates = [learning_rate_at(step, train) for step in range(1, 46)]
    np.testing.assert_allclose(rates, expected, rtol=1e-13, atol=0)


# -- inference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "bump"])
def test_blending_weights(kind: Literal["gaussian", "bump"], reference: Reference) -> None:
    weights = blend_weights((8, 32, 32), kind)
    assert weights.dtype == np.float32
    expected = reference("schedule_blend_windows")[f"{kind}_8_32_32"]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)  # its own formula rounds so on other processors


def test_window_positions(reference: Reference) -> None:
    expected = reference("schedule_blend_windows")["window_pos"]
    shape, params = (20, 300, 400), {"window_zyx": (8, 128, 128), "stride_zyx": (4, 64, 64)}
    axes = strides_over(
        Box((0, 0, 0), shape),
        shape_zyx=shape,
        pool_zyx=(1, 1, 1),
        params=InferParams.model_validate(params | {"blend": "gaussian"}),
    )
    firsts = ([axis.first_voxel(window) for window in range(len(axis))] for axis in axes)
    np.testing.assert_array_equal(list(product((0,), *firsts)), expected)
