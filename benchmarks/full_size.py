"""The rehearsal: every command on a checkpoint of the real size, with random weights, on the machine at hand.

    uv run --group dev benchmarks/full_size.py FOLDER               the 2B model; about 12 GB of disk, 20 GB of RAM
    uv run --group dev benchmarks/full_size.py FOLDER --size XL     the XL model
    uv run --group dev benchmarks/full_size.py FOLDER --only train  phases by the beginning of their names
    uv run --group dev benchmarks/full_size.py FOLDER --minutes 12  a phase that takes longer is stopped
    uv run --group dev benchmarks/full_size.py FOLDER --precision fp32  for a CPU without bf16, where that takes days
    uv run --group dev benchmarks/full_size.py FOLDER --in-blocks   bf16 for such a CPU: benchmarks/in_blocks.py

Written into FOLDER: the checkpoint, shard by shard in the original layout, songs of noise, all that the commands make.
A table of wall and processor time, peak memory beyond the imports, the planner's figure and silent stretches of more
than 3 s goes to benchmarks/results/full_size.json and .md. Commands run as a user's do, each in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository

import numpy as np
import psutil
import soundfile
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from benchmarks.measure import ROOT, Result, Setting, as_markdown, machine, with_part
from sidestep.acestep.checkpoint import accepted, decoder_sizes, encoder_sizes
from sidestep.acestep.device import GIB, PRECISIONS
from sidestep.acestep.layout import TEXT_ENCODER_FOLDER, original_key
from sidestep.acestep.vae import CPU_TILE_FRAMES
from sidestep.files import write_text
from sidestep.tasks.demo import write_tokenizer
from sidestep.tasks.plan.passes import TEXT_ENCODER, VAE, first_pass_peak, second_pass_peak
from sidestep.variants import CONFIG_2B, CONFIG_XL, OFFICIAL_FOLDERS

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- full size, rebuilt by benchmarks/full_size.py -->", "<!-- end of full size -->")
SIZES = {"2B": ("turbo", CONFIG_2B), "XL": ("xl-turbo", CONFIG_XL)}
SHARD_BYTES = 2 * GIB
SILENT_SECONDS = 3.0
LOADED = ("Loading libraries", "device:")  # a process has imported what its task needs after them; export says none


def random_tensors(model_class: type[nn.Module], sizes: dict, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names in the original layout and random bf16 tensors of a part, one by one."""
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in model_class(**accepted(model_class, sizes)).state_dict().items()
        }
    for name, shape in shapes.items():
        if name in ("null_condition_emb", "silence_latent"):
            continue
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.0
        yield (
            prefix + original_key(name),
            (torch.randn(shape) * scale if scale else torch.ones(shape)).to(torch.bfloat16),
        )


def write_checkpoint(folder: Path, size: str) -> None:
    """The model in shards of 2 GiB at most, VAE, text encoder and silence; nothing where it stands already."""
    variant, config = SIZES[size]
    model = folder / OFFICIAL_FOLDERS[variant]
    if (model / "model.safetensors.index.json").is_file():
        return
    model.mkdir(parents=True, exist_ok=True)
    config = config | {"is_turbo": True, "model_version": variant}
    parts = {
        "decoder.": (AceStepTransformer1DModel, decoder_sizes(config)),
        "encoder.": (AceStepConditionEncoder, encoder_sizes(config)),
        "tokenizer.": (AceStepAudioTokenizer, encoder_sizes(config)),
        "detokenizer.": (AceStepAudioTokenDetokenizer, encoder_sizes(config)),
    }
    shard: dict[str, Tensor] = {"null_condition_emb": torch.zeros(1, 1, encoder_sizes(config)["hidden_size"])}
    names: dict[str, str] = {}

    def close() -> None:
        file = f"model-{len(set(names.values())) + 1:05d}.safetensors"
        save_file(shard, model / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, file))
        shard.clear()

    for prefix, (part, sizes) in parts.items():
        for name, tensor in random_tensors(part, sizes, prefix):
            shard[name] = tensor.contiguous()
            if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
                close()
    close()
    torch.save(torch.zeros(1, 64, 15000), model / "silence_latent.pt")
    if not (folder / "vae").is_dir():
        AutoencoderOobleck(**VAE).save_pretrained(folder / "vae")
        write_tokenizer(folder / TEXT_ENCODER_FOLDER)
        torch.set_default_dtype(torch.bfloat16)
        Qwen3Model(Qwen3Config.from_dict(TEXT_ENCODER)).save_pretrained(folder / TEXT_ENCODER_FOLDER)
        torch.set_default_dtype(torch.float32)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = json.dumps({"metadata": {}, "weight_map": names})
    write_text(model / "model.safetensors.index.json", index)  # last: where it stands, all else does


