"""The real `main`, from argv to exit status."""

import errno
import importlib.metadata
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from sidestep.acestep.device import GpuMemory
from sidestep.cli import commands, outside
from sidestep.cli import main as cli_main
from sidestep.cli.main import main, output_folder
from sidestep.cli.parser import configs_of, parse
from sidestep.cli.start import version
from sidestep.errors import ExitStatus, Interrupted, JobError, UserError
from sidestep.events import EventLog, Notice, Saved
from sidestep.settings import presets
from sidestep.settings.config import (
    COMMANDS,
    BuildDatasetConfig,
    DemoConfig,
    PlanConfig,
    PreprocessConfig,
    TrainConfig,
    command_of,
    memory_levers,
)
from sidestep.settings.option import as_json_values, options_of

ROOT = Path(__file__).parents[2]
BUILD = ["build-dataset", "--input", "songs"]
TRAIN = ["fixed", "--checkpoint-dir", "c", "--dataset-dir", "d", "--output-dir", "out"]
BOTH = [
    "fixed",
    "--preprocess",
    "--audio-dir",
    "a",
    "--tensor-output",
    "t",
    "--checkpoint-dir",
    "c",
    "--output-dir",
    "o",
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def _no_folders_needed(monkeypatch):
    """Commands here name folders that are not there; tests/test_imports.py has those that look for them."""
    monkeypatch.setattr(cli_main, "check_folders", lambda config: None)


@pytest.fixture
def task(monkeypatch):
    """Puts a function in the place of a command's task."""

    def put(job, config_class=BuildDatasetConfig):
        name = command_of(config_class)
        monkeypatch.setattr(commands, f"test_{config_class.__name__}", job, raising=False)
        monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(run=f"cli.commands:test_{config_class.__name__}"))

    return put


def raising(error):
    def job(config, report):
        raise error

    return job


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_function_that_runs_it(command):
    module, function = COMMANDS[command].run.split(":")
    assert list(inspect.signature(getattr(import_module(f"sidestep.{module}"), function)).parameters) == [
        "config",
        "report",
    ]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (
            UserError("--input songs: no such folder.", "Make it first."),
            2,
            ["error: --input songs: no such folder.", "Make it first."],
        ),
        (JobError("Zero songs were preprocessed."), 1, ["Zero songs"]),
        (JobError("Two of nine failed.", status=ExitStatus.SOME_FAILED), 3, ["Two of nine"]),
        (
            Interrupted("train.py fixed --resume-from latest"),
            130,
            ["Stopped; saved. Go on with", "train.py fixed --resume-from latest"],
        ),
        (KeyboardInterrupt(), 130, ["Stopped."]),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            ["uv --no-config pip install torch --torch-backend=auto"],
        ),
        (OSError(28, "No space left on device", "x.pt"), 1, ["No space left on device: x.pt", "Free some space"]),
        (ZeroDivisionError("division by zero"), 1, ["did not expect", "ZeroDivisionError", "sidestep.log"]),
    ],
)
def test_what_a_job_raises_becomes_words_and_a_status(task, capsys, error, status, words):
    task(raising(error))
    assert main(BUILD) == status
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert "Traceback" not in err


def test_the_traceback_of_the_unexpected_is_only_in_the_log(task, home, capsys):
    task(raising(ZeroDivisionError("oops")))
    main(BUILD)
    assert "ZeroDivisionError: oops" in (home / "sidestep.log").read_text(encoding="utf-8")


def test_the_log_of_a_run_stands_in_its_output_folder(task, tmp_path):
    task(raising(ZeroDivisionError("oops")), TrainConfig)
    main(TRAIN)
    assert "Traceback" in (tmp_path / "out" / "sidestep.log").read_text(encoding="utf-8")


