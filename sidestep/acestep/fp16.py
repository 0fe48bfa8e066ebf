"""fp16 ends at 65,504: which parts are computed in fp32 instead, and which module left that range.

On trained weights the last product of the lyric encoder's MLPs reaches about 505,000. So the parts that run once for a
song (text encoder, condition encoder, tokenizer and detokenizer of hints) are in fp32 where the run is in fp16; they
are small beside the DiT, and never there together with it. The DiT itself, which runs in every step, is in fp16 and
watched.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sidestep.errors import JobError


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a part that runs once for a song computes."""
    return torch.float32 if dtype == torch.float16 else dtype


@contextmanager
def name_what_overflows(model: nn.Module) -> Generator[None]:
    """While entered the model's modules are looked at; at the end the device is asked, once.

    Raises JobError with the name of the first module whose result is no number though its inputs are, or, where a sum
    between two modules is none, of the one that was given it. What comes into the model is not its fault.
    """
    names: list[str] = []
    finite: list[Tensor] = []

    def note(name: str, tensors: object) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                names.append(name)
                finite.append(torch.isfinite(tensor.detach()).all())

    def look(name: str, module: nn.Module) -> list:
        before = module.register_forward_pre_hook(lambda _, given: note(f"what {name} is given", given))
        return [before, module.register_forward_hook(lambda _, _given, result: note(f"the result of {name}", result))]

    hooks = [hook for name, module in model.named_modules() if name for hook in look(name, module)]
    hooks.append(model.register_forward_pre_hook(lambda _, args, kwargs: note("", (args, kwargs)), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    told = torch.stack(finite).tolist() if finite else []
    if name := next((name for name, is_finite in zip(names, told, strict=True) if not is_finite), ""):
        raise JobError(
            f"fp16 ends at 65,504, and {name} is beyond: nothing can be computed with this model in fp16.",
            "Use --precision fp32; where memory is short, with --base-precision int8.",
        )
