"""The frozen base in 8 or 4 bits (bitsandbytes): its big linear layers keep quantised weights, everything else its precision.

Layers are quantised one by one as their weights are read, so that a card never holds the whole model in bf16.
"""

import torch
from torch import nn

from sidestep.errors import UserError

PRECISIONS = ("int8", "nf4")


def quantized_layers(decoder: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantised: all inside the transformer blocks."""
    return {name: module for name, module in decoder.named_modules() if name.startswith("layers.") and isinstance(module, nn.Linear)}


def make_quantizable(decoder: nn.Module, precision: str, compute_dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers in place of the blocks' linear layers. The decoder is still on `meta`; `quantize_weight` fills them."""
    import bitsandbytes  # seconds to import, and only quantised runs need it

    for name, linear in quantized_layers(decoder).items():
        shape = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": linear.bias is not None, "device": "meta"}
        if precision == "int8":
            new = bitsandbytes.nn.Linear8bitLt(**shape, has_fp16_weights=False)
        else:
            new = bitsandbytes.nn.Linear4bit(**shape, quant_type="nf4", compute_dtype=compute_dtype, compress_statistics=True)
            new.support_avx512bf16_for_cpu = False  # or evaluation would repack the weight, its scales in bf16, and training go on with that
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, new)
    decoder.is_loaded_in_8bit = precision == "int8"  # by these peft knows which layers to expect
    decoder.is_loaded_in_4bit = precision == "nf4"


def quantize_weight(layer: nn.Module, weight: torch.Tensor, device: torch.device) -> None:
    """Give a layer of `make_quantizable` its weight, quantised on the device. weight: [out, in], floating point, anywhere.

    Raises UserError where bitsandbytes cannot quantise on the device.
    """
    import bitsandbytes

    try:
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            layer.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        else:
            layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer).to(device)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--base-precision: bitsandbytes {bitsandbytes.__version__} cannot quantise on the {device.type} device ({error}).",
            "Leave --base-precision out, or use another --device.",
        ) from None


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer came from `make_quantizable`."""
    return type(layer).__module__.startswith("bitsandbytes.")


def quantized_bytes(out_features: int, in_features: int, precision: str) -> int:
    """Bytes of one quantised weight with its scales, by bitsandbytes' formats.

    int8: one byte per value and an fp32 scale per row. nf4: half a byte, an 8-bit scale per 64 values, an fp32 scale of those per 256, two tables.
    """
    values = out_features * in_features
    if precision == "int8":
        return values + 4 * out_features
    blocks = -(-values // 64)
    return -(-values // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256) + 4
