"""How good the adapter is after an epoch: its loss on held-out songs, whether it is the best so far, when to give up.

Validation runs over a fixed grid of windows, timesteps and noise: the same weights always give the same number.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from sidestep.data.batches import Song
from sidestep.events import LongTask, Notice, Validated
from sidestep.tasks.train.run import Evaluation, Run


def update_best(run: Run, epoch: int) -> bool:
    """Whether the adapter after `epoch` epochs is the best so far; validates it where that is due.

    By validation loss, of the adapter or of its running average, whichever is lower; without held-out songs by smoothed
    training loss. Every process must call it.
    """
    config, history, step = run.config, run.history, run.position.step
    counts = epoch > config.save_best_after
    if not run.held_out:
        smoothed = history.smoothed_loss()
        return smoothed is not None and counts and history.update_best(smoothed, step, epoch, "smoothed training loss")
    if epoch % config.validate_every and step < run.total_steps:
        return False
    loss, average_loss = grid_loss(run, run.held_out), None
    run.tensorboard.add_scalar("loss/validation", loss, step)
    if run.average is not None:
        with averaged(run):
            average_loss = grid_loss(run, run.held_out)
        run.tensorboard.add_scalar("loss/validation_ema", average_loss, step)
    history.evaluations.append(Evaluation(step, epoch, loss, average_loss))
    average = math.nan if average_loss is None else average_loss
    is_average = average < loss or (math.isfinite(average) and not math.isfinite(loss))
    lowest = average if is_average else loss
    is_best = counts and history.update_best(lowest, step, epoch, "validation loss", is_average)
    run.report(Validated(step=step, epoch=epoch, loss=loss, best=is_best))
    return is_best


def has_waited_enough(run: Run) -> bool:
    """Whether `--early-stop-patience` epochs or validations have passed without a new best; reports it."""
    best, patience, waited = run.history.best, run.config.early_stop_patience, run.history.judged
    if not patience or best is None or waited < patience:
        return False
    what = f"{waited} {'validations' if run.held_out else 'epochs'} (--early-stop-patience {patience})"
    run.report(
        Notice(message=f"Stopped early: no lower {best.by} than {best.loss:.4f} of epoch {best.epoch} in {what}")
    )
    return True


@torch.no_grad()
def grid_loss(run: Run, songs: list[Song], model: torch.nn.Module | None = None) -> float:
    """Mean loss of `songs` over the grid, without dropout of any kind. Every process must call it and does its share.

    model: by default the run's own. Its training mode is put back.
    """
    model = model or run.wrapped
    batches = run.objective.grid(songs)
    own = batches[run.processes.index :: run.processes.count]
    total = torch.zeros((), dtype=torch.float64 if run.device.type != "mps" else torch.float32, device=run.device)
    was_training = run.model.training
    run.model.eval()
    rounds = -(-len(batches) // run.processes.count)
    validated = LongTask(run.report, "Validation", rounds)
    try:
        for number in range(rounds):
            # all processes call the model equally often, as FSDP needs it
            cells = own[number] if number < len(own) else batches[0]
            loss = run.objective.grid_loss(model, songs, cells)
            if number < len(own):
                total += loss.sum()
            validated()
    finally:
        run.model.train(was_training)
    return run.processes.sum([total.item()])[0] / sum(len(cells.slots) for cells in batches)


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The running average (EMA) in place of the adapter's own tensors. Under FSDP all processes must enter it."""
    assert run.average is not None
    own = [p.detach().clone() for p in run.parameters]
    _set_parameters(run, run.average.shadow_params)
    try:
        yield
    finally:
        _set_parameters(run, own)


@torch.no_grad()
def _set_parameters(run: Run, tensors: Sequence[torch.Tensor]) -> None:
    for parameter, tensor in zip(run.parameters, tensors, strict=True):
        parameter.copy_(tensor)
    for module in run.wrapped.modules():
        if hasattr(module, "reshard"):  # FSDP's have it
            cast(Any, module).reshard()  # or the next forward pass would use what was gathered before
