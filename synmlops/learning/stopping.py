"""SIGTERM as a request: whoever ends jobs (a scheduler, the launcher) finds the last step saved."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

INSISTENT_S = 5.0
"""Seconds after which a second SIGTERM is one of its own."""


class Stopping:
    """Takes SIGTERM: training leaves at the end of its step, or at once while it may.

    A second SIGTERM ends at once, unless it comes right after the first: torch's launcher sends two. Outside
    the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
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
        if self._at_once or (self.asked and time.monotonic() - self._asked_at > INSISTENT_S):
            self.leave()
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()
