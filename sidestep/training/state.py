"""Training state on disk: whole or absent, never half. A checkpoint holds all that a run needs to go on as if it had not stopped."""

import json
import os
import pickle
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sidestep.errors import JobError, UserError

STATE_FILE = "training_state.pt"
COMPLETE_FILE = "complete.json"  # written last: names every file and its size
TEMPORARY = ".saving-"


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next optimizer step is step `step_in_epoch` of `epoch`; `step` are done in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


def write_checkpoint(folder: Path, state: dict[str, Any], position: Position, write_adapter) -> None:
    """Write a checkpoint beside its place and move it there once it is whole.

    write_adapter(folder): writes the adapter's files as other programs read them. An older checkpoint of the same name is replaced only then.
    """
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_adapter(temporary)
    torch.save(state, temporary / STATE_FILE)
    files = {p.relative_to(temporary).as_posix(): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    for name in files:
        _sync(temporary / name)
    facts = {"position": asdict(position), "files": files}
    with (temporary / COMPLETE_FILE).open("w", encoding="utf-8") as f:
        json.dump(facts, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    if not is_complete(temporary):
        raise JobError(f"{temporary}: what was written is not what stands on disk.", "Check the disk; the older checkpoints are untouched.")
    if folder.exists():
        old = folder.with_name(f"{TEMPORARY}old-{folder.name}-{os.getpid()}")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)


def _sync(path: Path) -> None:
    with path.open("rb+") as f:
        os.fsync(f.fileno())


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What the file that is written last says, or None where it is missing or broken."""
    try:
        facts = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
        return facts if isinstance(facts, dict) and isinstance(facts.get("files"), dict) else None
    except (OSError, ValueError):
        return None


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there in its full size."""
    facts = read_facts(folder)
    if facts is None:
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in facts["files"].items())


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first by optimizer step."""
    found = [p for p in (output_dir / "checkpoints").glob("*") if p.is_dir() and not p.name.startswith(".") and is_complete(p)]
    return sorted(found, key=lambda p: (read_facts(p) or {})["position"]["step"])


def find_checkpoint(resume_from: Path, output_dir: Path) -> Path:
    """The checkpoint that `--resume-from` means; `latest` looks in `--output-dir`. Raises UserError."""
    if str(resume_from) != "latest":
        if is_complete(resume_from):
            return resume_from
        there = complete_checkpoints(output_dir)
        fix = f"Whole ones: {', '.join(str(p) for p in there[-3:])}" if there else "Start anew without --resume-from."
        raise UserError(f"--resume-from {resume_from}: not a whole checkpoint of this program.", fix)
    there = complete_checkpoints(output_dir)
    if not there:
        raise UserError(
            f"--resume-from latest: no whole checkpoint in {output_dir / 'checkpoints'}.", "Start anew without --resume-from, or name a checkpoint folder."
        )
    return there[-1]


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Position]:
    """(state, position) of a checkpoint. Nothing but tensors and plain values is unpickled. Raises JobError."""
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        return state, Position(**(read_facts(folder) or {})["position"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise JobError(
            f"{folder}: not readable ({str(error).splitlines()[0] if str(error) else type(error).__name__}).",
            "Resume from an older checkpoint: --resume-from FOLDER",
        ) from None


def snapshot(value: Any) -> Any:
    """A copy on the CPU of nested tensors, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(v) for v in value)
    return value


class BackgroundWriter:
    """Runs one write at a time beside training; a failure surfaces at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write) -> None:
        """Begin a write once the one before it has ended."""
        self.wait()

        def work() -> None:
            try:
                write()
            except (OSError, RuntimeError, JobError) as error:  # handed to the training thread, which raises it
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Until the write under way has ended. Raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def prune(output_dir: Path, keep: int) -> None:
    """Delete the oldest whole checkpoints beyond `keep` (0 keeps all) and leftovers of interrupted saves."""
    checkpoints = output_dir / "checkpoints"
    for leftover in checkpoints.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep:
        for old in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
