"""Modules that libraries name at each start and that few runs use: something stands for them until they are used.

PyTorch's compiler takes a third of the time that all libraries take. transformers and diffusers ask for it to mark
functions that it must leave alone or take as they are, torch's optimizers and its checkpointing to keep it out of their
calls. While nothing is compiled, none of that does anything. Nor does the algebra of shapes (sympy) of which each
operation on `meta` asks whether a truth is one: there are symbols in shapes where something is compiled or exported.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

COMPILER = "torch._dynamo"
SYMBOLS, ALGEBRA = "torch.fx.experimental.symbolic_shapes", "sympy"
# Parts that can be imported without the whole. Of the compiler: its settings, which checkpointing reads, and what
# transformers' masks use. Of diffusers all, which name what they need of each other.
ALONE = (f"{COMPILER}.config", f"{COMPILER}._trace_wrapped_higher_order_op", "diffusers.")


def load_late(*names: str) -> None:
    """Let something stand for each of these modules that is not loaded. What they are parts of is imported."""
    for name in names:
        if name not in sys.modules:
            late = {COMPILER: LateCompiler, SYMBOLS: LateSymbols}.get(name, LateModule)(name)
            folder, _, part = name.rpartition(".")
            sys.modules[name] = late
            if folder:
                setattr(sys.modules[folder], part, late)


class LateModule(ModuleType):
    """Stands for a module until something in it is asked for; then it is loaded and takes its place."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = find_spec(name)
        if self.__spec__ and self.__spec__.submodule_search_locations:
            self.__path__ = self.__spec__.submodule_search_locations
        self._parts = PartsOf(self)
        sys.meta_path.insert(0, self._parts)
        vars(self).update(MEANWHILE.get(name, {}))

    @property
    def is_replaced(self) -> bool:
        """Whether the module is loaded, or is being loaded."""
        return sys.modules.get(self.__name__) is not self

    def loaded(self) -> Any:
        """The module, from now on in this one's place."""
        if self.is_replaced:
            return import_module(self.__name__)
        del sys.modules[self.__name__]
        sys.meta_path.remove(self._parts)
        for name in MEANWHILE.get(self.__name__, ()):
            delattr(self, name)
        module = import_module(self.__name__)
        for name, part in list(vars(self).items()):  # those that were imported without it
            if isinstance(part, ModuleType):
                setattr(module, name, part)
        return module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # such as __file__, for which `inspect` asks all modules there are
            raise AttributeError(name)
        return getattr(self.loaded(), name)


class LateCompiler(LateModule):
    """The compiler, until more is asked of it than not to disturb."""

    def __init__(self, name: str):
        super().__init__(name)
        self._told: list[tuple[str, Any]] = []
        # What is called by each, and how the compiler is to keep out of it. Checkpointing makes them by the thousand.
        self._undisturbed: WeakKeyDictionary[Callable, tuple[list[Callable], dict]] = WeakKeyDictionary()

    def loaded(self) -> Any:
        """The compiler, which knows by now what it shall not touch."""
        is_loading = self.is_replaced
        compiler = super().loaded()
        if not is_loading:
            for name, what in self._told:
                getattr(compiler, name)(what)
            for called, how in self._undisturbed.values():
                called.append(compiler.disable(called.pop(), **how))
        return compiler

    def __getattr__(self, name: str) -> Any:
        if f"{COMPILER}.{name}" in ALONE:
            return import_module(f"{COMPILER}.{name}")
        return super().__getattr__(name)

    def disable(self, fn: Callable | None = None, recursive: bool = True, **named: Any) -> Any:
        """`fn`, of which the compiler keeps out once it is loaded; without one, what makes such a function of it."""
        if fn is None:
            return partial(self.disable, recursive=recursive, **named)
        if self.is_replaced or not isinstance(fn, FunctionType):
            return self.loaded().disable(fn, recursive, **named)
        called = [fn]

        @wraps(fn)
        def undisturbed(*args: Any, **kwargs: Any) -> Any:
            return called[0](*args, **kwargs)

        self._undisturbed[undisturbed] = called, named | {"recursive": recursive}
        return undisturbed

    def allow_in_graph(self, what: Any) -> Any:
        """`what`, which the compiler takes as it is once it is loaded."""
        return self._mark("allow_in_graph", what)

    def disallow_in_graph(self, what: Any) -> Any:
        """`what`, which the compiler leaves out of its graphs once it is loaded."""
        return self._mark("disallow_in_graph", what)

    def assume_constant_result(self, fn: Any) -> Any:
        """`fn`, whose result the compiler takes for the same in every call once it is loaded."""
        return self._mark("assume_constant_result", fn)

    def graph_break(self, *_: Any, **__: Any) -> None:
        """Nothing: while nothing is compiled, there is no graph to break."""

    def _mark(self, name: str, what: Any) -> Any:
        if self.is_replaced:
            return getattr(self.loaded(), name)(what)
        self._told.append((name, what))
        return what


