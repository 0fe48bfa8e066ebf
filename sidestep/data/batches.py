"""Songs in memory, and which windows of them make up each optimizer step of an epoch.

The plan of an epoch is a function of seed and epoch number, so a resumed run goes on with exactly the step that was next,
and several processes take their shares of one plan.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sidestep.seeding import seed_for, uniform

GOLDEN_RATIO = 0.6180339887498949
SAME_LENGTH = 0.95  # whole songs share a batch when the shortest has this share of the longest's frames


@dataclass(frozen=True, eq=False)
class Windows:
    """How a song is cut: windows of `frames` that begin at one of `starts`, ascending. The window from `starts[i]` has the conditions
    `conditions[which[i]]` [L, C]: their prompt states its length, and where lyrics have time marks they are those of the window."""

    frames: int
    starts: tuple[int, ...]
    which: tuple[int, ...]
    conditions: tuple[torch.Tensor, ...]
    hints_conditions: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Song:
    """One preprocessed song. latents: [T, D]; conditions: [L, C]; the hints regime has a source [T, D] and conditions of its own.

    windows: how it is cut, None when it is trained on as a whole. metadata: what its record says of it.
    """

    name: str
    latents: torch.Tensor
    conditions: torch.Tensor
    repeat: int = 1
    hints: torch.Tensor | None = None
    hints_conditions: torch.Tensor | None = None
    windows: Windows | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        return self.latents.shape[0]


@dataclass(frozen=True)
class Item:
    """A window of a song: `frames` latent frames from `start`. text: which of the song's window conditions it has, None for the whole song's."""

    song: int
    start: int
    frames: int
    text: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees. slots: each item's place in its optimizer step, which decides its noise and timestep."""

    items: tuple[Item, ...]
    slots: tuple[int, ...]
    hints: bool = False


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one optimizer step, over all processes, and how many samples they hold."""

    micro_batches: tuple[MicroBatch, ...]
    samples: int


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch. source: latents beside the noise, None for silence; condition_mask: [B, L] true on real tokens, None if all are."""

    latents: torch.Tensor
    conditions: torch.Tensor
    condition_mask: torch.Tensor | None
    source: torch.Tensor | None
    songs: tuple[str, ...]
    slots: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; copies run beside the computation where memory is pinned."""

        def move(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return Batch(
            move(self.latents),
            move(self.conditions),
            move(self.condition_mask),
            move(self.source),
            self.songs,
            self.slots,
        )


def window_start(frames: int, window: int, seed: int, song: str, visit: int) -> int:
    """First frame of a song's window at its `visit`-th turn.

    A golden-ratio sequence spreads the windows evenly over time; half a window beyond both ends is folded in, so that intro and outro
    are heard about as often as the middle.
    """
    if frames <= window:
        return 0
    u = (uniform(seed, "window", song) + visit * GOLDEN_RATIO) % 1.0
    return min(max(round(u * frames - window / 2), 0), frames - window)


def item_of(song: Song, index: int, visit: int, seed: int, window_frames: int = 0) -> Item:
    """What is heard of a song at its `visit`-th turn. window_frames: for songs without windows of their own."""
    if song.windows is None:
        frames = min(window_frames or song.frames, song.frames)
        return Item(index, window_start(song.frames, frames, seed, song.name, visit), frames)
    cut = song.windows
    place = nearest(cut.starts, window_start(song.frames, cut.frames, seed, song.name, visit))
    return Item(index, cut.starts[place], cut.frames, cut.which[place])


def nearest(starts: Sequence[int], wanted: int) -> int:
    """Index of the start that is closest to `wanted`; starts ascend."""
    right = min(bisect_left(starts, wanted), len(starts) - 1)
    return right - 1 if right and wanted - starts[right - 1] < starts[right] - wanted else right


def plan_epoch(
    songs: Sequence[Song],
    epoch: int,
    *,
    seed: int,
    batch_size: int,
    accumulation: int,
    processes: int = 1,
    window_frames: int = 0,
    hints_ratio: float = 0.0,
) -> list[StepPlan]:
    """The optimizer steps of an epoch. Every song comes `repeat` times; batches hold windows of equal length and no padding."""
    items = [
        item_of(song, index, epoch * song.repeat + turn, seed, window_frames)
        for index, song in enumerate(songs)
        for turn in range(song.repeat)
    ]
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    shuffled = [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
    groups = [_of_one_length(group, songs, seed, epoch) for group in _equal_lengths(shuffled, batch_size)]
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    per_step = accumulation * processes
    steps = []
    for first in range(0, len(groups), per_step):
        slot, micro_batches = 0, []
        for number, group in enumerate(groups[first : first + per_step], start=first):
            has_hints = all(songs[item.song].hints is not None for item in group)
            hints = has_hints and uniform(seed, "regime", epoch, number) < hints_ratio
            micro_batches.append(MicroBatch(tuple(group), tuple(range(slot, slot + len(group))), hints))
            slot += len(group)
        steps.append(StepPlan(tuple(micro_batches), slot))
    return steps


def _equal_lengths(items: list[Item], batch_size: int) -> list[list[Item]]:
    """Groups of at most `batch_size` items of (nearly) equal length; their number depends on the lengths alone, not on the order."""
    if batch_size == 1:
        return [[item] for item in items]
    groups: list[list[Item]] = []
    for item in sorted(items, key=lambda item: item.frames):
        if groups and len(groups[-1]) < batch_size and groups[-1][0].frames >= SAME_LENGTH * item.frames:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _of_one_length(group: list[Item], songs: Sequence[Song], seed: int, epoch: int) -> list[Item]:
    """The group cut to its shortest item: what is left away wanders from beginning to end over the epochs."""
    frames = min(item.frames for item in group)
    return [
        item
        if item.frames == frames
        else replace(
            item,
            start=item.start + window_start(item.frames, frames, seed, songs[item.song].name, epoch),
            frames=frames,
        )
        for item in group
    ]


def collate(songs: Sequence[Song], micro_batch: MicroBatch, pin: bool = False) -> Batch:
    """The tensors of a micro-batch, whose items are of one length. Conditions of unequal length are padded and masked, never attended."""
    chosen = [(songs[item.song], slice(item.start, item.start + item.frames)) for item in micro_batch.items]
    conditions = [_conditions(songs[item.song], item, micro_batch.hints) for item in micro_batch.items]
    lengths = [c.shape[0] for c in conditions]
    mask = None
    if len(set(lengths)) > 1:
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    batch = Batch(
        latents=torch.stack([song.latents[window] for song, window in chosen]).float(),
        conditions=torch.nn.utils.rnn.pad_sequence(conditions, batch_first=True),
        condition_mask=mask,
        source=torch.stack([song.hints[window] for song, window in chosen]) if micro_batch.hints else None,
        songs=tuple(song.name for song, _ in chosen),
        slots=micro_batch.slots,
    )
    if pin:
        pinned = {name: x.pin_memory() for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
        batch = Batch(**{**vars(batch), **pinned})
    return batch


def _conditions(song: Song, item: Item, hints: bool) -> torch.Tensor:
    if item.text is None:
        return song.hints_conditions if hints else song.conditions
    return (song.windows.hints_conditions if hints else song.windows.conditions)[item.text]
