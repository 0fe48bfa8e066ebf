"""What the wizard asks of the world outside it: songs are counted here, what needs torch runs in its own process."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Table
from sidestep.settings.advice import advice_for, doubt_about_tag
from sidestep.settings.config import RANK_MAP, BuildDatasetConfig, DoctorConfig, TrainConfig, command_words
from sidestep.settings.path_checks import SHORT_SECONDS, Check, brief, verify
from sidestep.terminal.terminal import Terminal
from sidestep.wizard.review import Knowledge
from sidestep.wizard.session import Outside
from sidestep.words import clock, count, side_step

COUNT_SECONDS = 1.5  # a library of thousands is not read to its end for one line of text
FORESEEN = ("steps", "time", "memory", "disk")  # of what a dry run says
SHOWN = ("device", "device memory", "training", "precision", "checkpoints", "free disk")  # of the doctor's findings


def outside(terminal: Terminal, here: Path = Path()) -> Outside:
    """The wizard's view of the world. What takes a while says so on the terminal, and ends with Ctrl-C."""

    def check(holds: str, path: Path) -> str:
        try:
            with terminal.waiting(f"Looking at {path} (Ctrl-C: stop) ..."):
                return verify(holds, path, lambda folder: songs_in(folder.expanduser().resolve()))
        except KeyboardInterrupt:
            fix = "Name a folder nearer to the files, or press Enter to look again."
            raise UserError(f"Stopped looking at {path}.", fix) from None

    return Outside(check, machine, Knowledge(partial(data, check), foreseen), open_file, here)


@lru_cache(maxsize=32)
def songs_in(folder: Path) -> str:
    """`12 songs, 47:10 of music, 2 of them under 10 s`. Raises UserError where there are none."""
    from sidestep.audio.io import AudioError, find_audio, probe

    if not folder.is_dir():
        raise UserError("There is no such folder.")
    songs = find_audio(folder)
    if not songs:
        raise UserError("No audio files in there.")
    seconds, short, unread, deadline = 0.0, 0, 0, time.monotonic() + COUNT_SECONDS
    for number, song in enumerate(songs):
        if time.monotonic() > deadline:
            unread = len(songs) - number
            break
        try:
            length = probe(song).seconds
            seconds, short = seconds + length, short + (length < SHORT_SECONDS)
        except AudioError:
            unread += 1
    return f"{count(len(songs), 'song')}, {'more than ' if unread else ''}{clock(seconds)} of music{brief(short)}"


def machine(checkpoint_dir: Path | None) -> Table | None:
    """What `doctor` finds of this machine, or None."""
    findings = json_of(*command_words(DoctorConfig(json=True, checkpoint_dir=checkpoint_dir)))
    if not isinstance(findings, list):
        return None
    rows = tuple(
        ("" if model else f["what"], value, "" if model else f["note"])
        for f in findings
        if f["what"] in SHOWN
        for model, value in enumerate(re.split(r"(?<=\)), ", f["value"]))  # one below the other
    )
    return Table(title="This machine", columns=("what", "value", "note"), rows=rows)


def data(check: Check, config: Any) -> list[str]:
    """Lines for the review: a training's songs and where its ranks come from, a list's doubtful trigger word."""
    if isinstance(config, BuildDatasetConfig) and (doubt := doubt_about_tag(config.tag or "")):
        return [doubt]
    if not isinstance(config, TrainConfig):
        return []
    try:
        lines = [f"Data: {check('tensors', config.dataset_dir)} in {config.dataset_dir}"]
    except UserError as error:
        lines = [f"Data: {error.problem}"]
    if not config.ignore_rank_map and (config.dataset_dir / RANK_MAP).is_file():
        lines.append(f"Ranks: measured, from {config.dataset_dir / RANK_MAP}; they go before the rank above.")
    if config.resume_from is None and (advice := advice_for(vars(config))):
        lines += [f"Suggested: {advice.value} ({advice.reason}):", f"  {advice.flags}"]
    return lines


def foreseen(config: Any) -> list[str]:
    """Lines for the review of a training run: steps, time, memory and disk, as `--dry-run` says them. Takes seconds."""
    if not isinstance(config, TrainConfig):
        return []
    words = (*command_words(config), "--dry-run-as-json")
    lines = json_of(*words)
    if not isinstance(lines, list):
        return [f"Memory: not worked out here; this tells it: {side_step(*words[:-1], '--dry-run')}"]
    return [f"{line['what'].capitalize()}: {line['value']}" for line in lines if line["what"] in FORESEEN]


def open_file(path: Path) -> str:
    """Show a page or a folder, or play music, with the program that the system has for it; a line that says so.

    Without a screen, such as over ssh, the line says where the file is.
    """
    path = path.resolve()
    if sys.platform == "win32":
        os.startfile(path)
        return f"Opened {path}."
    program = "open" if sys.platform == "darwin" else "xdg-open"
    has_screen = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if not has_screen or not (found := shutil.which(program)):
        return f"No screen to show it on; it is here: {path}"
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([found, str(path)], start_new_session=True, **silent)
    return f"Opened {path}."


@lru_cache(maxsize=8)  # a review that is shown again has the same answer
def json_of(*words: str) -> Any:
    """What a command of ours prints as JSON, or None: the wizard goes on without it.

    It takes as long as the machine needs; Ctrl-C skips the wait.
    """
    # -P keeps the user's folder, where a file may be called like a module, out of the search; ours is put into it.
    command = [sys.executable, "-P", "-m", "sidestep.cli", *words]
    home = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(home)},
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError, KeyboardInterrupt):
        return None
