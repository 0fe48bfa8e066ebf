"""The layers of house style, read from the imports: they point down only and stand at the top of the file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sidestep"
LAYERS = {
    0: "config options variants presets workspace carry_over events errors folders atomic seeding rank_map".split(),
    1: "audio data acestep adapters flow_matching optim".split(),
    2: "preprocess build_dataset analyze audit estimate sample demo training memory doctor export inspect_adapter history".split(),
    3: ["terminal", "wizard"],
    4: ["cli"],
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
# Where a part may import another of its own layer above the ground floor; nowhere in a circle.
BESIDE = {
    ("wizard", "terminal"): "the wizard shows what it asks",
    ("demo", "*"): "the demo runs the other tasks",
    ("memory", "training"): "the memory of the real step is found by running the real step",
    ("estimate", "training"): "gradients are measured on the loss that training has",
    ("training", "sample"): "previews are samples",
    ("preprocess", "build_dataset"): "a folder of songs is indexed as build-dataset would",
    ("build_dataset", "audit"): "a build ends with an audit",
    ("build_dataset", "analyze"): "--analyze fills in what is missing",
}
# Packages that not every machine has, or that take seconds to load and are used by one setting: imported where that setting is.
OPTIONAL = ("bitsandbytes", "prodigyopt")
HEAVY = ("torch", "torchaudio", "numpy", "diffusers", "transformers", "peft", "accelerate", "av", "soundfile")
MODULES = sorted(ROOT.rglob("*.py"))


def package(path: Path) -> str:
    """The name that the table has for a file: its package, or the module itself."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[tuple[str, ast.AST, bool]]:
    """(module, node, at the top) for every import of a file; imports for type checking only are at the top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"sidestep.{alias.name}" for alias in node.names] if node.module == "sidestep" else [node.module]
            found += [(name, node, id(node) not in inside) for name in names]
    return found


def ours(path: Path) -> set[str]:
    """The parts of Side-Step that a file imports, but for its own package."""
    names = {name.split(".")[1] for name, _, _ in imports(path) if name.startswith("sidestep.") and name != "sidestep.__version__"}
    return {name for name in names if name in LAYER_OF} - {package(path)}


def test_every_module_has_a_layer():
    assert {package(path) for path in MODULES} - {"__init__"} == set(LAYER_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    me = package(path)
    if me == "__init__":
        return
    for other in ours(path):
        assert LAYER_OF[other] <= LAYER_OF[me], f"{me} (layer {LAYER_OF[me]}) imports {other} (layer {LAYER_OF[other]})"
        if LAYER_OF[me] == 3:
            assert LAYER_OF[other] in (0, 3), f"{me} may use layer 0 only, and imports {other}"
        if 0 < LAYER_OF[other] == LAYER_OF[me]:
            assert (me, other) in BESIDE or (me, "*") in BESIDE, f"{me} imports {other} of its own layer"


def test_imports_go_in_no_circle():
    below = {name: set().union(*(ours(path) for path in MODULES if package(path) == name)) for name in LAYER_OF}
    while below:
        free = [name for name, needs in below.items() if not needs & set(below)]
        assert free, f"in a circle: {sorted(below)}"
        for name in free:
            del below[name]


@pytest.mark.parametrize("path", [path for path in MODULES if LAYER_OF.get(package(path)) in (0, 3)], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_ground_floor_and_what_a_person_sees_need_no_torch(path):
    assert not {name.split(".")[0] for name, _, _ in imports(path)} & set(HEAVY)


@pytest.mark.parametrize("path", [path for path in MODULES if LAYER_OF.get(package(path)) == 0], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_ground_floor_needs_only_the_standard_library(path):
    assert {name.split(".")[0] for name, _, _ in imports(path)} <= set(sys.stdlib_module_names) | {"sidestep"}


@pytest.mark.parametrize("path", [path for path in MODULES if package(path) != "cli"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_stand_at_the_top(path):
    assert [name for name, _, top in imports(path) if not top and name.split(".")[0] not in OPTIONAL] == []


@pytest.mark.parametrize("path", [path for path in MODULES if package(path) == "cli"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_command_line_imports_tasks_only_inside_its_commands(path):
    early = {name for name, _, top in imports(path) if top and name.startswith("sidestep.") and LAYER_OF.get(name.split(".")[1]) in (1, 2)}
    assert early == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_one_idea(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_only_the_boundary_catches_everything():
    broad = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            ):
                broad.append(path.relative_to(ROOT).as_posix())
    assert broad == ["cli/boundary.py"]
