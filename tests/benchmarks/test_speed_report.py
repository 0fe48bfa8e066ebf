"""The published speed tables: what stands in the report is what was measured and stored."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import charts, speed_attention, speed_loop, speed_model, usual_way
from benchmarks.measure import ROOT, Result, Setting, Times, machine
from benchmarks.run import CHARTS, PAGE, PARTS, as_markdown, report, with_ratios
from sidestep.acestep import blocks

CPU = torch.device("cpu")
STORED = Path(ROOT, "benchmarks", "results", "speed.json")


def test_a_ratio_is_that_of_each_turn_so_that_a_slow_moment_meets_both():
    ours, theirs = Times((1.0, 10.0, 1.0)), Times((2.0, 20.0, 2.0))
    assert theirs.over(ours) == 2.0
    assert ours.median == 1.0


def test_a_table_has_every_column_and_every_figure():
    text = as_markdown(Result("x", "Title", "How.", [{"a": 1, "b": 0.12345}, {"a": 2, "c": 1234.5}], {"fact": 1.239}))
    assert "| a | b | c |" in text
    assert "| 1 | 0.123 |  |" in text
    assert "| 2 |  | 1,234 |" in text
    assert "- fact: **1.24**" in text


@pytest.mark.skipif(not STORED.is_file(), reason="no figures are stored")
def test_the_report_is_made_of_the_stored_figures():
    tables = json.loads(STORED.read_text(encoding="utf-8"))
    assert (STORED.parent / "speed.md").read_text(encoding="utf-8") == report(tables)
    for table in tables.values():
        assert {"commit", "processor", "threads", "versions", "clock"} <= table["machine"].keys()
        assert table["rows"]


def test_the_page_shows_the_stored_ratios():
    page = PAGE.read_text(encoding="utf-8")
    assert with_ratios(page, json.loads(STORED.read_text(encoding="utf-8"))) == page


def test_compile_auto_weighs_what_was_measured():
    table = json.loads(STORED.read_text(encoding="utf-8"))["compile"]
    costs = {name: max(row.get(name, 0) for row in table["rows"]) for name in ("first steps, s", "with a cache, s")}
    weighed = [blocks.COMPILING_SECONDS, blocks.FROM_DISK_SECONDS]
    assert weighed == pytest.approx(list(costs.values()), abs=0.5)
    assert list(blocks.FASTER.values()) == pytest.approx(list(table["facts"].values()), abs=0.005)
    assert blocks.FASTER.keys() == {("cpu", "kept"), ("cpu", "recomputed")}


def test_every_part_has_measurements():
    assert all(callable(measure) for part in PARTS.values() for measure in part)


@pytest.mark.slow
@pytest.mark.parametrize("part", [name for name in PARTS if name != "compile"])
def test_every_part_runs_on_a_tiny_model(part, monkeypatch, tmp_path):
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    monkeypatch.setattr(speed_model, "SMALL", speed_model.SMALL | tiny)
    monkeypatch.setattr(speed_attention, "BLOCKS", (128, 256))
    monkeypatch.setattr(speed_loop, "clip_seconds", lambda: [3.0] * 10)
    monkeypatch.setattr(speed_loop, "joined_seconds", lambda: [6.0, 12.0, 6.0, 12.0, 6.0])
    monkeypatch.setattr(usual_way, "WORKERS", 0)
    setting = Setting(CPU, torch.float32, rounds=1, quick=True)
    results = [measure(setting) for measure in PARTS[part]]
    tables = {result.name: {**vars(result), "machine": machine(setting), "rounds": 1} for result in results}
    assert all(result.rows for result in results)
    assert report(json.loads(json.dumps(tables)))
    for chart in charts.draw({name: table["rows"] for name, table in tables.items()}, tmp_path):
        assert chart.read_text(encoding="utf-8").startswith("<?xml")


def test_the_chart_of_epochs_shows_the_stored_ratios():
    tables = json.loads(STORED.read_text(encoding="utf-8"))
    chart = (CHARTS / "epochs.svg").read_text(encoding="utf-8")
    for name in ("epoch_clips", "epoch_joined"):
        for row in tables[name]["rows"]:
            assert f"{row['usual over ours']:.2f} ×" in chart, "run: benchmarks/run.py"
