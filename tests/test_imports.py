"""The libraries are loaded without what nothing asked for, and what is asked for is there."""

import errno
import gc
import importlib.util
import io
import itertools
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sidestep import events, imports
from sidestep.acestep import layout
from sidestep.acestep.layout import read_ahead
from sidestep.cli import commands
from sidestep.cli import main as cli_main
from sidestep.cli.main import main
from sidestep.errors import UserError
from sidestep.events import null
from sidestep.files import require_writable
from sidestep.late_modules import PartsOf
from sidestep.settings.config import COMMANDS, EstimateConfig, PlanConfig, PreprocessConfig, SampleConfig, ScoreConfig
from tests.conftest import FIXTURES

ROOT = Path(__file__).parent.parent
LIBRARY = """
import gc, importlib.util
seen = {"collecting": gc.isenabled(), "wanted": importlib.util.find_spec("wanted_by_us") is not None}
try:
    import never_wanted
except ImportError:
    seen["absent"] = True
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A library that looks for two packages, which are installed, in the place of the real ones."""
    for name in ("wanted_by_us", "never_wanted"):
        (tmp_path / f"{name}.py").write_text("there = True\n", encoding="utf-8")
    (tmp_path / "a_library.py").write_text(LIBRARY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "LIBRARIES", ("a_library",))
    monkeypatch.setattr(imports, "ABSENT_WHILE_LOADING", ("wanted_by_us",))
    monkeypatch.setattr(imports, "ABSENT", ("never_wanted",))
    frozen = gc.get_freeze_count()
    yield
    if not frozen:
        gc.unfreeze()
    for name in ("a_library", "wanted_by_us", "never_wanted"):
        sys.modules.pop(name, None)


