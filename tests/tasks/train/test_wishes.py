"""What a person asks of a training between two steps: it is done at once, and training goes on as if nobody had."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.errors import Interrupted, JobError
from sidestep.events import Notice, Progress, Saved, StepDone, TrainingStarted
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.stopping import PREVIEW, SAVE, StopRequest
from sidestep.tasks.train.previews import preview_now
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.setup import train
from tests.training_world import Log, adapter, differing, prepared, run, settings, write_data


def wishing(wishes: dict[int, list[str]]):
    """A report that asks for these after the optimizer steps of these numbers, as keys would."""

    def act(event) -> None:
        if isinstance(event, StepDone):
            for what in wishes.get(event.step, ()):
                assert StopRequest.current
                StopRequest.current.ask(what)

    return act


@pytest.mark.slow
def test_previews_and_saves_that_were_asked_for_are_made_and_change_no_weight(tmp_path):
    data = write_data(tmp_path / "data")
    changes = {"dropout": 0.1, "preview_duration": 1.0, "val_split": 0.2, "ema_decay": 0.9}
    run(settings(data, tmp_path / "straight", **changes))
    log = run(settings(data, tmp_path / "asked", **changes), wishing({1: [SAVE], 2: [PREVIEW], 3: [SAVE, PREVIEW]}))
    for kept in ("final", "ema"):
        assert not list(differing(adapter(tmp_path / "straight" / kept), adapter(tmp_path / "asked" / kept)))
    assert {path.name for path in (tmp_path / "asked" / "checkpoints").iterdir()} >= {"step_000001", "step_000003"}
    made = [event.path for event in log.of(Saved) if event.what == "previews"]
    assert len(made) == 2
    assert list((tmp_path / "asked" / "previews").rglob("*.flac"))
    assert not (tmp_path / "straight" / "previews").exists()
    assert log.of(TrainingStarted)[0].total_steps == log.of(StepDone)[-1].total_steps


def test_a_checkpoint_that_was_asked_for_goes_on_bit_for_bit(tmp_path):
    config = settings(write_data(tmp_path / "data"), tmp_path / "run")
    run(config, wishing({2: [SAVE]}))
    whole = adapter(tmp_path / "run" / "final")
    for later in (tmp_path / "run" / "final", *complete_checkpoints(tmp_path / "run")[1:]):
        shutil.rmtree(later)
    run(replace(config, resume_from=Path("latest")))
    assert not list(differing(whole, adapter(tmp_path / "run" / "final")))


@pytest.mark.parametrize("reason", [OSError("the disk is full"), JobError("the disk is full", "Free some space.")])
def test_a_preview_that_cannot_be_made_costs_only_itself(tmp_path, monkeypatch, reason):
    def fail(*_arguments):
        raise reason

    monkeypatch.setattr("sidestep.tasks.train.previews.encode_texts", fail)
    log = run(settings(write_data(tmp_path / "data"), tmp_path / "run"), wishing({1: [PREVIEW]}))
    warnings = [event.message for event in log.of(Notice) if event.level == "warning"]
    assert "No previews: the disk is full" in warnings
    assert (tmp_path / "run" / "final").is_dir()


def test_q_saves_and_stops_as_a_signal_does(tmp_path):
    def act(event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            assert StopRequest.current
            StopRequest.current.stop()

    with pytest.raises(Interrupted) as stopped:
        train(settings(write_data(tmp_path / "data"), tmp_path / "run"), Log(act))
    assert "--resume-from latest" in stopped.value.resume
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]


def test_a_stop_during_previews_leaves_out_the_others_and_trains_no_step_more(tmp_path):
    def act(event) -> None:
        job = StopRequest.current
        if job and isinstance(event, StepDone) and event.step == 1:
            job.ask(PREVIEW)
        if job and isinstance(event, Progress) and event.task == "Previews" and event.done == 1:
            job.stop()

    log, folder = Log(act), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(settings(write_data(tmp_path / "data"), folder, preview_duration=1.0), log)
    assert [event.step for event in log.of(StepDone)] == [1]
    assert [path.name for path in complete_checkpoints(folder)] == ["step_000001"]
    assert len(list((folder / "previews").rglob("*.flac"))) == 2  # the one under way is finished
    assert "2 previews left out, since the run was asked to stop." in log.text
    assert "previews" not in {event.what for event in log.of(Saved)}, "of the adapter none was made"


def test_a_stop_before_previews_that_were_asked_for_makes_none(tmp_path, monkeypatch):
    made: list[object] = []
    monkeypatch.setattr("sidestep.tasks.train.loop.preview_now", made.append)

    def act(event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            assert StopRequest.current
            StopRequest.current.ask(PREVIEW)
            StopRequest.current.stop()

    with pytest.raises(Interrupted):
        train(settings(write_data(tmp_path / "data"), tmp_path / "run", preview_duration=1.0), Log(act))
    assert made == []


def test_previews_that_one_process_cannot_prepare_are_made_by_none(tmp_path, monkeypatch):
    """Or the others wait for it where it never comes."""
    made, log = prepared(settings(write_data(tmp_path / "data"), tmp_path / "run")), Log()
    made.report = log
    monkeypatch.setattr(Processes, "any", lambda _, *flags: [True for _ in flags])
    preview_now(made)
    assert made.asked_previews is None
    assert [event.message for event in log.of(Notice)] == ["No previews: another process could not prepare them"]


def test_only_the_process_that_plays_loads_what_it_takes(tmp_path, monkeypatch):
    made, loaded = prepared(settings(write_data(tmp_path / "data"), tmp_path / "run")), []
    monkeypatch.setattr("sidestep.tasks.train.previews.players_for", lambda *_: loaded.append(1) or [])
    for index in (1, 0):
        made.processes.index, made.asked_previews = index, None
        preview_now(made)
        assert len(loaded) == (index == 0)
