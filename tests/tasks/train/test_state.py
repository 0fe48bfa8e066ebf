"""Folders of results are whole or absent, whenever the process that writes them dies."""

import json
import random
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from sidestep.errors import JobError, UserError
from sidestep.events import Saved
from sidestep.settings.path_checks import POSITION, complete_checkpoints, find_checkpoint, require_checkpoint
from sidestep.tasks.train import checkpoints
from sidestep.tasks.train.checkpoints import (
    COMPLETE_FILE,
    NEW,
    OLD,
    STATE_FILE,
    positions,
    prepare_folder,
    prune,
    read_checkpoint,
    restore,
    resume_command,
    save_adapter,
    save_checkpoint,
    snapshot,
    write_checkpoint,
    write_folder,
)
from sidestep.tasks.train.run import BackgroundWriter, History, Position
from tests.training_world import Log, prepared, run, settings, write_data


def write(folder: Path, step: int) -> Path:
    write_checkpoint(
        folder,
        {"adapter": {"w": torch.full((3,), float(step))}},
        Position(0, step, step),
        lambda new: (new / "README.md").write_text("x"),
    )
    return folder


@pytest.fixture
def run_folder(tmp_path) -> Path:
    for step in (2, 10, 4):
        write(tmp_path / "checkpoints" / f"step_{step}", step)
    return tmp_path


def test_a_checkpoint_comes_back_as_it_was_written(run_folder):
    state, position = read_checkpoint(run_folder / "checkpoints" / "step_4")
    assert position == Position(0, 4, 4)
    assert torch.equal(state["adapter"]["w"], torch.full((3,), 4.0))


def test_the_latest_is_the_one_with_most_steps_whatever_its_name(run_folder):
    assert find_checkpoint(Path("latest"), run_folder).name == "step_10"