def write_song(folder: Path, name: str, seconds: float) -> None:
    """A song of noise with a caption and lyrics."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal((round(seconds * 48000), 2)) * 0.1
    soundfile.write(folder / f"{name}.flac", noise, 48000)
    (folder / f"{name}.caption.txt").write_text("noise, loud, without a tune", encoding="utf-8")
    (folder / f"{name}.lyrics.txt").write_text("[Verse]\n" + "and so on and on it goes\n" * 20, encoding="utf-8")


LENGTHS = (5, 60, 240)  # seconds of the songs
LEVERS = {
    "240 s": "",
    "60 s": "",
    "5 s": "",
    "5 s int8": "--base-precision int8",
    "5 s nf4": "--base-precision nf4",
    "5 s swapped": "--swap-blocks 12",
}
TRAIN = "fixed --dataset-dir tensors --output-dir run --gradient-accumulation 1 --save-every 1"


def phases() -> dict[str, str]:
    """Every command by the name of its row, with words that stand for folders.

    The long songs are trained whole, the levers are tried on the short one.
    """
    found = {f"preprocess {s} s": "preprocess --audio-dir songs --tensor-output tensors" for s in LENGTHS}
    found |= {f"train {name}": f"{TRAIN} --epochs 2 {lever}" for name, lever in LEVERS.items()}
    return found | {
        "resume 5 s": f"{TRAIN} --epochs 3 --resume-from latest",
        "estimate 5 s": "estimate --dataset-dir tensors --batches 4 --output map",
        "sample 5 s": "sample --adapter final --prompt noise --duration 5 --strength 1 --output run",
        "export merged": "export final --output into --format merged",
    }


def words_of(folder: Path, size: str, name: str, line: str, precision: str) -> tuple[str, ...]:
    """The words of a phase's command, folders put in."""
    seconds = next((s for s in LENGTHS if f" {s} s" in name), 5)
    made = f"{size} {precision}".removesuffix(" bf16")
    run = folder / f"run {name.partition(' ')[2] if name.startswith('train') else '5 s'} {made}"
    places = {"songs": folder / f"songs {seconds} s", "tensors": folder / f"tensors {seconds} s {made}", "run": run}
    places |= {"final": run / "final", "map": run / "map.json", "into": run / "merged"}
    words = tuple(str(places.get(word, word)) for word in line.split())
    where, variant = str(folder / "checkpoints"), ("--model-variant", SIZES[size][0])
    if "export" in words:
        return (*words, "--base", where, *variant)
    return (*words, "--checkpoint-dir", where, *variant, "--device", "cpu", "--precision", precision)


def planned_bytes(folder: Path, size: str, name: str, precision: str) -> int:
    """Bytes of a phase's tensors at their peak, copies for saves included, as the planner says; 0 where it does not."""
    if name in ("preprocess 60 s", "preprocess 240 s"):
        seconds = float(name.split()[1])
        dtype = PRECISIONS[precision]
        return max(first_pass_peak(dtype, seconds, CPU_TILE_FRAMES), second_pass_peak(SIZES[size][1], dtype))
    if not name.startswith(("train", "resume")):
        return 0
    lever = LEVERS[name.partition(" ")[2]]
    if "--swap-blocks" in lever:
        lever = ""  # swapped blocks wait in the memory in which a CPU computes
    words = words_of(folder, size, name, f"plan --dataset-dir tensors --json {lever}", precision)
    asked = tuple(word for word in words if word not in ("--device", "cpu"))
    done = subprocess.run(
        command(asked), capture_output=True, text=True, encoding="utf-8", env=environment(), check=True
    )
    found = json.loads(done.stdout)
    return found["asked"]["peak_bytes"]["total"] + found["saving_bytes"]


def command(words: tuple[str, ...], module: str = "sidestep.cli") -> list[str]:
    """How a process of ours is started."""
    return [sys.executable, "-u", "-m", module, *words]


