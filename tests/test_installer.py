"""install_windows.bat: what can be read from it, and what it does under wine's cmd, with stand-ins for programs."""

import io
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import distlib
import pytest

INSTALLER = Path(__file__).parents[1] / "install_windows.bat"
BYTES = INSTALLER.read_bytes()
LINES = BYTES.decode("ascii").split("\r\n")
CODE = [line.strip() for line in LINES if line.strip() and not line.strip().startswith("rem ")]


def test_lines_end_as_cmd_needs_them():
    assert BYTES.count(b"\n") == BYTES.count(b"\r\n")


def test_it_is_readable():
    assert max(map(len, LINES)) < 250
    assert sum(line.startswith("rem ") for line in LINES) >= 8


def test_every_jump_has_its_label_and_every_block_ends():
    jumps, labels = set(re.findall(r"goto (\w+)", "\n".join(CODE))), {line[1:] for line in CODE if line.startswith(":")}
    assert jumps <= labels
    depth = 0
    for line in CODE:
        depth -= line.startswith(")")
        depth += line.endswith("(")
        assert depth >= 0
    assert depth == 0


def test_words_in_a_block_hold_no_bare_parenthesis_that_would_end_it():
    depth = 0
    for line in CODE:
        depth -= line.startswith(")")
        if depth and line.startswith("echo "):
            assert not re.search(r"(?<!\^)[()]", re.sub(r'"[^"]*"', "", line)), line
        depth += line.endswith("(")


@pytest.mark.parametrize("missed", ["errorlevel 1", "&&", "||"])
def test_no_status_is_asked_for_in_a_way_that_some_shell_gets_wrong(missed):
    """`if errorlevel 1` misses negative ones, as of a crash; wine's cmd takes && and || for a plain &."""
    assert not [line for line in CODE if missed in line]


@pytest.mark.parametrize(
    "words",
    [
        "where uv",
        "uv sync --inexact",
        'uv --no-config pip install "torch>=2.11,<2.15" --torch-backend=auto',
        "LongPathsEnabled",
        "nvidia-smi",
        "train.py --plain doctor",
        "CreateShortcut",
        "uv run --no-sync train.py %%*",
        "%~dp0",
    ],
)
def test_it_does_each_of_its_steps(words):
    assert any(words in line for line in CODE)


def test_a_second_run_destroys_nothing():
    assert not [line for line in CODE if re.match(r"(del|erase|rmdir|rd|move|format|git)\b", line, re.IGNORECASE)]


def test_the_window_stays_open_whatever_came_of_it():
    assert CODE[-2:] == ["pause", "exit /b 1"]
    assert CODE[CODE.index("exit /b 0") - 1] == "pause"


def test_the_versions_of_torch_are_those_of_the_project():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'"torch([^";]+)"', project)[1] in "\n".join(CODE)


# Under wine. Each stand-in is distlib's launcher, which ends with the status of the batch file that it starts.
STAND_INS = ("uv", "where", "winget", "powershell", "nvidia-smi", "reg")
STAND_IN = r"""@echo off
>>calls.txt echo %~n1 %2 %3 %4 %5
if "%~n1"=="where" goto where
if "%~n1"=="nvidia-smi" exit %NVIDIA%
if "%~n1"=="reg" goto reg
if "%~n1"=="winget" goto winget
if "%~n1"=="powershell" goto powershell
if "%2"=="sync" exit %SYNC%
if "%2"=="--no-config" exit %PIP%
exit %RUN%
:where
if exist "T:\%2.exe" exit 0
exit 1
:reg
if "%LONG_PATHS_ENABLED%"=="" exit 1
echo.
echo HKEY_LOCAL_MACHINE\SYSTEM\CurrentControlSet\Control\FileSystem
echo     LongPathsEnabled    REG_DWORD    %LONG_PATHS_ENABLED%
echo.
exit 0
:winget
copy T:\uv.saved T:\uv.exe >nul
exit -1978335189
:powershell
if "%2 %3"=="-NoProfile -Command" exit %SHORTCUT%
if "%POWERSHELL%"=="0" copy T:\uv.saved T:\uv.exe >nul
exit %POWERSHELL%
"""
GOOD = {"NVIDIA": 0, "SYNC": 0, "PIP": 0, "RUN": 0, "SHORTCUT": 0, "POWERSHELL": 1}
START = ["nvidia-smi", "where uv"]
CALLS = ["uv sync --inexact", 'uv --no-config pip install "torch>=2.11,<2.15"', "uv run --no-sync train.py --plain"]
CRASH = -1073741819  # 0xC0000005: torch met a DLL that is not there


