"""The memory that training and listening of the language model take, by its sizes. Source: lm-facts, section 5.

Arithmetic, not measured on a GPU.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sidestep.acestep.checkpoint import decoder_sizes, open_checkpoint
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
from sidestep.acestep.lm.decoding import ANSWER_TOKENS, HEARD_SECONDS
from sidestep.acestep.lm.loss import PIECE
from sidestep.acestep.lm.model import CODES_PER_SECOND, SIZES, choose_language_model, find_language_models
from sidestep.acestep.quantize import quantized_bytes
from sidestep.data.records import ReadIndex, index_records
from sidestep.errors import UserError
from sidestep.events import Decision, Notice, Report, Table
from sidestep.settings.config import BuildDatasetConfig, PlanConfig, TrainConfig, TrainLmConfig, memory_levers
from sidestep.settings.option import changed_from_defaults, options_of, resolve
from sidestep.tasks.plan.passes import codes_bytes, encoding_peak, preview_peak, vae_bytes
from sidestep.tasks.plan.step import Shape, StepModel
from sidestep.variants import FRAMES_PER_SECOND, official_config
from sidestep.words import gib

BY_ARITHMETIC = "by arithmetic, not measured"
PLAIN_TOKENS = 1024  # of a song beside its codes: prompt, caption twice, lyrics
PLAYED_TOKENS = 512  # lyric and text tokens of a preview
ACTIVATIONS_PER_LAYER = 18  # widths of hidden states and four of the MLP that one layer's backward pass holds

# Source: lm-facts, section 1.
_SHARED = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 217_204}
OFFICIAL_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    size: {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **_SHARED,
    }
    for size, width, inner, layers, heads in (
        ("0.6B", 1024, 3072, 28, 16),
        ("1.7B", 2048, 6144, 28, 16),
        ("4B", 2560, 9728, 36, 32),
    )
}


def weights_bytes(sizes: dict[str, Any], bytes_per_value: int, base_precision: str) -> int:
    """Bytes of a language model's weights. sizes: its config.json."""
    shapes = layer_shapes(sizes)
    if base_precision == "auto":
        layer = sum(rows * columns for rows, columns in shapes.values()) * bytes_per_value
    else:
        layer = sum(quantized_bytes(rows, columns, base_precision) for rows, columns in shapes.values())
    return sizes["vocab_size"] * sizes["hidden_size"] * bytes_per_value + sizes["num_hidden_layers"] * layer