def test_a_wrong_call_leaves_nothing_behind(tmp_path):
    assert main(["fixed", "--rank", "8"]) == 2
    assert main(["presets", "show", "nope"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_events_are_shown_and_kept_beside_the_run(task, tmp_path, capsys):
    def job(config, report):
        report(Notice(message="hello"))
        report(Saved(what="final", path="out/final"))
        return ExitStatus.OK

    task(job, TrainConfig)
    assert main(TRAIN) == 0
    assert capsys.readouterr().out == "hello\nsaved final: out/final\n"
    lines = (tmp_path / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["Notice", "Saved"]


def test_lines_that_find_no_room_wait_and_are_told_once(tmp_path):
    told, room = [], [30]

    class Disk(io.RawIOBase):
        written = b""

        def write(self, data) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = bytes(data[: room[0]])
            room[0] -= len(part)
            self.written += part
            return len(part)

    log = EventLog(tmp_path / "events.jsonl", told.append)
    log._file = disk = Disk()
    for number in range(3):
        log(Notice(message=f"{number} \udcff"))
    assert [event.message.split(":")[-1] for event in told] == [
        " cannot be written now (No space left on device); its lines wait in memory."
    ]
    room[0] = 10_000
    log(Notice(message="3"))
    log(Notice(message="4"))
    lines = disk.written.decode().splitlines()
    assert [json.loads(line)["message"][0] for line in lines] == list("01234")


def test_a_log_of_events_without_events_makes_no_folder(tmp_path):
    EventLog(tmp_path / "new" / "events.jsonl").close()
    assert not (tmp_path / "new").exists()


def test_preprocess_then_train_runs_both_and_says_so(task, capsys):
    ran = []
    for config_class in (PreprocessConfig, TrainConfig):
        task(lambda config, report: ran.append(type(config)) or ExitStatus.OK, config_class)
    assert main(BOTH) == 0
    assert ran == [PreprocessConfig, TrainConfig]
    assert "Preprocessing first, then training." in capsys.readouterr().out


def test_training_does_not_start_when_nothing_was_preprocessed(task):
    ran = []
    task(lambda config, report: ExitStatus.FAILED, PreprocessConfig)
    task(lambda config, report: ran.append(1) or ExitStatus.OK, TrainConfig)
    assert main(BOTH) == 1
    assert ran == []


def test_songs_that_failed_are_in_the_status_of_the_training_that_followed(task):
    task(lambda config, report: ExitStatus.SOME_FAILED, PreprocessConfig)
    task(lambda config, report: ExitStatus.OK, TrainConfig)
    assert main(BOTH) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("train.py preprocess …")])
@pytest.mark.parametrize(
    "more", [[], ["--rank", "8", "--normalize", "peak"], ["--dataset-dir", "other", "--epochs", "3"]]
)
def test_ctrl_c_while_preprocessing_prints_a_command_that_trains_afterwards(task, capsys, error, more):
    task(raising(error), PreprocessConfig)
    assert main([*BOTH, *more]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    words = shlex.split(line)[3:]
    assert words[:2] == ["fixed", "--preprocess"]
    assert configs_of(parse(words), {}) == configs_of(parse([*BOTH, *more]), {})


def test_ctrl_c_while_training_afterwards_prints_the_command_of_the_training(task, capsys):
    task(lambda config, report: ExitStatus.OK, PreprocessConfig)
    task(raising(Interrupted("train.py fixed --resume-from latest")), TrainConfig)
    assert main(BOTH) == 130
    assert capsys.readouterr().err.endswith("  train.py fixed --resume-from latest\n")


def test_flags_of_both_without_a_folder_for_tensors_are_a_wrong_call(capsys):
    assert main([word for word in BOTH if word not in ("--tensor-output", "t")]) == 2
    assert "Missing: --tensor-output." in capsys.readouterr().err


@pytest.mark.parametrize(("vram", "profile"), [("8", "minimal"), ("24", "comfortable"), ("16.5", "standard")])
def test_a_profile_is_chosen_for_the_memory_that_was_typed(task, vram, profile):
    seen = []
    task(lambda config, report: seen.append(config) or ExitStatus.OK, PlanConfig)
    assert main(["plan", "--vram", vram, "--vram-profile", "auto"]) == 0
    assert seen[0].rank == presets.find(profile).values["rank"]
    assert seen[0].chunk_duration == presets.find(profile).values.get("chunk_duration", 0.0)


@pytest.mark.parametrize("vram", ["nan", "abc", "-3", "inf"])
def test_memory_that_is_no_number_is_refused_also_beside_a_profile(capsys, vram):
    assert main(["plan", f"--vram={vram}", "--vram-profile", "auto"]) == 2
    assert f"--vram {vram.replace('-3', '-3.0')}: must be" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [TRAIN, ["estimate", "--checkpoint-dir", "c", "--dataset-dir", "d"]])
def test_fp16_on_a_cpu_is_refused_before_anything_is_loaded(capsys, argv):
    assert main([*argv, "--device", "cpu", "--precision", "fp16"]) == 2
    assert "--precision fp16: not on a CPU." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["fxied"], "fixed"),
        (["preproces"], "preprocess"),
        (["presets", "shwo", "x"], "show"),
        (["presets", "Exprot", "x"], "export"),
        (["presets", "show", "recomended"], "recommended"),
        ([*TRAIN, "--preset", "hihg_quality"], "high_quality"),
        ([*TRAIN, "--vram-profile", "tihgt"], "tight"),
        ([*TRAIN, "--optimizer-type", "adamw8"], "adamw8bit"),
        ([*TRAIN, "--adapter-type", "LORA"], "lora"),
        ([*TRAIN, "--traget-mlp"], "--target-mlp"),
        (["plan", "--model-variant", "xl-trubo"], "xl-turbo"),
        (["completion", "bsh"], "bash"),
    ],
    ids=str,
)
def test_the_nearest_word_that_there_is_is_offered(capsys, argv, nearest):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Did you mean " in error
    assert nearest in error.partition("Did you mean ")[2]


