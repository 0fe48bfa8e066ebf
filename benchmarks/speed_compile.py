"""`--compile`: what the first steps cost, cold and from the cache, and what a step gains; in processes of its own."""

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
from sidestep.acestep.blocks import compile_layers, recompute_layers

LAYERS = 4  # layers share their code, so few show what many gain


def _step(model, feed: dict) -> None:
    model.zero_grad(set_to_none=True)
    model(**feed)[0].float().square().mean().backward()


WAYS = ("eager", "compiled", "compiled with the recomputation inside")


def make(setting: Setting, way: str, recompute: bool) -> torch.nn.Module:
    """The model as a run has it: eager or compiled, layers kept or recomputed, around the compiled code or inside."""
    model = make_model(setting, LAYERS)
    decoder = model.get_base_model()
    use_attention(model, "auto")
    inside = way == WAYS[2]
    if recompute and not inside:
        recompute_layers(decoder)
    if way != "eager":
        compile_layers(decoder, setting.device, decoder.layers if inside else ())
    return model


def measure(setting: Setting, only_compile: bool) -> list[dict]:
    """A row for each way and length: medians in ms and their ratio to eager; and the seconds of the first steps."""
    rows = []
    feeds = {seconds: inputs(setting, sizes(setting)["hidden_size"], seconds) for seconds in (30, 60, 120)}
    for recompute, words in ((False, "kept"), (True, "recomputed")):
        models = {way: make(setting, way, recompute) for way in (WAYS if recompute else WAYS[:2])}
        for way, model in models.items():
            started = time.perf_counter()
            for feed in feeds.values():
                _step(model, feed)
            if way != "eager":
                rows.append(
                    {
                        "layers": words,
                        "way": way,
                        "first steps, s": time.perf_counter() - started,
                        "model": parameters(model),
                    }
                )
        for seconds, feed in {} if only_compile else feeds.items():
            times = in_turns({way: partial(_step, model, feed) for way, model in models.items()}, setting)
            rows += [
                {
                    "layers": words,
                    "way": way,
                    "seconds": seconds,
                    "ms": 1000 * t.median,
                    "eager over it": times["eager"].over(t),
                }
                for way, t in times.items()
            ]
    return rows


def compiled(setting: Setting) -> Result:
    """Compile in a fresh process with an empty cache, then again in another with the cache filled."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_in_process(setting, cache, only_compile) for only_compile in (False, True))
    again = {(row["layers"], row["way"]): row["first steps, s"] for row in warm}
    rows = [
        row | {"with a cache, s": again[row["layers"], row["way"]]} if "first steps, s" in row else row for row in cold
    ]
    model = next(row["model"] for row in cold if "model" in row)
    rows = [{name: value for name, value in row.items() if name != "model"} for row in rows]
    note = (
        f"{model}, {LAYERS} layers, one graph for all lengths; first steps: of 30, 60 and 120 s, compilation included"
    )
    gain = {(row["layers"], row["way"]): row["eager over it"] for row in rows if row.get("seconds") == 60}
    facts = {
        "60 s step, eager over compiled": gain["kept", WAYS[1]],
        "60 s step with recomputed layers, eager over compiled": gain["recomputed", WAYS[2]],
    }
    return Result("compile", "What --compile gives and costs", note, rows, facts)


def _in_process(setting: Setting, cache: str, only_compile: bool) -> list[dict]:
    arguments = [
        "--device",
        str(setting.device),
        "--rounds",
        str(setting.rounds),
        "--threads",
        str(torch.get_num_threads()),
    ]
    arguments += ["--cpu-time"] if setting.cpu_time else []
    target = Path(cache) / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed_compile",
        *arguments,
        "--output",
        str(target),
        *(["--only-compile"] if only_compile else []),
    ]
    subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor")},
        stdout=subprocess.DEVNULL,
    )
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
    setting_ = Setting(
        here, torch.bfloat16 if here.type == "cuda" else torch.float32, given.rounds, False, given.cpu_time
    )
    given.output.write_text(json.dumps(measure(setting_, given.only_compile)), encoding="utf-8")