def environment() -> dict[str, str]:
    """Of such a process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Watched:
    """What was seen of a process. silent: the longest times without a line, and after which line each was.

    imports: what it held when all was imported, which is no part of what its task takes; 0 where that was not told.
    step_peak: `peak` when the first optimizer step was told, before anything was saved; 0 where none was. last: line.
    """

    status: int
    wall: float
    processor: float
    imports: int
    peak: int
    step_peak: int
    silent: list[tuple[float, str]]
    last: str


def watch(words: list[str], folder: Path = ROOT, minutes: float | None = None, with_files: bool = True) -> Watched:
    """Run a process to its end, or for so many minutes, and look at it ten times a second.

    folder: what its lines are kept without. with_files: count what is in memory of files that it maps, too. Linux.
    """
    started = last = time.perf_counter()
    process = psutil.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment()
    )
    silent, imports, peak, step_peak, processor, line = [], 0, 0, 0, 0.0, "the start"
    done = threading.Event()

    def held() -> int:
        memory = process.memory_info()
        return memory.rss - (0 if with_files else getattr(memory, "shared", 0))

    def look() -> None:
        nonlocal peak, processor
        while not done.wait(0.1):
            try:
                peak = max(peak, held())
                times = process.cpu_times()
                processor = times.user + times.system
            except psutil.Error:
                return

    looking = threading.Thread(target=look)
    looking.start()
    stop = threading.Timer(minutes * 60 if minutes else threading.TIMEOUT_MAX, process.kill)
    stop.daemon = True
    stop.start()
    for text in process.stdout:
        now = time.perf_counter()
        if now - last > SILENT_SECONDS:
            silent.append((round(now - last, 1), line))
        print(f"    {now - started:7.1f} {text.rstrip()[:150]}", flush=True)
        last, line = now, text.strip().replace(str(folder), "FOLDER")[:60]
        if line.startswith(LOADED):
            with suppress(psutil.Error):  # it has ended since
                imports = held()
        if line.startswith("step ") and not step_peak:
            step_peak = peak
    status = process.wait()
    stop.cancel()
    done.set()
    looking.join()
    if (end := time.perf_counter() - last) > SILENT_SECONDS:
        silent.append((round(end, 1), line))
    return Watched(status, time.perf_counter() - started, processor, imports, peak, step_peak, silent, line)


def main() -> None:
    """Write what is missing, run the phases, store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="2B")
    parser.add_argument("--only", nargs="+", default=[""], help="phases whose names begin so")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--in-blocks", action="store_true", help="products of bf16 in blocks of fp32, for memory alone")
    parser.add_argument("--minutes", type=float, help="stop a phase after so many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    write_checkpoint(options.folder / "checkpoints", options.size)
    for seconds in LENGTHS:
        write_song(options.folder / f"songs {seconds} s", f"song of {seconds} s", seconds)
    stored = options.output / "full_size.json"
    tables = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    # in fp32 all weights are cast: what is in memory of their files was read, and goes when memory is wanted
    with_files = options.precision != "fp32"
    for name, line in phases().items():
        if not name.startswith(tuple(options.only)):
            continue
        print(f"== {name}", flush=True)
        what = options.folder, options.size, name
        module = "benchmarks.in_blocks" if options.in_blocks else "sidestep.cli"
        words = command(("--plain", *words_of(*what, line, options.precision)), module)
        seen = watch(words, options.folder, options.minutes, with_files)
        was_stopped = options.minutes is not None and seen.wall > options.minutes * 60
        status = f"stopped in the middle: {seen.last}" if was_stopped else seen.status
        shown = f"{name} {options.precision}".removesuffix(" bf16") + (", in blocks" if options.in_blocks else "")
        row: dict[str, Any] = {"phase": shown, "status": status, "wall s": seen.wall, "processor s": seen.processor}
        if seen.imports:
            row |= {"peak GiB beyond imports": (seen.peak - seen.imports) / GIB}
        if planned := planned_bytes(*what, options.precision):
            row |= {"before a save": (seen.step_peak - seen.imports) / GIB} if seen.step_peak else {}
            row |= {"planned GiB": planned / GIB, "planned over measured": planned / (seen.peak - seen.imports)}
        row |= {"silent": "; ".join(f"{s} s after “{line}”" for s, line in seen.silent)}
        table = tables.setdefault(options.size, {"rows": []})
        table["rows"] = [other for other in table["rows"] if other["phase"] != shown] + [row]
        facts = table["machine"] = machine(Setting(torch.device("cpu"), torch.bfloat16, 1, quick=False))
        row |= {name: facts[name] for name in ("commit", "threads")}
        write_text(stored, json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
        write_text(options.output / "full_size.md", report(tables))
        if options.output == RESULTS:
            write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), tables))


def report(tables: dict) -> str:
    """The stored tables."""
    lines = ["# At full size", "", "Rebuilt by `uv run --group dev benchmarks/full_size.py FOLDER`.", ""]
    for size, table in tables.items():
        facts = table["machine"]
        note = f"Random weights, {facts['processor']}."
        lines.append(as_markdown(Result(size, f"The {size} model on a CPU", note, table["rows"])))
    return "\n".join(lines)


def with_table(page: str, tables: dict) -> str:
    """The page with the stored figures between its marks."""
    columns = {
        "wall s": "wall",
        "processor s": "processor",
        "peak GiB beyond imports": "peak memory",
        "planned GiB": "planned",
    }
    lines = [f"| size | phase | {' | '.join(columns.values())} | version |", "|---" * (len(columns) + 3) + "|"]
    for size, table in tables.items():
        for row in table["rows"]:
            ended = "" if row["status"] == 0 else f" ({row['status']})"
            figures = [
                f"{row[name]:.2f} GiB" if "GiB" in name else f"{row[name]:.0f} s" for name in columns if name in row
            ]
            figures += [""] * (len(columns) - len(figures))  # nothing was planned
            lines.append(f"| {size} | {row['phase']}{ended} | {' | '.join(figures)} | {row['commit'][:12]} |")
    return with_part(page, MARKS, "\n".join(lines))


if __name__ == "__main__":
    main()
