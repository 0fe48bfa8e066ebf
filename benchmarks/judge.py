"""Does the judge tell an over-trained run from a moderate one, and does it recommend a good checkpoint?

The small model learns acoustic music. Each seed draws half of the electronic clips and trains two runs: a moderate one
on that half, of which each epoch is kept, and an over-trained one on a single clip of it, many times over. `score`
judges both. The losses on clips of the other half, which it never saw, say whether what it recommends is as good as the
best. Each figure is as `score` makes it, with its defaults but for what a small model makes meaningless (clip length,
guidance) and the captions of drift, which are acoustic clips. How often the one song is heard was chosen on a seed that
is none of these: often enough that parts of it are played back.

`OMP_NUM_THREADS=1 nice -n 19 uv run python -m benchmarks.judge [CLIPS]` writes benchmarks/results/judge.{json,md}
after each seed (with another number of clips than the default judge-CLIPS), and goes on behind those that are there.
About eight minutes of processor time.
"""

import json
import platform
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.adaptation import RESULTS, settings, write_checkpoint, write_records
from benchmarks.small_model import WINDOW, Clip, conditions, music, train_base
from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import Prompt
from sidestep.events import null
from sidestep.settings.config import ScoreConfig
from sidestep.settings.option import options_of
from sidestep.tasks.sample import Sampler
from sidestep.tasks.score import listening
from sidestep.tasks.score.clips import BASE, PIECES, listen, make_all, requests_of, songs_of
from sidestep.tasks.score.judge import Judge, candidates_of, prepare, training_of
from sidestep.tasks.score.metrics import Figure, gain
from sidestep.tasks.score.recommend import Verdict, copies
from sidestep.tasks.score.run import Measured, judge_all, measure_all
from sidestep.tasks.train.setup import train

SEEDS, BASE_STEPS, EPOCHS, TIMES, CAPTIONS = 5, 250, 4, 240, 12  # TIMES: how often the one song is heard
SECONDS, STEPS, CLIPS = WINDOW / 25, 12, options_of(ScoreConfig)["clips"].default
SETTING = {
    "base_steps": BASE_STEPS,
    "epochs": EPOCHS,
    "times": TIMES,
    "captions": CAPTIONS,
    "steps": STEPS,
    "pieces": PIECES,
    "machine": platform.machine(),
    "torch": torch.__version__,
}


def silent(_sampler: Sampler, latents: Tensor, _prompt: Prompt | None = None) -> np.ndarray:
    """Nothing to hear: whitened spectra have no VAE, and all figures are of latents."""
    return np.zeros((2, latents.shape[1] * 1920), np.float32)


def other_music(clips: list[Clip]) -> list[tuple[Prompt, Tensor]]:
    """Captions of acoustic music, for drift."""
    windows = [clip.latents[:WINDOW] for clip in clips[:CAPTIONS]]
    told = conditions(torch.stack(windows), torch.tensor([clip.style for clip in clips[:CAPTIONS]]))
    return [(Prompt(caption=str(n), duration=SECONDS, seed=n), words[None]) for n, words in enumerate(told)]


def by_clip(measured: Measured) -> list[float]:
    """Mean losses of the clips that the windows are of."""
    clips = [name.rpartition(" ")[0] for name in measured.songs]
    cells = list(zip(clips, measured.losses, strict=True))
    return [float(np.mean([loss for name, loss in cells if name == clip])) for clip in dict.fromkeys(clips)]


def scored(run: Path, others: list[tuple[Prompt, Tensor]], clips: int) -> tuple[Judge, Verdict, dict[str, Any]]:
    """A run as `score` judges it; its results.json, and which of its checkpoints copy beyond the base and chance."""
    config = ScoreConfig(run_folder=run, device="cpu", clips=clips, clip_seconds=SECONDS, steps=STEPS, guidance=1.0)
    judge = prepare(config, training_of(config, run), run / "score", null)
    candidates = candidates_of(run)
    verdict = judge_all(judge, candidates, run.name, lambda _judge: others)
    songs = songs_of(judge)
    heard, _ = listen(songs, make_all(judge, candidates, (1.0,), requests_of(judge, songs.clip_frames)))
    base = heard.pop((BASE, 0.0)).copying
    found = json.loads((run / "score" / "results.json").read_text(encoding="utf-8"))
    own = {name: copies(replace(verdict.row, copying=own.copying), base) for (name, _), own in heard.items()}
    return judge, verdict, found | {"copies": own}


def on_unseen(judge: Judge, verdict: Verdict, run: Path, data: Path) -> dict[str, Any]:
    """The gain of each checkpoint on records that no run has seen, and how far the recommended one is from the best."""
    unseen = replace(judge.training, dataset_dir=data, val_split=0.0)
    base, measured = measure_all(
        prepare(judge.config, unseen, run / "unseen", null), candidates_of(run), lambda _judge: []
    )
    gains = {place: gain(by_clip(m), by_clip(base)) for place, m in measured.items()}
    best = max(gains, key=lambda place: gains[place].value)
    taken = gains[verdict.row.name, verdict.row.strength]
    return {
        "gains": {place[0]: figure.value for place, figure in gains.items()},
        "recommended": {"name": verdict.row.name, "gain": taken.value, "interval": taken.interval},
        "best": {"name": best[0], "gain": gains[best].value, "interval": gains[best].interval},
        "behind": Figure(gains[best].value - taken.value, gains[best].draws - taken.draws).interval,
        "equal": taken.equals(gains[best]),
    }


