"""The folder of a job: what it is, what is done, and the output until it is whole."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synmlops.params import SynmlopsError, flatten
from synmlops.volumes.files import atomic_path, plain_write_errors


class JobFolder:
    """A hidden folder beside an output, until that is whole and takes its place.

    The folder says what the output is made of and how, so that work which was ended goes on, and never
    with another input, model or setting. Processes that share a job find the same folder.

    Parameters
    ----------
    out : Path
        The output: a file, or a folder such as a Zarr.

    Examples
    --------
    >>> import tempfile
    >>> folder = JobFolder(Path(tempfile.mkdtemp()) / "a.txt")
    >>> folder.begin({"input": "x"})
    >>> _ = folder.data.write_text("whole")
    >>> folder.finish(), folder.out.read_text(), folder.path.exists()
    (True, 'whole', False)
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.blocks")
        self.data = self.path / f"data{out.suffix}"
        self.marks = self.path / "done"

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the one that is there.

        Parameters
        ----------
        facts : mapping
            All that decides what the output will be; what JSON can hold.

        Raises
        ------
        SynmlopsError
            If there is an output, a folder with other facts, or no place to write.
        """
        if self.out.exists():
            raise SynmlopsError(f"{self.out}: is there already; move it away or choose another place")
        text = json.dumps(facts, indent=1)
        file = self.path / "job.json"
        if file.exists():
            self._compare(json.loads(text), json.loads(file.read_text()))
            return
        with atomic_path(file) as partial:
            partial.write_text(text)

    def finish(self) -> bool:
        """Put the output in its place and remove the folder; False if another process has done so."""
        with plain_write_errors(self.out, self.path):
            try:
                self.data.rename(self.out)
            except FileNotFoundError:
                if self.out.exists():
                    return False
                raise
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def _compare(self, facts: dict[str, Any], before: dict[str, Any]) -> None:
        now, then = flatten(facts), flatten(before)
        differing = [key for key in now | then if now.get(key) != then.get(key)]
        if differing:
            listed = "; ".join(f"{key}: {then.get(key)} then, {now.get(key)} now" for key in differing)
            raise SynmlopsError(
                f"{self.out}: was begun otherwise ({listed}); go on as then, remove {self.path} to begin "
                "anew, or choose another place"
            )
