"""`--compile`: what the first steps cost, cold and from the cache, and what a step gains afterwards. Runs in processes of its own."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import ROOT, Result, Setting, in_turns
from benchmarks.speed_model import inputs, make_model, parameters, sizes
from sidestep.acestep.attention import use_attention
from sidestep.acestep.regional_compile import compile_layers

LAYERS = 4  # layers share their code, so few show what many gain


def _step(model, feed: dict) -> None:
    model.zero_grad(set_to_none=True)
    model(**feed)[0].float().square().mean().backward()


def measure(setting: Setting, only_compile: bool) -> dict:
    """Seconds to compile and medians in ms, eager and compiled, with and without recomputation."""
    width, found = sizes(setting)["hidden_size"], {}
    for recompute in (False, True):
        models = {}
        for way in ("eager", "compiled"):
            model = models[way] = make_model(setting, LAYERS)
            use_attention(model, "auto")
            decoder = model.get_base_model()
            if recompute and way == "eager":
                decoder.enable_gradient_checkpointing()
            if way == "compiled":
                compile_layers(decoder, setting.device, decoder.layers if recompute else ())
        feeds = {seconds: inputs(setting, width, seconds) for seconds in (30, 60, 120)}
        started = time.perf_counter()
        for feed in feeds.values():
            _step(models["compiled"], feed)
        name = "recomputed" if recompute else "kept"
        found[f"{name} compile"] = time.perf_counter() - started
        if only_compile:
            continue
        for seconds, feed in feeds.items():
            times = in_turns({way: partial(_step, model, feed) for way, model in models.items()}, setting)
            found[f"{name} {seconds}"] = [1000 * times["eager"].median, 1000 * times["compiled"].median, times["eager"].over(times["compiled"])]
        found["model"] = parameters(models["eager"])
    return found


def compiled(setting: Setting) -> Result:
    """Compile in a fresh process with an empty cache, then again in another with the cache filled."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_in_process(setting, cache, only_compile) for only_compile in (False, True))
    rows = []
    for name, words in (("kept", "activations kept"), ("recomputed", "layers recomputed")):
        for seconds in (30, 60, 120):
            eager, quick, ratio = cold[f"{name} {seconds}"]
            rows.append({"layers": words, "seconds": seconds, "eager, ms": eager, "compiled, ms": quick, "eager over compiled": ratio})
        rows.append({"layers": words, "first steps cold, s": cold[f"{name} compile"], "first steps with cache, s": warm[f"{name} compile"]})
    note = f"{cold['model']}, {LAYERS} layers, one graph for all lengths; first steps: of 30, 60 and 120 s, compilation included"
    return Result("compile", "What --compile gives and costs", note, rows, {"60 s step, eager over compiled": cold["kept 60"][2]})


def _in_process(setting: Setting, cache: str, only_compile: bool) -> dict:
    arguments = ["--device", str(setting.device), "--rounds", str(setting.rounds), "--threads", str(torch.get_num_threads())]
    arguments += ["--cpu-time"] if setting.cpu_time else []
    target = Path(cache) / "result.json"
    command = [sys.executable, "-m", "benchmarks.speed_compile", *arguments, "--output", str(target), *(["--only-compile"] if only_compile else [])]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor")}, stdout=subprocess.DEVNULL)
    return json.loads(target.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only-compile", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    here = torch.device(given.device)
    setting_ = Setting(here, torch.bfloat16 if here.type == "cuda" else torch.float32, given.rounds, False, given.cpu_time)
    given.output.write_text(json.dumps(measure(setting_, given.only_compile)), encoding="utf-8")
