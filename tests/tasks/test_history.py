"""`history`: past runs with their best loss, from their folders alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sidestep.errors import UserError
from sidestep.events import EpochDone, Event, EventLog, Finished, Notice, StepDone, Table, Validated
from sidestep.settings.config import HistoryConfig, TrainConfig
from sidestep.settings.option import as_json_values
from sidestep.tasks.history import history
from sidestep.tasks.train.checkpoints import read_metadata

NAN = float("nan")


def make_run(
    folder: Path, losses: list[float], validations: dict[int, float] | None = None, finished: bool = True, **settings
) -> Path:
    """A run's folder with one epoch per loss, and validation losses by epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(
        checkpoint_dir=Path("c"), dataset_dir=Path("d"), output_dir=folder, **{"epochs": len(losses), **settings}
    )
    (folder / "config.json").write_text(json.dumps(as_json_values(config)), "utf-8")
    log = EventLog(folder / "events.jsonl")
    for epoch, loss in enumerate(losses, 1):
        step = StepDone(
            step=epoch * 10,
            total_steps=100,
            epoch=epoch,
            loss=loss,
            lr=1.0,
            grad_norm=1.0,
            steps_per_second=1.0,
            eta_seconds=1.0,
        )
        log(step)
        log(EpochDone(epoch=epoch, total_epochs=config.epochs, loss=loss, seconds=90))
        if validations and epoch in validations:
            log(Validated(step=epoch * 10, epoch=epoch, loss=validations[epoch], best=False))
    log.close()
    place = folder / "final" if finished else folder / "checkpoints" / "epoch_0001"
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text("{}", "utf-8")
    (place / "complete.json").write_text(json.dumps({"position": {"step": 10, "epoch": 1}, "files": {}}), "utf-8")
    return folder


def look(folder: Path) -> tuple[dict, list[Event]]:
    events: list[Event] = []
    found = history(HistoryConfig(folder=folder), events.append)
    return {run.name: run for run in found["runs"]}, events


BEST = [
    ([0.9, 0.5, 0.7], {1: 0.8, 3: 0.75}, (0.75, 3, "validation")),
    ([0.9, 0.5, 0.7], {1: NAN, 3: 0.75}, (0.75, 3, "validation")),
    ([0.9, 0.5, 0.8], None, (0.7, 2, "training")),
    ([1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 0.4], None, (0.78, 7, "training")),
    ([1.0, 1.0, 1.0, 1.0, 1.0, NAN], None, (1.0, 5, "training")),
    ([NAN], None, (None, None, "")),
    ([], None, (None, None, "")),
]


@pytest.mark.parametrize(("losses", "validations", "best"), BEST)
def test_the_best_loss_is_the_lowest_on_held_out_songs_or_else_the_lowest_mean_of_five_epochs(
    tmp_path, losses, validations, best
):
    make_run(tmp_path / "run", losses, validations, epochs=10)
    run = look(tmp_path)[0]["run"]
    assert (run.best_loss and pytest.approx(run.best_loss), run.best_epoch, run.best_by) == best
    assert (run.epochs_done, run.epochs) == (len(losses), 10)


def test_runs_are_found_in_folders_below_and_listed_with_what_matters(tmp_path):
    make_run(tmp_path / "one", [0.9], {1: 0.8}, adapter_type="lokr", rank=16, model_variant="xl-base")
    make_run(tmp_path / "songs" / "two", [0.7, 0.6], finished=False, epochs=50, run_name="night")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"is_turbo": true}', "utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", "utf-8")
    runs, events = look(tmp_path)
    assert set(runs) == {"one", "night"}
    [table] = [event for event in events if isinstance(event, Table)]
    rows = {row[0]: row for row in table.rows}
    assert rows["one"][2:] == (
        "xl-base",
        "lokr 16",
        "1/1",
        "2 min",
        "0.8000 (epoch 1)",
        "validation",
        "finished, 10 steps",
    )
    assert rows["songs/two"][2:] == (
        "turbo",
        "lora 64",
        "2/50",
        "3 min",
        "0.6500 (epoch 2)",
        "training",
        "stopped at step 20 of 100",
    )
    [end] = [event for event in events if isinstance(event, Finished)]
    assert end.next_commands[0].startswith("uv run train.py fixed")
    assert "--resume-from latest" in end.next_commands[0]


def test_a_single_run_is_listed_too_and_the_newest_stands_first(tmp_path):
    for name, time in (("old", 1000.0), ("new", 2000.0), ("older", 10.0)):
        path = make_run(tmp_path / name, [0.5]) / "events.jsonl"
        lines = path.read_text("utf-8").splitlines()
        path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"time": time}), *lines[1:]]), "utf-8")
    assert list(look(tmp_path)[0]) == ["new", "old", "older"]
    assert list(look(tmp_path / "old")[0]) == ["old"]


def test_what_a_resumed_run_did_twice_counts_once_and_a_line_cut_by_a_crash_not_at_all(tmp_path):
    folder = make_run(tmp_path / "run", [0.9, 0.1], epochs=3)
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "EpochDone", "time": 1, "epoch": 3, "lo\n[]\n{"event": "EpochDone", "epoch": "x"}\n')
    log = EventLog(folder / "events.jsonl")
    log(EpochDone(epoch=2, total_epochs=3, loss=0.8, seconds=30))
    log.close()
    run = look(tmp_path)[0]["run"]
    assert (run.epochs_done, run.last_loss, run.seconds) == (2, 0.8, 120)
    assert run.best_loss == pytest.approx(0.85)


def test_an_empty_folder_says_so_and_one_that_is_not_there_is_refused(tmp_path):
    runs, events = look(tmp_path)
    assert not runs
    assert [e.level for e in events if isinstance(e, Notice)] == ["warning"]
    with pytest.raises(UserError, match="no such folder"):
        look(tmp_path / "nowhere")


def test_history_starts_without_torch():
    code = "import sys, sidestep.tasks.history; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize("value", ["Infinity", "1e999", "NaN", "null", "[]", '"x"'])
def test_an_event_with_an_absurd_number_is_passed_over(tmp_path, value):
    folder = make_run(tmp_path / "a", [0.9, 0.5])
    with (folder / "events.jsonl").open("a", encoding="utf-8") as log:
        log.write(f'{{"event": "EpochDone", "epoch": {value}, "loss": 0.1, "seconds": 1}}\n')
        log.write(f'{{"event": "StepDone", "step": {value}, "total_steps": 3}}\n')
    assert look(tmp_path)[0]["a"].last_loss == 0.5


def test_a_checkpoint_whose_last_file_is_nested_without_end_is_none(tmp_path):
    (tmp_path / "complete.json").write_text("[" * 100_000, "utf-8")
    assert read_metadata(tmp_path) is None