def without_torch(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")


def test_libraries_load_uncollected_and_without_what_nothing_asked_for(packages, monkeypatch):
    without_torch(monkeypatch)
    imports.load_libraries()
    assert sys.modules["a_library"].seen == {"collecting": False, "wanted": False, "absent": True}
    assert gc.isenabled()
    assert gc.get_freeze_count()
    assert importlib.util.find_spec("wanted_by_us")  # ours again
    assert importlib.util.find_spec("never_wanted") is None
    assert imports.asked_for("never_wanted").there
    assert imports.asked_for("wanted_by_us").there


def test_a_library_that_fails_leaves_collection_on_and_packages_where_they_were(packages, monkeypatch):
    without_torch(monkeypatch)
    monkeypatch.setattr(imports, "LIBRARIES", ("no_such_library",))
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        imports.load_libraries()
    assert gc.isenabled()
    assert importlib.util.find_spec("wanted_by_us")


def test_nothing_is_hidden_that_is_loaded_already(packages, monkeypatch):
    without_torch(monkeypatch)
    import never_wanted

    imports.load_libraries()
    assert sys.modules["never_wanted"] is never_wanted


def test_a_process_that_has_torch_is_left_alone(packages):
    frozen = gc.get_freeze_count()
    imports.load_libraries()
    assert "a_library" not in sys.modules
    assert gc.get_freeze_count() <= frozen  # what was frozen before may have gone


@pytest.mark.parametrize(
    ("command", "loaded"),
    [
        (["plan", "--checkpoint-dir", "."], True),
        (["plan", "--checkpoint-dir", ".", "--json"], True),
        (["sample", "--prompt", "x", "--checkpoint-dir", str(FIXTURES / "checkpoints")], True),
        (["presets", "list"], False),
    ],
    ids=["plan", "plan as JSON", "sample", "presets"],
)
def test_commands_on_models_load_them_first(command, loaded, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    order = []
    monkeypatch.setattr(commands, "load_libraries", lambda _: order.append("libraries"))
    for task in ("plan", "sample"):
        monkeypatch.setattr(commands, task, lambda *_: order.append("task"))
    main(command)
    assert order == (["libraries", "task"] if loaded else [])


@pytest.mark.parametrize("command", ["fixed", "estimate", "sample", "score", "plan"])
def test_the_weights_are_read_while_the_libraries_load(command, monkeypatch, checkpoints, tmp_path):
    order = []
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(commands, "load_libraries", lambda _: order.append("libraries"))
    monkeypatch.setattr(layout, "read_ahead", lambda model: order.append(model.folder))
    kind = COMMANDS[command].config
    needed = {f.name: tmp_path for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    config = kind(**needed | {"checkpoint_dir": checkpoints, "model_variant": "turbo"})
    commands.load_what_it_needs(config, null, commands.check_folders(config))
    assert order == [checkpoints / "acestep-v15-turbo", "libraries"][command == "plan" :]


def test_where_the_run_says_which_model_none_is_read_ahead(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(commands, "load_libraries", lambda _: loaded.append("libraries"))
    judging = ScoreConfig(run_folder=tmp_path)
    commands.load_what_it_needs(judging, null, commands.check_folders(judging))
    assert loaded == ["libraries"]


def test_a_slow_machine_tells_how_far_loading_is(monkeypatch):
    told, seconds = [], itertools.count(step=4)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(events.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(imports, "import_module", lambda name: metadata if "metadata" in name else name)
    monkeypatch.setattr(imports, "ABSENT_WHILE_LOADING", ())
    monkeypatch.setattr(imports, "ABSENT", ())
    monkeypatch.setattr(gc, "freeze", lambda: None)
    commands.load_what_it_needs(PlanConfig(), told.append)
    first, *rest = told
    assert first.message == "Loading PyTorch."
    assert [(event.done, event.total) for event in rest] == [(n, 5) for n in range(1, 6)]


class Counting(io.FileIO):
    """A file that notes how many of its bytes were read."""

    bytes_read = 0

    def __init__(self, path, *_, **__):
        super().__init__(path)

    def readinto(self, block):
        count = super().readinto(block)
        Counting.bytes_read += count
        return count


def test_read_ahead_reads_all_of_the_weights_where_there_is_room(checkpoints, monkeypatch):
    size = (checkpoints / "acestep-v15-turbo" / "model.safetensors").stat().st_size
    read = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *how, **more: Counting(path) if more.get("buffering") == 0 else read(path, *how, **more),
    )
    monkeypatch.setattr(Counting, "bytes_read", 0)
    monkeypatch.setattr(layout, "READ_AHEAD_BYTES", 1000)  # in many pieces
    model = layout.find_layout(checkpoints, "turbo")
    read_ahead(model).join()
    assert Counting.bytes_read == size
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size - 2))
    assert read_ahead(model) is None


MODEL = ["--checkpoint-dir", "{models}", "--model-variant", "turbo"]
TRAIN = ["train", "--dataset-dir", ".", "--output-dir", "out", *MODEL]


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["fixed", "--dataset-dir", "none", "--output-dir", "out", *MODEL], "--dataset-dir none: no such folder."),
        (["fixed", "--dataset-dir", ".", "--output-dir", "out", "--checkpoint-dir", "x"], "--checkpoint-dir x: no "),
        (["train-lm", "--dataset-dir", "none", "--output-dir", "out", *MODEL], "--dataset-dir none: no such folder."),
        (["estimate", "--dataset-dir", "none", *MODEL], "--dataset-dir none: no such folder."),
        (["preprocess", "--audio-dir", "none", "--tensor-output", "out", *MODEL], "--audio-dir none: no such folder."),
        (["fixed", "--preprocess", "--audio-dir", "none", "--tensor-output", "out", *MODEL], "--audio-dir none: no "),
        (["preprocess", "--audio-dir", ".", "--tensor-output", "out", *MODEL[:3], "bass"], "--model-variant bass: no "),
        (["sample", "--prompt", "x", "--output", "out", *MODEL[:3], "bass"], "--model-variant bass: no folder bass"),
        (["sample", "--prompt", "x", "--adapter", "none", *MODEL], "--adapter none: no such file or folder."),
        (["sample", "--prompt", "x", "--think", "--lm-adapter", "none", *MODEL], "--lm-adapter none: no such file or "),
        (["export", "none", "--format", "peft", "--output", "out"], "none: no such file or folder."),
        (["preprocess", "--dataset-json", "none", "--tensor-output", "out", *MODEL], "--dataset-json none: no such "),
        (["compare", ".", "none", *MODEL], "none: no such file or folder."),
        ([*TRAIN, "--prior-data", "none"], "--prior-data none: no such folder."),
        ([*TRAIN, "--init-from", "none"], "--init-from none: no such file or folder."),
        (["sample", "--prompt", "x", "--lyrics-file", "none", *MODEL], "--lyrics-file none: no such file or folder."),
        (["score", "none"], "none: no such file or folder."),
        ([*TRAIN, "--preview-prompts", "none"], "--preview-prompts none: no such file or folder."),
        ([*TRAIN, "--preview-adapter", "none"], "--preview-adapter none: no such file or folder."),
        ([*TRAIN, "--resume-from", "none"], "--resume-from none: not a whole checkpoint of this program."),
        ([*TRAIN, "--resume-from", "latest"], "--resume-from latest: no whole checkpoint in out/checkpoints."),
        (["train-lm", *TRAIN[1:], "--resume-from", "latest"], "--resume-from latest: no whole checkpoint in out/"),
    ],
)
def test_a_slip_in_a_folders_name_is_told_at_once_and_leaves_nothing(
    command, what, checkpoints, monkeypatch, tmp_path, capsys
):
    (tmp_path / ".gitignore").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "load_libraries", lambda _: pytest.fail("waited for libraries"))
    assert main([word.format(models=checkpoints) for word in command]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {what}")
    assert (shown.out, [path.name for path in tmp_path.iterdir()]) == ("", [".gitignore"])


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["preprocess", "--audio-dir", ".", "--tensor-output", "file/results", *MODEL], "--tensor-output file/results"),
        (["sample", "--prompt", "x", "--output", "file/results", *MODEL], "--output file/results"),
        (["estimate", "--dataset-dir", ".", "--output", "file/map.json", *MODEL], "--output file"),
        (["export", ".", "--format", "peft", "--output", "file/out"], "--output file"),
        (["compare", "file", ".", "--output", "file/results", *MODEL], "--output file/results"),
        (["fixed", "--dataset-dir", ".", "--output-dir", "file/results", *MODEL], "--output-dir file/results"),
        (["train-lm", "--dataset-dir", ".", "--output-dir", "file/results", *MODEL], "--output-dir file/results"),
        (["demo", "--output-dir", "file/results"], "--output-dir file/results"),
    ],
)
@pytest.mark.parametrize("ahead", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_cannot_be_written_is_told_before_hours_go_into_it(
    command, flag, ahead, checkpoints, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()  # where a folder should be
    monkeypatch.setattr(commands, "load_libraries", lambda _: pytest.fail("waited for libraries"))
    assert main([*(word.format(models=checkpoints) for word in command), *ahead]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {flag}: cannot be written (Not a directory).")
    assert (shown.out, [path.name for path in tmp_path.iterdir()]) == ("", ["file"])


def test_a_rank_map_goes_among_the_tensors_if_nothing_else_is_said(checkpoints, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(commands, "require_writable", lambda *what: asked.append(what))
    shared = {"checkpoint_dir": checkpoints, "model_variant": "turbo", "dataset_dir": tmp_path}
    commands.check_folders(EstimateConfig(**shared))
    commands.check_folders(EstimateConfig(**shared, output=tmp_path / "maps" / "a.json"))
    assert asked == [(tmp_path, "--dataset-dir"), (tmp_path / "maps", "--output")]


def test_a_folder_that_may_not_even_be_looked_into_is_named(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(UserError, match="--output .*results: cannot be written .Permission denied."):
        require_writable(tmp_path / "results", "--output")


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path / "new" / "results", "--output")
    require_writable(tmp_path, "--output")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_missed_that_a_task_does_without(checkpoints, tmp_path):
    songs, out = tmp_path / "songs.json", tmp_path / "out"
    songs.touch()
    listed = PreprocessConfig(checkpoint_dir=checkpoints, model_variant="turbo", dataset_json=songs, tensor_output=out)
    assert commands.check_folders(listed).folder == checkpoints / "acestep-v15-turbo"
    played = SampleConfig(prompt="x", checkpoint_dir=checkpoints, model_variant="gone", preview_variant=("turbo",))
    judged = ScoreConfig(run_folder=tmp_path, checkpoint_dir=checkpoints)
    assert [commands.check_folders(config) for config in (played, judged)] == [None, None]


def test_leaving_looks_for_no_garbage(monkeypatch):
    monkeypatch.setattr(cli_main, "main", lambda: 3)
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    with pytest.raises(SystemExit) as left:
        cli_main.entry()
    assert (left.value.code, frozen) == (3, [True])


@pytest.fixture
def scanner(tmp_path, monkeypatch):
    """A module that scans a folder of models as transformers' does, and says which it scanned."""
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    (tmp_path / "models").mkdir()

    def scan(path, prefix=None):
        scanner.scanned.append(path)
        dot = f"{prefix}." if prefix else ""
        dot += "" if str(path).endswith(".py") else "folder."
        return {frozenset({"torch", "vision"}): {f"{dot}a.modeling_a": {"A", "B"}}, frozenset(): {f"{dot}a": {"C"}}}

    scanner = SimpleNamespace(define_import_structure=scan, scanned=[], scan=scan)
    return scanner


def test_the_names_of_models_are_scanned_once_for_each_state_of_their_folder(scanner, tmp_path, monkeypatch):
    models, home = tmp_path / "models", tmp_path / "home"
    calls = [(models, "models"), (models, "others"), (models,), (str(models / "__init__.py"),)]
    expected = [scanner.scan(*call) for call in calls]
    imports.keep_model_names(scanner)

    def scanned() -> int:
        scanner.scanned.clear()
        assert [scanner.define_import_structure(*call) for call in calls] == expected
        return len(scanner.scanned)

    assert (scanned(), scanned()) == (4, 0)
    (models / "another").mkdir()
    os.utime(models, ns=(1, 1))  # whatever the clock's grain
    assert (scanned(), scanned()) == (4, 0)
    monkeypatch.setattr(metadata, "version", lambda _: "0.0")
    assert (scanned(), scanned()) == (4, 0)
    for broken in ("", "[]", "3", '{"state": 0}', '{"found": 3}'):
        for file in home.iterdir():
            file.write_text(broken, encoding="utf-8")
        assert (scanned(), scanned()) == (4, 0)
    assert len(list(home.iterdir())) == 4  # nothing piles up
    monkeypatch.setattr(imports, "cache_folder", lambda: models / "__init__.py" / "cannot be")
    (models / "__init__.py").touch()
    assert (scanned(), scanned()) == (4, 4)


def test_only_the_folder_of_all_models_is_kept_and_a_library_without_the_scan_is_left_alone(scanner, tmp_path):
    imports.keep_model_names(scanner)
    for _ in range(2):
        scanner.define_import_structure(tmp_path / "models" / "a" / "__init__.py")
    assert len(scanner.scanned) == 2
    assert not (tmp_path / "home").exists()
    imports.keep_model_names(other := SimpleNamespace())
    assert vars(other) == {}


@pytest.mark.parametrize("form", [["a"], {"a": 3}, {frozenset(): {"a": [1, "b"]}}])
def test_names_of_models_in_another_form_are_left_as_they_are(scanner, tmp_path, form):
    scanner.define_import_structure = lambda _: form
    imports.keep_model_names(scanner)
    for _ in range(2):
        assert scanner.define_import_structure(tmp_path / "models") == form


def test_a_module_is_handed_over_after_it_was_imported_and_the_finder_goes(packages, tmp_path, monkeypatch):
    without_torch(monkeypatch)
    seen = []
    monkeypatch.setattr(imports, "UNAVAILABLE", {"a_library": ()})
    monkeypatch.setattr(imports, "prepare", lambda module: seen.append(module.seen["absent"]))
    before = list(sys.meta_path)
    imports.load_libraries()
    assert seen == [True]
    assert sys.meta_path == before
    sys.modules.pop("a_library")
    monkeypatch.setattr(imports, "UNAVAILABLE", {"never imported": ()})
    imports.load_libraries()
    assert sys.meta_path == before


def test_packages_are_looked_up_once_until_one_is_installed_and_as_before_afterwards(packages, tmp_path, monkeypatch):
    without_torch(monkeypatch)
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "site" / "home"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "site" / "home").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "never there")
    (tmp_path / "a_file").touch()
    monkeypatch.syspath_prepend(tmp_path / "a_file" / "in it")  # as one that may not be read: no OSError passes
    calls, code = [], "from importlib import metadata\nseen = [metadata.packages_distributions() for _ in range(2)]\n"
    monkeypatch.setattr(metadata, "packages_distributions", lambda: calls.append(1) or {"x": ["y"]})
    before = metadata.packages_distributions
    (tmp_path / "a_library.py").write_text(code, encoding="utf-8")
    imports.load_libraries()
    assert (sys.modules["a_library"].seen, calls) == ([{"x": ["y"]}] * 2, [1])
    assert metadata.packages_distributions is before
    for change, times in ((None, 1), ((1, 1), 2), (None, 2), ((2, 2), 3)):
        sys.modules.pop("a_library")
        if change:
            os.utime(tmp_path / "site", ns=change)
        imports.load_libraries()
        assert (sys.modules["a_library"].seen, len(calls)) == ([{"x": ["y"]}] * 2, times)


def test_each_way_to_look_for_packages_keeps_its_own(packages, tmp_path, monkeypatch):
    without_torch(monkeypatch)
    (tmp_path / "home").mkdir()  # or the folder of the packages changes
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    calls = []
    monkeypatch.setattr(metadata, "packages_distributions", lambda: calls.append(1) or {})
    code = "from importlib import metadata\nmetadata.packages_distributions()\n"
    (tmp_path / "a_library.py").write_text(code, encoding="utf-8")
    ways = [list(sys.path), [*sys.path, str(tmp_path / "more")]]
    for way in (*ways, *ways):
        monkeypatch.setattr(sys, "path", way)
        imports.load_libraries()
        sys.modules.pop("a_library")
    assert len(calls) == 2


@pytest.mark.parametrize("launched", [{}, {"WORLD_SIZE": "1"}, {"ACCELERATE_USE_FSDP": "true"}], ids=str)
def test_one_process_alone_does_without_what_is_for_many(packages, launched, tmp_path, monkeypatch):
    without_torch(monkeypatch)
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    code = "from wanted_by_all import is_available\nimport late_one\nseen = (is_available(), type(late_one).__name__)\n"
    (tmp_path / "a_library.py").write_text(code, encoding="utf-8")
    (tmp_path / "wanted_by_all.py").write_text("def is_available(): return True\n", encoding="utf-8")
    (tmp_path / "late_one.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(imports, "UNAVAILABLE", {"wanted_by_all": ("is_available", "of_another_version")})
    monkeypatch.setattr(imports, "LATE", {"a_library": ("late_one",), "another": ("never_wanted",)})
    before = list(sys.meta_path)
    imports.load_libraries()
    assert sys.modules["a_library"].seen == ((True, "module") if launched else (False, "LateModule"))
    assert not hasattr(sys.modules.pop("wanted_by_all"), "of_another_version")
    assert [finder for finder in sys.meta_path if finder not in before and not isinstance(finder, PartsOf)] == []
    sys.meta_path[:] = before
    del sys.modules["late_one"]


def test_the_names_of_models_are_kept_by_all_processes(monkeypatch):
    prepared = []
    monkeypatch.setattr(imports, "keep_model_names", lambda module: prepared.append(module.__name__))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in imports.UNAVAILABLE:
        imports.prepare(SimpleNamespace(__name__=name))
    assert prepared == [imports.SCANNER]


@pytest.mark.slow
def test_a_second_start_reads_no_model_of_transformers_that_it_does_not_use(tmp_path):
    code = """
import sys
read = set()
sys.addaudithook(lambda event, what: read.add(str(what[0])) if event == "open" else None)
from sidestep.imports import load_libraries
load_libraries()
import transformers
print(len([path for path in read if "transformers/models/" in path.replace(chr(92), "/") and path.endswith(".py")]))
assert transformers.BertConfig().model_type == "bert"
"""
    environment = os.environ | {"SIDE_STEP_HOME": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
        for _ in range(2)
    ]
    assert [(run.returncode, run.stderr) for run in runs] == [(0, "")] * 2
    first, second = (int(run.stdout) for run in runs)
    assert first > 1000
    assert second < 100


@pytest.mark.slow
def test_the_real_libraries_load_without_scipy_and_bitsandbytes_until_a_setting_needs_it():
    code = """
import sys
from sidestep.cli.main import main
main(["--version"])
from sidestep.imports import load_libraries
load_libraries()
assert not [name for name in sys.modules if name.split(".")[0] in ("scipy", "kernels") and sys.modules[name]]
import sidestep.tasks.plan.plan
assert not {"tensorboard", "sidestep.tasks.train.setup", "sidestep.tasks.describe"} & sys.modules.keys()
import sidestep.tasks.train.setup
assert "scipy" not in sys.modules
from peft.import_utils import is_bnb_available
assert not is_bnb_available() and sys.modules["bitsandbytes"] is None
import torch
from sidestep.acestep.quantize import is_quantized, make_quantizable
decoder = torch.nn.Module()
decoder.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64)])
make_quantizable(decoder, "nf4", torch.float32)
assert is_quantized(decoder.layers[0]) and is_bnb_available()
import scipy.signal
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
