"""Does training help? A small model learns acoustic music; adapters then learn electronic clips in the real loop.

The number is the loss on clips that no run has trained on, over the fixed grid of windows, timesteps and noise that
`--val-split` uses. Run it with `nice -n 19 uv run python -m benchmarks.adaptation`: one CPU thread, a few minutes.
It writes benchmarks/results/adaptation.{json,md}.

`python -m benchmarks.adaptation prior` asks instead what `--prior-data` gains and costs, paired over five seeds: the
held-out loss on electronic clips, and the loss on acoustic ones that neither was trained on nor was prior music.
It writes benchmarks/results/prior.{json,md}.

`python -m benchmarks.adaptation captions` asks what four captions for a song gain against one that is repeated, paired
over five seeds: the loss under captions that no run has read, on the songs trained on and on other ones.
It writes benchmarks/results/captions.{json,md}.

`python -m benchmarks.adaptation kinds` compares the kinds of adapter by held-out loss, parameters and time, each at two
learning rates, paired over five seeds. It writes benchmarks/results/kinds.{json,md}.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.small_model import (
    CHANNELS,
    MU,
    SIGMA,
    WIDTH,
    WINDOW,
    WORDS,
    Clip,
    conditions,
    music,
    train_base,
)
from sidestep.acestep.layout import original_key
from sidestep.data.records import Record, save_record
from sidestep.events import Event, Validated, null
from sidestep.seeding import seed_for
from sidestep.settings.config import TrainConfig
from sidestep.settings.path_checks import complete_checkpoints, safetensors_parameters
from sidestep.tasks.train.checkpoints import read_checkpoint
from sidestep.tasks.train.evaluation import grid_loss
from sidestep.tasks.train.setup import open_accelerator, set_up, train

RESULTS = Path(__file__).parent / "results"
BASE_STEPS, EPOCHS, LR = 1500, 4, 1e-3
RUNS = {
    "LoRA, rank 4": {"rank": 4, "alpha": 8.0},
    "LoRA, rank 16": {"rank": 16, "alpha": 32.0},
    "LoKr, dimension 16": {"adapter_type": "lokr", "rank": 16, "alpha": 16.0},
}


def write_checkpoint(folder: Path, decoder: torch.nn.Module) -> Path:
    """The base model in the original layout, as `--checkpoint-dir` takes it."""
    sizes = {
        name: decoder.config[name]
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    }
    sizes |= {
        name: decoder.config[name]
        for name in ("head_dim", "in_channels", "audio_acoustic_hidden_dim", "sliding_window")
    }
    laws = {"is_turbo": False, "model_version": "base", "timestep_mu": MU, "timestep_sigma": SIGMA}
    model = folder / "acestep-v15-base"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(sizes | laws), encoding="utf-8")
    tensors = {"decoder." + original_key(name): tensor.contiguous() for name, tensor in decoder.state_dict().items()}
    save_file(tensors | {"null_condition_emb": torch.zeros(1, 1, WIDTH)}, model / "model.safetensors")
    torch.save(torch.zeros(1, CHANNELS, 1000), model / "silence_latent.pt")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(
        json.dumps(
            {"sampling_rate": 48000, "downsampling_ratios": [2, 4, 4, 6, 10]}
            | {"encoder_hidden_size": 2 * CHANNELS, "decoder_input_channels": CHANNELS}
        ),
        encoding="utf-8",
    )
    return folder


def write_records(folder: Path, clips: list[Clip]) -> Path:
    """Every window of every clip as a record of its own; windows of one clip are one song to the validation split."""
    for clip in clips:
        for number, latents in enumerate(part for part in clip.latents.split(WINDOW) if len(part) == WINDOW):
            told = conditions(latents[None], torch.tensor([clip.style]))[0]
            save_record(
                folder / f"{clip.name} {number:02d}.pt",
                Record(latents.clone(), told, {"fingerprint": {"audio": {"content": clip.name}}}),
            )
    return folder


def settings(checkpoints: Path, data: Path, output: Path, **changes) -> TrainConfig:
    """What all runs here have in common."""
    common = {"model_variant": "base", "device": "cpu", "rank": 16, "alpha": 32.0, "batch_size": 8, "lr": LR}
    plain = {"gradient_accumulation": 1, "gradient_checkpointing": False}
    return TrainConfig(checkpoint_dir=checkpoints, dataset_dir=data, output_dir=output, **common | plain | changes)


def adapt(checkpoints: Path, data: Path, output: Path, changes: dict) -> dict:
    """Train one adapter.

    Returns the held-out loss before, after each epoch and of the running average at the end, parameters and seconds.
    """
    every = {"epochs": EPOCHS, "save_every": EPOCHS, "val_split": 0.2, "validate_every": 2, "ema_decay": 0.95}
    config = settings(checkpoints, data, output, **every | changes)
    seen: list[Event] = []
    accelerator, precision = open_accelerator(config, seen.append)
    untrained = set_up(config, seen.append, accelerator, precision)
    before = grid_loss(untrained, untrained.held_out)
    untrained.tensorboard.close()
    started = time.perf_counter()
    train(config, seen.append)
    state, _ = read_checkpoint(complete_checkpoints(output)[-1])
    evaluations = state["history"]["evaluations"]
    return {
        "parameters": sum(p.numel() for p in untrained.parameters),
        "songs": [len(untrained.songs), len(untrained.held_out)],
        "before": before,
        "by_epoch": [event.loss for event in seen if isinstance(event, Validated)],
        "after": evaluations[-1]["loss"],
        "average_after": evaluations[-1]["average_loss"],
        "best": state["history"]["best"]["loss"],
        "seconds": time.perf_counter() - started,
    }


def table(results: dict) -> str:
    """The runs as Markdown."""
    lines = [
        "| adapter | parameters | held-out loss before | after | running average | change |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results["runs"].items():
        change = (r["after"] / r["before"] - 1) * 100
        lines.append(
            f"| {name} | {r['parameters']:,} | {r['before']:.4f} | {r['after']:.4f} "
            f"| {r['average_after']:.4f} | {change:+.1f} % |"
        )
    first = next(iter(results["runs"].values()))
    note = (
        f"Base: 1.5 M parameters, {results['base_steps']} steps on acoustic clips. "
        f"Adapters: {EPOCHS} epochs on {first['songs'][0]} windows of electronic clips; "
        f"the loss is that of {first['songs'][1]} windows of other electronic clips, over 8 timesteps each. "
        f"{results['machine']}, one thread, {results['seconds']:.0f} s by the clock (at nice 19, beside other work)."
    )
    return "\n".join([*lines, "", note, "", "`nice -n 19 uv run python -m benchmarks.adaptation`", ""])


SEEDS, PAIRED_BASE_STEPS, PAIRED_EPOCHS, PRIOR_WEIGHTS = range(5), 800, 3, (0.0, 0.3)
KINDS, RATES = {"lora": 16, "dora": 16, "lokr": 16, "loha": 16, "oft": 16}, (1e-3, 3e-3)  # with their ranks
SYNONYMS, SAID_IN, NEW = 32, 4, -1  # of each word; captions of a song; seed of captions that no run has read


def loss_on(checkpoints: Path, data: Path, output: Path, adapter: Path | None, **kind) -> float:
    """The loss on every record of a folder over the fixed grid, with an adapter of some kind or without."""
    config = settings(checkpoints, data, output, init_from=adapter, **kind)
    accelerator, precision = open_accelerator(config, null)
    run = set_up(config, null, accelerator, precision)
    run.tensorboard.close()
    return grid_loss(run, run.songs)


def trained(checkpoints: Path, output: Path, seed: int, data: Path, measured_on: dict[str, Path], **changes) -> dict:
    """Losses of one run by the names of the folders they are measured on, and its seconds."""
    every = {"epochs": PAIRED_EPOCHS, "save_every": PAIRED_EPOCHS, "seed": seed}
    started = time.perf_counter()
    train(settings(checkpoints, data, output, **every | changes), null)
    seconds = time.perf_counter() - started
    kind = {name: changes[name] for name in ("adapter_type", "rank", "alpha") if name in changes}
    final, look = output / "final", output / "look"
    losses = {name: loss_on(checkpoints, folder, look, final, **kind) for name, folder in measured_on.items()}
    print(output.name, losses, f"{seconds:.0f} s", flush=True)
    return losses | {"seconds": seconds}


def halves(clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
    """The clips of every other piece, and those of the others; a piece at another speed stays with it."""
    pieces = sorted({clip.name.split("@")[0] for clip in clips})
    first = [clip for clip in clips if clip.name.split("@")[0] in pieces[::2]]
    return first, [clip for clip in clips if clip not in first]


def prior_comparison(home: Path) -> dict:
    """Of each weight of the prior, by seed: losses on held-out electronic and on other acoustic windows, and before."""
    clips = music(speeds=(1.0, 0.9))
    checkpoints = write_checkpoint(home / "checkpoints", train_base(clips["acoustic"], PAIRED_BASE_STEPS, seed=0))
    style, held_out = (write_records(home / str(i), half) for i, half in enumerate(halves(clips["electronic"])))
    prior, other = (write_records(home / str(i + 2), half) for i, half in enumerate(halves(clips["acoustic"])))
    folders = {"held-out electronic": held_out, "other acoustic": other}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        for weight in PRIOR_WEIGHTS:
            name = f"`--prior-weight {weight:g}`" if weight else "no prior"
            changes = {"prior_data": prior, "prior_weight": weight} if weight else {}
            output = home / f"prior {weight:g} seed {seed}"
            found.setdefault(name, []).append(trained(checkpoints, output, seed, style, folders, **changes))
    before = {name: loss_on(checkpoints, folder, home / "look", None) for name, folder in folders.items()}
    return {"before": before, "runs": found, "machine": platform.machine(), "torch": torch.__version__}


def caption(latents: torch.Tensor, styles: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One way to say what music [B, T, 16] is like as a whole, [B, WORDS, WIDTH].

    Each word is drawn from synonyms: vectors around one meaning, the same in every call.
    """
    around = torch.randn(SYNONYMS, WORDS, WIDTH, generator=torch.Generator().manual_seed(2000)) / 2
    choice = torch.randint(SYNONYMS, (len(latents), WORDS), generator=generator)
    return conditions(latents.mean(1, keepdim=True).expand_as(latents), styles) + around[choice, torch.arange(WORDS)]