DAMAGE = {
    "no last file": lambda folder: (folder / COMPLETE_FILE).unlink(),
    "a cut last file": lambda folder: (folder / COMPLETE_FILE).write_text('{"position": {'),
    "a last file of something else": lambda folder: (folder / COMPLETE_FILE).write_text("[]"),
    "a missing file": lambda folder: (folder / STATE_FILE).unlink(),
    "a shorter file": lambda folder: (folder / STATE_FILE).write_bytes((folder / STATE_FILE).read_bytes()[:-1]),
    "a position that is none": lambda folder: (folder / COMPLETE_FILE).write_text(
        json.dumps({"position": {"nowhere": 1}, "files": {}})
    ),
    "a position of another version": lambda folder: (folder / COMPLETE_FILE).write_text(
        json.dumps({"position": asdict(Position(0, 10, 10)) | {"more": 1}, "files": {}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_none(run_folder, damage):
    newest = run_folder / "checkpoints" / "step_10"
    damage(newest)
    assert newest not in complete_checkpoints(run_folder)
    assert find_checkpoint(Path("latest"), run_folder).name == "step_4"
    assert newest not in positions(run_folder)
    with pytest.raises(UserError, match="not a whole checkpoint"):
        find_checkpoint(newest, run_folder)


def test_what_a_state_says_of_its_position_is_what_a_run_knows():
    assert asdict(Position()).keys() == POSITION


def test_what_a_broken_save_moved_aside_is_left_to_training(run_folder, tmp_path):
    states, latest = run_folder / "checkpoints", Path("latest")
    for state in (latest, states / "step_4"):
        require_checkpoint(state, run_folder)
    for state in (states / "step_5", states):
        with pytest.raises(UserError, match="not a whole checkpoint"):
            require_checkpoint(state, run_folder)
    (states / "step_2").rename(states / f"{OLD}step_5")
    require_checkpoint(states / "step_5", run_folder)
    with pytest.raises(UserError, match="not a whole checkpoint"):  # nothing was broken off there
        require_checkpoint(tmp_path / "other" / "step_5", run_folder)
    for name in ("step_4", "step_10"):
        shutil.rmtree(states / name)
    require_checkpoint(latest, run_folder)
    prepare_folder(run_folder)
    assert find_checkpoint(latest, run_folder) == states / "step_5"
    shutil.rmtree(states / "step_5")
    with pytest.raises(UserError, match="--resume-from latest: no whole checkpoint in .*checkpoints."):
        require_checkpoint(latest, run_folder)


def test_a_state_of_the_right_size_with_wrong_bytes_is_told(run_folder):
    state = run_folder / "checkpoints" / "step_10" / STATE_FILE
    state.write_bytes(b"\0" * state.stat().st_size)
    with pytest.raises(JobError, match="not readable"):
        read_checkpoint(state.parent)


class Dies(BaseException):
    """As SIGKILL, but that the test lives on."""


@pytest.mark.parametrize("at", ["fill", "first rename", "second rename"])
def test_dying_while_a_folder_is_replaced_leaves_the_old_or_the_new(tmp_path, monkeypatch, at):
    best = tmp_path / "best"
    write_folder(best, lambda new: (new / "a").write_text("old"))
    calls = []
    rename = Path.replace

    def dying_rename(self, target):
        calls.append(self)
        if (at, len(calls)) in (("first rename", 1), ("second rename", 2)):
            raise Dies
        return rename(self, target)

    def fill(new: Path) -> None:
        (new / "a").write_text("new")
        if at == "fill":
            raise Dies

    monkeypatch.setattr(Path, "replace", dying_rename)
    monkeypatch.setattr("sidestep.files._exchange", lambda *_paths: False)  # as on Windows
    monkeypatch.setattr(
        "sidestep.tasks.train.checkpoints.shutil.rmtree", lambda *a, **k: None
    )  # a dead process clears nothing up
    with pytest.raises(Dies):
        write_folder(best, fill)
    monkeypatch.undo()
    restore(tmp_path)
    assert (best / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_leftovers_of_dead_processes_are_removed_and_results_kept(run_folder):
    checkpoints = run_folder / "checkpoints"
    (checkpoints / f"{NEW}step_12").mkdir()
    (checkpoints / f"{OLD}step_4").mkdir()  # replaced well, not yet deleted
    restore(checkpoints)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_10", "step_2", "step_4"]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(0, None, [2, 4, 10]), (2, None, [4, 10]), (1, 2, [2, 10]), (1, None, [10])]
)
def test_pruning_keeps_the_newest_and_the_best(run_folder, keep, best, left):
    prune(run_folder, keep, best)
    assert [read_checkpoint(p)[1].step for p in complete_checkpoints(run_folder)] == left


def test_a_failed_write_keeps_the_old_one_and_leaves_nothing_behind(run_folder):
    def fails(new: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_checkpoint(run_folder / "checkpoints" / "step_10", {}, Position(), fails)
    assert len(complete_checkpoints(run_folder)) == 3
    assert len(list((run_folder / "checkpoints").iterdir())) == 3


def test_a_snapshot_does_not_follow_what_training_does_next():
    weights = torch.zeros(3)
    kept = snapshot({"a": [weights, {"b": weights}], "c": 1})
    weights += 1
    assert not kept["a"][0].any()
    assert not kept["a"][1]["b"].any()


def test_what_a_background_write_tells_comes_out_where_it_is_waited_for():
    log = Log()
    writer = BackgroundWriter(log)
    writer.start("checkpoint", lambda: [Saved(what="checkpoint", path="x")])
    writer.wait()
    writer.wait()
    assert len(log.of(Saved)) == 1  # told once


def test_a_save_that_failed_is_told_at_once_and_tried_again_at_the_next_one():
    log, tries = Log(), []
    writer = BackgroundWriter(log)

    def save(name, fails=0):
        def write():
            tries.append(name)
            if tries.count(name) <= fails:
                raise OSError(28, "No space left on device", name)
            return [Saved(what=name, path=name)]

        return write

    writer.start("best", save("best", fails=2))
    while not log.events:
        writer.poll()
    assert [(event.level, "best: not saved" in event.message) for event in log.events] == [("error", True)]
    writer.start("checkpoint", save("step 1", fails=9))
    writer.start("checkpoint", save("step 2"))  # takes the place of step 1, which nobody needs any more
    writer.finish()
    assert tries == ["best", "best", "step 1", "best", "step 2"]
    assert [event.what for event in log.of(Saved)] == ["best", "step 2"]


def test_a_save_that_fails_to_the_end_is_tried_once_more_and_raised():
    tries = []
    writer = BackgroundWriter(Log())

    def fails():
        tries.append(1)
        raise OSError(28, "No space left on device")

    writer.start("checkpoint", fails)
    with pytest.raises(OSError):
        writer.finish()
    assert len(tries) == 2


@pytest.mark.parametrize("save", [lambda run: save_checkpoint(run, "epoch_0001"), lambda run: save_adapter(run, "x")])
def test_nothing_is_copied_while_the_copy_before_it_is_still_written(tmp_path, monkeypatch, save):
    going = prepared(settings(write_data(tmp_path / "data"), tmp_path / "run"))
    slow, order = threading.Event(), []
    going.writer.start("before", lambda: [slow.wait(60), order.append("written")][:0])
    monkeypatch.setattr(checkpoints, "snapshot", lambda value: order.append("copied") or snapshot(value))
    threading.Timer(0.3, slow.set).start()
    save(going)
    going.writer.finish()
    assert order[:2] == ["written", "copied"]


def test_a_mistake_of_the_program_in_a_background_write_is_no_failed_save():
    writer = BackgroundWriter(Log())
    writer.start("checkpoint", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_a_history_comes_back_from_plain_values():
    history = History()
    history.add_sample(0.5, 0.99)
    history.close_epoch()
    assert history.update_best(0.5, 1, 1, "validation loss")
    assert not history.update_best(float("nan"), 2, 2, "validation loss")
    assert History.from_values(json.loads(json.dumps(asdict(history)))) == history


@pytest.mark.parametrize(
    ("program", "environment", "begin"),
    [
        (("uv", "run", "train.py"), {}, "uv run train.py fixed --checkpoint-dir"),
        (("side-step",), {}, "side-step fixed --checkpoint-dir"),
        (("uv", "run", "train.py"), {"LOCAL_WORLD_SIZE": "2"}, "uv run torchrun --nproc-per-node 2 train.py fixed "),
        (("side-step",), {"LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 -m sidestep.cli fixed "),
        (
            ("side-step",),
            {"LOCAL_WORLD_SIZE": "4", "ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate launch -m sidestep.cli fixed ",
        ),
    ],
)
def test_a_run_is_resumed_by_the_launcher_that_started_it(monkeypatch, tmp_path, program, environment, begin):
    monkeypatch.setattr("sidestep.words.PROGRAM", program)
    monkeypatch.setattr("sidestep.tasks.train.checkpoints.PROGRAM", program)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = resume_command(settings(tmp_path / "data", tmp_path / "run"))
    assert command.startswith(begin)
    assert "--resume-from latest" in command


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_refused_or_passed_over(tmp_path):
    config = settings(write_data(tmp_path / "data"), tmp_path / "run", epochs=1)
    run(config)
    (folder,) = complete_checkpoints(config.output_dir)
    draw = random.Random(3)
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        original = path.read_bytes()
        for _ in range(6):
            damaged = bytearray(original)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            if complete_checkpoints(config.output_dir):
                with pytest.raises(JobError, match="not readable"):
                    read_checkpoint(folder)
        path.write_bytes(original)
    read_checkpoint(folder)


def test_a_checkpoint_of_an_older_version_has_no_digests_and_is_read(tmp_path):
    config = settings(write_data(tmp_path / "data"), tmp_path / "run", epochs=1)
    run(config)
    (folder,) = complete_checkpoints(config.output_dir)
    metadata = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
    del metadata["digests"], metadata["seal"]
    (folder / COMPLETE_FILE).write_text(json.dumps(metadata), encoding="utf-8")
    assert read_checkpoint(folder)[1].epoch == 1
