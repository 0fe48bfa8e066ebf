"""Models with shapes and no bytes: built on `meta`, then given fake tensors that behave like the CPU's.

Fake CPU tensors take autocast, attention and optimizer kernels through the same code as real ones, on a machine with no GPU at all.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def fake_mode() -> FakeTensorMode:
    """The mode in which fake tensors compute; numbers such as seeds may stay real."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(module: nn.Module) -> nn.Module:
    """Replace a module's `meta` parameters and buffers by fake CPU tensors. Call it inside `fake_mode()`."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    tensors[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if tensors is part._parameters else fake
    return module


class Unpacked(nn.Module):
    """A frozen linear layer whose weight is unpacked while it computes, as that of a quantised base is, in both directions."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Unpack.apply(x, self.out_features, self.dtype)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.shape, ctx.dtype = (out_features, x.shape[-1]), dtype
        return nn.functional.linear(x.to(dtype), torch.empty(ctx.shape, dtype=dtype, device=x.device))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.to(ctx.dtype) @ torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device), None, None


def unpack_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Put `Unpacked` where a quantised base has its packed weights: below the adapters, or bare. The packed weights themselves are not there to be counted."""
    names = [
        name for name, m in model.named_modules() if ".layers." in f".{name}" and isinstance(m, nn.Linear) and not any(p.requires_grad for p in m.parameters())
    ]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, Unpacked(linear.out_features, linear.in_features, dtype))
