"""What suits so much music: the rule, where it finds its figures without torch, and every place that shows it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.cli.outside import data
from sidestep.data.records import index_records, save_record
from sidestep.errors import JobError
from sidestep.events import Decision, Notice, StepDone
from sidestep.settings.advice import VISITS, advice_for, advise, doubt_about_tag, music_in
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.build_dataset import build_dataset
from tests.training_world import CHECKPOINTS, record, run, settings

DOCS = Path(__file__).parents[2] / "docs" / "better-adapters.md"


@pytest.mark.parametrize(
    ("songs", "minutes", "is_turbo", "epochs", "steps", "rank", "window"),
    [
        (3, 12, True, 185, 185, 16, 60.0),
        (9, 36, True, 107, 321, 32, 60.0),
        (10, 40, True, 101, 303, 32, 0.0),
        (12, 40, False, 139, 417, 32, 0.0),
        (100, 400, True, 32, 800, 64, 0.0),
        (1, 60, True, 1239, 1239, 32, 60.0),  # one long recording counts as several songs
        (20, 240, True, 124, 620, 64, 60.0),  # longer than the model makes songs
        (20, 200, True, 113, 565, 64, 0.0),  # as long as it does
        (2, 4, True, 226, 226, 16, 60.0),  # twice as long as a window
        (5, 20, True, 143, 286, 16, 60.0),
        (20, 90, True, 75, 375, 32, 0.0),
        (1, 7, True, 453, 453, 16, 60.0),  # nearly two pieces
    ],
)
def test_advice_follows_songs_minutes_and_variant(songs, minutes, is_turbo, epochs, steps, rank, window):
    advice = advise(songs, minutes, is_turbo)
    assert (advice.epochs, advice.steps, advice.rank, advice.window_seconds) == (epochs, steps, rank, window)


def test_larger_steps_are_fewer_and_each_song_is_heard_as_often():
    small, large = advise(40, 160, True, samples=4), advise(40, 160, True, samples=8)
    assert (small.epochs, small.steps, large.steps) == (large.epochs, 2 * large.steps, large.steps)
    assert small.epochs * 40 == pytest.approx(VISITS * 40**0.5, rel=0.02)


@pytest.mark.parametrize(("kind", "rank"), [("lora", 16), ("dora", 16), ("loha", 16), ("lokr", None), ("oft", None)])
def test_only_kinds_whose_rank_is_one_get_advice_on_it(kind, rank):
    advice = advise(3, 12, True, adapter_type=kind)
    assert advice.rank == rank
    assert ("--rank" in advice.flags) == ("rank" in advice.value) == (rank is not None)


def test_short_songs_are_heard_whole_and_the_reason_tells_what_it_counted():
    advice = advise(8, 8, False)
    assert advice.window_seconds == 0
    assert "8 songs, 8:00 of music" in advice.reason
    assert "1.5 times turbo's" in advice.reason
    assert advice.flags.startswith("--rank 16 --alpha 32 --epochs")
    assert "few songs are copied later" in advise(3, 12, True).reason
    assert "the model makes no longer songs" in advise(20, 240, True).reason


@pytest.fixture
def tensors(tmp_path) -> Path:
    for seed, (frames, repeat) in enumerate(((1500, 1), (3000, 2))):
        save_record(tmp_path / f"{seed}.pt", record(seed, frames, repeat=repeat))
    return tmp_path


def test_the_index_of_a_folder_says_how_much_music_it_holds_until_it_holds_no_more(tensors):
    assert music_in(tensors) is None
    index_records(tensors)
    assert music_in(tensors) == (3, 5.0)
    (tensors / "0.pt").unlink()
    assert music_in(tensors) is None
    (tensors / ".records.json").write_text("seal\n[]\n", encoding="utf-8")
    assert music_in(tensors) is None


@pytest.mark.parametrize(
    ("model", "mode", "times"), [("turbo", "auto", 1), ("base", "auto", 1.5), ("base", "discrete", 1)]
)
def test_answers_so_far_make_the_same_advice(tensors, model, mode, times):
    index_records(tensors)
    answers = {"checkpoint_dir": CHECKPOINTS, "model_variant": model, "dataset_dir": tensors}
    asked = answers | {"timestep_mode": mode, "gradient_accumulation": 1}
    assert advice_for(asked) == advise(3, 5.0, times == 1, samples=1)
    more = advice_for(asked | {"batch_size": 2, "adapter_type": "lokr"})
    assert more == advise(3, 5.0, times == 1, samples=2, adapter_type="lokr") != advice_for(asked)
    assert advice_for(answers | {"timestep_mode": mode}) == advise(3, 5.0, times == 1)
    assert advice_for({"dataset_dir": tensors}) is None


def test_a_run_tells_it_and_changes_nothing_and_says_how_long_the_rest_takes(tensors, tmp_path):
    seen = run(settings(tensors, tmp_path / "run", chunk_duration=1.0, epochs=2, log_every=1, gradient_accumulation=1))
    [told] = [event for event in seen.of(Decision) if event.what == "suggested"]
    advice = advise(3, 5.0, True, samples=1)
    assert (told.value, told.reason) == (f"{advice.value}: {advice.flags}", advice.reason)
    [line] = [event.message for event in seen.of(Notice) if "that are left take about" in event.message]
    assert re.match(r"At [\d.e+-]+ (s an optimizer step|optimizer steps a second) the 4 that are left take", line)
    at = [i for i, event in enumerate(seen.events) if isinstance(event, StepDone)][1]
    assert seen.events[at + 1].message == line
    more = {"chunk_duration": 1.0, "epochs": 3, "gradient_accumulation": 1, "resume_from": Path("latest")}
    again = run(settings(tensors, tmp_path / "run", **more))
    assert not [event for event in again.of(Decision) if event.what == "suggested"]


def test_the_review_of_a_run_has_it_and_that_of_a_resumed_one_not(tensors):
    index_records(tensors)
    config = settings(tensors, tensors / "run")
    lines = data(lambda _holds, _path: "2 songs", config)
    advice = advise(3, 5.0, True, samples=2)
    at = lines.index(f"Suggested: {advice.value} ({advice.reason}):")
    assert lines[at + 1] == f"  {advice.flags}"
    assert len(data(lambda _holds, _path: "2 songs", replace(config, resume_from=Path("latest")))) == len(lines) - 2


def test_the_docs_have_the_figures_that_the_function_gives():
    rows = [line.strip("| \n").split(" | ") for line in DOCS.read_text(encoding="utf-8").splitlines()]
    told = [row for row in rows if len(row) == 6 and row[0].isdigit()]
    assert len(told) >= 5
    for songs, minutes, *figures in told:
        turbo, base = (advise(int(songs), float(minutes), is_turbo) for is_turbo in (True, False))
        window = f"{turbo.window_seconds:g} s" if turbo.window_seconds else "whole songs"
        assert figures == [f"{turbo.steps} ({turbo.epochs})", f"{base.steps} ({base.epochs})", str(turbo.rank), window]


@pytest.mark.parametrize(
    ("tag", "doubt"),
    [
        ("", ""),
        ("mrnglght", ""),
        ("mrnglght rock", ""),  # one word of its own is enough
        ("AC-DC", ""),
        ("Rock", "already means something"),
        ("sad piano", "already means something"),
        ("my, style", "already means something"),
        ("songs/mine", "looks like a path"),
        ("C:\\Music\\me", "looks like a path"),
        ("one.wav", "looks like a path"),
    ],
)
def test_a_trigger_word_that_is_a_path_or_an_ordinary_word_is_questioned(tag, doubt, tmp_path):
    assert (doubt in doubt_about_tag(tag)) if doubt else doubt_about_tag(tag) == ""
    config = BuildDatasetConfig(input=tmp_path, tag=tag)
    assert any("trigger word" in line for line in data(lambda *_: "", config)) == bool(doubt)
    said = []
    with pytest.raises(JobError):  # there are no songs
        build_dataset(config, said.append)
    assert any("trigger word" in event.message for event in said if isinstance(event, Notice)) == bool(doubt)
