"""Memory that does not suffice: the search for what fits, and one message that says what to lower."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TinyProject

from synmlops.learning.memory import Demand, fits, is_out_of_memory, largest_batch, out_of_memory
from synmlops.params import SynmlopsError

CPU = torch.device("cpu")
DEMAND = Demand(device=CPU, patch_zyx=(8, 64, 64), part=8, share=8, n_ranks=2, weights_bytes=1)


@contextmanager
def room(megabytes: int, device: str = "cpu") -> Iterator[None]:
    """Let this process take so much more address space, or have so much of a GPU in all."""
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(megabytes * 2**20 / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
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
    for doing in ("create", "execute"):
        assert is_out_of_memory(RuntimeError(f"could not {doing} a primitive"))
        assert not is_out_of_memory(
            RuntimeError(f"could not {doing} a primitive descriptor for a convolution")
        )


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


# A process of its own, since oneDNN remembers for good what it could not make.
LIMITED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from test_memory import room
from tiny import tiny_params
from synmlops.learning.checkpoint import ModelMeta
from synmlops.learning.distributed import Ranks
from synmlops.learning.loop import Recipe, Silent, fit
from synmlops.learning.sampling import LabelledRegion
from synmlops.params import CHANNELS, DataParams, PhantomParams, SynmlopsError
from synmlops.volumes.prepared import Box, read_manifest

prepared, out, device = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
volume, params = read_manifest(prepared).volumes["train"], tiny_params(DataParams(phantom=PhantomParams()))
meta = ModelMeta(network=params.network, channels=CHANNELS, mean=128, std=20, voxel_nm=(40, 8, 8))

def train(name, batch_size, accumulate=1):
    sampling = params.sampling.model_copy(update={"patch_zyx": (8, 48, 48), "batch_size": batch_size})
    train = params.train.model_copy(update={"steps": 1, "warmup_steps": 0, "accumulate": accumulate})
    recipe = replace(Recipe.of(params), sampling=sampling, train=train, seed=1)
    region = LabelledRegion(volume, Box((0, 0, 0), volume.shape_zyx))
    ranks, states = Ranks(0, 1, torch.device(device)), out / name
    fit(recipe, [region], meta=meta, ranks=ranks, states=states, validate=None, observer=Silent())

train("warm", 1)
try:
    with room(130, device):
        train("whole", 96)
except SynmlopsError as error:
    print(error)
    parts = int(str(error).partition("train.accumulate: ")[2].partition(",")[0])
with room(180, device):
    train("parts", 96, parts)
print("trained in", parts, "parts")
"""


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("cpu", "the CPU"),
        pytest.param(
            "cuda",
            r".* \(\d+ GiB\)",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_batch_too_large_for_this_process(
    tiny_project: TinyProject, tmp_path: Path, device: str, name: str
) -> None:
    """A real limit; what the message proposes trains with little more: a heap is never full to the brim."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tiny_project.prepared), str(tmp_path), device],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    message, last = done.stdout.splitlines()
    assert re.match(rf"{name} ran out of memory at step 1 with 96 patch\(es\) of 8 x 48 x 48 at", message)
    assert re.fullmatch(r"trained in ([2-9]|\d\d) parts", last)
