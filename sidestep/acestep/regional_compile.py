"""`--compile`: the DiT's repeated layer compiled once for all layers and all lengths, with its recomputation inside the compiled code."""

from collections.abc import Iterable
from functools import partial

import torch
from diffusers import AceStepTransformer1DModel
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from sidestep.acestep.device import Choice
from sidestep.acestep.recompute import recompute, recompute_some
from sidestep.errors import UserError

GRAPHS_PER_LAYER = 6  # short or long songs, first layer or later, training or validation, with or without pad tokens in a batch


def compile_layers(decoder: AceStepTransformer1DModel, device: torch.device, recomputed: Iterable[nn.Module] = (), backend: str = "inductor") -> Choice:
    """Compile each layer for lengths that vary; the code is shared by layers of the same kind. Call it after the attention is chosen, the adapter
    attached and gradient checkpointing switched on or off. Nothing is compiled before the first step.

    recomputed: the layers to compute again in the backward pass inside the compiled code, which is faster than around it. Left empty, gradient
    checkpointing stays as it was switched on, around the compiled layers.
    Compiled code is kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), so a later run with the same model starts faster.
    Raises UserError where no compiler is found.
    """
    if backend == "inductor":
        _require_compiler(device)
    # Layers share one cache of graphs. Where ranks differ by layer each has its own, and torch would give up after eight.
    limit = GRAPHS_PER_LAYER * len(decoder.layers)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 2 * limit)
    for layer in decoder.layers:
        layer.compile(dynamic=True, backend=backend)
    if chosen := set(recomputed):
        again = torch.compile(recompute, dynamic=True, backend=backend)
        decoder.enable_gradient_checkpointing(partial(recompute_some, chosen, again))
    return Choice("on", "asked for: the first steps compile, one code for all lengths")


def _require_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if not has_triton():
            raise UserError(
                "--compile: Triton is not installed, which compiles for this GPU.", "Install it (triton, on Windows triton-windows), or leave --compile out."
            )
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("--compile: no C++ compiler was found.", "Install g++, clang or Visual Studio's Build Tools, or leave --compile out.") from None
