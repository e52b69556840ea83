"""Memory that does not suffice: the search for what fits, and one message that says what to lower."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TinyProject

from synmlops.learning.checkpoint import ModelMeta
from synmlops.learning.distributed import Ranks
from synmlops.learning.loop import Recipe, Row, fit
from synmlops.learning.memory import Demand, fits, is_out_of_memory, largest_batch, out_of_memory
from synmlops.learning.sampling import LabelledRegion
from synmlops.params import CHANNELS, SynmlopsError
from synmlops.volumes.prepared import Box

CPU = torch.device("cpu")
DEMAND = Demand(device=CPU, patch_zyx=(8, 64, 64), part=8, share=8, n_ranks=2, weights_bytes=1)


class Silent:
    def logged(self, step: int, row: Row) -> None:
        pass

    def saved(self, step: int) -> None:
        pass

    def alarm(self, step: int, message: str) -> None:
        pass


@contextmanager
def room(megabytes: int) -> Iterator[None]:
    """Let this process take so much more address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("most", range(12))
def test_the_largest_batch_is_found_in_few_tries(most: int) -> None:
    tried: list[int] = []

    def try_batch(n: int) -> None:
        tried.append(n)
        if n > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_batch(try_batch, below=12) == most
    assert len(tried) <= 4
    assert len(set(tried)) == len(tried)


def test_only_memory_counts_as_memory() -> None:
    def allocate(n: int) -> None:
        torch.empty(n * 2**20, dtype=torch.uint8)

    with room(400):
        assert fits(lambda: allocate(50))
        assert not fits(lambda: allocate(2000))
        assert largest_batch(allocate, below=2000) in range(200, 401)
    with pytest.raises(RuntimeError, match="shape"):
        fits(lambda: torch.zeros(2).view(3))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("demand", "fitting", "message"),
    [
        (DEMAND, 3, r"8 patch\(es\) of 8 x 64 x 64 .*; 3 would fit: set train.accumulate: 4, .*\(to 6\)$"),
        (replace(DEMAND, part=1), 0, "not even one fits: lower sampling.patch_zyx or network.widths"),
    ],
)
def test_the_message_says_what_to_lower(demand: Demand, fitting: int, message: str) -> None:
    assert fits(lambda: None)
    with pytest.raises(SynmlopsError, match=message):
        raise out_of_memory(demand, fitting=fitting, step=1)


def test_a_batch_too_large_for_this_process(tiny_project: TinyProject, tmp_path: Path) -> None:
    """A real limit; what the message proposes trains with little more: a heap is never full to the brim."""
    params, volume = tiny_project.params, tiny_project.manifest.volumes["train"]
    recipe = Recipe(
        network=params.network,
        sampling=params.sampling.model_copy(update={"patch_zyx": (8, 48, 48), "batch_size": 96}),
        augment=params.augment,
        loss=params.loss,
        train=params.train.model_copy(update={"steps": 1, "warmup_steps": 0}),
        seed=1,
    )
    meta = ModelMeta(
        network=params.network, channels=CHANNELS, mean=128, std=20, voxel_nm=volume.grid.voxel_nm
    )

    def train(recipe: Recipe, name: str) -> None:
        fit(
            recipe,
            [LabelledRegion(volume, Box((0, 0, 0), volume.shape_zyx))],
            meta=meta,
            ranks=Ranks(0, 1, CPU),
            states=tmp_path / name,
            validate=None,
            observer=Silent(),
        )

    train(replace(recipe, sampling=recipe.sampling.model_copy(update={"batch_size": 1})), "warm")
    refusal = pytest.raises(SynmlopsError, match=r"the CPU ran out of memory at step 1 with 96 ")
    with room(130), refusal as caught:
        train(recipe, "whole")
    parts = int(str(caught.value).partition("train.accumulate: ")[2].partition(",")[0])
    assert 1 < parts <= 96
    with room(180):
        train(replace(recipe, train=recipe.train.model_copy(update={"accumulate": parts})), "parts")
