"""What training carries from step to step: network, optimiser, averaged weights; and one step of it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from synmlops.learning.alarms import CollapseWatch
from synmlops.learning.allocator import keep_freed_memory
from synmlops.learning.checkpoint import Model, ModelMeta, load_start
from synmlops.learning.distributed import Ranks
from synmlops.learning.feed import Batch
from synmlops.learning.losses import LossTerms, Totals, compute_loss
from synmlops.learning.memory import Demand, fits, largest_batch, out_of_memory
from synmlops.learning.networks.registry import build_network
from synmlops.learning.optim import build_optimizer, learning_rate_at
from synmlops.learning.precision import autocast
from synmlops.learning.states import States
from synmlops.learning.targets import targets_of
from synmlops.params import (
    AugmentParams,
    LossParams,
    NetworkParams,
    Params,
    SamplingParams,
    SynmlopsError,
    TrainParams,
)

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

    @classmethod
    def of(cls, params: Params) -> "Recipe":
        """Take from all params what training depends on."""
        return cls(params.network, params.sampling, params.augment, params.loss, params.train, params.seed)


class Observer(Protocol):
    """Who is told how training goes; only on rank 0."""

    def logged(self, step: int, row: Row) -> None:
        """Hear of a point of a curve."""

    def saved(self, step: int) -> None:
        """Hear that everything up to this step will survive a crash."""

    def alarm(self, step: int, message: str) -> None:
        """Hear of what needs a look: a channel that collapsed or recovered, a loss that is not finite."""


class Silent:
    """The observer that tells nobody."""

    def logged(self, step: int, row: Row) -> None:
        """Let a point of a curve pass."""

    def saved(self, step: int) -> None:
        """Let a checkpoint pass."""

    def alarm(self, step: int, message: str) -> None:
        """Let an alarm pass."""


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimiser."""

    step: int = 0
    best_step: int = 0
    best_score: float | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    is_due: bool = False  # a validation, of this step
    n_worse: int = 0  # validations since the best
    stopped: bool = False  # early
    history: list[Row] = field(default_factory=list)


