"""Which blocks are done: lines on disk, so that work which was ended goes on where it was."""

import os
import socket
import uuid
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
from numpy.typing import NDArray

from synmlops.volumes.files import plain_write_errors

PIECE_BYTES = 2**20
"""Marks that are read at a time: as numbers in Python they take ten times the room."""


class Marks:
    """The numbers of finished blocks in a folder, each writer in a file of its own.

    A writer adds a block once its data are on the disk. What a killed writer left of a line counts as
    nothing: that block is computed again.

    Parameters
    ----------
    folder : Path
        Made with the first mark.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Marks(folder) as marks:
    ...     marks.add(3)
    >>> Marks(folder).done(5).tolist()
    [False, False, False, True, False]
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._adding = Lock()

    def add(self, index: int) -> None:
        """Mark a block, from any thread; the mark is on the disk when this returns.

        Raises
        ------
        SynmlopsError
            If the place is full or cannot be written.
        """
        with self._adding, plain_write_errors(self._folder):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = f"{socket.gethostname()}_{os.getpid()}_{uuid.uuid4().hex[:8]}.txt"
                self._file = (self._folder / name).open("ab")
            self._file.write(b"%d\n" % index)
            self._file.flush()
            os.fsync(self._file.fileno())

    def done(self, n_blocks: int) -> NDArray[np.bool_]:
        """Tell of each block whether anyone has marked it."""
        marked = np.zeros(n_blocks, bool)
        for path in self._folder.glob("*.txt"):
            with path.open("rb") as file:
                while lines := file.readlines(PIECE_BYTES):
                    whole = (line[:-1] for line in lines if line.endswith(b"\n"))
                    numbers = np.array([int(line) for line in whole if line.isdigit()], np.int64)
                    marked[numbers[numbers < n_blocks]] = True
        return marked

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Marks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
