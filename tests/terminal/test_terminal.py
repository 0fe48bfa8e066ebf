"""Events as lines and as a live view; the terminal as an object."""

import dataclasses
import io
from contextlib import nullcontext

import pytest
from rich.console import Console

from sidestep import events
from sidestep.events import (
    STEP_TASK,
    Decision,
    EpochDone,
    Event,
    FileFailed,
    Finished,
    Notice,
    Progress,
    Saved,
    StepDone,
    StepSkipped,
    Table,
    TrainingStarted,
    Validated,
)
from sidestep.terminal import rich_terminal
from sidestep.terminal.rich_terminal import LiveView, RichTerminal, shown, sparkline
from sidestep.terminal.terminal import PlainView, Terminal, as_lines, as_typed

STEP = StepDone(
    step=10,
    total_steps=500,
    epoch=1,
    loss=0.812,
    lr=1e-4,
    grad_norm=0.31,
    steps_per_second=2.1,
    eta_seconds=235,
    memory_bytes=3 * 2**30,
)
STARTED = TrainingStarted(step=0, total_steps=500, epoch=1, total_epochs=9)
EXAMPLES = {
    "training: 500 optimizer steps, 9 epochs": STARTED,
    "training: 1 optimizer step, 1 epoch, from step 7": TrainingStarted(step=7, total_steps=1, epoch=1, total_epochs=1),
    "hello": Notice(message="hello"),
    "warning: mind": Notice(message="mind", level="warning"),
    "device: cpu (no GPU found)": Decision(what="device", value="cpu", reason="no GPU found"),
    "Pass 1 3/12 (25%), 4.1 audio s/s, 0:32 left, song.wav": Progress(
        task="Pass 1", done=3, total=12, rate=4.1, unit="audio s", eta_seconds=32, current="song.wav"
    ),
    "Merging 0.5/2.0 GiB (25%), 0:32 left": Progress(
        task="Merging", done=2**29, total=2**31, unit="bytes", eta_seconds=32
    ),
    "step 1/2, epoch 1, loss 0.8120, lr 1.0e-04, grad norm 0.31, 66.7 s per step, 1:07 left": dataclasses.replace(
        STEP, step=1, total_steps=2, steps_per_second=0.015, eta_seconds=66.7, memory_bytes=None
    ),
    "failed (decode): a.wav: cut": FileFailed(path="a.wav", reason="cut", stage="decode"),
    "step 10/500, epoch 1, loss 0.8120, lr 1.0e-04, grad norm 0.31, 2.1 steps/s, 3:55 left, 3.0 GiB": STEP,
    "warning: step 3 skipped (2 in a row): loss is nan; songs: a, b": StepSkipped(
        step=3, songs=("a", "b"), reason="loss is nan", in_a_row=2
    ),
    "epoch 1/9 done: mean loss 0.5000, 1:01": EpochDone(epoch=1, total_epochs=9, loss=0.5, seconds=61),
    "validation at step 5: loss 0.4000 (best so far)": Validated(step=5, epoch=1, loss=0.4, best=True),
    "saved final: out/final": Saved(what="final", path="out/final"),
    "saved best: out/best (epoch 3, validation loss 0.4000)": Saved(
        what="best", path="out/best", note="epoch 3, validation loss 0.4000"
    ),
    "Songs\n  name  bpm\n  ----  ---\n  a     120": Table(title="Songs", columns=("name", "bpm"), rows=(("a", "120"),)),
    "Done.\nNext:\n  train.py sample": Finished(message="Done.", next_commands=("train.py sample",)),
}


@pytest.mark.parametrize(("line", "event"), EXAMPLES.items(), ids=lambda value: type(value).__name__)
def test_each_event_has_its_line_in_ascii(line, event):
    assert "\n".join(as_lines(event)) == line
    assert line.isascii()


def test_every_kind_of_event_is_in_the_table_above():
    kinds = {
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
    }
    assert kinds == {type(event) for event in EXAMPLES.values()}


def test_an_event_of_a_new_kind_is_shown_all_the_same():
    new = dataclasses.make_dataclass("Cooled", [("degrees", int)], bases=(Event,), frozen=True, kw_only=True)
    assert as_lines(new(degrees=3)) == ["Cooled: degrees=3"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), ("", "-"), (True, "on"), ((1.0, 2), "1.0 2"), ((), "none"), (1e-4, "0.0001")]
)
def test_values_are_shown_as_they_are_typed(value, text):
    assert as_typed(value) == text


def test_plain_progress_comes_every_few_seconds_and_always_at_the_end():
    now, lines = [0.0], []
    view = PlainView(lines.append, lambda: now[0])
    for done in range(21):
        now[0] += 0.5
        view(Progress(task="t", done=done, total=20))
    assert [line.split()[1] for line in lines] == ["0/20", "6/20", "12/20", "18/20", "20/20"]


