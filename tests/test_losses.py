"""Losses against worked answers and PyTorch's own; over ranks, parts and levels."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, binary_cross_entropy_with_logits, cross_entropy

from synmlops.learning.losses import LossTerms, Totals, compute_loss
from synmlops.learning.networks.layers import Exclusive
from synmlops.learning.plane_sums import plane_sums
from synmlops.learning.targets import targets_of
from synmlops.learning.weighting import foreground_weights, voxel_weights
from synmlops.params import LossParams

TERMS = ("bce", "dice", "focal", "tversky", "cross_entropy", "overlap")
EVERY = LossParams(bce=1, dice=0.5, focal=0.7, tversky=0.3, cross_entropy=0.4, overlap=0.2)
EVEN = (0.5, 0.5)  # clips the foreground share so that no class weighs more

Batch = tuple[Tensor, Tensor, Tensor]


def only(term: str, **options: Any) -> LossParams:
    return LossParams(**{"bce": 0, "dice": 0, term: 1} | options)


def batch(n: int = 2) -> Batch:
    """Give random logits, and targets of which pre and post exclude each other, all of them known."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 3, 2, 4, 4, generator=generator)
    sides = torch.randint(0, 4, (n, 2, 4, 4), generator=generator, dtype=torch.uint8)
    return logits, *targets_of(sides, torch.ones(n, 3, dtype=torch.bool))


def partly_valid() -> Batch:
    """Give patches with different numbers of valid voxels, the second of a union label."""
    logits, targets, valid = batch()
    valid[0, :, 0] = 0
    valid[1, :2] = 0
    return logits, targets, valid


def descend(loss: LossTerms) -> None:
    loss.total.backward()  # type: ignore[no-untyped-call]


def test_bce_is_the_plain_mean_where_all_is_valid_and_weights_are_one() -> None:
    logits, targets, valid = batch()
    loss = compute_loss(logits, targets, valid, params=only("bce", foreground_weight_clip=EVEN))
    torch.testing.assert_close(loss.total, binary_cross_entropy_with_logits(logits, targets))


def test_rare_foreground_weighs_more_and_the_share_is_clipped() -> None:
    weights = foreground_weights(torch.tensor([1.0, 99.0]), torch.tensor([100.0, 100.0]), clip=(0.05, 0.95))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 19.0], [19.0, 1.0]]))


@pytest.mark.parametrize("term", TERMS)
def test_an_invalid_voxel_changes_nothing(term: str) -> None:
    logits, targets, valid = partly_valid()
    before = compute_loss(logits, targets, valid, params=EVERY).terms[term]
    assert before > 0
    logits[valid == 0], targets[valid == 0] = 37, 1
    torch.testing.assert_close(compute_loss(logits, targets, valid, params=EVERY).terms[term], before)


def test_no_valid_voxel_gives_zero_and_no_gradient() -> None:
    logits, targets, valid = batch()
    logits.requires_grad_()
    loss = compute_loss(logits, targets, torch.zeros_like(valid), params=EVERY)
    descend(loss)
    assert loss.total == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_the_gradient_of_the_sums_is_that_of_their_values() -> None:
    logits, targets, valid = (part.double() for part in partly_valid())
    valid[0, 0] *= 0.25  # as under deep supervision

    def sums(x: Tensor) -> Tensor:
        return torch.stack(plane_sums(x, targets, valid)[:5])

    assert torch.autograd.gradcheck(sums, logits.requires_grad_())


def test_logits_of_bf16_and_in_another_memory_format_are_taken() -> None:
    logits, targets, valid = partly_valid()
    plain = compute_loss(logits.bfloat16().float(), targets, valid, params=EVERY).total
    other = logits.bfloat16().to(memory_format=torch.channels_last_3d).requires_grad_()
    loss = compute_loss(other, targets, valid, params=EVERY)
    torch.testing.assert_close(loss.total, plain)
    descend(loss)
    assert other.grad is not None
    assert other.grad.dtype == torch.bfloat16


# -- each term ---------------------------------------------------------------------------------------------


def test_dice_falls_from_wrong_to_right() -> None:
    targets = torch.zeros(1, 3, 4, 20, 20)
    targets[..., :10] = 1
    right, wrong = (
        compute_loss(sign * (targets * 2 - 1), targets, torch.ones_like(targets), params=only("dice")).total
        for sign in (20, -20)
    )
    assert right < 0.01
    assert wrong > 0.85


def test_dice_of_samples_is_a_ratio_for_each_patch_over_its_channels() -> None:
    """Worked: 300 voxels found of 600 in the first patch, all of 300 in the second."""
    targets, found = torch.zeros(2, 3, 1, 20, 20), torch.zeros(2, 3, 1, 20, 20)
    targets[0, :, :, :10], found[0, :, :, :5] = 1, 1
    targets[1, 0, :, :15], found[1, 0, :, :15] = 1, 1
    form = only("dice", dice_form="sample")
    loss = compute_loss(40 * (found - 0.5), targets, torch.ones_like(targets), params=form)
    assert float(loss.total) == pytest.approx((1 - (600 + 100) / (300 + 600 + 100)) / 2)


