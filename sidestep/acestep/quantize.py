"""The frozen base in 8 or 4 bits (bitsandbytes): its big linear layers keep quantised weights, everything else its precision.

Layers are quantised one by one as their weights are read, so that a card never holds the whole model in bf16.
"""

from functools import cache

import torch
from torch import nn

from sidestep.errors import UserError

PRECISIONS = ("int8", "nf4")


def quantized_layers(decoder: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantised: all inside the transformer blocks."""
    return {
        name: module
        for name, module in decoder.named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear)
    }


def make_quantizable(decoder: nn.Module, precision: str, compute_dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers in place of the blocks' linear layers. The decoder is still on `meta`; `quantize_weight` fills them."""
    import bitsandbytes  # seconds to import, and only quantised runs need it

    for name, linear in quantized_layers(decoder).items():
        shape = {
            "input_features": linear.in_features,
            "output_features": linear.out_features,
            "bias": linear.bias is not None,
            "device": "meta",
        }
        if precision == "int8":
            new = _int8_layer()(**shape, has_fp16_weights=False)
        else:
            new = bitsandbytes.nn.Linear4bit(
                **shape, quant_type="nf4", compute_dtype=compute_dtype, compress_statistics=True
            )
            new.support_avx512bf16_for_cpu = (
                False  # or evaluation would repack the weight, its scales in bf16, and training go on with that
            )
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, new)
    decoder.is_loaded_in_8bit = precision == "int8"  # by these peft knows which layers to expect
    decoder.is_loaded_in_4bit = precision == "nf4"


@cache
def _int8_layer() -> type[nn.Linear]:
    """bitsandbytes' 8-bit layer with another product; a function, since the import is slow."""
    import bitsandbytes

    class Int8Linear(bitsandbytes.nn.Linear8bitLt):
        """bitsandbytes' own product rounds the inputs to 8 bits too, and holds on to them where recomputation and offloading do not reach."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.CB is not None:
                self.init_8bit_state()
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            out = _Int8Product.apply(x.to(dtype), self.state.CB, self.state.SCB)
            return out if self.bias is None else out + self.bias.to(dtype)

    return Int8Linear


class _Int8Product(torch.autograd.Function):
    """x [.., in] times the transpose of a frozen matrix [out, in], unpacked for the moment in both directions: the gradient is that of what was computed."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        return nn.functional.linear(x, _unpacked(packed, scales, x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ _unpacked(*ctx.saved_tensors, gradient.dtype), None, None


def _unpacked(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """packed: int8 [out, in]; scales: fp32 [out], the largest magnitude of each row."""
    return packed.to(dtype).mul_(scales[:, None] / 127)


def quantize_weight(layer: nn.Module, weight: torch.Tensor, device: torch.device) -> None:
    """Give a layer of `make_quantizable` its weight, quantised on the device. weight: [out, in], floating point, anywhere.

    Raises UserError where bitsandbytes cannot quantise on the device.
    """
    import bitsandbytes

    try:
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            layer.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(
                device
            )
        else:
            layer.weight = bitsandbytes.nn.Params4bit(
                weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            ).to(device)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--base-precision: bitsandbytes {bitsandbytes.__version__} cannot quantise on the {device.type} device ({error}).",
            "Leave --base-precision out, or use another --device.",
        ) from None


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer came from `make_quantizable`."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(layer).__mro__)


def quantized_bytes(out_features: int, in_features: int, precision: str) -> int:
    """Bytes of one quantised weight with its scales, by bitsandbytes' formats.

    int8: one byte per value and an fp32 scale per row. nf4: half a byte, an 8-bit scale per 64 values, an fp32 scale of those per 256, two tables.
    """
    values = out_features * in_features
    if precision == "int8":
        return values + 4 * out_features
    blocks = -(-values // 64)
    return -(-values // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256) + 4
