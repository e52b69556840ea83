"""How processes that train together hear of each other's end, however one of them ends.

Torch's launcher sees only the processes of its own machine, and a process that waits in a collective for one
that will never come waits for ever. So each has a thread that looks into the group's store: for the reason
that one of them stopped, and for a sign of life from each other.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from synmlops.learning.launch import leave_crash, tell_launcher
from synmlops.params import SynmlopsError

POLL_S = 0.5
GRACE_S = 5.0
"""Seconds in which a process that was told of another's end should leave by itself."""
SILENCE_S = 30.0
"""Seconds without a sign of life after which a process counts as lost."""
PARTING_S = 10.0
"""Seconds that the others wait for rank 0 to put the failure on record."""
_REASON, _HEARD, _DONE = "reason", "heard", "done"
_CRASH, _OVER = "crash", "over"  # these outlive a restart
_LOST = "another process ended without a word: it was killed, or its machine went down"


@dataclass(frozen=True)
class Reason:
    """Why a process stopped."""

    rank: int
    host: str
    kind: Literal["mendable", "crash", "ended"]  # ended: by a signal
    text: str

    @property
    def exit_code(self) -> int:
        """What the other processes leave with."""
        return 2 if self.kind == "mendable" else 1

    def as_error(self) -> Exception:
        """Give what rank 0 raises for a process that stopped."""
        text = f"process {self.rank} on {self.host}: {self.text}"
        if self.kind == "mendable":  # on this machine the user knows what it is about
            return SynmlopsError(self.text if self.host == socket.gethostname() else text)
        return RuntimeError(text)