@pytest.mark.parametrize(
    ("variant", "nearest"), [("trubo", "turbo"), ("acestep-v15-turb", "acestep-v15-turbo"), ("xl_turbo", "xl-turbo")]
)
def test_the_nearest_model_that_is_in_the_folder_is_offered(checkpoints, variant, nearest, capsys):
    argv = ["sample", "--checkpoint-dir", str(checkpoints), "--model-variant", variant, "--prompt", "p"]
    assert main(argv) == 2
    assert nearest in capsys.readouterr().err.partition("Did you mean ")[2]


@pytest.mark.parametrize("config_class", [DemoConfig, TrainConfig, PreprocessConfig])
def test_that_torch_is_loaded_is_said_and_leaves_nothing_in_the_folder_of_results(
    task, tmp_path, capsys, monkeypatch, config_class
):
    found = []

    def job(config, report):
        found.extend(path.name for path in output_folder(config).glob("*") if not path.name.startswith(".lock"))
        raise UserError("Not now.")

    task(job, config_class)
    monkeypatch.delitem(sys.modules, "torch")  # as in a process that has just begun
    monkeypatch.setattr(commands, "load_libraries", lambda _: None)  # it takes no second torch in one process
    argv = {DemoConfig: ["demo", "--output-dir", "out"], TrainConfig: TRAIN, PreprocessConfig: BOTH[:8]}
    assert main(argv[config_class]) == 2
    assert "Loading PyTorch." in capsys.readouterr().out
    assert found == []
    assert not list(tmp_path.rglob("events.jsonl"))


NUMBERS = [
    (command, o)
    for command, c in COMMANDS.items()
    for o in options_of(c.config).values()
    if o.type in (int, float) and o.flag.startswith("-")
]


