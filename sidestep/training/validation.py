"""Loss on held-out songs over a fixed grid of windows, timesteps and noise: the same weights always give the same number."""

import torch

from sidestep.data.dataset import Batch, Item, MicroBatch, Song, collate, nearest
from sidestep.seeding import seed_for
from sidestep.training.run import Run

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
            cells = own[number] if number < len(own) else batches[0]  # all processes call the model equally often, as FSDP needs it
            item = cells.items[0]
            batch = collate(songs, cells).to(run.device)
            noise = grid_noise(batch, item, songs[item.song], run.device)
            loss = run.objective.loss(model, batch, noise, timesteps[list(cells.slots)].to(run.device))
            if number < len(own):
                total += loss.sum()
    finally:
        run.model.train(was_training)
    return run.processes.sum([total.item()])[0] / sum(len(cells.slots) for cells in batches)
