"""`plan`: whether a run fits, what each lever would save, and the mildest settings that fit."""

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sidestep.acestep.checkpoint import decoder_sizes, open_checkpoint
from sidestep.acestep.device import PRECISIONS
from sidestep.config import PlanConfig, TrainConfig
from sidestep.errors import UserError
from sidestep.events import Report, Table
from sidestep.memory.device import GIB, Device, on_device, this_device
from sidestep.memory.passes import first_pass_peak, preview_peak, second_pass_peak
from sidestep.memory.step import Peak, Shape, StepModel
from sidestep.options import changed_from_defaults, options_of
from sidestep.variants import OFFICIAL_FOLDERS, official_config

FRAMES_PER_SECOND = 25
SHORTEST_WINDOW_SECONDS = 15.0
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations")
# What `StepModel` answers without another run of the step.
COUNTED = ("gradient_checkpointing", "recompute_layers", "optimizer_type", "swap_blocks", "ema_decay")


@dataclass(frozen=True)
class Candidate:
    """Settings and the peak of a step with them; `flags` are what differs from the settings asked about."""

    config: TrainConfig
    peak: Peak
    flags: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Bytes on the device, context and slack included."""
        return on_device(self.peak.total)


@dataclass(frozen=True)
class Plan:
    """Answer of the planner. `best`: the mildest settings that fit, None when none do. Bytes everywhere."""

    asked: Candidate
    device: Device | None
    levers: tuple[Candidate, ...]
    best: Candidate | None
    first_pass: int
    second_pass: int
    preview: int

    @property
    def fits(self) -> bool | None:
        """None when no device's memory is known."""
        return None if self.device is None else self.asked.needed <= self.device.bytes


class Planner:
    """Peaks of one model's step under different settings, each computed once. seconds: length of the songs that are trained on."""

    def __init__(self, sizes: dict, dtype: torch.dtype, seconds: float, tokens: int):
        self.sizes, self.dtype, self.seconds, self.tokens = sizes, dtype, seconds, tokens
        self._known: dict[TrainConfig, StepModel] = {}

    def peak(self, config: TrainConfig) -> Peak:
        """Peak of a step; a window longer than the song is the song."""
        same = dataclasses.replace(
            config,
            **{name: getattr(TrainConfig, name) for name in COUNTED},
            gradient_accumulation=min(config.gradient_accumulation, 2),
            base_precision="auto" if config.base_precision == "auto" else "int8",
        )
        if same not in self._known:
            seconds = min(config.chunk_duration or self.seconds, self.seconds)
            shape = Shape(config.batch_size, round(seconds * FRAMES_PER_SECOND), self.tokens)
            self._known[same] = StepModel(self.sizes, same, shape, self.dtype)
        return self._known[same].peak(config)

    def preview(self, config: TrainConfig) -> int:
        """Bytes on the device while a preview is made in a run, context and slack included."""
        return on_device(self.peak(config).between_steps + preview_peak(self.sizes, config, self.dtype, FRAMES_PER_SECOND, self.tokens))

    def candidate(self, asked: TrainConfig, **changes: object) -> Candidate:
        """The settings asked about with some of them changed."""
        config = dataclasses.replace(asked, **changes)
        options = options_of(TrainConfig)
        flags = tuple(
            options[name].flag if value is True else f"{options[name].flag} {value:g}" if isinstance(value, float) else f"{options[name].flag} {value}"
            for name, value in changes.items()
        )
        return Candidate(config, self.peak(config), flags)

    def levers(self, asked: TrainConfig) -> Iterator[Candidate]:
        """Each single setting that saves memory, the one that costs least first."""
        if not asked.gradient_checkpointing or asked.recompute_layers is not None:
            yield self.candidate(asked, gradient_checkpointing=True, recompute_layers=None)
        if asked.optimizer_type in ("adamw", "prodigy"):
            yield self.candidate(asked, optimizer_type="adamw8bit")
        if asked.batch_size > 1:
            yield self.candidate(asked, batch_size=1, gradient_accumulation=asked.gradient_accumulation * asked.batch_size)
        if asked.base_precision == "auto":
            yield self.candidate(asked, base_precision="int8")
        if not asked.offload_activations:
            yield self.candidate(asked, offload_activations=True)
        if asked.base_precision != "nf4":
            yield self.candidate(asked, base_precision="nf4")
        if min(asked.chunk_duration or self.seconds, self.seconds) > 60:
            yield self.candidate(asked, chunk_duration=60.0)
        layers = int(self.sizes["num_hidden_layers"])
        if asked.swap_blocks < layers and asked.gradient_checkpointing and asked.recompute_layers is None:
            yield self.candidate(asked, swap_blocks=layers)

    def mildest(self, asked: TrainConfig, limit: int) -> Candidate | None:
        """The settings asked about, plus lever after lever until the step fits into `limit` bytes; then as little recomputation as fits."""
        candidate, changes = self.candidate(asked), {}
        while candidate.needed > limit:
            lever = next(self.levers(candidate.config), None) or self._shorter(candidate.config)
            if lever is None:
                return None
            changes |= {name: getattr(lever.config, name) for name in _differences(candidate.config, lever.config)}
            candidate = self.candidate(asked, **changes)
        least = self.least_recomputation(candidate.config, limit)
        return candidate if least == candidate.config.recompute_layers else self.candidate(asked, **changes, recompute_layers=least)

    def least_recomputation(self, config: TrainConfig, limit: int) -> int | None:
        """Fewest recomputed layers that fit into `limit` bytes, None for all; as `config` has it where it says a number, recomputes none or swaps blocks,
        which must be recomputed."""
        if not config.gradient_checkpointing or config.recompute_layers is not None or config.swap_blocks:
            return config.recompute_layers
        low, high = 0, int(self.sizes["num_hidden_layers"])
        whole = high
        while low < high:
            middle = (low + high) // 2
            if on_device(self.peak(dataclasses.replace(config, recompute_layers=middle)).total) <= limit:
                high = middle
            else:
                low = middle + 1
        return high if high < whole else None

    def _shorter(self, config: TrainConfig) -> Candidate | None:
        seconds = min(config.chunk_duration or self.seconds, self.seconds) / 2
        return self.candidate(config, chunk_duration=seconds) if seconds >= SHORTEST_WINDOW_SECONDS else None