class Wine:
    """A Windows of its own: drive S: holds the folders of a test, T: the stand-ins."""

    def __init__(self, home: Path):
        self.stand_ins, self.home = home / "stand-ins", home
        self.stand_ins.mkdir()
        inside = io.BytesIO()
        with zipfile.ZipFile(inside, "w") as archive:
            archive.writestr("__main__.py", "")
        launcher = (Path(distlib.__file__).parent / "t64.exe").read_bytes()
        start = b"#!C:\\windows\\system32\\cmd.exe /d /c T:\\stand-in.bat\r\n"
        for name in STAND_INS:
            (self.stand_ins / f"{name}.exe").write_bytes(launcher + start + inside.getvalue())
        (self.stand_ins / "stand-in.bat").write_bytes(STAND_IN.replace("\n", "\r\n").encode())
        shutil.copyfile(self.stand_ins / "uv.exe", self.stand_ins / "uv.saved")
        self.environment = os.environ | {
            "WINEPREFIX": str(home / "prefix"),
            "WINEDEBUG": "-all",
            "WINEPATH": "T:\\",
            "LC_ALL": "C.UTF-8",
            "DISPLAY": "",
        }

    def cmd(self, *words: str, cwd: Path, **variables: object) -> tuple[int, str]:
        """(status, output) of a line for cmd."""
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        done = subprocess.run(
            ["wine", "cmd", "/d", "/c", *words],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=600,
        )
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def end(self) -> None:
        subprocess.run(["wineserver", "--kill"], env=self.environment, check=False)


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> Iterator[Wine]:
    """One for all tests. They are skipped where wine is not installed or does not start."""
    if not shutil.which("wine"):
        pytest.skip("wine is not installed: apt-get install wine wine64")
    wine = Wine(tmp_path_factory.mktemp("wine"))
    if wine.cmd("exit", "7", cwd=wine.home)[0] != 7:
        pytest.skip("wine does not start here")
    (wine.home / "prefix" / "dosdevices" / "t:").symlink_to(wine.stand_ins)
    yield wine
    wine.end()


@pytest.fixture
def install(windows, tmp_path):
    """install(folder's name, programs that are missing, status by step) → (status, output, calls, folder)."""

    def run(name: str = "Side-Step", missing: tuple[str, ...] = (), **statuses: int):
        drive = windows.home / "prefix" / "dosdevices" / "s:"
        drive.unlink(missing_ok=True)
        drive.symlink_to(tmp_path)
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(INSTALLER, folder / INSTALLER.name)
        (folder / "train.py").touch()
        for program in missing:
            (windows.stand_ins / f"{program}.exe").rename(windows.stand_ins / f"{program}.away")
        try:
            status, output = windows.cmd(INSTALLER.name, cwd=folder, **GOOD | statuses)
        finally:
            for program in missing:
                (windows.stand_ins / f"{program}.away").replace(windows.stand_ins / f"{program}.exe")
        return status, output, calls(folder), folder

    return run


