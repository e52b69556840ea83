"""Compiled kernels for CPUs: built once with the machine's C++ compiler, done without where there is none."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
LANE = 8
"""Channels that the kernels take at a time; the widths of what they work on are multiples of it."""


@dataclass(frozen=True)
class Kernels:
    """The compiled functions, or why there are none."""

    library: ctypes.CDLL | None
    reason: str = ""

    @property
    def panel(self) -> int:
        """Columns that a product takes at a time; packed weights are padded to a multiple of it."""
        assert self.library is not None
        return int(self.library.panel_width())

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Call a function on tensors, sizes and, last and implied, the number of threads.

        Parameters
        ----------
        name : str
            Of the function in kernels.cpp.
        *arguments : tensor, int or None
            In its order. Tensors are dense, on the CPU and in the order of axes that the kernel wants.
        """
        assert self.library is not None
        values = [_as_argument(value) for value in (*arguments, torch.get_num_threads())]
        with torch.profiler.record_function(name):
            getattr(self.library, name)(*values)


def kernels() -> Kernels:
    """Give the kernels: compiled now, or by an earlier process for this kind of CPU."""
    return _TORCH_ONLY if _torch_only.get() else _compiled()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have plain torch compute everything, for comparison.

    Examples
    --------
    >>> with without_kernels():
    ...     kernels().reason
    'they are switched off'
    """
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)


_torch_only = ContextVar("torch_only", default=False)
_TORCH_ONLY = Kernels(None, "they are switched off")


@functools.cache
def _compiled() -> Kernels:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        return Kernels(None, "no C++ compiler is installed (g++ or clang++)")
    source = SOURCE.read_bytes()
    kind = "\n".join([compiler, *FLAGS, torch.__version__, _cpu()]).encode()
    name = hashlib.sha256(source + kind).hexdigest()[:16]
    for give_folder in (_cache_folder, _new_folder):
        try:
            path = give_folder() / f"kernels_{name}.so"
            if not path.exists():
                _compile(compiler, path)
            return Kernels(ctypes.CDLL(str(path)))
        except PermissionError:
            continue  # a home that cannot be written to
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            return Kernels(None, f"{compiler} could not build them: {said.strip().splitlines()[-1]}")
    return Kernels(None, f"neither {_cache_folder()} nor a temporary folder can be written to")


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(path)  # whole or not at all, whoever else compiles at this moment


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synmlops"


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="synmlops_"))


def _cpu() -> str:
    """What the compiler makes use of: a home may be shared by machines with different CPUs."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()}"


def _as_argument(value: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)