def test_the_live_view_tells_bytes_and_slow_steps_and_forgets_what_went_on_within_a_step():
    loading = Progress(task="Loading", done=2**29, total=2**31, unit="bytes")
    within = Progress(task=STEP_TASK, done=7, total=97)
    out = draw([loading, within])
    assert "0.5/2.0 GiB" in out
    assert "7/97" in out
    slow = dataclasses.replace(STEP, steps_per_second=0.015)
    for ending in (slow, EpochDone(epoch=1, total_epochs=9, loss=0.5, seconds=61)):
        with LiveView(Console(file=io.StringIO())) as view:
            view(within)
            view(ending)
            assert view.tasks == {}
    assert "66.7 s per step" in draw([slow])


def best(number: int) -> Saved:
    return Saved(what="best", path="runs/a/best", note=f"epoch {number}, validation loss 0.{99 - number}00")


def test_a_better_best_is_told_once_a_minute_and_the_panel_has_the_last_one():
    now, lines = [0.0], []
    view = PlainView(lines.append, lambda: now[0])
    for number in range(1, 26):
        now[0] += 5.0
        view(best(number))
    assert [line.split("(")[1].split(",")[0] for line in lines] == ["epoch 1", "epoch 13", "epoch 25"]
    view(Saved(what="best", path="runs/a/best"))  # of a judgement, which writes it once
    assert len(lines) == 4
    drawn = draw([STEP, *map(best, range(1, 26))], color_system=None)
    assert "saved best" not in drawn
    assert "in best/  epoch 25, validation loss 0.7400" in drawn


def test_two_tasks_do_not_silence_each_other():
    lines = []
    view = PlainView(lines.append, lambda: 0.0)
    view(Progress(task="a", done=0, total=9))
    view(Progress(task="b", done=0, total=9))
    assert len(lines) == 2


NESTED = [  # two clips, each with its steps, then a task of its own
    Progress(task="Clips", done=0, total=2),
    *(Progress(task="Making music", done=done, total=8) for done in (4, 8)),
    Progress(task="Clips", done=1, total=2),
    *(Progress(task="Making music", done=done, total=8) for done in (4, 8)),
    Progress(task="Clips", done=2, total=2),
    Progress(task="Validation", done=3, total=3),
]


def test_a_task_inside_another_leaves_no_line_at_its_end():
    lines: list[str] = []
    view = PlainView(lines.append, iter(range(0, 999, 10)).__next__)  # even where its line would be due
    for event in NESTED:
        view(event)
    ends = [line for line in lines if "100%" in line]
    assert [line.split()[0] for line in ends] == ["Clips", "Validation"]
    out = io.StringIO()
    with LiveView(Console(file=out)) as live:
        for event in NESTED:
            live(event)
    assert [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("done ")] == [
        "Clips",
        "Validation",
    ]


def test_a_part_that_failed_does_not_silence_the_end_of_the_whole():
    lines: list[str] = []
    given = (*NESTED[:2], Progress(task="Clips", done=1, total=2), Progress(task="Clips", done=2, total=2))
    plain, out = PlainView(lines.append, lambda: 0.0), io.StringIO()
    with LiveView(Console(file=out)) as live:
        both = ["Clips", "Making music"]
        for event, under_way in zip(given, (both[:1], both, both, []), strict=True):
            plain(event)
            live(event)
            assert list(live.tasks) == under_way
    assert "Clips 2/2 (100%)" in lines
    assert "done Clips" in out.getvalue()


@pytest.mark.parametrize("ending", [STEP, EpochDone(epoch=1, total_epochs=9, loss=0.5, seconds=61)])
def test_a_task_that_failed_silences_no_other_after_the_next_step(ending):
    validation, lines = [Progress(task="Validation", done=done, total=3) for done in (1, 3)], []
    given = (Progress(task="Previews", done=1, total=4), ending, *validation)
    plain, out = PlainView(lines.append, lambda: 0.0), io.StringIO()
    with LiveView(Console(file=out)) as live:
        for event in given:
            plain(event)
            live(event)
        assert live.tasks == {}
    assert "Validation 3/3 (100%)" in lines
    assert "done Validation" in out.getvalue()


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def draw(events_shown, width=80, **console):
    out = Tty()
    with LiveView(
        Console(file=out, width=width, force_terminal=True, markup=False, highlight=False, **console)
    ) as view:
        for event in (STARTED, *events_shown):
            view(event)
    return out.getvalue()


