"""Asking a running job: to stop, as terminals, launchers and systems do, or for what a person wants between two steps.

Both are flags that the job looks at in its own time.
"""

import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar

GRACE_SECONDS = 2.0  # launchers send a key's signal again; only a later Ctrl-C is a second one
ANSWER = (
    "Asked to stop: this step or preview is finished, then the run is saved. "
    "Ctrl-C once more, in a moment, quits without saving."
)
PREVIEW, SAVE = "preview", "save"
ANSWERS = {PREVIEW: "Previews: made after this step.", SAVE: "Saving after this step."}
QUITTING = "Quitting without saving what was done since the last checkpoint."


class StopRequest:
    """`requested` is set by Ctrl-C, SIGTERM, Ctrl-Break and SIGHUP (a closed window) while the context is open.

    The first signal is answered at once, even while the main thread is inside a step of minutes and runs no Python:
    the answer comes from a thread that the operating system wakes. A second Ctrl-C raises KeyboardInterrupt, but not
    before the grace period is over; SIGTERM and SIGHUP never do, however often they come. A SIGHUP that was ignored
    from the start (nohup) stays ignored. Outside the main thread, where no signals arrive, the flag stays unset.

    Keys arrive as signals do: whoever reads them asks `StopRequest.current`, from any thread.

    answer: is told, from the other thread, what happens next.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP") if hasattr(signal, name)
    )

    current: "ClassVar[StopRequest | None]" = None  # the one that is open
    obeyed_at = -math.inf  # when a job of this process last ended that was asked to stop
    raised_at = -math.inf  # when one was last asked that had no StopRequest open, by a KeyboardInterrupt

    def __init__(self, answer: Callable[[str], None]) -> None:
        self.requested = False
        self._answer = answer
        self._first = math.inf  # when it was asked first
        self._is_answered = self._quits = False
        self._previous: dict[int, Any] = {}
        self._wanted: set[str] = set()

    def ask(self, what: str) -> None:
        """Want a PREVIEW or a SAVE, as soon as the step under way has ended."""
        if what not in self._wanted:
            self._wanted.add(what)
            self._answer(ANSWERS[what])

    def take(self, what: str) -> bool:
        """Whether this is wanted; from now on it no longer is."""
        is_wanted = what in self._wanted
        self._wanted.discard(what)
        return is_wanted

    def stop(self) -> None:
        """Stop after a save, as a first signal asks for."""
        if not self.requested:
            self._first = min(self._first, time.monotonic())
            self.requested = self._is_answered = True
            self._answer(ANSWER)

    def __enter__(self) -> "StopRequest":
        self._outer, StopRequest.current = StopRequest.current, self
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
        StopRequest.current = self._outer
        if self.requested and (kind is None or not issubclass(kind, KeyboardInterrupt)):
            StopRequest.obeyed_at = time.monotonic()
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            self._sender.close()
            self._listener.join()
            self._receiver.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        is_second = self.requested and number == signal.SIGINT and self._is_late()
        self._first = min(self._first, time.monotonic())
        self.requested = True
        if is_second or self._quits:  # during a long call the system makes one signal of two, and this hears the last
            raise KeyboardInterrupt

    def _listen(self) -> None:
        while numbers := self._receiver.recv(16):
            if not self._previous.keys() & set(numbers):
                continue
            if not self._is_answered:
                self._first = min(self._first, time.monotonic())
                self._is_answered = True
                self._answer(ANSWER)
            elif signal.SIGINT in numbers and self._is_late():
                self._quits = True
                self._answer(QUITTING)

    def _is_late(self) -> bool:
        return time.monotonic() - self._first > GRACE_SECONDS


def is_asked_to_stop() -> bool:
    """Whether the job of this process was asked to stop."""
    return StopRequest.current is not None and StopRequest.current.requested
