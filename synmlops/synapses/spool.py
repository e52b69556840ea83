"""Arrays of blocks laid aside between two passes: on disk, so that memory stays flat, or in memory."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synmlops.volumes.files import plain_write_errors

Arrays = tuple[NDArray[Any], ...]


class Spool:
    """A shelf of arrays by name and block.

    Parameters
    ----------
    folder : Path or None
        An empty folder, for a file for each name and block; None keeps the arrays in memory.

    Examples
    --------
    >>> spool = Spool(None)
    >>> spool.put("voxels", 3, (np.array([1, 2]),))
    >>> spool.get("voxels", 3), spool.get("voxels", 4)
    ((array([1, 2]),), None)
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
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
        with plain_write_errors(path), path.open("wb") as file:
            for array in arrays:
                np.save(file, array, allow_pickle=False)

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
