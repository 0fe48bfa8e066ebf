"""Devices that are not at hand: which one is asked, its memory, in which dtype and order things go there."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sidestep.acestep import device
from sidestep.acestep.attention import takes_grouped_heads
from sidestep.acestep.device import CONTEXT_BYTES, GIB, choose_device, choose_precision, gpu_memory, to_device
from sidestep.acestep.streams import CopyStream, PinnedMemory, aligned
from sidestep.data.batches import Batch
from sidestep.events import null
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train.setup import open_accelerator

ROOT = Path(__file__).parents[2]

CARDS = {0: (6 * GIB, 8 * GIB, (7, 5)), 1: (10 * GIB, 24 * GIB, (8, 9))}


@pytest.fixture(params=["cuda", "xpu"])
def cards(request, monkeypatch) -> str:
    """Two GPUs of a kind: an old one with 8 GiB and a newer one with 24, of each some taken by other programs."""
    kind, module = request.param, torch.get_device_module(request.param)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: len(CARDS))
    monkeypatch.setattr(module, "mem_get_info", lambda device: CARDS[device.index or 0][:2])
    monkeypatch.setattr(module, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(module, "get_device_name", lambda device: f"card {device.index or 0}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[device.index or 0][2])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return kind


def test_the_memory_asked_for_is_that_of_the_card_that_was_named(cards):
    for index, (free, total, _) in CARDS.items():
        memory = gpu_memory(choose_device(f"{cards}:{index}").value)
        assert memory is not None
        assert (memory.bytes, memory.source) == (total, f"card {index}")
        assert memory.taken == total - free - GIB - CONTEXT_BYTES, "what this process holds is not taken by others"


def test_a_cpu_and_mps_tell_no_memory():
    assert gpu_memory(torch.device("cpu")) is None
    assert gpu_memory(torch.device("mps")) is None


def test_each_process_of_a_machine_takes_a_card_of_its_own_unless_one_is_named(cards, monkeypatch):
    taken = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        taken.append(choose_device(cards).value.index)
        assert choose_device(f"{cards}:0").value.index == 0
    assert taken == [0, 1, 0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto").value == torch.device(cards, 1)


@pytest.mark.parametrize(("index", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_the_precision_is_that_of_the_card_that_was_named(cards, index, dtype, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    if cards == "cuda":
        assert choose_precision("auto", torch.device("cuda", index)).value == dtype


def test_amds_cards_compute_in_bf16_whatever_number_they_have(cards, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_precision("auto", torch.device(cards, 0)).value == torch.bfloat16


@pytest.mark.parametrize("has_units", [True, False])
def test_bf16_is_warned_of_where_the_processor_has_no_units_for_it(has_units, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_units)
    choice = choose_precision("bf16", torch.device("cpu"))
    assert choice.value == torch.bfloat16
    assert ("many times as long as with fp32" in choice.reason) is not has_units
    assert choose_precision("fp32", torch.device("cpu")).reason == "asked for"


def test_bf16_is_warned_of_on_old_cards_only(cards, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    warned = ["as long as with fp16" in choose_precision("bf16", torch.device(cards, n)).reason for n in (0, 1)]
    assert warned == [cards == "cuda", False]


def test_a_processor_that_cannot_tell_is_not_warned_of(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert choose_precision("bf16", torch.device("cpu")).reason == "asked for"


@pytest.mark.parametrize(("kind", "waits"), [("cuda", False), ("mps", True), ("xpu", True), ("cpu", True)])
def test_only_cuda_reads_memory_of_the_host_in_its_own_time(kind, waits, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking=False: seen.append(non_blocking) or x)
    to_device(torch.zeros(3), torch.device(kind))
    Batch(torch.zeros(3), torch.zeros(3), None, None, ("a",), (0,)).to(torch.device(kind))
    assert seen == [not waits] * 3


@pytest.mark.parametrize(
    ("kind", "dtype", "index", "takes"),
    [
        ("cuda", torch.bfloat16, 1, True),
        ("cuda", torch.float16, 1, True),
        ("cuda", torch.float32, 1, False),
        ("cuda", torch.float16, 0, False),
        ("cpu", torch.float32, None, True),
    ],
)
def test_fewer_key_heads_are_left_to_the_flash_kernel_alone(monkeypatch, kind, dtype, index, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[device.index][2])
    assert takes_grouped_heads(torch.device(kind, index) if index is not None else torch.device(kind), dtype) is takes


class Queue:
    """A stand-in for a queue of CUDA's, which writes down what is asked of it."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def wait_stream(self, other: "Queue") -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.calls.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"the event of {self.name}"


