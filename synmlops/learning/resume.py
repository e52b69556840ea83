"""Whose a checkpoint is: what decides a training's outcome, and going on from a file that a user names."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synmlops.learning.checkpoint import load_state
from synmlops.learning.distributed import name_differences
from synmlops.learning.states import States, step_of
from synmlops.params import SynmlopsError
from synmlops.progress import say

Facts = dict[str, str]
KEY_FILE = "key"
"""Holds the key of the run that the checkpoints beside it belong to."""


def facts_of(values: Mapping[str, object]) -> Facts:
    """Turn params and digests into texts that can be kept in a checkpoint and compared.

    Examples
    --------
    >>> facts_of({"seed": 1, "data.mean": 0.5})
    {'data.mean': '0.5', 'seed': '1'}
    """
    return {name: str(values[name]) for name in sorted(values)}


def digest_of(facts: Facts) -> str:
    """Name a training by its facts, so that it finds its own checkpoints again."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def adopt(path: Path, *, folder: Path, facts: Facts, folds: Sequence[str]) -> None:
    """Make `folder`, where a training looks for its checkpoints, hold those of `path`.

    If it holds later ones of the same run already, they are kept: so a job that is started again by the same
    command goes on, and does not go back.

    Parameters
    ----------
    path : Path
        A checkpoint, the folder of a fold, or the folder of all folds. A checkpoint within `folder` is gone
        back to: later ones are removed.
    folder : Path
    facts : dict
        Of the training that is to go on.
    folds : sequence of str

    Raises
    ------
    SynmlopsError
        If there is no whole checkpoint, it is of other params or data (naming them), or one fold of several.
    """
    found = {state["origin"]["fold"]: (file, state) for file, state in _whole_states(path)}
    for _, state in found.values():
        there = state["origin"]["facts"]
        if there != facts:
            raise SynmlopsError(
                f"--resume {path}: was trained otherwise: {name_differences(there, facts)}; set it back, or "
                "leave out --resume to begin anew"
            )
    if len(folds) > 1 and not (path / KEY_FILE).exists():
        raise SynmlopsError(
            f"--resume {path}: holds one of {len(folds)} folds; give the folder above it, with all of them"
        )
    if path.is_file() and folder.resolve() in path.resolve().parents:
        for later in States(path.parent).paths():
            if step_of(later) > step_of(path):
                later.unlink()
        return
    if path.resolve() == folder.resolve():
        return
    for fold, (file, state) in found.items():
        _take_over(file, state, folder=folder, fold=fold)


def _whole_states(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read the checkpoint, or the newest whole one of each fold in the folder."""
    if path.is_file():
        state = load_state(path)
        files = [(path, state)] if state is not None else []
    else:
        folders = [path, *sorted(below for below in path.glob("*") if below.is_dir())]
        files = [whole for below in folders if (whole := States(below).newest()) is not None]
    if not files:
        raise SynmlopsError(
            f"--resume {path}: no checkpoint is there; those of an unfinished training lie in "
            ".synmlops/checkpoints"
        )
    for file, state in files:
        if not {"facts", "fold", "run"} <= set(state.get("origin", ())):
            raise SynmlopsError(
                f"--resume {file}: does not say whose it is; leave out --resume to begin anew"
            )
    return files


def _take_over(file: Path, state: dict[str, Any], *, folder: Path, fold: str) -> None:
    """Copy a checkpoint and its run's key into the training's own folder."""
    key_file, run = folder / KEY_FILE, state["origin"]["run"]
    own = States(folder / fold).newest() if key_file.exists() and key_file.read_text() == run else None
    if own is not None and own[1]["progress"]["step"] >= state["progress"]["step"]:
        step = own[1]["progress"]["step"]
        say([f"--resume {file}: the same run has come to step {step} since; going on from there"])
        return
    target = folder / fold
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copyfile(file, target / f"step_{state['progress']['step']:08d}.pt")
    key_file.write_text(run)
