"""Unfilled tensors take the way of real ones and hold no bytes; the bytes that they would take are counted."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidestep.acestep.attention import use_attention
from sidestep.acestep.fused import fuse_layers
from sidestep.adapters.attach import attach
from sidestep.settings.config import TrainConfig
from sidestep.tasks.plan.unfilled import LiveBytes, Unfilled, UnfilledBytes, compute, unfill

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "in_channels": 48,
    "audio_acoustic_hidden_dim": 16,
    "sliding_window": 8,
    "encoder_hidden_size": 64,
}


class Seen(TorchDispatchMode):
    """Each operation with the shapes, types and strides of what it gave."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [(tuple(t.shape), t.dtype, t.stride()) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.seen.append((str(func), given))
        return result


def operations_of_a_step(counting, kind: str, attention: str, dtype: torch.dtype) -> tuple[list, LiveBytes]:
    """All operations of a step of a small model with an adapter, and the bytes it took."""
    torch.manual_seed(0)
    unfilled = isinstance(counting, UnfilledBytes)
    with torch.device("meta") if unfilled else nullcontext():
        decoder = AceStepTransformer1DModel(**TINY).to(dtype).requires_grad_(False)
        fuse_layers(decoder)
        folders = {name: Path(name) for name in ("checkpoint_dir", "dataset_dir", "output_dir")}
        model = attach(decoder, TrainConfig(rank=4, adapter_type=kind, **folders)).train()
    use_attention(decoder, attention, torch.device("cpu"), dtype)
    if unfilled:
        unfill(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with counting, Seen() as seen:
        x, t, states = torch.randn(2, 20, 16), torch.full((2,), 0.5), torch.randn(2, 7, 64, dtype=dtype)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = model(x, t, t, states, torch.cat([x, x], dim=-1), return_dict=False)[0]
            loss = (velocity.float() - x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        torch.optim.AdamW(trained, lr=1e-3, foreach=True).step()
    return seen.seen, counting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["local", "sdpa"])
@pytest.mark.parametrize("kind", ["lora", "lokr", "dora"])
def test_an_unfilled_step_runs_the_operations_of_a_real_one_and_counts_the_same_bytes(kind, attention, dtype):
    real, unfilled = (
        operations_of_a_step(counting, kind, attention, dtype) for counting in (LiveBytes(), UnfilledBytes())
    )
    assert len(real[0]) > 300
    for mine, theirs in zip(unfilled[0], real[0], strict=True):
        assert mine == theirs
    assert unfilled[1].peak == real[1].peak


def test_live_bytes_counts_a_storage_once_and_forgets_it():
    for counting in (LiveBytes(), UnfilledBytes()):
        with counting as memory:
            x = torch.empty(1000, dtype=torch.float32)
            view = x[10:]
            assert memory.now == 4096
            del x
            assert memory.now == 4096
            del view
            assert memory.now == 0
            assert memory.peak == 4096


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_what_is_changed_in_its_place_stays_the_same_tensor(mode):
    with UnfilledBytes() as memory, mode():
        x, y = torch.zeros(1000), torch.zeros(1000)
        for _ in range(2):  # computed, then remembered
            assert x.add_(1) is x
            assert torch.exp(y, out=x) is x
        assert memory.now == 2 * 4096
        with pytest.raises(NotImplementedError, match="unsqueeze_"):
            x.unsqueeze_(0)


def test_parts_of_an_operation_are_counted_in_inference_mode_too():
    peaks = []
    for counting in (LiveBytes(), UnfilledBytes()):
        with counting as memory, torch.inference_mode():
            x, y = torch.zeros(500, 1000), torch.zeros(500, dtype=torch.long)
            torch.nn.functional.cross_entropy(x, y)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1] > 2 * 4 * 500 * 1000


def test_real_tensors_and_tensors_of_terabytes_meet():
    real = torch.ones(1 << 20)
    with UnfilledBytes():
        huge = torch.empty(1 << 20, 1 << 20)
        given = [huge * real, huge * torch.tensor(0.5), *huge.split(1 << 19), huge.to("cpu", torch.bfloat16)]
    for tensor in given:
        assert isinstance(tensor, Unfilled)
        assert tensor.device == torch.device("cpu")
        assert tensor.meta.device == torch.device("meta")
    assert given[-1].dtype == torch.bfloat16
    with UnfilledBytes():
        for _ in range(2):  # a number's tensor is given as it came, which is remembered too
            assert isinstance(torch.tensor(0.5), Unfilled)


def test_what_an_operation_made_is_remembered_for_arguments_that_are_alike():
    with UnfilledBytes():
        x, counts = torch.zeros(4, 6), torch.ones(4, 6, dtype=torch.long)
        for y in (x, x.t().contiguous().t()):
            assert (y + 1).stride() == y.stride()
        assert [(counts * factor).dtype for factor in (2, 2.0)] == [torch.long, torch.float32]
        assert [x.sum(dim).shape for dim in (0, 1)] == [(6,), (4,)]
        assert [x.sum(0, dtype=dtype).dtype for dtype in (torch.float64, torch.float32)] == [
            torch.float64,
            torch.float32,
        ]
        assert (counts / 2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (counts / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_part_of_a_larger_storage_keeps_all_of_it_alive_each_time():
    class Operation:
        _schema = SimpleNamespace(arguments=())

        def __call__(self, _tensor):
            return torch.empty(100, device="meta")[:10]

    operation = Operation()
    for _ in range(2):
        part = compute(operation, (Unfilled(torch.empty(3, device="meta")),), {})
        assert part.meta.untyped_storage().nbytes() == 400
