"""The networks' compiled functions for CPUs, kernels.cpp."""

from pathlib import Path

from synmlops.learning.native import Compiled, compiled

LANE = 8
"""Channels that the kernels take at a time; the widths of what they work on are multiples of it."""


def kernels() -> Compiled:
    """Give the functions of kernels.cpp, or why there are none."""
    return compiled(Path(__file__).with_name("kernels.cpp"))


def panel_width() -> int:
    """Columns that a product takes at a time; packed weights are padded to a multiple of it."""
    library = kernels().library
    assert library is not None
    return int(library.panel_width())
