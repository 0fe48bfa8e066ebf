"""What stands for a module until it is used: nothing is loaded too early, twice, or otherwise than by itself."""

import gc
import importlib
import inspect
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidestep import late_modules
from sidestep.late_modules import LateCompiler, LateModule, load_late
from sidestep.settings.option import as_arguments
from tests.training_world import adapter, differing, run, settings, write_data

ROOT = Path(__file__).parent.parent
WHOLE = """
import builtins
builtins.executed.append(__name__)
from . import inner
from .inner import value
from .settings import limit
marked = []
def disable(fn=None, recursive=True, **named):
    marked.append(("disable", fn, recursive, named))
    return lambda *args: ("kept out", fn(*args))
def allow_in_graph(what):
    marked.append(("allow_in_graph", what))
    return what
def disallow_in_graph(what):
    marked.append(("disallow_in_graph", what))
    return what
def assume_constant_result(what):
    marked.append(("assume_constant_result", what))
    return what
class OptimizedModule: ...
class eval_frame:
    OptimizedModule = OptimizedModule
"""
PART = """
import builtins
builtins.executed.append(__name__)
value = limit = object()
"""


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """A folder with a package in a package; the names of modules in the order in which they were executed."""
    order: list[str] = []
    monkeypatch.setattr("builtins.executed", order, raising=False)
    whole = tmp_path / "a_house" / "late"
    whole.mkdir(parents=True)
    (tmp_path / "a_house" / "__init__.py").touch()
    (whole / "__init__.py").write_text(WHOLE, encoding="utf-8")
    for part in ("inner", "settings", "outer"):
        (whole / f"{part}.py").write_text(PART, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(late_modules, "COMPILER", "a_house.late")
    monkeypatch.setattr(late_modules, "ALONE", ("a_house.late.settings", "elsewhere."))
    before = list(sys.meta_path)
    yield order
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.startswith("a_house")]:
        del sys.modules[name]


@pytest.fixture
def late(executed) -> LateCompiler:
    load_late("a_house.late")
    assert executed == []
    return sys.modules["a_house.late"]


def is_loaded() -> bool:
    return not isinstance(sys.modules["a_house.late"], LateModule)


def test_it_is_loaded_when_something_in_it_is_asked_for_and_then_stands_for_itself(late, executed):
    import a_house.late as seen

    assert seen is late is sys.modules["a_house"].late
    assert not hasattr(late, "__file__")
    assert inspect.getmodule(is_loaded) is sys.modules[__name__]  # which looks at all modules
    assert not is_loaded()
    value = late.value
    assert is_loaded()
    assert executed == ["a_house.late", "a_house.late.inner", "a_house.late.settings"]
    assert sys.modules["a_house"].late is sys.modules["a_house.late"] is not late
    assert (late.value, late.inner) == (value, sys.modules["a_house.late.inner"])
    assert late._parts not in sys.meta_path


def test_a_module_that_is_loaded_stays(executed):
    import a_house.late as loaded

    load_late("a_house.late")
    assert sys.modules["a_house.late"] is loaded


def test_what_is_in_it_can_be_asked_for_in_an_import(late):
    from a_house.late import value

    assert value is sys.modules["a_house.late"].value
    assert is_loaded()


@pytest.mark.parametrize("part", ["inner", "outer"])
def test_a_part_comes_after_the_whole_and_once(late, executed, part):
    module = importlib.import_module(f"a_house.late.{part}")
    assert executed.count(f"a_house.late.{part}") == 1
    assert executed[0] == "a_house.late"
    assert sys.modules[f"a_house.late.{part}"] is module is getattr(sys.modules["a_house.late"], part)
    assert Path(module.__spec__.origin).name == f"{part}.py"
    assert type(module.__spec__.loader).__module__.startswith(("importlib", "_frozen_importlib"))
    assert importlib.reload(module) is module


@pytest.mark.parametrize("way", ["imported", "asked for"])
def test_a_part_that_asks_nothing_of_the_whole_comes_alone_and_is_the_same_afterwards(late, executed, way):
    part = importlib.import_module("a_house.late.settings") if way == "imported" else late.settings
    assert executed == ["a_house.late.settings"]
    assert not is_loaded()
    limit = part.limit
    assert late.loaded().limit is limit
    assert late.loaded().settings is part is sys.modules["a_house.late.settings"]
    assert executed.count("a_house.late.settings") == 1


