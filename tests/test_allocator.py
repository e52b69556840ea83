import resource
from pathlib import Path

import pytest
import torch

from synmlops.learning.allocator import give_back_freed_memory, keep_freed_memory


def _pages_of_a_step() -> int:
    """Count the pages that the system hands out while eight tensors of 16 MiB are made and let go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**22) for _ in range(8)]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_not_fetched_again() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    try:
        assert min(_pages_of_a_step() for _ in range(5)) < 100  # of 32768 pages, the first time
    finally:
        keep_freed_memory(False)


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_gaps_between_what_is_in_use_are_given_back() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    try:
        kept = [torch.ones(2**18) for _ in range(512)]  # of 1 MiB
        full = _resident_mib()
        del kept[::2]
        assert _resident_mib() > full - 64
        assert give_back_freed_memory()
        assert _resident_mib() < full - 192
        assert all((one == 1).all() for one in kept)
    finally:
        keep_freed_memory(False)
