"""The compiled functions that change grey values on a CPU, grey.cpp."""

from pathlib import Path

import torch
from torch import Tensor

from synmlops.learning.native import Compiled, compiled


def functions(image: Tensor) -> Compiled | None:
    """Give the functions if they can change this (z, y, x) image in place: dense float32, on a CPU."""
    if image.device.type != "cpu" or image.dtype != torch.float32 or not image.is_contiguous():
        return None
    found = compiled(Path(__file__).with_name("grey.cpp"))
    return None if found.library is None else found
