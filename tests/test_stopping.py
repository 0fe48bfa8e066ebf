"""A job that is asked to stop answers at once, saves, and is only quit by a second Ctrl-C of a person."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidestep import stopping
from sidestep.stopping import ANSWER, QUITTING, StopRequest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals to itself")


@pytest.fixture
def answers():
    return []


def wait_for(answers: list[str], count: int) -> None:
    deadline = time.monotonic() + 60
    while len(answers) < count:
        assert time.monotonic() < deadline, answers
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_is_answered(answers, number):
    with StopRequest(answers.append) as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        wait_for(answers, 1)
    assert answers == [ANSWER]


def test_a_key_that_a_launcher_sends_again_is_one_key(answers):
    with StopRequest(answers.append) as stop:
        for _ in range(5):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    assert answers == [ANSWER]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_repeated_sigterm_never_quits(answers, monkeypatch, number):
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.0)
    with StopRequest(answers.append) as stop:
        for _ in range(5):
            signal.raise_signal(number)
            time.sleep(0.01)
    assert stop.requested
    assert answers == [ANSWER]


def test_a_second_ctrl_c_quits_after_the_grace_period(answers, monkeypatch):
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.05)
    with pytest.raises(KeyboardInterrupt), StopRequest(answers.append):  # noqa: PT012 (the last one raises)
        signal.raise_signal(signal.SIGINT)
        wait_for(answers, 1)
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)
    wait_for(answers, 2)
    assert answers == [ANSWER, QUITTING]


@pytest.mark.parametrize("first", ["the key q", "two signals that the system makes one of"])
def test_what_is_said_of_a_second_ctrl_c_is_what_it_does(answers, monkeypatch, first):
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.05)
    with pytest.raises(KeyboardInterrupt), StopRequest(answers.append) as stop:  # noqa: PT012
        if first == "the key q":
            stop.stop()
            time.sleep(0.1)
            signal.raise_signal(signal.SIGINT)
        else:  # inside of one long call: both are told by the other thread, Python hears the last
            for number in (1, 2):
                stop._sender.send(bytes([signal.SIGINT]))
                wait_for(answers, number)
                time.sleep(0.1)
            stop._on_signal(signal.SIGINT, None)
    wait_for(answers, 2)
    assert answers == [ANSWER, QUITTING]


def test_what_was_set_before_is_put_back(answers):
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest(answers.append):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_nohup_keeps_a_closed_window_from_stopping_a_job(answers):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(answers.append) as stop:
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.05)
        assert not stop.requested
        assert answers == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_step_of_minutes_does_not_delay_the_answer():
    code = (
        "import hashlib, sys, time\n"
        "from sidestep.stopping import StopRequest\n"
        "def answer(text): print(f'{time.monotonic()} {text}', flush=True)\n"
        "with StopRequest(answer) as stop:\n"
        "    print('begun', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 4_000_000)\n"  # seconds in C, without a line of Python
        "    print(f'{time.monotonic()} over {stop.requested}', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    answered, over = process.stdout.readline().split(" ", 1), process.stdout.readline().split(" ", 1)
    process.stdout.close()
    assert process.wait() == 0
    assert answered[1] == ANSWER + "\n"
    assert over[1] == "over True\n"
    assert float(answered[0]) - sent < 0.5
    assert float(over[0]) - float(answered[0]) > 0.5
