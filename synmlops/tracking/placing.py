"""Which run a metric log goes into: its own, that of the stage before, or a child of it.

The order in which things are tried makes an interrupted attempt come out the same when it is repeated:
keys are chosen when the log is opened, and a run is looked up by key before it is made.
"""

import os
import socket

from synmlops.tracking.delivery import Delivery
from synmlops.tracking.lineage import UNKNOWN
from synmlops.tracking.metric_log import reserved
from synmlops.tracking.record import RunRecord
from synmlops.tracking.sidecar import STAGE_TAG, Opening, Progress, data_tags, opened_at, runs_folder
from synmlops.tracking.store import KEY_TAG, PARENT_TAG, KnownRun, Store, Unreachable, text_of


def place(delivery: Delivery, store: Store) -> KnownRun:
    """Find the run that a log goes into, or make it; sends what the stages before left unsent.

    Raises
    ------
    Unreachable
        If the store does not answer; repeat it later.
    """
    opening = delivery.opening
    if opening.record is None:
        run = _own_run(delivery, store)
    else:
        run = _attached_run(delivery, store, RunRecord.from_dict(opening.record))
    delivery.progress.choose(run.key or opening.key)
    return run


def _own_run(delivery: Delivery, store: Store) -> KnownRun:
    opening, progress = delivery.opening, delivery.progress
    run = store.find(key=opening.key, run_id=progress.latest)
    if run is not None:
        return run
    if progress.runs:
        delivery.note(
            f"run {opening.key[:8]} is not in {store.shown} (deleted, or another store): "
            f"recorded anew from {delivery.log}"
        )
    return _create(delivery, store, key=opening.key, parent=_parent_from_the_start(delivery, store))


def _parent_from_the_start(delivery: Delivery, store: Store) -> KnownRun | None:
    """Find or make the run that this one lies below; None if there is none, or all trace of it is gone."""
    key = delivery.opening.parent_key
    if key is None:
        return None
    parent = store.find(key=key)
    if parent is not None:
        return parent
    for log in sorted((runs_folder(delivery.log) / key).glob("*.jsonl")):
        with reserved(log) as ours:
            if not ours:  # whoever writes it makes the run; two of us would make two
                raise Unreachable(f"{store.shown}: the run above this one is not there yet")
            return place(Delivery(log, note=delivery.note), store)
    return None


def _attached_run(delivery: Delivery, store: Store, record: RunRecord) -> KnownRun:
    opening, progress = delivery.opening, delivery.progress
    assert opening.child_key is not None
    if progress.key == opening.child_key:
        child = store.find(key=opening.child_key, run_id=progress.latest)
        if child is not None:
            return child
    _send_waiting(delivery, store, record)
    parent = store.find(key=record.key, run_id=record.mlflow_run_id) or _rebuild(delivery, store, record)
    _deliver_earlier(delivery, store, parent, record)
    if progress.key == record.key:
        return parent
    parent = store.get(parent.run_id) or parent  # with what was just delivered
    if progress.key != opening.child_key and _is_free(parent, opening):
        store.set_tags(parent.run_id, {opening.stage_tag: opening.claim()})
        return parent
    child = store.find(key=opening.child_key)
    if child is None:
        delivery.note(_why_child(parent, opening))
        child = _create(delivery, store, key=opening.child_key, parent=parent)
    return child


def _create(delivery: Delivery, store: Store, *, key: str, parent: KnownRun | None = None) -> KnownRun:
    opening = delivery.opening
    tags = {KEY_TAG: key, **opening.tags, **data_tags(opening.data)}
    if parent is not None:
        tags[PARENT_TAG] = parent.run_id
    name = opening.name or _run_name(
        key, opening.tags.get("synmlops.dvc_experiment"), stage=opening.stage if parent is not None else None
    )
    return store.create(name=name, tags=tags, time_ms=opened_at(delivery.log))


def _run_name(key: str, dvc_experiment: str | None, *, stage: str | None) -> str:
    """Name a run for people: `lucid-fern`, or `run 1a2b3c4d`; a child by its stage too."""
    if dvc_experiment:
        return f"{dvc_experiment} {stage}" if stage else dvc_experiment
    return f"{stage or 'run'} {key[:8]}"


def _is_free(run: KnownRun, opening: Opening) -> bool:
    """Whether a stage may write into a run without overwriting or mixing anything."""
    mark = run.tags.get(opening.stage_tag, "")
    if mark == "complete" or (mark.startswith("running") and not _may_take_over(mark, opening)):
        return False
    return not _conflicts(run, opening)


