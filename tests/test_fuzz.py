"""Readers of files that others write hold for a moment under damage; `python -m tests.fuzz` holds them for hours."""

import pytest

from sidestep.errors import UserError
from tests.fuzz import READERS, Reader, fuzz


@pytest.mark.parametrize("name", sorted(set(READERS) - {"runs"}))
def test_a_reader_of_damaged_files_returns_or_says_what_is_wrong(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    assert fuzz(READERS[name], tmp_path, 0.2)[0] > 0


@pytest.mark.slow
def test_a_reader_of_damaged_runs_returns_or_says_what_is_wrong(tmp_path):
    assert fuzz(READERS["runs"], tmp_path, 3)[0] > 0


def write_one(folder):
    (folder / "a").write_bytes(b"good" * 9)


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), RecursionError()])
def test_any_other_error_is_told_with_its_case(tmp_path, error):
    def use(folder):
        if (folder / "a").read_bytes() != b"good" * 9:
            raise error

    with pytest.raises(AssertionError, match=rf"case 7 ends with {type(error).__name__}"):
        fuzz(Reader(write_one, use), tmp_path, 0, first=7)


def test_a_case_is_the_same_each_time_and_refusals_are_counted(tmp_path):
    seen = []

    def use(folder):
        seen.append((folder / "a").read_bytes())
        if len(seen) % 2 == 0:
            raise UserError("no")

    for turn in ("one", "two"):
        (tmp_path / turn).mkdir()
        cases, refused, _ = fuzz(Reader(write_one, use), tmp_path / turn, 0, first=3)
        assert (cases, refused) == (1, 1)
    assert seen[:2] == seen[2:]
