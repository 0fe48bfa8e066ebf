"""What the wizard asks of the world outside it: songs are counted here, and what needs torch runs in a process of its own."""

import json
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Table
from sidestep.settings.config import DoctorConfig, PlanConfig, TrainConfig, command_words
from sidestep.settings.option import changed_from_defaults, options_of, resolve
from sidestep.settings.path_checks import count_tensors
from sidestep.wizard.session import Outside
from sidestep.words import clock, count, gib

LOOK_SECONDS = 1.5  # a library of thousands is not read to its end for one line of text
WAIT_SECONDS = 40  # for an answer that needs torch; without it the wizard goes on


def outside(here: Path = Path()) -> Outside:
    """The wizard's view of the world."""
    return Outside(songs=_songs, machine=_machine, about=_about, here=here)


def _songs(folder: Path) -> str:
    """`12 songs, 47:10`. Raises UserError where there are none."""
    return _counted(folder.expanduser().resolve())


@lru_cache(maxsize=32)
def _counted(folder: Path) -> str:
    from sidestep.audio.io import AudioError, find_audio, probe

    if not folder.is_dir():
        raise UserError("There is no such folder.")
    songs = find_audio(folder)
    if not songs:
        raise UserError("No audio files in there.")
    seconds, unread, deadline = 0.0, 0, time.monotonic() + LOOK_SECONDS
    for number, song in enumerate(songs):
        if time.monotonic() > deadline:
            unread = len(songs) - number
            break
        try:
            seconds += probe(song).seconds
        except AudioError:
            unread += 1
    found = count(len(songs), "song")
    return f"{found}, {'more than ' if unread else ''}{clock(seconds)} of music"


def _machine(checkpoint_dir: Path | None) -> Table | None:
    findings = _json_of(tuple(command_words(DoctorConfig(json=True, checkpoint_dir=checkpoint_dir))))
    if not isinstance(findings, list):
        return None
    wanted = ("device", "device memory", "precision", "attention", "checkpoints", "free disk")
    rows = tuple((f["what"], f["value"], f["note"]) for f in findings if f["what"] in wanted)
    return Table(title="This machine", columns=("what", "value", "note"), rows=rows)


def _about(config: Any) -> list[str]:
    """Lines for the review: the data, and whether the run fits into memory."""
    lines = []
    if isinstance(config, TrainConfig):
        lines.append(f"Data: {count_tensors(config.dataset_dir):,} songs as tensors in {config.dataset_dir}")
        lines += _memory(config)
    return lines


def _memory(config: TrainConfig) -> list[str]:
    options = options_of(PlanConfig)
    shared = {name: value for name, value in changed_from_defaults(config).items() if name in options}
    plan = _json_of(tuple(command_words(resolve(PlanConfig, shared, {"json": True}))))
    if not isinstance(plan, dict):
        return ["Memory: not worked out in time; train.py plan has the answer"]
    needed, there, fits = gib(plan["asked"]["needed_bytes"]), plan["device_bytes"], plan["fits"]
    if fits is None:
        return [f"Memory: {needed} at most for songs of four minutes (no GPU found to compare with)"]
    lines = [
        f"Memory: {needed} at most of {gib(there)} for songs of four minutes: {'fits' if fits else 'DOES NOT FIT'}"
    ]
    if not fits and plan["best"]:
        lines.append(f"It would fit with: {' '.join(plan['best']['flags'])}")
    return lines


@lru_cache(maxsize=8)  # a review that is shown again has the same answer
def _json_of(arguments: tuple[str, ...]) -> Any:
    """What a command of ours prints as JSON, or None: the wizard goes on without it. Ctrl-C skips the wait."""
    command = [sys.executable, str(Path(__file__).resolve().parents[2] / "train.py"), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=WAIT_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError, KeyboardInterrupt):
        return None
