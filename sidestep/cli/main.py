"""From argv to exit status: read the call, make the terminal, run the commands with their events shown and kept.

The only error boundary stands here: what a job raises becomes a message, a log and an exit status.
"""

import errno
import gc
import json
import logging
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sidestep import __version__
from sidestep.cli.commands import check_folders, load_what_it_needs, run
from sidestep.cli.outside import outside
from sidestep.cli.parser import Call, configs_of, global_parser, notes_of, parse, profile_of
from sidestep.errors import ExitStatus, Interrupted, UserError
from sidestep.events import Decision, Event, EventLog, Finished, Notice, Report, null, tee, visible_event
from sidestep.files import one_writer, state_folder
from sidestep.settings import presets
from sidestep.settings.config import COMMANDS, DemoConfig, PreprocessConfig, TrainConfig, command_line
from sidestep.settings.option import options_of
from sidestep.settings.path_checks import run_settings
from sidestep.stopping import GRACE_SECONDS, StopRequest
from sidestep.terminal.terminal import PlainView, Terminal, wants_plain
from sidestep.wizard.numbered import NumberedAsk
from sidestep.wizard.questionnaire import Ask
from sidestep.wizard.session import Wizard

STOP_SIGNALS = [number for number in StopRequest.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
INSTALL_TORCH = "uv --no-config pip install torch --torch-backend=auto"
RETYPE = {
    errno.ENOSPC: "Free some space, then run the same command again: what is complete is kept.",
    errno.EACCES: "Check who may write there.",
}


def entry() -> NoReturn:
    """Run the command line of this process and leave it."""
    status = main()
    if status == ExitStatus.INTERRUPTED:
        for number in STOP_SIGNALS:  # on its way out Python would take a repeated one for a reason to die by it
            signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # on its way out Python would look at every object once more: a second, for nothing
    sys.exit(status)


def main(argv: list[str] | None = None, terminal: Terminal | None = None) -> int:
    """Run one command line and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # progress is ours to show
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux gives a CPU's large tensors pages of 2 MiB
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels for CPUs at every import
    # where it is installed, bitsandbytes and transformers fetch code by it; none runs here that was not installed
    sys.modules.setdefault("kernels", None)  # pyrefly: ignore[no-matching-overload]  None: not to be imported
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries warning their developers, not our users
    return guarded(terminal or Terminal(), lambda: None, lambda: run_line(argv, terminal))


def run_line(argv: list[str], terminal: Terminal | None) -> int:
    """Read a command line and run what it asks for: the wizard, or one command."""
    try:
        call = parse(argv)
    except SystemExit as done:  # --help and --version have printed what was asked
        try:
            print(end="", flush=True)
        except OSError:  # told by the boundary, and not once more by Python
            silence_stdout()
            raise
        return int(done.code or 0)
    terminal = terminal or open_terminal(call.plain)
    terminal.says_yes = call.yes
    catch_signals()
    if not call.command:
        return start_wizard(terminal)
    configs: list[Any] = []
    return guarded(
        terminal, lambda: output_folder(configs[-1]) if configs else None, lambda: run_call(call, configs, terminal)
    )


def catch_signals() -> None:
    """Ctrl-C, SIGTERM and a closed window stop what runs; a signal that was ignored at the start (nohup) stays so."""

    def as_ctrl_c(_signum: int, _frame: object) -> None:
        if time.monotonic() - StopRequest.obeyed_at > GRACE_SECONDS:  # else a launcher sends again what was obeyed
            StopRequest.raised_at = time.monotonic()
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, as_ctrl_c)


def open_terminal(plain: bool) -> Terminal:
    """The terminal that fits: Rich where there is someone to see it and plain was not asked for."""
    if plain or wants_plain(sys.stdout):
        return Terminal()
    from sidestep.terminal.rich_terminal import RichTerminal

    return RichTerminal()


def run_call(call: Call, running: list[Any], terminal: Terminal) -> ExitStatus:
    """Run what a call asks for, one config after the other; the first one that fails ends it.

    `running` receives each config as it starts, so that the boundary knows where its log belongs.
    """
    notes: list[Event] = []
    name = call.preset
    if call.vram_profile:
        name, why = profile_of(call)
        notes.append(Decision(what="profile", value=name, reason=why))
    preset = presets.find(name) if name else None
    values = preset.values if preset else {}
    if call.config:
        every = {name: o for command in COMMANDS.values() for name, o in options_of(command.config).items()}
        of_run, unknown = presets.checked(run_settings(call.config), every, f"--config {call.config}")
        if unknown:
            message = f"{call.config}: ignored, because no command has such a setting: {', '.join(unknown)}."
            notes.append(Notice(message=message, level="warning"))
        values = of_run | values
    configs = configs_of(call, values)
    notes += notes_of(call, configs, values)
    if preset and preset.unknown:
        unknown = f"ignored, because no command has such a setting: {', '.join(preset.unknown)}."
        notes.append(Notice(message=f"Preset {preset.name}: {unknown}", level="warning"))
    if call.dry_run:
        say_what_would_happen(configs[0], terminal, call.dry_run == "json", notes)
        if configs[1:]:
            terminal.note("The training that follows can be foreseen once its tensors are there.")
        return ExitStatus.OK
    worst = ExitStatus.OK
    for config in configs:
        running.append(config)
        try:
            status = run_config(config, terminal, notes)
        except (Interrupted, KeyboardInterrupt):
            if config is configs[-1]:
                raise
            raise Interrupted(command_line(*configs)) from None
        if status not in (ExitStatus.OK, ExitStatus.SOME_FAILED):
            return status
        worst, notes = max(worst, status), []
    return worst


def say_what_would_happen(config: Any, terminal: Terminal, json_alone: bool, notes: Sequence[Event] = ()) -> None:
    """`--dry-run` of one config; nothing is written, no log either."""
    check_folders(config)
    from sidestep.tasks.dry_run import dry_run

    if json_alone:
        terminal.out.write(json.dumps([asdict(line) for line in dry_run(config, null)]) + "\n")
        return
    with showing(terminal) as report:
        for note in notes:
            report(note)
        dry_run(config, report)


def run_config(config: Any, terminal: Terminal, notes: Sequence[Event] = (), in_wizard: bool = False) -> ExitStatus:
    """Run the task of one config; its events are shown, and kept in `events.jsonl` of its output folder.

    in_wizard: what to do next is asked there, so the commands for it are not shown.
    """
    model = check_folders(config)
    one_of_many = int(os.environ.get("RANK", "0")) > 0  # the first process of a group speaks for all
    if one_of_many or getattr(config, "json", False):  # nothing but JSON on the output
        load_what_it_needs(config, null, model)
        return run(config, null, terminal)
    with ExitStack() as stack:
        folder = output_folder(config)
        if isinstance(config, TrainConfig):
            stack.enter_context(one_writer(config.output_dir))
        report = stack.enter_context(showing(terminal, in_wizard))
        load_what_it_needs(config, report, model)  # told, but not in the log, which would be made by it
        if folder is not None:
            log = EventLog(folder / "events.jsonl", report)
            stack.callback(log.close)
            report = tee(log, report)
        for note in notes:
            report(note)
        return run(config, report, terminal)


@contextmanager
def showing(terminal: Terminal, in_wizard: bool = False) -> Iterator[Report]:
    """The terminal's view of events. It may go away: a closed pipe or a lost terminal ends the showing, not the job."""
    view = terminal.view()
    show: Report | None = view.__enter__()

    def report(event: Event) -> None:
        nonlocal show
        if show is not None:
            try:
                show(replace(event, next_commands=()) if in_wizard and isinstance(event, Finished) else event)
            except OSError:
                show = None
                silence_stdout()

    try:
        yield report
    finally:
        try:
            view.__exit__(None, None, None)  # it may draw a last time
        except OSError:
            silence_stdout()


def silence_stdout() -> None:
    """Point the stream elsewhere, so that Python's own flush at exit stays quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_folder(config: Any) -> Path | None:
    """The folder that a command writes its results to, where it has one of its own."""
    match config:
        case TrainConfig(output_dir=folder) | PreprocessConfig(tensor_output=folder) | DemoConfig(output_dir=folder):
            return folder
    return None


def start_wizard(terminal: Terminal) -> int:
    """The wizard, where someone can answer; otherwise the help and what to do instead."""
    if terminal.interactive:
        return guarded(terminal, lambda: None, lambda: run_wizard(terminal))
    terminal.print(global_parser().format_help())
    terminal.error(
        "No command, and no terminal to ask in.",
        "The wizard needs a terminal; in a notebook or a script use a command from the list above.",
    )
    return ExitStatus.USAGE


def run_wizard(terminal: Terminal) -> ExitStatus:
    """Ask, run what was chosen, ask again, until the user leaves."""
    ask, show = asking(terminal)
    wizard = Wizard(ask, show, outside(terminal))
    while (chosen := wizard.next()) is not None:
        job = partial(run_config, chosen.config, terminal, in_wizard=True)
        status = guarded(terminal, partial(output_folder, chosen.config), job)
        some_failed = status == ExitStatus.SOME_FAILED
        wizard.finished(chosen, status == ExitStatus.OK or some_failed, status == ExitStatus.INTERRUPTED, some_failed)
    terminal.print("Goodbye.")
    return ExitStatus.OK


def asking(terminal: Terminal) -> tuple[Ask, Report]:
    """How questions are asked and lines shown on this terminal: with cursor keys where it can, numbered otherwise."""
    if terminal.plain or not can_draw():
        return NumberedAsk(terminal), PlainView(terminal.print)
    from sidestep.terminal.rich_terminal import RichTerminal, is_for_pasting, shown
    from sidestep.wizard.prompts import QuestionaryAsk

    assert isinstance(terminal, RichTerminal)

    def show(event: Event) -> None:
        terminal.console.print(shown(visible_event(event), terminal.unicode), soft_wrap=is_for_pasting(event))

    return QuestionaryAsk(terminal), show


def can_draw() -> bool:
    """False in the one window that says it is a terminal and is none: a Windows program in mintty (Git Bash)."""
    return not (sys.platform == "win32" and os.environ.get("MSYSTEM") and os.environ.get("TERM_PROGRAM") == "mintty")


def guarded(terminal: Terminal, log_folder: Callable[[], Path | None], job: Callable[[], int]) -> int:
    """Run a job and return its exit status; whatever it raises is told in the user's words.

    `log_folder`: the run's output folder, where a traceback goes (None: the platform's folder for logs).
    """
    began = time.monotonic()
    try:
        return int(job())
    except Interrupted as stopped:
        terminal.note("Stopped; saved." + (f" Go on with:\n  {stopped.resume}" if stopped.resume else ""))
        return ExitStatus.INTERRUPTED
    except KeyboardInterrupt:
        StopRequest.raised_at = -math.inf  # obeyed
        terminal.note("Stopped.")
        return ExitStatus.INTERRUPTED
    except UserError as error:
        if error.status == ExitStatus.FAILED and (folder := log_folder()) is not None and folder.is_dir():
            write_log(folder)
        terminal.error(error.problem, error.fix)
        return error.status
    except BrokenPipeError:  # the reader of an answer (head, less) has what it wanted
        silence_stdout()
        return ExitStatus.OK
    except Exception as error:  # noqa: BLE001  this is the boundary
        if StopRequest.raised_at > began:  # an import that Ctrl-C broke off fails in ways of its own
            terminal.note("Stopped.")
            return ExitStatus.INTERRUPTED
        return _unexpected(error, terminal, log_folder())


def _unexpected(error: Exception, terminal: Terminal, folder: Path | None) -> ExitStatus:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "torch":
        terminal.error(
            "PyTorch is not installed.",
            f"Install the build for this machine, then run the command again:\n  {INSTALL_TORCH}",
        )
        return ExitStatus.FAILED
    log = write_log(folder)
    where = f"The details are in {log}." if log else "The log could not be written."
    if isinstance(error, OSError) and error.strerror:
        fix = f"{RETYPE.get(error.errno or 0, '')} {where}".strip()
        terminal.error(f"{error.strerror}: {error.filename or 'no file named'}.", fix)
    else:
        first = str(error).strip().split("\n")[0][:200]
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
        terminal.error(f"Something went wrong that Side-Step did not expect ({what}).", where)
    return ExitStatus.FAILED


def write_log(folder: Path | None) -> Path | None:
    """Append the current exception's traceback to `sidestep.log`; the file, or None where no folder takes it."""
    versions = f"Side-Step {__version__} Python {platform.python_version()} {sys.platform}"
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {versions}\n{' '.join(sys.argv)}\n{traceback.format_exc()}\n"
    for place in [folder, state_folder(), Path.cwd()]:
        if place is None:
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / "sidestep.log").open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)
        except OSError:
            continue
        return place / "sidestep.log"
    return None
