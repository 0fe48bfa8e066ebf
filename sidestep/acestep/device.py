"""Which device and dtype a run uses, each with the reason that is shown to the user, and how much memory there is."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sidestep.errors import UserError

GIB = 1 << 30
# Assumed, not measured here: a CUDA context with its libraries' workspaces, and what the caching allocator holds in
# pieces too small to use.
CONTEXT_BYTES = round(0.5 * GIB)
SLACK = 0.06
# Left free by all advice, whichever is more.
RESERVE_BYTES, RESERVE = round(0.8 * GIB), 0.08
SMALL_WIDTH = 64  # as the demo's model: real ones are 2048 wide and more

_c_library = ctypes.CDLL(None) if sys.platform == "linux" else None
_malloc_trim, _mallopt = (getattr(_c_library, name, None) for name in ("malloc_trim", "mallopt"))  # glibc has them
M_MMAP_THRESHOLD = -3  # as glibc's malloc.h numbers it
OWN_MAPPING_BYTES = 8 * 1024**2

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Choice:
    """A decision and its printed reason."""

    value: Any
    reason: str


@contextmanager
def threads_for(width: int) -> Iterator[None]:
    """The CPU threads that a model's hidden size is worth: a small one computes faster alone than threads meet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if width <= SMALL_WIDTH else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_device(request: str = "auto") -> Choice:
    """The torch device for `--device`. Raises UserError when what was asked for is not there.

    Each process that `torchrun` or `accelerate launch` started takes a GPU of its own, unless one is named.
    ROCm builds of torch call their device `cuda` too. cuda, mps and xpu were not run here.
    """
    kind, _, index = request.partition(":")
    countable = kind in ("cuda", "xpu") and index.isdigit()
    if kind not in ("auto", "cuda", "mps", "xpu", "cpu") or (index and not countable):
        raise UserError(f"--device {request}: no such device.", "Use auto, cuda, cuda:N, mps, xpu or cpu.")
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
        "cpu": True,
    }
    there = ", ".join(k for k, ok in available.items() if ok)
    if request == "auto":
        device = _own(there.partition(",")[0])
        missing = " or ".join(k for k, ok in available.items() if not ok)
        why = f"torch sees no graphics card ({missing})" if device.type == "cpu" else "the graphics card that is there"
        return Choice(device, f"{_name(device)}: {why}")
    if not available[kind]:
        fix = "Install a torch build for your GPU: uv --no-config pip install torch --torch-backend=auto"
        raise UserError(
            f"--device {request}: torch {torch.__version__} sees no {kind} device (available: {there}).",
            fix if kind == "cuda" else "",
        )
    if index and int(index) >= (count := torch.get_device_module(kind).device_count()):
        raise UserError(f"--device {request}: only {count} {kind} device(s) are there.", "They are counted from 0.")
    device = torch.device(request) if index else _own(kind)
    return Choice(device, f"{_name(device)}: asked for")


def _own(kind: str) -> torch.device:
    """The device of this process, by its number among those of the machine."""
    if kind not in ("cuda", "xpu") or "LOCAL_RANK" not in os.environ:
        return torch.device(kind)
    return torch.device(kind, int(os.environ["LOCAL_RANK"]) % torch.get_device_module(kind).device_count())


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, the copy beside the computation where that is safe.

    CUDA reads pageable memory before it returns and pinned memory in its own time. MPS reads pageable memory later,
    when it may be another tensor's.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({'ROCm' if torch.version.hip else 'CUDA'})"
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return {"mps": "Apple GPU", "cpu": "CPU"}[device.type]


def choose_precision(request: str, device: torch.device) -> Choice:
    """The dtype of the frozen base for `--precision`. Adapters and optimizer stay in fp32 whatever this is.

    Raises UserError for fp16 on a CPU, where its small range is had without its speed.
    """
    if request == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: not on a CPU.", "Use --precision fp32, or bf16 for half the memory.")
    if request != "auto":
        fast = "fp32" if device.type == "cpu" else "fp16"
        slow = f", though this {device.type} device has no bf16 and takes many times as long as with {fast}"
        return Choice(PRECISIONS[request], "asked for" + slow * (request == "bf16" and not has_bf16(device)))
    if device.type == "cpu":
        return Choice(torch.float32, "CPUs compute fp32 fastest and exactly")
    if not has_bf16(device):
        return Choice(torch.float16, "this GPU is older than Ampere and has no bf16")
    return Choice(torch.bfloat16, f"{device.type} devices compute in bf16, with the range of fp32")


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 itself. One that does not is slower with it: a CPU's convolution 300 times."""
    if device.type == "cpu":  # builds without oneDNN cannot tell
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return supported is None or supported()
    return device.type != "cuda" or bool(torch.version.hip) or is_ampere(device)


def is_ampere(device: torch.device) -> bool:
    """Whether an NVIDIA GPU is of the first generation with bf16 and the flash kernels, or later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def precision_name(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32, as `--precision` calls it."""
    return next(name for name, value in PRECISIONS.items() if value == dtype)


def release_memory(device: torch.device) -> None:
    """Give back the memory of models that nothing refers to any more, some of them only in circles."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Highest memory that tensors took on the device so far, None where there is no counter. Reads no device value."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return None


@dataclass(frozen=True)
class GpuMemory:
    """Bytes to plan for. source: where the number comes from. taken: what other programs hold of it."""

    bytes: int
    source: str
    taken: int = 0

    @property
    def free(self) -> int:
        """Bytes that a run can have while the other programs go on."""
        return self.bytes - self.taken

    @property
    def usable(self) -> int:
        """Bytes that advice may fill: a card reports more than it gives, and a desktop wants some of it."""
        return self.bytes - max(RESERVE_BYTES, round(RESERVE * self.bytes))


def gpu_memory(device: torch.device) -> GpuMemory | None:
    """The memory of this GPU, None where a device does not tell: CPUs, and MPS, which shares the system's.

    What this process's allocator holds is not taken by others. Asking makes this process's context. Not run here.
    """
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    taken = total - free - module.memory_reserved(device) - CONTEXT_BYTES
    return GpuMemory(total, module.get_device_name(device), max(0, taken))


def with_overhead(tensor_bytes: int) -> int:
    """Bytes a GPU needs for a peak of so many tensor bytes."""
    return round(tensor_bytes * (1 + SLACK)) + CONTEXT_BYTES


def give_back_large_buffers(device: torch.device) -> None:
    """Let every larger buffer of a CPU go back to the system as it is freed, where the C library keeps it (glibc).

    glibc keeps freed buffers of up to 32 MiB in its heap, where those that stay lie between them: a step on a song of
    240 s held 14.4 GiB of the 8.8 that its tensors took. From here on buffers of 8 MiB are mappings of their own. A
    step with such buffers takes 4 to 12 % longer. What was asked for by MALLOC_MMAP_THRESHOLD_ stays.
    """
    if device.type == "cpu" and _mallopt and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)


def give_back_memory() -> None:
    """Give the system back what was freed of the host's memory, where the C library keeps it (glibc).

    It keeps what it cannot cut off at an end of its heap, so that tiles and songs of ever other lengths leave ever more
    behind. Costs some milliseconds, and the faults of what is used again.
    """
    if _malloc_trim:
        _malloc_trim(0)
