"""A run that is asked to stop from outside saves what it has done, whoever sends the signal and whenever it comes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidestep.cli.main import guarded, main, open_terminal
from sidestep.errors import ExitStatus
from sidestep.settings.option import as_arguments
from sidestep.stopping import ANSWER, StopRequest
from sidestep.tasks.train import checkpoints, evaluation, loop, previews
from sidestep.tasks.train.checkpoints import positions
from tests.pseudo_terminal import Session
from tests.training_world import settings, write_data

ROOT = Path(__file__).parents[1]
UV = shutil.which("uv")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and process groups")


@pytest.fixture
def config(tmp_path):
    return settings(write_data(tmp_path / "data"), tmp_path / "run", epochs=5000, save_every=5000, log_every=1)


@pytest.mark.slow
@pytest.mark.skipif(not UV, reason="needs uv")
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 4), (signal.SIGHUP, 1), (signal.SIGINT, 1)])
def test_a_signal_to_the_group_of_a_real_uv_run_saves_once(config, number, times):
    """As `timeout` and a closed terminal send it: the whole group gets it, and uv forwards it a second time."""
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [UV, "run", "--no-sync", "train.py", "--plain", "fixed", *as_arguments(config)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step "):
                break
        for _ in range(times):
            os.killpg(process.pid, number)
            time.sleep(0.05)
        rest, _ = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    saved = positions(config.output_dir)
    assert len(saved) == 1, said + rest
    assert rest.count(ANSWER) == 1
    assert "Saving optimizer step" in rest
    assert "--resume-from latest" in rest
    assert process.returncode == ExitStatus.INTERRUPTED


@pytest.mark.slow
@pytest.mark.skipif(not UV, reason="needs uv")
@pytest.mark.parametrize("moment", ["a step", "the compilation"])
def test_ctrl_c_typed_into_a_terminal_under_a_real_uv_run_saves_once(config, tmp_path, moment):
    """The terminal signals its whole group: uv, the program, and the compiler that it waits for."""
    is_compiling, compiler = tmp_path / "is compiling", tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\n[ -e "{is_compiling}" ] && exit 1\n'
        f'touch "{is_compiling}"\nexec sleep 600\n',
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    environment = {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    config = replace(config, compile="on" if moment == "the compilation" else "off")
    words = ("--plain", "fixed", *as_arguments(config))
    uv = (UV, "run", "--no-sync", "--project", str(ROOT))
    with Session(tmp_path, *words, launcher=uv, columns=200, **environment) as session:
        while not is_compiling.exists() if config.compile == "on" else "step 3" not in "\n".join(session.lines()):
            assert session.read()
        assert not positions(config.output_dir)
        session.keys("ctrl-c")
        assert session.end(seconds=300) == ExitStatus.INTERRUPTED
    said = "".join(session.lines()).replace(" ", "")  # lines are broken anywhere
    assert said.count("Askedtostop") == 1
    assert "Quittingwithoutsaving" not in said
    assert "--resume-fromlatest" in said
    [saved] = positions(config.output_dir).values()
    assert saved.step >= (0 if config.compile == "on" else 3)


def test_a_compiler_that_ctrl_c_ended_costs_no_finished_step(config, monkeypatch, capsys):
    original, left = loop.optimizer_step, iter((0, 0, 1))

    def compiling(*arguments):
        if next(left):  # a batch of another shape
            os.kill(os.getpid(), signal.SIGINT)
            raise torch._dynamo.exc.BackendCompilerFailed(compiling, RuntimeError("g++ was killed"), None)
        return original(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", compiling)
    assert main(["--plain", "fixed", *as_arguments(config)]) == ExitStatus.INTERRUPTED
    assert "--resume-from latest" in capsys.readouterr().err
    assert [at.step for at in positions(config.output_dir).values()] == [2]


HELD = """
import sys, time
from sidestep.cli.start import entry
from sidestep.tasks.train import setup

def held(*_, **__):
    print("held", flush=True)
    time.sleep(280)

