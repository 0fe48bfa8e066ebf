"""What a micro-step of the training loop costs over the bare forward and backward of the same model at the same shapes.

    uv run benchmarks/step.py [--seconds 60] [--rounds 15] [--threads 2]

Prints the ratio of medians, measured alternately in one process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository

import torch
from diffusers import AceStepTransformer1DModel

from sidestep.adapters.attach import attach
from sidestep.data.batches import Song, collate, plan_epoch
from sidestep.data.records import Record
from sidestep.flow_matching.timesteps import discrete
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train.loop import Metrics
from sidestep.tasks.train.objective import ConditionMask, Objective, TrainingLaw

CHANNELS, CONDITION_TOKENS = 64, 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60.0, help="length of a training window")
    arguments.add_argument("--rounds", type=int, default=15, help="how often each side is timed")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
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
    decoder = AceStepTransformer1DModel(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        is_turbo=True,
    )
    mask = ConditionMask()
    mask.install(decoder)
    model = attach(decoder, config).train()
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {frames} latent frames, "
        f"{CONDITION_TOKENS} condition tokens, {options.threads} threads, torch {torch.__version__}"
    )
    silence, null = torch.zeros(1, 15000, CHANNELS), torch.zeros(1, 1, 512)
    objective = Objective(config, TrainingLaw("discrete", discrete, 0.0, ""), silence, null, mask)
    records = [Record(torch.randn(frames, CHANNELS), torch.randn(CONDITION_TOKENS, 512), {}) for _ in range(4)]
    songs = [Song(f"song {i}", frames, lambda record=record: record) for i, record in enumerate(records)]
    plan = plan_epoch(songs, 0, seed=1, batch_size=1, accumulation=4)[0]
    metrics = Metrics()

    def micro_step() -> None:
        batch = collate(songs, plan.micro_batches[0]).to(silence.device)
        weighted, loss, t = objective(model, batch, 0, plan.samples)
        (weighted.sum() / plan.samples).backward()
        metrics.add(loss, t, batch.songs)

    noisy, target, context = (
        torch.randn(1, frames, CHANNELS),
        torch.randn(1, frames, CHANNELS),
        torch.randn(1, frames, 2 * CHANNELS),
    )
    conditions, t = records[0].encoder_hidden_states[None], torch.tensor([0.5])

    def bare() -> None:
        velocity = model(
            hidden_states=noisy,
            timestep=t,
            timestep_r=t,
            encoder_hidden_states=conditions,
            context_latents=context,
            return_dict=False,
        )[0]
        torch.nn.functional.mse_loss(velocity, target).backward()

    times: dict[str, list[float]] = {"bare": [], "micro-step": []}
    for number in range(options.rounds + 2):
        for name, work in (
            (("bare", bare), ("micro-step", micro_step)) if number % 2 else (("micro-step", micro_step), ("bare", bare))
        ):
            started = time.perf_counter()
            work()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
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


if __name__ == "__main__":
    main()
