"""The floors of the house, read from its folders: imports point down only and stand at the top of the file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sidestep"
# A floor is a folder; the files beside the folders are the ground floor.
FLOORS = {
    "settings": 1,
    **dict.fromkeys(("audio", "data", "acestep", "adapters", "flow_matching", "optim"), 2),
    **dict.fromkeys(("tasks", "pages"), 3),
    **dict.fromkeys(("terminal", "wizard"), 4),
    "cli": 5,
}
# Where a room may use another of its own floor; nowhere in a circle. A part uses no other part.
BESIDE = {
    ("wizard", "terminal"): "the wizard shows what it asks",
    ("tasks.demo", "*"): "the demo runs the other tasks",
    ("tasks.dry_run", "*"): "what a command would do is found out by its own functions",
    ("tasks.plan", "tasks.train"): "the memory of the real step is found by running the real step",
    ("tasks.estimate", "tasks.train"): "gradients are measured on the loss that training has",
    ("tasks.score", "tasks.train"): "the loss is that of validation, on the songs of the run",
    ("tasks.score", "tasks.sample"): "drift is measured at the points that a sample passes",
    ("tasks.train", "tasks.sample"): "previews are samples",
    ("tasks.sample", "tasks.think"): "a song may be composed before it is made",
    ("tasks.train", "tasks.think"): "so may that of a preview",
    ("tasks.plan", "tasks.describe"): "memory is planned for what is heard at once",
    ("tasks.plan", "tasks.think"): "memory is planned for the longest song that is composed unasked",
    ("tasks.preprocess", "tasks.build_dataset"): "a folder of songs is indexed as build-dataset would",
    ("tasks.audit", "pages"): "the page of an audit",
    ("tasks.estimate", "pages"): "the page of a rank map",
    ("tasks.train", "pages"): "the report of a run",
    ("tasks.score", "pages"): "the page for listening to what is judged",
}
# Packages that not every machine has, or that take seconds to load and are used by one setting: imported where that
# setting is.
OPTIONAL = ("bitsandbytes", "prodigyopt")
HEAVY = ("torch", "torchaudio", "numpy", "diffusers", "transformers", "peft", "accelerate", "av", "soundfile")
SMALL = set(sys.stdlib_module_names) | {
    "sidestep",
    "filelock",
    "platformdirs",
    "charset_normalizer",
    "safetensors",  # its errors; without torch and numpy
}  # what the ground floor may use
MODULES = sorted(ROOT.rglob("*.py"))
by_path = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())


def room_of(parts: tuple[str, ...]) -> str:
    """The room a module stands in: its folder, each task apart; on the ground floor the module itself."""
    return ".".join(parts[:2]) if parts[0] == "tasks" and len(parts) > 1 else parts[0]


def floor_of(room: str) -> int:
    return FLOORS.get(room.partition(".")[0], 0)


def room(path: Path) -> str:
    return room_of(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top) for every import of a file; imports for type checking only are at the top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            is_folder = node.module == "sidestep" or (ROOT.parent / node.module.replace(".", "/")).is_dir()
            names = [f"{node.module}.{alias.name}" for alias in node.names] if is_folder else [node.module]
            found += [(name, id(node) not in inside) for name in names]
    return found


def ours(path: Path) -> set[str]:
    """The rooms that a file uses, but for its own."""
    names = {tuple(name.split(".")[1:]) for name, _ in imports(path) if name.startswith("sidestep.")}
    return {room_of(name) for name in names if name != ("__version__",)} - {room(path)}


def test_every_folder_is_a_floor():
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} | {"optim"} == set(
        FLOORS
    )


@by_path
def test_imports_point_down(path):
    me = room(path)
    for other in ours(path):
        assert floor_of(other) <= floor_of(me), f"{me} (floor {floor_of(me)}) imports {other} (floor {floor_of(other)})"
        if floor_of(me) == 4:
            assert floor_of(other) in (0, 1, 4), f"{me} may use settings and the ground floor only, and imports {other}"
        if 0 < floor_of(other) == floor_of(me):
            assert (me, other) in BESIDE or (me, "*") in BESIDE, f"{me} imports {other} of its own floor"


def test_imports_go_in_no_circle():
    below: dict[str, set[str]] = {}
    for path in MODULES:
        below.setdefault(room(path), set()).update(ours(path))
    while below:
        free = [name for name, needs in below.items() if not needs & set(below)]
        assert free, f"in a circle: {sorted(below)}"
        for name in free:
            del below[name]


@by_path
def test_settings_and_what_a_person_sees_need_no_torch(path):
    if floor_of(room(path)) in (0, 1, 4):
        assert not {name.split(".")[0] for name, _ in imports(path)} & set(HEAVY)


@by_path
def test_the_ground_floor_needs_small_libraries_only(path):
    if floor_of(room(path)) in (0, 1):
        assert {name.split(".")[0] for name, _ in imports(path)} <= SMALL


@by_path
def test_imports_stand_at_the_top(path):
    late = [name for name, top in imports(path) if not top and name.split(".")[0] not in OPTIONAL]
    assert room(path) == "cli" or late == []


@by_path
def test_the_command_line_imports_tasks_only_inside_its_commands(path):
    if room(path) == "cli":
        early = {name for name, top in imports(path) if top and name.startswith("sidestep.")}
        assert not {name for name in early if floor_of(name.split(".")[1]) in (2, 3)}


def test_only_the_boundary_catches_everything():
    broad = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            caught = ast.unparse(node.type) if isinstance(node, ast.ExceptHandler) and node.type else ""
            if isinstance(node, ast.ExceptHandler) and caught in ("", "Exception", "BaseException"):
                broad.append(path.relative_to(ROOT).as_posix())
    assert broad == ["cli/main.py"]
