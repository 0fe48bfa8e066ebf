"""Batches of music through the frozen model, their gradients sketched apart for four quarters of the data.

Rounds go on until the ranks that two halves of the songs would get agree, the batches are spent, or someone stops it.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sidestep.data.batches import MicroBatch, Song, collate, plan_epoch
from sidestep.data.records import Record
from sidestep.errors import Interrupted, JobError
from sidestep.events import LongTask, Notice, Progress, Report
from sidestep.files import replacing
from sidestep.settings.config import EstimateConfig, command_line
from sidestep.stopping import StopRequest
from sidestep.tasks.estimate.allocate import allocate, rank_correlation
from sidestep.tasks.estimate.sketch import Layout, Sketch, Spectrum, spectrum, watch

QUARTERS = 4  # two halves, each in two parts, so that a half can be cross-checked on its own like the whole
SAMPLES = 8  # of one quarter in one round: each timestep of turbo once, or one from each eighth of the law
FP16_LOSS_SCALE = 4096.0  # keeps small gradients out of fp16's subnormal numbers; divided out again


def deal(songs: Sequence[Song]) -> list[list[Song]]:
    """Four groups without a song in common; fewer than four songs are cut in time first, so that each has music."""
    parts = -(-QUARTERS // len(songs))
    pieces = [part_of(song, part, parts) for part in range(parts) for song in songs] if parts > 1 else list(songs)
    return [pieces[quarter::QUARTERS] for quarter in range(QUARTERS)]


def part_of(song: Song, part: int, parts: int) -> Song:
    """One of so many parts of a song, in time."""
    if song.frames < 2 * parts:
        return song  # too short to cut: the same moment in each group
    name = f"{song.name}#{part}"
    if song.windows is not None:  # it is heard through windows: each part has its own
        starts = song.windows.starts
        first, end = part * len(starts) // parts, (part + 1) * len(starts) // parts
        own = slice(first, max(end, first + 1))
        windows = replace(song.windows, starts=starts[own], which=song.windows.which[own])
        return replace(song, name=name, windows=windows)
    length = song.frames // parts
    own = slice(part * length, (part + 1) * length)

    def read() -> Record:
        record = song.read()
        hints = None if record.cover_hints is None else record.cover_hints[own]
        return replace(record, target_latents=record.target_latents[own], cover_hints=hints)

    return replace(song, name=name, frames=length, read=read)


def stream(songs: Sequence[Song], seed: int, batch_size: int) -> Iterator[MicroBatch]:
    """Micro-batches without end: epoch after epoch in the order that training would take."""
    epoch = 0
    while True:
        for step in plan_epoch(songs, epoch, seed=seed, batch_size=batch_size, accumulation=1):
            yield from step.micro_batches
        epoch += 1


def measure_round(batches: Iterator[MicroBatch]) -> list[MicroBatch]:
    """The next micro-batches that together hold at least SAMPLES samples, with slots counted through."""
    found, slot = [], 0
    while slot < SAMPLES:
        batch = next(batches)
        found.append(replace(batch, slots=tuple(range(slot, slot + len(batch.items)))))
        slot += len(batch.items)
    return found


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
        total = sum((self.states[q] for q in quarters), torch.zeros(()))
        return total / max(1, sum(self.samples[q] for q in quarters))

    def add(self, taken: Sequence[torch.Tensor | None], plan: Sequence[Sequence[MicroBatch]]) -> None:
        """A whole round: each quarter's sketch (None where it was not finite) and its micro-batches."""
        for number, (state, micro_batches) in enumerate(zip(taken, plan, strict=True)):
            if state is not None:
                self.states[number] += state
                self.samples[number] += samples_in(micro_batches)
            self.batches += len(micro_batches)
        self.rounds += 1

    def save(self, path: Path, key: str) -> None:
        """Write the sums whole or not at all. key: what they belong to."""
        belongs = {"key": key, "samples": self.samples, "rounds": self.rounds, "batches": self.batches}
        states = {str(q): state for q, state in enumerate(self.states)}
        with replacing(path) as temporary:
            save_file(states, temporary, metadata={"sums": json.dumps(belongs)})

    @classmethod
    def load(cls, path: Path, key: str) -> "Sums | None":
        """Sums of before, or None when there are none or they belong to something else."""
        try:
            with safe_open(path, "pt") as file:
                saved = json.loads((file.metadata() or {})["sums"])
                if saved["key"] != key:
                    return None
                states = [file.get_tensor(str(q)) for q in range(QUARTERS)]
                return cls(states, saved["samples"], saved["rounds"], saved["batches"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None


class Measurement:
    """Runs rounds. A round measures SAMPLES samples of each quarter.

    The host waits for the device once per quarter, never per module.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective,
        layout: Layout,
        songs: Sequence[Song],
        seed: int,
        batch_size: int,
        done: Sums,
    ):
        self.model, self.objective, self.sums = model, objective, done
        self.device = objective.silence.device
        self.precision = objective.null_condition.dtype
        # A round sums so few batches that bf16 does; fp16 lacks the range. Rounds are summed in fp32 on the CPU.
        self.sketch = Sketch(layout, self.device, torch.bfloat16 if self.precision == torch.bfloat16 else torch.float32)
        self.groups = deal(songs)
        self.streams = [stream(group, seed + q, batch_size) for q, group in enumerate(self.groups)]
        for _ in range(done.rounds):  # a resumed measurement goes on with the batches that were next
            for batches in self.streams:
                measure_round(batches)
        self.loss_scale = FP16_LOSS_SCALE if self.precision == torch.float16 else 1.0

    def take(self) -> torch.Tensor | None:
        """What the sketch holds, fp32 on the CPU, or None when it is not finite; empties it. Waits for the device."""
        taken = self.sketch.take()
        return taken.div_(self.loss_scale) if bool(torch.isfinite(taken).all()) else None

    def step(self, number: int, micro_batch: MicroBatch, samples: int) -> None:
        """One forward and backward pass; the gradient of the summed per-sample losses goes into the sketch.

        samples: of this quarter in this round.
        """
        batch = collate(self.groups[number], micro_batch, pin=self.device.type == "cuda").to(self.device)
        # as in training
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            weighted, _, _ = self.objective(self.model, batch, self.sums.rounds * QUARTERS + number, samples)
        (weighted.sum() * self.loss_scale).backward()


AGREED = 0.9  # Spearman correlation between the ranks from two halves at which the map counts as converged


@dataclass(frozen=True)
class Ranking:
    """Ranks of all modules (0: none) and what they rest on."""

    ranks: dict[str, int]
    spectra: dict[str, Spectrum]
    agreement: float

    @property
    def converged(self) -> bool:
        return self.agreement > AGREED


def ranks_from(layout: Layout, spectra: Mapping[str, Spectrum], budget: int, config: EstimateConfig) -> dict[str, int]:
    """The budget spent on the modules whose gradient the other half of the data confirms at all; others get rank 0."""
    values = {
        name: found.values(min(config.rank_max, layout.slots[name].columns))
        for name, found in spectra.items()
        if found.score > 0
    }
    costs = {name: layout.slots[name].cost for name in values}
    return dict.fromkeys(spectra, 0) | allocate(values, costs, budget, config.rank_min, config.rank_max)


def decide(layout: Layout, sums: Sums, budget: int, config: EstimateConfig, report: Report) -> Ranking:
    """Ranks from all four quarters, and the agreement between the ranks that either half alone would give.

    Each half's ranks come from the same procedure as the whole's: its own two parts confirm each other.
    Raises JobError when no module shows a gradient that repeats.
    """

    pairs = ((0, 1), (2, 3)), ((0,), (1,)), ((2,), (3,))
    compared = LongTask(report, "Comparing halves of the songs", len(pairs) * len(layout.slots), unit="modules")

    def measured(first: tuple[int, ...], second: tuple[int, ...]) -> dict[str, Spectrum]:
        one, two, found = sums.mean(*first), sums.mean(*second), {}
        for name in layout.slots:
            found[name] = spectrum(layout, name, one, two)
            compared()
        return found

    whole, first, second = (measured(*pair) for pair in pairs)
    if not any(found.score > 0 for found in whole.values()):
        raise JobError(
            "No module shows a gradient that repeats in both halves of the songs: there is nothing to allocate by.",
            "Measure more batches (--batches 256) or more songs, or train without a rank map.",
        )
    by_half = [ranks_from(layout, found, budget, config) for found in (first, second)]
    agreement = rank_correlation(*(list(ranks.values()) for ranks in by_half))
    return Ranking(ranks_from(layout, whole, budget, config), whole, agreement)


def captured(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Share of the confirmed energy that some ranks capture."""
    total = sum(found.score for found in spectra.values())
    return sum(sum(spectra[name].confirmed[:rank]) for name, rank in ranks.items()) / total if total else 0.0


MOST_BATCHES = 512  # where auto gives up on agreement
BAD_ROUNDS = 3  # in a row, without one finite gradient


def run_rounds(
    measurement: Measurement,
    layout: Layout,
    budget: int,
    config: EstimateConfig,
    partial: Path,
    key: str,
    report: Report,
) -> Ranking:
    """Rounds until both halves agree or the batches are spent.

    They are compared after 2, 3, 4, 6, 9, … rounds and at the end, and what was measured is kept before each time.

    Raises Interrupted when asked to stop, with what was measured kept; JobError when there are no finite gradients.
    """
    sums, auto = measurement.sums, config.batches == "auto"
    limit = MOST_BATCHES if auto else int(config.batches)
    meter = Meter(sums.batches, limit, report)
    ranking, decided_at, bad, next_check = None, -1, 0, 2
    while next_check <= sums.rounds:
        next_check = _later(next_check)

    def compare() -> Ranking:
        stopped: BaseException = Interrupted(command_line(config))
        try:
            sums.save(partial, key)
        except OSError as error:  # the map itself may still have room
            text = f"{partial}: what was measured is not kept this time ({error.strerror or error})."
            report(Notice(message=text, level="warning"))
            stopped = KeyboardInterrupt()  # there is nothing to go on from
        try:
            return decide(layout, sums, budget, config, report)
        except KeyboardInterrupt:
            raise stopped from None

    with StopRequest(lambda text: report(Notice(message=text))) as stop, watch(measurement.model, measurement.sketch):
        while sums.batches < limit:
            finite = one_round(measurement, meter, stop, report)
            if finite is None:
                sums.save(partial, key)
                raise Interrupted(command_line(config))
            bad = 0 if finite else bad + 1
            if bad == BAD_ROUNDS:
                raise JobError(f"{BAD_ROUNDS} rounds in a row had no finite gradient.", "Try --precision fp32.")
            if sums.rounds == next_check and all(sums.samples):
                next_check = _later(next_check)
                ranking, decided_at = compare(), sums.rounds
                meter.agreement = ranking.agreement
                text = f"the rank maps of two halves of the songs agree to {ranking.agreement:.3f} (Spearman)"
                report(Notice(message=f"{sums.batches} batches: {text}"))
                if auto and ranking.converged:
                    break
        if stop.requested and decided_at != sums.rounds:  # what follows takes minutes with a real model
            sums.save(partial, key)
            raise Interrupted(command_line(config))
    if not all(sums.samples):
        raise JobError("A part of the songs gave no finite gradient at all.", "Try --precision fp32.")
    if ranking is None or decided_at != sums.rounds:
        ranking = compare()
    text = f"Agreement of two halves after {sums.batches} batches: {ranking.agreement:.3f} (Spearman), "
    surer = "not converged: more songs or more --batches would make it surer"
    report(Notice(message=text + "converged") if ranking.converged else Notice(message=text + surer, level="warning"))
    return ranking


def _later(rounds: int) -> int:
    return max(rounds + 1, rounds * 3 // 2)


def one_round(measurement: Measurement, meter: "Meter", stop: StopRequest, report: Report) -> int | None:
    """Measure one round; how many quarters of it were finite.

    None when asked to stop: what was not whole is dropped.
    """
    plan, taken = [measure_round(batches) for batches in measurement.streams], []
    meter.limit = max(meter.limit, meter.done + sum(map(len, plan)))  # a round is measured whole
    for number, micro_batches in enumerate(plan):
        for micro_batch in micro_batches:
            if stop.requested:
                return None
            measurement.step(number, micro_batch, samples_in(micro_batches))
            meter.tick()
        taken.append(measurement.take())
        if taken[-1] is None:
            songs = measurement.groups[number]
            names = dict.fromkeys(songs[item.song].name for batch in micro_batches for item in batch.items)
            text = f"A gradient was not finite and was left out; one of these songs: {', '.join(names)}"
            report(Notice(message=text, level="warning"))
    measurement.sums.add(taken, plan)
    return sum(state is not None for state in taken)


class Meter:
    """Reports progress batch by batch, with the rate since this call began and the time that is left at most."""

    def __init__(self, done: int, limit: int, report: Report):
        self.first = self.done = done
        self.limit, self.report, self.started = limit, report, time.perf_counter()
        self.agreement: float | None = None

    def tick(self) -> None:
        """One more batch was measured."""
        self.done += 1
        rate = (self.done - self.first) / (time.perf_counter() - self.started)
        current = (
            "" if self.agreement is None else f"agreement of two halves {self.agreement:.2f}, enough above {AGREED:g}"
        )
        self.report(
            Progress(
                task="estimate",
                done=self.done,
                total=self.limit,
                current=current,
                rate=rate,
                unit="batches",
                eta_seconds=(self.limit - self.done) / rate,
            )
        )
