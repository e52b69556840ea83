"""The training loss: masked, weighted for rare foreground, and the same on one rank as on many."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, logsigmoid, max_pool3d, softplus

from synmlops.learning.plane_sums import PlaneSums, plane_sums
from synmlops.learning.weighting import foreground_weights, patch_weights, weighed_as_foreground
from synmlops.params import CHANNELS, LossParams

DICE_SMOOTH = 100.0  # voxels; keeps a patch without foreground from dominating. Source: PyTorch Connectomics
OVERLAP_SCALE = 4.0  # pre and post at one half each, on a sure union, cost 1. Source: PyTorch Connectomics
_PRE, _POST, _UNION = (CHANNELS.index(name) for name in ("pre", "post", "union"))

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossTerms:
    """The loss to descend and its terms for the log; scalars on the device.

    Of a batch in several parts each is a part's share: add them up over the parts.
    """

    total: Tensor
    terms: dict[str, Tensor]  # at full resolution, unweighted; `coarse_1` on: the sum of that level's terms


@dataclass(frozen=True)
class Totals:
    """Valid voxels of the whole batch over all ranks, which the terms are divided by; scalars."""

    planes: Tensor  # of all channels together
    union: Tensor  # of the union alone
    sides: Tensor  # where both pre and post are known
    patches: Tensor  # how many there are, valid or not
    n_parts: int  # that each rank takes its share of the batch in

    @classmethod
    def of(cls, valid: Tensor, *, sum_over_ranks: Sum = lambda count: count, n_parts: int = 1) -> "Totals":
        """Count over a rank's whole share of the batch, `valid` of all its parts in one tensor."""
        per_channel = valid.sum((0, 2, 3, 4), dtype=torch.float32)
        both = (valid[:, _PRE] * valid[:, _POST]).sum(dtype=torch.float32)
        counts = torch.stack([per_channel.sum(), per_channel[_UNION], both, both.new_tensor(len(valid))])
        planes, union, sides, patches = sum_over_ranks(counts).clamp(min=1).unbind()
        return cls(planes, union, sides, patches, n_parts)

    def coarser(self, block: int) -> "Totals":
        """Give the totals of a level of which one voxel covers `block` of these."""
        return Totals(self.planes / block, self.union / block, self.sides / block, self.patches, self.n_parts)


def compute_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    valid: Tensor,
    *,
    params: LossParams,
    totals: Totals | None = None,
    sum_over_ranks: Sum = lambda count: count,
    n_ranks: int = 1,
) -> LossTerms:
    """Weigh and sum the loss terms over the valid voxels of all ranks.

    The mean over ranks of the sum over parts is the loss of the whole batch, and so are the gradients. Dice
    and Tversky loss, which are ratios of sums over a batch, are those of each part over all ranks instead,
    averaged over the parts; Dice loss in its form `sample` is the mean over the patches.

    Parameters
    ----------
    logits : (n, 3, z, y, x) tensor or sequence of them
        A sequence is deep supervision: full resolution first, then coarser levels whose sizes divide those
        before them. Level k counts `params.coarse` to the power k, and the weights add up to 1. A coarse
        voxel is foreground if any valid voxel below it is, and counts by the share of them that is valid.
    targets, valid : (n, 3, z, y, x) tensor
        0 or 1. A plane without any valid voxel adds nothing.
    params : LossParams
        Weights of the terms. Cross-entropy takes the logits for those of `networks.registry.Exclusive`.
    totals : Totals, optional
        Needed where this is one of several parts of a rank's share; default: counted from `valid`.
    sum_over_ranks : callable
        Adds a tensor up over all ranks, called in the same order on each; the identity on one.
    n_ranks : int
        DDP averages gradients over this many ranks; the terms are scaled so that the average is the loss of
        the global batch.

    Raises
    ------
    ValueError
        If the size of a level does not divide that of the level before.
    """
    levels = [logits] if isinstance(logits, Tensor) else list(logits)
    totals = totals or Totals.of(valid, sum_over_ranks=sum_over_ranks)
    share = 1 / sum(params.coarse**level for level in range(len(levels)))
    terms: dict[str, Tensor] = {}
    total = valid.new_zeros(())
    for level, prediction in enumerate(levels):
        if level:
            targets, valid, block = _pooled(targets, valid, like=prediction)
            totals = totals.coarser(block)
        found = _terms(
            prediction, targets, valid, params=params, totals=totals, sum_over_ranks=sum_over_ranks, n=n_ranks
        )
        here = torch.stack([getattr(params, name) * term for name, term in found.items()]).sum()
        total = total + share * params.coarse**level * here
        terms |= {f"coarse_{level}": here.detach()} if level else {k: v.detach() for k, v in found.items()}
    return LossTerms(total, terms)


def _terms(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    params: LossParams,
    totals: Totals,
    sum_over_ranks: Sum,
    n: int,
) -> dict[str, Tensor]:
    """Give each term that has a weight, unweighted, at one level."""
    terms: dict[str, Tensor] = {}
    clip = params.foreground_weight_clip
    if params.bce or params.dice or params.tversky:
        sums = plane_sums(logits, targets, valid)
        if params.bce:
            near = sums.foreground_mistake
            if params.foreground_margin:
                heavy = weighed_as_foreground(targets, margin=params.foreground_margin)
                near = plane_sums(logits, targets, valid * heavy).mistake
            terms["bce"] = n * _bce(sums, near, params=params) / totals.planes
        if params.dice and params.dice_form == "sample":
            terms["dice"] = n * _dice_of_samples(sums) / totals.patches
        terms |= _ratios(sums, params=params, sum_over_ranks=sum_over_ranks, n=n, n_parts=totals.n_parts)
    if params.focal:
        focal = _focal(logits.float(), targets, valid, params=params)
        terms["focal"] = n * focal / totals.planes
    if params.cross_entropy:
        terms["cross_entropy"] = n * _cross_entropy(logits.float(), targets, valid, clip=clip) / totals.union
    if params.overlap:
        p = torch.sigmoid(logits.float())
        both = p[:, _PRE] * p[:, _POST] * p[:, _UNION] * (valid[:, _PRE] * valid[:, _POST])
        terms["overlap"] = n * OVERLAP_SCALE * both.sum() / totals.sides
    return terms


