"""The optimiser and its learning rate over the steps."""

import math

import torch
from torch import nn

from synmlops.params import TrainParams


def build_optimizer(network: nn.Module, train: TrainParams) -> torch.optim.Optimizer:
    """Give the optimiser of a network's weights; one fused kernel, on CPUs too.

    Weight decay is for the weights of convolutions and linear layers alone: drawing norms and biases to zero
    does not make a function smoother. SGD is Nesterov's where it has momentum, and adds the decay to the
    gradient, as Adam does; AdamW takes it off the weights.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv3d(1, 8, 3), nn.GroupNorm(2, 8))
    >>> groups = build_optimizer(network, TrainParams(weight_decay=0.01)).param_groups
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.01), (3, 0.0)]
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": train.weight_decay},
        {"params": [weight for weight in weights if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=train.learning_rate, momentum=train.momentum, nesterov=train.momentum > 0, fused=True
        )
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=train.learning_rate, fused=True)


def learning_rate_at(step: int, train: TrainParams) -> float:
    """Give the learning rate of a step, of which the first is 1: a linear warm-up, and the schedule.

    With a warm-up `before` the schedule, step `warmup_steps` is the first at the full rate. From there cosine
    and poly fall to zero, which the last step reaches; multistep falls by `milestone_factor` at each
    milestone, counted from the start. With a warm-up `within` it, both begin at the first step, which counts
    as 0, and multiply: cosine and poly would reach zero one step after the last, and a milestone falls on the
    step after it. Source of the second form: Detectron2, as in PyTorch Connectomics.

    Examples
    --------
    >>> cosine = TrainParams(steps=100, warmup_steps=10, learning_rate=1.0)
    >>> [round(learning_rate_at(step, cosine), 3) for step in (1, 10, 55, 100)]
    [0.1, 1.0, 0.5, 0.0]
    >>> steps = TrainParams(
    ...     steps=100, warmup_steps=0, learning_rate=1.0, schedule="multistep", milestones=(50, 80)
    ... )
    >>> [round(learning_rate_at(step, steps), 3) for step in (1, 49, 50, 80)]
    [1.0, 1.0, 0.1, 0.01]
    >>> within = cosine.model_copy(update={"warmup_form": "within", "warmup_from": 0.001})
    >>> [round(learning_rate_at(step, within), 3) for step in (1, 11, 51, 100)]
    [0.001, 0.976, 0.5, 0.0]
    """
    if train.warmup_form == "within":
        done = step - 1
        return _warmth(done, train) * train.learning_rate * _fallen(done, done / train.steps, train)
    if step < train.warmup_steps:
        return train.learning_rate * _warmth(step, train)
    share = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.learning_rate * _fallen(step, share, train)


def _warmth(count: int, train: TrainParams) -> float:
    """Give the share of the learning rate that the warm-up lets through, from `warmup_from` to 1."""
    if count >= train.warmup_steps:
        return 1.0
    risen = count / train.warmup_steps
    return train.warmup_from * (1 - risen) + risen


def _fallen(count: int, share: float, train: TrainParams) -> float:
    """Give what the schedule leaves of the learning rate at a share of its way."""
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if train.schedule == "poly":
        return math.pow(1 - share, train.poly_power)
    if train.schedule == "multistep":
        n_passed = sum(milestone <= count for milestone in train.milestones)
        return math.pow(train.milestone_factor, n_passed)
    return 1.0
