"""`plan`: whether a run fits into a GPU, what each setting would save, and the mildest settings that fit.

Before a run `check_memory` asks the same: it refuses a run that cannot fit, and finds as little recomputation as fits.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from sidestep.acestep.checkpoint import Checkpoint, decoder_sizes, open_checkpoint
from sidestep.acestep.conditions import TEXT_TOKENS
from sidestep.acestep.device import (
    GIB,
    PRECISIONS,
    GpuMemory,
    choose_device,
    choose_precision,
    gpu_memory,
    with_overhead,
)
from sidestep.acestep.layout import read_config
from sidestep.acestep.lm.model import choose_language_model
from sidestep.adapters.attach import check_sizes
from sidestep.adapters.read import read_adapter
from sidestep.data.batches import Song
from sidestep.data.records import ReadIndex, index_records
from sidestep.errors import UserError
from sidestep.events import Decision, Notice, Report, Table
from sidestep.settings.advice import Advice, advice_for
from sidestep.settings.config import (
    EstimateConfig,
    PlanConfig,
    SampleConfig,
    TrainConfig,
    TrainLmConfig,
    memory_levers,
)
from sidestep.settings.option import changed_from_defaults, options_of, resolve
from sidestep.tasks.plan.language import preview_bytes, sizes_for, writing_bytes, written_tokens
from sidestep.tasks.plan.passes import first_pass_peak, preview_peak, second_pass_peak
from sidestep.tasks.plan.step import Peak, Shape, StepModel
from sidestep.tasks.think import LONGEST_SECONDS, composer_of
from sidestep.tasks.train.prior import extra_time
from sidestep.tasks.train.songs import largest_batch, songs_of
from sidestep.variants import FRAMES_PER_SECOND, OFFICIAL_FOLDERS, official_config
from sidestep.words import did_you_mean, gib

SUNG_TOKENS = 256  # that lyrics of some verses take
SHORTEST_WINDOW_SECONDS = 15.0
GATHERED_LAYERS = 2  # that FSDP holds whole at a time: the one that computes and the next
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Candidate:
    """Settings and the peak of a step with them; `flags` are what differs from the settings asked about."""

    config: TrainConfig
    peak: Peak
    flags: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes on the device, context and slack included."""
        return with_overhead(self.peak.total)


@dataclass(frozen=True)
class Plan:
    """Answer of the planner. Bytes everywhere. seconds: length of the songs it is for.

    best: the mildest settings that leave the card its reserve, None when none do. faster: these with as little
    recomputed as then fits, None where that is what they do. ram: what waits there for the GPU.
    saving: what saves take of it. composing: the language model that writes the previews before the training, None
    without `--preview-think`. advice: on training on the songs of a folder.
    """

    seconds: float
    asked: Candidate
    gpu: GpuMemory | None
    options: tuple[Candidate, ...]
    best: Candidate | None
    faster: Candidate | None
    first_pass: int
    second_pass: int
    preview: int
    ram: int
    saving: int
    composing: int | None = None
    advice: Advice | None = None

    @property
    def fits(self) -> bool | None:
        """None when no GPU's memory is known."""
        return None if self.gpu is None else self.asked.needed <= self.gpu.bytes


