"""The start-up benchmark: its stored figures are the page's, and all that it starts is a command of ours."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import startup
from benchmarks.startup import Checkout, Start, measured, report, table, timed
from sidestep.cli.parser import parse

ROWS = json.loads((startup.RESULTS / "startup.json").read_text(encoding="utf-8"))


def test_the_report_and_the_page_are_made_of_the_stored_figures():
    assert (startup.RESULTS / "startup.md").read_text(encoding="utf-8") == report(ROWS)
    page = startup.PAGE.read_text(encoding="utf-8")
    assert startup.with_part(page, startup.MARKS, table(ROWS)) == page


def test_what_was_asked_for_was_measured_five_times_warm_and_cold():
    there = {(row["what"], row["start"]) for row in ROWS if row["checkout"] == "this"}
    asked = ("to the first step", "`plan`", "`uv run train.py --version`")
    assert {(what, start) for what in asked for start in ("cold", "warm")} <= there
    assert {len(row["seconds"]) for row in ROWS} == {5}


def test_the_line_and_the_end_are_told_apart(tmp_path, monkeypatch):
    work = "while time.process_time() < {}: pass"
    lines = [
        "import pathlib, time",
        "print('first', flush=True)",
        work.format(0.4),
        "print('wanted', flush=True)",
        "for _ in range(3000):",
        "    if pathlib.Path('looked at 1').exists(): break",
        "    time.sleep(0.02)",
        "else: raise SystemExit('nobody looked at the clock when the line came')",
        work.format(1.0),
        "print('wanted, again')",
    ]
    looks = itertools.count()

    def clock() -> float:
        look = next(looks)
        (tmp_path / f"looked at {look}").touch()
        return float(look)

    monkeypatch.setattr(startup, "time", SimpleNamespace(perf_counter=clock))
    here = Checkout(tmp_path, tmp_path)
    times = timed(Start("x", [sys.executable, "-c", "\n".join(lines)], b"wanted"), here)
    assert (times["seconds"], times["to the end"]) == (1.0, 2.0)
    assert 0.3 < times["processor"] < 0.8
    assert times["processor to the end"] >= 1.0
    for code, until in (("print(1)", b"never"), ("print(1); 1/0", b"1")):
        with pytest.raises(RuntimeError, match="1"):
            timed(Start("x", [sys.executable, "-c", code], until), here)


def test_two_checkouts_take_turns_and_the_other_is_not_asked_for_what_it_lacks(tmp_path, monkeypatch):
    order = []
    both = [Start("a", ["a"], b"1"), Start("b", ["b"], b"1")]
    starts = {"mine": both, "theirs": both[:1]}
    monkeypatch.setattr(startup, "starts_of", lambda checkout: starts[checkout.path.name])
    monkeypatch.setattr(startup, "evict", lambda folders: order.append("evicted"))

    def started(start: Start, checkout: Checkout) -> dict[str, float]:
        order.append((start.what, checkout.path.name))
        columns = ("seconds", "processor", "to the end", "processor to the end")
        return dict.fromkeys(columns, 1.0 if checkout.path.name == "mine" else 4.0)

    monkeypatch.setattr(startup, "timed", started)
    checkouts = {"this": Checkout(Path("mine"), tmp_path), "beside": Checkout(Path("theirs"), tmp_path)}
    rows = measured(checkouts, ["warm"], 2)
    assert order == [
        *[("a", "theirs"), ("a", "mine"), ("b", "mine")],
        *[("a", "mine"), ("a", "theirs"), ("b", "mine")],
    ]
    assert table(rows).splitlines()[2:] == [
        "| a | warm | 1.00 (1.00–1.00) | 4.00 (4.00–4.00) | 0.25 |",
        "| b | warm | 1.00 (1.00–1.00) | | |",
    ]
    order.clear()
    measured({"this": checkouts["this"]}, ["cold"], 1)
    assert order == ["evicted", ("a", "mine"), "evicted", ("b", "mine")]


def test_what_is_started_are_commands_of_the_program(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(startup, "timed", lambda start, _: made.append(start.what))
    starts = startup.starts_of(Checkout(startup.ROOT, tmp_path))
    assert made == ["demo"]
    calls = [parse(start.words[2:]) for start in starts if start.words[1] == "train.py"]
    assert [call.command for call in calls] == ["fixed", "plan"]
    assert [call.typed["dataset_dir"] for call in calls] == [str(tmp_path / "demo" / "tensors")] * 2
    assert [start.what for start in starts[2:]] == ["`uv run train.py --version`", "`import torch`, nothing else"]


@pytest.mark.parametrize("flag", ["--dataset-dir", "--data"])
def test_another_checkout_is_asked_by_flags_that_its_help_names_and_for_neither_version_nor_torch(
    tmp_path, monkeypatch, flag
):
    monkeypatch.setattr(startup, "timed", lambda *_: None)
    (tmp_path / "train.py").write_text(f"print('usage: plan {flag} FOLDER')", encoding="utf-8")
    training, planning = startup.starts_of(Checkout(tmp_path, tmp_path))
    assert "--dataset-dir" in training.words
    assert ("--dataset-dir" in planning.words) is (flag == "--dataset-dir")
