"""The values last used, for the next session."""

from pathlib import Path

import pytest

from sidestep.settings import last_used


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    return tmp_path


def test_what_was_kept_comes_back():
    assert last_used.write({"rank": 8, "checkpoint_dir": Path("a/b"), "welcomed": True}) == ""
    assert last_used.read()[0] == {"rank": 8, "checkpoint_dir": Path("a/b").absolute().as_posix(), "welcomed": True}


def test_no_file_is_a_fresh_start():
    assert last_used.read() == ({}, "")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"version": "1", "values": {}}',
        '{"version": 1}',
        "\x00\xff",
        '{"version": 99, "values": {}}',
    ],
)
def test_a_broken_file_is_set_aside_and_said_so(home, text):
    for number in ("", "-2"):
        (home / "settings.json").write_text(text, encoding="utf-8")
        kept, notice = last_used.read()
        assert kept == {}
        assert f"settings.broken{number}.json" in notice
        assert (home / f"settings.broken{number}.json").read_text(encoding="utf-8") == text
        assert not (home / "settings.json").exists()


def test_values_of_strange_kinds_are_left_out(home):
    (home / "settings.json").write_text(
        '{"version": 1, "values": {"rank": 8, "x": {"a": 1}, "y": null}}', encoding="utf-8"
    )
    assert last_used.read()[0] == {"rank": 8}


def test_a_folder_that_cannot_be_written_to_is_only_mentioned(home, monkeypatch):
    (home / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SIDE_STEP_HOME", str(home / "file"))
    assert "could not be kept" in last_used.write({"rank": 8})
