"""The training loop: draw, augment, forward, descend; validate, and keep a checkpoint to go on from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from synmlops.learning.augment import augment
from synmlops.learning.checkpoint import Model, ModelMeta, load_state, save_state
from synmlops.learning.distributed import Ranks
from synmlops.learning.losses import LossTerms, compute_loss
from synmlops.learning.networks.registry import build_network
from synmlops.learning.predict import autocast
from synmlops.learning.sampling import LabelledRegion, PatchSampler
from synmlops.learning.targets import targets_of
from synmlops.params import (
    AugmentParams,
    LossParams,
    NetworkParams,
    SamplingParams,
    SynmlopsError,
    TrainParams,
)

LOG_EVERY = 10
"""Steps between two points of the loss curve, a checkpoint adding one; each is the mean since the last."""

Row = dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """Everything in params.yaml that training depends on."""

    network: NetworkParams
    sampling: SamplingParams
    augment: AugmentParams
    loss: LossParams
    train: TrainParams
    seed: int


class Observer(Protocol):
    """Who is told how training goes; only on rank 0."""

    def logged(self, step: int, row: Row) -> None:
        """Hear of a point of a curve."""

    def saved(self, step: int) -> None:
        """Hear that everything up to this step will survive a crash."""


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimiser."""

    step: int = 0
    best_step: int = 0
    best_score: float | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Fitted:
    """The outcome of training."""

    best: dict[str, Tensor]  # averaged weights of the best validation score; the last ones without validation
    last: dict[str, Tensor]
    best_step: int
    best_score: float | None
    history: list[Row]


def fit(
    recipe: Recipe,
    regions: Sequence[LabelledRegion],
    *,
    meta: ModelMeta,
    ranks: Ranks,
    state_path: Path,
    validate: Callable[[Model], float] | None,
    observer: Observer,
) -> Fitted:
    """Train a network, going on from `state_path` if it holds a checkpoint.

    Parameters
    ----------
    recipe : Recipe
    regions : sequence of LabelledRegion
        The tissue patches are drawn from.
    meta : ModelMeta
        Network, channels and intensity statistics of the model to be.
    ranks : Ranks
        Each takes its share of the global batch; the result does not depend on how many there are.
    state_path : Path
        Resume checkpoint, written every `checkpoint_every` steps by rank 0.
    validate : callable, optional
        Gives the score of a model, higher is better. Called on rank 0 every `validate_every` steps and at
        the end.
    observer : Observer

    Raises
    ------
    SynmlopsError
        If the batch cannot be shared by the ranks, or the loss stops being finite.
    """
    trainer = _Trainer(recipe, meta=meta, ranks=ranks)
    trainer.restore(state_path)
    sampler = PatchSampler(regions, params=recipe.sampling, seed=recipe.seed)
    train, progress = recipe.train, trainer.progress
    sums: dict[str, Tensor] = {}
    n_summed = 0
    while progress.step < train.steps:
        step = progress.step = progress.step + 1
        loss = trainer.descend(_share_of_batch(sampler, recipe.sampling.batch_size, step, ranks))
        for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
            sums[name] = sums.get(name, torch.zeros((), device=ranks.device)) + value
        n_summed += 1
        is_last = step == train.steps
        is_saved = step % train.checkpoint_every == 0 or is_last
        if step % LOG_EVERY == 0 or is_saved:  # a checkpoint leaves no sum behind, and is known to be finite
            row = {name: float(ranks.sum(total)) / ranks.n_ranks / n_summed for name, total in sums.items()}
            sums, n_summed = {}, 0
            _check_finite(row, step)
            trainer.note(row | {"learning_rate": trainer.learning_rate}, observer)
        if validate is not None and (step % train.validate_every == 0 or is_last):
            trainer.validate(validate, observer)
        if is_saved:
            trainer.save(state_path, observer)
    last = trainer.averaged
    return Fitted(
        best=progress.best_weights or last,
        last=last,
        best_step=progress.best_step or progress.step,
        best_score=progress.best_score,
        history=progress.history,
    )


