"""The heavy libraries, loaded in less time: without collecting garbage, and without what nothing here asks for.

Libraries import some packages only because they are installed. For them such a package is absent, which in
`sys.modules` is a None; whoever needs one himself imports it by `asked_for`.
"""

import gc
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

LIBRARIES = (
    "torch",
    "transformers.modeling_utils",
    "peft",
    "diffusers.models.transformers.ace_step_transformer",
    "diffusers.models.autoencoders.autoencoder_oobleck",
)
ABSENT_WHILE_LOADING = ("scipy",)  # transformers has it for a loss, diffusers for samplers; we use it ourselves
ABSENT = ("bitsandbytes",)  # peft looks for it at each layer that it adapts


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
        for name in LIBRARIES:
            import_module(name)
            done()
    finally:
        for name in hidden:
            if name not in ABSENT:
                del sys.modules[name]
        if collecting:
            gc.enable()
    gc.freeze()


def asked_for(name: str) -> ModuleType:
    """A package of `ABSENT`, for the setting that needs it. Raises ImportError where it is not installed."""
    if sys.modules.get(name, sys) is None:
        del sys.modules[name]
    return import_module(name)
