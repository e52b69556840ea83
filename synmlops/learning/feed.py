"""Batches for training, made ahead: draw, cut from memory maps, paste, augment.

A patch depends on nothing but (seed, step, index), so threads, ranks and the order of requests change
nothing, and any batch of any run can be made again.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from threading import Barrier
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synmlops.learning.augment.plan import Plan, apply_plan, draw_plan
from synmlops.learning.paste import Donors, Paste, paste_into
from synmlops.learning.sampling import Draw, LabelledRegion, PatchSampler
from synmlops.params import AugmentParams
from synmlops.volumes.prepared import UNTRUSTED, Box

AHEAD = 2
"""Batches that are made before they are asked for."""

_MOST_THREADS = 4


@dataclass(frozen=True)
class Drawn:
    """Where a patch lies and what happens to it, for a log.

    Examples
    --------
    >>> str(Drawn("vnc_1", (0, 64, 128), ("flip", "noise")))
    'vnc_1 at z y x = 0, 64, 128 (flip, noise)'
    """

    volume: str
    start_zyx: tuple[int, int, int]
    augmentations: tuple[str, ...]

    def __str__(self) -> str:
        names = f" ({', '.join(self.augmentations)})" if self.augmentations else ""
        return f"{self.volume} at z y x = {', '.join(map(str, self.start_zyx))}{names}"


@dataclass(frozen=True)
class Batch:
    """A rank's share of a batch, on its device."""

    image: Tensor  # (n, z, y, x) float32, normalised
    sides: Tensor  # (n, z, y, x) uint8
    known: Tensor  # (n, 3) bool
    draws: tuple[Drawn, ...]


@dataclass(frozen=True)
class Chances:
    """All chances of one patch, drawn without a voxel."""

    draw: Draw
    plan: Plan
    pastes: tuple[Paste, ...]

    @property
    def drawn(self) -> Drawn:
        """The chances in words; a paste counts whether it finds a place or not."""
        names = self.plan.names() + (("copy_paste",) if self.pastes else ())
        return Drawn(self.draw.volume, self.draw.start_zyx, names)


@dataclass(frozen=True)
class Patch:
    """One patch of a batch; out of the pool it is raw and pinned if it is for a GPU."""

    image: Tensor  # (z, y, x)
    sides: Tensor
    chances: Chances


