"""The host does not wait for the device in a micro-step: it reads values only when it logs."""

import gc
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from torch.utils._python_dispatch import TorchDispatchMode

from sidestep.acestep import blocks
from sidestep.events import Decision, EpochDone, StepDone
from sidestep.tasks.train import setup
from sidestep.tasks.train.loop import Metrics, optimizer_step
from sidestep.tasks.train.setup import train
from tests.training_world import Log, prepared, settings, write_data

# what makes the host wait for a device, by the operators that torch runs for it
WAITS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique_dim",
    "_unique2",
    "allclose",
}
INDEXING = {"index", "index_put", "index_put_"}  # with a mask: its count of trues must be known


class Waits(TorchDispatchMode):
    """Counts operators that bring a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS or (
            name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), frames=(30, 40, 30, 50))


def test_the_counter_sees_what_waits():
    with Waits() as waits:
        torch.ones(3).sum().item()
        bool(torch.ones(1) > 0)
        torch.ones(3)[torch.tensor([True, False, True])]
    assert len(waits.seen) >= 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter_type": "lokr"},
        {"cfg_ratio": 0.5, "ema_decay": 0.9, "batch_size": 2, "loss_weighting": "min_snr"},
        {"gradient_checkpointing": True},
    ],
    ids=["lora", "lokr", "cfg, ema, min_snr, batches", "recomputation"],
)
def test_no_optimizer_step_waits_for_the_device(data, tmp_path, monkeypatch, changes):
    config = settings(data, tmp_path, **changes)
    run = prepared(config)
    metrics, plan = Metrics(), run.plan(0)
    optimizer_step(run, plan[0], metrics)  # the optimizer makes its state in the first
    read: list[str] = []
    for name in ("tolist", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _o=original, _n=name, **k: (read.append(_n), _o(self, *a, **k))[1]
        )
    with Waits() as waits:
        optimizer_step(run, plan[1], metrics)
    assert not waits.seen
    assert not read
    assert len(metrics.read()) == 2
    assert read == ["tolist"]  # all of it in one transfer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "inductor"),
        ({"gradient_checkpointing": False}, "eager"),  # traced alike; the C++ of one case is enough
        ({"swap_blocks": 2}, "eager"),
    ],
    ids=["recomputed inside", "kept", "swapped"],
)
def test_a_compiled_run_has_the_losses_of_an_eager_one(data, tmp_path, monkeypatch, changes, backend):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(setup, "compile_layers", partial(blocks.compile_layers, backend=backend))
    losses = {}
    for name, compiled in (("eager", "off"), ("compiled", "on")):
        log = Log()
        train(
            settings(
                data, tmp_path / name, **{"compile": compiled, "dropout": 0.0, "gradient_checkpointing": True} | changes
            ),
            log,
        )
        losses[name] = [event.loss for event in log.events if isinstance(event, StepDone)]
    assert counters["stats"]["unique_graphs"]
    assert not counters["aot_autograd"]["autograd_cache_bypass"]  # torch refuses to keep none of it on disk
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_compiles_from_its_third_step_on_has_the_losses_of_an_eager_one(data, tmp_path, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(blocks, "COMPILING_SECONDS", 0)
    monkeypatch.setattr(blocks, "FASTER", {("cpu", "kept"): 1e9})
    monkeypatch.setattr(
        setup, "compile_layers", partial(blocks.compile_layers, backend="eager")
    )  # traced, not compiled
    losses = {}
    for way in ("off", "auto"):
        log = Log()
        train(settings(data, tmp_path / way, compile=way, dropout=0.0), log)
        losses[way] = [event.loss for event in log.of(StepDone)]
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-5)


@pytest.mark.parametrize(
    ("device", "layers", "left", "is_kept", "expected", "words"),
    [
        ("cpu", "kept", 10**6, False, "off", "no faster"),
        ("cpu", "recomputed", 400, False, "off", "takes about 1:40, and the steps that are left would gain 1:20"),
        ("cpu", "recomputed", 600, False, "on", "takes about 1:40, and the steps that are left would gain 2:00"),
        ("cpu", "recomputed", 100, True, "on", "from disk takes about 0:10, and the steps that are left would gain"),
        ("cuda", "kept", 800, False, "off", "gain 1:20"),
        ("cuda", "recomputed", 1200, False, "on", "gain 2:00"),
    ],
)
def test_compiling_is_weighed_against_the_steps_that_are_left(
    monkeypatch, tmp_path, device, layers, left, is_kept, expected, words
):
    monkeypatch.setattr(blocks, "COMPILING_SECONDS", 100)
    monkeypatch.setattr(blocks, "FROM_DISK_SECONDS", 10)
    monkeypatch.setattr(blocks, "FASTER", {("cpu", "kept"): 1.0, ("cpu", "recomputed"): 1.25})
    monkeypatch.setattr(blocks, "FASTER_ELSEWHERE", 10 / 9)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if is_kept:
        (tmp_path / "fxgraph" / "ab").mkdir(parents=True)
    choice = blocks.compiling_pays(left, torch.device(device), layers == "recomputed")
    assert choice.value == expected
    assert words in choice.reason


def test_compiled_code_is_kept_among_the_user_s_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    assert blocks.compiled_code() == tmp_path / "home" / "compiled"
    assert cache_dir() == str(tmp_path / "home" / "compiled")  # where torch looks
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert blocks.compiled_code() == tmp_path / "own"
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    assert str(blocks.compiled_code()) == default_cache_dir()


@pytest.mark.parametrize(
    ("changes", "faster", "expected", "recomputed"),
    [
        ({}, 1.0, "off", 0),
        ({}, 1e9, "on", 0),
        ({"gradient_checkpointing": True, "recompute_layers": 1}, 1e9, "on", 1),
        ({"max_steps": 2}, 1e9, "off", 0),
        ({"gradient_checkpointing": True, "swap_blocks": 1}, 1e9, "on", 0),
    ],
    ids=["does not pay", "pays", "pays recomputed", "nothing is left", "swapped: around the compiled code"],
)
def test_auto_decides_once(data, tmp_path, monkeypatch, changes, faster, expected, recomputed):
    calls = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(blocks, "COMPILING_SECONDS", 0)
    monkeypatch.setattr(blocks, "FASTER", {("cpu", "kept"): faster, ("cpu", "recomputed"): faster})
    monkeypatch.setattr(
        setup, "compile_layers", lambda *arguments: calls.append((log.of(StepDone)[-1].step, arguments))
    )
    log = Log()
    train(settings(data, tmp_path / "run", compile="auto", **changes), log)
    decisions = [event for event in log.of(Decision) if event.what == "compile"]
    assert [decision.value for decision in decisions] == [expected]
    assert len(log.of(StepDone)) == changes.get("max_steps", 4)
    assert [step for step, _ in calls] == ([1] if expected == "on" else [])  # in the second, before it is logged
    for _, (decoder, device, some) in calls:
        assert device == torch.device("cpu")
        assert list(some) == list(decoder.layers[:recomputed])
        own = {hook for layer in decoder.layers for hook in layer._forward_pre_hooks.values()}
        assert not any("watch_layers" in hook.__qualname__ for hook in own if hasattr(hook, "__qualname__"))


def test_auto_without_a_compiler_goes_on_uncompiled(data, tmp_path, monkeypatch):
    def refuse() -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", refuse)
    monkeypatch.setattr(blocks, "COMPILING_SECONDS", 0)
    monkeypatch.setattr(blocks, "FASTER", {("cpu", "kept"): 2.0})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    log = Log()
    train(settings(data, tmp_path / "run", compile="auto"), log)
    [decision] = [event for event in log.of(Decision) if event.what == "compile"]
    assert (decision.value, "no C++ compiler" in decision.reason) == ("off", True)
    assert len(log.of(StepDone)) == 4


@pytest.mark.slow
def test_an_epoch_leaves_no_tensor_and_next_to_no_memory_behind(tmp_path):
    """2,000 of them must not fill the machine: what is kept of each is a handful of numbers."""
    first, last = 10, 30
    held: dict[int, tuple[int, int]] = {}

    def look(event) -> None:
        if isinstance(event, EpochDone) and event.epoch in (first, last):
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            held[event.epoch] = tensors, tracemalloc.get_traced_memory()[0]

    config = settings(
        write_data(tmp_path / "data", (12,)), tmp_path / "run", epochs=last, log_every=10, save_best=False
    )
    tracemalloc.start()
    try:
        train(config, look)
    finally:
        tracemalloc.stop()
    (tensors, before), (tensors_then, then) = held[first], held[last]
    assert tensors_then <= tensors
    assert (then - before) / (last - first) < 10_000  # bytes an epoch
