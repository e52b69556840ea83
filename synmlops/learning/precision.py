"""In which precision a device computes."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from synmlops.params import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Give the autocast context for a precision; "auto" is bf16 where the device computes in it natively."""
    wanted = has_native_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is faster than float32 on this device, not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
