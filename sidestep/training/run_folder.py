"""The output folder of a run: what was asked for, what was saved, and the command that goes on from there."""

import json
import shlex
from pathlib import Path

import torch

from sidestep.adapters.attach import adapter_state, load_adapter_state
from sidestep.adapters.export import save_final
from sidestep.atomic import write_text
from sidestep.config import TrainConfig
from sidestep.errors import JobError, UserError
from sidestep.events import Notice, Saved
from sidestep.options import as_arguments, as_json_values, changed_from_defaults, options_of
from sidestep.training.setup import Run
from sidestep.training.state import complete_checkpoints, find_checkpoint, prune, read_checkpoint, snapshot, write_checkpoint

# What may not change when a run goes on: the tensors or the order of the data would not fit.
FIXED_ON_RESUME = (
    "adapter_type",
    "rank",
    "alpha",
    "target_modules",
    "attention_type",
    "self_target_modules",
    "cross_target_modules",
    "target_mlp",
    "lokr_factor",
    "lokr_decompose_both",
    "lokr_weight_decompose",
    "optimizer_type",
    "batch_size",
    "gradient_accumulation",
    "chunk_duration",
    "seed",
)
WHERE = ("checkpoint_dir", "dataset_dir", "output_dir", "resume_from", "run_name", "device")


def command_of(config: TrainConfig, **changes: object) -> str:
    """The command line that gives this config, as a user would type it."""
    values = {**changed_from_defaults(config), **changes}
    arguments = as_arguments(type(config)(**{k: v for k, v in values.items() if k in options_of(type(config))}))
    return shlex.join(["train.py", "fixed", *arguments])


def resume_command(run: Run) -> str:
    """The command that goes on from the newest checkpoint of a run."""
    return "uv run " + command_of(run.config, resume_from=Path("latest"))


def prepare(config: TrainConfig) -> None:
    """Make the output folder and write config.json and command.txt.

    Raises UserError when another run stands there and is not resumed: nothing of it may be overwritten.
    """
    folder = config.output_dir
    if not config.resume_from and (complete_checkpoints(folder) or (folder / "final").is_dir()):
        go_on = command_of(config, resume_from=Path("latest"))
        raise UserError(
            f"--output-dir {folder}: a run already stands there.", f"Go on with it: {go_on}\nor give this run a folder of its own: --output-dir {folder}-2"
        )
    try:
        write_text(folder / "config.json", json.dumps(as_json_values(config), indent=2, ensure_ascii=False) + "\n")
        write_text(folder / "command.txt", command_of(config) + "\n")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror}).", "Choose a folder you may write to.") from None


def save_checkpoint(run: Run, name: str) -> None:
    """Snapshot the whole state and write it beside the training that goes on. Raises JobError rather than save a number that is none."""
    if not run.accelerator.is_main_process:
        return
    adapter = snapshot(adapter_state(run.model))
    broken = [key for key, tensor in adapter.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise JobError(
            f"The adapter holds values that are no numbers ({broken[0]}); it was not saved.",
            f"Go on from the last good checkpoint with a lower --lr: {resume_command(run)}",
        )
    state = {
        "adapter": adapter,
        "optimizer": snapshot(run.optimizer.state_dict()),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else {},
        "config": as_json_values(run.config),
        "total_steps": run.total_steps,
        "model": run.checkpoint.identity(),
    }
    folder, position = run.config.output_dir / "checkpoints" / name, run.position

    def write() -> None:
        write_checkpoint(folder, state, position, lambda temporary: save_final(run.model, temporary, run.config, state=adapter))
        prune(run.config.output_dir, run.config.keep_checkpoints)
        run.report(Saved(what="checkpoint", path=str(folder)))

    run.writer.start(write)


def save_final_adapter(run: Run) -> Path:
    """Write `final/`, which every program reads at the same strength."""
    folder = run.config.output_dir / "final"
    if run.accelerator.is_main_process:
        save_final(run.model, folder, run.config)
        run.report(Saved(what="final", path=str(folder)))
    return folder


def resume(run: Run) -> None:
    """Put a saved state into a run that was set up, and say what differs. Raises UserError for a setting that may not change."""
    folder = find_checkpoint(run.config.resume_from, run.config.output_dir)
    state, position = read_checkpoint(folder)
    _compare(run, state["config"], folder)
    if state["model"] != run.checkpoint.identity():
        raise UserError(
            f"--resume-from {folder}: was trained on another base model than {run.checkpoint.folder}.",
            "Use the --checkpoint-dir and --model-variant of that run.",
        )
    load_adapter_state(run.model, state["adapter"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.position = position
    _schedule_from_here(run, state["total_steps"])
    run.report(Notice(message=f"Resumed {folder.name}: {position.step} of {run.total_steps} optimizer steps are done"))


def _compare(run: Run, saved: dict, folder: Path) -> None:
    now, options = as_json_values(run.config), options_of(TrainConfig)
    different = [name for name in saved if name in now and saved[name] != now[name] and name not in WHERE]
    refused = [name for name in different if name in FIXED_ON_RESUME]
    if refused:
        what = ", ".join(f"{options[name].flag} is {now[name]}, was {saved[name]}" for name in refused)
        raise UserError(f"--resume-from {folder}: {what}.", "Resume with the settings of that run, or start a new run in another --output-dir.")
    for name in different:
        run.report(Notice(message=f"Resumed with {options[name].flag} {now[name]}, before {saved[name]}"))


def _schedule_from_here(run: Run, steps_before: int) -> None:
    """Stand where this run's schedule stands at its position: it is a function of the step, so nothing of the old one is kept."""
    lr_before = run.optimizer.param_groups[0]["lr"]
    run.scheduler.last_epoch = run.position.step
    for group, base, factor in zip(run.optimizer.param_groups, run.scheduler.base_lrs, run.scheduler.lr_lambdas, strict=True):
        group.update(lr=base * factor(run.position.step), initial_lr=base, weight_decay=run.config.weight_decay)
    run.scheduler._last_lr = [group["lr"] for group in run.optimizer.param_groups]
    lr = run.scheduler.get_last_lr()[0]
    if steps_before != run.total_steps:
        message = f"The run is now {run.total_steps} steps long, was {steps_before}: its schedule was rebuilt, the learning rate goes from {lr_before:.3g} to {lr:.3g}"
        run.report(Notice(message=message, level="warning"))
