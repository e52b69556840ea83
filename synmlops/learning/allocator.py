"""Memory that stays with the process between steps, instead of being fetched from the system every time."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # Source: malloc.h of glibc
_NEVER = 2**31 - 1  # bytes at the end of the heap before they are given back
_DEFAULTS = 128 * 1024, 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """Have the C library keep what is freed, for the next allocation; True where it can.

    By default glibc maps each large tensor anew and unmaps it when freed, and the system clears every page
    again. Training allocates the same gigabytes in each step: a step of `plus_unet` on two cores takes half
    the time without that. Does nothing where the C library is another than glibc.

    Parameters
    ----------
    keep : bool
        False goes back to the defaults, and gives back what was kept.
    """
    library = _glibc()
    if library is None:
        return False
    trim, maps = (_NEVER, 0) if keep else _DEFAULTS
    done = bool(library.mallopt(_TRIM_THRESHOLD, trim) and library.mallopt(_MMAP_MAX, maps))
    if not keep:
        library.malloc_trim(0)
    return done


def give_back_freed_memory() -> bool:
    """Give what is free now back to the system, wherever it lies; True where that can be done.

    Where threads hold large arrays for different times, what is kept goes to pieces: a new array fits into
    none of the gaps, and the memory of the process grows though no more of it is in use. Called now and then,
    this bounds it, and what was asked of `keep_freed_memory` goes on. It takes some 30 ms, and clearing the
    pages that are used again. Does nothing where the C library is another than glibc.
    """
    library = _glibc()
    if library is None:
        return False
    library.malloc_trim(0)
    return True


def share_one_heap() -> bool:
    """Have threads that are yet to come share one heap; True where that can be done.

    By default glibc gives each thread a heap of its own, of which others cannot use what is free. It cannot
    be undone. Does nothing where the C library is another than glibc.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_ARENA_MAX, 1))


def _glibc() -> ctypes.CDLL | None:
    """Give the C library, if it is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