def test_the_margin_of_the_foreground_weighs_as_it_does() -> None:
    logits, targets, valid = partly_valid()
    targets[:] = 0
    targets[:, :, 1, 1, 1] = 1
    params = only("bce", foreground_margin=1, foreground_weight_clip=(0.05, 0.95))
    weights = voxel_weights(targets, valid, params=params)
    assert weights[0, 0, 1].tolist() == [[15.0] * 3 + [1.0]] * 3 + [[1.0] * 4]
    each = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    expected = (each * weights).sum() / valid.sum()
    torch.testing.assert_close(compute_loss(logits, targets, valid, params=params).total, expected)


def test_tversky_counts_misses_and_false_alarms_by_its_weights() -> None:
    """Worked: 200 voxels found, 100 missed and 50 false, in each channel; 50 voxels of smoothing."""
    targets, found = torch.zeros(1, 3, 1, 20, 20), torch.zeros(1, 3, 1, 20, 20)
    targets[..., :15, :], found[..., 5:, :] = 1, 1
    found[..., 15:, 10:] = 0
    loss = compute_loss(
        40 * (found * 2 - 1),
        targets,
        torch.ones_like(targets),
        params=only("tversky", tversky_weights=(0.4, 0.9)),
    )
    assert float(loss.total) == pytest.approx(1 - 250 / (250 + 0.4 * 50 + 0.9 * 100))


def test_focal_loss_without_gamma_is_the_weighted_bce_and_gamma_spares_the_sure() -> None:
    logits, targets, valid = partly_valid()
    bce = compute_loss(logits, targets, valid, params=only("bce")).total
    torch.testing.assert_close(
        compute_loss(logits, targets, valid, params=only("focal", focal_gamma=0)).total, bce
    )
    one = torch.ones(1, 3, 1, 1, 1)
    focal = compute_loss(
        one * 2.0, one, one, params=only("focal", focal_gamma=2, foreground_weight_clip=EVEN)
    ).total
    p = 1 / (1 + np.exp(-2.0))
    assert float(focal) == pytest.approx((1 - p) ** 2 * -np.log(p), rel=1e-5)


