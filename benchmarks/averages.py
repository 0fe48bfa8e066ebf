"""Two ways to average the last checkpoints of a run: the products of the factors, or each factor by itself.

    uv run --group dev benchmarks/averages.py [--seeds 3]

On the tiny model of the tests: how much of the mean change of the weights each way loses, and the loss of the songs
that were held out, beside that of the last checkpoint.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository

import torch

from sidestep.adapters.adapter import Adapter
from sidestep.adapters.attach import load_adapter
from sidestep.adapters.average import average
from sidestep.adapters.read import read_adapter
from sidestep.tasks.train.evaluation import grid_loss
from sidestep.tasks.train.run import Run
from tests.training_world import prepared, run, settings, write_data

EPOCHS, LAST = 16, (12, 8, 4)


def by_factors(adapters: list[Adapter]) -> Adapter:
    """The adapter whose every factor is the mean of theirs."""
    modules = {
        name: {k: torch.stack([a.modules[name][k].float() for a in adapters]).mean(dim=0) for k in factors}
        for name, factors in adapters[0].modules.items()
    }
    return replace(adapters[0], modules=modules)


def held_out_loss(judge: Run, adapter: Adapter) -> float:
    """Validation loss of an adapter."""
    model = load_adapter(judge.checkpoint.load_decoder(), adapter)
    return grid_loss(judge, judge.held_out, model.get_base_model())


def main() -> None:
    """Print a line for each kind of adapter, seed and number of checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    print("| adapter | seed | last | lost: products | lost: factors | loss: products | loss: factors | loss: last |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        data = write_data(home / "data", frames=(30, 41, 34, 30, 50, 44))
        for kind in ("lora", "lokr", "dora"):
            for seed in range(1, seeds + 1):
                every = {"save_every": 1, "keep_checkpoints": 0, "epochs": EPOCHS, "scheduler_type": "constant"}
                output = home / f"{kind}-{seed}"
                config = settings(data, output, val_split=0.34, seed=seed, adapter_type=kind, **every)
                run(config)
                judge = prepared(replace(config, output_dir=home / "judge"))
                for last in LAST:
                    names = [f"epoch_{epoch:04}" for epoch in range(EPOCHS - last + 1, EPOCHS + 1)]
                    adapters = [read_adapter(output / "checkpoints" / name) for name in names]
                    made = average(adapters, names)
                    losses = [held_out_loss(judge, a) for a in (made.adapter, by_factors(adapters), adapters[-1])]
                    figures = " | ".join(f"{loss:.4f}" for loss in losses)
                    print(f"| {kind} | {seed} | {last} | {made.distance:.2%} | {made.by_factors:.2%} | {figures} |")


if __name__ == "__main__":
    main()