class _Trainer:
    """Network, optimiser, averaged weights and progress: what a checkpoint holds."""

    def __init__(self, recipe: Recipe, *, meta: ModelMeta, ranks: Ranks) -> None:
        self.recipe, self.meta, self.ranks = recipe, meta, ranks
        if recipe.sampling.batch_size % ranks.n_ranks:
            raise SynmlopsError(
                f"sampling.batch_size: {recipe.sampling.batch_size} cannot be shared by {ranks.n_ranks} "
                f"processes; use a multiple of {ranks.n_ranks}"
            )
        torch.manual_seed(recipe.seed)
        self.network = self._for_ranks(build_network(recipe.network))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=recipe.train.learning_rate,
            weight_decay=recipe.train.weight_decay,
            fused=True,
        )
        self.averaged = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.progress = Progress()
        self.wrapped: nn.Module = self.network
        if ranks.n_ranks > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.network, device_ids=ids)

    @property
    def learning_rate(self) -> float:
        return learning_rate_at(self.progress.step, self.recipe.train)

    def descend(self, batch: "_Batch") -> LossTerms:
        """Take one optimiser step on this rank's share of the batch; the terms hold the gradient norm too."""
        recipe, ranks = self.recipe, self.ranks
        image = (batch.image.to(ranks.device).float() - self.meta.mean) / self.meta.std
        sides = batch.sides.to(ranks.device)
        image, sides = augment(image, sides, rngs=batch.rngs, params=recipe.augment)
        targets, valid = targets_of(sides, batch.known.to(ranks.device))
        self.network.train()
        with autocast(ranks.device, recipe.train.precision):
            logits = self.wrapped(image[:, None])
        loss = compute_loss(
            logits, targets, valid, params=recipe.loss, sum_over_ranks=ranks.sum, n_ranks=ranks.n_ranks
        )
        self.optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.train.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self._average()
        return replace(loss, terms={**loss.terms, "gradient_norm": norm})

    def note(self, row: Row, observer: Observer) -> None:
        """Keep a point of the curves and tell the observer."""
        self.progress.history.append({"step": float(self.progress.step), **row})
        if self.ranks.is_first:
            observer.logged(self.progress.step, row)

    def validate(self, score_of: Callable[[Model], float], observer: Observer) -> None:
        """Score the averaged weights on rank 0 and keep them if they are the best so far."""
        progress = self.progress
        score = 0.0
        if self.ranks.is_first:
            network = build_network(self.recipe.network)
            network.load_state_dict(self.averaged)
            score = score_of(Model(network.to(self.ranks.device).eval(), self.meta))
        score = float(self.ranks.from_first(score))  # type: ignore[arg-type]
        self.note({"validation_f1": score}, observer)
        if progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_step = score, progress.step
            progress.best_weights = {name: value.clone() for name, value in self.averaged.items()}

    def save(self, path: Path, observer: Observer) -> None:
        """Write a checkpoint on rank 0; the others need none, since all hold the same."""
        if self.ranks.is_first:
            state = {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "averaged": self.averaged,
                "progress": vars(self.progress),
            }
            save_state(path, state)
            observer.saved(self.progress.step)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one. Samples and noise need no state: the step seeds them."""
        state = load_state(path)
        if state is None:
            return
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averaged = {name: value.to(self.ranks.device) for name, value in state["averaged"].items()}
            self.progress = Progress(**state["progress"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise SynmlopsError(
                f"{path}: a checkpoint of another version of synmlops ({error}); delete it to start over"
            ) from error

    def _average(self) -> None:
        step = self.progress.step
        decay = min(self.recipe.train.ema, (1 + step) / (10 + step))  # early weights fade sooner
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.averaged[name].lerp_(value, 1 - decay)
            else:
                self.averaged[name].copy_(value)

    def _for_ranks(self, network: nn.Module) -> nn.Module:
        ranks = self.ranks
        if ranks.n_ranks > 1 and self.recipe.network.norm == "batch":
            if ranks.device.type != "cuda":
                raise SynmlopsError(
                    "network.norm: batch norm over several CPU processes would see a part of the batch each; "
                    "use group, or one process"
                )
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return network.to(ranks.device)


@dataclass(frozen=True)
class _Batch:
    image: Tensor  # (n, z, y, x)
    sides: Tensor
    known: Tensor  # (n, 3)
    rngs: list[np.random.Generator]


def learning_rate_at(step: int, train: TrainParams) -> float:
    """Warm up linearly, then fall along a cosine to zero after the last step.

    Examples
    --------
    >>> train = TrainParams(steps=100, warmup_steps=10, learning_rate=1.0)
    >>> [round(learning_rate_at(step, train), 3) for step in (1, 10, 55, 100)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    share = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _share_of_batch(sampler: PatchSampler, batch_size: int, step: int, ranks: Ranks) -> _Batch:
    patches = [sampler.draw(step, index) for index in range(ranks.rank, batch_size, ranks.n_ranks)]
    return _Batch(
        image=torch.from_numpy(np.stack([patch.image for patch in patches])),
        sides=torch.from_numpy(np.stack([patch.sides for patch in patches])),
        known=torch.tensor([patch.known for patch in patches]),
        rngs=[patch.rng for patch in patches],
    )


def _check_finite(row: Row, step: int) -> None:
    """Stop before a checkpoint can keep broken weights; the row is the same on all ranks."""
    broken = [name for name, value in row.items() if not math.isfinite(value)]
    if broken:
        raise SynmlopsError(
            f"training: {', '.join(broken)} stopped being finite at step {step}; lower train.learning_rate "
            "or train.gradient_clip, or set train.precision: float32"
        )
