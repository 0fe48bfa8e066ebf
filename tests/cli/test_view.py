"""A view never stops a job: whoever looks may leave, and what is made is made all the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidestep.cli.main import showing
from sidestep.events import Notice
from sidestep.settings.config import command_words
from sidestep.terminal.terminal import Terminal
from tests.training_world import settings, write_data

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes and signals")


class Gone:
    """A stream whose reader has left."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        pass


def test_events_after_the_reader_left_are_shown_to_nobody(monkeypatch):
    silenced = []
    monkeypatch.setattr("sidestep.cli.main.silence_stdout", lambda: silenced.append(True))
    with showing(Terminal(out=Gone())) as report:
        for _ in range(3):
            report(Notice(message="x"))
    assert silenced == [True]


def test_errors_of_the_job_itself_still_arrive():
    with pytest.raises(FileNotFoundError), showing(Terminal()):
        raise FileNotFoundError(2, "the job's own")


def start(tmp_path: Path, **changes) -> subprocess.Popen:
    config = settings(write_data(tmp_path / "data"), tmp_path / "run", **changes)
    command = [sys.executable, "train.py", "--plain", "--yes", *command_words(config)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_training_goes_on_when_its_reader_leaves(tmp_path):
    process = start(tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=280) == 0
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_window_and_an_impatient_launcher_get_a_checkpoint(tmp_path, number):
    process = start(tmp_path, epochs=2000, save_every=2000)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    for _ in range(4):  # uv forwards what the group got already
        os.kill(process.pid, number)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 130
    assert "--resume-from latest" in errors
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1
