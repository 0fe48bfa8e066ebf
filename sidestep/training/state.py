"""Training state on disk: whole or absent, never half. A checkpoint holds all that a run needs to go on as if it had not stopped."""

import json
import os
import pickle
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sidestep.atomic import replacing, write_text
from sidestep.errors import JobError, UserError
from sidestep.events import Event, Report
from sidestep.training.processes import whole

STATE_FILE = "training_state.pt"
COMPLETE_FILE = "complete.json"  # written last: names every file and its size
NEW, OLD = ".saving-", ".replaced-"  # folders under way; whatever has such a name is no result


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next optimizer step is step `step_in_epoch` of `epoch`; `step` are done in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder and put it in the place of `folder` once it is whole. Raises what `fill` raises, with the old one untouched.

    A process killed between the two renames leaves the old folder under another name; `restore` brings it back.
    """
    new, old = folder.with_name(NEW + folder.name), folder.with_name(OLD + folder.name)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        fill(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def restore(parent: Path) -> None:
    """Bring back folders that a killed process had moved aside and remove what it had not finished."""
    for old in parent.glob(f"{OLD}*"):
        place = parent / old.name.removeprefix(OLD)
        if not place.exists():
            old.rename(place)
    for leftover in (*parent.glob(f"{NEW}*"), *parent.glob(f"{OLD}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def write_checkpoint(folder: Path, state: dict[str, Any], position: Position, write_adapter: Callable[[Path], None]) -> None:
    """Write a checkpoint and verify it before it takes its place.

    write_adapter(folder): writes the adapter's files as other programs read them. Raises OSError, JobError.
    """

    def fill(new: Path) -> None:
        write_adapter(new)
        with replacing(new / STATE_FILE) as temporary, temporary.open("wb") as f:
            torch.save(state, f)
        files = {p.relative_to(new).as_posix(): p.stat().st_size for p in sorted(new.rglob("*")) if p.is_file()}
        write_text(new / COMPLETE_FILE, json.dumps({"position": asdict(position), "files": files}, indent=1))
        with zipfile.ZipFile(new / STATE_FILE) as archive:
            if not is_complete(new) or archive.testzip() is not None:
                raise JobError(f"{folder}: what was written is not what stands on disk.", "Check the disk; the older checkpoints are untouched.")

    write_folder(folder, fill)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What the file that is written last says, or None where it is missing or broken."""
    try:
        facts = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
        Position(**facts["position"])
        return facts if isinstance(facts["files"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there in its full size."""
    facts = read_facts(folder)
    if facts is None:
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in facts["files"].items())


def position_of(folder: Path) -> Position:
    """Where a whole checkpoint stands."""
    return Position(**(read_facts(folder) or {})["position"])


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first by optimizer step."""
    found = [p for p in (output_dir / "checkpoints").glob("*") if p.is_dir() and not p.name.startswith(".") and is_complete(p)]
    return sorted(found, key=lambda p: position_of(p).step)


def find_checkpoint(resume_from: Path, output_dir: Path) -> Path:
    """The checkpoint that `--resume-from` means; `latest` looks in `--output-dir`. Raises UserError."""
    there = complete_checkpoints(output_dir)
    if str(resume_from) != "latest":
        if is_complete(resume_from):
            return resume_from
        fix = f"Whole ones: {', '.join(str(p) for p in there[-3:])}" if there else "Start anew without --resume-from."
        raise UserError(f"--resume-from {resume_from}: not a whole checkpoint of this program.", fix)
    if not there:
        raise UserError(
            f"--resume-from latest: no whole checkpoint in {output_dir / 'checkpoints'}.", "Start anew without --resume-from, or name a checkpoint folder."
        )
    return there[-1]


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Position]:
    """(state, position) of a checkpoint. Nothing but tensors and plain values is unpickled. Raises JobError."""
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        return state, position_of(folder)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(f"{folder}: not readable ({reason[:200]}).", f"Move {folder} away; --resume-from latest then takes the checkpoint before it.") from None


def snapshot(value: Any) -> Any:
    """A copy on the CPU of nested tensors, so that training may go on while it is written. Under FSDP all processes must take it."""
    if isinstance(value, torch.Tensor):
        return whole(value.detach()).to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(v) for v in value)
    return value


class BackgroundWriter:
    """Runs one write at a time beside training. What it reports, and what goes wrong, comes out in the thread that trains."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._events: list[Event] = []

    def start(self, write: Callable[[], Iterable[Event]]) -> None:
        """Begin a write once the one before it has ended."""
        self.wait()

        def work() -> None:
            try:
                self._events = list(write())
            except (OSError, RuntimeError, ValueError, JobError) as error:  # handed to the training thread, which raises it
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Settle a write that has ended; costs nothing while one is under way. Raises what went wrong in it."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the write under way has ended. Raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        events, self._events = self._events, []
        for event in events:
            self._report(event)


def prune(output_dir: Path, keep: int, also_keep_step: int | None = None) -> None:
    """Delete the oldest whole checkpoints beyond `keep` (0 keeps all), but not the one at the best step."""
    for old in complete_checkpoints(output_dir)[:-keep] if keep else []:
        if position_of(old).step != also_keep_step:
            gone = old.with_name(OLD + old.name)
            os.replace(old, gone)  # first out of sight: a half-deleted folder is no checkpoint
            shutil.rmtree(gone, ignore_errors=True)
