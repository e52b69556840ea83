"""C++ for CPUs: built once with the machine's own compiler, done without where there is none."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


@dataclass(frozen=True)
class Compiled:
    """The functions of a source file, or why there are none."""

    library: ctypes.CDLL | None
    reason: str = ""

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Call a function on tensors, sizes and, last and implied, the number of threads.

        Parameters
        ----------
        name : str
            Of the function.
        *arguments : tensor, int or None
            In its order. Tensors are dense, on the CPU and in the order of axes that the kernel wants.
        """
        assert self.library is not None
        values = [_as_argument(value) for value in (*arguments, torch.get_num_threads())]
        with torch.profiler.record_function(name):
            getattr(self.library, name)(*values)


def compiled(source: Path, *flags: str) -> Compiled:
    """Give the functions of a C++ file: compiled now, or by an earlier process for this kind of CPU.

    Parameters
    ----------
    source : Path
        Its functions are `extern "C"` and return nothing or an int.
    *flags : str
        For the compiler, after `FLAGS`.
    """
    return _TORCH_ONLY if _torch_only.get() else _built(source, flags)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Have plain torch compute everything, for comparison.

    Examples
    --------
    >>> with without_kernels():
    ...     compiled(Path("any.cpp")).reason
    'they are switched off'
    """
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)


_torch_only = ContextVar("torch_only", default=False)
_TORCH_ONLY = Compiled(None, "they are switched off")


@functools.cache
def _built(source: Path, flags: tuple[str, ...]) -> Compiled:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        return Compiled(None, "no C++ compiler is installed (g++ or clang++)")
    command = [compiler, *FLAGS, *flags]
    kind = "\n".join([*command, torch.__version__, _cpu()]).encode()
    name = f"{source.stem}_{hashlib.sha256(source.read_bytes() + kind).hexdigest()[:16]}.so"
    for give_folder in (_cache_folder, _new_folder):
        try:
            path = give_folder() / name
            if not path.exists():
                _build(source, command, path)
            return Compiled(ctypes.CDLL(str(path)))
        except PermissionError:
            continue  # a home that cannot be written to
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            return Compiled(None, f"{compiler} could not build them: {said.strip().splitlines()[-1]}")
    return Compiled(None, f"neither {_cache_folder()} nor a temporary folder can be written to")


def _build(source: Path, command: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        whole = [*command, "-shared", "-fPIC", str(source), "-o", str(built)]
        subprocess.run(whole, check=True, capture_output=True, text=True)
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
