"""SIGTERM as a request: whoever ends jobs (a scheduler, the launcher) finds the last step saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Stopping:
    """Takes SIGTERM: training leaves at the end of its step, or at once while it may.

    A second SIGTERM always ends at once. Outside the main thread, or where somebody else handles the signal
    already, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> Self:
        free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if free and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Be ended at once within this block: it takes long, and what is before it is safe."""
        self._at_once = True
        try:
            if self.asked:
                self.leave()
            yield
        finally:
            self._at_once = False

    def leave(self) -> None:
        """End this process as the signal asked for."""
        raise SystemExit(128 + signal.SIGTERM)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self.asked:
            self.leave()
        self.asked = True
