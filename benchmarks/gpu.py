"""The first hour on a GPU: exactness, memory against the planner, speed of every lever, launches, a loss that falls.

    uv run --group dev benchmarks/gpu.py                  all parts that are not stored yet, for at most 7 minutes
    uv run --group dev benchmarks/gpu.py --only memory    one part again: parity, memory, speed, launches, learning
    uv run --group dev benchmarks/gpu.py --dry-run        the same code on the CPU with a small model, in a minute

Weights are random in the real sizes and made on the device: no checkpoint, no data, no network. Rows are stored one by
one in gpu.json of `--output`, so a call that is cut off loses one row, and the next call goes on behind the last. All
rows stand as tables in gpu.md.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not as a module of the repository

import torch
from accelerate import init_empty_weights
from diffusers import AceStepTransformer1DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import ROOT, Result, Setting, as_markdown, machine, synchronize, timed
from sidestep.acestep.attention import MaskCache, flash_attention, flash_obstacle, local_attention, use_attention
from sidestep.acestep.blocks import BlockSwap, compile_layers, recompute_layers
from sidestep.acestep.checkpoint import accepted, decoder_sizes
from sidestep.acestep.device import GIB, PRECISIONS, choose_device, peak_memory_bytes, with_overhead
from sidestep.acestep.fused import fuse_layers
from sidestep.acestep.quantize import make_quantizable, quantize_weight, quantized_layers
from sidestep.adapters.attach import attach
from sidestep.data.batches import Batch
from sidestep.errors import UserError
from sidestep.files import write_text
from sidestep.flow_matching.timesteps import discrete
from sidestep.optim import make_optimizer
from sidestep.settings.config import TrainConfig
from sidestep.tasks.plan.step import Shape, StepModel
from sidestep.tasks.train.objective import ConditionMask, Objective, TrainingLaw
from sidestep.variants import CONFIG_2B, CONFIG_XL

Case = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"
CHANNELS, TOKENS, FRAMES_PER_SECOND = 64, 400, 25
SMALL = CONFIG_2B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "is_turbo": True,
}
SIZES = {"2B": CONFIG_2B | {"is_turbo": True}, "XL": CONFIG_XL | {"is_turbo": True}}
HALF = object()
# Settings beside rank 64 on attention, and how they are called in the tables.
LEVERS: dict[str, dict[str, Any]] = {
    "nothing recomputed": {"gradient_checkpointing": False},
    "all layers recomputed": {},
    "half of the layers recomputed": {"recompute_layers": HALF},
    "activations offloaded": {"offload_activations": True},
    "half of the blocks swapped": {"swap_blocks": HALF},
    "int8 base": {"base_precision": "int8"},
    "nf4 base": {"base_precision": "nf4"},
    "LoKr": {"adapter_type": "lokr"},
    "DoRA": {"adapter_type": "dora"},
    "8-bit AdamW": {"optimizer_type": "adamw8bit"},
    "fp16": {"precision": "fp16"},
    "compiled": {"compile": "on"},
}


@dataclass(frozen=True)
class Bench:
    """Where it runs. sizes: of each model by name; seconds: lengths of the windows."""

    device: torch.device
    sizes: dict[str, dict]
    seconds: tuple[float, ...]
    turns: int
    backend: str = "inductor"

    @property
    def setting(self) -> Setting:
        """As the other benchmarks know it."""
        return Setting(self.device, torch.bfloat16, self.turns, quick=False)


class Stepper:
    """A model of random weights with an adapter, its optimizer and a batch: whole optimizer steps of one micro-step."""

    def __init__(self, bench: Bench, case: Case, **changes: Any):
        sizes, self.device = bench.sizes[case["model"]], bench.device
        lever = LEVERS[case["setting"]]
        halves = {name: sizes["num_hidden_layers"] // 2 for name, value in lever.items() if value is HALF}
        place = Path()
        self.config = TrainConfig(
            checkpoint_dir=place, dataset_dir=place, output_dir=place, rank=64, alpha=128, dropout=0.0
        )
        self.config = replace(
            self.config, gradient_accumulation=1, device=str(bench.device), **lever | halves | changes
        )
        self.dtype = PRECISIONS["bf16" if self.config.precision == "auto" else self.config.precision]
        self.shape = Shape(1, round(case["seconds"] * FRAMES_PER_SECOND), TOKENS)
        swapped = self.config.swap_blocks
        decoder = random_decoder(sizes, torch.device("cpu") if swapped else bench.device, self.dtype, self.config)
        mask = ConditionMask()
        mask.install(decoder)
        self.attention = use_attention(decoder, "auto", bench.device, self.dtype).value
        if self.config.gradient_checkpointing:
            recompute_layers(decoder, self.config.recompute_layers)
        self.model = attach(decoder, self.config).train()
        if swapped:
            BlockSwap(decoder, swapped, bench.device)
        if self.config.compile == "on":
            recomputed = decoder.layers if self.config.gradient_checkpointing else ()
            compile_layers(decoder, bench.device, recomputed, bench.backend)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.config, self.trained, bench.device)
        self.scaler = torch.amp.GradScaler(bench.device.type, enabled=self.dtype == torch.float16)
        silence = torch.zeros(1, self.shape.frames, CHANNELS, device=bench.device)
        null = torch.zeros(1, 1, sizes["hidden_size"], device=bench.device, dtype=self.dtype)
        self.objective = Objective(self.config, TrainingLaw("discrete", discrete, 0.0, ""), silence, null, mask)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, self.shape.frames, CHANNELS, generator=generator)
        conditions = torch.randn(1, TOKENS, sizes["hidden_size"], generator=generator).to(self.dtype)
        self.batch = Batch(latents, conditions, None, None, ("song",), (0,)).to(bench.device)
        self.steps = 0

    def loss(self) -> Tensor:
        """The loss of the next step, ready for its backward pass."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.objective(self.model, self.batch, self.steps, 1)[0].sum()

    def step(self) -> Tensor:
        """One optimizer step; its loss, on the device."""
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.detach()


