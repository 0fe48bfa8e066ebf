"""Seconds in which nothing is trained: starting the program, loading the model, the first step, saving a checkpoint."""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from diffusers import AceStepTransformer1DModel
from safetensors.torch import load_file

from benchmarks.measure import ROOT, Result, Setting, in_turns, timed
from benchmarks.speed_loop import Clock, make_run
from benchmarks.speed_model import sizes, train_config
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.layout import diffusers_key
from sidestep.settings.option import as_arguments
from sidestep.tasks.train.checkpoints import save_checkpoint
from sidestep.tasks.train.loop import run_loop
from sidestep.variants import OFFICIAL_FOLDERS


def _program(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def _usual_loading(folder: Path, setting: Setting) -> None:
    """Every tensor of the file into memory, a model with its own random weights, and a copy."""
    tensors = load_file(folder / OFFICIAL_FOLDERS["turbo"] / "model.safetensors")
    config = sizes(setting)
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    model = AceStepTransformer1DModel(**{name: config[name] for name in names.split()})
    model.load_state_dict(
        {diffusers_key(k.removeprefix("decoder.")): v for k, v in tensors.items() if k.startswith("decoder.")}
    )
    model.to(setting.device, setting.dtype)


def start(setting: Setting) -> Result:
    """Start-up, loading and saving."""
    rows, rounds = [], max(2, setting.rounds // 2)
    programs = {
        "`train.py --help`": ("train.py", "--help"),
        "python alone": ("-c", "pass"),
        "`import torch` (what --help avoids)": ("-c", "import torch"),
    }
    for name, times in in_turns(
        {name: partial(_program, *arguments) for name, arguments in programs.items()},
        replace(setting, cpu_time=False),
        rounds,
    ).items():
        rows.append({"what": name, "seconds": times.median})
    clock = Clock(setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(setting, folder, [60.0] * 4, clock, epochs=2)
        checkpoints = folder / "checkpoints"
        loading = {
            "loading the decoder": lambda: open_checkpoint(checkpoints, "turbo").load_decoder(
                setting.device, setting.dtype
            ),
            "loading it the usual way": partial(_usual_loading, checkpoints, setting),
        }
        found = in_turns(loading, setting, rounds)
        rows += [{"what": what, "seconds": times.median} for what, times in found.items()]
        run_loop(run)
        blocked, whole = [], []
        for number in range(rounds + 1):
            run.position = replace(
                run.position, step=run.position.step + 1
            )  # a step that stands on disk is not saved twice
            started = time.perf_counter()
            save_checkpoint(run, f"trial_{number}")
            blocked.append(time.perf_counter() - started)
            run.writer.wait()
            whole.append(time.perf_counter() - started)
        rows.append({"what": "saving a checkpoint: training waits", "seconds": sorted(blocked)[len(blocked) // 2]})
        rows.append(
            {"what": "saving a checkpoint: until it is whole on disk", "seconds": sorted(whole)[len(whole) // 2]}
        )
        config = train_config(folder, output_dir=folder / "second", device=str(setting.device), max_steps=1)
        program = partial(_program, "train.py", "--plain", "--yes", "fixed", *as_arguments(config))
        rows.append(
            {
                "what": "`train.py fixed` from nothing to one step trained and saved",
                "seconds": timed(program, replace(setting, cpu_time=False)),
            }
        )
    facts = {"usual loading over ours": found["loading it the usual way"].over(found["loading the decoder"])}
    return Result(
        "start",
        "Starting, loading, saving",
        "A 60 s step, one optimizer step of four songs in the last row.",
        rows,
        facts,
    )
