"""Training state on disk: whole or absent, never half. A checkpoint holds all that a run needs to go on as if it had not stopped.

The output folder of a run: what was asked for, and whether a run may begin or go on there.
"""

import json
import os
import pickle
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sidestep.errors import JobError, UserError
from sidestep.events import Event, Notice, Report
from sidestep.files import replacing, write_text
from sidestep.settings.config import TrainConfig, command_line
from sidestep.settings.option import as_json_values, options_of
from sidestep.tasks.train.processes import whole

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


def write_checkpoint(
    folder: Path, state: dict[str, Any], position: Position, write_adapter: Callable[[Path], None]
) -> None:
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
                raise JobError(
                    f"{folder}: what was written is not what stands on disk.",
                    "Check the disk; the older checkpoints are untouched.",
                )

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
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in facts["files"].items()
    )


def position_of(folder: Path) -> Position:
    """Where a whole checkpoint stands."""
    return Position(**(read_facts(folder) or {})["position"])


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first by optimizer step."""
    found = [
        p
        for p in (output_dir / "checkpoints").glob("*")
        if p.is_dir() and not p.name.startswith(".") and is_complete(p)
    ]
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
            f"--resume-from latest: no whole checkpoint in {output_dir / 'checkpoints'}.",
            "Start anew without --resume-from, or name a checkpoint folder.",
        )
    return there[-1]


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Position]:
    """(state, position) of a checkpoint. Nothing but tensors and plain values is unpickled. Raises JobError."""
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        return state, position_of(folder)
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(
            f"{folder}: not readable ({reason[:200]}).",
            f"Move {folder} away; --resume-from latest then takes the checkpoint before it.",
        ) from None


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
            except (
                OSError,
                RuntimeError,
                ValueError,
                JobError,
            ) as error:  # handed to the training thread, which raises it
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


# What may not change when a run goes on: the saved tensors or the order of the data would not fit.
FIXED_ON_RESUME = (
    *(
        "adapter_type",
        "rank",
        "alpha",
        "target_modules",
        "attention_type",
        "self_target_modules",
        "cross_target_modules",
        "target_mlp",
    ),
    *(
        "lokr_factor",
        "lokr_decompose_both",
        "lokr_weight_decompose",
        "optimizer_type",
        "batch_size",
        "chunk_duration",
        "val_split",
        "seed",
    ),
)
# What says where things are, or had its effect at the start.
NOT_COMPARED = (
    *(
        "checkpoint_dir",
        "model_variant",
        "dataset_dir",
        "output_dir",
        "resume_from",
        "run_name",
        "device",
        "attention",
        "compile",
    ),
    *("ignore_rank_map", "init", "init_from", "gradient_accumulation"),
)


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint that a run goes on from."""

    folder: Path
    state: dict[str, Any]
    position: Position

    @property
    def config(self) -> dict[str, Any]:
        return self.state["config"]


def resume_command(config: TrainConfig) -> str:
    """The command that goes on from the newest checkpoint of a run, started as this one was."""
    line = command_line(replace(config, resume_from=Path("latest")))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    launcher = (
        "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else f"torchrun --nproc-per-node {processes}"
    )
    return line.replace("uv run train.py", f"uv run {launcher} train.py", 1) if processes > 1 else line


def require_writable(folder: Path) -> None:
    """Make the output folder and try it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder, folder / "checkpoints"):
            restore(parent)
        with replacing(folder / "command.txt.try") as temporary:
            temporary.touch()
        (folder / "command.txt.try").unlink()
    except OSError as error:
        raise UserError(
            f"--output-dir {folder}: cannot be written ({error.strerror}).",
            "Choose a folder on a disk with room where you may write.",
        ) from None


def open_folder(config: TrainConfig, report: Report) -> SavedRun | None:
    """Look at the output folder before anything is loaded: the checkpoint to go on from, None for a run that begins. It changes nothing.

    Raises UserError when another run stands there, when there is nothing to go on from, and for a setting that may not change.
    """
    folder = config.output_dir
    if not config.resume_from:
        if complete_checkpoints(folder) or (folder / "final").is_dir():
            go_on = command_line(replace(config, resume_from=Path("latest")))
            raise UserError(
                f"--output-dir {folder}: a run already stands there.",
                f"Go on with it: {go_on}\nor give this run a folder of its own: --output-dir {folder}-2",
            )
        return None
    source = find_checkpoint(config.resume_from, folder)
    state, position = read_checkpoint(source)
    later = [path for path in complete_checkpoints(folder) if position_of(path).step > position.step]
    if later:
        raise UserError(
            f"--resume-from {source}: {later[-1]} goes further; going on from here would mix two runs in one folder.",
            f"Give this one a folder of its own: --output-dir {folder}-2\nor go on from the newest: --resume-from latest",
        )
    _compare(config, state["config"], source, report)
    return SavedRun(source, state, position)


def _compare(config: TrainConfig, saved: dict[str, Any], folder: Path, report: Report) -> None:
    now, options = as_json_values(config), options_of(TrainConfig)
    different = [name for name in now if name in saved and saved[name] != now[name] and name not in NOT_COMPARED]
    refused = [name for name in different if name in FIXED_ON_RESUME]
    if refused:
        what = ", ".join(f"{options[name].flag} is {_words(now[name])}, was {_words(saved[name])}" for name in refused)
        raise UserError(
            f"--resume-from {folder}: {what}.",
            "Resume with the settings of that run, or start a new run in another --output-dir.",
        )
    for name in different:
        report(Notice(message=f"Resumed with {options[name].flag} {_words(now[name])}, before {_words(saved[name])}"))


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def require_same_data(saved: SavedRun, songs: dict[str, str], config: TrainConfig) -> None:
    """Raises UserError unless the songs are those of the saved run. songs: name and fingerprint of each."""
    before = saved.state["songs"]
    gone, new = sorted(set(before) - set(songs)), sorted(set(songs) - set(before))
    changed = sorted(name for name in set(before) & set(songs) if before[name] != songs[name])
    differences = [
        f"{len(names)} {what} ({names[0]})"
        for names, what in ((gone, "missing"), (new, "new"), (changed, "changed"))
        if names
    ]
    if differences:
        raise UserError(
            f"--resume-from {saved.folder}: the songs in {config.dataset_dir} are not those of that run: {', '.join(differences)}.",
            f"Put them back as they were, or start a new run from this adapter: --init-from {saved.folder} --output-dir {config.output_dir}-2",
        )


def require_same_steps(saved: SavedRun, micro_batches: int, config: TrainConfig) -> None:
    """Raises UserError unless an optimizer step holds as many micro-batches as in the saved run, over all processes."""
    before = saved.state["micro_batches"]
    if before != micro_batches:
        raise UserError(
            f"--resume-from {saved.folder}: --gradient-accumulation times the number of processes is {micro_batches}, was {before}.",
            f"Choose --gradient-accumulation so that the product is {before} again, or start a new run in another --output-dir.",
        )


def write_settings(config: TrainConfig) -> None:
    """Write config.json and command.txt. Raises OSError."""
    write_text(
        config.output_dir / "config.json", json.dumps(as_json_values(config), indent=2, ensure_ascii=False) + "\n"
    )
    write_text(config.output_dir / "command.txt", command_line(config) + "\n")
