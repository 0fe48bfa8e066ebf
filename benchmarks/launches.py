"""Kernels that a micro-step launches on a GPU, counted on a machine without one.

    uv run --group dev benchmarks/launches.py [--layers 24] [--dropout 0.1]

The step runs on the CPU under bf16 autocast, and every operation that would launch a kernel counts once: not views, not
what only looks at a tensor. An RMSNorm and our dropout are one operation in each direction, since CUDA has kernels for
them that CPUs lack. How wide the model is does not matter. "bare" is diffusers' model with peft's own LoRA.
"""

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepAttention, AceStepAttnProcessor2_0
from peft.tuners import lora

from benchmarks.gpu import SMALL, Bench, Launches, Stepper
from benchmarks.measure import Result, as_markdown
from sidestep.acestep import fused
from sidestep.adapters import layers as adapter_layers

SECONDS = 60.0  # longer than a window of the sliding attention


class CudaLaunches(Launches):
    """As `Launches`, but what is one kernel on CUDA counts once."""

    @contextmanager
    def once(self) -> Generator[None]:
        """Whatever happens inside is one kernel."""
        before = self.count
        yield
        self.count = before + 1


def count(layers: int, recompute: bool, dropout: float, bare: bool = False, seconds: float = SECONDS) -> dict[str, int]:
    """Launches of one micro-step of a LoRA of rank 64 on all attention projections: forward, backward and their sum."""
    sizes = SMALL | {"num_hidden_layers": layers}
    bench = Bench(torch.device("cpu"), {"counted": sizes}, (seconds,), 1)
    setting = "all layers recomputed" if recompute else "nothing recomputed"
    case = {"model": "counted", "setting": setting, "seconds": seconds}
    stepper = Stepper(bench, case, dropout=dropout)
    if bare:
        undo(stepper.model)
    stepper.loss().backward()
    stepper.optimizer.zero_grad(set_to_none=True)
    with CudaLaunches() as forward, counted_once(forward):
        loss = stepper.loss()
    with CudaLaunches() as backward, counted_once(backward):
        loss.backward()
    found = {"forward": forward.count, "backward": backward.count}
    return found | {"sum": sum(found.values())}


def undo(model: torch.nn.Module) -> None:
    """Give a model the classes of diffusers and peft again."""
    kinds: tuple[Any, ...] = fused.FusedNorm, fused.FusedAttention, fused.FusedBlock
    modules: Any = list(model.modules())
    for module in modules:
        if isinstance(module, kinds):
            module.__class__ = type(module).__mro__[1]
        if isinstance(module, AceStepAttention) and not module.is_cross_attention:
            # pyrefly: ignore[bad-argument-type] (a list of diffusers' own processors, without this one)
            module.set_processor(AceStepAttnProcessor2_0())
        if type(module) is adapter_layers.LowRankLinear:
            module.__class__ = lora.Linear  # pyrefly: ignore[bad-argument-type] (its own base class)


@contextmanager
def counted_once(launches: CudaLaunches) -> Generator[None]:
    """Both directions of an RMSNorm and of a dropout as one kernel each."""

    def once(direction: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            with launches.once():
                return direction(*arguments)

        return counted

    places = [
        (fused._Norm, "forward"),
        (fused._Norm, "backward"),
        (adapter_layers, "dropped"),
        (adapter_layers, "dropped_again"),
    ]
    before = [vars(owner)[name] for owner, name in places]
    for owner, name in places:
        setattr(owner, name, staticmethod(once(getattr(owner, name))))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dropout", type=float, default=0.1)
    asked = parser.parse_args()
    kinds = (("kept", False), ("recomputed", True))
    rows = [
        {"way": way, "layers": "recomputed" if recompute else "kept"}
        | count(asked.layers, recompute, asked.dropout, bare)
        for way, bare in (("ours", False), ("bare", True))
        for words, recompute in kinds
    ]
    note = (
        f"{asked.layers} layers, LoRA of rank 64, dropout {asked.dropout:g}, bf16 autocast, windows of {SECONDS:g} s."
    )
    print(as_markdown(Result("launches", "Kernels launched by a micro-step", note, rows)))


if __name__ == "__main__":
    main()