class Planner:
    """Peaks of one model's step under different settings, each computed once. seconds: of the songs trained on.

    shards: GPUs that share all weights under FSDP, each of which is planned for. players: sizes of the models that play
    previews, and whether each is another than the trained one; empty where only that one does. songs: those of the run,
    whose lengths say which batches form; without any, each is of `--batch-size`.
    """

    def __init__(
        self,
        sizes: dict,
        dtype: torch.dtype,
        seconds: float,
        tokens: int,
        shards: int = 1,
        players: Sequence[tuple[dict, bool]] = (),
        songs: Sequence[Song] = (),
    ):
        self.sizes, self.dtype, self.seconds, self.tokens, self.shards = sizes, dtype, seconds, tokens, shards
        self.players, self.songs = players or ((sizes, False),), list(songs)
        self.layers = int(sizes["num_hidden_layers"])
        self._known: dict[TrainConfig, StepModel] = {}

    def window(self, config: TrainConfig) -> float:
        """Seconds that a step is trained on: a window longer than the song is the song."""
        return min(config.chunk_duration or self.seconds, self.seconds)

    def peak(self, config: TrainConfig) -> Peak:
        """Peak of a step."""
        same = replace(  # what a `StepModel` answers without another run of the step is left out
            config,
            gradient_checkpointing=True,
            recompute_layers=None,
            swap_blocks=0,
            optimizer_type="adamw",
            ema_decay=0.0,
            prior_data=None,
            gradient_accumulation=min(config.gradient_accumulation, 2),
            base_precision="auto" if config.base_precision == "auto" else "int8",
        )
        if same not in self._known:
            frames, batch = round(self.window(config) * FRAMES_PER_SECOND), config.batch_size
            if self.songs and batch > 1:
                formed = largest_batch(self.songs, config, FRAMES_PER_SECOND)
                # other music, which may have the longest song of all, comes one by one
                frames, batch = max((frames, 1), formed, key=lambda each: each[0] * each[1])
            self._known[same] = StepModel(self.sizes, same, Shape(batch, frames, self.tokens), self.dtype)
        whole = self._known[same].peak(config)
        if self.shards == 1:
            return whole
        parts = {name: getattr(whole, name) // self.shards for name in ("weights", "adapter", "gradients", "optimizer")}
        gathered = GATHERED_LAYERS * (whole.weights + whole.adapter) // self.layers
        return replace(whole, **parts, average=whole.average // self.shards, activations=whole.activations + gathered)

    def preview(self, config: TrainConfig) -> int:
        """Bytes on the device while a preview is made in a run, context and slack included.

        Another model has weights of the same size, which come when those of the trained one have left; beside the
        trained adapter it has a copy of it.
        """
        peak = self.peak(config)
        beside = (
            preview_peak(sizes, config, self.dtype, FRAMES_PER_SECOND, self.tokens) + is_other * peak.adapter
            for sizes, is_other in self.players
        )
        return with_overhead(peak.between_steps + max(beside))

    def waiting(self, config: TrainConfig, on_cpu: bool = False) -> dict[str, int]:
        """Bytes of RAM beside the device's memory, by the flags that ask for them.

        Streamed blocks come from a model that is read into RAM whole; its blocks move into pinned memory one by one.
        While another model plays, the trained one's weights wait there; where blocks are streamed they do already, and
        the other is read into RAM as well. on_cpu: the device is the CPU, where the other model comes beside the run.
        """
        whole = self.peak(replace(config, swap_blocks=0)).weights
        found = {}
        if config.swap_blocks and not on_cpu:
            found[f"--swap-blocks {config.swap_blocks}"] = whole
        if config.offload_activations and not on_cpu:
            kept = self.peak(replace(config, offload_activations=False)).activations
            found["--offload-activations"] = kept - self.peak(config).activations
        if any(is_other for _, is_other in self.players):
            found[f"--preview-variant {' '.join(config.preview_variant)}"] = whole
        return found

    def saving(self, config: TrainConfig) -> int:
        """Bytes of RAM that saves take beside the training that goes on.

        A copy of what is trained, its average and what the optimizer knows; while that is written the adapter once more
        and a factor of each module with alpha folded in; and the copy of the next save, which waits for its turn.
        """
        peak = self.peak(config)
        return peak.adapter + peak.average + peak.optimizer + round(2.5 * peak.adapter)

    def candidate(self, asked: TrainConfig, config: TrainConfig | None = None) -> Candidate:
        """Settings, by default those asked about, as a candidate for them."""
        config = config or asked
        flags = []
        for name, option in options_of(TrainConfig).items():
            value = getattr(config, name)
            if value != getattr(asked, name):
                value = self.layers if value is None else f"{value:g}" if isinstance(value, float) else value
                flags.append(option.flag if value is True else f"{option.flag} {value}")
        return Candidate(config, self.peak(config), tuple(flags))

    def memory_options(self, asked: TrainConfig) -> Iterator[Candidate]:
        """Each single setting that saves memory, the one that costs least first.

        First what changes next to nothing, then what costs time, last what costs quality.
        """
        everything_recomputed = asked.gradient_checkpointing and asked.recompute_layers is None
        accumulation = asked.gradient_accumulation * asked.batch_size
        table: tuple[tuple[bool, dict[str, Any]], ...] = (
            (not everything_recomputed, {"gradient_checkpointing": True, "recompute_layers": None}),
            (asked.optimizer_type in ("adamw", "prodigy"), {"optimizer_type": "adamw8bit"}),
            (asked.batch_size > 1, {"batch_size": 1, "gradient_accumulation": accumulation}),
            (asked.base_precision == "auto" and not asked.swap_blocks, {"base_precision": "int8"}),
            (not asked.offload_activations, {"offload_activations": True}),
            (
                everything_recomputed and asked.swap_blocks < self.layers and asked.base_precision != "nf4",
                {"swap_blocks": self.layers, "base_precision": "auto"},
            ),
            (asked.base_precision != "nf4" and not asked.swap_blocks, {"base_precision": "nf4"}),
            (self.window(asked) > 60, {"chunk_duration": 60.0}),
        )
        for saves, changes in table:
            if saves:
                yield self.candidate(asked, replace(asked, **changes))

    def mildest(self, asked: TrainConfig, limit: int) -> Candidate | None:
        """The settings asked about, plus one option after another until the step fits into `limit` bytes.

        None where nothing does.
        """
        config = asked
        while self.candidate(config).needed > limit:
            option = next(self.memory_options(config), None)
            seconds = self.window(config) / 2
            if option is not None:
                config = option.config
            elif seconds >= SHORTEST_WINDOW_SECONDS:
                config = replace(config, chunk_duration=seconds)
            else:
                return None
        for name in ("optimizer_type", "offload_activations", "base_precision"):  # what a later option made needless
            milder = replace(config, **{name: getattr(asked, name)})
            if self.candidate(milder).needed <= limit:
                config = milder
        return self.candidate(asked, config)

    def faster(self, asked: TrainConfig, config: TrainConfig, limit: int) -> Candidate | None:
        """The settings with as little recomputed as fits into `limit` bytes; None where they have that already."""
        fewest = replace(config, recompute_layers=self.least_recomputation(config, limit))
        return self.candidate(asked, fewest) if fewest != config else None

    def least_recomputation(self, config: TrainConfig, limit: int) -> int | None:
        """Fewest recomputed layers that fit into `limit` bytes, None for all.

        As `config` has it where it says a number, recomputes none or swaps blocks, which must be recomputed.
        """
        if not config.gradient_checkpointing or config.recompute_layers is not None or config.swap_blocks:
            return config.recompute_layers
        low, high = 0, self.layers
        while low < high:
            middle = (low + high) // 2
            if with_overhead(self.peak(replace(config, recompute_layers=middle)).total) <= limit:
                high = middle
            else:
                low = middle + 1
        return high if high < self.layers else None


def plan(config: PlanConfig, report: Report) -> Plan:
    """Plan a run for a model that may not even be on this disk. Raises UserError for a model of unknown sizes."""
    gc.freeze()  # a tenth of the time would go to searching the imported modules for garbage
    sizes = sizes_of(config.checkpoint_dir, config.model_variant, "--model-variant")
    shared = {name: v for name, v in changed_from_defaults(config).items() if name in options_of(TrainConfig)}
    folders = {"checkpoint_dir": config.checkpoint_dir or Path(), "dataset_dir": Path(), "output_dir": Path()}
    asked = resolve(TrainConfig, shared, folders)
    check_sizes(asked, sizes)
    dtype = PRECISIONS["bf16" if config.precision == "auto" else config.precision]
    seconds, tokens, songs = config.song_seconds, config.condition_tokens, []
    if config.dataset_dir:
        index = cache(index_records)
        frames, tokens = longest(config.dataset_dir, config.prior_data, index=index)
        songs = songs_of(config.dataset_dir, index(config.dataset_dir)[0])
        seconds = frames / FRAMES_PER_SECOND
        if not frames:
            raise UserError(
                f"--dataset-dir {config.dataset_dir}: there are no tensors to plan for.",
                "Preprocess songs first, or say --song-seconds instead.",
            )
    players = players_of(config, sizes)
    planner = Planner(decoder_sizes(sizes), dtype, seconds, tokens, players=players, songs=songs)
    asked_for = GpuMemory(round(config.vram * GIB), f"--vram {config.vram:g}") if config.vram else None
    gpu = asked_for or gpu_memory(choose_device().value)
    best = planner.mildest(asked, gpu.usable) if gpu else None
    result = Plan(
        seconds=seconds,
        asked=planner.candidate(asked),
        gpu=gpu,
        options=tuple(planner.memory_options(asked)),
        best=best,
        faster=planner.faster(asked, best.config, gpu.usable) if gpu and best else None,
        first_pass=with_overhead(first_pass_peak(planner.dtype, planner.seconds)),
        second_pass=with_overhead(second_pass_peak(planner.sizes, planner.dtype)),
        preview=planner.preview(asked),
        ram=sum(planner.waiting(asked).values()),
        saving=planner.saving(asked),
        composing=with_overhead(composing_bytes(sizes_for(config)[0], asked, dtype)) if config.preview_think else None,
        advice=advice_for(vars(asked) | {"dataset_dir": config.dataset_dir}),
    )
    if not config.json:
        for table in tables(result):
            report(table)
    return result


def sizes_of(checkpoint_dir: Path | None, name: str, flag: str) -> dict:
    """The config of a model, of an official one also without its files. Raises UserError for any other."""
    if checkpoint_dir:
        return open_checkpoint(checkpoint_dir, name, flag=flag).config
    if official := official_config(name):
        return official
    raise UserError(
        f"{flag} {name}: its sizes are not known without its files.",
        did_you_mean(name, OFFICIAL_FOLDERS) or f"Add --checkpoint-dir, or use one of {', '.join(OFFICIAL_FOLDERS)}.",
    )


def players_of(config: PlanConfig | TrainConfig, own: dict) -> list[tuple[dict, bool]]:
    """(sizes, whether it is another than the trained one) of each model that plays previews. own: the trained one's.

    Raises UserError for a model of unknown sizes, or of others than the trained one has.
    """
    players = []
    for name in config.preview_variant:
        sizes = sizes_of(config.checkpoint_dir, name, "--preview-variant")
        for field in ("num_hidden_layers", "hidden_size", "intermediate_size"):
            if sizes[field] != own[field]:
                raise UserError(
                    f"--preview-variant {name}: its {field} is {sizes[field]}, that of {config.model_variant} "
                    f"{own[field]}: the adapter does not fit on it.",
                    "Name a model of the same size.",
                )
        players.append((decoder_sizes(sizes), name != config.model_variant))
    return players


def tables(result: Plan) -> Iterator[Table]:
    """What a person reads: the run, the passes before it, what each option saves, what to type."""

    def amount(number: int) -> str:
        return gib(number, digits=2)

    asked, gpu = result.asked, result.gpu
    played = f" on {' and '.join(asked.config.preview_variant)}" if asked.config.preview_variant else ""
    rows = [
        *((name, amount(getattr(asked.peak, name))) for name in PARTS),
        ("tensors at the peak", amount(asked.peak.total)),
        ("needed with context and slack", amount(asked.needed)),
    ]
    if gpu:
        reserve = f"{amount(gpu.bytes - gpu.usable)} that should stay free"
        if asked.needed <= gpu.usable:
            verdict = f"fits, {amount(gpu.usable - asked.needed)} to spare beside the {reserve}"
        elif asked.needed <= gpu.bytes:
            verdict = f"hardly fits: it takes {amount(asked.needed - gpu.usable)} of the {reserve}"
        else:
            verdict = f"does not fit, {amount(asked.needed - gpu.bytes)} too much"
        rows += [("there", f"{amount(gpu.bytes)} ({gpu.source})"), ("so it", verdict)]
    else:
        rows += [("there", "no GPU found here; add --vram GIB to plan for one")]
    rows += [
        ("preprocessing, pass 1 and 2", f"{amount(result.first_pass)} and {amount(result.second_pass)}"),
        (f"a preview of {asked.config.preview_duration:g} s{played} while training", amount(result.preview)),
    ]
    if result.composing:
        rows.append(("composing the previews, before it", amount(result.composing)))
    if result.ram:
        rows.append(("waits in RAM meanwhile", amount(result.ram)))
    rows.append(("copies in RAM while it saves", amount(result.saving)))
    if asked.config.prior_data:
        rows.append(("time for --prior-data", f"{extra_time(asked.config):.0%} more in each optimizer step"))
    yield Table(title="Memory of this run", columns=("part", "memory"), rows=tuple(rows))
    saved = tuple(
        (" ".join(o.flags), amount(o.needed), amount(max(0, asked.needed - o.needed))) for o in result.options
    )
    yield Table(title="What each setting would save", columns=("setting", "needed then", "saved"), rows=saved)
    if gpu:
        advice = [("Nothing fits", "use a larger card or --device cpu")]
        if result.best:
            advice = [
                (
                    f"add {' '.join(result.best.flags)}" if result.best.flags else "nothing: it fits as it is",
                    amount(result.best.needed),
                )
            ]
        if result.faster:
            advice.append(
                (f"faster, with what is spare: {' '.join(result.faster.flags)}", amount(result.faster.needed))
            )
        yield Table(title=f"What to do on {amount(gpu.bytes)}", columns=("advice", "needed then"), rows=tuple(advice))
    if result.advice:
        rows = [
            ("suggested", result.advice.value),
            ("because", result.advice.reason),
            ("as flags", result.advice.flags),
        ]
        yield Table(title="How to train on these songs", columns=("", "advice"), rows=tuple(rows))


def as_json(result: Plan) -> dict:
    """The plan as plain values, bytes as whole numbers."""

    def candidate(c: Candidate) -> dict:
        parts = {name: getattr(c.peak, name) for name in (*PARTS, "total")}
        return {"flags": list(c.flags), "needed_bytes": c.needed, "peak_bytes": parts}

    return {
        "fits": result.fits,
        "song_seconds": result.seconds,
        "device_bytes": result.gpu.bytes if result.gpu else None,
        "device": result.gpu.source if result.gpu else None,
        "asked": candidate(result.asked),
        "memory_options": [candidate(option) for option in result.options],
        "best": candidate(result.best) if result.best else None,
        "faster": candidate(result.faster) if result.faster else None,
        "first_pass_bytes": result.first_pass,
        "second_pass_bytes": result.second_pass,
        "preview_bytes": result.preview,
        "composing_bytes": result.composing,
        "ram_bytes": result.ram,
        "saving_bytes": result.saving,
        "advice": asdict(result.advice) if result.advice else None,
    }


def check_memory(config: TrainConfig, report: Report, index: ReadIndex = index_records) -> TrainConfig:
    """The settings with which a run fits into the GPU: as they are, but that `--recompute-as-needed` becomes a number.

    Raises UserError when the run cannot fit, unless `--even-if-it-does-not-fit` was typed. The longest song decides,
    with the most condition tokens that any song has. Where the device tells no memory, nothing is refused.
    index: of a folder of records, in the place of reading it here.
    """
    device = choose_device(config.device).value
    if (gpu := gpu_memory(device)) is not None:
        return fit_into(gpu, config, report, index)
    hears_others = config.makes_previews and config.preview_variant
    if device.type == "cpu" and hears_others and (planner := planner_for(config, index)):
        require_ram(planner, config, on_cpu=True)
    if config.recompute_as_needed:
        reason = f"--recompute-as-needed knows no memory of a device of kind {device.type}"
        report(Decision(what="recomputation", value="all layers", reason=reason))
    return replace(config, recompute_as_needed=False)


def fit_into(gpu: GpuMemory, config: TrainConfig, report: Report, index: ReadIndex = index_records) -> TrainConfig:
    """`check_memory` for a GPU whose memory is known."""
    as_needed, config = config.recompute_as_needed, replace(config, recompute_as_needed=False)
    if (planner := planner_for(config, index)) is None:
        return config
    if config.preview_think and config.makes_previews:
        checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
        adapter = read_adapter(config.preview_adapter) if config.preview_adapter else None
        sizes = read_config(composer_of(checkpoint.layout, "auto", adapter, "--preview-adapter") / "config.json")
        composing = with_overhead(composing_bytes(sizes, config, planner.dtype))
        if composing > gpu.bytes and not config.even_if_it_does_not_fit:
            raise UserError(
                f"--preview-think: the language model needs {gib(composing)}, and {gpu.source} has {gib(gpu.bytes)}.",
                "Leave it out, or store the models smaller: --base-precision nf4",
            )
    if as_needed:
        config = replace(config, recompute_layers=planner.least_recomputation(config, min(gpu.free, gpu.usable)))
        layers = "all" if config.recompute_layers is None else f"{config.recompute_layers} of {planner.layers}"
        report(Decision(what="recomputation", value=f"{layers} layers", reason="as few as fit"))
    require_ram(planner, config)
    asked = planner.candidate(config)
    needed = f"{asked.needed / GIB:.1f} of {gib(gpu.bytes)}"
    if asked.needed > gpu.bytes and not config.even_if_it_does_not_fit:
        best = planner.mildest(config, gpu.usable)
        fix = f"These settings fit: {' '.join(best.flags)}" if best else "No settings fit this card: use a larger one."
        raise UserError(
            f"This run needs {needed} ({gpu.source}): it would run out of memory.",
            f"{fix}\nTo try all the same: --even-if-it-does-not-fit",
        )
    reason = "the step was run on tensors without bytes; context and slack are added"
    report(Decision(what="memory", value=needed, reason=reason))
    if gpu.free < asked.needed <= gpu.bytes:
        message = (
            f"Other programs hold {gib(gpu.taken)} of {gpu.source}: this run may run out of memory while they go on."
        )
        report(Notice(message=message, level="warning"))
    if config.makes_previews and (preview := planner.preview(config)) > gpu.free:
        shorter = "make them shorter (--preview-duration)"
        shorter += "" if config.offload_encoder else " or add --offload-encoder"
        message = (
            f"A preview needs {preview / GIB:.1f} of the {gib(gpu.free)} that are free: there may be none. "
            f"To have them, {shorter}."
        )
        report(Notice(message=message, level="warning"))
    return config


def planner_for(config: TrainConfig, index: ReadIndex) -> Planner | None:
    """The planner of a run on the songs of its folders, None without any."""
    index = cache(index)
    frames, tokens = longest(config.dataset_dir, config.prior_data, index=index)
    if not frames:
        return None
    sizes = open_checkpoint(config.checkpoint_dir, config.model_variant).config
    dtype = choose_precision(config.precision, choose_device(config.device).value).value
    players = players_of(config, sizes) if config.makes_previews else ()
    songs, seconds = songs_of(config.dataset_dir, index(config.dataset_dir)[0]), frames / FRAMES_PER_SECOND
    return Planner(decoder_sizes(sizes), dtype, seconds, tokens, fsdp_shards(), players, songs)


def check_estimate(
    config: EstimateConfig, training: TrainConfig, report: Report, index: ReadIndex = index_records
) -> None:
    """Raises UserError when the measurement of `estimate` cannot fit. training: the step that it measures."""
    device, index = choose_device(config.device).value, cache(index)
    frames, tokens = longest(config.dataset_dir, index=index)
    if (gpu := gpu_memory(device)) is None or not frames:
        return
    sizes = decoder_sizes(open_checkpoint(config.checkpoint_dir, config.model_variant).config)
    dtype, songs = (
        choose_precision(config.precision, device).value,
        songs_of(config.dataset_dir, index(config.dataset_dir)[0]),
    )
    planner = Planner(sizes, dtype, frames / FRAMES_PER_SECOND, tokens, songs=songs)
    # there is no adapter; one of rank 1 leaves next to nothing of one
    measuring = replace(training, rank=1, batch_size=config.batch_size)
    require_ram(planner, measuring)
    require_room(planner.peak(measuring).total, gpu, config, report)


def check_sample(config: SampleConfig, report: Report) -> None:
    """Raises UserError when `sample` cannot fit; of the adapters, which are small beside the models, it knows nothing.

    With `--think` the language model is gone before the DiT comes: the larger of the two decides.
    """
    if (gpu := gpu_memory(choose_device(config.device).value)) is not None:
        for _, planner, making in _players_of_sample(config):
            require_ram(planner, making)
        require_room(sample_bytes(config), gpu, config, report)


def sample_bytes(config: SampleConfig) -> int:
    """Bytes of tensors on the device while `sample` works, of the model that takes most."""
    needed = []
    for checkpoint, planner, making in _players_of_sample(config):
        beside = preview_peak(planner.sizes, making, planner.dtype, FRAMES_PER_SECOND, planner.tokens)
        needed.append(planner.peak(making).weights + beside)
        if config.think:
            adapter = read_adapter(config.lm_adapter) if config.lm_adapter else None
            sizes = read_config(composer_of(checkpoint.layout, config.lm, adapter) / "config.json")
            sides = 1 + (config.lm_guidance != 1)
            needed.append(composing_bytes(sizes, making, planner.dtype, sides))
    return max(needed)


def composing_bytes(sizes: dict, config: TrainConfig, dtype: torch.dtype, sides: int = 2) -> int:
    """Bytes of tensors while a language model alone composes a song of `--preview-duration`.

    sizes: its config.json. sides: 2 under guidance.
    """
    tokens = written_tokens(config.preview_duration)
    return writing_bytes(sizes, config.base_precision, tokens, dtype.itemsize, sides)


def check_language_previews(config: TrainLmConfig, report: Report) -> None:
    """Warn where previews of `train-lm` do not fit; what was written is there also where it cannot be played."""
    device = choose_device(config.device).value
    gpu = gpu_memory(device)
    if gpu is None or not config.makes_previews:
        return
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    sizes = read_config(choose_language_model(checkpoint.layout, config.lm) / "config.json")
    dtype = choose_precision(config.precision, device).value
    writing, playing = preview_bytes(sizes, checkpoint.config, config, dtype)
    what, needed, then = "The music of a preview", playing, "there may be none, only what the composer wrote"
    if writing > gpu.free:
        what, needed, then = "Writing a preview", writing, "there may be none"
    if needed > gpu.free:
        message = f"{what} needs {needed / GIB:.1f} of the {gib(gpu.free)} that are free: {then}. "
        message += "What helps: --preview-duration 10, --base-precision int8."
        report(Notice(message=message, level="warning"))


def _players_of_sample(config: SampleConfig) -> Iterator[tuple[Checkpoint, Planner, TrainConfig]]:
    """Each model that plays, one after the other, with its planner, as a training that makes a preview."""
    dtype = choose_precision(config.precision, choose_device(config.device).value).value
    seconds = config.duration or LONGEST_SECONDS
    shared = ("checkpoint_dir", "model_variant", "attention", "base_precision", "swap_blocks", "offload_encoder")
    values: dict[str, Any] = {name: getattr(config, name) for name in shared}
    making = TrainConfig(dataset_dir=Path(), output_dir=Path(), rank=1, preview_duration=seconds, **values)
    for name in config.preview_variant or (config.model_variant,):
        checkpoint = open_checkpoint(config.checkpoint_dir, name)
        yield checkpoint, Planner(decoder_sizes(checkpoint.config), dtype, seconds, TEXT_TOKENS + SUNG_TOKENS), making


def require_room(tensor_bytes: int, gpu: GpuMemory, config: EstimateConfig | SampleConfig, report: Report) -> None:
    """Raises UserError where tensors alone are more than the GPU has; warns where a context and slack are too much."""
    needed = with_overhead(tensor_bytes)
    what = f"This needs {needed / GIB:.1f} of {gib(gpu.bytes)} ({gpu.source})"
    helps = f"What helps: {', '.join(memory_levers(config)) or 'a smaller model variant, or --device cpu'}."
    if tensor_bytes > gpu.bytes:
        raise UserError(f"{what}: it would run out of memory.", helps)
    report(Decision(what="memory", value=f"{needed / GIB:.1f} of {gib(gpu.bytes)}", reason="as planned, not measured"))
    if needed > gpu.free:
        message = f"{what}, of which {gib(gpu.free)} are free: it may run out of memory. {helps}"
        report(Notice(message=message, level="warning"))


def require_ram(planner: Planner, config: TrainConfig, on_cpu: bool = False) -> None:
    """Raises UserError where what waits on the CPU for the GPU is more than the RAM that is available.

    on_cpu: the device is the CPU, so that the run itself is in RAM, too.
    """
    waiting, available = planner.waiting(config, on_cpu), psutil.virtual_memory().available
    own = planner.peak(replace(config, swap_blocks=0, offload_activations=False)).total if on_cpu and waiting else 0
    needed = own + sum(waiting.values())
    if needed > available and not config.even_if_it_does_not_fit:
        beside = f" beside {gib(own)} of the run" if own else ""
        fixes = ["Close other programs, or take --base-precision int8 or nf4"]
        if any(flag.startswith(("--swap", "--offload")) for flag in waiting):
            fixes[0] += " in its place, which needs no RAM"
        if any(flag.startswith("--preview-variant") for flag in waiting):
            fixes.append("Without --preview-variant the trained model plays, which takes no RAM beside.")
        raise UserError(
            f"{' and '.join(waiting)}: {(needed - own) / GIB:.1f} GiB would wait in RAM{beside}, of which "
            f"{gib(available)} are available.",
            "\n".join((f"{fixes[0]}.", *fixes[1:])),
        )


def fsdp_shards() -> int:
    """GPUs that share the weights, as `accelerate launch --use_fsdp` says to its processes; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1


def longest(*folders: Path | None, index: ReadIndex = index_records) -> tuple[int, int]:
    """(latent frames of the longest song, condition tokens of the wordiest) in folders of tensors; zeros without any.

    Of `--prior-data` too: its step is one more pass without gradient before one like that of the songs, so that the
    longest of both decides.
    """
    # training reports those that are broken
    infos = [info for folder in folders if folder for info in index(folder)[0].values()]
    return max((i.frames for i in infos), default=0), max((i.tokens for i in infos), default=0)
