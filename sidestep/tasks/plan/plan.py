"""`plan`: whether a run fits, what each lever would save, and the mildest settings that fit.

Before a run: how much memory it will take, a refusal when it cannot fit, and as little recomputation as fits where that was asked for.
"""

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sidestep.acestep.checkpoint import decoder_sizes, open_checkpoint
from sidestep.acestep.device import PRECISIONS, choose_device, choose_precision
from sidestep.data.records import RecordError, find_records, load_record
from sidestep.errors import UserError
from sidestep.events import Decision, Notice, Report, Table
from sidestep.settings.config import PlanConfig, TrainConfig
from sidestep.settings.option import changed_from_defaults, options_of
from sidestep.tasks.plan.device import GIB, Device, on_device, this_device
from sidestep.tasks.plan.passes import first_pass_peak, preview_peak, second_pass_peak
from sidestep.tasks.plan.step import Peak, Shape, StepModel
from sidestep.variants import OFFICIAL_FOLDERS, official_config
from sidestep.words import gib

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
        return on_device(
            self.peak(config).between_steps
            + preview_peak(self.sizes, config, self.dtype, FRAMES_PER_SECOND, self.tokens)
        )

    def candidate(self, asked: TrainConfig, **changes: object) -> Candidate:
        """The settings asked about with some of them changed."""
        config = dataclasses.replace(asked, **changes)
        options = options_of(TrainConfig)
        flags = tuple(
            options[name].flag
            if value is True
            else f"{options[name].flag} {value:g}"
            if isinstance(value, float)
            else f"{options[name].flag} {value}"
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
            yield self.candidate(
                asked, batch_size=1, gradient_accumulation=asked.gradient_accumulation * asked.batch_size
            )
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
        return (
            candidate
            if least == candidate.config.recompute_layers
            else self.candidate(asked, **changes, recompute_layers=least)
        )

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
    return Planner(decoder_sizes(sizes), dtype, config.song_seconds, config.condition_tokens), TrainConfig(
        **(shared | nowhere)
    )


def tables(result: Plan) -> Iterator[Table]:
    """What a person reads: the run, the passes before it, what each lever saves, what to type."""

    peak, limit = result.asked.peak, result.device.bytes if result.device else None
    parts = [(name, gib(getattr(peak, name), digits=2)) for name in PARTS]
    rows = [
        *parts,
        ("tensors at the peak", gib(peak.total, digits=2)),
        ("needed with context and slack", gib(result.asked.needed, digits=2)),
    ]
    if result.device:
        left = limit - result.asked.needed
        verdict = (
            f"fits, {gib(left, digits=2)} to spare" if left >= 0 else f"does not fit, {gib(-left, digits=2)} too much"
        )
        rows += [("there", f"{gib(limit, digits=2)} ({result.device.source})"), ("so it", verdict)]
    else:
        rows += [("there", "no GPU found here; add --vram GIB to plan for one")]
    rows += [
        ("preprocessing, pass 1 and 2", f"{gib(result.first_pass, digits=2)} and {gib(result.second_pass, digits=2)}")
    ]
    rows += [(f"a preview of {result.asked.config.preview_duration:g} s while training", gib(result.preview, digits=2))]
    yield Table(title="Memory of this run", columns=("part", "memory"), rows=tuple(rows))
    saved = [
        (" ".join(lever.flags), gib(lever.needed, digits=2), gib(result.asked.needed - lever.needed, digits=2))
        for lever in result.levers
    ]
    yield Table(title="What each setting would save", columns=("setting", "needed then", "saved"), rows=tuple(saved))
    if result.device:
        if result.best is None:
            rows = (("Nothing fits", "use a larger card or --device cpu"),)
        else:
            rows = ((" ".join(result.best.flags) or "the settings as they are", gib(result.best.needed, digits=2)),)
        yield Table(
            title=f"Mildest settings that fit {gib(limit, digits=2)}", columns=("add", "needed then"), rows=rows
        )


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


def fitted(config: TrainConfig, report: Report) -> TrainConfig:
    """The settings with which a run fits into the GPU: as they are, but that `--recompute-as-needed` becomes a number of layers.

    Raises UserError when the run cannot fit, unless `--even-if-it-does-not-fit` was typed. The longest song decides, with the most condition tokens
    that any song has. Without a CUDA GPU nothing is known and nothing refused.
    """
    device = this_device()
    if device is not None and choose_device(config.device).value.type == "cuda":
        return fitted_to(device, config, report)
    if config.recompute_as_needed:
        report(
            Decision(
                what="recomputation",
                value="all layers",
                reason="--recompute-as-needed knows only the memory of CUDA GPUs",
            )
        )
    return replace(config, recompute_as_needed=False)


def fitted_to(device: Device, config: TrainConfig, report: Report) -> TrainConfig:
    """`fitted` for a device whose memory is known."""
    as_needed, config = config.recompute_as_needed, replace(config, recompute_as_needed=False)
    frames, tokens = longest(config)
    if not frames:
        return config
    sizes = decoder_sizes(open_checkpoint(config.checkpoint_dir, config.model_variant).config)
    dtype = choose_precision(config.precision, choose_device(config.device).value).value
    planner = Planner(sizes, dtype, frames / FRAMES_PER_SECOND, tokens)
    if as_needed:
        config = replace(config, recompute_layers=planner.least_recomputation(config, device.free))
        layers = (
            "all" if config.recompute_layers is None else f"{config.recompute_layers} of {sizes['num_hidden_layers']}"
        )
        report(Decision(what="recomputation", value=f"{layers} layers", reason="as few as fit"))
    asked = planner.candidate(config)
    needed = f"{asked.needed / GIB:.1f} of {gib(device.bytes)}"
    if asked.needed > device.bytes and not config.even_if_it_does_not_fit:
        best = planner.mildest(config, device.bytes)
        fix = f"These settings fit: {' '.join(best.flags)}" if best else "No settings fit this card: use a larger one."
        raise UserError(
            f"This run needs {needed} ({device.source}): it would run out of memory.",
            f"{fix}\nTo try all the same: --even-if-it-does-not-fit",
        )
    report(
        Decision(
            what="memory", value=needed, reason="the step was run on tensors without bytes; context and slack are added"
        )
    )
    if device.free < asked.needed <= device.bytes:
        message = f"Other programs hold {gib(device.taken)} of {device.source}: this run may run out of memory while they go on."
        report(Notice(message=message, level="warning"))
    wants_previews = config.preview_every or config.preview_prompt or config.preview_prompts
    if wants_previews and (preview := planner.preview(config)) > device.free:
        shorter = "make them shorter (--preview-duration)" + (
            "" if config.offload_encoder else " or add --offload-encoder"
        )
        message = f"A preview needs {preview / GIB:.1f} of the {gib(device.free)} that are free: there may be none. To have them, {shorter}."
        report(Notice(message=message, level="warning"))
    return config


def longest(config: TrainConfig) -> tuple[int, int]:
    """(latent frames of the longest song, condition tokens of the wordiest) in `--dataset-dir`; zeros where nothing is readable yet."""
    frames, tokens = 0, 0
    for path in find_records(config.dataset_dir) if config.dataset_dir.is_dir() else []:
        try:
            record = load_record(path)
        except RecordError:
            continue  # training reports it
        frames, tokens = max(frames, len(record.target_latents)), max(tokens, len(record.encoder_hidden_states))
    return frames, tokens
