"""What pyproject.toml promises, checked without building: the script, what the wheel holds, what is imported."""

import ast
import re
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

from sidestep.cli.start import entry
from sidestep.settings import presets

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_installed_command_is_what_train_py_runs():
    module, function = PROJECT["project"]["scripts"]["side-step"].split(":")
    assert getattr(import_module(module), function) is entry


def test_the_changelog_has_an_entry_for_this_version():
    version = re.search(
        r'__version__ = "(.+)"', (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text("utf-8")
    )
    assert re.search(rf"^## \[{version[1]}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)


def test_what_the_program_reads_stands_in_the_package():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["sidestep"]
    assert presets.BUILT_IN.is_relative_to(ROOT / "sidestep")
    assert (presets.BUILT_IN / "recommended.json").is_file()


def test_every_library_that_is_imported_is_declared():
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}
    imported = set()
    for path in (ROOT / "sidestep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    known = packages_distributions()
    undeclared = [
        name
        for name in sorted(imported - set(sys.stdlib_module_names) - {"sidestep"})
        if not {d.lower().replace("_", "-") for d in known.get(name, [name])} & declared
    ]
    assert undeclared == []
