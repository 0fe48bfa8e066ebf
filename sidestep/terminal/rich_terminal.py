"""A terminal that Rich may draw on: colours, tables, and a live view where messages scroll by above what runs now."""

import time
from collections import deque
from contextlib import AbstractContextManager, ExitStack
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from sidestep.events import (
    Decision,
    EpochDone,
    Event,
    FileFailed,
    Finished,
    Notice,
    Progress,
    Report,
    Saved,
    StepDone,
    StepSkipped,
    Table,
    TrainingStarted,
    Validated,
    visible_event,
)
from sidestep.stopping import PREVIEW, SAVE, StopRequest
from sidestep.terminal.keys import reading_keys
from sidestep.terminal.terminal import Terminal, UnderWay, after_a_moment, as_lines, done_of, is_tty, rate
from sidestep.words import clock, gib, visible

BLOCKS = "▁▂▃▄▅▆▇█"
KEYS = (("p", "preview now"), ("s", "save now"), ("q", "stop after saving"))
STYLES = {"info": "", "warning": "yellow", "error": "bold red"}


def shows_unicode(console: Console) -> bool:
    """True where block and box characters can be shown."""
    return console.encoding.startswith("utf") and not console.legacy_windows


def sparkline(values: list[float], width: int) -> str:
    """The values as one line of block characters, averaged down to `width` of them."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    if not finite:
        return ""
    size = max(1, -(-len(finite) // width))
    means = [sum(part) / len(part) for part in (finite[i : i + size] for i in range(0, len(finite), size))]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((v - low) / (high - low) * 7)] if high > low else BLOCKS[3] for v in means)


def is_for_pasting(event: Event) -> bool:
    """Whether an event has a command or a path in it, which stays one line to copy; prose breaks between words."""
    return not isinstance(event, Table | Decision) and not (isinstance(event, Notice) and " --" not in event.message)


def ask_job(letter: str) -> None:
    """What a key asks of the training that runs; nothing where none does, or none takes keys."""
    job = StopRequest.current
    match letter.lower():
        case "p" if job:
            job.ask(PREVIEW)
        case "s" if job:
            job.ask(SAVE)
        case "q" if job:
            job.stop()


class LiveView:
    """Shows events with Rich: messages as lines, tasks as bars, training as a panel with its loss curve.

    keyboard: where a person can ask something of a training; None where nobody can.
    """

    def __init__(self, console: Console, keyboard: TextIO | None = None):
        self.console, self.keyboard = console, keyboard
        self.stack = ExitStack()
        self.started: TrainingStarted | None = None
        self.unicode = shows_unicode(console)
        self.tasks = UnderWay()
        self.losses: deque[float] = deque(maxlen=20_000)
        self.step: StepDone | None = None
        self.epoch: EpochDone | None = None
        self.validated: Validated | None = None
        self.best = ""  # what is in best/
        self.preview = ""  # folder of the last ones
        self.began = time.monotonic()
        self.live = Live(
            console=console, refresh_per_second=4, transient=True, get_renderable=self.board, vertical_overflow="crop"
        )

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self.stack.close()
        self.keyboard = None
        self.live.stop()
        if self.step is not None:
            self.console.print(self.board())  # the last state of a training stays on the screen

    def __call__(self, event: Event) -> None:
        event = visible_event(event)
        match event:
            case Progress(task=task):
                self.tasks.take(event)
                if not self.tasks:  # a part of another task leaves no line
                    self.console.print(Text.assemble(("done ", "green"), task, (f"  {done_of(event)}", "dim")))
            case TrainingStarted():
                self.started, self.step, self.began = event, None, time.monotonic()
                self.losses.clear()
                self.stack.close()
                if self.keyboard:
                    self.stack.enter_context(reading_keys(self.keyboard, ask_job))
            case StepDone(loss=loss):
                self.step = event
                self.tasks.clear()  # no task goes on across a step; one that failed has no end
                self.losses.append(loss)
            case EpochDone():
                self.epoch = event
                self.tasks.clear()
            case Validated():
                self.validated = event
            case Saved(what="best") if event.note:  # with almost every epoch; the panel has the last one
                self.best = event.note
            case _:
                if isinstance(event, Saved) and event.what == "previews":
                    self.preview = event.path
                self.console.print(shown(event, self.unicode), soft_wrap=is_for_pasting(event))

    def board(self) -> RenderableType:
        """What runs now: a bar per task, and the training panel once there is a step."""
        parts: list[RenderableType] = []
        for progress in self.tasks.values():
            left = "" if progress.eta_seconds is None else f"{clock(progress.eta_seconds)} left"
            done = "  ".join(part for part in (done_of(progress), rate(progress), left) if part)
            room = max(8, self.console.width - len(progress.task) - len(done) - 6)
            bar = ProgressBar(max(progress.total, 1), progress.done, width=min(30, room))
            grid = RichTable.grid(padding=(0, 1))
            grid.add_row(Text(progress.task, style="bold"), bar, Text(done))
            parts.append(grid)
            if progress.current:
                parts.append(Text("  " + progress.current, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts, *([self._training(self.started, self.step)] if self.started else []))

    def _training(self, started: TrainingStarted, step: StepDone | None) -> RenderableType:
        inner = min(self.console.width, 100) - 4
        done, total = (step.step if step else started.step), started.total_steps
        bar = RichTable.grid(padding=(0, 1))
        count = f"{done}/{total}"
        epochs = f"epoch {step.epoch if step else started.epoch} of {started.total_epochs}"
        bar.add_row(
            ProgressBar(max(total, 1), done, width=max(8, inner - len(count) - len(epochs) - 3)),
            Text(count, style="bold"),
            Text(epochs),
        )
        lines: list[RenderableType] = [bar]
        if step is None:
            lines.append(Text("the first step is under way", style="dim"))
        else:
            took = f"{clock(time.monotonic() - self.began)} in all"
            left = f"{clock(step.eta_seconds)} left" if done < total else took
            figures = RichTable.grid(padding=(0, 2))
            figures.add_row(
                Text.assemble("loss ", (f"{step.loss:.4f}", "bold")),
                Text(f"lr {step.lr:.1e}"),
                Text(f"grad {step.grad_norm:.3g}"),
            )
            pace = f"{1 / step.steps_per_second:.3g} s per step" if step.steps_per_second else ""
            figures.add_row(Text(pace), Text(left), Text(gib(step.memory_bytes)))
            if self.validated is not None:
                validation = Text.assemble("validation ", (f"{self.validated.loss:.4f}", "bold"))
                figures.add_row(validation, Text(f"at step {self.validated.step}"), Text())
            lines.append(figures)
        if self.best:
            lines.append(Text.assemble("in best/  ", (self.best, "bold"), no_wrap=True, overflow="ellipsis"))
        if self.preview:
            lines.append(Text.assemble("last preview ", (self.preview, "bold"), no_wrap=True, overflow="ellipsis"))
        if self.unicode and len(self.losses) > 1:
            lines.append(Text(sparkline(list(self.losses), inner), style="cyan", no_wrap=True))
        if self.keyboard:
            keys = [Text.assemble((key, "bold cyan"), (f" {what}", "dim")) for key, what in KEYS]
            lines.append(Text.assemble("keys  ", Text("  ").join(keys)))
        return Panel(Group(*lines), title="Training", title_align="left", width=inner + 4, border_style="dim")


def shown(event: Event, unicode: bool = True) -> RenderableType:
    """A message, decision or result as Rich shows it; the words are those of plain mode."""
    match event:
        case Notice(level=level):
            return Text(as_lines(event)[0], style=STYLES.get(level, ""))
        case Decision(what=what, value=value, reason=reason):
            return Text.assemble((f"{what}: ", "dim"), (value, "bold"), (f"  {reason}", "dim"))
        case FileFailed() | StepSkipped():
            return Text(as_lines(event)[0], style="yellow")
        case Saved(what=what, path=path, note=note):
            return Text.assemble((f"saved {what}: ", "green"), path, (f" ({note})" if note else "", "dim"))
        case Table(title=title, columns=columns, rows=rows):
            table = RichTable(
                box=SIMPLE_HEAD,
                show_header=any(columns),
                show_edge=False,
                header_style="bold",
                safe_box=not unicode,
            )
            for column in columns or ("",) * max((len(row) for row in rows), default=0):
                table.add_column(Text(column), overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            # the title apart: a Rich title would wrap at a narrow table's width
            return Group(Text(title, style="bold"), table) if title else table
        case Finished(message=message, next_commands=commands):
            following = [Text("Next:", style="dim"), *(Text("  " + command) for command in commands)]
            return Text("\n").join([Text(message, style="bold green"), *(following if commands else [])])
    return Text("\n".join(as_lines(event)))


class RichTerminal(Terminal):
    """Colours, tables, bars. Without markup: a path such as `/songs/[x]/y` is printed as it is. Rich obeys NO_COLOR."""

    plain = False

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, source: TextIO | None = None):
        super().__init__(out, err, source)
        self.console = Console(file=self.out, markup=False, emoji=False, highlight=False)

    @property
    def width(self) -> int:
        return self.console.width

    @property
    def unicode(self) -> bool:
        return shows_unicode(self.console)

    def print(self, text: str = "") -> None:
        self.console.print(visible(text, lines=True), soft_wrap=True)

    def error(self, problem: str, fix: str = "") -> None:
        if not is_tty(self.err):
            super().error(problem, fix)
            return
        console = Console(file=self.err, markup=False, emoji=False, highlight=False)
        console.print(visible(problem), style="bold red", soft_wrap=True)
        if fix:
            console.print(visible(fix, lines=True), soft_wrap=True)

    def view(self) -> AbstractContextManager[Report]:
        return LiveView(self.console, self.source if self.interactive else None)

    def waiting(self, text: str) -> AbstractContextManager[None]:
        status = self.console.status(Text(visible(text)), spinner="dots" if self.unicode else "line")
        return after_a_moment(status.start, status.stop)
