"""Speed, measured: one command that prints the tables and stores them with everything that is needed to judge them.

    uv run benchmarks/run.py                 all parts, about half an hour on two CPU cores
    uv run benchmarks/run.py --quick         fewer lengths and turns, a few minutes: a first look, not for publication
    uv run benchmarks/run.py --only epochs   one part: attention, step, loop, epochs, single, growth, start, compile

Writes speed.json and speed.md to benchmarks/results, charts to docs/charts and the ratios into docs/benchmarks.md;
parts that were not run keep their stored figures. All comparisons are made in turns within one process. On a CPU the
model has 51 M parameters, on a GPU it is the whole 2B model.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch

from benchmarks import charts, speed_attention, speed_compile, speed_growth, speed_loop, speed_model, speed_start
from benchmarks.measure import ROOT, Result, Setting, as_markdown, machine, with_part
from sidestep.acestep.device import choose_device, choose_precision

RESULTS, PAGE, CHARTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "charts"
MARKS = ("<!-- speed, rebuilt by benchmarks/run.py -->", "<!-- end of speed -->")
PARTS = {
    "attention": (speed_attention.kernel, speed_attention.block_size),
    "step": (speed_attention.step,),
    "loop": (speed_loop.levers,),
    "epochs": (speed_loop.clips, speed_loop.joined),
    "single": (speed_loop.single_songs,),
    "growth": (speed_growth.growth,),
    "start": (speed_start.start,),
    "compile": (speed_compile.compiled,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and turns")
    parser.add_argument("--rounds", type=int, default=0, help="turns of each comparison; default 9, with --quick 3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds, with --threads 1: for a machine that does other things meanwhile",
    )
    parser.add_argument("--layers", type=int, default=speed_model.SMALL["num_hidden_layers"], help="of the CPU's model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.getLogger("sidestep").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    speed_model.SMALL["num_hidden_layers"] = options.layers
    device = choose_device(options.device).value
    setting = Setting(
        device,
        choose_precision("auto", device).value,
        options.rounds or (3 if options.quick else 9),
        options.quick,
        options.cpu_time,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    stored = options.output / "speed.json"
    tables = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    for part in options.only:
        for measure in PARTS[part]:
            result = measure(setting)
            tables[result.name] = {**vars(result), "machine": machine(setting), "rounds": setting.rounds}
            print(as_markdown(result), flush=True)
            stored.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (options.output / "speed.md").write_text(report(tables), encoding="utf-8")
    if options.output == RESULTS:
        PAGE.write_text(with_ratios(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8", newline="\n")
    drawn = CHARTS if options.output == RESULTS else options.output
    for path in charts.draw({name: table["rows"] for name, table in tables.items()}, drawn):
        print(f"chart: {path}")


def with_ratios(page: str, tables: dict) -> str:
    """The page with the ratios of all stored tables between its marks."""
    rows = [f"| {name} | {value:.2f} |" for table in tables.values() for name, value in table["facts"].items()]
    return with_part(page, MARKS, "\n".join(["| measured | ratio |", "|---|---|", *rows]))


def report(tables: dict) -> str:
    """All stored tables, with where and when in the history they were measured."""
    lines = [
        "# Speed",
        "",
        "Rebuilt by `uv run benchmarks/run.py`. Times depend on the machine; the ratios are what to look at.",
        "",
    ]
    for table in tables.values():
        facts = table["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        lines.append(as_markdown(Result(**{name: table[name] for name in ("name", "title", "note", "rows", "facts")})))
        lines.append(
            f"<sub>commit {facts['commit']}; {facts['device']}, {facts['processor']}, "
            f"{facts['threads']} of {facts['cores']} cores, {facts['precision']}; {facts['system']}; {versions}; "
            f"{table['rounds']} turns, {facts['mode']}; {facts['clock']}; load {facts['load_average']}</sub>\n"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
