"""The rehearsal at full size: its commands are ones that the program takes, and its stored table is the page's."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import full_size
from sidestep.cli.parser import parse


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("phase", full_size.phases())
def test_every_phase_is_a_command_that_the_program_takes(tmp_path, phase, precision):
    words = full_size.words_of(tmp_path, "2B", phase, full_size.phases()[phase], precision)
    assert parse([str(word) for word in words])
    assert ("--precision" in words) is ("export" not in words)


def test_what_is_made_in_another_precision_lies_in_another_folder(tmp_path):
    line = full_size.phases()["train 5 s"]
    one, other = (full_size.words_of(tmp_path, "2B", "train 5 s", line, name) for name in ("bf16", "fp32"))
    differ = {a for a, b in zip(one, other, strict=True) if a != b}
    assert differ == {str(tmp_path / "tensors 5 s 2B"), str(tmp_path / "run 5 s 2B"), "bf16"}


def stored() -> dict:
    return json.loads((full_size.RESULTS / "full_size.json").read_text(encoding="utf-8"))


def test_the_report_and_the_page_are_made_of_the_stored_figures():
    report = (full_size.RESULTS / "full_size.md").read_text(encoding="utf-8")
    assert report == full_size.report(stored()), "run: benchmarks/full_size.py"
    page = full_size.PAGE.read_text(encoding="utf-8")
    assert full_size.with_table(page, stored()) == page


def test_a_process_is_watched_to_its_end_or_stopped(capsys):
    """The second one says a line and would go on for ever."""
    ended = full_size.watch([sys.executable, "-c", "print('step 1/2')"])
    assert (ended.status, ended.last) == (0, "step 1/2")
    endless = "import time\nprint('begun', flush=True)\nwhile True: time.sleep(1)"
    stopped = full_size.watch([sys.executable, "-c", endless], minutes=0.01)
    assert stopped.status != 0
    assert stopped.last in ("begun", "the start")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files in memory are not told apart")
def test_files_that_are_mapped_are_no_memory_of_the_process_own(tmp_path):
    file = tmp_path / "zeros"
    file.write_bytes(bytes(64 << 20))
    mapping = (
        "import mmap, sys, time; print('before', flush=True); time.sleep(0.3); "
        "file = open(sys.argv[1], 'rb'); seen = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); "
        "sum(seen[::4096]); own = bytearray(16 << 20); print('step 1/1', flush=True); time.sleep(0.5)"
    )
    words = [sys.executable, "-c", mapping, str(file)]
    own, whole = (full_size.watch(words, with_files=with_files).peak for with_files in (False, True))
    assert whole - own > 64 << 20
    assert own > 16 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files in memory are not told apart")
def test_what_a_process_has_imported_is_no_part_of_what_its_task_takes():
    """It holds 64 MiB when the last library is told, 32 more at the device and 128 more at the end."""
    task = (
        "import time; held = []\n"
        "for line, size in (('Loading libraries 5/5', 64), ('device: cpu', 32), ('step 1/1', 128), ('end', 0)):\n"
        "    held.append(bytearray(size << 20)); print(line, flush=True); time.sleep(0.5)"
    )
    seen = full_size.watch([sys.executable, "-c", task])
    assert 128 <= (seen.peak - seen.imports) / 2**20 < 136


def test_what_was_planned_was_needed_within_a_tenth():
    rows = [row for table in stored().values() for row in table["rows"] if "planned GiB" in row]
    assert {
        row["phase"]: row["planned over measured"] for row in rows if not 0.9 <= row["planned over measured"] <= 1.1
    } == {}
    in_bf16 = {row["phase"].removesuffix(", in blocks") for row in rows if "fp32" not in row["phase"]}
    assert in_bf16 >= {name for name in full_size.phases() if name.startswith(("train", "resume"))}
    assert in_bf16 >= {"preprocess 60 s", "preprocess 240 s"}


def test_swapped_blocks_wait_in_the_memory_that_a_cpu_computes_in(tmp_path, monkeypatch):
    asked = []
    told = '{"asked": {"peak_bytes": {"total": 5}}, "saving_bytes": 2}'
    done = SimpleNamespace(stdout=told)
    monkeypatch.setattr(full_size.subprocess, "run", lambda words, **_: asked.append(words) or done)
    for name in ("train 5 s swapped", "train 5 s int8"):
        assert full_size.planned_bytes(tmp_path, "2B", name, "bf16") == 7
    assert ["--swap-blocks" in words for words in asked] == [False, False]
    assert ["int8" in words for words in asked] == [False, True]
