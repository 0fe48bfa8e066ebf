"""One writer for a folder of results: the others are refused before they touch anything."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidestep import files
from sidestep.cli.main import main
from sidestep.errors import ExitStatus, UserError
from sidestep.files import one_writer, portable, write_text
from sidestep.settings.option import as_arguments
from sidestep.tasks.train.checkpoints import positions
from tests.training_world import settings, write_data

ROOT = Path(__file__).parent.parent
HOLD = "import sys, time, pathlib\nfrom sidestep.files import one_writer\nwith one_writer(pathlib.Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True)\n    time.sleep(60)\n"


def holding(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    process = holding(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    try:
        with pytest.raises(UserError) as refused, one_writer(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()
    assert f"process {process.pid} on " in refused.value.problem
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_training_into_the_folder_of_a_live_run_is_refused_before_anything_is_touched(checkpoints, tmp_path, capsys):
    process = holding(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    arguments = ["--checkpoint-dir", checkpoints, "--dataset-dir", tmp_path, "--output-dir", tmp_path / "run"]
    try:
        for extra in ([], ["--resume-from", "latest"], ["--preset", "quick_test"]):
            assert main(["--yes", "fixed", *map(str, arguments), *extra]) == 2
            assert f"process {process.pid} on " in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path):
    process = holding(tmp_path / "run")
    process.kill()
    process.wait()
    with one_writer(tmp_path / "run"):
        assert f"process {os.getpid()} on " in (tmp_path / "run" / ".lock-holder").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_lock_of_a_stopped_process_holds(tmp_path):
    process = holding(tmp_path / "run")
    try:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        with pytest.raises(UserError), one_writer(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_folder_that_nothing_came_of_is_gone_again(tmp_path):
    with one_writer(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with one_writer(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_it_is_gone_again_where_a_lock_goes_with_its_file(tmp_path, monkeypatch):
    """As on Windows."""

    class Lock(files.FileLock):
        def _release(self):
            super()._release()
            Path(self.lock_file).unlink(missing_ok=True)

    monkeypatch.setattr(files, "FileLock", Lock)
    with one_writer(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_start_that_comes_to_nothing_leaves_the_lock_of_one_that_came_in_meanwhile(tmp_path, monkeypatch):
    class Lock(files.FileLock):
        def _release(self):
            super()._release()
            Path(self.lock_file).touch()  # the other start's

    monkeypatch.setattr(files, "FileLock", Lock)
    with one_writer(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / ".lock").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_of_twenty_starts_at_once_one_runs_and_after_its_death_the_next_start_goes_on(tmp_path):
    config = settings(write_data(tmp_path / "data"), tmp_path / "run", epochs=5000, save_every=20, log_every=50)
    command = [sys.executable, "train.py", "--plain", "--yes", "fixed", *as_arguments(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(number: int, *more: str) -> subprocess.Popen:
        with (tmp_path / f"{number}.txt").open("w", encoding="utf-8") as said:
            return subprocess.Popen([*command, *more], cwd=ROOT, env=environment, stdout=said, stderr=said)

    def said(number: int) -> str:
        return (tmp_path / f"{number}.txt").read_text(encoding="utf-8")

    started = [start(number) for number in range(20)]
    try:
        while sum(process.poll() is None for process in started) > 1 or not positions(config.output_dir):
            assert any(process.poll() is None for process in started), said(0)
            assert sum("step " in said(number) for number in range(20)) <= 1, "two runs write there"
            time.sleep(0.05)
        [runs] = [number for number, process in enumerate(started) if process.poll() is None]
        for number in set(range(20)) - {runs}:
            assert started[number].returncode == ExitStatus.USAGE, said(number)
            assert f"process {started[runs].pid} on " in said(number) or "it has not said which yet" in said(number)
        started[runs].kill()
        started[runs].wait()
        last = list(positions(config.output_dir).values())[-1].step
        started.append(start(20, "--resume-from", "latest", "--max-steps", str(last + 2)))
        assert started[-1].wait(300) == 0, said(20)
    finally:
        for process in started:
            process.kill()
            process.wait()
    events = (config.output_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event["step"] for event in map(json.loads, events) if event["event"] == "StepDone"]
    assert steps[-1] == last + 2
    assert len(steps) == len(set(steps)), "two runs wrote there"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"), one_writer(tmp_path / "file" / "run"):
        pass


def test_the_refusal_does_not_wait_and_says_what_it_can(tmp_path):
    process = holding(tmp_path / "run")
    try:
        for content, told in (
            (b"caf\xe9 \xff", "caf"),
            (None, "it has not said which yet"),
            (b"", "not said which yet"),
        ):
            if content is None:
                (tmp_path / "run" / ".lock-holder").unlink()
            else:
                (tmp_path / "run" / ".lock-holder").write_bytes(content)
            began = time.monotonic()
            with pytest.raises(UserError, match=told), one_writer(tmp_path / "run"):
                pass
            assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait()


def test_where_the_file_system_has_no_locks_a_file_does(tmp_path, monkeypatch):
    def unsupported(_path):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(files, "FileLock", unsupported)
    with one_writer(tmp_path / "run"):
        began = time.monotonic()
        with pytest.raises(UserError, match=f"process {os.getpid()} on "), one_writer(tmp_path / "run"):
            pass
        assert time.monotonic() - began < 5
    with one_writer(tmp_path / "run"):
        pass


def test_text_is_utf_8_with_unix_line_ends_on_every_system(tmp_path, monkeypatch):
    said = {}
    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text, **how: said.update(how) or original(path, text, **how))
    write_text(tmp_path / "a", "é\n")
    assert said == {"encoding": "utf-8", "newline": "\n"}
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"


def test_names_that_come_out_alike_are_kept_apart_by_what_they_were():
    names = [portable(name) for name in ("what?", "what*", "what:", "what_")]
    assert len(set(names)) == 4
    assert names[3] == "what_"
    assert {name.split("~")[0] for name in names} == {"what_"}
    assert portable("what?") == names[0]
