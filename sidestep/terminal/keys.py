"""Single keys, without Enter, while a job runs: from a POSIX terminal in cbreak mode, or from a Windows console."""

import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TextIO

if sys.platform == "win32":
    import msvcrt
else:
    import termios
    import tty

POLL_SECONDS = 0.1
PREFIXES = ("\x00", "\xe0")  # on Windows a function key is one of these and a letter


@contextmanager
def reading_keys(source: TextIO, pressed: Callable[[str], None]) -> Iterator[None]:
    """Tell `pressed`, from another thread, each letter that is pressed while a block runs. Ctrl-C stays a signal.

    What was typed before is dropped. A job in the background reads no keys: its terminal belongs to another.
    """
    ended = threading.Event()
    if sys.platform == "win32":
        with _in_thread(partial(read_console, msvcrt, ended, pressed), ended):
            yield
        return
    terminal = source.fileno()
    if not in_foreground(terminal):
        yield
        return
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)  # drops what was typed before
    try:
        with _in_thread(partial(read_terminal, terminal, ended, pressed), ended):
            yield
    finally:
        if in_foreground(terminal):
            with suppress(termios.error):  # the window was closed
                termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def _in_thread(work: Callable[[], None], ended: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=work, name="keys", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def in_foreground(terminal: int) -> bool:
    """Whether this process may read from and set up its terminal; the system halts one that does so without."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # not its own, or gone
        return False


def read_terminal(terminal: int, ended: threading.Event, pressed: Callable[[str], None]) -> None:
    """Read letters from a POSIX terminal until `ended`; an arrow or function key, which begins with Esc, is none."""
    with suppress(OSError):  # the window was closed
        while not ended.is_set():
            if not in_foreground(terminal):
                ended.wait(POLL_SECONDS)
            elif select.select([terminal], [], [], POLL_SECONDS)[0] and in_foreground(terminal):
                typed = os.read(terminal, 32).decode("utf-8", "ignore")
                if not typed:
                    return
                for letter in typed if not typed.startswith("\x1b") else "":
                    pressed(letter)


def read_console(console: Any, ended: threading.Event, pressed: Callable[[str], None]) -> None:
    """Read letters from a Windows console until `ended`. console: `msvcrt`."""
    while not ended.wait(POLL_SECONDS):
        while console.kbhit() and not ended.is_set():
            letter = console.getwch()
            if letter in PREFIXES:
                console.getwch()
            else:
                pressed(letter)