def layer_shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each matrix of a layer."""
    width, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    return {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def training_bytes(sizes: dict[str, Any], config: TrainLmConfig, tokens: int, bytes_per_value: int) -> int:
    """Peak bytes of a training step on a song of `tokens`, context and slack included."""
    width, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    adapter = adapter_bytes(sizes, config)
    layer = tokens * (ACTIVATIONS_PER_LAYER * width + 4 * inner) * 4
    activations = layers * tokens * width * bytes_per_value + layer if config.gradient_checkpointing else layers * layer
    logits = 3 * min(tokens, PIECE) * sizes["vocab_size"] * 4 + 2 * tokens * width * 4
    weights = weights_bytes(sizes, bytes_per_value, config.base_precision)
    trained = adapter + kept_bytes(config, adapter)  # with the gradient
    return with_overhead(round(weights + trained + max(activations, logits) + layers * tokens * width))


def adapter_bytes(sizes: dict[str, Any], config: TrainLmConfig) -> int:
    """Bytes of the adapter, which is in fp32."""
    mlp = ("gate_proj", "up_proj", "down_proj") if config.target_mlp else ()
    adapted = [shape for name, shape in layer_shapes(sizes).items() if name in (*config.target_modules, *mlp)]
    return 4 * sizes["num_hidden_layers"] * config.rank * sum(rows + columns for rows, columns in adapted)


def kept_bytes(config: TrainLmConfig, adapter: int) -> int:
    """Bytes of the adapter, its average and what the optimizer knows of it, which are there between steps, too."""
    known = 2 if config.optimizer_type == "adamw" else 0.5 if config.optimizer_type == "adamw8bit" else 4
    return round(adapter * (1 + bool(config.ema_decay) + known))


def preview_bytes(
    lm: dict[str, Any], dit: dict[str, Any], config: TrainLmConfig, dtype: torch.dtype
) -> tuple[int, int]:
    """(peak bytes while the language model writes a preview of `train-lm`, while the DiT plays it), with slack.

    For the DiT the frozen language model leaves the device; what is trained stays. lm, dit: config.json of each.
    """
    kept, tokens = kept_bytes(config, adapter_bytes(lm, config)), written_tokens(config.preview_duration)
    writing = writing_bytes(lm, config.base_precision, tokens, dtype.itemsize, sides=2)
    folders = {name: getattr(config, name) for name in ("checkpoint_dir", "dataset_dir", "output_dir")}
    shared = {"base_precision": config.base_precision, "preview_duration": config.preview_duration}
    making = TrainConfig(**folders, **shared, rank=1, offload_encoder=True)
    sizes = decoder_sizes(dit)
    weights = StepModel(sizes, making, Shape(1, 1, PLAYED_TOKENS), dtype).weights(making)
    beside = preview_peak(sizes, making, dtype, FRAMES_PER_SECOND, PLAYED_TOKENS)
    return with_overhead(writing + kept), with_overhead(weights + beside + kept)


def written_tokens(seconds: float) -> int:
    """Tokens of a song of so many seconds: prompt, plan and codes."""
    return PLAIN_TOKENS + round(CODES_PER_SECOND * seconds)


def writing_bytes(sizes: dict[str, Any], base_precision: str, tokens: int, bytes_per_value: int, sides: int = 1) -> int:
    """Bytes while the model writes up to so many tokens: its weights, the cache, the logits in fp32.

    sides: 2 under guidance, which keeps a cache of its own.
    """
    cache = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * bytes_per_value
    logits = 4 * sizes["vocab_size"] * 4  # of both sides, masked and drawn from
    layer = tokens * (ACTIVATIONS_PER_LAYER * sizes["hidden_size"] + 4 * sizes["intermediate_size"]) * bytes_per_value
    return weights_bytes(sizes, bytes_per_value, base_precision) + sides * tokens * cache + logits + layer


def describing_bytes(
    lm: dict[str, Any], dit: dict[str, Any], base_precision: str, dtype: torch.dtype, with_lyrics: bool = False
) -> int:
    """Peak bytes of `build-dataset --caption lm`: VAE, codes and language model stay; they work in turns.

    lm, dit: config.json of each.
    """
    tokens = round(CODES_PER_SECOND * HEARD_SECONDS) + PLAIN_TOKENS + (ANSWER_TOKENS if with_lyrics else 0)
    writing = writing_bytes(lm, base_precision, tokens, dtype.itemsize)
    encoding = encoding_peak(dtype, HEARD_SECONDS, whole=True)
    between = codes_bytes(dit, dtype)
    lm_alone = weights_bytes(lm, dtype.itemsize, base_precision)
    return between + max(lm_alone + encoding, writing + vae_bytes(dtype))


def listening_memory(config: BuildDatasetConfig) -> tuple[Path, int]:
    """(the language model that listens, bytes that it takes with context and slack)."""
    assert config.checkpoint_dir is not None
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    folder = choose_language_model(checkpoint.layout, config.lm)
    dtype = choose_precision(config.precision, choose_device(config.device).value).value
    sizes, with_lyrics = read_config(folder / "config.json"), config.lyrics != "none"
    needed = describing_bytes(sizes, checkpoint.config, config.base_precision, dtype, with_lyrics)
    return folder, with_overhead(needed)


def check_description(config: BuildDatasetConfig, report: Report) -> None:
    """Say what listening takes on this GPU. Raises UserError where it cannot fit."""
    _, needed = listening_memory(config)
    if (gpu := gpu_memory(choose_device(config.device).value)) is not None:
        require_language_room(needed, gpu, config, report)


def language_memory(config: TrainLmConfig, index: ReadIndex) -> tuple[int, str]:
    """(bytes that training takes, what they are for). index: of a folder of records."""
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    folder = choose_language_model(checkpoint.layout, config.lm)
    infos = index(config.dataset_dir)[0] if config.dataset_dir.is_dir() else {}
    tokens = PLAIN_TOKENS + max((info.frames // 5 for info in infos.values()), default=1200)
    bytes_per_value = choose_precision(config.precision, choose_device(config.device).value).value.itemsize
    needed = training_bytes(read_config(folder / "config.json"), config, tokens, bytes_per_value)
    return needed, f"{folder.name}, songs of up to {tokens} tokens; {BY_ARITHMETIC}"


def check_language_memory(config: TrainLmConfig, report: Report, index: ReadIndex = index_records) -> None:
    """Say what training takes on this GPU. Raises UserError where it cannot fit, unless that was asked for."""
    needed, reason = language_memory(config, index)
    if (gpu := gpu_memory(choose_device(config.device).value)) is not None:
        require_language_room(needed, gpu, config, report)
    else:
        report(Decision(what="memory", value=gib(needed), reason=reason))


def require_language_room(
    needed: int, gpu: GpuMemory, config: TrainLmConfig | BuildDatasetConfig, report: Report
) -> None:
    """Say what a job takes, context and slack included. Raises UserError where it is more than the GPU has."""
    what = f"This takes {gib(needed)}, and {gpu.source} has {gib(gpu.bytes)}"
    helps = f"What helps: {', '.join(memory_levers(config)) or 'a larger card, or --device cpu'}."
    if needed > gpu.bytes and not getattr(config, "even_if_it_does_not_fit", False):
        override = "" if isinstance(config, BuildDatasetConfig) else "\nTo try all the same: --even-if-it-does-not-fit"
        raise UserError(f"{what}: it would run out of memory.", helps + override)
    report(Decision(what="memory", value=f"{gib(needed)} of {gib(gpu.bytes)}", reason=BY_ARITHMETIC))
    if needed > gpu.free:
        message = f"{what}, of which {gib(gpu.free)} are free: it may run out of memory. {helps}"
        report(Notice(message=message, level="warning"))


def plan_language(config: PlanConfig, report: Report) -> dict[str, Any]:
    """`plan --lm`: what training, listening and composing take, for each way of storing the model, as plain values.

    Raises UserError for a language model of unknown sizes.
    """
    sizes, dit = sizes_for(config)
    shared = {name: v for name, v in changed_from_defaults(config).items() if name in options_of(TrainLmConfig)}
    shared = {name: value for name, value in shared.items() if name not in ("lm", "base_precision")}
    folders = {"checkpoint_dir": config.checkpoint_dir or Path(), "dataset_dir": Path(), "output_dir": Path()}
    asked = resolve(TrainLmConfig, shared, folders)
    dtype = PRECISIONS["bf16" if config.precision == "auto" else config.precision]
    tokens = written_tokens(config.song_seconds)
    gpu = (
        GpuMemory(round(config.vram * GIB), f"--vram {config.vram:g}")
        if config.vram
        else gpu_memory(choose_device().value)
    )
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = {"lm": config.lm, "device_bytes": gpu.bytes if gpu else None, "needed_bytes": {}}
    for precision in options_of(TrainLmConfig)["base_precision"].choices:
        training = replace(asked, base_precision=precision)
        needed = {
            "train-lm": training_bytes(sizes, training, tokens, dtype.itemsize),
            "a preview of train-lm": max(preview_bytes(sizes, dit, training, dtype)),
            "build-dataset --caption lm": with_overhead(describing_bytes(sizes, dit, precision, dtype)),
            "sample --think": with_overhead(writing_bytes(sizes, precision, tokens, dtype.itemsize, sides=2)),
        }
        for job, nbytes in needed.items():
            fits = "" if gpu is None else "fits" if nbytes <= gpu.usable else "hardly" if nbytes <= gpu.bytes else "no"
            rows.append((job, "as it is" if precision == "auto" else precision, gib(nbytes, digits=2), fits))
        found["needed_bytes"][precision] = needed
    if not config.json:
        card = f"on {gib(gpu.bytes)}" if gpu else "no GPU found here; --vram plans for one"
        title = f"Memory of the language model, songs of {config.song_seconds:g} s, by arithmetic ({card})"
        report(Table(title=title, columns=("job", "--base-precision", "needed", "fits"), rows=tuple(rows)))
    return found


def sizes_for(config: PlanConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json of the language model, of the DiT); those of the official ones are known without files."""
    wanted = config.lm or "auto"
    official = OFFICIAL_LANGUAGE_MODELS.get(next(iter(SIZES)) if wanted == "auto" else wanted)
    dit = official_config(config.model_variant)
    if config.checkpoint_dir:
        checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
        if official is None or find_language_models(checkpoint.layout):
            return read_config(choose_language_model(checkpoint.layout, wanted) / "config.json"), checkpoint.config
        return official, checkpoint.config
    if official is None:
        raise UserError(
            f"--lm {config.lm}: its sizes are not known without its files.",
            f"Add --checkpoint-dir, or use one of {', '.join(OFFICIAL_LANGUAGE_MODELS)}.",
        )
    if dit is None:
        fix = "Add --checkpoint-dir, or leave --model-variant away."
        raise UserError(f"--model-variant {config.model_variant}: its sizes are not known without its files.", fix)
    return official, dit