def _bce(sums: PlaneSums, of_foreground: Tensor, *, params: LossParams) -> Tensor:
    """Sum the binary cross-entropy; `of_foreground` is the part of it that weighs as foreground, (n, c)."""
    weights = patch_weights(sums.foreground, sums.valid, params=params)
    background, foreground = weights.detach().unbind(-1)
    mistake, of_foreground = sums.mistake.sum(1), of_foreground.sum(1)
    return (background * (mistake - of_foreground) + foreground * of_foreground).sum()


def _dice_of_samples(sums: PlaneSums) -> Tensor:
    """Sum the Dice loss of each patch over its channels together. Source: PyTorch Connectomics v1."""
    hit, probability, foreground = (part.sum(1) for part in (sums.hit, sums.probability, sums.foreground))
    return (1 - (2 * hit + DICE_SMOOTH) / (probability + foreground + DICE_SMOOTH)).sum()


def _ratios(
    sums: PlaneSums, *, params: LossParams, sum_over_ranks: Sum, n: int, n_parts: int
) -> dict[str, Tensor]:
    """Give Dice and Tversky loss, each 1 - a ratio of sums over all ranks, averaged over known channels.

    All patches are one sample, since a synapse cut by a patch's border says little by itself. Sources:
    Milletari et al. 2016, arXiv:1606.04797 (squared probabilities); Salehi et al. 2017, arXiv:1706.05721.
    """
    by_channel = params.dice and params.dice_form == "channel"
    if not (by_channel or params.tversky):
        return {}
    own = torch.stack([sums.hit, sums.probability, sums.square, sums.foreground, sums.valid]).sum(1)
    # every rank has the loss of the whole batch but only its own part of the gradient, and DDP averages
    whole = own + (sum_over_ranks(own.detach()) - own.detach())
    hit, probability, square, foreground, valid = whole
    known = (valid.detach() > 0).float()
    ratios: dict[str, Tensor] = {}
    if by_channel:
        ratios["dice"] = (2 * hit + DICE_SMOOTH) / (square + foreground + DICE_SMOOTH)
    if params.tversky:
        of_false_positive, of_false_negative = params.tversky_weights
        mistakes = of_false_positive * (probability - hit) + of_false_negative * (foreground - hit)
        ratios["tversky"] = (hit + DICE_SMOOTH / 2) / (hit + mistakes + DICE_SMOOTH / 2)
    losses = {k: ((1 - r) * known).sum() / known.sum().clamp(min=1) / n_parts for k, r in ratios.items()}
    return {k: loss.detach() + n * (loss - loss.detach()) for k, loss in losses.items()}


def _focal(logits: Tensor, targets: Tensor, valid: Tensor, *, params: LossParams) -> Tensor:
    """Sum the focal loss; the foreground weight is its alpha, so that gamma 0 is the cross-entropy.

    Source: Lin et al. 2017, arXiv:1708.02002.
    """
    sizes = ((targets * valid).sum((2, 3, 4)), valid.sum((2, 3, 4)))
    weights = patch_weights(*sizes, params=params)
    of_background, of_foreground = weights.reshape(-1, 2, 1, 1, 1, 1).unbind(1)
    wrong = logits * (1 - 2 * targets)  # logit of the wrong answer
    weight = torch.lerp(of_background, of_foreground, targets) * valid
    # sigmoid(wrong) ** gamma by its logarithm, whose gradient is finite at every gamma
    return (weight * torch.exp(params.focal_gamma * logsigmoid(wrong)) * softplus(wrong)).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor, *, clip: tuple[float, float]) -> Tensor:
    """Sum the cross-entropy over background, pre and post; of the union where the side is not known.

    The sigmoids of an exclusive network's logits are its softmax probabilities, of the union that of pre or
    post; so softplus(-logit) is a class's cross-entropy, and softplus(union) that of background. Foreground
    is weighed by its share of the union.
    """
    known = targets * valid
    union, known_union = known[:, _UNION], valid[:, _UNION]
    n_sides = (targets[:, _PRE] + targets[:, _POST]).clamp(min=1)  # 2 where a coarse voxel covers both
    pre, post = known[:, _PRE] / n_sides, known[:, _POST] / n_sides
    weights = foreground_weights(union.sum((1, 2, 3)), known_union.sum((1, 2, 3)), clip=clip)
    of_background, of_foreground = weights.reshape(-1, 2, 1, 1, 1).unbind(1)
    side_unknown = (union - pre - post).clamp(min=0)
    mistake = softplus(-logits)
    foreground = pre * mistake[:, _PRE] + post * mistake[:, _POST] + side_unknown * mistake[:, _UNION]
    background = (known_union - union) * softplus(logits[:, _UNION])
    return (of_background * background + of_foreground * foreground).sum()


def _pooled(targets: Tensor, valid: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Pool to the size of `like`; also the voxels of a block."""
    sizes = list(zip(targets.shape[2:], like.shape[2:], strict=True))
    if any(fine % coarse for fine, coarse in sizes):
        raise ValueError(f"a level of {tuple(like.shape[2:])} does not divide {tuple(targets.shape[2:])}")
    block = [fine // coarse for fine, coarse in sizes]
    return max_pool3d(targets * (valid > 0), block), avg_pool3d(valid, block), math.prod(block)