def test_the_training_panel_is_there_before_the_first_step_and_its_total_never_changes():
    view = LiveView(Console(file=io.StringIO(), width=80))

    def seen() -> str:
        view.console.file.truncate(0)
        view.console.print(view.board())
        return view.console.file.getvalue()

    assert "Training" not in seen()
    view(dataclasses.replace(STARTED, step=120, epoch=3))  # a run that goes on
    first = seen()
    assert "120/500" in first
    assert "epoch 3 of 9" in first
    assert "first step" in first
    view(dataclasses.replace(STEP, step=130, epoch=3))
    assert "130/500" in seen()
    assert "epoch 3 of 9" in seen()
    assert "0.476 s per step" in seen()
    assert "3:55 left" in seen()


def test_the_live_view_ends_with_the_state_of_the_training():
    out = draw(
        [
            STEP,
            dataclasses.replace(STEP, step=500, loss=0.25),
            EXAMPLES["validation at step 5: loss 0.4000 (best so far)"],
            best(4),
            Saved(what="previews", path="runs/a/previews/epoch_0010"),
        ]
    )
    assert "last preview" in out.splitlines()[-3]
    assert "500/500" in out
    assert "0.2500" in out
    assert "in best/" in out
    assert "epoch 4, validation loss 0.9500" in out
    assert "3.0 GiB" in out


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_live_view_fits_any_width_and_cuts_no_key(width, monkeypatch):
    monkeypatch.setattr(rich_terminal, "reading_keys", lambda *_arguments: nullcontext())
    view = LiveView(Console(file=io.StringIO(), width=width, color_system=None), io.StringIO())
    for event in (*EXAMPLES.values(), dataclasses.replace(STEP, step=11)):
        view(event)
    view.console.file.truncate(0)
    view.console.print(view.board())
    board = view.console.file.getvalue().strip("\0")
    assert all(len(line) <= width for line in board.splitlines())
    words = " ".join(board.replace("│", " ").split())
    assert "keys p preview now s save now q stop after saving" in words


@pytest.mark.parametrize("event", EXAMPLES.values(), ids=lambda event: type(event).__name__)
def test_the_live_view_says_the_same_words_and_drops_no_brackets(event):
    console = Console(file=io.StringIO(), width=200, markup=False)
    console.print(shown(dataclasses.replace(event, path="/songs/[x]/y") if hasattr(event, "path") else event))
    text = console.file.getvalue()
    assert "[x]" in text if hasattr(event, "path") else as_lines(event)[0].split()[0].strip(":") in text


def test_a_loss_curve_goes_down_when_the_loss_does():
    assert sparkline([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert len(sparkline([float(i) for i in range(1000)], 40)) <= 40
    assert sparkline([1.0, float("nan"), 1.0], 10) == "▄▄"
    assert sparkline([], 10) == ""


def test_a_path_with_brackets_is_printed_as_it_is():
    out = Tty()
    RichTerminal(out, Tty(), Tty()).print("/songs/[x]/[/red] :smile:")
    assert out.getvalue().strip() == "/songs/[x]/[/red] :smile:"


def test_no_color_is_obeyed(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    err = Tty()
    RichTerminal(Tty(), err, Tty()).error("x")
    assert "x" in err.getvalue()
    assert "\x1b[1;31m" not in err.getvalue()


def test_a_plain_terminal_writes_no_escape_sequence():
    out, err = Tty(), Tty()
    terminal = Terminal(out, err, Tty())
    with terminal.view() as view:
        for event in EXAMPLES.values():
            view(event)
    terminal.error("problem", "fix")
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert err.getvalue() == "error: problem\nfix\n"


def test_a_name_that_the_console_cannot_show_stops_nothing():
    raw = io.BytesIO()
    terminal = Terminal(io.TextIOWrapper(raw, encoding="cp437"), Tty(), Tty())
    terminal.print("日本.wav")
    assert raw.getvalue().rstrip() == b"??.wav"


@pytest.mark.parametrize(
    ("typed", "answer"), [("y\n", True), ("Yes\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_a_confirmation_needs_a_yes(typed, answer):
    assert Terminal(Tty(), Tty(), io.StringIO(typed)).confirm("Sure?") is answer


def test_prose_breaks_between_words_and_what_is_pasted_does_not():
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    with LiveView(console) as view:
        view(Notice(message="No song was held out, so gain is measured on the trained songs."))
        view(Decision(what="disk", value="2 checkpoints of 336 KiB", reason="49.9 GiB are free in runs/songs"))
        view(Notice(message="--max-steps is reached. Go on with: side-step fixed --resume-from latest --max-steps 90"))
    said = console.file.getvalue().replace(" \n", "\n")
    assert "so gain is\nmeasured on" in said
    assert "49.9 GiB\nare free" in said
    assert "side-step fixed --resume-from latest --max-steps 90" in said
