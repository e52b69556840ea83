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
    """Give the learning rate of a step, of which the first is 1: a linear warm-up, then the schedule.

    Step `warmup_steps` is the first at the full rate. From there cosine and poly fall to zero, which the
    last step reaches; multistep falls by `milestone_factor` at each milestone, counted from the start.

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
    """
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    share = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    if train.schedule == "poly":
        return train.learning_rate * math.pow(1 - share, train.poly_power)
    if train.schedule == "multistep":
        n_passed = sum(milestone <= step for milestone in train.milestones)
        return train.learning_rate * math.pow(train.milestone_factor, n_passed)
    return train.learning_rate