@pytest.mark.parametrize(("command", "o"), NUMBERS, ids=lambda x: getattr(x, "flag", x))
def test_every_number_flag_refuses_the_absurd_by_its_name_and_starts_nothing(task, command, o, capsys):
    config_class = COMMANDS[command].config
    task(raising(AssertionError("started")), config_class)
    needed = [x for x in options_of(config_class).values() if x.required]
    argv = [command, *(word for x in needed for word in ((x.flag, "x") if x.flag.startswith("-") else ("x",)))]
    argv += ["--audio-dir", "x"] * (command == "preprocess")
    for value in ("nan", "inf", "-inf", "1e23", "-1e23", "9" * 30, "9" * 5000):
        assert main([*argv, f"{o.flag}={value}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {o.flag} ")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--rank", "3000"], "--rank 3000: more than the model's width of"),
        (["--rank", "3000", "--adapter-type", "dora"], "--rank 3000: more than the model's width of"),
        (["--recompute-layers", "1000"], "--recompute-layers 1000: the model has"),
        (["--swap-blocks", "1000"], "--swap-blocks 1000: the model has"),
    ],
)
def test_what_is_beyond_the_model_is_refused_before_its_weights_are_read(checkpoints, capsys, flags, problem, tmp_path):
    argv = ["fixed", "--checkpoint-dir", str(checkpoints), "--dataset-dir", str(tmp_path), "--output-dir", "o"]
    assert main([*argv, "--device", "cpu", *flags]) == 2
    assert problem in capsys.readouterr().err
    assert main(["plan", *flags]) == 2
    assert problem in capsys.readouterr().err


