"""A terminal that Rich may draw on. Apart from `Terminal` so that help and plain mode never wait for Rich."""

from contextlib import AbstractContextManager
from typing import TextIO

from rich.console import Console

from sidestep.events import Report
from sidestep.terminal.live import LiveView
from sidestep.terminal.terminal import Terminal, is_tty


class RichTerminal(Terminal):
    """Colours, tables, bars. Markup is off: a path such as `/songs/[x]/y` is printed as it is. NO_COLOR is Rich's to obey."""

    plain = False

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, source: TextIO | None = None):
        super().__init__(out, err, source)
        self.console = Console(file=self.out, markup=False, emoji=False, highlight=False)

    @property
    def width(self) -> int:
        return self.console.width

    @property
    def unicode(self) -> bool:
        """True where block and box characters can be shown."""
        return self.console.encoding.startswith("utf") and not self.console.legacy_windows

    def say(self, text: str = "", style: str = "") -> None:
        self.console.print(text, style=style, soft_wrap=True)

    def complain(self, problem: str, fix: str = "") -> None:
        if not is_tty(self.err):
            super().complain(problem, fix)
            return
        console = Console(file=self.err, markup=False, emoji=False, highlight=False)
        console.print(problem, style="bold red", soft_wrap=True)
        if fix:
            console.print(fix, soft_wrap=True)

    def view(self) -> AbstractContextManager[Report]:
        return LiveView(self.console)