class Feed:
    """Give batch after batch, the next ones being made meanwhile.

    Threads of its own read, paste and, on a CPU, augment. For a GPU the raw voxels go up as they are, and
    augmentation runs there, on the stream of whoever asks for the batch.

    Parameters
    ----------
    sampler : PatchSampler
    augment : AugmentParams
    batch_size : int
        Patches of one step, over all ranks.
    rank, n_ranks : int
        This one takes the patches rank, rank + n_ranks, ... of each batch.
    mean, std : float
        Grey levels that become 0 and 1.
    isotropic : bool
        Whether flips and quarter turns may change z with y and x.
    device : torch.device

    Raises
    ------
    SynmlopsError
        If synapses are to be pasted and none can be.
    """

    def __init__(
        self,
        sampler: PatchSampler,
        *,
        augment: AugmentParams,
        batch_size: int,
        rank: int,
        n_ranks: int,
        mean: float,
        std: float,
        isotropic: bool,
        device: torch.device,
    ) -> None:
        self._sampler, self._augment, self._isotropic = sampler, augment, isotropic
        self._batch_size, self._share = batch_size, range(rank, batch_size, n_ranks)
        self.mean, self.std, self._device = mean, std, device
        self._donors = Donors(sampler.regions) if augment.copy_paste.probability else None
        self._pool = _pool_of_single_threads(min(_MOST_THREADS, _count_cores()))
        self._pending: dict[int, list[Future[Patch]]] = {}

    def batch(self, step: int) -> Batch:
        """Give this rank's share of the batch of a step.

        An error that arose in making it, now or ahead, is raised here as it is.
        """
        wanted = range(step, step + AHEAD + 1)
        for other in [one for one in self._pending if one not in wanted]:
            for future in self._pending.pop(other):
                future.cancel()
        for one in wanted:
            if one not in self._pending:
                self._pending[one] = [self._submit(one, index) for index in self._share]
        made = [self._finish(future.result()) for future in self._pending.pop(step)]
        return Batch(
            image=torch.stack([one.image for one in made]),
            sides=torch.stack([one.sides for one in made]),
            known=torch.tensor([one.chances.draw.known for one in made]).to(self._device, non_blocking=True),
            draws=tuple(one.chances.drawn for one in made),
        )

    def describe(self, step: int) -> tuple[Drawn, ...]:
        """Give the draws of the whole batch of a step, over all ranks; no voxel is read."""
        return tuple(self.chances(step, index).drawn for index in range(self._batch_size))

    def chances(self, step: int, index: int) -> Chances:
        """Draw all chances of patch `index` of the whole batch at a step."""
        draw = self._sampler.draw(step, index)
        plan = draw_plan(
            draw.rng, params=self._augment, patch_zyx=draw.box.shape_zyx, isotropic=self._isotropic
        )
        pastes: tuple[Paste, ...] = ()
        if self._donors is not None and draw.rng.random() < self._augment.copy_paste.probability:
            n = int(draw.rng.integers(1, self._augment.copy_paste.most + 1))
            pastes = self._donors.draw(draw.rng, known=draw.known, n=n)
        return Chances(draw, plan, pastes)

    def close(self) -> None:
        """Let go of what is being made ahead."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def patch(self, step: int, index: int) -> Patch:
        """Make patch `index` of the whole batch of a step, here and now."""
        return self._finish(self._make(step, index))

    def _submit(self, step: int, index: int) -> Future[Patch]:
        """Have a thread make it with the settings of whoever asks, such as `without_kernels`."""
        return self._pool.submit(copy_context().run, self._make, step, index)

    def _make(self, step: int, index: int) -> Patch:
        raw = self._raw(self.chances(step, index))
        return raw if self._device.type == "cuda" else self._apply(raw)

    def _raw(self, chances: Chances) -> Patch:
        """Read a patch, in the size that its augmentation asks for, and paste."""
        draw, source = chances.draw, chances.plan.source_zyx
        image, sides = cut(draw.region, source_box(draw.box, source))
        if self._donors is not None and chances.pastes:
            paste_into(image, sides, pastes=chances.pastes, donors=self._donors, inner_zyx=draw.box.shape_zyx)
        tensors = (torch.from_numpy(image), torch.from_numpy(sides))
        if self._device.type == "cuda":
            tensors = tensors[0].pin_memory(), tensors[1].pin_memory()
        return Patch(*tensors, chances)

    def _finish(self, made: Patch) -> Patch:
        """Take a raw patch to the GPU and augment it there."""
        if self._device.type != "cuda":
            return made
        image, sides = (part.to(self._device, non_blocking=True) for part in (made.image, made.sides))
        return self._apply(Patch(image, sides, made.chances))

    def _apply(self, raw: Patch) -> Patch:
        image, sides = apply_plan(raw.chances.plan, raw.image, raw.sides, mean=self.mean, std=self.std)
        return Patch(image, sides, raw.chances)


def source_box(patch: Box, source_zyx: tuple[int, int, int]) -> Box:
    """Give the box of another size about the middle of a patch; it may leave the volume.

    Examples
    --------
    >>> source_box(Box((4, 0, 8), (8, 8, 16)), (4, 12, 4))
    Box(start_zyx=(4, -2, 10), stop_zyx=(8, 10, 14))
    """
    z, y, x = (
        at - (size - n) // 2 for at, n, size in zip(patch.start_zyx, patch.shape_zyx, source_zyx, strict=True)
    )
    dz, dy, dx = source_zyx
    return Box((z, y, x), (z + dz, y + dy, x + dx))


def cut(region: LabelledRegion, box: Box) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Copy image and side codes of a box that meets the region; what lies beyond the region is never read.

    There the image repeats the region's edge and the sides are `UNTRUSTED`, so that tissue kept for
    validation and testing, or left out as a guard, stays unseen.
    """
    low = np.maximum(box.start_zyx, region.box.start_zyx)
    high = np.minimum(box.stop_zyx, region.box.stop_zyx)
    slices = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    image, sides = np.array(region.volume.image[slices]), np.array(region.volume.sides[slices])
    if image.shape == box.shape_zyx:
        return image, sides
    missing = list(zip(low - box.start_zyx, box.stop_zyx - high, strict=True))
    return np.pad(image, missing, mode="edge"), np.pad(sides, missing, constant_values=UNTRUSTED)


def _pool_of_single_threads(n: int) -> ThreadPoolExecutor:
    """Give threads in which torch splits no operation, so that they take nothing from the network's step.

    The number is the thread's own, but it is also what threads to come begin with; hence it is set back here
    once these have begun.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(n, thread_name_prefix="feed", initializer=_compute_alone)
    started = Barrier(n + 1)
    for _ in range(n):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)
    return pool


def _compute_alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first question in a thread settles its number


def _count_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
