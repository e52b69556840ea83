import io
import sys

import pytest

from synmlops.progress import say, track


class Clock:
    """Time that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("synmlops.progress.time.monotonic", lambda: self.now)


def test_a_log_file_gets_a_line_now_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with track("train", 100) as report:
        for done in range(1, 101):
            clock.now += 1
            report(done, f"loss {done}" if done == 30 else "")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 15/100, 0:15 gone, 1:25 left"
    assert lines[1] == "train: 30/100, 0:30 gone, 1:10 left  loss 30"
    assert lines[-1] == "train: 100/100, 1:40 gone, 0:00 left"
    assert len(lines) == 7


def test_quick_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with track("prepare", 2) as report:
        report(1, "a")
        report(2, "b")
    assert capsys.readouterr().err == ""


def test_quiet_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with track("train", 10, shown=False) as report:
        clock.now += 100
        report(5, "note")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with track("train", 4) as report:
        report(4, "validation F1 0.5")
    text = screen.getvalue()
    assert "4/4" in text
    assert "validation F1 0.5" in text


def test_notes_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say(["one", "two"])
    assert capsys.readouterr() == ("", "note: one\nnote: two\n")
