"""The optimiser moves what it should, and the learning rate follows its schedule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synmlops.learning.optim import build_optimizer, learning_rate_at
from synmlops.params import TrainParams


def rates(**options: Any) -> list[float]:
    """Give the learning rate of each step, the first being step 0, which no training takes."""
    train = TrainParams(**{"steps": 45, "warmup_steps": 10, "learning_rate": 0.01} | options)
    return [learning_rate_at(step, train) for step in range(train.steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant", "multistep"])
def test_every_schedule_warms_up_and_never_rises_again(schedule: str) -> None:
    found = rates(schedule=schedule, milestones=(20, 30))
    assert found[1:11] == pytest.approx([0.001 * step for step in range(1, 11)])
    assert max(found) == found[10] == 0.01
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] == pytest.approx({"constant": 0.01, "multistep": 0.0001}.get(schedule, 0.0))


def test_poly_falls_by_its_power() -> None:
    assert rates(schedule="poly", poly_power=2.0, warmup_steps=5)[25] == pytest.approx(0.01 * 0.25)


def test_no_warm_up_is_full_speed_at_once() -> None:
    assert rates(warmup_steps=0, schedule="constant") == [0.01] * 46


def test_schedules_are_the_incumbents_from_the_end_of_its_warm_up(shared: Callable[[str], Path]) -> None:
    """Its warm-up begins at a thousandth, and its cosine at step 0 and not where the warm-up ends."""
    golden = np.load(shared("golden/pytc/schedule_blend_windows.npz"))
    multistep = rates(schedule="multistep", milestones=(30, 35))
    np.testing.assert_allclose(multistep[10:45], golden["warmup_multistep"][10:], rtol=1e-9)
    cosine = rates(warmup_steps=0, learning_rate=0.04)
    np.testing.assert_allclose(cosine[10:45], golden["warmup_cosine"][10:], rtol=1e-6)


def step_of(optimizer: str, *, gradient: float, **options: Any) -> tuple[float, float]:
    """Give how far one step moves a convolution's weight and a norm's, both 1 at first."""
    network = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.GroupNorm(1, 1))
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(1.0)
            weight.grad = torch.full_like(weight, gradient)
    train = TrainParams(optimizer=optimizer, learning_rate=0.1, **options)
    build_optimizer(network, train).step()
    moved = [float(weight.detach().flatten()[0]) - 1 for weight in network.parameters()]
    return moved[0], moved[1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_draws_weights_and_leaves_norms_alone(optimizer: str) -> None:
    of_weight, of_norm = step_of(optimizer, gradient=0.0, weight_decay=0.5, momentum=0.0)
    assert of_weight == pytest.approx(-0.1 * 0.5)
    assert of_norm == 0


def test_the_three_optimisers_differ_as_their_names_say() -> None:
    """Worked: the first step of Adam is the learning rate; Nesterov's is (1 + momentum) times plain SGD's."""
    assert step_of("adam", gradient=0.3, weight_decay=0.5)[0] == pytest.approx(-0.1, rel=1e-5)
    assert step_of("adamw", gradient=0.3, weight_decay=0.5)[0] == pytest.approx(-0.1 - 0.05, rel=1e-5)
    assert step_of("sgd", gradient=0.3, weight_decay=0.0, momentum=0.5)[0] == pytest.approx(-0.1 * 0.3 * 1.5)