def test_one_process_of_a_group_speaks_for_all(task, capsys, monkeypatch, tmp_path):
    def job(config, report):
        report(Notice(message="hello"))
        return ExitStatus.OK

    task(job, TrainConfig)
    monkeypatch.setenv("RANK", "1")
    assert main(TRAIN) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_with_json_nothing_else_is_on_the_output(task, capsys):
    from sidestep.settings.config import DoctorConfig

    def job(config, report):
        report(Notice(message="noise"))
        return []

    task(job, DoctorConfig)
    assert main(["doctor", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_without_arguments_and_without_a_terminal_the_help_is_printed_with_status_2(capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "commands:" in shown.out
    assert "no terminal to ask in" in shown.err


@pytest.mark.parametrize("argv", [["--help"], ["fixed", "--help"], ["--version"]])
def test_help_and_version_are_a_success(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out


def test_the_version_names_commit_and_torch_and_loads_neither(capsys):
    code = "import sys; from sidestep.cli.main import main; main(['--version']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    torch = importlib.metadata.version("torch")
    in_git = r" \(commit [0-9a-f]{7,}\)" if (ROOT / ".git").exists() else ""
    assert re.fullmatch(rf"Side-Step [\d.]+{in_git}, PyTorch {re.escape(torch)}, Python [\d.]+\n", done.stdout)


def test_the_settings_of_a_run_are_taken_but_for_its_folder_and_what_is_typed_wins(task, capsys, tmp_path):
    seen = []
    task(lambda config, report: seen.append(config) or ExitStatus.OK, TrainConfig)
    run = tmp_path / "first"
    run.mkdir()
    first = TrainConfig(checkpoint_dir=tmp_path, dataset_dir=tmp_path, output_dir=run, rank=8, epochs=7, run_name="a")
    (run / "config.json").write_text(json.dumps(as_json_values(first)), encoding="utf-8")
    new = ["--output-dir", str(tmp_path / "new"), "--epochs", "9"]
    assert main(["fixed", "--config", str(run / "config.json"), *new]) == 0
    assert seen == [replace(first, output_dir=tmp_path / "new", epochs=9, run_name="")]
    assert "ignored" not in "".join(capsys.readouterr())
    (tmp_path / "p.json").write_text('{"rank": 4}', encoding="utf-8")
    assert main(["fixed", "--config", str(run / "config.json"), *new, "--preset", str(tmp_path / "p.json")]) == 0
    assert (seen.pop().rank, seen[0].lr) == (4, first.lr)
    (run / "config.json").write_text(json.dumps(as_json_values(first) | {"lrr": 1}), encoding="utf-8")
    assert main(["fixed", "--config", str(run / "config.json"), *new]) == 0
    assert "config.json: ignored, because no command has such a setting: lrr." in "".join(capsys.readouterr())
    (run / "config.json").write_text(json.dumps(as_json_values(first) | {"rank": "many"}), encoding="utf-8")
    assert main(["fixed", "--config", str(run / "config.json"), *new]) == ExitStatus.USAGE
    assert f"--config {run / 'config.json'}: --rank many" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps(as_json_values(first)), encoding="utf-8")
    assert main(["fixed", "--config", str(tmp_path / "none.json"), *new]) == ExitStatus.USAGE
    assert "not the config.json of a run" in capsys.readouterr().err
    assert main(["fixed", "--config", str(run / "config.json")]) == ExitStatus.USAGE  # it needs a folder of its own


def test_the_preset_of_a_call_fills_in_and_its_unknown_keys_are_named(task, capsys, tmp_path):
    seen = []
    task(lambda config, report: seen.append(config) or ExitStatus.OK, TrainConfig)
    (tmp_path / "p.json").write_text('{"rank": 8, "colour": "red"}', encoding="utf-8")
    assert (
        main(
            [
                "fixed",
                "--checkpoint-dir",
                "c",
                "--dataset-dir",
                "d",
                "--output-dir",
                "o",
                "--preset",
                "p.json",
                "--alpha",
                "3",
            ]
        )
        == 0
    )
    assert (seen[0].rank, seen[0].alpha) == (8, 3.0)
    assert "colour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "gib", "profile"),
    [
        ("--vram-profile minimal", None, "minimal"),
        ("--vram-profile minimal --model-variant xl-base", None, "minimal_xl"),
        ("--vram-profile auto", 23.6, "comfortable"),
        ("--vram-profile auto", 15.7, "standard"),
        ("--vram-profile auto", 11.9, "tight"),
        ("--vram-profile auto --model-variant xl-turbo", 7.8, "minimal_xl"),
    ],
)
def test_a_profile_is_the_preset_for_the_card(task, capsys, monkeypatch, typed, gib, profile):
    seen = []
    task(
        lambda config, report: seen.append(config) or report(Notice(message="ran")) or ExitStatus.OK,
        TrainConfig,
    )
    monkeypatch.setattr(
        "sidestep.acestep.device.gpu_memory", lambda device: gib and GpuMemory(round(gib * 2**30), "a card")
    )
    assert main(f"--plain fixed --checkpoint-dir c --dataset-dir d --output-dir o --seed 7 {typed}".split()) == 0
    values = presets.find(profile).values
    assert {name: getattr(seen[0], name) for name in values} == values
    assert seen[0].seed == 7
    assert f"profile: {profile}" in capsys.readouterr().out


def test_a_profile_cannot_be_chosen_without_a_gpu_or_beside_a_preset(monkeypatch, capsys):
    monkeypatch.setattr("sidestep.acestep.device.gpu_memory", lambda device: None)
    required = ["fixed", "--checkpoint-dir", "c", "--dataset-dir", "d", "--output-dir", "o"]
    assert main([*required, "--vram-profile", "auto"]) == ExitStatus.USAGE
    assert "no GPU was found here" in capsys.readouterr().err
    assert main([*required, "--vram-profile", "tight", "--preset", "tight"]) == ExitStatus.USAGE


def test_only_runs_have_a_folder_for_events():
    assert output_folder(BuildDatasetConfig(input=Path("x"))) is None
    assert output_folder(
        PreprocessConfig(checkpoint_dir=Path("c"), tensor_output=Path("t"), audio_dir=Path("a"))
    ) == Path("t")


def test_presets_are_listed_shown_imported_and_exported(capsys, tmp_path):
    assert main(["presets", "list"]) == 0
    shown = "".join(capsys.readouterr())
    assert "recommended" in shown
    assert "Not in the list" not in shown
    presets.user_folder().mkdir(parents=True)
    (presets.user_folder() / "mine too.json").write_text('{"rank": "many"}', encoding="utf-8")
    assert main(["presets", "list"]) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert f"Not in the list: Preset {presets.user_folder() / 'mine too.json'}: --rank many" in shown
    (presets.user_folder() / "mine too.json").unlink()
    assert main(["presets", "export", "minimal", "mine.json"]) == 0
    assert main(["presets", "import", "mine.json"]) == 0
    assert main(["presets", "show", "mine"]) == 0
    assert "adamw8bit" in capsys.readouterr().out
    assert main(["presets", "import", "mine.json"]) == 2
    assert main(["presets", "import", "mine.json", "--overwrite"]) == 0


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def loaded_of(*modules: str) -> str:
    """Code that prints which of these modules were imported."""
    return f"print([m for m in {modules} if m in sys.modules])"


@pytest.mark.parametrize(
    "argv", [["--help"], ["build-dataset", "--help"], ["fixed", "--help"], ["--version"], ["presets", "list"], []]
)
def test_what_needs_no_torch_imports_none(argv):
    run = f"import sys; from sidestep.cli.main import main; main({argv!r})"
    code = f"{run}; {loaded_of('torch', 'numpy', 'rich', 'questionary')}"
    assert python(code).stdout.splitlines()[-1] == "[]"


def test_the_wizard_with_its_prompts_imports_no_torch():
    imports = "import sys, sidestep.cli.main, sidestep.wizard.prompts, sidestep.terminal.rich_terminal"
    code = f"{imports}; {loaded_of('torch', 'numpy', 'av')}"
    assert python(code).stdout.strip() == "[]"


def test_the_wizard_asks_this_program_for_what_needs_torch_from_any_folder(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the user')", encoding="utf-8")
    assert outside.json_of("history", str(tmp_path), "--json") == {"runs": []}
    assert outside.json_of("history", str(tmp_path / "none"), "--json") is None


def test_the_wizard_waits_for_a_machine_that_is_a_thousand_times_slower(monkeypatch, tmp_path):
    real = subprocess.run

    def slower(*words, timeout=None, **more):
        return real(*words, timeout=timeout and timeout / 1000, **more)

    monkeypatch.setattr(subprocess, "run", slower)
    assert outside.json_of("history", str(tmp_path), "--json") == {"runs": []}


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="xdg-open is Linux' own")
def test_a_result_is_opened_with_the_systems_program_for_it_and_without_a_screen_named(tmp_path, monkeypatch):
    opened, writing = tmp_path / "opened", tmp_path / "writing"
    script = f'#!/bin/sh\nprintf %s "$1" > "{writing}"\nmv "{writing}" "{opened}"\n'
    (tmp_path / "xdg-open").write_text(script, encoding="utf-8")
    (tmp_path / "xdg-open").chmod(0o755)
    music = tmp_path / "my song.flac"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("DISPLAY", ":0")
    assert outside.open_file(music) == f"Opened {music}."
    deadline = time.monotonic() + 60
    while not opened.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert opened.read_text(encoding="utf-8") == str(music)
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert outside.open_file(music) == f"No screen to show it on; it is here: {music}"


def test_a_missing_torch_prints_the_command_that_installs_it():
    code = "import sys; sys.modules['torch'] = None; from sidestep.cli.main import main; sys.exit(main(['doctor']))"
    done = python(code)
    assert done.returncode == 1
    assert "uv --no-config pip install torch --torch-backend=auto" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_stops_like_ctrl_c(task):
    import signal

    def job(config, report):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    task(job)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(BUILD) == 130
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("program", [["train.py"], ["-m", "sidestep.cli"]])
def test_the_version_waits_for_nothing_else_and_every_other_call_reaches_the_command_line(program):
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", *program, "--version"], capture_output=True, text=True, cwd=ROOT
    )
    loaded = set(re.findall(r"\b(sidestep[\w.]*)$", asked.stderr, re.MULTILINE))
    own = {"sidestep.cli.start", "sidestep.cli", "sidestep"}
    assert (asked.returncode, asked.stdout, loaded) == (0, version() + "\n", own)
    for arguments, says in ((["--plain", "--version"], "Side-Step 0"), (["presets", "list"], "minimal_xl")):
        done = subprocess.run([sys.executable, *program, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        assert says in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that takes nothing is Linux' own")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_what_cannot_be_said_is_an_error_and_nobody_to_hear_it_is_none(arguments, tmp_path):
    call = [sys.executable, str(ROOT / "train.py"), *arguments]
    own = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, env=own, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "error: No space left on device: no file named.")
    closed = f"exec {shlex.join(call)} >&-"
    assert subprocess.run(["sh", "-c", closed], capture_output=True, text=True, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_no_library_fetches_code_even_where_it_could(tmp_path):
    """A stand-in for the package by which bitsandbytes and transformers fetch kernels: it is never imported."""
    marker = tmp_path / "imported"
    (tmp_path / "kernels.py").write_text(f"open({str(marker)!r}, 'w')\ndef get_kernel(*a, **k): raise ImportError")
    code = "from sidestep.cli.main import main; main(['--version']); import bitsandbytes, peft, transformers, diffusers"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_memory_that_runs_out_anywhere_names_what_is_not_on_yet(monkeypatch, capsys, error, known, tmp_path):
    def fails(config, report):
        raise error

    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    monkeypatch.setattr("sidestep.tasks.sample.sample", fails)
    assert main(["sample", "--prompt", "x", "--checkpoint-dir", ".", "--offload-encoder"]) == ExitStatus.FAILED
    said = " ".join(capsys.readouterr().err.split())
    assert ("Out of memory" in said) == known
    assert ("What helps: --base-precision int8, --swap-blocks 16, --duration 15." in said) == known


def test_only_what_is_not_on_yet_is_offered_against_a_lack_of_memory(tmp_path):
    config = TrainConfig(checkpoint_dir=tmp_path, dataset_dir=tmp_path, output_dir=tmp_path, rank=8)
    frugal = {"optimizer_type": "adamw8bit", "base_precision": "int8", "offload_activations": True}
    assert "--base-precision int8" in memory_levers(config)
    assert memory_levers(replace(config, batch_size=2))[0] == "--batch-size 1 (with more --gradient-accumulation)"
    assert memory_levers(replace(config, **frugal, offload_encoder=True, chunk_duration=60.0)) == []


@pytest.mark.parametrize(
    "line",
    [
        "fixed --dataset-dir . --output-dir out --batch-size 2 --no-gradient-checkpointing",
        "train-lm --dataset-dir . --output-dir out --rank 32",
        "preprocess --audio-dir . --tensor-output out",
        "build-dataset --input . --caption lm",
        "estimate --dataset-dir . --output map.json",
        "sample --prompt x --think --duration 120",
        "score run",
        "compare a b",
        "export final --output out --format merged --base .",
    ],
    ids=lambda line: line.split()[0],
)
def test_each_lever_offered_when_memory_runs_out_is_one_of_the_command_and_is_on_then(
    line, monkeypatch, capsys, tmp_path
):
    """Wherever in the command it ran out: in loading, in a validation, while sampling."""
    configs = []

    def fails(config, report):
        configs.append(config)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command, *words = line.split()
    module, function = COMMANDS[command].run.split(":")
    monkeypatch.setattr(import_module(f"sidestep.{module}"), function, fails)
    if "--base" not in words:
        words += ["--checkpoint-dir", "."]
    assert main([command, *words]) == ExitStatus.FAILED
    (offered,) = re.findall(r"What helps: (.*)\.", " ".join(capsys.readouterr().err.split()))
    levers = memory_levers(configs[0])
    nothing_left = {"export": "to close other programs", "preprocess": "a smaller model variant, or --device cpu"}
    assert offered == (nothing_left.get(command) or ", ".join(levers))
    for lever in levers:
        flags = lever.replace(" (with more --gradient-accumulation)", "").split()
        main([command, *words, *flags])
        assert lever not in memory_levers(configs[-1]), lever
    assert bool(levers) != (command in nothing_left)


def test_a_command_says_at_once_that_its_code_takes_a_while_to_load(monkeypatch, capsys):
    monkeypatch.setattr("sidestep.tasks.sample.sample", lambda config, report: report(Notice(message="Sampled.")))
    monkeypatch.setattr("sidestep.tasks.history.history", lambda config, report: report(Notice(message="Listed.")))
    import_module("sidestep.tasks.plan.plan")  # before torch seems to be away
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(commands, "load_libraries", lambda _: None)
    assert main(["sample", "--prompt", "x", "--checkpoint-dir", "."]) == 0
    assert main(["history"]) == 0
    assert capsys.readouterr().out.split("\n") == ["Loading PyTorch.", "Sampled.", "Listed.", ""]
