"""Resume checkpoints of a training: numbered by step, the newest two kept, one before behind a broken one."""

import errno
import re
import shutil
from pathlib import Path
from typing import Any

from synmlops.learning.checkpoint import load_state, save_state
from synmlops.params import SynmlopsError
from synmlops.progress import say
from synmlops.volumes.files import error_number

KEPT = 2
ROOM_BYTES = 2**20
_NAME = re.compile(r"step_(\d+)\.pt")


class States:
    """The checkpoints of one fold, in a folder of their own: `step_00000400.pt`.

    Parameters
    ----------
    folder : Path
        Made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint and drop all but the newest two.

        Where there is no room for three, the older one makes room first.

        Raises
        ------
        SynmlopsError
            If it cannot be written all the same; the newest is as it was, and what the older one took is
            free for the record of the failure.
        """
        path = self.folder / f"step_{step:08d}.pt"
        try:
            save_state(path, state)
        except SynmlopsError as error:
            if error.__cause__ is None or error_number(error.__cause__) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._drop(keep=1)
            save_state(path, state)
        self._drop(keep=KEPT)

    def make_room(self) -> None:
        """Drop all but the newest if the disk is all but full, so that a failure can be put on record."""
        if self.folder.exists() and shutil.disk_usage(self.folder).free < ROOM_BYTES:
            self._drop(keep=1)

    def load(self) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole; None if there is none at all.

        Raises
        ------
        SynmlopsError
            If all are broken.
        """
        found = self.newest()
        return None if found is None else found[1]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Give the file too."""
        paths = self.paths()
        for n, path in enumerate(paths):
            try:
                state = load_state(path)
            except SynmlopsError as error:
                if n + 1 == len(paths):
                    raise
                say([f"{error}. Going on from {paths[n + 1].name}, the one before"])
            else:
                return None if state is None else (path, state)
        return None

    def _drop(self, *, keep: int) -> None:
        for path in self.paths()[keep:]:
            path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """Give the files, newest first."""
        found = [
            path for path in self.folder.glob("step_*.pt") if _NAME.fullmatch(path.name) and path.is_file()
        ]
        return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Give the step that a checkpoint's name says.

    Examples
    --------
    >>> step_of(Path("whole/step_00000400.pt"))
    400
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: is not named as a checkpoint")
    return int(match[1])
