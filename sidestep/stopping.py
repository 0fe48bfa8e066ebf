"""Asking a running job to stop: what terminals, launchers and systems send, as one flag that the job looks at."""

import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from sidestep.errors import Interrupted

GRACE_SECONDS = 2.0  # launchers send a key's signal again; only a later Ctrl-C is a second one
ANSWER = (
    "Asked to stop: this step is finished, then the run is saved. Ctrl-C once more, in a moment, quits without saving."
)
QUITTING = "Quitting without saving what was done since the last checkpoint."


class StopRequest:
    """`requested` is set by Ctrl-C, SIGTERM, Ctrl-Break and SIGHUP (a closed window) while the context is open.

    The first signal is answered at once, even while the main thread is inside a step of minutes and runs no Python:
    the answer comes from a thread that the operating system wakes. A second Ctrl-C raises KeyboardInterrupt, but not
    before the grace period is over; SIGTERM and SIGHUP never do, however often they come. A SIGHUP that was ignored
    from the start (nohup) stays ignored. Outside the main thread, where no signals arrive, the flag stays unset.

    answer: is told, from the other thread, what happens next.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP") if hasattr(signal, name)
    )

    obeyed_at = -math.inf  # when a job of this process last ended because it was asked to
    raised_at = -math.inf  # when one was last asked that had no StopRequest open, by a KeyboardInterrupt

    def __init__(self, answer: Callable[[str], None]) -> None:
        self.requested = False
        self._answer = answer
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            self._listener = threading.Thread(target=self._listen, name="stop request", daemon=True)
            self._listener.start()
            self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Interrupted):
            StopRequest.obeyed_at = time.monotonic()
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            self._sender.close()
            self._listener.join()
            self._receiver.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
        elif number == signal.SIGINT and now - self._first > GRACE_SECONDS:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        answered = 0.0
        while numbers := self._receiver.recv(16):
            now = time.monotonic()
            if not self._previous.keys() & set(numbers):
                continue
            if not answered:
                answered = now
                self._answer(ANSWER)
            elif signal.SIGINT in numbers and now - answered > GRACE_SECONDS:
                self._answer(QUITTING)
