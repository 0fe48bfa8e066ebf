"""The benchmark for GPUs runs through on a CPU, goes on where it was cut off, and says what cannot be."""

import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import PARTS, SMALL, Bench, cases, measured, report


@pytest.fixture
def bench() -> Bench:
    return Bench(torch.device("cpu"), {"small": SMALL}, (2.0,), 1, "eager")


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()


@pytest.mark.slow
def test_a_dry_run_fills_every_row_of_every_part(tmp_path, monkeypatch):
    run(monkeypatch, "--dry-run", "--output", str(tmp_path))
    tables = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert list(tables) == list(PARTS)
    rows = [row for table in tables.values() for row in table["rows"]]
    assert not [row for row in rows if "not possible" in row]
    assert all(row["finite"] for row in tables["memory"]["rows"])
    assert all(row["falls"] for row in tables["learning"]["rows"])
    recomputed, kept = (
        next(r for r in tables["launches"]["rows"] if r["setting"].startswith(n)) for n in ("all", "not")
    )
    assert recomputed["forward"] == kept["forward"]
    assert recomputed["sum"] > 1.2 * kept["sum"]
    assert "| small |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_call_goes_on_behind_the_last_row_and_only_begins_anew(tmp_path, monkeypatch):
    seen = []

    def figures(bench, part, case):
        seen.append((part, *case.values()))
        return {"figure": len(seen)}

    monkeypatch.setattr(gpu, "measured", figures)
    every = [
        (part, *case.values())
        for part in PARTS
        for case in cases(Bench(torch.device("cpu"), {"small": SMALL}, (4.0,), 1), part)
    ]
    run(monkeypatch, "--dry-run", "--output", str(tmp_path), "--limit", "0")
    assert seen == []
    ticks = iter([0.0] * 4 + [1000.0] * 100)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ticks))
    run(monkeypatch, "--dry-run", "--output", str(tmp_path))
    assert seen == every[:3]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: 0.0)
    run(monkeypatch, "--dry-run", "--output", str(tmp_path))
    assert seen == every
    run(monkeypatch, "--dry-run", "--output", str(tmp_path), "--only", "parity")
    assert seen[len(every) :] == [row for row in every if row[0] == "parity"]


def test_quantised_products_and_attention_are_near_the_exact_ones(bench):
    errors = {tuple(case.values()): measured(bench, "parity", case) for case in cases(bench, "parity")}
    assert errors["local attention", "fp32"] == {"error": 0.0}
    assert errors["local attention", "bf16"]["error"] < 0.02
    assert errors["int8 product", "bf16"]["error"] < 0.02
    assert errors["nf4 product", "bf16"]["error"] < 0.2
    assert "needs a CUDA device" in errors["flash attention", "bf16"]["error"]


def test_what_a_card_cannot_do_stands_in_its_row(bench, monkeypatch):
    def too_much(bench, case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setitem(PARTS, "speed", too_much)
    [row, *_] = cases(bench, "speed")
    row |= measured(bench, "speed", row)
    assert row["not possible"] == "CUDA out of memory. Tried to allocate 20 GiB."
    facts = {"device": "cpu", "versions": {"torch": torch.__version__}}
    assert "Tried to allocate" in report({"parity": {"rows": [row], "machine": facts}})
