"""Does the composer learn form? A tiny language model that knows sections in any order learns songs of one order.

    uv run python -m benchmarks.form

About three minutes a seed on one CPU core; writes benchmarks/results/form.{json,md}. A Qwen3 of 2 layers learns from
scratch: songs of six sections, each a motif of one of five kinds, in an order that is drawn anew for each song. Then
`train-lm` gets songs whose order is always the same, in 8 keys; the last code of each section is drawn, so that no two
songs are equal. Held-out songs have this order, too. Written songs are judged by how many of their sections are of the
kind that belongs there.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sidestep.acestep.lm.decoding import Sampling, compose
from sidestep.acestep.lm.loss import answer_loss
from sidestep.acestep.lm.model import LanguageModel, load_language_model
from sidestep.adapters.attach import load_adapter
from sidestep.adapters.read import read_adapter
from sidestep.data.batches import Song
from sidestep.data.records import Record, save_record
from sidestep.events import Event, Validated
from sidestep.settings.config import TrainLmConfig
from sidestep.tasks.train.language import sequence
from sidestep.tasks.train.setup import train

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "tests" / "fixtures"
VARIANT, MODEL, CODEBOOK = "acestep-v15-512-codes", "acestep-5Hz-lm-0.6B", 512
LEARNING_RATE = 5e-3
KINDS, KEYS, SECTIONS, SECTION_CODES = 5, 8, 6, 10
FORM = (0, 1, 2, 1, 2, 3)  # intro, verse, chorus, verse, chorus, end
TRAINED_ON, HELD_OUT = range(64), range(1000, 1016)  # numbers of songs
TOLD = {"caption": "music", "bpm": 120, "keyscale": "A minor", "timesignature": "4", "language": "en"}


def song(number: int, order: tuple[int, ...] = FORM) -> Record:
    """A song whose codes are the motifs of these kinds of sections; key and last codes are drawn by its number."""
    generator = torch.Generator().manual_seed(number)
    key, written = int(torch.randint(KEYS, (1,), generator=generator)), []
    for kind in order:
        last = 2 * int(torch.randint(5, (1,), generator=generator))
        written += [100 * kind + 10 * key + step for step in (0, 2, 4, 6, 8, 0, 2, 4, 6, last)]
    codes = torch.tensor(written, dtype=torch.int32)
    latents, conditions = torch.zeros(5 * len(codes), 8), torch.zeros(12, 32)
    hints: dict[str, Any] = {"cover_hints": latents, "hints_encoder_hidden_states": conditions}
    return Record(latents, conditions, TOLD | {"lyrics": "[Instrumental]"}, audio_codes=codes[:, None], **hints)


def in_memory(record: Record) -> Song:
    return Song("song", 0, lambda: record, metadata=record.metadata)


def write_base(home: Path, steps: int, seed: int) -> None:
    """A language model that has learnt sections in any order, beside a DiT."""
    for folder in (CHECKPOINTS / "lm" / "checkpoints").iterdir():
        shutil.copytree(folder, home / folder.name)
    for part in ("vae", "Qwen3-Embedding-0.6B"):
        shutil.copytree(CHECKPOINTS / "checkpoints" / part, home / part)
    lm = load_language_model(home / MODEL, CODEBOOK)
    torch.manual_seed(seed)
    model: Any = Qwen3ForCausalLM(Qwen3Config(**json.loads((home / MODEL / "config.json").read_text("utf-8"))))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = []
        for number in range(16):
            order = torch.randint(KINDS, (SECTIONS,), generator=generator).tolist()
            ids, n_prompt = sequence(lm, in_memory(song(10_000 + 16 * step + number, tuple(order))))
            batch.append(ids)
        ids = torch.tensor(batch)
        logits = model(input_ids=ids).logits[:, n_prompt - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, n_prompt:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(home / MODEL)


@torch.inference_mode()
def held_out_loss(lm: LanguageModel) -> float:
    """Mean loss of songs of the form that were not trained on."""
    losses = []
    for number in HELD_OUT:
        ids, n_prompt = sequence(lm, in_memory(song(number)))
        states = lm.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].clone()
        losses.append(float(answer_loss(states, lm.model.lm_head.weight, torch.tensor(ids), n_prompt)))
    return statistics.fmean(losses)


def in_place(codes: tuple[int, ...]) -> tuple[float, float]:
    """(share of sections of the kind that the form has there, share in the song's commonest key)."""
    sections = [codes[i : i + SECTION_CODES] for i in range(0, len(codes), SECTION_CODES)]
    kinds = [Counter(code // 100 for code in section).most_common(1)[0][0] for section in sections]
    keys = [Counter(code % 100 // 10 for code in section).most_common(1)[0][0] for section in sections]
    right = sum(kind == wanted for kind, wanted in zip(kinds, FORM, strict=True)) / SECTIONS
    return right, Counter(keys).most_common(1)[0][1] / SECTIONS


def written(lm: LanguageModel, songs: int) -> dict[str, float]:
    """What songs are like that the model writes as the app draws them, and the likeliest one."""
    seconds = SECTIONS * SECTION_CODES / 5

    def judged(sampling: Sampling) -> tuple[float, float]:
        return in_place(compose(lm, TOLD["caption"], "[Instrumental]", sampling, None, seconds).codes)

    drawn = [judged(Sampling(seed=seed, guidance=1)) for seed in range(songs)]
    return {
        "greedy": judged(Sampling(temperature=0, guidance=1))[0],
        "drawn": statistics.fmean(right for right, _ in drawn),
        "one key": statistics.fmean(key for _, key in drawn),
    }


def measured(home: Path, folder: Path, seed: int, epochs: int, songs: int) -> dict[str, Any]:
    """Loss and form before and after `train-lm`."""
    lm = load_language_model(home / MODEL, CODEBOOK)
    before = {"held-out loss": held_out_loss(lm), **written(lm, songs)}
    for number in TRAINED_ON:
        save_record(folder / "songs" / f"song {number}.pt", song(number))
    events: list[Event] = []
    train(
        TrainLmConfig(
            checkpoint_dir=home,
            model_variant=VARIANT,
            dataset_dir=folder / "songs",
            output_dir=folder / "run",
            device="cpu",
            lr=LEARNING_RATE,
            rank=16,
            gradient_accumulation=1,
            early_stop_patience=6,
            warmup_steps=0,
            epochs=epochs,
            val_split=0.2,
            seed=seed,
        ),
        events.append,
    )
    validated = [event.loss for event in events if isinstance(event, Validated)]
    load_adapter(lm.model.model, read_adapter(folder / "run" / "best"), "--lm")
    after = {"held-out loss": held_out_loss(lm), **written(lm, songs)}
    return {"before": before, "after": after, "epochs": len(validated)}


def table(results: list[dict[str, Any]]) -> str:
    """The means as a table in Markdown, with the lowest and the highest of the seeds."""
    titles = {
        "held-out loss": "held-out loss of the form",
        "greedy": "sections in place, likeliest song",
        "drawn": "sections in place, drawn as the app draws",
        "one key": "sections in the song's key, drawn",
    }
    lines = ["| | before | after `train-lm` |", "|---|---|---|"]
    for name, title in titles.items():
        cells = []
        for when in ("before", "after"):
            values = [result[when][name] for result in results]
            cells.append(f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400, help="of the base model's own training")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--songs", type=int, default=6, help="written by each model")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in range(options.seeds):
        with TemporaryDirectory() as place:
            home, folder = Path(place) / "home", Path(place) / "work"
            home.mkdir()
            write_base(home, options.steps, seed)
            results.append(measured(home, folder, seed, options.epochs, options.songs))
            print(json.dumps(results[-1]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "form.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "form.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
