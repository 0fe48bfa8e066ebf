"""The program in a real pseudo-terminal: keys go in, and what a person would see comes out."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pexpect
import pyte

ROOT = Path(__file__).parent.parent
KEYS = {
    "enter": "\r",
    "escape": "\x1b",
    "up": "\x1b[A",
    "down": "\x1b[B",
    "ctrl-c": "\x03",
    "clear": "\x15",
    "space": " ",
}


def _hear_ctrl_c() -> None:
    """Hear Ctrl-C as a terminal's programs do: one started in the background ignores it, as does all below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Session:
    """`train.py` under a terminal emulator of the given size; use as a context manager.

    launcher: what starts it, by default the Python that runs here.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        launcher: Sequence[str] = (sys.executable,),
        columns: int = 80,
        lines: int = 40,
        **env: str,
    ):
        self.screen = pyte.HistoryScreen(columns, lines, history=5000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")
        }
        environment |= {
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "SIDE_STEP_HOME": str(folder / "home"),
            "HOME": str(folder),
        } | env
        self.began = time.monotonic()
        self.process = pexpect.spawn(
            launcher[0],
            [*launcher[1:], str(ROOT / "train.py"), *arguments],
            cwd=str(folder),
            env=environment,
            dimensions=(lines, columns),
            timeout=30,
            preexec_fn=_hear_ctrl_c,
        )
        self.screen.write_process_input = self.process.send  # a terminal answers when it is asked where its cursor is
        self.raw = b""

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print("\n".join(self.lines()))
        self.process.close(force=True)

    def read(self) -> bool:
        """Take in what has arrived; False at the end of the program."""
        try:
            part = self.process.read_nonblocking(65536, timeout=0.05)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += part
        self._stream.feed(part)
        return True

    def lines(self) -> list[str]:
        """All lines so far, those scrolled away included, without the empty ones."""
        width = self.screen.columns
        above = ["".join(row[x].data for x in range(width)) for row in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display] if line.strip()]

    def until(self, *texts: str, seconds: float = 240) -> None:
        """Wait until the last lines hold all these texts."""
        deadline = time.monotonic() + seconds
        while not all(text in "\n".join(self.lines()[-60:]) for text in texts):
            alive = self.read()
            if not alive or time.monotonic() >= deadline:
                raise AssertionError(f"{texts} did not appear in:\n" + "\n".join(self.lines()[-60:]))

    def asks(self, text: str, seconds: float = 240) -> None:
        """Wait until the last question is this one and the program waits for keys."""
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self._last_question()):
            alive = self.read()
            if not alive or time.monotonic() >= deadline:
                raise AssertionError(f"not asked: {text}, but:\n" + "\n".join(self.lines()[-40:]))
        for _ in range(3):  # until the list below it is drawn
            self.read()

    def _last_question(self) -> list[str]:
        lines = self.lines()
        marks = [number for number, line in enumerate(lines) if line.startswith("? ")]
        return lines[marks[-1] : marks[-1] + 1] if marks else []

    def keys(self, *names: str) -> None:
        """Press keys, or type what is no name of one."""
        for name in names:
            self.process.send(KEYS.get(name, name))
            time.sleep(0.02)

    def choose(self, text: str) -> None:
        """Move the pointer of a list to the line that begins with this, and press Enter."""
        for _ in range(60):
            pointed = self._pointed_at()
            if pointed.startswith(text):
                self.keys("enter")
                return
            self.keys("down")
            deadline = time.monotonic() + 5  # until it has moved, however busy the machine is; a list may have one line
            while self._pointed_at() == pointed and time.monotonic() < deadline:
                self.read()
        raise AssertionError(f"no line {text} in:\n" + "\n".join(self.lines()[-30:]))

    def _pointed_at(self) -> str:
        pointed = [line.lstrip() for line in self.lines() if line.lstrip().startswith("> ")]
        return pointed[-1][2:].lstrip("123456789 ") if pointed else ""

    def end(self, seconds: float = 240) -> int:
        """Wait for the end of the program; its exit status."""
        deadline = time.monotonic() + seconds
        while self.read():
            assert time.monotonic() < deadline, "did not end:\n" + "\n".join(self.lines()[-30:])
        self.process.wait()
        return self.process.exitstatus
