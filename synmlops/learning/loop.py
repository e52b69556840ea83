"""The training loop: draw, augment, forward, descend; validate, and keep a checkpoint to go on from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synmlops.learning.checkpoint import Model, ModelMeta
from synmlops.learning.distributed import Ranks
from synmlops.learning.feed import Feed
from synmlops.learning.memory import fits
from synmlops.learning.optim import learning_rate_at
from synmlops.learning.sampling import LabelledRegion, PatchSampler
from synmlops.learning.states import States
from synmlops.learning.stopping import Stopping
from synmlops.learning.trainer import Observer, Recipe, Row, Silent, Trainer
from synmlops.progress import say

__all__ = ["LOG_EVERY", "Fitted", "Observer", "Recipe", "Row", "Silent", "fit", "learning_rate_at"]

LOG_EVERY = 10
"""Steps between two points of the loss curve, a validation adding one; each is the mean since the last."""


@dataclass(frozen=True)
class Fitted:
    """The outcome of training."""

    best: dict[str, Tensor]  # averaged weights of the best validation score; the last ones without validation
    last: dict[str, Tensor]
    best_step: int
    last_step: int
    best_score: float | None
    history: list[Row]


def fit(
    recipe: Recipe,
    regions: Sequence[LabelledRegion],
    *,
    meta: ModelMeta,
    ranks: Ranks,
    states: Path,
    validate: Callable[[Model], float] | None,
    observer: Observer,
    origin: dict[str, Any] | None = None,
) -> Fitted:
    """Train a network, going on from the newest checkpoint in `states` if there is one.

    SIGTERM ends the process once the step is finished and saved, on all ranks at the same step.

    Parameters
    ----------
    recipe : Recipe
    regions : sequence of LabelledRegion
        The tissue patches are drawn from.
    meta : ModelMeta
        Network, channels and intensity statistics of the model to be.
    ranks : Ranks
        Each takes its share of the global batch; the result does not depend on how many there are.
    states : Path
        Folder of resume checkpoints, written every `checkpoint_every` steps by rank 0.
    validate : callable, optional
        Gives the score of a model, higher is better. Called on rank 0 every `validate_every` steps and at
        the end.
    observer : Observer
    origin : dict, optional
        Kept in each checkpoint, to tell whose it is: plain values alone.

    Raises
    ------
    SynmlopsError
        If the batch cannot be shared by the ranks, the loss stops being finite, or memory does not suffice.
    SystemExit
        After SIGTERM.
    """
    trainer, kept = Trainer(recipe, meta=meta, ranks=ranks), States(states)
    trainer.restore(kept)
    train, progress = recipe.train, trainer.progress
    with feed_of(recipe, regions, mean=meta.mean, std=meta.std, ranks=ranks) as feed, Stopping() as stopping:
        while progress.is_due or (progress.step < train.steps and not progress.stopped):
            if not progress.is_due:  # it is if training was asked to end before it could validate
                _take_step(trainer, feed, observer, validates=validate is not None)
            step = progress.step
            is_left = _all_leave(stopping, ranks, may_ask=progress.is_due or step % LOG_EVERY == 0)
            if progress.is_due and not is_left:
                with stopping.at_once():
                    trainer.validate(validate or (lambda model: 0.0), observer)
            if is_left or progress.stopped or step % train.checkpoint_every == 0 or step == train.steps:
                trainer.check_finite(feed.describe, observer)  # broken weights are never kept
                trainer.save(kept, origin or {}, observer)
            if is_left:
                if ranks.is_first:
                    say([f"asked to end; step {step} is saved, and the same command goes on from there"])
                stopping.leave()
    last = trainer.averaged
    return Fitted(
        best=progress.best_weights or last,
        last=last,
        best_step=progress.best_step or progress.step,
        last_step=progress.step,
        best_score=progress.best_score,
        history=progress.history,
    )


def _take_step(trainer: Trainer, feed: Feed, observer: Observer, *, validates: bool) -> None:
    """Descend once, add to the curves, and see whether it is time to validate."""
    progress, train = trainer.progress, trainer.recipe.train
    step = progress.step = progress.step + 1
    trainer.ranks.at_step(step)
    if not fits(lambda: trainer.descend(feed.batch(step))):
        raise trainer.out_of_memory()
    is_last = step == train.steps
    progress.is_due = validates and (step % train.validate_every == 0 or is_last)
    if progress.is_due or is_last or step % LOG_EVERY == 0:
        trainer.check_finite(feed.describe, observer)
        trainer.log(observer)


def feed_of(
    recipe: Recipe, regions: Sequence[LabelledRegion], *, mean: float, std: float, ranks: Ranks
) -> Feed:
    """Give the batches of a training, on this rank; `mean` and `std` are grey levels."""
    voxel_nm = regions[0].volume.grid.voxel_nm  # as of all: prepare refuses others
    return Feed(
        PatchSampler(regions, params=recipe.sampling, seed=recipe.seed),
        augment=recipe.augment,
        batch_size=recipe.sampling.batch_size,
        rank=ranks.rank,
        n_ranks=ranks.n_ranks,
        mean=mean,
        std=std,
        isotropic=max(voxel_nm) <= 1.05 * min(voxel_nm),
        device=ranks.device,
    )


def _all_leave(stopping: Stopping, ranks: Ranks, *, may_ask: bool) -> bool:
    """Whether any rank was asked to end, as all ranks see it at the same step.

    GPUs are asked only where the host reads from them anyway.
    """
    if ranks.n_ranks == 1:
        return stopping.asked
    if ranks.device.type == "cuda" and not may_ask:
        return False
    asked = torch.tensor(float(stopping.asked), device=ranks.device)
    return bool(ranks.highest(asked) > 0)