setattr(setup, sys.argv[1], held)
sys.argv[:2] = ["train.py"]
entry()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.py"], ""),
        (["train.py"], "Loading PyTorch."),
        (["-c", HELD, "open_accelerator"], "held"),
        (["-c", HELD, "set_up"], "held"),
    ],
    ids=["nothing is loaded", "libraries", "the device", "the model"],
)
def test_a_signal_while_the_program_is_still_loading_leaves_nothing_behind(config, words, line):
    process = subprocess.Popen(
        [sys.executable, "-u", *words, "--plain", "fixed", *as_arguments(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = [] if line else [""]
    while not said or line not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], said
    process.send_signal(signal.SIGTERM)
    said.append(process.communicate(timeout=280)[0])
    assert process.returncode in (ExitStatus.INTERRUPTED, -signal.SIGTERM), said
    assert "Traceback" not in "".join(said)
    assert not positions(config.output_dir)
    assert not (config.output_dir / "final").exists()


MOMENTS = {
    "validation": (evaluation, "grid_loss"),
    "preview": (previews, "write_take"),
    "save": (checkpoints, "write_checkpoint"),  # in the thread that writes, while training goes on
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [("validation", signal.SIGINT), ("save", signal.SIGTERM), ("save", signal.SIGINT), ("preview", signal.SIGTERM)],
)
def test_a_signal_at_any_moment_of_a_run_saves_every_step_that_was_done(config, monkeypatch, capsys, moment, number):
    where, name = MOMENTS[moment]
    original, sent = getattr(where, name), []

    def interrupted(*arguments, **named):
        if not sent:
            sent.append(os.kill(os.getpid(), number))
        return original(*arguments, **named)

    monkeypatch.setattr(where, name, interrupted)
    config = replace(config, val_split=0.2, epochs=60, save_every=1, keep_checkpoints=0, preview_duration=5.0)
    config = replace(config, preview_every=1, preview_prompt="x") if moment == "preview" else config
    assert main(["--plain", "fixed", *as_arguments(config)]) == ExitStatus.INTERRUPTED
    assert sent
    said = capsys.readouterr()
    assert said.out.count(ANSWER) == 1
    assert "--resume-from latest" in said.err
    lines = (config.output_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    done = [event["step"] for event in map(json.loads, lines) if event["event"] == "StepDone"]
    assert [at.step for at in positions(config.output_dir).values()][-1] == done[-1] < 120


@pytest.mark.parametrize("scores", [False, True], ids=["alone", "before --score"])
@pytest.mark.parametrize("moment", ["the last step", "the last files"])
def test_a_stop_when_all_is_trained_writes_every_result_and_begins_nothing_more(
    config, monkeypatch, capsys, moment, scores
):
    """What follows, previews and the judging, takes minutes; who sent SIGTERM may soon send SIGKILL."""
    step, write = loop.optimizer_step, checkpoints.save_adapter

    def last_step(run, plan, metrics):
        step(run, plan, metrics)
        if moment == "the last step" and run.position.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def last_files(run, name, *note):
        write(run, name, *note)
        if moment == "the last files" and name == "final":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "optimizer_step", last_step)
    monkeypatch.setattr(checkpoints, "save_adapter", last_files)
    monkeypatch.setattr(StopRequest, "obeyed_at", float("-inf"))
    config = replace(config, epochs=1, ema_decay=0.9, preview_prompt="x", preview_duration=1.0, score=scores)
    status = main(["--plain", "fixed", *as_arguments(config)])
    said = capsys.readouterr()
    assert [at.step for at in positions(config.output_dir).values()] == [3]
    for name in ("final", "ema"):
        assert (config.output_dir / name / "adapter_model.safetensors").is_file()
    assert not list(config.output_dir.glob(".saving-*"))
    assert not list(config.output_dir.rglob("*.flac"))
    assert said.out.count("The last previews are left out, since the run was asked to stop.") == 1
    assert "Trained 3 optimizer steps." in said.out
    assert status == (ExitStatus.INTERRUPTED if scores else ExitStatus.OK)
    assert ("Go on with:\n" in said.err and "score" in said.err) == scores
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher sends it again: what was obeyed is no second one


def test_an_import_that_a_signal_breaks_off_is_a_stop_and_no_unexpected_error(config, monkeypatch, capsys):
    """diffusers' lazy modules answered with a RecursionError."""

    def job(_config, _report) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            pass
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(StopRequest, "obeyed_at", float("-inf"))
    monkeypatch.setattr("sidestep.cli.commands.train", job)
    assert main(["--plain", "fixed", *as_arguments(config)]) == ExitStatus.INTERRUPTED
    assert capsys.readouterr().err == "Stopped.\n"


def test_a_stop_whose_save_fails_does_not_say_that_all_is_saved(config, monkeypatch, capsys):
    def full(*_arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    config = replace(config, epochs=60, save_every=1)
    assert main(["--plain", "fixed", *as_arguments(config)]) == ExitStatus.FAILED
    said = capsys.readouterr().err
    assert "the disk is full. Nothing had been saved before." in said
    assert "Stopped; saved." not in said


def test_a_stop_of_before_does_not_hide_a_later_error(config, monkeypatch, capsys):
    """In the wizard several jobs run one after the other, for hours."""

    def stopped() -> int:
        raise KeyboardInterrupt

    def several() -> int:
        monkeypatch.setattr(StopRequest, "raised_at", time.monotonic())
        assert guarded(terminal, lambda: None, stopped) == ExitStatus.INTERRUPTED
        raise RecursionError("a fault of ours")

    terminal = open_terminal(plain=True)
    assert guarded(terminal, lambda: config.output_dir.parent, several) == ExitStatus.FAILED
    assert "a fault of ours" in capsys.readouterr().err
