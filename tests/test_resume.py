"""Going on from a checkpoint that a user names: taken over, gone back to, or refused with the reason."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from synmlops.learning.checkpoint import save_state
from synmlops.learning.resume import KEY_FILE, adopt, digest_of, facts_of
from synmlops.learning.states import States
from synmlops.params import SynmlopsError
from synmlops.volumes.files import plain_write_errors

FACTS = facts_of({"train.steps": 100, "seed": 1, "data.a/image": "ab12"})


def _save(
    folder: Path, *steps: int, fold: str = "all", run: str = "mine", facts: dict[str, str] = FACTS
) -> Path:
    """Write checkpoints of a fold as training does, and the key beside its folder."""
    for step in steps:
        origin = {"facts": facts, "fold": fold, "run": run}
        state = {"progress": {"step": step}, "origin": origin, "weights": torch.full((3,), float(step))}
        States(folder / fold).save(step, state)
    (folder / KEY_FILE).write_text(run)
    return folder / fold / f"step_{steps[-1]:08d}.pt"


def _steps(folder: Path, fold: str = "all") -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in States(folder / fold).paths()]


def _adopt(
    path: Path, own: Path, *, folds: tuple[str, ...] = ("all",), facts: dict[str, str] = FACTS
) -> None:
    adopt(path, folder=own, facts=facts, folds=folds)


@pytest.mark.parametrize("what", [".", "all", "all/step_00000020.pt"])
def test_a_copy_elsewhere_is_taken_over_with_its_run(tmp_path: Path, what: str) -> None:
    copy, own = tmp_path / "copy", tmp_path / "own"
    _save(copy, 10, 20, run="theirs")
    _save(own, 30, 40, run="mine")
    _adopt(copy / what, own)
    assert _steps(own) == [20]
    assert (own / KEY_FILE).read_text() == "theirs"
    assert _steps(copy) == [20, 10]


def test_the_same_run_further_on_is_not_gone_back_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler starts an ended job again by the same command."""
    copy, own = tmp_path / "copy", tmp_path / "own"
    file = _save(copy, 20)
    _save(own, 30, 40)
    _adopt(file, own)
    assert _steps(own) == [40, 30]
    assert "has come to step 40 since" in capsys.readouterr().err


def test_an_older_one_of_its_own_is_gone_back_to(tmp_path: Path) -> None:
    _save(tmp_path, 30, 40)
    _adopt(tmp_path / "all" / "step_00000030.pt", tmp_path)
    assert _steps(tmp_path) == [30]
    _adopt(tmp_path, tmp_path)
    assert _steps(tmp_path) == [30]


def test_other_params_or_data_are_refused_by_name_with_both_values(tmp_path: Path) -> None:
    file = _save(tmp_path / "copy", 20)
    now = FACTS | {"train.steps": "200", "data.a/image": "cd34", "new": "1"}
    with pytest.raises(SynmlopsError) as caught:
        _adopt(file, tmp_path / "own", facts=now)
    assert "data.a/image is ab12, not cd34, new is missing, not 1, train.steps is 100, not 200" in str(
        caught.value
    )
    assert not (tmp_path / "own").exists()
    assert digest_of(now) != digest_of(FACTS)
    assert digest_of(dict(reversed(FACTS.items()))) == digest_of(FACTS)


def test_folds_are_taken_over_together(tmp_path: Path) -> None:
    copy, own = tmp_path / "copy", tmp_path / "own"
    _save(copy, 100, fold="1")
    file = _save(copy, 20, fold="2")
    with pytest.raises(SynmlopsError, match=r"holds one of 2 folds; give the folder above"):
        _adopt(file, own, folds=("1", "2"))
    _adopt(copy, own, folds=("1", "2"))
    assert (_steps(own, "1"), _steps(own, "2")) == ([100], [20])


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(SynmlopsError, match=r"--resume .*no checkpoint is there"):
            _adopt(path, tmp_path / "own")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    with pytest.raises(SynmlopsError, match=r"broken checkpoint"):
        _adopt(tmp_path / "broken.pt", tmp_path / "own")
    save_state(tmp_path / "old.pt", {"progress": {"step": 1}})
    with pytest.raises(SynmlopsError, match=r"old.pt: does not say whose it is"):
        _adopt(tmp_path / "old.pt", tmp_path / "own")


def test_two_checkpoints_are_kept_and_the_older_one_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 10, 20, 30)
    assert _steps(tmp_path) == [30, 20]
    (tmp_path / "all" / "step_00000040.pt").mkdir()  # in the way, which no room helps
    with pytest.raises(SynmlopsError, match=r"step_00000040.pt: cannot be written"):
        States(tmp_path / "all").save(40, {})
    assert _steps(tmp_path) == [30, 20]
    (tmp_path / "all" / "step_00000040.pt").rmdir()
    left = iter([OSError(errno.ENOSPC, "No space left on device")])

    def save_once_there_is_room(path: Path, state: dict[str, Any]) -> None:
        with plain_write_errors(path):
            for error in left:
                raise error
        save_state(path, state)

    monkeypatch.setattr("synmlops.learning.states.save_state", save_once_there_is_room)
    _save(tmp_path, 40)
    assert _steps(tmp_path) == [40, 30]
    States(tmp_path / "all").make_room()
    assert _steps(tmp_path) == [40, 30]  # there is room enough
    monkeypatch.setattr("synmlops.learning.states.ROOM_BYTES", 2**70)
    States(tmp_path / "all").make_room()
    assert _steps(tmp_path) == [40]