def one_seed(home: Path, checkpoints: Path, clips: dict[str, list[Clip]], seed: int, many: int) -> dict[str, Any]:
    """What the judge says of the two runs of a seed, and the gains on other clips of each checkpoint.

    many: clips that are made with each checkpoint.
    """
    drawn = random.Random(seed).sample(clips["electronic"], len(clips["electronic"]))
    known, other = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    others = other_music(clips["acoustic"])

    def trained(name: str, songs: list[Clip], **changes) -> Path:
        data, run = write_records(home / f"data {name} {seed}", songs), home / f"{name} {seed}"
        train(settings(checkpoints, data, run, seed=seed, **changes), null)
        return run

    run = trained("moderate", known, epochs=EPOCHS, save_every=1, keep_checkpoints=EPOCHS, val_split=0.3)
    judge, moderate, found = scored(run, others, many)
    unseen = on_unseen(judge, moderate, run, write_records(home / f"other {seed}", other))
    run = trained("over-trained", known[:1], epochs=TIMES, save_every=TIMES)
    _, over_trained, other_found = scored(run, others, many)
    more = Figure(
        over_trained.row.drift.value - moderate.row.drift.value,
        over_trained.row.drift.draws - moderate.row.drift.draws,
    )
    return {
        "moderate": found,
        "over-trained": other_found,
        "unseen": unseen,
        "more drift": {"value": more.value, "interval": more.interval},
    }


def table(results: dict[str, Any]) -> str:
    """The seeds as Markdown."""
    lines = [
        "| seed | run | recommended | drift | copying | of the base | copies | gain on other clips | the best there |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, found in enumerate(results["seeds"]):
        for name in ("moderate", "over-trained"):
            judged = found[name]
            row = next(row for row in judged["rows"] if row["name"] == judged["recommended"]["name"])
            cells = [str(seed), name, row["name"]]
            cells += [f"{100 * figure:.0f} %" for figure in (row["drift"]["value"], row["copying"]["value"])]
            cells += [f"{100 * judged['base']['copying']['value']:.0f} %"]
            cells += ["yes" if judged["copies"][row["name"]] else "no"]
            if name == "moderate":
                taken, best = found["unseen"]["recommended"], found["unseen"]["best"]
                equal = "equal" if found["unseen"]["equal"] else "better"
                cells += [f"{100 * taken['gain']:.1f} %", f"{100 * best['gain']:.1f} % ({best['name']}, {equal})"]
            else:
                cells += ["–", "–"]
            lines.append(f"| {' | '.join(cells)} |")
    seeds, many = results["seeds"], results["setting"]["clips"]
    copying = {
        name: sum(any(found[name]["copies"].values()) for found in seeds) for name in ("moderate", "over-trained")
    }
    drifts = sum(found["more drift"]["interval"][0] > 0 for found in seeds)
    equal = sum(found["unseen"]["equal"] for found in seeds)
    note = (
        f"{many} clips with each checkpoint. Of {len(seeds)} seeds: the over-trained run copies in "
        f"{copying['over-trained']}, a checkpoint of the moderate one in {copying['moderate']}; the over-trained run "
        f"drifts more, beyond the interval, in {drifts}; what is recommended equals the best on other clips in "
        f"{equal}. {results['setting']['machine']}, torch {results['setting']['torch']}, one thread."
    )
    command = f"`OMP_NUM_THREADS=1 nice -n 19 uv run python -m benchmarks.judge {many}`"
    return "\n".join([*lines, "", note, "", command, ""])


def main(many: int) -> None:
    """All seeds that are not there yet, written after each."""
    torch.set_num_threads(1)
    Sampler.audio = silent
    Checkpoint.load_vae = lambda *_: None
    listening.decode = lambda _vae, latents: torch.zeros(1, 2, latents.shape[1] * 1920)
    path, setting = RESULTS / ("judge.json" if many == CLIPS else f"judge-{many}.json"), SETTING | {"clips": many}
    results: dict[str, Any] = {"setting": setting, "seeds": []}
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["setting"] == setting:
        results = kept
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        clips = music(speeds=(1.0,))
        checkpoints = write_checkpoint(home / "checkpoints", train_base(clips["acoustic"], BASE_STEPS, seed=0))
        for seed in range(len(results["seeds"]), SEEDS):
            results["seeds"].append(one_seed(home, checkpoints, clips, seed, many))
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".md").write_text(text := table(results), encoding="utf-8")
            print(text, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else CLIPS)
