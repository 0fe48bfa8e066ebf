"""The output folder of a run: what was asked for, and whether a run may begin or go on there."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidestep.atomic import replacing, write_text
from sidestep.config import TrainConfig, command_line
from sidestep.errors import UserError
from sidestep.events import Notice, Report
from sidestep.options import as_json_values, options_of
from sidestep.training.state import Position, complete_checkpoints, find_checkpoint, position_of, read_checkpoint, restore

# What may not change when a run goes on: the saved tensors or the order of the data would not fit.
FIXED_ON_RESUME = (
    *("adapter_type", "rank", "alpha", "target_modules", "attention_type", "self_target_modules", "cross_target_modules", "target_mlp"),
    *("lokr_factor", "lokr_decompose_both", "lokr_weight_decompose", "optimizer_type", "batch_size", "chunk_duration", "val_split", "seed"),
)
# What says where things are, or had its effect at the start.
NOT_COMPARED = (
    *("checkpoint_dir", "model_variant", "dataset_dir", "output_dir", "resume_from", "run_name", "device", "attention", "compile"),
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
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else f"torchrun --nproc-per-node {processes}"
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
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror}).", "Choose a folder on a disk with room where you may write.") from None


def open_folder(config: TrainConfig, report: Report) -> SavedRun | None:
    """Look at the output folder before anything is loaded: the checkpoint to go on from, None for a run that begins. It changes nothing.

    Raises UserError when another run stands there, when there is nothing to go on from, and for a setting that may not change.
    """
    folder = config.output_dir
    if not config.resume_from:
        if complete_checkpoints(folder) or (folder / "final").is_dir():
            go_on = command_line(replace(config, resume_from=Path("latest")))
            raise UserError(
                f"--output-dir {folder}: a run already stands there.", f"Go on with it: {go_on}\nor give this run a folder of its own: --output-dir {folder}-2"
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
        raise UserError(f"--resume-from {folder}: {what}.", "Resume with the settings of that run, or start a new run in another --output-dir.")
    for name in different:
        report(Notice(message=f"Resumed with {options[name].flag} {_words(now[name])}, before {_words(saved[name])}"))


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def require_same_data(saved: SavedRun, songs: dict[str, str], config: TrainConfig) -> None:
    """Raises UserError unless the songs are those of the saved run. songs: name and fingerprint of each."""
    before = saved.state["songs"]
    gone, new = sorted(set(before) - set(songs)), sorted(set(songs) - set(before))
    changed = sorted(name for name in set(before) & set(songs) if before[name] != songs[name])
    differences = [f"{len(names)} {what} ({names[0]})" for names, what in ((gone, "missing"), (new, "new"), (changed, "changed")) if names]
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
    write_text(config.output_dir / "config.json", json.dumps(as_json_values(config), indent=2, ensure_ascii=False) + "\n")
    write_text(config.output_dir / "command.txt", command_line(config) + "\n")
