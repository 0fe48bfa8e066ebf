"""Songs in memory, and which windows of them make up each optimizer step of an epoch.

The plan of an epoch is a function of seed and epoch number: a resumed run goes on with exactly the step that was next,
and several processes take their shares of one plan.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sidestep.seeding import seed_for, uniform

GOLDEN_RATIO = 0.6180339887498949
SAME_LENGTH = 0.95  # whole songs share a batch when the shortest has this share of the longest's frames


@dataclass(frozen=True, eq=False)
class Windows:
    """How a song is cut: windows of `frames` that begin at one of `starts`, ascending.

    The window from `starts[i]` has the conditions `conditions[which[i]]` [L, C]: their prompt states its length, and
    where lyrics have time marks they are those of the window.
    """

    frames: int
    starts: tuple[int, ...]
    which: tuple[int, ...]
    conditions: tuple[torch.Tensor, ...]
    hints_conditions: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Song:
    """One preprocessed song. latents: [T, D]; conditions: [L, C]; the hints regime has hints [T, D] and own conditions.

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
    """A window of a song: `frames` latent frames from `start`.

    text: which of the song's window conditions it has, None for the whole song's.
    """

    song: int
    start: int
    frames: int
    text: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees. slots: each item's number in its optimizer step, which decides its noise and t."""

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
    """Tensors of one micro-batch of B windows.

    latents: fp32 [B, T, D]. conditions: [B, L, C]. condition_mask: [B, L], true on real tokens, None if all are.
    source: [B, T, D], the latents beside the noise, None for silence.
    """

    latents: torch.Tensor
    conditions: torch.Tensor
    condition_mask: torch.Tensor | None
    source: torch.Tensor | None
    songs: tuple[str, ...]
    slots: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; on CUDA copies run beside the computation where memory is pinned."""
        return self._each(lambda x: x.to(device, non_blocking=device.type == "cuda"))

    def pin(self) -> "Batch":
        """The batch in memory that a CUDA device can read while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            latents=change(self.latents),
            conditions=change(self.conditions),
            condition_mask=None if self.condition_mask is None else change(self.condition_mask),
            source=None if self.source is None else change(self.source),
        )


def window_start(frames: int, window: int, seed: int, song: str, visit: int) -> int:
    """First frame of a song's window at its `visit`-th turn.

    A golden-ratio sequence spreads the windows evenly over time; half a window beyond both ends is folded in, so that
    intro and outro are heard about as often as the middle.
    """
    if frames <= window:
        return 0
    u = (uniform(seed, "window", song) + visit * GOLDEN_RATIO) % 1.0
    return min(max(round(u * frames - window / 2), 0), frames - window)


def item_of(song: Song, index: int, visit: int, seed: int) -> Item:
    """What is heard of a song at its `visit`-th turn. index: of the song in its list."""
    windows = song.windows
    if windows is None:
        return Item(index, 0, song.frames)
    i = nearest(windows.starts, window_start(song.frames, windows.frames, seed, song.name, visit))
    return Item(index, windows.starts[i], windows.frames, windows.which[i])


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
    hints_ratio: float = 0.0,
) -> list[StepPlan]:
    """Optimizer steps of an epoch. Every song comes `repeat` times; a batch holds windows of one length, unpadded."""
    items = [
        item_of(song, index, epoch * song.repeat + turn, seed)
        for index, song in enumerate(songs)
        for turn in range(song.repeat)
    ]
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    shuffled = [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
    groups = [crop_to_shortest(group, songs, seed, epoch) for group in group_by_length(shuffled, batch_size)]
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


def group_by_length(items: list[Item], batch_size: int) -> list[list[Item]]:
    """Groups of at most `batch_size` items of (nearly) equal length; their number does not depend on the order."""
    if batch_size == 1:
        return [[item] for item in items]
    groups: list[list[Item]] = []
    for item in sorted(items, key=lambda item: item.frames):
        if groups and len(groups[-1]) < batch_size and groups[-1][0].frames >= SAME_LENGTH * item.frames:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def crop_to_shortest(group: list[Item], songs: Sequence[Song], seed: int, epoch: int) -> list[Item]:
    """The group cropped to its shortest item: what is left away wanders from beginning to end over the epochs."""
    frames = min(item.frames for item in group)
    cropped = []
    for item in group:
        offset = window_start(item.frames, frames, seed, songs[item.song].name, epoch)  # 0 for the shortest
        cropped.append(replace(item, start=item.start + offset, frames=frames))
    return cropped


def collate(songs: Sequence[Song], micro_batch: MicroBatch, pin: bool = False) -> Batch:
    """The tensors of a micro-batch, whose items are of one length.

    Conditions of unequal length are padded and masked, never attended. pin: so that copies to a GPU do not wait.
    """
    latents, conditions, hints = [], [], []
    for item in micro_batch.items:
        song, window = songs[item.song], slice(item.start, item.start + item.frames)
        latents.append(song.latents[window])
        if micro_batch.hints:
            assert song.hints is not None
            hints.append(song.hints[window])
        conditions.append(conditions_of(song, item, micro_batch.hints))
    lengths = [len(c) for c in conditions]
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None] if len(set(lengths)) > 1 else None
    batch = Batch(
        latents=torch.stack(latents).float(),
        conditions=torch.nn.utils.rnn.pad_sequence(conditions, batch_first=True),
        condition_mask=mask,
        source=torch.stack(hints) if micro_batch.hints else None,
        songs=tuple(songs[item.song].name for item in micro_batch.items),
        slots=micro_batch.slots,
    )
    return batch.pin() if pin else batch


def conditions_of(song: Song, item: Item, hints: bool) -> torch.Tensor:
    """The conditions [L, C] of an item, of its window where it is one, in the regime of hints or of text."""
    if item.text is None:
        own = song.hints_conditions if hints else song.conditions
        assert own is not None
        return own
    assert song.windows is not None
    return (song.windows.hints_conditions if hints else song.windows.conditions)[item.text]