def test_one_that_cannot_be_loaded_says_so_each_time(late, tmp_path):
    (tmp_path / "a_house" / "late" / "__init__.py").write_text("raise ImportError('broken')\n", encoding="utf-8")
    importlib.invalidate_caches()
    for _ in range(2):
        with pytest.raises(ImportError, match="broken"):
            _ = late.value


def test_the_compiler_keeps_out_of_what_it_was_told_once_it_is_there(late):
    @late.disable
    def first(x: int) -> int:
        """Twice."""
        return 2 * x

    @late.disable(recursive=False, reason="ours")
    def second(x: int) -> int:
        return 3 * x

    assert (first(2), second(2), first.__doc__) == (4, 6, "Twice.")
    late.graph_break()
    late.graph_break("here")
    assert not is_loaded()
    compiler = late.loaded()
    assert [first(2), first(3), second(2)] == [("kept out", 4), ("kept out", 6), ("kept out", 6)]
    asked = {fn: (recursive, named) for _, fn, recursive, named in compiler.marked}
    assert asked == {first.__wrapped__: (True, {}), second.__wrapped__: (False, {"reason": "ours"})}
    assert len(compiler.marked) == 2
    assert late.disable(abs)(-3) == ("kept out", 3)
    assert late.disable(lambda x: x)(3) == ("kept out", 3)


def test_nobody_remembers_functions_that_are_gone(late):
    gone = [weakref.ref(late.disable(lambda: None)) for _ in range(3)]
    gc.collect()
    assert [there() for there in gone] == [None] * 3
    assert late.loaded().marked == []


def test_what_is_no_plain_function_is_the_compilers_own_matter(late):
    assert late.disable(abs)(-3) == ("kept out", 3)
    assert is_loaded()


def test_the_compiler_learns_what_was_marked_before_it_came(late):
    marks = ["allow_in_graph", "disallow_in_graph", "assume_constant_result"]
    things = [object(), object(), is_loaded]
    for mark, thing in zip(marks, things, strict=True):
        assert getattr(late, mark)(thing) is thing
    assert not is_loaded()
    compiler = late.loaded()
    wanted = list(zip(marks, things, strict=True))
    assert compiler.marked == wanted
    late.loaded()
    late.allow_in_graph(wanted)
    assert compiler.marked == [*wanted, ("allow_in_graph", wanted)]


def test_while_nothing_is_compiled_nothing_is_of_its_type(executed, monkeypatch):
    monkeypatch.setitem(late_modules.MEANWHILE, "a_house.late", late_modules.MEANWHILE["torch._dynamo"])
    load_late("a_house.late")
    late = sys.modules["a_house.late"]
    assert not isinstance(late, late.eval_frame.OptimizedModule)
    assert not is_loaded()
    compiler = late.loaded()
    assert isinstance(compiler.OptimizedModule(), late.eval_frame.OptimizedModule)


@pytest.fixture
def algebra(executed, tmp_path, monkeypatch) -> LateModule:
    """A package that asks `a_house.late` about shapes, which asks `a_house.formulas`; nothing is executed yet."""
    for name in ("formulas", "symbols"):
        answer = f"def sym_and(*values): return ('{name}', *values)\n"
        (tmp_path / "a_house" / f"{name}.py").write_text(PART + answer, encoding="utf-8")
    monkeypatch.setattr(late_modules, "SYMBOLS", "a_house.symbols")
    monkeypatch.setattr(late_modules, "ALGEBRA", "a_house.formulas")
    load_late("a_house.symbols", "a_house.formulas")
    return sys.modules["a_house.symbols"]


def test_a_symbol_in_a_shape_needs_the_algebra(algebra, executed):
    symbol = object()
    assert (algebra.sym_and(True, True), algebra.sym_and((1, 2), False)) == (True, False)
    assert executed == []
    assert algebra.sym_and(True, symbol) == ("symbols", True, symbol)
    assert executed == ["a_house.formulas", "a_house.symbols"]
    assert algebra.sym_and((1, symbol)) == ("symbols", (1, symbol))
    assert algebra.sym_and(True) is True


