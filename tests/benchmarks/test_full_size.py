"""The rehearsal at full size: its commands are ones that the program takes, and its stored table is the page's."""

import json
import sys

import pytest

from benchmarks import full_size
from sidestep.cli.parser import parse


@pytest.mark.parametrize("phase", full_size.phases())
def test_every_phase_is_a_command_that_the_program_takes(tmp_path, phase):
    words = full_size.words_of(tmp_path, "2B", phase, full_size.phases()[phase])
    assert parse([str(word) for word in words])


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
