"""The terminal as an object that is passed in: its streams, how wide they are, and whether someone sits in front of them."""

import os
import shutil
import sys
from contextlib import AbstractContextManager
from typing import TextIO

from sidestep.events import Report
from sidestep.terminal.lines import PlainView


class Terminal:
    """A plain terminal: lines of text, no escape sequences. `RichTerminal` adds colours and the live view."""

    plain = True

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, source: TextIO | None = None):
        self.out, self.err, self.source = out or sys.stdout, err or sys.stderr, source or sys.stdin
        for stream in (self.out, self.err):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a song's name never stops a job on a console that cannot show it

    @property
    def interactive(self) -> bool:
        """True when a person can answer questions."""
        return is_tty(self.source) and is_tty(self.out)

    @property
    def width(self) -> int:
        """Columns, at least 40."""
        return max(40, shutil.get_terminal_size((80, 24)).columns)

    def say(self, text: str = "", style: str = "") -> None:
        """A line or paragraph of output."""
        print(text, file=self.out, flush=True)

    def complain(self, problem: str, fix: str = "") -> None:
        """An error, on the error stream: what is wrong, then what helps."""
        print(f"error: {problem}" + (f"\n{fix}" if fix else ""), file=self.err, flush=True)

    def confirm(self, question: str) -> bool:
        """A yes/no question on one line; Enter and the end of input mean no."""
        print(f"{question} [y/N] ", end="", file=self.out, flush=True)
        return self.source.readline().strip().lower() in ("y", "yes")

    def view(self) -> AbstractContextManager[Report]:
        """What shows a task's events while it runs."""
        return PlainView(self.say)


def is_tty(stream: TextIO) -> bool:
    """True for a stream that leads to a terminal."""
    return bool(getattr(stream, "isatty", lambda: False)())


def wants_plain(out: TextIO) -> bool:
    """True where Rich output would be noise: the output is no terminal, or one that says it is dumb."""
    return not is_tty(out) or os.environ.get("TERM") == "dumb"