class Trainer:
    """Everything that a checkpoint holds, on one rank.

    Raises
    ------
    SynmlopsError
        If the batch cannot be shared by the ranks and their parts, the network not be trained by several, or
        `train.start_from` is no model of this network.
    """

    def __init__(self, recipe: Recipe, *, meta: ModelMeta, ranks: Ranks) -> None:
        self.recipe, self.meta, self.ranks = recipe, meta, ranks
        self._n_parts = _count_parts(recipe, ranks)
        if ranks.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(recipe.seed)
        network = build_network(recipe.network)
        if recipe.train.start_from is not None:
            start = load_start(Path(recipe.train.start_from), recipe.network)
            network.load_state_dict(start.network.state_dict())
        self.network = self._for_ranks(network)
        self.optimizer = build_optimizer(self.network, recipe.train)
        assert all(group["fused"] for group in self.optimizer.param_groups)  # others know no `found_inf`
        self.averaged = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.progress = Progress()
        self.collapse = CollapseWatch(ranks.device)
        self._sums: dict[str, Tensor] = {}  # since the last point of the curves; means over the ranks
        self._n_summed = 0
        self._unfit = torch.zeros(2, device=ranks.device)  # steps that were not finite, and the first of them
        self._wrapped: nn.Module = self.network
        if ranks.n_ranks > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(
                self.network, device_ids=ids, gradient_as_bucket_view=True
            )

    @property
    def learning_rate(self) -> float:
        """Of the current step."""
        return learning_rate_at(self.progress.step, self.recipe.train)

    def descend(self, batch: Batch) -> None:
        """Take one optimiser step on this rank's share of the batch.

        Nothing is read from the device. Where the loss or a gradient of any rank is not finite, no weight
        moves; `check_finite` raises later.
        """
        recipe, ranks = self.recipe, self.ranks
        torch.manual_seed(_noise_seed(recipe.seed, self.progress.step, ranks.rank))  # for layers that draw
        _, valid = targets_of(batch.sides, batch.known)
        totals = Totals.of(valid, sum_over_ranks=ranks.sum, n_parts=self._n_parts)
        del valid  # which takes more memory than the batch
        self.network.train()
        self.optimizer.zero_grad()
        whole = batch.image, batch.sides, batch.known
        losses = []
        for number, part in enumerate(zip(*(x.chunk(self._n_parts) for x in whole), strict=True), start=1):
            with nullcontext() if number == self._n_parts else self._unsynced():
                losses.append(self._backward(*part, totals=totals))
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.train.gradient_clip)
        total = torch.stack([loss.total.detach() for loss in losses]).sum()
        self._move(torch.isfinite(total) & torch.isfinite(norm))
        terms = {name: sum(loss.terms[name] for loss in losses) for name in losses[0].terms}
        self._add_up({"loss": total, **terms, "gradient_norm": norm})  # type: ignore[dict-item]

    def log(self, observer: Observer) -> None:
        """Add a point to the curves, the mean since the last, and look after collapsed channels."""
        means = self.ranks.sum(torch.stack(list(self._sums.values()))) / self.ranks.n_ranks
        row = dict(zip(self._sums, (value / self._n_summed for value in means.tolist()), strict=True))
        messages = self.collapse.judge(self.progress.step, self._n_summed, ranks=self.ranks)
        self._sums, self._n_summed = {}, 0
        self._note(row | {"learning_rate": self.learning_rate}, observer)
        for message in messages if self.ranks.is_first else ():
            observer.alarm(self.progress.step, message)

    def check_finite(self, describe: Callable[[int], Sequence[object]], observer: Observer) -> None:
        """Stop where a step was not finite; the answer is the same on all ranks.

        Parameters
        ----------
        describe : callable
            Gives the draws of a step.
        observer : Observer

        Raises
        ------
        SynmlopsError
            With the first such step, its patches, and what to try.
        """
        n, first = (int(value) for value in self._unfit.tolist())
        if not n:
            return
        drawn = "; ".join(str(draw) for draw in describe(first))
        message = (
            f"training: loss or gradient stopped being finite at step {first} ({n} of the steps up to "
            f"{self.progress.step}); its patches: {drawn}. Look at them with `synmlops patches`; lower "
            "train.learning_rate or train.gradient_clip, or set train.precision: float32"
        )
        if self.ranks.is_first:
            observer.alarm(first, message)
        raise SynmlopsError(message)

    def validate(self, score_of: Callable[[Model], float], observer: Observer) -> None:
        """Score the averaged weights on rank 0, keep the best so far, and see whether to stop early."""
        progress, train = self.progress, self.recipe.train
        scores: list[float] = []
        if self.ranks.is_first:
            network = build_network(self.recipe.network)
            network.load_state_dict(self.averaged)
            model = Model(network.to(self.ranks.device).eval(), self.meta)
            if not fits(lambda: scores.append(score_of(model))):
                raise SynmlopsError(
                    f"validation ran out of memory with windows of {train.validation.window_zyx}; lower "
                    "train.validation.window_zyx or train.validation.batch_size"
                )
        score = float(self.ranks.from_first(sum(scores)))  # type: ignore[arg-type]
        progress.is_due = False
        self._note({"validation_f1": score}, observer)
        progress.n_worse += 1
        if progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_step, progress.n_worse = score, progress.step, 0
            progress.best_weights = {name: value.clone() for name, value in self.averaged.items()}
        progress.stopped = 0 < train.early_stop <= progress.n_worse

    def save(self, states: States, origin: dict[str, Any], observer: Observer) -> None:
        """Write a checkpoint on rank 0; the others need none, since all hold the same."""
        if self._sums:
            values = self.ranks.sum(torch.stack(list(self._sums.values()))) / self.ranks.n_ranks
            self._sums = dict(zip(self._sums, values.unbind(), strict=True))
        self.collapse.settle(self.ranks)
        if self.ranks.is_first:
            state = {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "averaged": self.averaged,
                "progress": vars(self.progress),
                "collapse": self.collapse.state(),
                "sums": self._sums,
                "n_summed": self._n_summed,
                "origin": origin,
            }
            states.save(self.progress.step, state)
            observer.saved(self.progress.step)

    def restore(self, states: States) -> None:
        """Go on from the newest checkpoint, if there is one; rank 0 reads it for all.

        Patches and noise need no state: the step seeds them.
        """
        state: Any = self.ranks.from_first(states.load() if self.ranks.is_first else None)
        if state is None:
            return
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averaged = {name: value.to(self.ranks.device) for name, value in state["averaged"].items()}
            self.progress = Progress(**state["progress"])
            self.collapse.restore(state["collapse"])
            self._sums = {name: value.to(self.ranks.device) for name, value in state["sums"].items()}
            self._n_summed = state["n_summed"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise SynmlopsError(
                f"{states.folder}: a checkpoint of another version of synmlops ({error}); delete it to "
                "start over"
            ) from error

    def out_of_memory(self) -> SynmlopsError:
        """Find out how many patches would fit, and say what to lower."""
        self.optimizer.zero_grad()
        share = self.recipe.sampling.batch_size // self.ranks.n_ranks
        n_weights = sum(weight.numel() for weight in self.network.parameters())
        demand = Demand(
            device=self.ranks.device,
            patch_zyx=self.recipe.sampling.patch_zyx,
            part=share // self._n_parts,
            share=share,
            n_ranks=self.ranks.n_ranks,
            weights_bytes=5 * 4 * n_weights,
        )
        fitting = largest_batch(self._try_batch, below=demand.part)
        return out_of_memory(demand, fitting=fitting, step=self.progress.step)

    def _backward(self, image: Tensor, sides: Tensor, known: Tensor, *, totals: Totals) -> LossTerms:
        ranks = self.ranks
        targets, valid = targets_of(sides, known)
        with autocast(ranks.device, self.recipe.train.precision):
            logits = self._wrapped(image[:, None])
        self.collapse.add(logits if isinstance(logits, Tensor) else logits[0], targets, valid)
        loss = compute_loss(
            logits,
            targets,
            valid,
            params=self.recipe.loss,
            totals=totals,
            sum_over_ranks=ranks.sum,
            n_ranks=ranks.n_ranks,
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
        return loss

    def _move(self, is_finite: Tensor) -> None:
        """Step the optimiser unless some rank's loss or gradient is not finite, without asking the device."""
        unfit = (self.ranks.sum((~is_finite).float()) > 0).float()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.found_inf = unfit  # type: ignore[attr-defined]  # a fused optimiser moves nothing if 1
        self.optimizer.step()
        first = torch.where((self._unfit[0] == 0) & (unfit > 0), float(self.progress.step), self._unfit[1])
        self._unfit = torch.stack([self._unfit[0] + unfit, first])
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        step = self.progress.step
        decay = min(self.recipe.train.ema, (1 + step) / (10 + step))  # early weights fade sooner
        now = self.network.state_dict()
        floats = [name for name, value in now.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.averaged[n] for n in floats], [now[n] for n in floats], 1 - decay)
        for name in now.keys() - set(floats):
            self.averaged[name].copy_(now[name])

    def _add_up(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.detach()
        self._n_summed += 1

    def _note(self, row: Row, observer: Observer) -> None:
        self.progress.history.append({"step": float(self.progress.step), **row})
        if self.ranks.is_first:
            observer.logged(self.progress.step, row)

    def _unsynced(self) -> Any:
        """Leave the exchange of gradients to the last part."""
        wrapped = self._wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _try_batch(self, n: int) -> None:
        """Do one pass of `n` empty patches, by a network of its own: DDP would wait for the other ranks."""
        recipe, ranks, device = self.recipe, self.ranks, self.ranks.device
        network = build_network(recipe.network).to(device).train()
        share = (recipe.sampling.batch_size // ranks.n_ranks, *recipe.sampling.patch_zyx)
        image = torch.zeros(share, device=device)
        known = torch.ones((n, 3), dtype=torch.bool, device=device)
        targets, valid = targets_of(torch.zeros(share, dtype=torch.uint8, device=device)[:n], known)
        with autocast(device, recipe.train.precision):
            logits = network(image[:n, None])
        compute_loss(logits, targets, valid, params=recipe.loss).total.backward()  # type: ignore[no-untyped-call]

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


def _count_parts(recipe: Recipe, ranks: Ranks) -> int:
    """Check that the batch divides into ranks and parts; give the parts."""
    batch, parts = recipe.sampling.batch_size, recipe.train.accumulate
    if batch % ranks.n_ranks:
        raise SynmlopsError(
            f"sampling.batch_size: {batch} cannot be shared by {ranks.n_ranks} processes; use a multiple of "
            f"{ranks.n_ranks}"
        )
    share = batch // ranks.n_ranks
    if share % parts:
        divisors = [str(n) for n in range(1, share + 1) if share % n == 0]
        raise SynmlopsError(
            f"train.accumulate: the {share} patches of a process in a step cannot be taken in {parts} equal "
            f"parts; use one of {', '.join(divisors)}"
        )
    return parts


def _noise_seed(seed: int, step: int, rank: int) -> int:
    """Seed what layers draw (dropout), so that it depends on neither resumes nor validations."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
