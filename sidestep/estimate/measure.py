"""Batches of music through the frozen model, their gradients sketched apart for four quarters of the data."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sidestep.atomic import replacing
from sidestep.data.dataset import MicroBatch, Song, collate, plan_epoch
from sidestep.estimate.sketch import Layout, Sketch

QUARTERS = 4  # two halves, each in two parts, so that a half can be cross-checked on its own like the whole
SAMPLES = 8  # of one quarter in one round: each timestep of turbo once, or one from each eighth of the law
FP16_LOSS_SCALE = 4096.0  # keeps small gradients out of fp16's subnormal numbers; divided out again


def deal(songs: Sequence[Song]) -> list[list[Song]]:
    """Four groups without a song in common. Fewer than four songs are cut in time first, so that every group has music."""
    pieces = list(songs)
    cuts = -(-QUARTERS // len(pieces)) if len(pieces) < QUARTERS else 1
    if cuts > 1:
        pieces = [piece for part in range(cuts) for piece in (_part(song, part, cuts) for song in songs)]
    groups: list[list[Song]] = [[] for _ in range(QUARTERS)]
    for i, piece in enumerate(pieces):
        groups[i % QUARTERS].append(piece)
    return groups


def _part(song: Song, part: int, parts: int) -> Song:
    if song.frames < 2 * parts:
        return song  # too short to cut: the same moment in each group
    name = f"{song.name}#{part}"
    if song.windows is not None:  # it is heard through windows: each part has its own
        starts = song.windows.starts
        places = slice(part * len(starts) // parts, max((part + 1) * len(starts) // parts, part * len(starts) // parts + 1))
        return replace(song, name=name, windows=replace(song.windows, starts=starts[places], which=song.windows.which[places]))
    length = song.frames // parts
    moments = slice(part * length, (part + 1) * length)
    return replace(song, name=name, latents=song.latents[moments], hints=None if song.hints is None else song.hints[moments])


def stream(songs: Sequence[Song], seed: int, batch_size: int) -> Iterator[MicroBatch]:
    """Micro-batches without end: epoch after epoch in the order that training would take."""
    epoch = 0
    while True:
        for step in plan_epoch(songs, epoch, seed=seed, batch_size=batch_size, accumulation=1):
            yield from step.micro_batches
        epoch += 1


def one_round(batches: Iterator[MicroBatch]) -> list[MicroBatch]:
    """The next micro-batches that together hold at least SAMPLES samples, with slots counted through."""
    chosen, slot = [], 0
    while slot < SAMPLES:
        batch = next(batches)
        chosen.append(replace(batch, slots=tuple(range(slot, slot + len(batch.items)))))
        slot += len(batch.items)
    return chosen


def samples_in(micro_batches: Sequence[MicroBatch]) -> int:
    """How many songs or windows some micro-batches hold."""
    return sum(len(batch.items) for batch in micro_batches)


@dataclass
class Sums:
    """Sketches of the four quarters, summed on the CPU, and how many samples each holds. Whole rounds only."""

    states: list[torch.Tensor]
    samples: list[int]
    rounds: int = 0
    batches: int = 0

    @classmethod
    def empty(cls, size: int) -> "Sums":
        return cls([torch.zeros(size) for _ in range(QUARTERS)], [0] * QUARTERS)

    def mean(self, *quarters: int) -> torch.Tensor:
        """Mean gradient (as a flat sketch) over the samples of some quarters, fp32."""
        return sum(self.states[q] for q in quarters) / max(1, sum(self.samples[q] for q in quarters))

    def add(self, taken: Sequence[torch.Tensor | None], plan: Sequence[Sequence[MicroBatch]]) -> None:
        """A whole round: the sketch of each quarter, None for one that was not finite, and the micro-batches that made it."""
        for number, (state, micro_batches) in enumerate(zip(taken, plan, strict=True)):
            if state is not None:
                self.states[number] += state
                self.samples[number] += samples_in(micro_batches)
            self.batches += len(micro_batches)
        self.rounds += 1

    def save(self, path: Path, key: str) -> None:
        """Write the sums whole or not at all. key: what they belong to."""
        facts = {"key": key, "samples": self.samples, "rounds": self.rounds, "batches": self.batches}
        with replacing(path) as temporary:
            save_file({str(q): state for q, state in enumerate(self.states)}, temporary, metadata={"sums": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, key: str) -> "Sums | None":
        """Sums of before, or None when there are none or they belong to something else."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["sums"])
                if facts["key"] != key:
                    return None
                return cls([file.get_tensor(str(q)) for q in range(QUARTERS)], facts["samples"], facts["rounds"], facts["batches"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None


class Measurement:
    """Runs rounds. A round measures SAMPLES samples of each quarter; the host waits for the device once per quarter, never per module."""

    def __init__(self, model: torch.nn.Module, objective, layout: Layout, songs: Sequence[Song], seed: int, batch_size: int, done: Sums):
        self.model, self.objective, self.sums = model, objective, done
        self.device = objective.silence.device
        self.precision = objective.null_condition.dtype
        # A round sums so few batches that bf16 does; fp16 lacks the range. Rounds are summed in fp32 on the CPU.
        self.sketch = Sketch(layout, self.device, torch.bfloat16 if self.precision == torch.bfloat16 else torch.float32)
        self.groups = deal(songs)
        self.streams = [stream(group, seed + q, batch_size) for q, group in enumerate(self.groups)]
        for _ in range(done.rounds):  # a resumed measurement goes on with the batches that were next
            for batches in self.streams:
                one_round(batches)
        self.loss_scale = FP16_LOSS_SCALE if self.precision == torch.float16 else 1.0

    def batches_of_round(self) -> list[list[MicroBatch]]:
        """The micro-batches of the next round, by quarter."""
        return [one_round(batches) for batches in self.streams]

    def take(self) -> torch.Tensor | None:
        """What the sketch holds, fp32 on the CPU, and an empty sketch; None when it is not finite. Waits for the device."""
        taken = self.sketch.take()
        return taken.div_(self.loss_scale) if bool(torch.isfinite(taken).all()) else None

    def step(self, number: int, micro_batch: MicroBatch, samples: int) -> None:
        """One forward and backward pass; the gradient of the summed per-sample losses goes into the sketch. samples: of this quarter in this round."""
        batch = collate(self.groups[number], micro_batch, pin=self.device.type == "cuda").to(self.device)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):  # as in training
            weighted, _, _ = self.objective(self.model, batch, self.sums.rounds * QUARTERS + number, samples)
        (weighted.sum() * self.loss_scale).backward()

    def songs_of(self, number: int, micro_batches: list[MicroBatch]) -> tuple[str, ...]:
        """Names of the songs in some micro-batches."""
        return tuple(dict.fromkeys(self.groups[number][item.song].name for batch in micro_batches for item in batch.items))