class Watch:
    """The thread of one process, and what it says to the others.

    Parameters
    ----------
    store : Store
        A connection of the watch's own, since one that waits in another thread answers nobody.
    rank, n_ranks : int
    prefix : str
        Of this start of the group; what is said without it outlives a restart.
    """

    def __init__(self, store: Store, *, rank: int, n_ranks: int, prefix: str) -> None:
        self._lasting, self._store = store, PrefixStore(prefix, store)
        self._rank, self._n_ranks = rank, n_ranks
        self._left = threading.Event()
        self._mutex = threading.Lock()  # of the connection
        self.step = 0  # of training, where this process is
        self._is_said = False
        self.at_the_end: Callable[[str], None] = lambda reason: None
        self._thread = threading.Thread(target=self._look, name="synmlops-watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._thread.join(2 * POLL_S)

    @contextmanager
    def together(self, *, last: bool = False) -> Iterator[None]:
        """Let the first error of any process be the error of all.

        Rank 0 raises it, whichever process met it. The others leave without a word if it is one that a user
        can mend, so that it is said once; they leave after rank 0, since the launcher of a machine that has
        no process left may take the store with it.

        Parameters
        ----------
        last : bool
            Whether nothing follows but the end of the process.
        """
        try:
            yield
        except BaseException as error:
            self._left.set()
            reason = self._first_reason(error)
            _close_group()  # which others may be waiting for
            if self._rank == 0:
                raised = self._for_all(error, reason, last=last)
            else:
                raised = self._for_itself(error, reason)
            if raised is error:
                raise
            raise raised from None
        finally:
            if self._rank == 0 and last:
                self._tell(_DONE)

    def is_over(self) -> bool:
        """Whether an earlier start of this group ended with what another start cannot mend.

        Our launcher knows by itself; torchrun, given restarts, begins again whatever happened.
        """
        return bool(self._lasting.check([_OVER]))

    def wait_for_reason(self, seconds: float) -> Reason | None:
        """Wait until some process has said why it stopped."""
        until = time.monotonic() + seconds
        while True:
            reason = self._read()
            if reason is not None or time.monotonic() > until:
                return reason
            time.sleep(0.05)

    def _first_reason(self, error: BaseException) -> Reason | None:
        """Say why this process stops, unless another was first; None if nobody can be told."""
        mine = Reason(self._rank, socket.gethostname(), _kind_of(error), _text_of(error))
        try:
            with self._mutex:
                found = self._store.compare_set(_REASON, "", json.dumps(asdict(mine)))
            return Reason(**json.loads(found))
        except (RuntimeError, ValueError):  # the store has gone with its process
            return None

    def _for_all(self, error: BaseException, reason: Reason | None, *, last: bool) -> BaseException:
        """Give what rank 0 raises, having said what a user can mend."""
        self._tell(_HEARD)
        if reason is not None and reason.rank and not isinstance(error, SynmlopsError):
            if reason.kind != "ended":
                error = reason.as_error()
            elif isinstance(error, Exception):  # whoever ended the other will end this one too
                error = SystemExit(128 + signal.SIGTERM)
        elif isinstance(error, Exception) and not isinstance(error, SynmlopsError):
            self._note_crash(error)
            error = RuntimeError(f"{_LOST} ({_first_line(error)})") if _is_of_a_lost_peer(error) else error
        if isinstance(error, SynmlopsError):
            if not self._is_said and not tell_launcher(error):
                print(f"synmlops: {error}", file=sys.stderr, flush=True)
            self._is_said = True
            self._end_for_good()
            return SystemExit(2) if last else error
        return error

    def _for_itself(self, error: BaseException, reason: Reason | None) -> BaseException:
        """Give what another rank raises, once rank 0 is done.

        What there is to say is said first: the launcher may end this process as soon as rank 0 has left.
        """
        is_mine = reason is None or reason.rank == self._rank
        told = isinstance(error, SynmlopsError) and is_mine and tell_launcher(error)
        if is_mine and isinstance(error, Exception) and not isinstance(error, SynmlopsError):
            self._note_crash(error)
            traceback.print_exception(error)
            error = SystemExit(1)
        until = time.monotonic() + PARTING_S
        while time.monotonic() < until and not self._is_set(_DONE):
            time.sleep(0.05)
        if reason is not None and not is_mine:
            return SystemExit(reason.exit_code)
        return SystemExit(2) if told or (isinstance(error, SynmlopsError) and self._is_set(_HEARD)) else error

    def _note_crash(self, error: Exception) -> None:
        """Leave word of a crash; the same one again at the same step is no accident, and all is over."""
        crash = f"{_text_of(error)} (at step {self.step})"
        leave_crash(crash)
        with suppress(RuntimeError), self._mutex:
            before = self._lasting.get(_CRASH) if self._lasting.check([_CRASH]) else b""
            self._lasting.set(_CRASH, crash)
            if before.decode() != crash:
                return
        self._end_for_good()

    def _end_for_good(self) -> None:
        with suppress(RuntimeError), self._mutex:
            self._lasting.set(_OVER, "")

    def _look(self) -> None:
        beats: dict[int, tuple[bytes, float]] = {}
        watched = range(1, self._n_ranks) if self._rank == 0 else (0,)
        beat = 0
        while not self._left.wait(POLL_S):
            try:
                beat += 1
                self._set(f"beat_{self._rank}", str(beat))
                reason = self._read() or self._lost(watched, beats)
            except RuntimeError:
                reason = Reason(0, "?", "crash", "the process that keeps the group's store has ended")
            if reason is not None:
                self._leave(reason)
                return

    def _lost(self, watched: range | tuple[int, ...], beats: dict[int, tuple[bytes, float]]) -> Reason | None:
        now = time.monotonic()
        for rank in watched:
            with self._mutex:
                key = f"beat_{rank}"
                beat = self._store.get(key) if self._store.check([key]) else b""
            if rank not in beats or beats[rank][0] != beat:
                beats[rank] = beat, now
            elif beat and now - beats[rank][1] > SILENCE_S:
                return Reason(rank, "another machine", "crash", f"no sign of life for {SILENCE_S:.0f} s")
        return None

    def _leave(self, reason: Reason) -> None:
        """End this process, at once if it hangs where no exception reaches it."""
        if self._rank == 0:
            self._tell(_HEARD)  # so the other leaves, which ends the wait for it in a collective
        if reason.rank == self._rank or self._left.wait(GRACE_S):
            return
        if self._rank == 0:
            error = reason.as_error()
            self.at_the_end(f"{type(error).__name__}: {error}")
            if not (isinstance(error, SynmlopsError) and tell_launcher(error)):
                print(f"synmlops: {error}", file=sys.stderr, flush=True)
        os._exit(reason.exit_code)

    def _tell(self, key: str) -> None:
        with suppress(RuntimeError):  # the store may have gone
            self._set(key, "")

    def _is_set(self, key: str) -> bool:
        try:
            with self._mutex:
                return bool(self._store.check([key]))
        except RuntimeError:
            return True  # nobody is left to wait for

    def _read(self) -> Reason | None:
        with self._mutex:
            if not self._store.check([_REASON]):
                return None
            return Reason(**json.loads(self._store.get(_REASON)))

    def _set(self, key: str, value: str) -> None:
        with self._mutex:
            self._store.set(key, value)


def open_watch(*, rank: int, n_ranks: int, prefix: str) -> Watch:
    """Connect a watch to the store that torch's environment names, which must be up."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    return Watch(PrefixStore("synmlops", store), rank=rank, n_ranks=n_ranks, prefix=f"{prefix}_watch")


def _is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed since its other end is gone."""
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("by peer", "NCCL", "Connection refused", "Broken pipe")
    )


def _close_group() -> None:
    """Close this process's connections; NCCL's would wait for the others."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _kind_of(error: BaseException) -> Literal["mendable", "crash", "ended"]:
    if isinstance(error, SynmlopsError):
        return "mendable"
    return "crash" if isinstance(error, Exception) else "ended"


def _text_of(error: BaseException) -> str:
    if isinstance(error, SynmlopsError):
        return str(error)
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}"
    return "ended from outside"
