"""A run that was stopped goes on as if it had not been."""

import json
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sidestep.cli.parser import parse
from sidestep.data.records import save_record
from sidestep.errors import Interrupted, JobError, UserError
from sidestep.events import EpochDone, StepDone
from sidestep.settings.config import TrainConfig
from sidestep.settings.option import resolve
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.stopping import SAVE, StopRequest
from sidestep.tasks.train import checkpoints, songs
from sidestep.tasks.train.checkpoints import read_checkpoint, what_stands, write_settings
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.run import BackgroundWriter
from sidestep.tasks.train.setup import set_up, train
from tests.training_world import LYRICS, Log, adapter, differing, prepared, record, run, settings, write_data

LATEST = Path("latest")


def stop_at(step: int):
    """A report that presses Ctrl-C when this optimizer step was done."""

    def act(event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            signal.raise_signal(signal.SIGINT)

    return act


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data"))
    save_record(folder / "sung.pt", record(9, 80, lyrics=LYRICS, repeat=2))
    return folder


CASES = {
    "lora, chunks, ema, validation": {"chunk_duration": 1.0, "ema_decay": 0.9, "val_split": 0.2},
    "lokr, chunks, ema": {"adapter_type": "lokr", "chunk_duration": 1.0, "ema_decay": 0.9},
    "dora": {"adapter_type": "dora"},
    "loha": {"adapter_type": "loha"},
    "oft": {"adapter_type": "oft"},
    "batches of two, min_snr, cfg dropout, linear": {
        "batch_size": 2,
        "loss_weighting": "min_snr",
        "cfg_ratio": 0.5,
        "scheduler_type": "linear",
    },
    "adafactor, recomputation": {"optimizer_type": "adafactor", "gradient_checkpointing": True},
    "prodigy": {"optimizer_type": "prodigy", "lr": 1.0},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_straight_equals_stopped_and_resumed_bit_for_bit(data, tmp_path, changes):
    straight = run(settings(data, tmp_path / "straight", **changes))
    stopped = settings(data, tmp_path / "stopped", **changes)
    for step in (1, 4):  # in the first epoch, and at the short step that ends it (or near it)
        with pytest.raises(Interrupted):
            run(replace(stopped, resume_from=LATEST if step > 1 else None), stop_at(step))
    resumed = run(replace(stopped, resume_from=LATEST))
    folders = ["final", "ema"] if "ema_decay" in changes else ["final"]
    for folder in folders:
        assert not list(differing(adapter(tmp_path / "straight" / folder), adapter(tmp_path / "stopped" / folder)))
    last = {event.step: event.loss for event in resumed.of(StepDone)}
    assert last == {event.step: event.loss for event in straight.of(StepDone) if event.step in last}
    (a, at), (b, bt) = (read_checkpoint(complete_checkpoints(tmp_path / name)[-1]) for name in ("straight", "stopped"))
    assert at == bt
    assert a["history"]["epoch_losses"] == b["history"]["epoch_losses"]
    assert a["history"]["evaluations"] == b["history"]["evaluations"]


def test_a_last_short_accumulation_window_is_a_step_of_its_own(data, tmp_path):
    log = run(settings(data, tmp_path, epochs=1, gradient_accumulation=4))  # 7 micro-batches
    assert [event.step for event in log.of(StepDone)] == [1, 2]


def test_ctrl_c_saves_and_prints_the_command_that_resumes(data, tmp_path):
    with pytest.raises(Interrupted) as stopped:
        run(settings(data, tmp_path / "a run"), stop_at(2))
    assert "train.py fixed" in stopped.value.resume
    assert "--resume-from latest" in stopped.value.resume
    assert [p.name for p in complete_checkpoints(tmp_path / "a run")] == ["step_000002"]


@pytest.mark.parametrize("asked_twice", [False, True], ids=["between steps", "after a save that was wanted"])
def test_a_stop_that_arrives_while_the_processes_answer_each_other_is_heard(data, tmp_path, monkeypatch, asked_twice):
    answers, signals = Processes.any, []

    def any_of(processes: Processes, *flags: bool) -> list[bool]:
        known = answers(processes, *flags)  # of before the signal
        if StopRequest.current and not signals and len(flags) == (1 if asked_twice else 3):
            signals.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return known

    def wish(event) -> None:
        if asked_twice and StopRequest.current and isinstance(event, StepDone) and event.step == 1:
            StopRequest.current.ask(SAVE)

    monkeypatch.setattr(Processes, "any", any_of)
    with pytest.raises(Interrupted):
        run(settings(data, tmp_path), wish)
    (saved,) = [p.name for p in complete_checkpoints(tmp_path) if p.name != "step_000001" or not asked_twice]
    assert saved == ("step_000002" if asked_twice else "step_000001"), "the step that was begun, and no further one"


def test_a_second_ctrl_c_after_the_grace_period_quits_at_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep.stopping.GRACE_SECONDS", -1.0)

    def twice(event) -> None:
        if isinstance(event, StepDone):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(settings(data, tmp_path), twice)
    assert not complete_checkpoints(tmp_path)


def test_a_stop_right_after_a_checkpoint_saves_no_second_one(data, tmp_path):
    def act(event) -> None:
        if isinstance(event, EpochDone) and event.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        run(settings(data, tmp_path, save_every=1), act)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["epoch_0001"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_that_died_between_its_last_files_writes_the_one_that_is_missing(data, tmp_path):
    config = settings(data, tmp_path, ema_decay=0.9)
    run(config)
    average = adapter(tmp_path / "ema")
    shutil.rmtree(tmp_path / "ema")
    run(replace(config, resume_from=LATEST))
    assert not list(differing(average, adapter(tmp_path / "ema")))
    with pytest.raises(JobError, match="Nothing was trained: all 8"):
        run(replace(config, resume_from=LATEST))


def test_a_final_adapter_that_another_process_has_just_written_is_not_one_of_before(data, tmp_path, monkeypatch):
    config = settings(data, tmp_path)
    run(config)
    (tmp_path / "final").rename(tmp_path / "written by the first process")

    def later(*arguments):
        made = set_up(*arguments)
        (tmp_path / "written by the first process").rename(tmp_path / "final")
        return made

    monkeypatch.setattr("sidestep.tasks.train.setup.set_up", later)
    assert run(replace(config, resume_from=LATEST)).events[-1].message.startswith("Trained 8 optimizer steps")


def test_processes_that_read_different_songs_are_refused_by_all(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda _, value: [value, {**value, "late.pt": {"audio": "1"}}])
    with pytest.raises(UserError, match=r"do not read the same songs \(1 song, such as late.pt\)"):
        run(settings(data, tmp_path))


def test_records_are_kept_in_a_share_of_the_memory_for_each_process(data, monkeypatch):
    budgets: list[int] = []
    monkeypatch.setattr(songs, "reader", budgets.append)
    monkeypatch.setattr(songs.psutil, "virtual_memory", lambda: SimpleNamespace(available=80))
    for processes in ("1", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        songs.songs_of(data, {})
    assert budgets == [80 // songs.MEMORY_SHARE, 80 // songs.MEMORY_SHARE // 8]


def test_all_processes_wait_for_a_save_before_they_put_the_next_one_together(data, tmp_path, monkeypatch):
    """What shards are gathered by waits ten minutes on a GPU, and a disk may be away for longer."""
    calls: list[str] = []
    monkeypatch.setattr(Processes, "wait", lambda _: calls.append("processes"))
    monkeypatch.setattr(BackgroundWriter, "wait", lambda _: calls.append("writer"))
    monkeypatch.setattr(checkpoints, "state_of", lambda _: calls.append("state"))
    monkeypatch.setattr(checkpoints, "adapter_snapshot", lambda _: calls.append("state"))
    made = prepared(settings(data, tmp_path))
    made.processes.index = 1
    checkpoints.save_checkpoint(made, "x")
    checkpoints.save_adapter(made, "final")
    assert calls == ["writer", "processes", "state"] * 2


def test_a_longer_run_rebuilds_its_schedule_and_says_so(data, tmp_path):
    first = settings(data, tmp_path, epochs=1)
    run(first)
    log = run(replace(first, epochs=3, resume_from=LATEST))
    assert "its schedule was rebuilt" in log.text
    straight = run(settings(data, tmp_path.with_name(tmp_path.name + "-straight"), epochs=3))
    rates = {event.step: event.lr for event in straight.of(StepDone)}
    assert all(event.lr == rates[event.step] for event in log.of(StepDone))


def test_a_finished_run_says_that_nothing_is_left(data, tmp_path):
    done = settings(data, tmp_path, epochs=1)
    run(done)
    with pytest.raises(JobError, match="Nothing was trained") as nothing:
        run(replace(done, resume_from=LATEST))
    assert "--epochs 2" in nothing.value.fix


def test_a_run_killed_before_final_was_written_writes_it_on_resume(data, tmp_path):
    done = settings(data, tmp_path, epochs=1)
    run(done)
    whole = adapter(tmp_path / "final")
    (tmp_path / "final").rename(tmp_path / ".saving-final")  # as SIGKILL leaves it
    run(replace(done, resume_from=LATEST))
    assert not list(differing(whole, adapter(tmp_path / "final")))
    assert not (tmp_path / ".saving-final").exists()


REFUSED = {
    "another rank": ({"rank": 8}, "--rank is 8, was 4"),
    "another kind": ({"adapter_type": "lokr"}, "--adapter-type is lokr, was lora"),
    "another seed": ({"seed": 7}, "--seed is 7, was 42"),
    "other targets": ({"attention_type": "self"}, "--attention-type is self, was both"),
    "another batch size": ({"batch_size": 2}, "--batch-size is 2, was 1"),
    "another accumulation": (
        {"gradient_accumulation": 4},
        "--gradient-accumulation times the number of processes is 4, was 2",
    ),
    "another optimizer": ({"optimizer_type": "adafactor"}, "--optimizer-type is adafactor, was adamw"),
    "another split": ({"val_split": 0.2}, "--val-split is 0.2, was 0.0"),
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    config = settings(data, tmp_path_factory.mktemp("finished") / "run", epochs=1)
    run(config)
    return config


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_may_not_change_is_refused_by_name(finished, changes, words):
    before = (finished.output_dir / "config.json").read_bytes()
    with pytest.raises(UserError) as refused:
        train(replace(finished, epochs=2, resume_from=LATEST, **changes), Log())
    assert words in refused.value.problem
    assert refused.value.status == 2
    assert (finished.output_dir / "config.json").read_bytes() == before


def test_what_may_change_is_noted(finished, tmp_path):
    log = run(
        replace(
            finished,
            epochs=2,
            lr=1e-3,
            dropout=0.0,
            output_dir=tmp_path,
            resume_from=complete_checkpoints(finished.output_dir)[-1],
        )
    )
    assert "Resumed with --lr 0.001, before 0.003" in log.text
    assert "Resumed with --dropout 0.0, before 0.1" in log.text


def test_another_run_in_the_folder_is_never_overwritten(finished):
    with pytest.raises(UserError, match="a run already stands there") as refused:
        train(replace(finished, lr=1e-3, epochs=9), Log())
    [command, own] = refused.value.fix.split("\n")
    assert command.startswith("It is finished; to train it further, raise --epochs in: ")
    assert own.endswith(f"--output-dir {finished.output_dir}-2")
    typed = parse(shlex.split(command.partition("in: ")[2])[3:]).typed  # uv run train.py
    assert resolve(TrainConfig, typed) == replace(finished, resume_from=LATEST)


def test_a_checkpoint_goes_on_in_a_folder_of_its_own_and_not_over_another_run(data, tmp_path):
    one, other = settings(data, tmp_path / "one", epochs=2, save_every=1), settings(data, tmp_path / "other", epochs=1)
    run(one)
    run(other)
    before = adapter(tmp_path / "other" / "final")
    with pytest.raises(UserError, match="already stands there"):
        train(
            replace(one, output_dir=tmp_path / "other", resume_from=complete_checkpoints(tmp_path / "one")[-1]), Log()
        )
    assert not list(differing(before, adapter(tmp_path / "other" / "final")))


@pytest.mark.parametrize("left", ["best", "marks/epoch_0001", "ema", "checkpoints/epoch_0001"])
def test_what_a_run_left_is_never_written_over_by_another(data, tmp_path, left):
    config = settings(data, tmp_path / "run")
    (config.output_dir / left).mkdir(parents=True)  # as of one that was killed, or is damaged
    write_settings(replace(config, seed=9))
    with pytest.raises(UserError, match=f"already stands there .{left}.") as refused:
        train(config, Log())
    assert refused.value.fix == f"Give this run a folder of its own: --output-dir {config.output_dir}-2"


def test_a_run_that_left_only_words_can_begin_again(data, tmp_path):
    config = settings(data, tmp_path / "run", epochs=1)
    for other in (".saving-epoch_0001", "acestep-v15-base"):
        (config.output_dir / "checkpoints" / other).mkdir(parents=True)
    (config.output_dir / "events.jsonl").write_text("{}\n", encoding="utf-8")
    assert what_stands(config) == ""
    run(config)
    assert what_stands(config) == "final"


def test_a_run_that_was_killed_before_its_first_checkpoint_can_begin_again(data, tmp_path):
    config = settings(data, tmp_path / "run", epochs=1)
    for picked in ("best", "marks/epoch_0001"):
        (config.output_dir / picked).mkdir(parents=True)
    write_settings(config)
    assert what_stands(replace(config, lr=1.0)) == "best"
    assert what_stands(config) == ""
    run(config)


def test_the_folder_of_the_tensors_is_no_folder_for_a_run(data):
    with pytest.raises(UserError, match="this is --dataset-dir"):
        train(settings(data, data), Log())


def test_a_run_that_was_stopped_says_how_it_goes_on_where_another_would_begin(data, tmp_path):
    config = settings(data, tmp_path / "run")
    with pytest.raises(Interrupted):
        train(config, Log(stop_at(1)))
    with pytest.raises(UserError, match="already stands") as refused:
        train(replace(config, lr=1e-3), Log())
    assert refused.value.fix.startswith("Go on: ")
    stored = config.output_dir / "config.json"
    stored.write_text(stored.read_text("utf-8").replace('"lr"', '"pace"'), "utf-8")
    with pytest.raises(UserError, match="already stands") as refused:
        train(config, Log())
    assert refused.value.fix == f"Give this run a folder of its own: --output-dir {config.output_dir}-2"


def test_resuming_from_an_older_checkpoint_does_not_mix_two_runs(data, tmp_path):
    config = settings(data, tmp_path, epochs=2, save_every=1)
    run(config)
    older = complete_checkpoints(tmp_path)[0]
    with pytest.raises(UserError, match="goes further"):
        train(replace(config, resume_from=older), Log())
    run(replace(config, resume_from=older, output_dir=tmp_path / "elsewhere"))
    assert not list(differing(adapter(tmp_path / "final"), adapter(tmp_path / "elsewhere" / "final")))


def test_songs_that_are_not_those_of_the_run_are_named(finished, tmp_path):
    other = write_data(tmp_path / "data")
    with pytest.raises(UserError) as refused:
        train(replace(finished, epochs=2, dataset_dir=other, resume_from=LATEST), Log())
    assert "1 missing (sung.pt)" in refused.value.problem
    assert "--init-from" in refused.value.fix


def test_changed_hints_and_changed_words_of_windows_are_refused_and_named(tmp_path):
    data = write_data(tmp_path / "data", (60, 60), hints=True, lyrics=LYRICS)
    config = settings(data, tmp_path / "run", epochs=1, chunk_duration=1.0, hints_ratio=0.5)
    run(config)
    again = replace(config, epochs=2, resume_from=LATEST)
    old = record(1, 60, hints=True, lyrics=LYRICS)
    for changed, what in (
        (replace(old, cover_hints=old.cover_hints + 1), "hints"),
        (record(1, 60, hints=True, lyrics=LYRICS.replace("01.00", "01.50")), "caption, lyrics or metadata"),
        (record(1, 60, hints=True, lyrics=LYRICS, bpm=90), "caption, lyrics or metadata"),
        (record(1, 60, hints=True, lyrics=LYRICS, repeat=2), "repeats"),
    ):
        save_record(data / "song 1.pt", changed)
        with pytest.raises(UserError) as refused:
            train(again, Log())
        assert f"1 changed (song 1.pt: {what})" in refused.value.problem
    save_record(data / "song 1.pt", record(1, 60, hints=True, lyrics=LYRICS, custom_tag="reaches nothing"))
    run(again)


def test_whole_songs_take_new_marks_of_time_that_reach_no_tensor(tmp_path):
    data = write_data(tmp_path / "data", (40, 40), lyrics=LYRICS)
    config = settings(data, tmp_path / "run", epochs=1)
    run(config)
    save_record(data / "song 1.pt", record(1, 40, lyrics=LYRICS.replace("01.00", "01.50")))
    run(replace(config, epochs=2, resume_from=LATEST))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"val_split": 0.2}, {}], ids=["validation", "training loss"])
def test_an_epoch_that_max_steps_cut_is_judged_once(data, tmp_path, changes):
    steady = {"scheduler_type": "constant", "epochs": 8, "early_stop_patience": 99} | changes
    run(settings(data, tmp_path / "straight", **steady))
    for steps in (14, 23):  # inside epochs, and beyond the five that are smoothed
        cut = settings(data, tmp_path / "cut", max_steps=steps, **steady)
        run(replace(cut, resume_from=LATEST if steps > 14 else None))
    run(replace(cut, max_steps=0, resume_from=LATEST))
    (a, _), (b, _) = (read_checkpoint(complete_checkpoints(tmp_path / name)[-1]) for name in ("straight", "cut"))
    for what in ("best", "judged", "evaluations", "epoch_losses"):
        assert a["history"][what] == b["history"][what]
    assert not list(differing(a["adapter"], b["adapter"]))


def test_another_base_model_is_refused(finished):
    with pytest.raises(UserError, match="was trained on another base model"):
        train(replace(finished, epochs=2, model_variant="xl-turbo", resume_from=LATEST), Log())


def test_the_settings_and_the_command_stand_in_the_folder(finished):
    assert json.loads((finished.output_dir / "config.json").read_text(encoding="utf-8"))["rank"] == 4
    assert "train.py fixed" in (finished.output_dir / "command.txt").read_text(encoding="utf-8")


def test_a_checkpoint_holds_only_tensors_and_plain_values(finished):
    state = torch.load(complete_checkpoints(finished.output_dir)[-1] / "training_state.pt", weights_only=True)
    assert {"adapter", "optimizer", "scaler", "average", "history", "config", "songs", "model", "ranks"} <= set(state)
