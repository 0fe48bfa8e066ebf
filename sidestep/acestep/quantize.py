"""The frozen base in 8 or 4 bits (bitsandbytes): its big linear layers keep quantised weights, the rest its precision.

Layers are quantised one by one as their weights are read, so that a card never holds the whole model in bf16.
bitsandbytes takes a second to import and only quantised runs need it: functions ask for it.
"""

from functools import cache
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from torch import Tensor, nn

from sidestep.errors import UserError
from sidestep.imports import asked_for


def quantized_layers(decoder: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantised: all inside the transformer blocks."""
    return {
        name: module
        for name, module in decoder.named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear)
    }


def make_quantizable(decoder: nn.Module, precision: str, compute_dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers for `int8` or `nf4` in place of the blocks' linear layers, without weights.

    `quantize_weight` gives them theirs.
    """
    bitsandbytes: Any = asked_for("bitsandbytes")
    for available in (is_bnb_available, is_bnb_4bit_available):
        available.cache_clear()  # peft may have looked while it was absent
    for name, linear in quantized_layers(decoder).items():
        size = linear.in_features, linear.out_features, linear.bias is not None
        if precision == "int8":
            layer = _int8_layer()(*size, has_fp16_weights=False, device="meta")
        else:
            layer = bitsandbytes.nn.Linear4bit(
                *size, compute_dtype=compute_dtype, compress_statistics=True, quant_type="nf4", device="meta"
            )
            # or evaluation would repack the weight, its scales in bf16, and training go on with that
            layer.support_avx512bf16_for_cpu = False
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, layer)
    # by these peft knows which layers to expect
    decoder.is_loaded_in_8bit = precision == "int8"  # pyrefly: ignore[bad-argument-type] (torch takes any attribute)
    decoder.is_loaded_in_4bit = precision == "nf4"  # pyrefly: ignore[bad-argument-type]


@cache
def _int8_layer() -> Any:
    """bitsandbytes' 8-bit layer with another product."""
    bitsandbytes: Any = asked_for("bitsandbytes")

    class Int8Linear(bitsandbytes.nn.Linear8bitLt):
        """Keeps inputs as they are.

        bitsandbytes' own product rounds the inputs to 8 bits too, and holds on to them where recomputation and
        offloading do not reach.
        """

        def forward(self, x: Tensor) -> Tensor:
            if self.weight.CB is not None:  # pyrefly: ignore[missing-attribute] (an Int8Params)
                self.init_8bit_state()
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            out = _Int8Product.apply(x.to(dtype), self.state.CB, self.state.SCB)
            return out if self.bias is None else out + self.bias.to(dtype)

    return Int8Linear


class _Int8Product(torch.autograd.Function):
    """x [.., in] times the transpose of a frozen matrix [out, in], which is unpacked for the moment in both directions.

    So the gradient is that of what was computed. packed: int8 [out, in]; scales: fp32 [out], each row's largest
    magnitude.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scales)
        return nn.functional.linear(x, _unpacked(packed, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (packed, scales) = gradients, ctx.saved_tensors
        return gradient @ _unpacked(packed, scales, gradient.dtype), None, None


def _unpacked(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.to(dtype).mul_(scales[:, None] / 127)


def quantize_weight(layer: nn.Module, weight: Tensor, device: torch.device) -> None:
    """Give a layer of `make_quantizable` its weight, quantised on the device. weight: [out, in], floating, anywhere.

    Raises UserError where bitsandbytes cannot quantise on the device.
    """
    bitsandbytes: Any = asked_for("bitsandbytes")
    kinds = bitsandbytes.nn  # whose annotations know neither all arguments nor `to(device)`
    try:
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            packed = kinds.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            packed = kinds.Params4bit(
                weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            )
        layer.weight = packed.to(device)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--base-precision: bitsandbytes {bitsandbytes.__version__} cannot quantise on the {device.type} device "
            f"({error}).",
            "Leave --base-precision out, or use another --device.",
        ) from None


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer came from `make_quantizable`."""
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(layer).__mro__)


def quantized_bytes(out_features: int, in_features: int, precision: str) -> int:
    """Bytes of one quantised weight with its scales, by bitsandbytes' formats.

    int8: one byte per value and an fp32 scale per row. nf4: half a byte, an 8-bit scale per 64 values, an fp32 scale of
    those per 256, two tables.
    """
    values = out_features * in_features
    if precision == "int8":
        return values + 4 * out_features
    blocks = -(-values // 64)
    return -(-values // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256) + 4