def random_decoder(sizes: dict, device: torch.device, dtype: torch.dtype, config: TrainConfig) -> Any:
    """diffusers' DiT with random weights, made on the device tensor by tensor, quantised where the config says."""
    quantised = "" if config.base_precision == "auto" else config.base_precision
    generator = torch.Generator(device).manual_seed(0)
    with init_empty_weights(include_buffers=False):
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, decoder_sizes(sizes)))
        packed = {}
        if quantised:
            make_quantizable(decoder, quantised, dtype)
            packed = quantized_layers(decoder)
    for name, module in decoder.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter.ndim == 1:
                weight = torch.ones(parameter.shape, device=device, dtype=dtype)
            else:
                width = parameter.shape[-1] ** 0.5
                weight = torch.randn(parameter.shape, device=device, dtype=dtype, generator=generator) / width
            if name in packed and leaf == "weight":
                quantize_weight(module, weight, device)
            else:
                module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    fuse_layers(decoder)
    return decoder.to(device).requires_grad_(False)


def settings(bench: Bench, names: Iterable[str], seconds: Iterable[float]) -> list[Case]:
    """A row for each model, length and setting."""
    return [{"model": m, "seconds": s, "setting": name} for m in bench.sizes for s in seconds for name in names]


def parity(bench: Bench, case: Case) -> dict[str, Any]:
    """Error of an attention or a quantised product on the device against fp32 on the CPU, both directions."""
    kind, _, what = case["what"].partition(" ")
    dtype = PRECISIONS[case["precision"]]
    return attention_error(bench, kind, dtype) if what == "attention" else product_error(bench, kind, dtype)


