"""What watching gradients costs: time and peak memory of a forward and backward pass with and without the sketch.

    uv run python -m benchmarks.estimate_overhead

About two minutes on one CPU core; writes benchmarks/results/estimate_overhead.json. Time is measured on a small model
of this architecture. Memory is that of the real 2B decoder: the pass runs on fake tensors, which have shapes and life
times but no data, and every tensor alive is counted.
"""

import json
import platform
import statistics
import subprocess
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel

from sidestep.acestep.attention import use_attention
from sidestep.tasks.estimate.sketch import Layout, Sketch, linear_shapes, watch
from sidestep.tasks.plan.unfilled import UnfilledBytes
from sidestep.variants import CONFIG_2B

ENDS = ("to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj")


def decoder_of(sizes: dict, dtype: torch.dtype) -> AceStepTransformer1DModel:
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "in_channels",
    )
    keys += ("audio_acoustic_hidden_dim", "patch_size", "sliding_window")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be cast later
    try:
        return AceStepTransformer1DModel(**{k: sizes[k] for k in keys}).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def names(model: torch.nn.Module, mlp: bool) -> list[str]:
    ends = ENDS if mlp else ENDS[:4]
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("layers.") and n.endswith(ends)
    ]


def one_pass(model: torch.nn.Module, frames: int, tokens: int, dtype: torch.dtype) -> None:
    """Forward and backward of the frozen model; the inputs require grad, so plain passes do the whole backward too."""
    channels, width = model.config.audio_acoustic_hidden_dim, model.config.hidden_size
    x = torch.randn(1, frames, channels, dtype=dtype, requires_grad=True)
    conditions = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    t = torch.full((1,), 0.5, dtype=dtype)
    context = torch.ones(1, frames, 2 * channels, dtype=dtype)
    model(x, t, t, conditions, context).sample.float().square().mean().backward()


@contextmanager
def watched(model: torch.nn.Module, targets: list[str], width: int):
    sketch = Sketch(
        Layout(linear_shapes(model, targets), width, 0), torch.device("cpu"), next(model.parameters()).dtype
    )
    with watch(model, sketch):
        yield sketch


def peak_memory(recompute: bool, mlp: bool, watching: bool, seconds: int = 240) -> int:
    """Peak bytes of a pass through the 2B decoder in bf16 with one song of `seconds`."""
    with UnfilledBytes() as alive:
        model = decoder_of(CONFIG_2B, torch.bfloat16)
        use_attention(model, "local", torch.device("cpu"), torch.bfloat16)
        if recompute:
            model.enable_gradient_checkpointing()
        alive.peak = alive.now
        with watched(model, names(model, mlp), 32) if watching else nullcontext():
            one_pass(model, seconds * 25, 1000, torch.bfloat16)
        return alive.peak


def pass_seconds(recompute: bool, mlp: bool, repeats: int = 5) -> tuple[float, float]:
    """Median CPU seconds of a pass on one thread, plain and watched, taken in turns on a model 1024 wide."""
    sizes = CONFIG_2B | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    model = decoder_of(sizes, torch.float32)
    use_attention(model, "local", torch.device("cpu"), torch.float32)
    if recompute:
        model.enable_gradient_checkpointing()
    times: dict[bool, list[float]] = {False: [], True: []}
    targets = names(model, mlp)
    for _ in range(repeats + 1):
        for watching in (False, True):
            with watched(model, targets, 32) if watching else nullcontext():
                started = time.process_time()
                one_pass(model, 750, 256, torch.float32)
                times[watching].append(time.process_time() - started)
    return statistics.median(times[False][1:]), statistics.median(times[True][1:])


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for recompute in (True, False):
        for mlp in (False, True):
            plain, with_sketch = peak_memory(recompute, mlp, False), peak_memory(recompute, mlp, True)
            seconds = pass_seconds(recompute, mlp)
            rows.append(
                {
                    "recompute": recompute,
                    "mlp": mlp,
                    "plain_gb": round(plain / 1e9, 3),
                    "watched_gb": round(with_sketch / 1e9, 3),
                    "memory": round(with_sketch / plain, 4),
                    "plain_s": round(seconds[0], 3),
                    "watched_s": round(seconds[1], 3),
                    "time": round(seconds[1] / seconds[0], 3),
                }
            )
            print(rows[-1], flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    output = Path("benchmarks/results/estimate_overhead.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": "python -m benchmarks.estimate_overhead",
        "commit": commit,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} CPU, 1 thread",
    }
    output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