def scores_and_logits(n: int) -> tuple[Tensor, Tensor]:
    """Give class scores of background, pre and post, and the logits that `Exclusive` makes of them."""
    scores = torch.randn(n, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 3
    inner = torch.stack([scores[:, 1], scores[:, 2], -scores[:, 0]], dim=1)
    return scores, Exclusive(torch.nn.Identity())(inner)


def test_cross_entropy_is_that_of_the_softmax_behind_exclusive_logits() -> None:
    scores, logits = scores_and_logits(2)
    sides = torch.randint(0, 3, (2, 2, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    targets, valid = targets_of(sides, torch.ones(2, 3, dtype=torch.bool))
    loss = compute_loss(
        logits, targets, valid, params=only("cross_entropy", foreground_weight_clip=EVEN)
    ).total
    torch.testing.assert_close(loss, cross_entropy(scores, sides.long()))


def test_cross_entropy_weighs_foreground_by_its_share_of_the_union() -> None:
    """Worked: a quarter of the voxels is foreground and counts three times."""
    logits = torch.full((1, 3, 1, 1, 4), -1.0)
    targets = torch.zeros_like(logits)
    targets[0, [0, 2], 0, 0, 0] = 1  # a pre voxel
    loss = compute_loss(logits, targets, torch.ones_like(logits), params=only("cross_entropy")).total
    of_foreground, of_background = np.log1p(np.exp(1.0)), np.log1p(np.exp(-1.0))
    assert float(loss) == pytest.approx((3 * of_foreground + 3 * of_background) / 4, rel=1e-6)


def test_cross_entropy_of_a_union_label_is_that_of_foreground() -> None:
    scores, logits = scores_and_logits(1)
    sides = torch.randint(0, 2, (1, 2, 4, 4), generator=torch.Generator().manual_seed(2)) * 3
    targets, valid = targets_of(sides.to(torch.uint8), torch.tensor([[False, False, True]]))
    loss = compute_loss(
        logits, targets, valid, params=only("cross_entropy", foreground_weight_clip=EVEN)
    ).total
    foreground = torch.softmax(scores, dim=1)[:, 1:].sum(1)
    likelihood = torch.where(sides > 0, foreground, 1 - foreground)
    torch.testing.assert_close(loss, -likelihood.log().mean(), rtol=1e-4, atol=0)


# -- ranks, parts and levels -------------------------------------------------------------------------------


class TwoRanks:
    """Runs the same work for two ranks in turn, so that each sum holds what both gave."""

    def __init__(self, work: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> None:
        self._work = work
        self._given: list[list[Tensor]] = [[], []]

    def mean(self) -> Tensor:
        """Repeat until no sum depends on another that was not known yet."""
        results: list[Tensor] = []
        for _ in range(4):
            before, self._given = self._given, [[], []]
            results = [self._work(rank, self._sum(rank, before)) for rank in range(2)]
        return torch.stack(results).mean(0)

    def _sum(self, rank: int, before: list[list[Tensor]]) -> Callable[[Tensor], Tensor]:
        others: Iterator[Tensor] = iter(before[1 - rank])

        def add(value: Tensor) -> Tensor:
            self._given[rank].append(value)
            return value + next(others, torch.zeros(()))

        return add


def loss_and_gradient(
    data: Batch, which: Sequence[int], *, n_levels: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Give a loss, and its gradient for the logits of the whole batch, of some of its patches."""
    logits = data[0].clone().requires_grad_()
    levels = [avg_pool3d(logits[which], (1, 2**k, 2**k)) for k in range(n_levels)]
    loss = compute_loss(
        levels[0] if n_levels == 1 else levels, data[1][which], data[2][which], params=EVERY, **options
    )
    descend(loss)
    assert logits.grad is not None
    return loss.total.detach(), logits.grad


@pytest.mark.parametrize("n_levels", [1, 3])
def test_two_ranks_average_to_the_loss_of_the_whole_batch(n_levels: int) -> None:
    """Loss and gradient, of every term, with different numbers of valid voxels."""
    data = partly_valid()

    def work(rank: int, add: Callable[[Tensor], Tensor]) -> Tensor:
        loss, gradient = loss_and_gradient(data, [rank], n_levels=n_levels, sum_over_ranks=add, n_ranks=2)
        return torch.cat([loss[None], gradient.flatten()])

    loss, gradient = loss_and_gradient(data, [0, 1], n_levels=n_levels)
    torch.testing.assert_close(TwoRanks(work).mean(), torch.cat([loss[None], gradient.flatten()]))


def test_parts_add_up_to_the_loss_of_the_whole_batch() -> None:
    """Dice and Tversky loss, which are no sums over voxels, to the mean of their parts."""
    logits, targets, valid = partly_valid()
    totals = Totals.of(valid, n_parts=2)
    parts = [
        compute_loss(logits[[n]], targets[[n]], valid[[n]], params=EVERY, totals=totals).terms for n in (0, 1)
    ]
    whole = compute_loss(logits, targets, valid, params=EVERY).terms
    alone = [compute_loss(logits[[n]], targets[[n]], valid[[n]], params=EVERY).terms for n in (0, 1)]
    for name in TERMS:
        mean = torch.stack([one[name] for one in alone]).mean()
        expected = mean if name in ("dice", "tversky") else whole[name]
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected)


def test_dice_of_samples_is_the_same_on_two_ranks_and_in_parts() -> None:
    logits, targets, valid = partly_valid()
    params = only("dice", dice_form="sample")
    whole = compute_loss(logits, targets, valid, params=params).total

    def work(rank: int, add: Callable[[Tensor], Tensor]) -> Tensor:
        own = (part[[rank]] for part in (logits, targets, valid))
        return compute_loss(*own, params=params, sum_over_ranks=add, n_ranks=2).total[None]

    torch.testing.assert_close(TwoRanks(work).mean()[0], whole)
    totals = Totals.of(valid, n_parts=2)
    parts = [
        compute_loss(logits[[n]], targets[[n]], valid[[n]], params=params, totals=totals).total
        for n in (0, 1)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_a_coarse_level_is_the_loss_of_pooled_targets() -> None:
    """A block is foreground if any of its valid voxels is, and counts by its valid share."""
    logits, targets, valid = batch()
    valid[..., 0, 0], targets[..., 1, 1] = 0, 1
    plain = only("bce", foreground_weight_clip=EVEN, coarse=0.25)
    coarse = avg_pool3d(logits, (2, 4, 4))
    loss = compute_loss([logits, coarse], targets, valid, params=plain)
    fine = compute_loss(logits, targets, valid, params=plain).total
    expected = binary_cross_entropy_with_logits(coarse, torch.ones_like(coarse))  # all blocks have foreground
    torch.testing.assert_close(loss.terms["coarse_1"], expected)
    torch.testing.assert_close(loss.total, (fine + 0.25 * expected) / 1.25)


def test_a_block_of_background_and_unknown_voxels_is_background() -> None:
    logits = torch.zeros(1, 3, 1, 2, 2)
    valid = torch.tensor([1.0, 0, 0, 0]).reshape(1, 1, 1, 2, 2).expand(1, 3, 1, 2, 2)
    coarse = torch.full((1, 3, 1, 1, 1), 5.0)
    params = only("bce", foreground_weight_clip=EVEN)
    loss = compute_loss([logits, coarse], 1 - valid, valid, params=params)
    assert float(loss.terms["coarse_1"]) == pytest.approx(np.log1p(np.exp(5.0)))


def test_a_level_that_does_not_divide_is_refused() -> None:
    logits, targets, valid = batch()
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) does not divide \(2, 4, 4\)"):
        compute_loss([logits, logits[..., :3, :]], targets, valid, params=EVERY)
