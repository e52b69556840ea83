"""Arrays of blocks laid aside between two passes: on disk, so that memory stays flat, or in memory."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_path, plain_write_errors

Arrays = tuple[NDArray[Any], ...]


class Spool:
    """A shelf of arrays by name and block.

    Parameters
    ----------
    folder : Path or None
        For a file for each name and block; None keeps the arrays in memory.
    lasts : bool
        Whether what was laid aside must outlive this process: each file is on the disk, whole, when `put`
        returns.

    Examples
    --------
    >>> spool = Spool(None)
    >>> spool.put("voxels", 3, (np.array([1, 2]),))
    >>> spool.get("voxels", 3), spool.get("voxels", 4)
    ((array([1, 2]),), None)
    """

    def __init__(self, folder: Path | None, *, lasts: bool = False) -> None:
        self._folder = folder
        self.lasts = lasts
        self._kept: dict[tuple[str, int], Arrays] = {}

    def put(self, name: str, block: int, arrays: Arrays) -> None:
        """Lay aside arrays of a block.

        Raises
        ------
        SynmlopsError
            If the disk is full or the folder cannot be written.
        """
        if self._folder is None:
            self._kept[name, block] = arrays
            return
        path = self._path(name, block)
        partial = path.with_suffix(".partial") if self.lasts else path
        with plain_write_errors(path):
            with partial.open("wb") as file:
                for array in arrays:
                    np.save(file, array, allow_pickle=False)
                if self.lasts:
                    file.flush()
                    os.fsync(file.fileno())
            if self.lasts:
                partial.replace(path)

    def get(self, name: str, block: int) -> Arrays | None:
        """Give the arrays of a block; None where nothing was laid aside."""
        if self._folder is None:
            return self._kept.get((name, block))
        path = self._path(name, block)
        if not path.exists():
            return None
        arrays: list[NDArray[Any]] = []
        size = path.stat().st_size
        with path.open("rb") as file:
            while file.tell() < size:
                arrays.append(np.load(file, allow_pickle=False))
        return tuple(arrays)

    def drop(self, name: str, block: int) -> None:
        """Forget the arrays of a block, if there are any."""
        self._kept.pop((name, block), None)
        if self._folder is not None:
            self._path(name, block).unlink(missing_ok=True)

    def _path(self, name: str, block: int) -> Path:
        assert self._folder is not None  # the callers ask
        return self._folder / f"{name}_{block}.npy"


@contextmanager
def temporary_spool(place: Path) -> Iterator[Spool]:
    """Give a shelf on disk, in a folder of its own that goes with it.

    Raises
    ------
    SynmlopsError
        If the place cannot be written.
    """
    with plain_write_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".decode_", dir=place, ignore_cleanup_errors=True)
    with folder as name:
        yield Spool(Path(name))


@contextmanager
def lasting_spool(place: Path, facts: Mapping[str, Any]) -> Iterator[Spool]:
    """Give a shelf on disk that a killed process leaves to the next one of the same facts.

    It is removed when all went well, and after an error; only a process that is killed or interrupted leaves
    it. One of other facts is emptied.

    Parameters
    ----------
    place : Path
        Folder in which it is `.decode.blocks`.
    facts : mapping
        All that decides what is laid aside; what JSON can hold.

    Raises
    ------
    SynmlopsError
        If the place cannot be written, or another process is at work in it.
    """
    folder, text = place / ".decode.blocks", json.dumps(facts, indent=1)
    with plain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # the system frees it however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SynmlopsError(
                f"{place}: another process decodes into it; wait for that, or choose another place"
            ) from error
        file = folder / "job.json"
        if not file.exists() or file.read_text() != text:
            for old in folder.glob("*.npy"):
                old.unlink()
            with atomic_path(file) as partial:
                partial.write_text(text)
        try:
            yield Spool(folder, lasts=True)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
