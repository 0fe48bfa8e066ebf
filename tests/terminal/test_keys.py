"""Keys while a job runs: read on both systems, never where nobody can press one."""

import io
import sys
import threading
import time

import pytest

from sidestep.stopping import PREVIEW, SAVE, StopRequest
from sidestep.terminal.keys import read_console
from sidestep.terminal.rich_terminal import RichTerminal, ask_job


class Console:
    """A Windows console (`msvcrt`) in which these were pressed."""

    def __init__(self, typed: str, ended: threading.Event):
        self.typed, self.ended = list(typed), ended

    def kbhit(self) -> bool:
        if not self.typed:
            self.ended.set()
        return bool(self.typed)

    def getwch(self) -> str:
        return self.typed.pop(0)


def test_a_windows_console_gives_letters_and_a_function_key_is_none():
    ended, pressed = threading.Event(), []
    read_console(Console("p\xe0s\x00qs", ended), ended, pressed.append)  # \xe0s and \x00q are function keys
    assert pressed == ["p", "s"]


def test_keys_ask_the_training_that_is_open_and_nobody_else():
    answers = []
    for letter in "psqx":
        ask_job(letter)  # nothing runs: nothing happens
    with StopRequest(answers.append) as outer:
        with StopRequest(answers.append) as job:
            for letter in "pPsx":
                ask_job(letter)
            assert len(answers) == 2  # each is answered once
            assert [job.take(PREVIEW), job.take(PREVIEW), job.take(SAVE)] == [True, False, True]
            assert not job.requested
            ask_job("q")
            ask_job("q")
            assert job.requested
        assert StopRequest.current is outer
        assert not outer.requested
    assert len(answers) == 3
    assert StopRequest.current is None


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("source", "is_read"), [(io.StringIO(), False), (Tty(), True)])
def test_keys_are_read_from_a_terminal_alone(source, is_read):
    with RichTerminal(out=Tty(), source=source).view() as view:
        assert view.keyboard is (source if is_read else None)


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX terminal")
def test_a_terminal_gives_letters_but_not_to_a_job_in_the_background(monkeypatch):
    import os

    from sidestep.terminal import keys

    master, slave = os.openpty()
    ended, pressed = threading.Event(), []
    monkeypatch.setattr(keys, "in_foreground", lambda _terminal: foreground)
    foreground = False
    thread = threading.Thread(target=keys.read_terminal, args=(slave, ended, pressed.append), daemon=True)
    thread.start()
    os.write(master, b"s\n")
    time.sleep(0.3)
    assert pressed == []
    foreground = True
    deadline = time.monotonic() + 240
    while "s" not in pressed and time.monotonic() < deadline:
        time.sleep(0.01)
    os.write(master, b"\x1bOp\n")  # an arrow or a key of the number pad
    time.sleep(0.3)
    ended.set()
    thread.join()
    assert pressed == ["s", "\n"]
    os.close(master)
    os.close(slave)


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX terminal")
def test_a_terminal_that_is_not_ones_own_is_left_as_it_is():
    import os
    import termios

    from sidestep.terminal.keys import reading_keys

    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    opened = os.open(os.ttyname(slave), os.O_RDONLY | os.O_NOCTTY)  # a process without a terminal would get this one
    with os.fdopen(opened) as source, reading_keys(source, lambda _letter: None):
        assert termios.tcgetattr(slave) == before
    os.close(master)
