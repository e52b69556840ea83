"""The training loss: masked, weighted for rare foreground, and the same on one rank as on many."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from synmlops.params import LossParams

DICE_SMOOTH = 100.0  # voxels; keeps a patch without foreground from dominating. Source: PyTorch Connectomics


@dataclass(frozen=True)
class LossTerms:
    """The loss to descend and its terms for the log; scalars on the device."""

    total: Tensor
    terms: dict[str, Tensor]


def compute_loss(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    params: LossParams,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda count: count,
    n_ranks: int = 1,
) -> LossTerms:
    """Weigh and sum the loss terms over the valid voxels of all ranks.

    Parameters
    ----------
    logits, targets, valid : (n, 3, z, y, x) tensor
        `targets` and `valid` are 0 or 1. A plane without any valid voxel adds nothing.
    params : LossParams
        Weights of the terms.
    sum_over_ranks : callable
        Adds a count over all ranks; the identity on one.
    n_ranks : int
        DDP averages gradients over this many ranks; the terms are scaled so that the average is the loss of
        the global batch.
    """
    logits = logits.float()
    terms: dict[str, Tensor] = {}
    if params.bce:
        weight = foreground_weight(targets, valid, clip=params.foreground_weight_clip) * valid
        loss = binary_cross_entropy_with_logits(logits, targets, weight, reduction="sum")
        terms["bce"] = loss * n_ranks / sum_over_ranks(valid.sum()).clamp(min=1)
    if params.dice:
        dice = dice_of_channels(logits, targets, valid, sum_over_ranks=sum_over_ranks)
        # every rank has the loss of the whole batch but only its own part of the gradient, and DDP averages
        terms["dice"] = dice.detach() + n_ranks * (dice - dice.detach())
    weights = {"bce": params.bce, "dice": params.dice}
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return LossTerms(total, {name: term.detach() for name, term in terms.items()})


def foreground_weight(targets: Tensor, valid: Tensor, *, clip: tuple[float, float]) -> Tensor:
    """Weigh the rarer class of each patch up, over its channels together.

    The foreground share f of the valid voxels is clipped, and the rarer class weighs larger over smaller,
    max(f, 1 - f) / min(f, 1 - f). Source: PyTorch Connectomics v1, weight "1".

    Examples
    --------
    >>> targets = torch.tensor([0., 0., 0., 1.]).reshape(1, 1, 1, 1, 4)
    >>> foreground_weight(targets, torch.ones_like(targets), clip=(0.05, 0.95)).flatten().tolist()
    [1.0, 1.0, 1.0, 3.0]
    """
    axes = (1, 2, 3, 4)
    n_valid = valid.sum(axes, keepdim=True).clamp(min=1)
    share = ((targets * valid).sum(axes, keepdim=True) / n_valid).clamp(*clip)
    ratio = torch.maximum(share, 1 - share) / torch.minimum(share, 1 - share)
    rarer = torch.where(share <= 0.5, targets, 1 - targets)
    return 1 + (ratio - 1) * rarer


def dice_of_channels(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda count: count,
) -> Tensor:
    """Give 1 - Dice over all valid voxels of the global batch, averaged over the channels that have some.

    The batch is one sample, since a synapse cut by a patch's border says little by itself.
    Source: Milletari et al. 2016, arXiv:1606.04797, with squared probabilities.
    """
    axes = (0, 2, 3, 4)
    probability = torch.sigmoid(logits) * valid
    targets = targets * valid
    overlap = (probability * targets).sum(axes)
    sizes = (probability * probability).sum(axes) + targets.sum(axes)
    own = torch.stack([overlap, sizes, valid.sum(axes)])
    overlap, sizes, n_valid = own + (sum_over_ranks(own.detach()) - own.detach())
    known = (n_valid.detach() > 0).float()
    loss = 1 - (2 * overlap + DICE_SMOOTH) / (sizes + DICE_SMOOTH)
    mean: Tensor = (loss * known).sum() / known.sum().clamp(min=1)
    return mean
