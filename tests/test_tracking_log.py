import json
import multiprocessing
import os
from pathlib import Path

import pytest

from synmlops.params import SynmlopsError
from synmlops.tracking.metric_log import LogReader, MetricLog, iter_events, reserved, settled_steps


def point(log: MetricLog, step: int, value: float = 0.0) -> None:
    log.append("metrics", {"metrics": {"loss": value}, "step": step}, hold=step)


def steps(path: Path, start: int = 0) -> list[int]:
    return [
        event.body["step"] for event in LogReader(path, start=start).take(10**6) if event.kind == "metrics"
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key" / "train.jsonl"


def test_held_lines_wait_for_their_checkpoint(path: Path) -> None:
    with MetricLog(path) as log:
        log.append("params", {"a": 1})
        for step in (1, 2, 3):
            point(log, step)
        assert [event.kind for event in LogReader(path).take(9)] == ["params"]
        log.commit(2)
        assert steps(path) == [1, 2]
        log.commit()
        assert steps(path) == [1, 2, 3]


def test_a_checkpoint_written_late_covers_no_later_step(path: Path) -> None:
    with MetricLog(path) as log:
        point(log, 1)
        point(log, 2)  # logged while the checkpoint of step 1 was still being written
        log.commit(1)
        point(log, 3)
        assert steps(path) == [1]
        log.commit(3)
    assert steps(path) == [1, 2, 3]


def test_a_resumed_run_has_each_step_once(path: Path) -> None:
    with MetricLog(path) as log:
        for step in (1, 2, 3, 4):
            point(log, step, value=0.5)
        log.commit(2)
    with MetricLog(path) as log:  # killed, and resumed from the checkpoint of step 3, whose commit was lost
        log.rewind(3)
        for step in (4, 5):
            point(log, step, value=0.25)
        log.commit(5)
    assert steps(path) == [1, 2, 3, 4, 5]
    values = [event.body["metrics"]["loss"] for event in LogReader(path).take(99)]
    assert values == [0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(("keep_held", "expected"), [(True, [1, 2]), (False, [1]), (None, [1])])
def test_the_end_settles_voids_or_leaves_what_is_held(
    path: Path, keep_held: bool | None, expected: list[int]
) -> None:
    with MetricLog(path) as log:
        point(log, 1)
        log.commit(1)
        point(log, 2)
        log.finish({"status": "KILLED", "reason": ""}, keep_held=keep_held)
    assert steps(path) == expected
    assert LogReader(path).take(99)[-1].kind == "close"


def test_what_was_held_at_the_end_is_read_again_after_a_resume(path: Path) -> None:
    with MetricLog(path) as log:
        point(log, 1)
        point(log, 2)
        log.finish({"status": "KILLED", "reason": ""}, keep_held=None)
    sent_up_to = LogReader(path).take(99)[-1].end
    with MetricLog(path) as log:
        log.rewind(1)
        point(log, 2)
        log.commit(2)
    assert steps(path, start=sent_up_to) == [1, 2]


def test_every_offset_is_a_place_to_go_on_from(path: Path) -> None:
    with MetricLog(path) as log:
        for step in range(20):
            point(log, step)
            if step % 3 == 0:
                log.append("tags", {"n": str(step)})
            if step % 5 == 4:
                log.commit(step)
        log.rewind(17)
        log.finish({"status": "FINISHED", "reason": ""}, keep_held=True)
    whole = LogReader(path).take(999)
    for n in range(len(whole)):
        again = LogReader(path, start=whole[n].end).take(999)
        assert again == whole[n + 1 :]


def test_a_reader_follows_a_growing_file(path: Path) -> None:
    with MetricLog(path) as log:
        reader = LogReader(path)
        assert reader.take(5) == []
        point(log, 1)
        log.commit()
        first = reader.take(5)
        assert len(first) == 1
        assert reader.take(5) == []
        reader.put_back(first)
        assert reader.take(5) == first


def test_a_line_cut_short_by_a_crash_is_dropped(path: Path) -> None:
    with MetricLog(path) as log:
        point(log, 1)
    with path.open("a") as file:
        file.write('{"seq":1,"ti')
    with MetricLog(path) as log:
        point(log, 2)
        log.commit()
    assert steps(path) == [1, 2]
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_damaged_line_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{}\n")
    with pytest.raises(SynmlopsError, match=r"train\.jsonl: the line at byte 0 is damaged"):
        list(iter_events(path))


def test_a_full_disk_leaves_whole_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricLog(path)
    point(log, 1)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(SynmlopsError, match=r"train\.jsonl: .*disk is full"):
            point(log, 2)
    point(log, 3)
    log.commit()
    log.close()
    assert steps(path) == [1, 3]


def test_one_writer_at_a_time(path: Path) -> None:
    with MetricLog(path) as log:
        point(log, 1)
        with pytest.raises(SynmlopsError, match="another process writes this metric log"):
            MetricLog(path)
        with reserved(path) as ours:
            assert not ours
    with reserved(path) as ours:
        assert ours
    with pytest.raises(ValueError, match="is closed"):
        point(log, 2)


def _write_and_die(path: Path) -> None:
    log = MetricLog(path)
    for step in range(1000):
        point(log, step)
    log.commit(499)
    os._exit(9)  # as kill -9 would


def test_a_killed_writer_leaves_what_it_wrote(path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert steps(path) == list(range(500))
    assert settled_steps(path) == {"loss": 499}
    with MetricLog(path) as log:
        log.rewind(600)
    assert steps(path) == list(range(601))
