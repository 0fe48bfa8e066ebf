"""`completion`: shells complete what the parser knows."""

import shutil
import subprocess

import pytest

from sidestep.cli.main import main
from sidestep.settings.config import COMMANDS, SHELLS

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


@pytest.fixture
def script(capsys):
    """Prints the script for a shell."""

    def of(shell: str) -> str:
        assert main(["completion", shell]) == 0
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_that_knows_the_commands(script, shell):
    text = script(shell)
    assert [command for command in (*COMMANDS, "train") if command not in text] == []
    assert "Traceback" not in text


@needs_bash
def test_bash_takes_the_script(script):
    assert subprocess.run(["bash", "-n"], input=script("bash"), text=True, capture_output=True).stderr == ""


@needs_bash
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("side-step prepr", {"preprocess"}),
        ("side-step fixed --early-stop-p", {"--early-stop-patience"}),
        ("side-step train --vram-p", {"--vram-profile"}),
        ("side-step fixed --optimizer-type adamw", {"adamw", "adamw8bit"}),
        ("side-step plan --no-js", {"--no-json"}),
        ("side-step export song", {"song.safetensors"}),
        ("side-step --pl", {"--plain"}),
    ],
)
def test_bash_completes_commands_flags_choices_and_files(script, tmp_path, typed, completed):
    (tmp_path / "song.safetensors").touch()
    words = typed.split()
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_side_step side-step {words[-1]} {words[-2]}"
    code = f"{script('bash')}\n{ask}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash"], input=code, text=True, capture_output=True, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == completed
