"""The host does not wait for the device in a micro-step: it reads values only when it logs."""

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sidestep.events import EpochDone, StepDone
from sidestep.tasks.train import train
from sidestep.tasks.train.loop import Metrics, optimizer_step
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
    "changes", [{}, {"gradient_checkpointing": False}, {"swap_blocks": 2}], ids=["recomputed inside", "kept", "swapped"]
)
def test_a_compiled_run_has_the_losses_of_an_eager_one(data, tmp_path, changes):
    losses = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        log = Log()
        train(
            settings(
                data, tmp_path / name, **{"compile": compiled, "dropout": 0.0, "gradient_checkpointing": True} | changes
            ),
            log,
        )
        losses[name] = [event.loss for event in log.events if isinstance(event, StepDone)]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-5)


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