def test_without_symbols_shapes_are_answered_as_the_algebra_does():
    real: Any = importlib.import_module("torch.fx.experimental.symbolic_shapes")
    truths = [(True,), (False,)]
    asked = dict.fromkeys(late_modules.WITHOUT_SYMBOLS, truths) | {
        "expect_true": [*truths, (True, 1)],
        "has_guarding_hint": [*truths, (3,)],
        "guarding_hint_or_throw": [*truths, (3,)],
        "is_nested_int": [(3,)],
        "sym_and": [*truths, (True, True), (True, False, True)],
        "sym_or": [*truths, (False, True), (False, False, False)],
        "sym_eq": [(2, 2), (2, 3), ((1, 2), (1, 2)), ((1, 2), [1, 2]), ((1, 2), (1, 3)), ((1,), (1, 2)), ((), ())],
    }
    for name, rows in asked.items():
        for values in rows:
            assert late_modules.WITHOUT_SYMBOLS[name](*values) is getattr(real, name)(*values), (name, values)


REAL = """
import sys
import weakref
from dataclasses import replace
from sidestep.imports import load_libraries
load_libraries()
from sidestep.late_modules import LateModule
import torch
late = [name for name, module in sys.modules.items() if isinstance(module, LateModule)]
assert len(late) == 9, late
import diffusers.training_utils, sidestep.tasks.train.setup, sidestep.tasks.preprocess.run, sidestep.tasks.sample
x = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([x], lr=0.1, fused=True)
assert not isinstance(x, torch.distributed.tensor.DTensor)
torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
kept = torch.compiler.disable(lambda x: x + 1)
assert kept(1) == 2
from sidestep.tasks.plan.passes import encoding_peak
encoding_peak(torch.float32, 2.0)
assert [name for name, module in sys.modules.items() if isinstance(module, LateModule)] == late
assert "triton" not in sys.modules, "loaded for nothing, which is no late one"
"""
USED = """
settings = torch._dynamo.config
seen = []
def backend(graph, inputs):
    seen.append(len(graph.graph.nodes))
    return graph
assert torch.compile(lambda x: kept(torch.sin(x)) * 2, backend=backend)(torch.zeros(2)).tolist() == [2, 2]
assert len(seen) == 2, seen  # before and after what the compiler keeps out of
assert torch._dynamo.config is settings is sys.modules["torch._dynamo.config"]
assert isinstance(torch.compile(torch.nn.Linear(1, 1)), torch._dynamo.eval_frame.OptimizedModule)
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor, Replicate
assert isinstance(DTensor, type) and issubclass(DTensor, torch.Tensor)
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from diffusers.models.transformers import FluxTransformer2DModel
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.models.transformers import AceStepTransformer1DModel as again
import diffusers, transformers
assert diffusers.AceStepTransformer1DModel is again is AceStepTransformer1DModel
from diffusers.training_utils import EMAModel
EMAModel([x])
assert transformers.Qwen3Model
def whose(value):
    value = value.func if type(value).__name__ == "partial" else value
    return getattr(value, "__self__", value) if type(value).__name__ == "method" else value
held = {(name, of) for name, module in list(sys.modules.items()) if name.startswith(("torch.", "sympy."))
        for of, value in list(getattr(module, "__dict__", {}).items()) if isinstance(whose(value), LateModule)}
assert not held, held
assert not [name for name, module in sys.modules.items() if isinstance(module, LateModule)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
def test_the_real_ones_are_not_loaded_by_a_training_and_are_all_there(launched):
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE",)}
    code = REAL + USED
    if launched:
        environment["WORLD_SIZE"] = "1"
        code = "\n".join(line for line in code.splitlines() if "late" not in line or line.startswith("from")) + "\n"
        code += 'assert {"sympy", "triton"} <= sys.modules.keys()'
    words = [sys.executable, "-W", "ignore::FutureWarning", "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_run_has_the_same_numbers_where_everything_was_loaded_before(tmp_path):
    config = settings(write_data(tmp_path / "data"), tmp_path / "late", ema_decay=0.9)
    late = [sys.executable, "train.py", "--plain", "fixed", *as_arguments(config)]
    subprocess.run(late, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run(replace(config, output_dir=tmp_path / "early"))
    assert not list(differing(adapter(tmp_path / "late" / "final"), adapter(tmp_path / "early" / "final")))