def _conflicts(run: KnownRun, opening: Opening) -> list[str]:
    """Name the params and inputs that the run has with another value."""
    params = [
        name for name, value in opening.params.items() if run.params.get(name) not in (None, text_of(value))
    ]
    tags = data_tags(opening.data)
    return params + [name for name, value in tags.items() if run.tags.get(name) not in (None, value)]


def _why_child(run: KnownRun, opening: Opening) -> str:
    mark = run.tags.get(opening.stage_tag, "")
    if mark == "complete":
        why = f"already has a record of {opening.stage}"
    elif mark.startswith("running") and not _may_take_over(mark, opening):
        why = f"is being written by another {opening.stage} ({mark})"
    elif conflicts := _conflicts(run, opening):
        why = f"has other values of {', '.join(conflicts[:3])}"
    else:
        why = f"had a record of {opening.stage} when the store was away"
    return f"run {(run.key or run.run_id)[:8]} {why}: this one goes to its child {opening.child_key:.8}"


def _may_take_over(mark: str, opening: Opening) -> bool:
    """Whether a claim is ours, or that of a process of this machine which is no more."""
    host, pid, attempt = ([*mark.split()[1:], "", "", ""])[:3]
    if attempt == opening.attempt:
        return True
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)  # asks whether it is there
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _rebuild(delivery: Delivery, store: Store, record: RunRecord) -> KnownRun:
    """Make the run of a record in a store that does not know it."""
    folder = runs_folder(delivery.log)
    away = [stage for stage, log in record.logs.items() if not (folder / log).exists()]
    delivery.note(
        f"run {record.key[:8]} is not in {store.shown} (another machine, a deleted run, or the server was "
        f"away): made from the record of {record.stage}"
        + (f"; the metrics of {', '.join(away)} are not on this machine" if away else "")
    )
    tags = {
        KEY_TAG: record.key,
        "mlflow.source.name": "synmlops",
        "mlflow.source.type": "PROJECT",
        "synmlops.rebuilt": f"from the record of {record.stage}, {record.created}",
        "synmlops.commit": record.commit,
        "synmlops.dirty": str(record.dirty).lower(),
        **data_tags(record.data),
        **{STAGE_TAG + stage: "complete" for stage in record.logs},
    }
    if record.commit != UNKNOWN:
        tags["mlflow.source.git.commit"] = record.commit
    if record.dvc_experiment:
        tags["synmlops.dvc_experiment"] = record.dvc_experiment
    if record.parent_key and (parent := store.find(key=record.parent_key)):
        tags[PARENT_TAG] = parent.run_id
    name = _run_name(
        record.key, record.dvc_experiment, stage=next(iter(record.logs), None) if record.parent_key else None
    )
    began = opened_at(delivery.log)
    run = store.create(name=name, tags=tags, time_ms=began)
    store.log_params(run.run_id, record.params)
    store.set_status(run.run_id, "FINISHED", time_ms=began)
    return run


def _send_waiting(delivery: Delivery, store: Store, record: RunRecord) -> None:
    """Send logs that no store has seen: of the stages before, and of older attempts at this one."""
    folder, mine = delivery.log.parent, opened_at(delivery.log)
    older = [log for log in folder.glob(f"{delivery.opening.stage}-*.jsonl") if opened_at(log) < mine]
    before = [runs_folder(delivery.log) / name for name in record.logs.values()]
    for log in (*before, *sorted(older, key=opened_at)):
        if not log.exists():
            continue
        with reserved(log) as ours:
            if not ours or Progress(log).runs:
                continue
            waiting = Delivery(log, note=delivery.note)
            run = place(waiting, store)
            waiting.push(store, run)
            waiting.push_later(store, run)
            delivery.note(f"sent what {waiting.opening.stage} could not, to run {run.key or run.run_id:.8}")


def _deliver_earlier(delivery: Delivery, store: Store, run: KnownRun, record: RunRecord) -> None:
    """Send what the stages before have unsent, or had sent to a run that is no more."""
    for name in record.logs.values():
        log = runs_folder(delivery.log) / name
        if not log.exists():
            continue
        with reserved(log) as ours:
            if ours:
                earlier = Delivery(log, note=delivery.note)
                earlier.progress.choose(record.key)
                earlier.push(store, run)
                earlier.push_later(store, run)
