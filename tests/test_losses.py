import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from synmlops.learning.losses import compute_loss, dice_of_channels, foreground_weight
from synmlops.params import LossParams

PLAIN = LossParams(bce=1, dice=0, foreground_weight_clip=(0.5, 0.5))


def _batch(n: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 3, 2, 4, 4, generator=generator)
    targets = (torch.rand(n, 3, 2, 4, 4, generator=generator) < 0.2).float()
    return logits, targets, torch.ones_like(targets)


def test_bce_is_the_plain_mean_where_all_is_valid_and_weights_are_one() -> None:
    logits, targets, valid = _batch()
    loss = compute_loss(logits, targets, valid, params=PLAIN)
    torch.testing.assert_close(loss.total, binary_cross_entropy_with_logits(logits, targets))


def test_an_invalid_voxel_changes_nothing() -> None:
    logits, targets, valid = _batch()
    valid[0, 0], valid[1, :, 0] = 0, 0
    params = LossParams()
    before = compute_loss(logits, targets, valid, params=params).total
    logits[0, 0], targets[0, 0] = 37, 1
    logits[1, :, 0] = -5
    torch.testing.assert_close(compute_loss(logits, targets, valid, params=params).total, before)


def test_no_valid_voxel_gives_zero_and_finite_gradients() -> None:
    logits, targets, valid = _batch()
    logits.requires_grad_()
    loss = compute_loss(logits, targets, torch.zeros_like(valid), params=LossParams())
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert loss.total == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_two_ranks_average_to_the_loss_of_the_whole_batch() -> None:
    """Ranks with different numbers of valid voxels: the mean of their losses is that of one rank."""
    logits, targets, valid = _batch(2)
    valid[0, :, 0] = 0
    valid[1, :2] = 0
    params = LossParams()
    whole = compute_loss(logits, targets, valid, params=params).total
    counts: list[list[torch.Tensor]] = []
    for rank in range(2):  # first pass: what each rank would add up
        seen: list[torch.Tensor] = []
        share = slice(rank, rank + 1)
        compute_loss(logits[share], targets[share], valid[share], params=params,
                     sum_over_ranks=lambda count, seen=seen: (seen.append(count), count)[1])  # fmt: skip
        counts.append(seen)
    sums = [a + b for a, b in zip(*counts, strict=True)]
    parts = []
    for rank in range(2):
        answers = iter(sums)
        share = slice(rank, rank + 1)
        part = compute_loss(
            logits[share],
            targets[share],
            valid[share],
            params=params,
            sum_over_ranks=lambda count, answers=answers: next(answers),
            n_ranks=2,
        )
        parts.append(part.total)
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_rare_foreground_weighs_more_and_the_share_is_clipped() -> None:
    targets = torch.zeros(1, 1, 1, 10, 10)
    targets[..., 0, 0] = 1
    weight = foreground_weight(targets, torch.ones_like(targets), clip=(0.05, 0.95))
    assert torch.isclose(weight[..., 0, 0], torch.tensor(19.0)).all()
    assert weight[..., 1, 1] == 1
    inverse = foreground_weight(1 - targets, torch.ones_like(targets), clip=(0.05, 0.95))
    assert torch.isclose(inverse[..., 0, 0], torch.tensor(19.0)).all()


def test_dice_falls_from_wrong_to_right() -> None:
    targets = torch.zeros(1, 1, 4, 20, 20)
    targets[..., :10] = 1
    right = dice_of_channels(20 * (targets * 2 - 1), targets, torch.ones_like(targets))
    wrong = dice_of_channels(-20 * (targets * 2 - 1), targets, torch.ones_like(targets))
    assert right.item() < 0.01
    assert wrong.item() > 0.85
