"""What a run writes: checkpoints, best/, ema/ and final/. Only the first process writes; training waits for a copy to the CPU, not for the disk."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sidestep.adapters.attach import adapter_state
from sidestep.adapters.write import Card, save_final
from sidestep.errors import JobError
from sidestep.events import Event, Notice, Saved
from sidestep.settings.option import as_json_values
from sidestep.tasks.train.checkpoints import (
    complete_checkpoints,
    position_of,
    prune,
    resume_command,
    snapshot,
    write_checkpoint,
    write_folder,
)
from sidestep.tasks.train.evaluation import average_state
from sidestep.tasks.train.run import Run

NO_ROOM = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


def save_checkpoint(run: Run, name: str) -> None:
    """Copy the whole state and write it beside the training that goes on. Raises JobError rather than save a number that is none."""
    state = _state(run)
    if not run.is_main:
        return
    folder, position = run.config.output_dir / "checkpoints" / name, run.position
    run.writer.wait()
    if any(position_of(path).step == position.step for path in complete_checkpoints(run.config.output_dir)):
        return  # resumed and stopped before the next step: it stands already
    best = run.history.best.step if run.history.best else None
    facts = card(run)

    def write() -> Iterator[Event]:
        write_checkpoint(
            folder, state, position, lambda new: save_final(run.model, new, run.config, state["adapter"], facts)
        )
        prune(run.config.output_dir, run.config.keep_checkpoints, best)
        yield Saved(what="checkpoint", path=str(folder))

    run.writer.start(write)


def save_best(run: Run) -> None:
    """Write `best/` beside the training that goes on."""
    tensors = _adapter(run)
    if not run.is_main:
        return
    folder, best, facts = run.config.output_dir / "best", run.history.best, card(run)

    def write() -> Iterator[Event]:
        write_folder(folder, lambda new: save_final(run.model, new, run.config, tensors, facts))
        yield Saved(what="best", path=str(folder))
        yield Notice(message=f"best/ is now the adapter of epoch {best.epoch}, {best.by} {best.loss:.4f}")

    run.writer.start(write)


def save_results(run: Run) -> Path:
    """Write `final/`, and `ema/` where a running average is kept, and wait for all that is being written."""
    folder = run.config.output_dir / "final"
    results = {folder: _adapter(run)}
    if run.average is not None:
        results[run.config.output_dir / "ema"] = average_state(run)
    if run.is_main:
        for place, tensors in results.items():
            run.writer.wait()
            write_folder(place, lambda new, tensors=tensors: save_final(run.model, new, run.config, tensors, card(run)))
            run.report(Saved(what=place.name, path=str(place)))
    run.processes.wait()
    return folder


def card(run: Run) -> Card:
    """What the model card says of the run."""
    songs = [*run.songs, *run.held_out]
    tags = {str(song.metadata.get("custom_tag") or "") for song in songs}
    return Card(
        name=run.config.run_name or run.config.output_dir.name,
        base_model=run.checkpoint.folder.name,
        base_identity=run.checkpoint.identity(),
        tag=tags.pop() if len(tags) == 1 else "",
        songs=len(run.songs),
        audio_seconds=round(sum(song.frames for song in run.songs) / run.frames_per_second, 1),
        steps=run.position.step,
        epochs=run.position.epoch,
        hints_ratio=run.config.hints_ratio,
    )


def cannot_save(run: Run, error: OSError) -> JobError:
    """What is said when a file cannot be written: what stands, and how to go on."""
    there = complete_checkpoints(run.config.output_dir)
    stands = (
        f"The last good state is {there[-1]} (optimizer step {position_of(there[-1]).step})."
        if there
        else "Nothing had been saved before."
    )
    if error.errno in NO_ROOM:
        problem, help_ = f"--output-dir {run.config.output_dir}: the disk is full.", "Free some space"
    else:
        problem, help_ = (
            f"--output-dir {run.config.output_dir}: cannot be written ({error.strerror or error}).",
            "Make it writable",
        )
    return JobError(
        f"{problem} {stands}",
        f"{help_}, then go on: {resume_command(run.config)}" if there else f"{help_}, then start again.",
    )


def _adapter(run: Run) -> dict[str, torch.Tensor]:
    tensors = snapshot(adapter_state(run.model))
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise JobError(
            f"The adapter holds values that are no numbers ({broken[0]}); it was not saved.",
            f"Go on from the last good checkpoint with a lower --lr: {resume_command(run.config)}",
        )
    return tensors


def _state(run: Run) -> dict[str, Any]:
    """All that a run needs to go on. There is no state of random generators: every draw follows from the seed and its place in the run."""
    return {
        "adapter": _adapter(run),
        "optimizer": snapshot(run.optimizer.state_dict()),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else {},
        "average": {"step": run.average.optimization_step, "tensors": snapshot(run.average.shadow_params)}
        if run.average
        else {},
        "history": run.history.as_values(),
        "config": as_json_values(run.config),
        "ranks": run.ranks,
        "total_steps": run.total_steps,
        "micro_batches": run.config.gradient_accumulation * run.processes.count,
        "model": run.checkpoint.identity(),
        "songs": run.fingerprints,
    }
