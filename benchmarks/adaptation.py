"""Does training help? A small model learns acoustic music; adapters then learn electronic clips in the real loop.

The number is the loss on clips that no run has trained on, over the fixed grid of windows, timesteps and noise that
`--val-split` uses. Run it with `nice -n 19 uv run python -m benchmarks.adaptation`: one CPU thread, a few minutes.
It writes benchmarks/results/adaptation.{json,md}.

`python -m benchmarks.adaptation prior` asks instead what `--prior-data` gains and costs, paired over five seeds: the
held-out loss on electronic clips, and the loss on acoustic ones that neither was trained on nor was prior music.
It writes benchmarks/results/prior.{json,md}.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.small_model import CHANNELS, MU, SIGMA, WIDTH, WINDOW, Clip, conditions, music, train_base
from sidestep.acestep.layout import original_key
from sidestep.data.records import Record, save_record
from sidestep.events import Event, Validated, null
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train import train
from sidestep.tasks.train.checkpoints import complete_checkpoints, read_checkpoint
from sidestep.tasks.train.evaluation import grid_loss
from sidestep.tasks.train.setup import open_accelerator, set_up

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
        json.dumps({"sampling_rate": 48000, "downsampling_ratios": [2, 4, 4, 6, 10]}), encoding="utf-8"
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


def adapt(checkpoints: Path, data: Path, output: Path, changes: dict) -> dict:
    """Train one adapter.

    Returns the held-out loss before, after each epoch and of the running average at the end, parameters and seconds.
    """
    config = TrainConfig(
        checkpoint_dir=checkpoints,
        model_variant="base",
        dataset_dir=data,
        output_dir=output,
        device="cpu",
        epochs=EPOCHS,
        lr=LR,
        batch_size=8,
        gradient_accumulation=1,
        val_split=0.2,
        validate_every=2,
        ema_decay=0.95,
        save_every=EPOCHS,
        log_every=10,
        gradient_checkpointing=False,
        **changes,
    )
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


SEEDS, PRIOR_BASE_STEPS, PRIOR_EPOCHS, PRIOR_WEIGHTS = range(5), 800, 3, (0.0, 0.3)


def loss_on(checkpoints: Path, data: Path, output: Path, adapter: Path | None) -> float:
    """The loss on every record of a folder over the fixed grid, with an adapter or without."""
    config = TrainConfig(
        checkpoint_dir=checkpoints,
        model_variant="base",
        dataset_dir=data,
        output_dir=output,
        device="cpu",
        rank=16,
        alpha=32.0,
        batch_size=8,
        init_from=adapter,
    )
    accelerator, precision = open_accelerator(config, null)
    run = set_up(config, null, accelerator, precision)
    run.tensorboard.close()
    return grid_loss(run, run.songs)


def prior_comparison(home: Path) -> dict:
    """Of each weight of the prior, by seed: losses on held-out electronic and on other acoustic windows, and before."""
    clips = music(speeds=(1.0, 0.9))
    base = train_base(clips["acoustic"], PRIOR_BASE_STEPS, seed=0)
    checkpoints = write_checkpoint(home / "checkpoints", base)
    electronic = sorted({clip.name.split("@")[0] for clip in clips["electronic"]})
    acoustic = sorted({clip.name.split("@")[0] for clip in clips["acoustic"]})
    folders = {}
    for name, kind, pieces in (
        ("style", "electronic", electronic[::2]),
        ("held out", "electronic", electronic[1::2]),
        ("prior", "acoustic", acoustic[::2]),
        ("other", "acoustic", acoustic[1::2]),
    ):
        some = [clip for clip in clips[kind] if clip.name.split("@")[0] in pieces]
        folders[name] = write_records(home / name, some)
    before = {name: loss_on(checkpoints, folders[name], home / "look", None) for name in ("held out", "other")}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        for weight in PRIOR_WEIGHTS:
            output = home / f"run {weight:g} {seed}"
            prior = {"prior_data": folders["prior"], "prior_weight": weight} if weight else {}
            config = TrainConfig(
                checkpoint_dir=checkpoints,
                model_variant="base",
                dataset_dir=folders["style"],
                output_dir=output,
                device="cpu",
                rank=16,
                alpha=32.0,
                epochs=PRIOR_EPOCHS,
                lr=LR,
                batch_size=8,
                gradient_accumulation=1,
                save_every=PRIOR_EPOCHS,
                gradient_checkpointing=False,
                seed=seed,
                **prior,
            )
            started = time.perf_counter()
            train(config, null)
            seconds = time.perf_counter() - started
            losses = {name: loss_on(checkpoints, folders[name], home / "look", output / "final") for name in before}
            found.setdefault(f"{weight:g}", []).append(losses | {"seconds": seconds})
            print(seed, weight, losses, f"{seconds:.0f} s", flush=True)
    return {"before": before, "runs": found, "machine": platform.machine(), "torch": torch.__version__}


def prior_table(results: dict) -> str:
    """The comparison as Markdown: means over the seeds, and the paired differences from no prior with their range."""

    def change(runs: list[dict[str, float]], name: str) -> list[float]:
        return [(run[name] / results["before"][name] - 1) * 100 for run in runs]

    def shown(values: list[float]) -> str:
        return f"{statistics.mean(values):+.2f} % ({min(values):+.2f} to {max(values):+.2f})"

    plain = results["runs"]["0"]
    titles = ["`--prior-weight`", "loss on held-out electronic", "loss on other acoustic"]
    titles += ["electronic, against no prior", "acoustic, against no prior", "time"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for weight, runs in results["runs"].items():
        cells = [shown(change(runs, name)) for name in ("held out", "other")]
        for name in ("held out", "other"):
            pairs = zip(change(runs, name), change(plain, name), strict=True)
            cells.append("–" if runs is plain else shown([with_it - without for with_it, without in pairs]))
        seconds = statistics.mean(run["seconds"] for run in runs)
        lines.append(f"| {'none' if runs is plain else weight} | {' | '.join(cells)} | {seconds:.0f} s |")
    note = (
        f"Change of the loss from the model without adapter; mean over {len(plain)} seeds, in brackets the lowest and "
        f"the highest. Below zero is better. LoRA of rank 16, {PRIOR_EPOCHS} epochs; seeds are paired. "
        f"{results['machine']}, one thread, beside other work."
    )
    return "\n".join([*lines, "", note, "", "`nice -n 19 uv run python -m benchmarks.adaptation prior`", ""])


def write_prior() -> None:
    """Run the comparison and write its results."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        results = prior_comparison(Path(temporary))
    (RESULTS / "prior.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "prior.md").write_text(prior_table(results), encoding="utf-8")
    print(prior_table(results))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["prior"]:
        write_prior()
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
