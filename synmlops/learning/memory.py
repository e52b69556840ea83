"""Memory that does not suffice: what to lower, and how many patches would fit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from synmlops.params import SynmlopsError

_SIGNS = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a memory")
_ONEDNN = ("could not create a primitive", "could not execute a primitive")
"""All of oneDNN's messages where it gets no memory; where something else is wrong they say more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return str(error) in _ONEDNN or any(sign in str(error) for sign in _SIGNS)


def fits(work: Callable[[], None]) -> bool:
    """Do work that may run out of memory; False if it did, with what it held given back.

    Raises
    ------
    Exception
        What the work raised for any other reason.
    """
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        done = False
    else:
        done = True
    if not done and torch.cuda.is_available():  # here, since the exception above holds what was allocated
        torch.cuda.empty_cache()
    return done


def largest_batch(try_batch: Callable[[int], None], *, below: int) -> int:
    """Find how many patches fit, fewer than `below`; 0 if not even one does.

    Parameters
    ----------
    try_batch : callable
        Takes one forward and backward pass of so many patches.
    below : int
        So many do not fit.

    Examples
    --------
    >>> def try_batch(n):
    ...     if n > 5:
    ...         raise MemoryError
    >>> largest_batch(try_batch, below=16), largest_batch(try_batch, below=4)
    (5, 3)
    """

    def tried(n: int) -> bool:
        return fits(lambda: try_batch(n))

    low, high = 0, below  # low fits, high does not
    n = below // 2
    while high - low > 1:
        n = min(max(n, low + 1), high - 1)
        low, high = (n, high) if tried(n) else (low, n)
        n = (low + high) // 2
    return low


@dataclass(frozen=True)
class Demand:
    """What training asks of a device in one go."""

    device: torch.device
    patch_zyx: tuple[int, int, int]
    part: int  # patches of one process at a time
    share: int  # patches of one process in a step
    n_ranks: int
    weights_bytes: int  # of weights, gradients, optimiser and averaged weights


def out_of_memory(demand: Demand, *, fitting: int, step: int) -> SynmlopsError:
    """Say what to lower, `fitting` patches being the most that go through in one go."""
    where = _name_device(demand.device)
    z, y, x = demand.patch_zyx
    what = (
        f"{where} ran out of memory at step {step} with {demand.part} patch(es) of {z} x {y} x {x} at a time"
    )
    smaller = "sampling.patch_zyx, network.widths or sampling.batch_size"
    if fitting == 0:
        total = _total_memory(demand.device)
        if total and demand.weights_bytes > total / 2:
            return SynmlopsError(
                f"{what}; not even one fits, since weights take most of it: lower network.widths"
            )
        return SynmlopsError(f"{what}; not even one fits: lower sampling.patch_zyx or network.widths")
    parts = next(
        n for n in range(1, demand.share + 1) if demand.share % n == 0 and demand.share // n <= fitting
    )
    return SynmlopsError(
        f"{what}; {fitting} would fit: set train.accumulate: {parts}, which takes the same batch in more "
        f"parts, or lower {smaller} (to {fitting * demand.n_ranks})"
    )


def _name_device(device: torch.device) -> str:
    if device.type != "cuda":
        return "the CPU"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)} ({gigabytes:.0f} GiB)"


def _total_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