def write_captioned(folder: Path, clips: list[Clip], seed: int, wordings: int, times: int = SAID_IN) -> Path:
    """Every window `times` times, under as many different captions of its clip as there are to be, in turn."""
    for clip in clips:
        generator = torch.Generator().manual_seed(seed_for(seed, "captions", clip.name))
        told = [caption(clip.latents[None], torch.tensor([clip.style]), generator)[0] for _ in range(wordings)]
        windows = [part for part in clip.latents.split(WINDOW) if len(part) == WINDOW]
        made_by = {"fingerprint": {"audio": {"content": clip.name}}}
        for number, latents in enumerate(windows):
            for i in range(times):
                record = Record(latents.clone(), told[i % wordings], made_by)
                save_record(folder / f"{clip.name} {number:02d} {i}.pt", record)
    return folder


def captions_comparison(home: Path) -> dict:
    """Of one caption and of four, by seed: losses under captions read in training and under new ones, and before.

    Both arms hear the same windows in the same order with the same noise: only what they read differs.
    """
    clips = music(speeds=(1.0,))
    drawn = partial(caption, generator=torch.Generator().manual_seed(0))
    base = train_base(clips["acoustic"], PAIRED_BASE_STEPS, seed=0, told=drawn)
    checkpoints = write_checkpoint(home / "checkpoints", base)
    style, other = halves(clips["electronic"])
    folders = {
        "songs trained on, new captions": write_captioned(home / "same", style, NEW, 2, times=2),
        "other songs, new captions": write_captioned(home / "other", other, NEW, 2, times=2),
    }
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        read = write_captioned(home / f"read {seed}", style, seed, 1, times=1)
        measured_on = {"songs trained on, first caption": read} | folders
        for name, wordings in (("one caption", 1), ("four captions", SAID_IN)):
            data = write_captioned(home / f"{wordings} {seed}", style, seed, wordings)
            run = trained(checkpoints, home / f"{name} seed {seed}", seed, data, measured_on)
            found.setdefault(name, []).append(run)
    before = {name: loss_on(checkpoints, folder, home / "look", None) for name, folder in measured_on.items()}
    return {"before": before, "runs": found, "machine": platform.machine(), "torch": torch.__version__}