def _differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    return [name for name in options_of(TrainConfig) if getattr(before, name) != getattr(after, name)]


def plan(config: PlanConfig, report: Report) -> Plan:
    """Plan a run for a model that may not even be on this disk. Raises UserError for a model whose sizes nobody knows."""
    gc.freeze()  # a tenth of the time would go to searching the imported modules for garbage
    planner, asked = planner_for(config)
    device = Device(round(config.vram * GIB), f"--vram {config.vram:g}") if config.vram else this_device()
    best = planner.mildest(asked, device.bytes) if device else None
    result = Plan(
        asked=planner.candidate(asked),
        device=device,
        levers=tuple(planner.levers(asked)),
        best=best,
        first_pass=on_device(first_pass_peak(planner.dtype, planner.seconds)),
        second_pass=on_device(second_pass_peak(planner.sizes, planner.dtype)),
        preview=planner.preview(asked),
    )
    if not config.json:
        for table in tables(result):
            report(table)
    return result


def planner_for(config: PlanConfig) -> tuple[Planner, TrainConfig]:
    """The planner for a model and the training settings that are asked about."""
    official = official_config(config.model_variant)
    if config.checkpoint_dir:
        sizes = open_checkpoint(config.checkpoint_dir, config.model_variant).config
    elif official:
        sizes = official
    else:
        raise UserError(
            f"--model-variant {config.model_variant}: its sizes are not known without its files.",
            f"Add --checkpoint-dir, or use one of {', '.join(OFFICIAL_FOLDERS)}.",
        )
    shared = {name: getattr(config, name) for name in changed_from_defaults(config) if name in options_of(TrainConfig)}
    nowhere = {"checkpoint_dir": config.checkpoint_dir or Path(), "dataset_dir": Path(), "output_dir": Path()}
    dtype = PRECISIONS["bf16" if config.precision == "auto" else config.precision]
    return Planner(decoder_sizes(sizes), dtype, config.song_seconds, config.condition_tokens), TrainConfig(**(shared | nowhere))


def tables(result: Plan) -> Iterator[Table]:
    """What a person reads: the run, the passes before it, what each lever saves, what to type."""

    def gib(count: int) -> str:
        return f"{count / GIB:.2f} GiB"

    peak, limit = result.asked.peak, result.device.bytes if result.device else None
    parts = [(name, gib(getattr(peak, name))) for name in PARTS]
    rows = [*parts, ("tensors at the peak", gib(peak.total)), ("needed with context and slack", gib(result.asked.needed))]
    if result.device:
        left = limit - result.asked.needed
        verdict = f"fits, {gib(left)} to spare" if left >= 0 else f"does not fit, {gib(-left)} too much"
        rows += [("there", f"{gib(limit)} ({result.device.source})"), ("so it", verdict)]
    else:
        rows += [("there", "no GPU found here; add --vram GIB to plan for one")]
    rows += [("preprocessing, pass 1 and 2", f"{gib(result.first_pass)} and {gib(result.second_pass)}")]
    rows += [(f"a preview of {result.asked.config.preview_duration:g} s while training", gib(result.preview))]
    yield Table(title="Memory of this run", columns=("part", "memory"), rows=tuple(rows))
    saved = [(" ".join(lever.flags), gib(lever.needed), gib(result.asked.needed - lever.needed)) for lever in result.levers]
    yield Table(title="What each setting would save", columns=("setting", "needed then", "saved"), rows=tuple(saved))
    if result.device:
        if result.best is None:
            rows = (("Nothing fits", "use a larger card or --device cpu"),)
        else:
            rows = ((" ".join(result.best.flags) or "the settings as they are", gib(result.best.needed)),)
        yield Table(title=f"Mildest settings that fit {gib(limit)}", columns=("add", "needed then"), rows=rows)


def as_json(result: Plan) -> dict:
    """The plan as plain values, bytes as whole numbers."""

    def candidate(c: Candidate) -> dict:
        parts = {name: getattr(c.peak, name) for name in (*PARTS, "total")}
        return {"flags": list(c.flags), "needed_bytes": c.needed, "peak_bytes": parts}

    return {
        "fits": result.fits,
        "device_bytes": result.device.bytes if result.device else None,
        "device": result.device.source if result.device else None,
        "asked": candidate(result.asked),
        "levers": [candidate(lever) for lever in result.levers],
        "best": candidate(result.best) if result.best else None,
        "first_pass_bytes": result.first_pass,
        "second_pass_bytes": result.second_pass,
        "preview_bytes": result.preview,
    }
