"""The published speed tables: what stands in the report is what was measured and stored."""

import json
from pathlib import Path

import pytest

from benchmarks.measure import ROOT, Result, Times
from benchmarks.run import PARTS, as_markdown, report

STORED = Path(ROOT, "benchmarks", "results", "speed.json")


def test_a_ratio_is_that_of_each_turn_so_that_a_slow_moment_meets_both():
    ours, theirs = Times((1.0, 10.0, 1.0)), Times((2.0, 20.0, 2.0))
    assert theirs.over(ours) == 2.0 and ours.median == 1.0


def test_a_table_has_every_column_and_every_figure():
    text = as_markdown(Result("x", "Title", "How.", [{"a": 1, "b": 0.12345}, {"a": 2, "c": 1234.5}], {"fact": 1.239}))
    assert "| a | b | c |" in text and "| 1 | 0.123 |  |" in text and "| 2 |  | 1,234 |" in text and "- fact: **1.24**" in text


@pytest.mark.skipif(not STORED.is_file(), reason="no figures are stored")
def test_the_report_is_made_of_the_stored_figures():
    tables = json.loads(STORED.read_text(encoding="utf-8"))
    assert (STORED.parent / "speed.md").read_text(encoding="utf-8") == report(tables)
    for table in tables.values():
        assert {"commit", "processor", "threads", "versions", "clock"} <= table["machine"].keys() and table["rows"]


def test_every_part_has_measurements():
    assert all(callable(measure) for part in PARTS.values() for measure in part)
