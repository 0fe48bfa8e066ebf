"""What a micro-step of the training loop costs over a bare forward and backward at the same shapes.

    uv run benchmarks/step.py [--seconds 60] [--rounds 15] [--threads 2] [--precision fp32]

"Bare" is diffusers' model with its own attention and peft's LoRA, called with tensors that are ready. Prints the ratio
of medians, measured alternately in one process, the most that tensors held in each, and how far the gradients of the
two are apart. The process gives large buffers back as a training does.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
from diffusers import AceStepTransformer1DModel

from benchmarks.launches import undo
from sidestep.acestep.attention import use_attention
from sidestep.acestep.device import PRECISIONS, give_back_large_buffers
from sidestep.acestep.fused import fuse_layers
from sidestep.adapters.attach import attach
from sidestep.data.batches import Song, collate, plan_epoch
from sidestep.data.records import Record
from sidestep.flow_matching.timesteps import discrete
from sidestep.settings.config import TrainConfig
from sidestep.tasks.plan.unfilled import LiveBytes
from sidestep.tasks.train.loop import Metrics
from sidestep.tasks.train.objective import ConditionMask, Objective, TrainingLaw

CHANNELS, CONDITION_TOKENS = 64, 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60.0, help="length of a training window")
    arguments.add_argument("--rounds", type=int, default=15, help="how often each side is timed")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = arguments.parse_args()
    dtype = PRECISIONS[options.precision]
    torch.set_num_threads(options.threads)
    give_back_large_buffers(torch.device("cpu"))
    torch.manual_seed(0)
    frames = round(options.seconds * 25)
    config = TrainConfig(
        checkpoint_dir=Path(),
        dataset_dir=Path(),
        output_dir=Path(tempfile.gettempdir()),
        rank=16,
        alpha=32,
        gradient_checkpointing=False,
    )
    decoder: Any = AceStepTransformer1DModel(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        is_turbo=True,
    )
    decoder = decoder.to(dtype)
    decoder.requires_grad_(False)
    fuse_layers(decoder)
    use_attention(decoder)
    mask = ConditionMask()
    model = attach(decoder, config).train()
    usual = copy.deepcopy(model)
    undo(usual)
    mask.install(decoder)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {frames} latent frames, "
        f"{CONDITION_TOKENS} condition tokens, {options.threads} threads, {options.precision}, "
        f"torch {torch.__version__}"
    )
    silence, null = torch.zeros(1, 15000, CHANNELS), torch.zeros(1, 1, 512, dtype=dtype)
    objective = Objective(config, TrainingLaw("discrete", discrete, 0.0, ""), silence, null, mask)
    records = [Record(torch.randn(frames, CHANNELS), torch.randn(CONDITION_TOKENS, 512), {}) for _ in range(4)]
    songs = [Song(f"song {i}", frames, lambda record=record: record) for i, record in enumerate(records)]
    plan = plan_epoch(songs, 0, seed=1, batch_size=1, accumulation=4)[0]
    metrics = Metrics()

    def micro_step() -> None:
        batch = collate(songs, plan.micro_batches[0]).to(silence.device)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            weighted, loss, t = objective(model, batch, 0, plan.samples)
        (weighted.sum() / plan.samples).backward()
        metrics.add(loss, t, batch.songs)

    noisy, target, context = (
        torch.randn(1, frames, CHANNELS),
        torch.randn(1, frames, CHANNELS),
        torch.randn(1, frames, 2 * CHANNELS),
    )
    noisy, context = noisy.to(dtype), context.to(dtype)
    conditions, t = records[0].encoder_hidden_states[None].to(dtype), torch.tensor([0.5])

    def forward_and_backward(model: torch.nn.Module) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = model(
                hidden_states=noisy,
                timestep=t,
                timestep_r=t,
                encoder_hidden_states=conditions,
                context_latents=context,
                return_dict=False,
            )[0]
        torch.nn.functional.mse_loss(velocity.float(), target).backward()

    def bare() -> None:
        forward_and_backward(usual)

    works = (("bare", bare), ("micro-step", micro_step))
    times: dict[str, list[float]] = {"bare": [], "micro-step": []}
    for number in range(options.rounds + 2):
        for name, work in works if number % 2 else works[::-1]:
            started = time.perf_counter()
            work()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
            for each in (model, usual):
                each.zero_grad(set_to_none=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = sorted(ours / limit for ours, limit in zip(times["micro-step"], times["bare"], strict=True))
    print(
        f"bare forward and backward {medians['bare'] * 1000:.0f} ms, micro-step {medians['micro-step'] * 1000:.0f} ms"
    )
    print(
        f"ratio of medians {medians['micro-step'] / medians['bare']:.3f} "
        f"(paired: median {statistics.median(pairs):.3f}, "
        f"quartiles {pairs[len(pairs) // 4]:.3f} to {pairs[-len(pairs) // 4]:.3f})"
    )
    held = {}
    for name, work in works:
        with LiveBytes() as memory:
            work()
        held[name] = memory.peak / 2**20
    ratio = held["micro-step"] / held["bare"]
    print(f"held besides the model: bare {held['bare']:.0f} MiB, micro-step {held['micro-step']:.0f} MiB, {ratio:.3f}")
    for each in (model, usual):
        each.zero_grad(set_to_none=True)
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        forward_and_backward(each)
    trained = [(p.grad, q.grad) for p, q in zip(model.parameters(), usual.parameters(), strict=True) if p.requires_grad]
    apart = max(((p - q).norm() / q.norm()).item() for p, q in trained if p is not None and q is not None and q.any())
    print(f"gradients at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
