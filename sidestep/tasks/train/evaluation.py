"""The running average of the adapter (EMA), kept beside its own tensors.

Loss on held-out songs over a fixed grid of windows, timesteps and noise: the same weights always give the same number.
After an epoch: how good the adapter is, whether it is the best so far, and whether waiting for a better one has become pointless.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from sidestep.adapters.attach import adapter_state
from sidestep.data.batches import Batch, Item, MicroBatch, Song, collate, nearest
from sidestep.events import Notice, Validated
from sidestep.seeding import seed_for
from sidestep.tasks.train.checkpoints import snapshot
from sidestep.tasks.train.run import Evaluation, Run


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """The running average in the place of the adapter's own tensors."""
    own = [p.detach().clone() for p in run.parameters]
    _put(run, run.average.shadow_params)
    try:
        yield
    finally:
        _put(run, own)


@torch.no_grad()
def _put(run: Run, tensors: Sequence[torch.Tensor]) -> None:
    for parameter, tensor in zip(run.parameters, tensors, strict=True):
        parameter.copy_(tensor)
    for module in run.wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # or the next forward pass would use what was gathered before


def average_state(run: Run) -> dict[str, torch.Tensor]:
    """The running average by the names of `adapter_state`, on the CPU. Under FSDP all processes must call it."""
    with averaged(run):
        return snapshot(adapter_state(run.model))


GRID_TIMESTEPS = 8  # midpoints of equally likely parts of the law: on turbo its eight steps
GRID_WINDOWS = 4  # of a song, evenly spaced


def grid(songs: list[Song], batch_size: int, hints: bool) -> list[MicroBatch]:
    """The cells of the grid in batches of one window each; a cell's slot is the number of its timestep."""
    batches = []
    for index, song in enumerate(songs):
        for item in _windows(song, index):
            for first in range(0, GRID_TIMESTEPS, batch_size):
                slots = tuple(range(first, min(first + batch_size, GRID_TIMESTEPS)))
                batches.append(MicroBatch((item,) * len(slots), slots, hints and song.hints is not None))
    return batches


def _windows(song: Song, index: int) -> list[Item]:
    if song.windows is None:
        return [Item(index, 0, song.frames)]
    starts = song.windows.starts
    wanted = [starts[-1] * i / (GRID_WINDOWS - 1) for i in range(GRID_WINDOWS)]
    places = dict.fromkeys(nearest(starts, round(start)) for start in wanted)
    return [Item(index, starts[place], song.windows.frames, song.windows.which[place]) for place in places]


def grid_noise(batch: Batch, item: Item, song: Song, device: torch.device) -> torch.Tensor:
    """The noise [B, T, D] of a batch's cells: it depends on the song's name, the window and the timestep, and not on the run's seed."""
    draws = []
    for slot in batch.slots:
        generator = torch.Generator().manual_seed(seed_for("grid", song.name, item.start, slot))
        draws.append(torch.randn(batch.latents.shape[1:], generator=generator))
    return torch.stack(draws).to(device)


@torch.no_grad()
def grid_loss(run: Run, songs: list[Song], model: torch.nn.Module | None = None) -> float:
    """Mean loss of `songs` over the grid, without dropout of any kind. Every process must call it; each computes its share.

    model: by default the run's own. Its training mode is put back.
    """
    model = model or run.wrapped
    batches = grid(songs, run.config.batch_size, hints=run.config.hints_ratio == 1)
    midpoints = (torch.arange(GRID_TIMESTEPS, dtype=torch.float64) + 0.5) / GRID_TIMESTEPS
    timesteps = run.law.draw(midpoints).float()
    own = batches[run.processes.index :: run.processes.count]
    total = torch.zeros((), dtype=torch.float64 if run.device.type != "mps" else torch.float32, device=run.device)
    was_training = run.model.training
    run.model.eval()
    try:
        for number in range(-(-len(batches) // run.processes.count)):
            cells = (
                own[number] if number < len(own) else batches[0]
            )  # all processes call the model equally often, as FSDP needs it
            item = cells.items[0]
            batch = collate(songs, cells).to(run.device)
            noise = grid_noise(batch, item, songs[item.song], run.device)
            loss = run.objective.loss(model, batch, noise, timesteps[list(cells.slots)].to(run.device))
            if number < len(own):
                total += loss.sum()
    finally:
        run.model.train(was_training)
    return run.processes.sum([total.item()])[0] / sum(len(cells.slots) for cells in batches)


def validate(run: Run, epoch: int) -> float:
    """Loss of the held-out songs after `epoch` epochs, of the adapter and of its running average; both are kept in the history."""
    step = run.position.step
    loss, average_loss = grid_loss(run, run.held_out), None
    run.tensorboard.add_scalar("loss/validation", loss, step)
    if run.average is not None:
        with averaged(run):
            average_loss = grid_loss(run, run.held_out)
        run.tensorboard.add_scalar("loss/validation_ema", average_loss, step)
    run.history.evaluations.append(Evaluation(step, epoch, loss, average_loss))
    return loss


def judge(run: Run, epoch: int) -> bool:
    """Whether the adapter after `epoch` epochs is the best so far, by validation loss or, without held-out songs, by smoothed training loss."""
    config, history = run.config, run.history
    after = epoch > config.save_best_after
    if not run.held_out:
        loss = history.smoothed_loss()
        return loss is not None and after and history.judge(loss, run.position.step, epoch, "smoothed training loss")
    if epoch % config.validate_every and run.position.step < run.total_steps:
        return False
    loss = validate(run, epoch)
    is_best = after and history.judge(loss, run.position.step, epoch, "validation loss")
    run.report(Validated(step=run.position.step, epoch=epoch, loss=loss, best=is_best))
    return is_best


def has_waited_enough(run: Run) -> bool:
    """Whether `--early-stop-patience` epochs or validations have passed without a new best; says so."""
    best, patience = run.history.best, run.config.early_stop_patience
    if not patience or best is None or run.history.judged < patience:
        return False
    what = "validations" if run.held_out else "epochs"
    run.report(
        Notice(
            message=f"Stopped early: no lower {best.by} than {best.loss:.4f} of epoch {best.epoch} in {run.history.judged} {what} (--early-stop-patience {patience})"
        )
    )
    return True
