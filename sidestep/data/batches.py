"""Songs, and which windows of them make up each optimizer step of an epoch.

The plan of an epoch is a function of seed and epoch number: a resumed run goes on with exactly the step that was next,
and several processes take their shares of one plan.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

from sidestep.data.records import Record
from sidestep.seeding import seed_for, uniform

GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class Windows:
    """How a song is cut: windows of `frames` that begin at one of `starts`, ascending.

    The window from `starts[i]` has the conditions `conditions[which[i]]` [L, C]: their prompt states its length, and
    where lyrics have time marks they are those of the window.

    shares: how often each wording of the prompt is drawn, adding up to 1; `conditions` has those of the first wording,
    then as many of the second, and so on. The first is what validation hears.
    """

    frames: int
    starts: tuple[int, ...]
    which: tuple[int, ...]
    conditions: tuple[torch.Tensor, ...]
    hints_conditions: tuple[torch.Tensor, ...] = ()
    shares: tuple[float, ...] = (1.0,)

    def wording(self, u: float) -> int:
        """The wording that a uniform number in [0, 1) draws."""
        return min(bisect_right(list(accumulate(self.shares)), u), len(self.shares) - 1)


@dataclass(frozen=True, eq=False)
class Song:
    """One preprocessed song. Its tensors are where `read` finds them, in memory or on the disk; T is `frames`.

    windows: how it is cut, None when it is trained on as a whole. metadata: what its record says of it. digests: of its
    tensors, `audio`, `conditions` and, with those of the regime of hints, `hints`.
    """

    name: str
    frames: int
    read: Callable[[], Record]
    repeat: int = 1
    has_hints: bool = False
    windows: Windows | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


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
    wording = windows.wording(uniform(seed, "wording", song.name, visit))
    text = wording * (len(windows.conditions) // len(windows.shares)) + windows.which[i]
    return Item(index, windows.starts[i], windows.frames, text)


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
    """Optimizer steps of an epoch. Every song comes `repeat` times; a batch holds items of one length, unpadded.

    Who shares a batch is drawn anew in each epoch; how many batches there are is not.
    """
    items = [
        item_of(song, index, epoch * song.repeat + turn, seed)
        for index, song in enumerate(songs)
        for turn in range(song.repeat)
    ]
    generator = torch.Generator().manual_seed(seed_for(seed, "order", epoch))
    groups: list[list[Item]] = []
    last: dict[int, list[Item]] = {}  # by the length of its items
    for i in torch.randperm(len(items), generator=generator).tolist():
        group = last.get(items[i].frames)
        if group is None or len(group) == batch_size:
            group = last[items[i].frames] = []
            groups.append(group)
        group.append(items[i])
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    per_step = accumulation * processes
    steps = []
    for first in range(0, len(groups), per_step):
        slot, micro_batches = 0, []
        for number, group in enumerate(groups[first : first + per_step], start=first):
            has_hints = all(songs[item.song].has_hints for item in group)
            hints = has_hints and uniform(seed, "regime", epoch, number) < hints_ratio
            micro_batches.append(MicroBatch(tuple(group), tuple(range(slot, slot + len(group))), hints))
            slot += len(group)
        steps.append(StepPlan(tuple(micro_batches), slot))
    return steps


def collate(songs: Sequence[Song], micro_batch: MicroBatch, pin: bool = False) -> Batch:
    """The tensors of a micro-batch, whose items are of one length.

    Conditions of unequal length are padded and masked, never attended. pin: so that copies to a GPU do not wait.
    """
    latents, conditions, hints = [], [], []
    for item in micro_batch.items:
        song, window = songs[item.song], slice(item.start, item.start + item.frames)
        record = song.read()
        latents.append(record.target_latents[window])
        own = record.encoder_hidden_states
        if micro_batch.hints:
            assert record.cover_hints is not None
            assert record.hints_encoder_hidden_states is not None
            hints.append(record.cover_hints[window])
            own = record.hints_encoder_hidden_states
        if item.text is not None:
            assert song.windows is not None
            own = (song.windows.hints_conditions if micro_batch.hints else song.windows.conditions)[item.text]
        conditions.append(own)
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


def fingerprint(songs: Iterable[Song]) -> str:
    """Hex digest of every song's name, latents, conditions and repeats; the order does not matter."""
    parts = sorted((song.name, song.repeat, song.digests["audio"], song.digests["conditions"]) for song in songs)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
