"""The thread that sends a running stage's log, and `sync`, which sends what was left."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from synmlops.params import SynmlopsError
from synmlops.tracking.delivery import FAILURE_TAG, Delivery
from synmlops.tracking.lineage import project_root, state_folder
from synmlops.tracking.metric_log import iter_events, reserved
from synmlops.tracking.placing import place
from synmlops.tracking.store import KnownRun, RunGone, Store, Unreachable

_PAUSE_SECONDS = 0.5  # between two batches
_LONGEST_WAIT_SECONDS = 60.0  # between two tries while the store is away
_FOREVER = 2**62
_LAST_TRIES = 2  # once the stage has ended and the store does not answer


class Sender(threading.Thread):
    """Sends the log of one running stage, without ever making it wait.

    Parameters
    ----------
    root : Path
        The project.
    delivery : Delivery
        The log; used by this thread alone.
    """

    def __init__(self, root: Path, delivery: Delivery) -> None:
        super().__init__(name=f"synmlops-sender-{delivery.opening.stage}", daemon=True)
        self._root = root
        self._delivery = delivery
        self._store: Store | None = None
        self._bell = threading.Condition()
        self._asked = 1  # times somebody said there is something to send
        self._served = 0  # ... of which so many were dealt with
        self._hurry = False  # try now, even if the store was away a moment ago
        self._ending = False
        self._all_sent = False  # set at the very end, so that a thread that died does not look content
        self.run_known: KnownRun | None = None
        self.trouble: str | None = None  # why the last try failed

    def nudge(self) -> None:
        """Say that there is something to send."""
        with self._bell:
            self._asked += 1
            self._bell.notify_all()

    def wait_for_run(self, seconds: float) -> KnownRun | None:
        """Give the run once it is known; None if a try failed, or it took longer than `seconds`."""
        with self._bell:
            self._bell.wait_for(lambda: self.run_known is not None or self._served > 0, seconds)
        return self.run_known

    def wait_idle(self, seconds: float) -> bool:
        """Wait until all that is settled is sent; False if that failed or took longer than `seconds`."""
        with self._bell:
            self._asked += 1
            self._hurry = True
            mine = self._asked
            self._bell.notify_all()
            return self._bell.wait_for(lambda: self._served >= mine, seconds) and self.trouble is None

    def end(self, seconds: float) -> bool:
        """Send what is left for at most `seconds`; False if something stays unsent."""
        with self._bell:
            self._ending = True
            self._bell.notify_all()
        self.join(seconds)
        return self._all_sent

    def run(self) -> None:
        """Send until the stage ends; on its own thread."""
        try:
            self._run()
        finally:
            with self._bell:  # nobody shall wait for a thread that is no more, whatever ended it
                if not self._all_sent and self.trouble is None:
                    self.trouble = "the sending thread stopped"
                self._served = _FOREVER
                self._bell.notify_all()

    def _run(self) -> None:
        backoff = 0.0
        tries_left = _LAST_TRIES
        while tries_left:
            with self._bell:
                self._bell.wait_for(lambda: self._asked > self._served or self._ending)
                self._hurry, ending, asked = False, self._ending, self._asked
            trouble, hopeless = self._try(ending)
            with self._bell:
                self.trouble, self._served = trouble, asked
                self._bell.notify_all()
                if hopeless or (ending and trouble is None):
                    self._all_sent = trouble is None
                    return
                tries_left -= ending
                pause = _PAUSE_SECONDS
                if trouble is None:
                    backoff = 0.0
                else:
                    self._asked += 1  # what could not be sent is still to be sent
                    backoff = pause if ending else min(max(1.0, 2 * backoff), _LONGEST_WAIT_SECONDS)
                    pause = backoff
                self._bell.wait_for(lambda: self._hurry or self._ending, 0 if ending else pause)
            if ending:
                time.sleep(pause)

    def _try(self, ending: bool) -> tuple[str | None, bool]:
        """Send once; gives why it failed, and whether trying again is no use."""
        try:
            self._step(ending)
        except (Unreachable, RunGone) as error:
            return str(error), False
        except SynmlopsError as error:  # the log itself is damaged
            return str(error), True
        return None, False

    def _step(self, ending: bool) -> None:
        if self._store is None:
            self._store = Store.open(self._root, experiment=self._delivery.opening.experiment)
        if self.run_known is None:
            known = place(self._delivery, self._store)
            with self._bell:
                self.run_known = known
                self._bell.notify_all()
        try:
            self._delivery.push(self._store, self.run_known)
            if ending:
                self._delivery.push_later(self._store, self.run_known)
        except RunGone:
            self.run_known = None
            self._delivery.forget()
            raise


@dataclass(frozen=True)
class Synced:
    """What `sync` did."""

    sent: int  # logs that are now in the store as a whole
    left: int  # logs of which something is still unsent
    notes: tuple[str, ...]  # lines for the user


def sync(root: Path | None = None) -> Synced:
    """Send what stages could not, from all metric logs of a project. May be repeated.

    A log that a running stage holds is left to that stage. Of a stage that was killed before it could say
    so, what its last checkpoint covers is sent, and its run is marked KILLED; it may still be resumed.

    Parameters
    ----------
    root : Path, optional
        The project; default: that of the current folder.
    """
    notes: list[str] = []
    sent = left = 0
    folder = state_folder(root or project_root()) / "runs"
    for log in sorted(folder.glob("*/*.jsonl"), key=lambda path: path.stat().st_ctime_ns):
        with reserved(log) as ours:
            if not ours:
                notes.append(f"{log}: a running stage holds it")
                continue
            try:
                outcome = _sync_log(root or project_root(), log, notes.append)
            except (Unreachable, RunGone, SynmlopsError) as error:
                notes.append(str(error))
                outcome = False
        sent += outcome is True
        left += outcome is False
    return Synced(sent, left, tuple(notes))


def _sync_log(root: Path, log: Path, note: Callable[[str], None]) -> bool | None:
    """Send one log; None if there was nothing to send."""
    delivery = Delivery(log, note=note)
    progress = delivery.progress
    ended = False
    for event in iter_events(log):
        ended = event.kind == "close" or (ended and event.kind != "resume")
    if progress.latest is not None and delivery.unsent() == 0 and ended:
        return None
    store = Store.open(root, experiment=delivery.opening.experiment)
    if progress.latest is not None and store.get(progress.latest) is None:
        note(
            f"{log}: {delivery.unsent()} lines are unsent, but their run was deleted or is in another store "
            f"than {store.shown}; delete the file to forget them"
        )
        return False
    run = place(delivery, store)
    delivery.push(store, run)
    delivery.push_later(store, run)
    if not ended:
        _mark_killed(store, run, delivery)
    return True


def _mark_killed(store: Store, run: KnownRun, delivery: Delivery) -> None:
    opening = delivery.opening
    now = store.get(run.run_id)
    mark = opening.stage_tag
    if now is not None and now.tags.get(mark, "").endswith(opening.attempt):
        reason = f"{opening.stage}: ended without a word"
        store.set_tags(run.run_id, {mark: "killed", FAILURE_TAG: reason})
        store.set_status(run.run_id, "KILLED", time_ms=int(time.time() * 1000))
