"""The heavy libraries, loaded in less time: without collecting garbage, and without what nothing here asks for.

Libraries import some packages only because they are installed. For them such a package is absent, which in
`sys.modules` is a None; whoever needs one himself imports it by `asked_for`. What they find out about files that do not
change between two starts is kept.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from sidestep.files import cache_folder, short_digest, write_text
from sidestep.late_modules import load_late

LIBRARIES = (
    "torch",
    "transformers.modeling_utils",
    "peft",
    "diffusers.models.transformers.ace_step_transformer",
    "diffusers.models.autoencoders.autoencoder_oobleck",
)
# What a library, or the folder that it is in, brings along and few runs use: loaded when something in it is asked for.
LATE = {
    "transformers.modeling_utils": (
        *("torch._dynamo", "torch.distributed.tensor"),
        *("torch.nn.attention.flex_attention", "torch.nn.attention.varlen"),
        *("torch.fx.experimental.symbolic_shapes", "sympy"),
    ),
    "diffusers.models.transformers.ace_step_transformer": (
        *("diffusers.models.transformers", "diffusers.training_utils"),
    ),
    "diffusers.models.autoencoders.autoencoder_oobleck": ("diffusers.models.autoencoders",),
}
ABSENT_WHILE_LOADING = ("scipy",)  # transformers has it for a loss, diffusers for samplers; we use it ourselves
ABSENT = ("bitsandbytes",)  # peft looks for it at each layer that it adapts
SCANNER = "transformers.utils.import_utils"
# By these, libraries ask for what tensors shared among processes need, and for an attention that nothing here uses.
UNAVAILABLE = {
    SCANNER: ("is_torch_distributed_available", "is_torch_flex_attn_available"),
    "accelerate.utils.imports": ("is_torch_distributed_available",),
}


def load_libraries(done: Callable[[], object] = lambda: None) -> None:
    """Import what all commands on models need, `done` after each. In a process that has torch already nothing changes.

    Collections of garbage look at everything imported so far, again and again, and find nothing; afterwards what is
    there by now is left out of them for good.
    """
    if "torch" in sys.modules:
        return
    hidden = [name for name in (*ABSENT_WHILE_LOADING, *ABSENT) if name not in sys.modules]
    collecting = gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))  # pyrefly: ignore[no-matching-overload]  None: not to be imported
    try:
        with packages_kept(), libraries_prepared():
            for name in LIBRARIES:
                if is_alone():
                    load_late(*LATE.get(name, ()))
                import_module(name)
                done()
    finally:
        for name in hidden:
            if name not in ABSENT:
                del sys.modules[name]
        if collecting:
            gc.enable()
    gc.freeze()


def kept(name: str, state: object, find: Callable[[], Any]) -> Any:
    """What `find` gives, which JSON can say: from our folder of caches where it was found in the same state before."""
    file, state = cache_folder() / f"{name}.json", repr(state)
    with suppress(OSError, ValueError, TypeError, KeyError):
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["state"] == state:
            return before["found"]
    found = find()
    with suppress(OSError, TypeError):
        write_text(file, json.dumps({"state": state, "found": found}))
    return found


@contextmanager
def packages_kept() -> Iterator[None]:
    """While entered: which distribution a package is of is not found out again until something is installed or removed.

    That takes reading the lists of files of all distributions, which each library does anew.
    """
    metadata: Any = import_module("importlib.metadata")  # here and below: no start without a model waits for it
    look_up = metadata.packages_distributions

    def look_up_kept() -> dict[str, list[str]]:
        state: dict[str, int] = {}
        for entry in sys.path:
            with suppress(OSError):  # it is not there, or may not be read
                state[entry] = Path(entry or ".").stat().st_mtime_ns
        return kept(f"packages-{short_digest(repr(sys.path))}", state, lambda: dict(look_up()))

    metadata.packages_distributions = look_up_kept
    try:
        yield
    finally:
        metadata.packages_distributions = look_up


@contextmanager
def libraries_prepared() -> Iterator[None]:
    """While entered: a module of `UNAVAILABLE` is prepared as soon as it was executed."""
    finders = [AfterImport(name, prepare) for name in UNAVAILABLE]
    sys.meta_path[:0] = finders
    try:
        yield
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)


class AfterImport:
    """A finder of one module, which is found as ever and handed to `then` once it was executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self._name, self._then, self._is_found = name, then, False

    def find_spec(self, name: str, *_: object) -> Any:
        """The spec of the module that is waited for; None of any other, which the next finder finds."""
        if name != self._name or self._is_found:
            return None
        self._is_found = True  # the others are asked for it now
        spec = find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = exec_module
        return spec


def prepare(module: Any) -> None:
    """Let transformers keep the names of its models, and libraries do without what nobody uses where we are alone."""
    if module.__name__ == SCANNER:
        keep_model_names(module)
    if is_alone():
        for name in UNAVAILABLE[module.__name__]:
            if hasattr(module, name):
                setattr(module, name, lambda: False)


def is_alone() -> bool:
    """Whether this process trains by itself: none of the variables is set by which launchers say how many there are."""
    return not {"WORLD_SIZE", "ACCELERATE_USE_FSDP"} & os.environ.keys()


def keep_model_names(scanner: Any) -> None:
    """Let transformers' `define_import_structure` keep what it finds in the folder of all models.

    It gives the names in each module, by the libraries that these need. They are scanned again for another version, or
    where something came into the folder or left it.
    """
    scan = getattr(scanner, "define_import_structure", None)
    if scan is None:
        return

    def define(path: str | Path, *how: object, **named: object) -> Any:
        folder = Path(path).parent if Path(path).suffix else Path(path)
        if folder.name != "models":
            return scan(path, *how, **named)
        try:
            names = kept(
                f"transformers-models-{short_digest(repr((Path(path).suffix, how, named)))}",
                (import_module("importlib.metadata").version("transformers"), str(folder), folder.stat().st_mtime_ns),
                lambda: [
                    [sorted(needed), {module: sorted(names) for module, names in modules.items()}]
                    for needed, modules in scan(path, *how, **named).items()
                ],
            )
            return {
                frozenset(needed): {module: set(names) for module, names in modules.items()}
                for needed, modules in names
            }
        except (AttributeError, TypeError, ValueError):  # a version that says it in another form
            return scan(path, *how, **named)

    scanner.define_import_structure = define


def asked_for(name: str) -> ModuleType:
    """A package of `ABSENT`, for the setting that needs it. Raises ImportError where it is not installed."""
    if sys.modules.get(name, sys) is None:
        del sys.modules[name]
    return import_module(name)
