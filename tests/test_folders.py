"""The folders of settings and logs on each platform, and files that are whole or absent."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from sidestep import files
from sidestep.files import cache_folder, config_folder, replacing, state_folder, write_text


@pytest.fixture
def platform(monkeypatch, tmp_path):
    """Puts the test on a platform, with an empty home folder."""
    for name in ("SIDE_STEP_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def put(name: str, folders: type) -> Path:
        monkeypatch.setattr(files.sys, "platform", name)
        monkeypatch.setattr(platformdirs, "PlatformDirs", folders)
        return tmp_path

    return put


def test_linux_keeps_settings_and_state_where_xdg_says(platform, monkeypatch):
    home = platform("linux", Unix)
    assert (config_folder(), state_folder()) == (home / ".config/side-step", home / ".local/state/side-step")
    assert cache_folder() == home / ".cache/side-step"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "c"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "s"))
    assert (config_folder(), state_folder()) == (home / "c/side-step", home / "s/side-step")


def test_macos_keeps_both_in_application_support_and_stays_there_when_xdg_says_otherwise(platform, monkeypatch):
    home = platform("darwin", MacOS)
    usual = home / "Library/Application Support/Side-Step"
    assert (config_folder(), state_folder()) == (usual, usual)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "c"))
    assert config_folder() == home / "c/Side-Step"
    usual.mkdir(parents=True)
    assert config_folder() == usual
    assert cache_folder() == home / "Library/Caches/Side-Step"  # which backups leave out


def test_windows_keeps_settings_in_the_roaming_folder_and_state_in_the_local_one(platform):
    class Windows:
        def __init__(self, appname, appauthor, roaming, **_):
            assert appauthor is False
            self.user_config_path = self.user_state_path = Path("Roaming" if roaming else "Local") / appname

    platform("win32", Windows)
    assert (config_folder(), state_folder()) == (Path("Roaming/Side-Step"), Path("Local/Side-Step"))


def test_one_variable_holds_everything_in_one_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "all"))
    assert config_folder() == state_folder() == cache_folder() == tmp_path / "all"


def test_a_file_is_whole_or_what_was_there(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one\n")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="users are others there")
def test_without_a_home_and_a_name_presets_and_the_first_error_are_not_lost(tmp_path):
    """As in a container that was given a user id alone."""
    nobody = (
        "import pwd, sys\n"
        "def unknown(_id): raise KeyError('no such user')\n"
        "pwd.getpwuid = unknown\n"
        "from sidestep.cli import main\n"
    )
    breaks = "def broken(*_): raise ZeroDivisionError('first error')\nmain.run = broken\n"
    ends = "sys.exit(main.main(sys.argv[1:]))\n"
    for code, arguments, status in (
        (nobody + ends, ["presets", "list"], 0),
        (nobody + ends, ["presets", "import", "~/presets.json"], 2),
        (nobody + breaks + ends, ["presets", "list"], 1),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "--plain", *arguments],
            cwd=Path(__file__).parents[1],
            env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    log = tmp_path / f"side-step-{os.getuid()}" / "sidestep.log"
    assert str(log) in done.stderr
    assert "first error" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "unknown", [RuntimeError("could not determine the home directory"), Path("~/.config/side-step")]
)
def test_where_nobody_has_a_home_the_folder_for_temporary_files_does(platform, monkeypatch, unknown):
    platform("linux", Unix)

    def path(*_name, **_how) -> Path:
        if isinstance(unknown, Path):
            return unknown
        raise unknown

    monkeypatch.setattr(platformdirs, "user_config_path", path)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: "/scratch")
    assert config_folder() == Path(f"/scratch/side-step-{os.getuid() if hasattr(os, 'getuid') else ''}")


def test_the_name_of_the_program_is_asked_for_without_an_author(platform, monkeypatch):
    asked = []
    for name in ("user_config_path", "user_state_path"):
        monkeypatch.setattr(platformdirs, name, lambda *name, **how: asked.append((name, how)) or Path("/x"))
    for system, folders in (("linux", Unix), ("win32", Unix), ("darwin", MacOS)):
        platform(system, folders)
        assert (config_folder(), state_folder()) == (Path("/x"), Path("/x"))
    names = [("side-step",)] * 2 + [("Side-Step",)] * 4
    assert asked == [(n, {"appauthor": False, "roaming": i % 2 == 0}) for i, n in enumerate(names)]
