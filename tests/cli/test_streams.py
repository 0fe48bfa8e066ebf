"""Output that nobody reads to its end, and output that is not UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidestep.settings.config import TrainConfig
from sidestep.settings.option import as_json_values

ROOT = Path(__file__).parents[2]
SAYS = (["--help"], ["fixed", "--help"], ["presets", "list"], ["completion", "bash"], [])


def start(argv: list[str], tmp_path: Path, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"SIDE_STEP_HOME": str(tmp_path / "home")} | env,
    )


def made_run(folder: Path) -> Path:
    folder.mkdir()
    config = TrainConfig(checkpoint_dir=Path("c"), dataset_dir=Path("d"), output_dir=folder)
    (folder / "config.json").write_text(json.dumps(as_json_values(config)), encoding="utf-8")
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("argv", [*SAYS, ["history", ".", "--json"], ["nonsense"]], ids=" ".join)
def test_a_reader_that_leaves_at_once_sees_no_traceback(argv, tmp_path):
    made_run(tmp_path / "run")
    process = start(argv, tmp_path)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    process.wait(240)
    assert not any(word in errors for word in ("Traceback", "Exception", "BrokenPipe")), errors
    assert process.returncode == (2 if argv == ["nonsense"] else 0)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_errors_that_nobody_reads_keep_their_status(tmp_path):
    process = start(["nonsense"], tmp_path)
    process.stderr.close()
    process.stdout.read()
    process.stdout.close()
    assert process.wait(240) == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("argv", SAYS, ids=" ".join)
def test_every_encoding_can_take_the_output(argv, encoding, tmp_path):
    process = start(argv, tmp_path, PYTHONIOENCODING=encoding)
    out, errors = process.communicate(timeout=240)
    assert b"Traceback" not in errors
    assert process.returncode == (0 if argv else 2)
    assert len(out.decode(encoding)) > 100


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", ["Ærø 日本 🎵", "esc\x1b[2J\x9b\u202e", "caf\udce9"])
def test_json_is_whole_in_every_encoding_and_says_nothing_to_a_terminal(name, encoding, tmp_path):
    try:
        run = made_run(tmp_path / name)
    except (OSError, UnicodeError):
        pytest.skip("this system has no such names")
    out, errors = start(["history", ".", "--json"], tmp_path, PYTHONIOENCODING=encoding).communicate(timeout=240)
    assert errors == b""
    [found] = json.loads(out.decode(encoding))["runs"]
    assert found["folder"] == run.name
    assert not any((byte < 32 and byte not in b"\r\n") or byte > 126 for byte in out)
