"""Marks on the way: the rule by itself, and the small checkpoints that a run makes by it."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sidestep.errors import Interrupted
from sidestep.events import Decision, Saved, StepDone
from sidestep.settings.config import HistoryConfig, TrainConfig
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.tasks.history import history
from sidestep.tasks.score.run import candidates_of
from sidestep.tasks.train.checkpoints import most_marks, read_checkpoint
from sidestep.tasks.train.loop import rare_seconds_left
from sidestep.tasks.train.marks import SMOOTHED_EPOCHS, passed, smoothed
from sidestep.tasks.train.run import History, Mark
from tests.several_processes import FSDP, finish, start
from tests.tasks.train.test_resume import LATEST, stop_at
from tests.training_world import adapter, differing, run, settings, write_data

DROP = 0.02
MARKED = {"mark_drop": DROP, "epochs": 9, "lr": 1e-2, "save_every": 3}


# ---- the rule ----


def falling(epochs: int, by: float = 0.01) -> list[float]:
    return [1.0 - by * n for n in range(epochs)]


def marked(losses: list[float], drop: float) -> list[int]:
    """The epochs that are marked as the losses come in."""
    told = History()
    for n, loss in enumerate(losses, 1):
        told.epoch_losses.append(loss)
        told.add_mark(drop, 10 * n, n)
    return [mark.epoch for mark in told.marks]


RULE = [
    ("first smoothed loss 0.98: steps of 0.098 are passed after 9.8 and 19.6 more epochs", falling(30), 0.1, [15, 25]),
    ("half of the step marks twice as often", falling(30), 0.05, [10, 15, 20, 25, 30]),
    ("a fall over several steps is one mark", [1.0] * 5 + [0.1] * 5, 0.1, [6, 7, 8, 9, 10]),
    (
        "a rise marks nothing, nor does the way back to where it was",
        [1.0] * 5 + [0.5] * 5 + [1.0] * 5 + [0.5] * 5,
        0.5,
        [10],
    ),
    ("nothing is known before six epochs", falling(6, 0.1), 0.01, [6]),
    ("five epochs make no mark", falling(5, 0.1), 0.01, []),
    ("zero makes none", falling(30), 0.0, []),
    ("an epoch without a finite loss is waited out", [*[1.0] * 5, math.nan, *[0.5] * 6], 0.1, [11]),
    ("the first smoothed loss is the first finite one", [math.nan, *[1.0] * 5, 0.4, 0.4], 0.1, [7, 8]),
    ("a loss of nothing has no share", [0.0] * 9, 0.1, []),
]


@pytest.mark.parametrize(("losses", "drop", "epochs"), [case[1:] for case in RULE], ids=[case[0] for case in RULE])
def test_marks_are_where_the_rule_says(losses, drop, epochs):
    assert marked(losses, drop) == epochs


def test_where_chance_moves_the_loss_more_than_a_step_the_steps_are_wider():
    first = [1.0, 1.2, 1.0, 1.2, 1.0]  # neighbours differ by 0.2: one epoch's error is 0.2/√2, the mean's that/√5
    error = 0.2 / math.sqrt(2) / math.sqrt(SMOOTHED_EPOCHS)
    assert smoothed(first) == pytest.approx(1.08)
    for below, steps in ((1.99 * error, 0), (2.01 * error, 1), (4.01 * error, 2)):
        losses = [*first, *[1.08 - below] * 5]
        assert passed(losses, 0.01)[0] == steps
    trend = [*falling(5), *[smoothed(falling(5)) - 0.03] * 5]  # a steady fall is no noise, or hardly
    assert passed(trend, 0.01)[0] >= 2


def test_marks_are_kept_in_the_state_and_read_back():
    told = History(epoch_losses=falling(20), marks=[Mark(30, 3, 0.5, 0.1)])
    assert History.from_values(asdict(told)) == told
    old = asdict(told)
    del old["marks"]  # of a version before
    assert History.from_values(old).marks == []


def test_the_time_left_counts_previews_that_only_marks_make():
    metrics = SimpleNamespace(rare_seconds={"previews": 6.0})
    config = SimpleNamespace(validate_every=1, save_every=1, preview_every=0)
    left = rare_seconds_left(
        SimpleNamespace(config=config, position=SimpleNamespace(epoch=2), last_epoch=5, first_epoch=0), metrics
    )
    assert left == 6.0  # that at the end of the run


# ---- a run ----


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), frames=(30, 25, 34, 30))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run(settings(data, folder, preview_prompt="x", preview_duration=1.0, **MARKED))


def marks_of(folder: Path) -> list[dict]:
    return read_checkpoint(complete_checkpoints(folder)[-1])[0]["history"]["marks"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "marks").iterdir())


@pytest.mark.slow
def test_a_run_keeps_the_adapter_of_each_mark_and_makes_it_audible(straight):
    folder, log = straight
    history_of = read_checkpoint(complete_checkpoints(folder)[-1])[0]["history"]
    marks = history_of["marks"]
    assert len(marks) >= 2
    assert [mark["epoch"] for mark in marks] == marked(history_of["epoch_losses"], DROP)
    assert names(folder) == [f"epoch_{mark['epoch']:04}" for mark in marks]
    for mark in marks:
        place = f"epoch_{mark['epoch']:04}"
        assert sorted(p.name for p in (folder / "marks" / place).iterdir()) == sorted(
            p.name for p in (folder / "final").iterdir()
        ), "the adapter alone"
        assert (folder / "previews" / place / "01-x.flac").is_file()
        [note] = [event.note for event in log.of(Saved) if event.what == f"marks/{place}"]
        assert note.startswith(f"smoothed training loss {mark['loss']:.4f}, ")
        checkpoint = folder / "checkpoints" / place
        if checkpoint.is_dir():
            assert not list(differing(adapter(folder / "marks" / place), adapter(checkpoint)))
    assert "at most 9 marks" in next(e.value for e in log.of(Decision) if e.what == "disk")


@pytest.mark.slow
def test_marks_are_in_the_report_in_history_and_judged_by_score(straight):
    folder, _ = straight
    page = (folder / "report.html").read_text("utf-8")
    assert "Marks on the way" in page
    assert f"<td>{marks_of(folder)[0]['loss']:.4f}</td>" in page
    tables = []
    [past] = history(HistoryConfig(folder=folder), tables.append)["runs"]
    assert past.marks == len(names(folder))
    assert f", {past.marks} marks" in str(tables[0].rows)
    judged = [name for c in candidates_of(folder) for name in (c.name, *c.also)]
    assert [name for name in judged if name.startswith("mark")]
    assert {f"mark {name}" for name in names(folder)} <= set(judged)


def test_marks_and_their_previews_change_nothing_of_the_training(straight, data, tmp_path):
    run(settings(data, tmp_path / "run", **MARKED | {"mark_drop": 0.0}))
    assert not (tmp_path / "run" / "marks").exists()
    assert not list(differing(adapter(straight[0] / "final"), adapter(tmp_path / "run" / "final")))


def test_a_run_that_was_stopped_makes_the_marks_of_one_that_was_not(straight, data, tmp_path):
    stopped = settings(data, tmp_path / "run", **MARKED)
    first = marks_of(straight[0])[0]["step"]
    for step in (1, first + 1):  # before a mark can be, and in the epoch after the first one
        with pytest.raises(Interrupted):
            run(replace(stopped, resume_from=LATEST if step > 1 else None), stop_at(step))
    log = run(replace(stopped, resume_from=LATEST))
    assert log.of(StepDone)
    assert marks_of(tmp_path / "run") == marks_of(straight[0])
    assert names(tmp_path / "run") == names(straight[0])
    for name in names(straight[0]):
        both = (adapter(folder / "marks" / name) for folder in (straight[0], tmp_path / "run"))
        assert not list(differing(*both))


def test_what_a_killed_run_left_of_a_mark_is_removed(data, tmp_path):
    half = tmp_path / "run" / "marks" / ".saving-epoch_0007"
    half.mkdir(parents=True)
    run(settings(data, tmp_path / "run", **MARKED | {"epochs": 1}))
    assert not half.exists()


@pytest.mark.slow
@pytest.mark.parametrize("environment", [None, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_make_the_marks_of_one(data, tmp_path, environment):
    changes = MARKED | {"epochs": 7}
    run(settings(data, tmp_path / "one", gradient_accumulation=2, **changes))
    finish(start(data, tmp_path / "two", environment, gradient_accumulation=1, **changes), sharded=bool(environment))
    one, two = (marks_of(tmp_path / name) for name in ("one", "two"))
    assert one
    assert [mark["epoch"] for mark in two] == [mark["epoch"] for mark in one]
    assert [mark["loss"] for mark in two] == pytest.approx([mark["loss"] for mark in one], rel=1e-3)
    assert names(tmp_path / "two") == names(tmp_path / "one")
    for name in names(tmp_path / "one"):
        a, b = (adapter(tmp_path / folder / "marks" / name) for folder in ("one", "two"))
        assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-3


@pytest.mark.parametrize(("drop", "marks"), [(1e-310, 7), (0.5, 2), (0.01, 7), (0.0, 0)])
def test_a_run_makes_no_more_marks_than_epochs_however_small_their_distance(drop, marks):
    config = TrainConfig(checkpoint_dir=Path(), dataset_dir=Path(), output_dir=Path(), mark_drop=drop)
    assert most_marks(config, 7) == marks