def test_copies_begin_after_what_is_computed_and_are_waited_for(monkeypatch):
    calls: list[str] = []
    main, copies = Queue("main", calls), Queue("copies", calls)

    @contextmanager
    def entered(queue):
        calls.append(f"in {queue.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: calls.append(f"copy {non_blocking}") or x)
    stream = CopyStream(torch.device("cuda", 0))
    _, done = stream.copy([torch.zeros(1), torch.zeros(1)])
    stream.wait_for(done)
    copied = ["copies waits for main", "in copies", "copy True", "copy True"]
    assert calls == [*copied, "main waits for the event of copies"]


def test_tensors_are_packed_into_chunks_of_pinned_memory():
    tensors = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16) for n in (5, 40, 7, 90)]
    tensors.append(torch.arange(3, dtype=torch.int64))
    memory = PinnedMemory(sum(aligned(tensor.nbytes) for tensor in tensors), chunk_bytes=512, pin=False)
    packed = [memory.put(tensor) for tensor in tensors]
    for ours, tensor in zip(packed, tensors, strict=True):
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)
        assert ours.data_ptr() % 8 == 0
    chunks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in packed}
    assert list(chunks.values()) == [512, 540, 64], "a tensor larger than a chunk has one of its own"
    packed[0].zero_()
    assert torch.equal(packed[1], tensors[1])


def test_an_xl_models_blocks_take_hardly_more_pinned_memory_than_their_bytes():
    """The real sizes, on tensors without bytes; each request rounded up to a power of two, as CUDA's allocator does."""
    requests = []
    with FakeTensorMode():
        empty = torch.empty

        def recorded(*size, **options):
            requests.append(size[0])
            return empty(*size, **options)

        sizes = [(2560, 4096), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)] * 32
        weights = [torch.empty(*size, dtype=torch.bfloat16) for size in sizes]
        total = sum(aligned(weight.nbytes) for weight in weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", recorded)
            memory = PinnedMemory(total, pin=False)
            for weight in weights:
                memory.put(weight)

    def rounded(nbytes: int) -> int:
        return 1 << (nbytes - 1).bit_length()

    one_by_one = sum(rounded(weight.nbytes) for weight in weights)
    packed = sum(rounded(nbytes) for nbytes in requests if nbytes)
    assert packed <= 1.2 * total
    assert packed < 0.8 * one_by_one


HELD = """
import psutil, sys, torch
from sidestep.acestep import device
asked, on, size = sys.argv[1:]
if asked == "asked":
    device.give_back_large_buffers(torch.device(on))
MIB = 1024**2
ones = lambda mib: torch.ones(mib * MIB, dtype=torch.uint8)
del (first := {0: ones(16)})[0]  # glibc keeps in its heap what is no larger than the largest mapping freed so far
before = psutil.Process().memory_info().rss
large, small = zip(*((ones(int(size)), ones(1)) for _ in range(20)))
del large
print((psutil.Process().memory_info().rss - before) // MIB)
"""


@pytest.mark.slow
@pytest.mark.skipif(device._mallopt is None, reason="glibc keeps what was freed, and has mallopt")
def test_large_buffers_of_a_cpu_go_back_to_the_system_as_they_are_freed():
    def held(*how, size=16, **more):
        own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        own |= {"THP_MEM_ALLOC_ENABLE": "0"} | more  # the same whether a test before has run the command line
        done = subprocess.run(
            [sys.executable, "-c", HELD, *how, str(size)], capture_output=True, text=True, cwd=ROOT, env=own, check=True
        )
        return int(done.stdout)

    assert held("asked", "cpu") < 60
    assert held("asked", "cpu", THP_MEM_ALLOC_ENABLE="1") < 60
    assert held("not asked", "cpu") > 280
    assert held("asked", "cpu", size=4) > 70  # small ones cost more than they leave
    assert held("asked", "cuda") > 280
    assert held("asked", "cpu", MALLOC_MMAP_THRESHOLD_=str(32 * 1024**2)) > 280


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize(("asked", "left"), [({}, 0), ({"THP_MEM_ALLOC_ENABLE": "0"}, 64)])
def test_the_command_line_has_large_tensors_in_large_pages_unless_it_is_told_otherwise(asked, left):
    """PyTorch lets those begin at a page that it asks to be large, all others at a multiple of 64 bytes."""
    code = """
from sidestep.cli.main import main
main(["presets", "show", "recommended"])
import os, torch
print(torch.empty(16 * 1024**2).data_ptr() % os.sysconf('SC_PAGESIZE'))
"""
    own = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | asked
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=own, check=True)
    assert int(done.stdout.split()[-1]) == left


def test_every_run_asks_for_that(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("sidestep.tasks.train.setup.give_back_large_buffers", asked.append)
    open_accelerator(
        TrainConfig(checkpoint_dir=tmp_path, dataset_dir=tmp_path, output_dir=tmp_path, device="cpu"), null
    )
    assert asked == [torch.device("cpu")]
