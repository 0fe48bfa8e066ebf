"""The memory that training and listening of the language model take, by its sizes. Source: lm-facts, section 5.

Arithmetic, not measured on a GPU.
"""

from typing import Any

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.device import choose_device, choose_precision, gpu_memory, with_overhead
from sidestep.acestep.layout import read_config
from sidestep.acestep.lm.loss import PIECE
from sidestep.acestep.lm.model import choose_language_model
from sidestep.acestep.quantize import quantized_bytes
from sidestep.data.records import index_records
from sidestep.errors import JobError
from sidestep.events import Decision, Notice, Report
from sidestep.settings.config import TrainLmConfig
from sidestep.words import gib

PLAIN_TOKENS = 1024  # of a song beside its codes: prompt, caption twice, lyrics
ACTIVATIONS_PER_LAYER = 18  # widths of hidden states and four of the MLP that one layer's backward pass holds


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
    mlp = ("gate_proj", "up_proj", "down_proj") if config.target_mlp else ()
    adapted = [shape for name, shape in layer_shapes(sizes).items() if name in (*config.target_modules, *mlp)]
    adapter = layers * config.rank * sum(rows + columns for rows, columns in adapted)
    states = 4 if config.optimizer_type == "adamw" else 2.5 if config.optimizer_type == "adamw8bit" else 6
    layer = tokens * (ACTIVATIONS_PER_LAYER * width + 4 * inner) * 4
    activations = layers * tokens * width * bytes_per_value + layer if config.gradient_checkpointing else layers * layer
    logits = 3 * min(tokens, PIECE) * sizes["vocab_size"] * 4 + 2 * tokens * width * 4
    weights = weights_bytes(sizes, bytes_per_value, config.base_precision)
    return with_overhead(round(weights + adapter * 4 * states + max(activations, logits) + layers * tokens * width))


def writing_bytes(sizes: dict[str, Any], base_precision: str, tokens: int, bytes_per_value: int, sides: int = 1) -> int:
    """Bytes while the model writes up to so many tokens: its weights, the cache, the logits in fp32.

    sides: 2 under guidance, which keeps a cache of its own.
    """
    cache = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * bytes_per_value
    logits = 4 * sizes["vocab_size"] * 4  # of both sides, masked and drawn from
    layer = tokens * (ACTIVATIONS_PER_LAYER * sizes["hidden_size"] + 4 * sizes["intermediate_size"]) * bytes_per_value
    return weights_bytes(sizes, bytes_per_value, base_precision) + sides * tokens * cache + logits + layer


def check_language_memory(config: TrainLmConfig, report: Report) -> None:
    """Say what training takes on this GPU. Raises JobError where it cannot fit, unless that was asked for."""
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    folder = choose_language_model(checkpoint.layout, config.lm)
    device = choose_device(config.device).value
    memory = gpu_memory(device)
    infos, _ = index_records(config.dataset_dir, report) if config.dataset_dir.is_dir() else ({}, {})
    tokens = PLAIN_TOKENS + max((info.frames // 5 for info in infos.values()), default=1200)
    bytes_per_value = choose_precision(config.precision, device).value.itemsize
    needed = training_bytes(read_config(folder / "config.json"), config, tokens, bytes_per_value)
    reason = f"{folder.name}, songs of up to {tokens} tokens; by arithmetic, not measured"
    report(Decision(what="memory", value=gib(needed), reason=reason))
    if memory is None or needed <= memory.free:
        return
    problem = f"{memory.source} has {gib(memory.free)} free, and this run takes {gib(needed)}."
    if config.even_if_it_does_not_fit:
        report(Notice(message=problem, level="warning"))
        return
    raise JobError(problem, "What helps: --base-precision nf4, a smaller --lm, or --even-if-it-does-not-fit to try.")
