"""The sums over voxels that the common loss terms are made of, in one pass forward and one back."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class PlaneSums(NamedTuple):
    """Sums over the voxels of each plane, (n, c) each.

    With x the logit, p its sigmoid, t the target, v the validity and f = t v the known foreground; mistake
    is the binary cross-entropy, softplus(-x) on foreground and softplus(x) elsewhere.
    """

    mistake: Tensor  # of v * mistake
    foreground_mistake: Tensor  # of f * mistake
    hit: Tensor  # of f * p
    probability: Tensor  # of v * p
    square: Tensor  # of v * p * p
    foreground: Tensor  # of f; no gradient
    valid: Tensor  # of v; no gradient


def plane_sums(logits: Tensor, targets: Tensor, valid: Tensor) -> PlaneSums:
    """Sum over each plane of a batch what binary cross-entropy, Dice and Tversky loss need.

    Written out by hand since it is the whole of the usual loss: autograd would make, keep and read a
    dozen tensors of the batch's size, which takes about twice as long on a CPU.

    Parameters
    ----------
    logits : (n, c, z, y, x) float tensor
        Of any float type and memory format; the sums are float32, or float64 for float64.
    targets, valid : (n, c, z, y, x) float tensor
        `targets` is 0 or 1, `valid` from 0 to 1; no gradient flows to them.

    Examples
    --------
    >>> logits = torch.zeros(1, 1, 1, 1, 4)
    >>> targets = torch.tensor([0., 0., 1., 1.]).reshape(logits.shape)
    >>> valid = torch.tensor([0., 1., 1., 1.]).reshape(logits.shape)
    >>> sums = plane_sums(logits, targets, valid)
    >>> float(sums.hit), float(sums.probability), float(sums.foreground), float(sums.valid)
    (1.0, 1.5, 2.0, 3.0)
    """
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = [part.to(kind).flatten(2).flatten(0, 1).contiguous() for part in (logits, targets, valid)]
    sums: Tensor = _Sums.apply(*flat)  # type: ignore[no-untyped-call]
    return PlaneSums(*sums.reshape(*logits.shape[:2], -1).unbind(-1))


class _Sums(torch.autograd.Function):
    """(planes, voxels) each in, (planes, 7) out."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        sums = logits.new_zeros(len(logits), len(PlaneSums._fields))
        probability = torch.empty_like(logits)
        for slab in _slabs(logits):
            x, t, v = logits[slab], targets[slab], valid[slab]
            f = t * v
            p = torch.sigmoid(x, out=probability[slab])
            mistake = softplus(torch.addcmul(x, x, t, value=-2))  # the logit of the wrong answer
            vp = v * p
            parts = (mistake * v, mistake.mul_(f), f * p, vp, p * vp, f, v)
            sums[slab] = torch.stack([part.sum(1) for part in parts], dim=1)
        ctx.save_for_backward(probability, targets, valid)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        probability, targets, valid = ctx.saved_tensors
        result = torch.empty_like(probability)
        for slab in _slabs(probability):
            p, t, v = probability[slab], targets[slab], valid[slab]
            mistake, of_foreground, hit, linear, square, _, _ = gradients[0][slab, :, None].unbind(1)
            # the derivative of the mistake is p - t, and that of p is p (1 - p)
            slope = torch.addcmul(linear, p, square, value=2).addcmul_(t, hit).mul_(p).mul_(1 - p)
            weight = torch.addcmul(mistake, t, of_foreground)
            torch.addcmul(slope, weight, p - t, out=result[slab]).mul_(v)
        return result, None, None


def _slabs(planes: Tensor) -> Iterator[slice]:
    """Give the planes that are worked on at once: one on a CPU, whose cache holds it; all on a GPU."""
    if planes.device.type != "cpu":
        yield slice(None)
        return
    for plane in range(len(planes)):
        yield slice(plane, plane + 1)
