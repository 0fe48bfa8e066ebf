"""Tensors that have a shape and no bytes, and a count of the bytes that they would take.

An `Unfilled` tensor computes on `meta` and calls itself one of the CPU: autocast, attention and the optimizer take it
through the same code as a real one, on a machine with no GPU at all. PyTorch's own fake tensors do so too; with them a
plan took twice as long to compute.
"""

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, META = torch.device("cpu"), torch.device("meta")
ALLOCATION_BYTES = 512  # what CUDA's caching allocator rounds every tensor up to
_ITEM = torch.ops.aten._local_scalar_dense.default
_ITSELF = object()  # the first argument, changed in its place
_FORMS: dict[tuple, Any] = {}  # what operations made: the form of a new tensor, or `_ITSELF`


class Unfilled(Tensor):
    """A tensor of the CPU as far as anyone can see, whose shape `meta` has."""

    meta: Tensor
    # pyrefly: ignore[bad-override]  (as torch itself says it for its own kinds of tensors)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor, requires_grad: bool = False) -> "Unfilled":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
            requires_grad=requires_grad,
        )
        tensor.meta = meta
        return tensor

    @classmethod
    # pyrefly: ignore[bad-override]  (the declared signature lacks the operation)
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on tensors without bytes, or one that makes a tensor, on `meta`.

    Blocks repeat what other blocks did: what an operation made of such arguments before, it makes again without a
    computation.
    """
    if func is _ITEM:
        return True  # LoHa draws whether a layer's adapter takes part; the peak is that of a step in which it does
    call = (func, torch.get_default_dtype(), described(args), described(tuple(kwargs.items())))
    if (form := _FORMS.get(call)) is _ITSELF:
        return args[0] if isinstance(args[0], Unfilled) else Unfilled(args[0].to(META))
    if form is not None:
        return Unfilled(of_form(form))
    given: list[Tensor] = []
    args, kwargs = on_meta(args, given), {name: on_meta(value, given) for name, value in kwargs.items()}
    if takes_device(func):
        kwargs["device"] = META
    result = unfilled(func(*args, **kwargs))
    if isinstance(result, Unfilled):
        form, storage = described(result), result.meta.untyped_storage()
        is_view = any(tensor.untyped_storage() is storage for tensor in given)
        if args and result.meta is args[0]:
            if form != call[2][0]:
                raise NotImplementedError(f"{func} gives a tensor another shape in its place.")
            _FORMS[call] = _ITSELF
        elif not is_view and of_form(form).untyped_storage().nbytes() == storage.nbytes():
            _FORMS[call] = form
    return result


def described(value: Any) -> Any:
    """What an operation's result depends on: a tensor's form (shape, strides and type), other arguments as they are."""
    if isinstance(value, Unfilled):
        return value.meta.shape, value.meta.stride(), value.meta.dtype
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple([described(each) for each in value]) if type(value) in (list, tuple) else (type(value), value)


def of_form(form: Any) -> Tensor:
    """A new tensor on `meta`."""
    shape, stride, dtype = form
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)


def on_meta(value: Any, given: list[Tensor]) -> Any:
    """An operation's argument with its tensors on `meta`, which `given` gets, too."""
    if isinstance(value, Tensor):
        given.append(value.meta if isinstance(value, Unfilled) else value.to(META))
        return given[-1]
    return type(value)(on_meta(each, given) for each in value) if type(value) in (list, tuple) else value


def unfilled(value: Any) -> Any:
    """An operation's result with unfilled tensors."""
    if isinstance(value, Tensor):
        return Unfilled(value)
    return type(value)(map(unfilled, value)) if type(value) in (list, tuple) else value


@functools.cache
def takes_device(func: Any) -> bool:
    """Whether an operation can be told where its result shall lie."""
    return any(argument.name == "device" for argument in func._schema.arguments)


def unfill(module: nn.Module) -> nn.Module:
    """Replace a module's parameters and buffers on `meta` by unfilled ones."""
    for part in module.modules():
        kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, Unfilled):
                    tensors[name] = Unfilled(tensor.detach(), tensor.requires_grad)
    return module


class LiveBytes(TorchDispatchMode):
    """While entered: `now` and `peak` bytes of the tensors that exist.

    A storage counts once, from the operation that made it until nothing holds it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation on what is there."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # in parts, as they are outside of inference mode
                return func.decompose(*args, **(kwargs or {}))
        result = self.compute(func, args, kwargs or {})
        self.count(result)
        return result

    def count(self, tensors: object) -> int:
        """Add the storages of nested tensors that are not counted yet, and return their bytes."""
        before = self.now
        for tensor in (tensors,) if isinstance(tensors, Tensor) else tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = (tensor.meta if isinstance(tensor, Unfilled) else tensor).untyped_storage()
            known = self._alive.get(id(storage))
            if known is not None and known() is storage:
                continue
            key, size = id(storage), allocated(storage.nbytes())

            def freed(_: object, key: int = key, size: int = size) -> None:
                if self._alive.pop(key, None) is not None:
                    self.now -= size

            self._alive[key] = weakref.ref(storage, freed)
            self.now += size
            self.peak = max(self.peak, self.now)
        return self.now - before


class UnfilledBytes(LiveBytes):
    """The same, while all tensors that come to be are unfilled."""

    compute = staticmethod(compute)


def allocated(nbytes: int) -> int:
    """What the device's allocator gives to a tensor of so many bytes."""
    return -(-nbytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages, each rounded up as the device's allocator does."""
    return LiveBytes().count(list(tensors))
