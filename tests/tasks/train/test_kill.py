"""SIGKILL at any moment never leaves a run that cannot go on, nor takes more than what came after the last save."""

import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.errors import ExitStatus
from sidestep.events import StepDone
from sidestep.settings.option import as_arguments
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.tasks.train import checkpoints as state
from sidestep.tasks.train.checkpoints import positions
from sidestep.tasks.train.setup import train
from tests.training_world import adapter, differing, run, settings, write_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks, so that torch is imported once"),
]
ROOT = Path(__file__).parents[3]
LATEST = Path("latest")
SAVE_EVERY = 2  # epochs of 3 optimizer steps
if sys.platform != "win32":  # forked from a process that never computed: torch cannot go on in a fork of one that did
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def trained(config, steps: Path, dying_at: str = "") -> None:
    """Train, and note each optimizer step in a file.

    dying_at: a moment of a save at which this process kills itself.
    """

    def note(event) -> None:
        if isinstance(event, StepDone):
            with steps.open("a", encoding="utf-8") as f:
                f.write(f"{event.step}\n")

    if dying_at:
        die_in_a_save(dying_at)
    train(config, note)  # what it raises, multiprocessing writes to stderr


def trained_in_a_child(config, steps: Path, dying_at: str = ""):
    process = processes.Process(target=trained, args=(config, steps, dying_at), daemon=True)
    process.start()
    return process


def die_in_a_save(moment: str) -> None:
    """Let this process kill itself in its next save.

    Before a file, within the state, before or after the rename that makes it a checkpoint.
    """
    me = os.getpid()

    def die(*_args, **_kwargs) -> None:
        os.kill(me, signal.SIGKILL)

    original_save, original_rename = state.torch.save, state.put_in_place

    def half_a_save(content, f) -> None:
        original_save(content, f)
        f.flush()
        f.truncate(f.tell() // 2)
        die()

    def rename_then_die(new, folder):
        original_rename(new, folder)
        die()

    if moment == "before the state":
        state.torch.save = die
    elif moment == "within the state":
        state.torch.save = half_a_save
    elif moment == "before the last file":
        state.write_text = die
    elif moment == "before the rename":
        state.put_in_place = die
    elif moment == "after the rename":
        state.put_in_place = rename_then_die
    elif moment == "before old ones are deleted":
        state.shutil.rmtree = die


def wait(process) -> int:
    process.join()
    return process.exitcode


def steps_done(path: Path) -> int:
    return max(map(int, path.read_text(encoding="utf-8").split()), default=0) if path.exists() else 0


def last_saved(output: Path) -> int:
    return max((at.step for at in positions(output).values()), default=0)


def with_resume(config):
    return replace(config, resume_from=LATEST if complete_checkpoints(config.output_dir) else None)


def test_twenty_kills_at_random_moments_lose_nothing_that_was_saved(data, tmp_path):
    shared = {
        "epochs": 16,
        "save_every": SAVE_EVERY,
        "keep_checkpoints": 2,
        "ema_decay": 0.9,
        "val_split": 0.2,
    }  # 32 steps
    straight = settings(data, tmp_path / "straight", **shared)
    run(straight)
    moments = random.Random(4)
    kills = 0
    for attempt in range(10):
        config = settings(data, tmp_path / f"killed {attempt}", **shared)
        log = tmp_path / f"steps {attempt}"
        for _ in range(2):
            before = steps_done(log)
            process = trained_in_a_child(with_resume(config), log)
            at = before + moments.randint(1, 12)
            while steps_done(log) < at and process.is_alive():
                time.sleep(0.001)
            time.sleep(moments.random() * 0.05)
            process.kill()
            if wait(process) != -signal.SIGKILL:
                continue  # it had come to its end
            kills += 1
            assert (
                steps_done(log) - last_saved(config.output_dir) < SAVE_EVERY * 2 + 4
            )  # two epochs, and a save that was under way
        if attempt < 3 or attempt == 9:
            assert wait(trained_in_a_child(with_resume(config), log)) == 0
            for folder in ("final", "ema"):
                assert not list(differing(adapter(straight.output_dir / folder), adapter(config.output_dir / folder)))
        elif complete_checkpoints(config.output_dir):
            state.read_checkpoint(complete_checkpoints(config.output_dir)[-1])
    assert kills >= 18


MOMENTS = (
    "before the state",
    "within the state",
    "before the last file",
    "before the rename",
    "after the rename",
    "before old ones are deleted",
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_dying_inside_a_save_leaves_the_checkpoint_before_or_the_new_one(data, tmp_path, moment):
    shared = {"epochs": 4, "save_every": 1, "keep_checkpoints": 1, "save_best": False}
    straight = settings(data, tmp_path / "straight", **shared)
    run(straight)
    config = settings(data, tmp_path / "killed", **shared)
    run(replace(config, epochs=1, scheduler_type="constant"))  # something stands
    first = last_saved(config.output_dir)
    log = tmp_path / "steps"
    status = wait(trained_in_a_child(replace(config, resume_from=LATEST), log, dying_at=moment))
    assert status == -signal.SIGKILL
    assert last_saved(config.output_dir) >= first
    assert wait(trained_in_a_child(replace(config, resume_from=LATEST), log)) == 0
    assert [p.name for p in (config.output_dir / "checkpoints").iterdir()] == ["epoch_0004"]


def test_the_command_ends_with_130_after_ctrl_c_and_its_own_words_resume_it(data, tmp_path):
    shared = {"epochs": 40, "save_every": 40, "log_every": 1}
    straight = settings(data, tmp_path / "straight", **shared)
    run(straight)
    config = settings(data, tmp_path / "stopped", **shared)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "train.py", "--plain", "fixed", *as_arguments(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=280)
    assert process.returncode == ExitStatus.INTERRUPTED, err
    command = next(line.strip() for line in (out + err).splitlines() if "--resume-from latest" in line)
    words = shlex.split(command.split("train.py ", 1)[1])
    done = subprocess.run(
        [sys.executable, "train.py", "--plain", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(differing(adapter(straight.output_dir / "final"), adapter(config.output_dir / "final")))
