import resource

import pytest
import torch

from synmlops.learning.allocator import keep_freed_memory

PAGES = 64 * 2**20 // resource.getpagesize()


def _pages_fetched() -> int:
    """Fill a tensor of 64 MiB that lies where one of its size was freed just before."""
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_fetched_no_second_time() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    try:
        assert _pages_fetched() < PAGES / 50
    finally:
        keep_freed_memory(False)