class LateSymbols(LateModule):
    """The algebra of shapes, until a symbol is in one. An operation on `meta` asks for it some twenty times."""

    def __init__(self, name: str):
        super().__init__(name)
        for function, answer in WITHOUT_SYMBOLS.items():
            setattr(self, function, partial(self._ask, function, answer))

    def loaded(self) -> Any:
        """The algebra of shapes, which has the other one for its own and not what stands for it."""
        if isinstance(algebra := sys.modules.get(ALGEBRA), LateModule):
            algebra.loaded()
        return super().loaded()

    def _ask(self, function: str, answer: Callable, *values: Any, **how: Any) -> Any:
        for value in values:
            if type(value) not in KNOWN and not is_shape(value):
                return getattr(self.loaded(), function)(*values, **how)
        return answer(*values)


KNOWN = {bool, int}


def is_shape(value: Any) -> bool:
    """Whether it is a row of numbers."""
    return type(value) in (tuple, list) and all(type(each) in KNOWN for each in value)


# What the algebra of shapes answers where it is asked about truths, numbers and rows of them.
WITHOUT_SYMBOLS: dict[str, Callable] = {
    "expect_true": lambda value, *_: value,
    "guard_or_true": lambda value: value,
    "guard_or_false": lambda value: value,
    "guard_size_oblivious": lambda value: value,
    "guarding_hint_or_throw": lambda value: value,
    "statically_known_true": lambda value: value,
    "has_guarding_hint": lambda _: True,
    "is_nested_int": lambda _: False,
    "sym_and": lambda *values: all(values),
    "sym_or": lambda *values: any(values),
    "sym_eq": lambda one, other: list(one) == list(other) if is_shape(one) and is_shape(other) else one == other,
}


class Nobody:
    """A type that nothing is of."""


# What libraries ask of each model, tensor or number: whether it is compiled, shared among processes or a formula.
MEANWHILE: dict[str, dict[str, Any]] = {
    ALGEBRA: {"Basic": Nobody},
    COMPILER: {"eval_frame": SimpleNamespace(OptimizedModule=Nobody)},
    "torch.distributed.tensor": {"DTensor": Nobody},
}


class PartsOf:
    """A finder before which no part of a late module is imported by itself: the whole is loaded first, and has it."""

    def __init__(self, late: LateModule):
        self._late = late

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """How to come to a part that came with the whole; None of any other module, which the next finder finds."""
        if not name.startswith(f"{self._late.__name__}.") or name.startswith(ALONE):
            return None
        self._late.loaded()
        if name not in sys.modules:
            return None
        there = There(sys.modules[name])
        sys.modules[name].__spec__ = None  # or importing would execute the module by its own spec again
        return ModuleSpec(name, there)


class There(Loader):
    """A loader of a module that is loaded."""

    def __init__(self, module: ModuleType):
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module as it is."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Give it its own spec back, in the place of the one by which it was found."""
        module.__spec__ = self._spec