def calls(folder: Path) -> list[str]:
    """What the stand-ins were asked for in a folder, which must have been the working folder."""
    path = folder / "calls.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    lines = [line for line in lines if not line.startswith("reg ")]
    return [re.sub(r'( -Command)? "[^t].*', r"\1", " ".join(line.split())) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two words [x] (y) 'n' #", "this & that 100% ^up; a=b!", "OneDrive - Größe 日本"])
def test_it_installs_in_any_folder_and_what_it_leaves_starts_the_wizard(install, windows, name):
    status, output, called, folder = install(name)
    assert (status, "Done." in output, "ERROR" in output) == (0, True, False), output
    assert called == [*START, *CALLS, "powershell -NoProfile -Command"]
    assert ("inside OneDrive" in output) == ("OneDrive" in name)
    assert (folder / "Side-Step.bat").read_bytes().decode("ascii").split("\r\n") == [
        "@echo off",
        "title Side-Step",
        'cd /d "%~dp0"',
        r'set "PATH=%USERPROFILE%\.local\bin;%LOCALAPPDATA%\Microsoft\WinGet\Links;%PATH%"',
        "uv run --no-sync train.py %*",
        'set "STATUS=%ERRORLEVEL%"',
        'if not "%STATUS%"=="0" pause',
        "exit /b %STATUS%",
        "",
    ]
    status, output = windows.cmd("Side-Step.bat", "fixed", "--rank", cwd=folder, **GOOD | {"RUN": CRASH})
    assert (status, "Press any key" in output) == (CRASH % 256, True)
    assert calls(folder) == ["uv run --no-sync train.py fixed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "statuses", "status", "asked"),
    [
        (("uv",), {}, 0, ["where winget", "winget install --id astral-sh.uv --exact", "where uv"]),
        (
            ("uv", "winget"),
            {"POWERSHELL": 0},
            0,
            ["where winget", "where uv", "powershell -NoProfile -ExecutionPolicy Bypass -Command"],
        ),
        (
            ("uv", "winget"),
            {"POWERSHELL": CRASH},
            1,
            ["where winget", "where uv", "powershell -NoProfile -ExecutionPolicy Bypass -Command"],
        ),
    ],
)
def test_uv_is_installed_by_what_there_is(install, missing, statuses, status, asked):
    ended, output, called, _ = install(missing=missing, **statuses)
    assert ended == status, output
    assert called[: 2 + len(asked)] == [*START, *asked]
    assert (CALLS[0] in called) == (status == 0)
    assert ("uv could not be installed" in output) == (status != 0)


@pytest.mark.slow
def test_what_only_makes_things_worse_is_a_note_and_both_files_start_from_any_folder(install, windows):
    status, output, _, folder = install(NVIDIA=CRASH, SHORTCUT=CRASH)
    assert status == 0
    assert "no working NVIDIA driver" in output
    assert "no shortcut could be put" in output
    assert "Done." in output
    for file, called in (("Side-Step.bat", "uv run --no-sync train.py"), (INSTALLER.name, "uv sync --inexact")):
        assert windows.cmd(f"S:\\Side-Step\\{file}", cwd=windows.home, **GOOD)[0] == 0
        assert called in calls(folder)


@dataclass(frozen=True)
class Case:
    """An installation in a folder of a plain name; `statuses` by step."""

    folder: str
    files: bool = True
    statuses: Mapping[str, int | str] = field(default_factory=dict)


FAILS = {  # (step, its status) → the words
    ("SYNC", 1): "packages could not",
    ("SYNC", CRASH): "packages could not",
    ("PIP", CRASH): "PyTorch could not",
    ("RUN", CRASH): "the check failed",
    ("RUN", 3): "the check failed",
}
LONG = {"": 1, "0x0": 1, "0x1": 0}  # what the registry says of long paths → status
CASES = {
    **{case: Case("-".join(map(str, case)), statuses=dict([case])) for case in FAILS},
    **{  # behind S:\\, the limit is 80
        ("long", said): Case(f"{number}{'x' * 77}", statuses={"LONG_PATHS_ENABLED": said})
        for number, said in enumerate(LONG)
    },
    "no files": Case("empty", files=False),
}


@pytest.fixture(scope="module")
def installed(windows, tmp_path_factory) -> dict[object, tuple[int, str, list[str], Path]]:
    """(status, output, calls, folder) of every case, one after the other: starting wine takes longer than most."""
    root = tmp_path_factory.mktemp("cases")
    drive = windows.home / "prefix" / "dosdevices" / "s:"
    drive.unlink(missing_ok=True)
    drive.symlink_to(root)
    lines = ["@echo off"]
    for case in CASES.values():
        folder = root / case.folder
        folder.mkdir()
        shutil.copyfile(INSTALLER, folder / INSTALLER.name)
        if case.files:
            (folder / "train.py").touch()
        variables = {**GOOD, "LONG_PATHS_ENABLED": "", **case.statuses}
        lines += [f'set "{name}={value}"' for name, value in variables.items()]
        lines += [f'cd /d "S:\\{case.folder}"', f"cmd /d /c {INSTALLER.name} >output.txt 2>&1 <nul"]
        lines.append(">status.txt echo %ERRORLEVEL%")
    (root / "all.bat").write_bytes("\r\n".join([*lines, "exit /b 0", ""]).encode("ascii"))
    assert windows.cmd("all.bat", cwd=root)[0] == 0
    found = {}
    for name, case in CASES.items():
        folder = root / case.folder
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        found[name] = int((folder / "status.txt").read_text(encoding="ascii")), output, calls(folder), folder
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILS, ids=str)
def test_a_step_that_fails_ends_it_with_its_words_whatever_the_status(installed, case):
    ended, output, called, folder = installed[case]
    assert ended == 1
    assert FAILS[case] in output
    assert "Press any key" in output
    assert "Done" not in output
    assert called == [*START, *CALLS[: ["SYNC", "PIP", "RUN"].index(case[0]) + 1]]
    assert not (folder / "Side-Step.bat").exists()


@pytest.mark.slow
def test_without_the_files_it_says_so_and_calls_nothing(installed):
    status, output, called, _ = installed["no files"]
    assert (status, called) == (1, [])
    assert "train.py is not in this folder" in output


@pytest.mark.slow
@pytest.mark.parametrize("long_paths", LONG)
def test_a_path_that_is_too_long_is_refused_unless_windows_takes_long_ones(installed, long_paths):
    ended, output, called, _ = installed["long", long_paths]
    assert ended == LONG[long_paths], output
    assert ("too long for Windows" in output) == bool(ended)
    assert bool(called) == (not ended)