def kinds_comparison(home: Path) -> dict:
    """Of each kind of adapter and learning rate, by seed: the loss on held-out electronic windows, and before."""
    clips = music(speeds=(1.0, 0.9))
    checkpoints = write_checkpoint(home / "checkpoints", train_base(clips["acoustic"], PAIRED_BASE_STEPS, seed=0))
    style, held_out = (write_records(home / str(i), half) for i, half in enumerate(halves(clips["electronic"])))
    folders = {"held-out electronic": held_out}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        for kind, rank in KINDS.items():
            for lr in RATES:
                output = home / f"{kind} {lr:g} seed {seed}"
                changes = {"adapter_type": kind, "rank": rank, "alpha": 2.0 * rank, "lr": lr}
                run = trained(checkpoints, output, seed, style, folders, **changes)
                parameters = safetensors_parameters(output / "final" / "adapter_model.safetensors")
                found.setdefault(f"{kind}, {parameters:,} parameters, lr {lr:g}", []).append(run)
    before = {name: loss_on(checkpoints, folder, home / "look", None) for name, folder in folders.items()}
    return {"before": before, "runs": found, "machine": platform.machine(), "torch": torch.__version__}


def paired_table(results: dict, command: str) -> str:
    """A comparison as Markdown: means over the seeds, and paired differences from the first arm with their range."""

    def change(runs: list[dict[str, float]], name: str) -> list[float]:
        return [(run[name] / results["before"][name] - 1) * 100 for run in runs]

    def shown(values: list[float]) -> str:
        return f"{statistics.mean(values):+.2f} % ({min(values):+.2f} to {max(values):+.2f})"

    first, plain = next(iter(results["runs"].items()))
    titles = ["run", *(f"loss: {name}" for name in results["before"])]
    titles += [f"{name}, against {first}" for name in results["before"]] + ["time"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, runs in results["runs"].items():
        cells = [shown(change(runs, name)) for name in results["before"]]
        for name in results["before"]:
            pairs = zip(change(runs, name), change(plain, name), strict=True)
            cells.append("–" if runs is plain else shown([with_it - without for with_it, without in pairs]))
        lines.append(f"| {arm} | {' | '.join(cells)} | {statistics.mean(run['seconds'] for run in runs):.0f} s |")
    note = (
        f"Change of the loss from the model without adapter; mean over {len(plain)} seeds, in brackets the lowest and "
        f"the highest. Below zero is better. {PAIRED_EPOCHS} epochs; LoRAs have rank 16; seeds are paired. "
        f"{results['machine']}, one thread, beside other work."
    )
    return "\n".join([*lines, "", note, "", f"`nice -n 19 uv run python -m benchmarks.adaptation {command}`", ""])


COMPARISONS: dict[str, Callable[[Path], dict]] = {
    "prior": prior_comparison,
    "captions": captions_comparison,
    "kinds": kinds_comparison,
}


def write_comparison(name: str) -> None:
    """Run a comparison and write its results."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        results = COMPARISONS[name](Path(temporary))
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(paired_table(results, name), encoding="utf-8")
    print(paired_table(results, name))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        write_comparison(sys.argv[1])
        return
    started = time.perf_counter()
    clips = music(speeds=(1.0, 0.9, 1.12))
    base = train_base(clips["acoustic"], BASE_STEPS, seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        checkpoints = write_checkpoint(home / "checkpoints", base)
        data = write_records(home / "data", clips["electronic"])
        runs = {
            name: adapt(checkpoints, data, home / f"run {i}", changes) for i, (name, changes) in enumerate(RUNS.items())
        }
    results = {
        "base_steps": BASE_STEPS,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "adaptation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "adaptation.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
