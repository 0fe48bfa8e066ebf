"""Stopping a run from outside: the first Ctrl-C or SIGTERM lets the step finish and saves, the second quits at once."""

import os
import signal
import threading
import time
from types import FrameType

SAME_KEY_SECONDS = 1.0  # under a launcher one Ctrl-C arrives twice: from the terminal and from the launcher


class StopRequest:
    """A flag that SIGINT and SIGTERM set while the context is open. Outside the main thread it stays unset."""

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
        elif "WORLD_SIZE" not in os.environ or now - self._first > SAME_KEY_SECONDS:
            raise KeyboardInterrupt
