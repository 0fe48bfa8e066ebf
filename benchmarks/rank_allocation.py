"""Does a rank map earn its place? Adapters of equal size on held-out music, each method at its own best learning rate.

    uv run python -m benchmarks.rank_allocation

About 35 minutes on one CPU core; writes benchmarks/results/rank_allocation.{json,md}. A small model of this
architecture learns acoustic music from scratch, then adapters learn electronic clips. Seeds are paired: in one seed all
methods share songs, batches, noise and timesteps. Learning rates are chosen by the loss on songs that are in neither
the training nor the test split.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from benchmarks import small_model as small
from sidestep.tasks.estimate.allocate import allocate
from sidestep.tasks.estimate.sketch import Layout, Sketch, Spectrum, linear_shapes, spectrum, watch

RANK, SCALE, STEPS, BATCH, LOOK_EVERY = 4, 2.0, 120, 8, 30
LEARNING_RATES = (3e-3, 6e-3, 1.2e-2)
TRIAL_SEEDS = 2  # seeds that all learning rates are tried on; the others train at the best
SHIFTS = {"mild": ("electronic", 0), "strong": ("reversed", 1)}  # music, vocabulary of the conditions
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Measured:
    """What one look at the training songs gives to all methods."""

    spectra: dict[str, Spectrum]
    squared_gradient: dict[str, float]
    directions: dict[str, torch.Tensor]  # top right singular vectors, [in, k]


def names(model: torch.nn.Module, mlp: bool) -> list[str]:
    ends = ATTENTION + (MLP if mlp else ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("layers.") and name.endswith(ends)
    ]


def prices(model: torch.nn.Module, mlp: bool) -> dict[str, int]:
    return {name: sum(shape) for name, shape in linear_shapes(model, names(model, mlp)).items()}


def batch_of(
    clips: list[small.Clip], count: int, vocabulary: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    latents, styles = small.windows(clips, count, generator)
    condition = small.conditions(latents, styles, vocabulary)
    condition[torch.rand(count, generator=generator) < 0.15] = 0
    return latents, condition, torch.randn(latents.shape, generator=generator), small.stratified(count, generator)


def halves_of(clips: list[small.Clip]) -> list[list[small.Clip]]:
    """Two halves without a song in common."""
    songs = list(dict.fromkeys(clip.name.split("@")[0] for clip in clips))
    return [[clip for clip in clips if clip.name.split("@")[0] in songs[i::2]] for i in range(2)]


def measure(model: torch.nn.Module, clips: list[small.Clip], vocabulary: int, seed: int, batches: int = 24) -> Measured:
    """Sketches of both halves of the songs, and the mean squared gradient of the usual heuristic."""
    targets = names(model, mlp=True)
    layout = Layout(linear_shapes(model, targets), 32, seed)
    sketch, halves = Sketch(layout, torch.device("cpu")), []
    squared = dict.fromkeys(targets, 0.0)
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in targets]
    generator = torch.Generator().manual_seed(seed)
    with watch(model, sketch):
        for half in halves_of(clips):
            for _ in range(batches):
                model.zero_grad(set_to_none=True)
                small.losses(model, *batch_of(half, BATCH, vocabulary, generator)).mean().backward()
                for name, weight in zip(targets, weights, strict=True):
                    squared[name] += float(weight.grad.square().mean())
            halves.append(sketch.take() / batches)
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    together = (halves[0] + halves[1]) / 2
    return Measured(
        {name: spectrum(layout, name, *halves) for name in targets},
        squared,
        {name: layout.decompose(together, name)[2].float() for name in targets},
    )


def proportional(weights: dict[str, float], costs: dict[str, int], budget: int, floor: int, cap: int) -> dict[str, int]:
    """Ranks proportional to weights, scaled to the budget; what rounding leaves goes to the largest remainders."""

    def at(scale: float) -> dict[str, int]:
        return {name: min(cap, max(floor, math.floor(scale * w))) for name, w in weights.items()}

    low, high = 0.0, 1e3 / min(w for w in weights.values() if w > 0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(r * costs[n] for n, r in at(middle).items()) <= budget else (low, middle)
    ranks = at(low)
    left = budget - sum(r * costs[n] for n, r in ranks.items())
    order = sorted(ranks, key=lambda n: (-(low * weights[n] - ranks[n]), hash_of(n)))
    for name in order:
        if costs[name] <= left and ranks[name] < cap:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def hash_of(name: str) -> int:
    """A fixed shuffle: remainders of equal size do not all go to the first layers."""
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 1009


def methods(budget: int) -> dict[str, Callable]:
    """name → (model, measured) → (ranks, directions or None)."""
    cap = 4 * RANK

    def greedy(model, measured, mlp, value):
        costs = prices(model, mlp)
        return allocate({n: value(measured.spectra[n])[:cap] for n in costs}, costs, budget, 1, cap)

    def confirmed(found: Spectrum) -> list[float]:
        return found.values(cap)

    def heuristic(model, measured, mlp):
        costs = prices(model, mlp)
        return proportional({n: measured.squared_gradient[n] ** 0.5 for n in costs}, costs, budget, 1, cap)

    def uniform(model, mlp):
        costs = prices(model, mlp)
        return proportional(dict.fromkeys(costs, 1.0), costs, budget, 1, cap)

    return {
        "uniform": lambda model, _: (uniform(model, False), None),
        "uniform + MLP": lambda model, _: (uniform(model, True), None),
        "heuristic": lambda model, m: (heuristic(model, m, True), None),
        "ours": lambda model, m: (greedy(model, m, True, confirmed), None),
        "ours + gradient init": lambda model, m: (greedy(model, m, True, confirmed), m.directions),
    }


def adapt(
    base: Callable,
    ranks: dict[str, int],
    directions,
    songs: tuple[list, list, list],
    vocabulary: int,
    lr: float,
    seed: int,
) -> dict:
    """Train one adapter. songs: train, test, selection.

    Returns the held-out loss along the way and at the end, and the loss on the selection songs.
    """
    train, test, selection = songs
    torch.manual_seed(seed)
    kept = {name: rank for name, rank in ranks.items() if rank}
    config = LoraConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,
        target_modules=list(kept),
        rank_pattern=kept,
        alpha_pattern={n: SCALE * r for n, r in kept.items()},
    )
    model = inject_adapter_in_model(config, base())
    if directions:
        for name, rank in kept.items():
            weight = model.get_submodule(name).lora_A["default"].weight
            known = min(rank, directions[name].shape[1])
            # divided to the length that peft's random rows have
            weight.data[:known] = directions[name][:, :known].T / math.sqrt(3)
    parameters = [p for n, p in model.named_parameters() if "lora_" in n]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 20) * 0.5 * (1 + math.cos(math.pi * s / STEPS))
    )
    generator = torch.Generator().manual_seed(seed)
    curve, recent = [], []
    for step in range(STEPS):
        loss = small.losses(model, *batch_of(train, BATCH, vocabulary, generator)).mean()
        recent = [*recent[-49:], loss.item()]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % LOOK_EVERY == 0:
            curve.append((step + 1, small.held_out_loss(model, test, vocabulary)))
    return {
        "loss": curve[-1][1],
        "selection_loss": small.held_out_loss(model, selection, vocabulary),
        "training_loss": statistics.mean(recent),
        "curve": curve,
        "parameters": sum(p.numel() for p in parameters),
    }


def split(clips: list[small.Clip], seed: int) -> tuple[list[small.Clip], list[small.Clip], list[small.Clip]]:
    """(train, test, selection), by song.

    Three songs of different moods choose learning rates, the others are dealt anew in every seed. Training hears a song
    at all its speeds; test and selection only as it is.
    """
    songs = list(dict.fromkeys(clip.name.split("@")[0] for clip in clips))
    selection = songs[2::4]
    others = [song for song in songs if song not in selection]
    order = [others[i] for i in torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()]

    def of(names: list[str], every_speed: bool) -> list[small.Clip]:
        return [
            clip for clip in clips if clip.name.split("@")[0] in names and (every_speed or clip.name.endswith("@1.0"))
        ]

    return of(order[:6], True), of(order[6:], False), of(selection, False)


class Ledger:
    """Finished runs by name, on disk: an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path):
        self.path = path
        self.runs: dict[str, dict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def get(self, name: str, make: Callable[[], dict]) -> dict:
        if name not in self.runs:
            started = time.process_time()
            self.runs[name] = make()
            self.runs[name]["cpu_seconds"] = round(time.process_time() - started, 1)
            self.path.write_text(json.dumps(self.runs), encoding="utf-8")
            print(f"{name}: {self.runs[name]['loss']:.4f} ({self.runs[name]['cpu_seconds']} s)", flush=True)
        return self.runs[name]


def best_learning_rate(selection_loss: Callable[[float], float]) -> float:
    """The best of LEARNING_RATES; where the best stands at an end of the grid, the grid grows there."""
    trials = {lr: selection_loss(lr) for lr in LEARNING_RATES}
    best = min(trials, key=lambda lr: trials[lr])
    if best == max(trials):
        trials[best * 2] = selection_loss(best * 2)
    elif best == min(trials):
        trials[best / 2] = selection_loss(best / 2)
    return min(trials, key=lambda lr: trials[lr])


def key(shift: str, method: str, seed: int, lr: float) -> str:
    return f"{shift}/{method}/{seed}/lr {lr:g}"


def run_shift(
    shift: str, music: dict, base: Callable, found: dict[str, Callable], ledger: Ledger, seeds: int
) -> dict[str, float]:
    """Train what the ledger does not hold yet; the learning rate of each method."""
    kind, vocabulary = SHIFTS[shift]
    model, chosen, measured = base(), {}, {}

    def train(name: str, seed: int, lr: float) -> dict:
        def make() -> dict:
            songs = split(music[kind], seed)
            if seed not in measured:
                measured[seed] = measure(base(), songs[0], vocabulary, seed)
            ranks, directions = found[name](model, measured[seed])
            return adapt(base, ranks, directions, songs, vocabulary, lr, seed)

        return ledger.get(key(shift, name, seed, lr), make)

    for name in found:
        trial_seeds = range(min(TRIAL_SEEDS, seeds))
        chosen[name] = best_learning_rate(
            lambda lr, name=name, s=trial_seeds: statistics.mean(train(name, seed, lr)["selection_loss"] for seed in s)
        )
    for seed in range(seeds):
        for name in found:
            train(name, seed, chosen[name])
    return chosen


def steps_to(curve: list[list[float]], loss: float) -> int | None:
    return next((int(step) for step, value in curve if value <= loss), None)


def mean_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def compare(
    ledger: Ledger, shift: str, seeds: int, chosen: dict[str, float], method_names: list[str]
) -> dict[str, dict]:
    """Paired differences from uniform, in held-out loss, and steps to uniform's final loss."""
    rows = {}
    for method in method_names:
        runs = [ledger.runs[key(shift, method, seed, chosen[method])] for seed in range(seeds)]
        uniform = [ledger.runs[key(shift, "uniform", seed, chosen["uniform"])] for seed in range(seeds)]
        differences = [r["loss"] - u["loss"] for r, u in zip(runs, uniform, strict=True)]
        reached = [steps_to(r["curve"], u["loss"]) for r, u in zip(runs, uniform, strict=True)]
        mean, spread = mean_spread(differences)
        rows[method] = {
            "learning_rate": chosen[method],
            "parameters": runs[0]["parameters"],
            "held_out_loss": statistics.mean(r["loss"] for r in runs),
            "difference": mean,
            "difference_std": spread,
            "differences": differences,
            "better_in": sum(d < 0 for d in differences),
            "steps_to_uniform": reached,
        }
    return rows


def table(results: dict[str, dict[str, dict]], seeds: int) -> str:
    lines = []
    for shift, rows in results.items():
        lines += [
            f"**{shift} shift**",
            "",
            "| method | lr | parameters | held-out loss | against uniform | better in "
            "| steps to uniform's final loss |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, row in rows.items():
            reached = sorted(s for s in row["steps_to_uniform"] if s is not None)
            steps = (
                f"{statistics.median_low(reached)}"
                if len(reached) > seeds // 2
                else f"reached in {len(reached)} of {seeds}"
            )
            against = "" if method == "uniform" else f"{row['difference']:+.4f} ± {row['difference_std']:.4f}"
            wins = "" if method == "uniform" else f"{row['better_in']} of {seeds}"
            lines.append(
                f"| {method} | {row['learning_rate']:g} | {row['parameters']} | {row['held_out_loss']:.4f} "
                f"| {against} | {wins} | {steps} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS))
    parser.add_argument("--base-steps", type=int, default=2600)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("benchmarks/.work"),
        help="base model and finished runs; a second call goes on from there",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    music = small.music()
    weights = arguments.work / "base.safetensors"
    if not weights.is_file():
        save_file(
            {
                k: v.contiguous()
                for k, v in small.train_base(music["acoustic"], arguments.base_steps, 0).state_dict().items()
            },
            weights,
        )
    state = load_file(weights)

    def base() -> torch.nn.Module:
        model = small.new_model(0)
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    ledger = Ledger(arguments.work / f"runs-{'-'.join(arguments.shifts)}.json")
    found = methods(RANK * sum(prices(base(), mlp=False).values()))
    results = {}
    for shift in arguments.shifts:
        chosen = run_shift(shift, music, base, found, ledger, arguments.seeds)
        results[shift] = compare(ledger, shift, arguments.seeds, chosen, list(found))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "command": "python -m benchmarks.rank_allocation",
        "commit": commit,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} CPU, 1 thread",
        "seeds": arguments.seeds,
        "steps": STEPS,
        "cpu_minutes": round(sum(run["cpu_seconds"] for run in ledger.runs.values()) / 60, 1),
        "base_loss": {
            shift: small.held_out_loss(base(), [c for c in music[kind] if c.name.endswith("@1.0")], words)
            for shift, (kind, words) in SHIFTS.items()
        },
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "rank_allocation.json").write_text(
        json.dumps({**facts, "results": results}, indent=1), encoding="utf-8"
    )
    text = table(results, arguments.seeds)
    (arguments.output / "rank_allocation.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