def attention_error(bench: Bench, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Of local or flash attention with its gradients, over 30 s of the 2B model's heads."""
    generator, window, scale = torch.Generator().manual_seed(0), 128, 128**-0.5
    inputs = [torch.randn(1, 375, heads, 128, generator=generator) for heads in (16, 8, 8)]

    def local(*x: Tensor) -> Tensor:
        return local_attention(*x, window, scale, 0.0, MaskCache())

    def flash(*x: Tensor) -> Tensor:
        return flash_attention(*x, window, scale, 0.0)

    def attended(attend: Callable, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = attend(*leaves)
        out.float().square().sum().backward()
        return [x.detach().float().cpu() for x in (out, *(leaf.grad for leaf in leaves))]

    if kind == "flash":
        layer: Any = SimpleNamespace(
            dropout=0.0, sliding_window=window, heads=16, kv_heads=8, head_dim=128, scaling=scale
        )
        if obstacle := flash_obstacle(layer, bench.device, dtype, partial(local_attention, masks=MaskCache())):
            return {"error": obstacle}
    found = attended(flash if kind == "flash" else local, dtype, bench.device)
    exact = attended(local, torch.float32, torch.device("cpu"))
    return {"error": max(relative(a, b) for a, b in zip(found, exact, strict=True))}


def product_error(bench: Bench, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Of the product with a quantised matrix, and of its gradient."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(512, 384, generator=generator) / 20, torch.randn(64, 384, generator=generator)
    host = nn.Module()
    host.layers = nn.ModuleList([nn.Linear(384, 512, bias=False, device="meta")])
    make_quantizable(host, kind, dtype)
    [layer] = host.layers
    quantize_weight(layer, weight, bench.device)

    def both(product: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        x.requires_grad_()
        out = product(x)
        out.float().sum().backward()
        assert x.grad is not None
        return [out.detach().float().cpu(), x.grad.float().cpu()]

    found = both(layer, x.to(bench.device, dtype))
    exact = both(lambda x: nn.functional.linear(x, weight), x.clone())
    return {"error": max(relative(a, b) for a, b in zip(found, exact, strict=True))}


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    return ((found - exact).norm() / exact.norm()).item()


def memory(bench: Bench, case: Case) -> dict[str, Any]:
    """The measured peak of two optimizer steps, and what the planner says: of the tensors, and of the card."""
    before = reset_peak(bench.device)
    stepper = Stepper(bench, case)
    losses = [stepper.step().item() for _ in range(2)]
    peak = peak_memory_bytes(bench.device)
    planned = StepModel(bench.sizes[case["model"]], stepper.config, stepper.shape, stepper.dtype).peak(stepper.config)
    found = {"planned GiB": planned.total / GIB, "with context and slack": with_overhead(planned.total) / GIB}
    if peak is not None:
        found |= {"measured GiB": (peak - before) / GIB, "planned over measured": planned.total / (peak - before)}
    return found | {"attention": stepper.attention, "finite": all(map(math.isfinite, losses))}


def reset_peak(device: torch.device) -> int:
    """Forget all that is unused and the peak so far; bytes still held."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def speed(bench: Bench, case: Case) -> dict[str, Any]:
    """Seconds of an optimizer step: the first one, which compiles and tunes, and the median of those after it.

    Copies that run beside the computation show as a step as long as that with all layers recomputed.
    """
    reset_peak(bench.device)
    stepper = Stepper(bench, case)
    first = timed(stepper.step, bench.setting)
    times = [timed(stepper.step, bench.setting) for _ in range(bench.turns)]
    return {"step s": statistics.median(times), "first step s": first}


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel: all but views and what only looks at a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        self.count += not func.is_view and name.startswith("aten::") and "empty" not in name and name not in LOOKS
        return result


LOOKS = ("aten::detach", "aten::_unsafe_view", "aten::_local_scalar_dense")


def launches(bench: Bench, case: Case) -> dict[str, Any]:
    """Operations of one micro-step, forward and backward; on CUDA also the kernels that the profiler saw."""
    reset_peak(bench.device)
    stepper = Stepper(bench, case)
    stepper.loss().backward()
    with Launches() as forward:
        loss = stepper.loss()
    with Launches() as backward:
        loss.backward()
    found = {"forward": forward.count, "backward": backward.count, "sum": forward.count + backward.count}
    if bench.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            stepper.loss().backward()
            synchronize(bench.device)
        found |= {"kernels": sum(event.count for event in profile.key_averages())}
    return found


def learning(bench: Bench, case: Case) -> dict[str, Any]:
    """A minute of optimizer steps on one batch: what a loss does that can be learnt by heart."""
    reset_peak(bench.device)
    stepper = Stepper(bench, case, lr=1e-3)
    until = time.perf_counter() + (60.0 if bench.device.type == "cuda" else 3.0)
    losses = []
    while time.perf_counter() < until or len(losses) < 10:
        losses.append(stepper.step())
        synchronize(bench.device)
    values = torch.stack(losses).float().cpu()
    some = max(1, len(values) // 10)
    first, last = values[:some].mean().item(), values[-some:].mean().item()
    return {"steps": len(values), "loss at first": first, "at last": last, "falls": last < first}


def cases(bench: Bench, part: str) -> list[Case]:
    """What stands at the left of each row of a part's table."""
    if part == "parity":
        products = [{"what": f"{kind} product", "precision": "bf16"} for kind in ("int8", "nf4")]
        kinds = [{"what": f"{kind} attention", "precision": p} for kind in ("local", "flash") for p in PRECISIONS]
        return kinds + products
    if part == "memory":  # what compiled code takes is not planned
        return settings(bench, [name for name in LEVERS if name != "compiled"], bench.seconds)
    if part == "speed":
        return settings(bench, LEVERS, bench.seconds)
    if part == "launches":
        counted = ("nothing recomputed", "all layers recomputed", "int8 base", "LoKr")
        return settings(bench, counted, bench.seconds[:1])
    return settings(bench, ["all layers recomputed"], bench.seconds[:1])


PARTS = {"parity": parity, "memory": memory, "speed": speed, "launches": launches, "learning": learning}


def main() -> None:
    """Run what is not stored yet, within the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="run these parts again from their first row")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a small model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which no further row is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    bench = Bench(torch.device("cpu"), {"small": SMALL}, (4.0,), 1, "eager")
    if not options.dry_run:
        sizes = {name: SIZES[name] for name in options.models}
        bench = Bench(choose_device(options.device).value, sizes, (60.0, 240.0), 5)
    until = time.perf_counter() + options.limit
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "gpu.json"
    tables = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in options.only or PARTS:
        table = tables.setdefault(part, {"rows": []})
        if options.only:
            table["rows"] = []
        table["machine"] = machine(bench.setting)
        stored = [{name: row.get(name) for name in case} for case in cases(bench, part) for row in table["rows"]]
        for case in cases(bench, part):
            if case in stored:
                continue
            if time.perf_counter() > until:
                print("Time is over; the same command goes on with the next row.")
                return
            table["rows"].append(case | measured(bench, part, case))
            print(part, table["rows"][-1], flush=True)
            write_text(path, json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
            write_text(options.output / "gpu.md", report(tables))


def measured(bench: Bench, part: str, case: Case) -> dict[str, Any]:
    """The figures of a row. What a card cannot do, or has no memory for, is said in it."""
    try:
        return PARTS[part](bench, case)
    except (torch.OutOfMemoryError, UserError) as error:
        return {"not possible": str(error).splitlines()[0][:100]}


def report(tables: dict) -> str:
    """All stored rows as tables."""
    lines = [
        "# On a GPU",
        "",
        "Rebuilt by `uv run --group dev benchmarks/gpu.py`; random weights in the real sizes.",
        "",
    ]
    for part, table in tables.items():
        facts = table["machine"]
        what = (PARTS[part].__doc__ or "").splitlines()[0]
        note = f"{what} {facts['device']}, torch {facts['versions']['torch']}."
        lines.append(as_markdown(Result(part, part.capitalize(), note, table["rows"])))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
