"""Start an adapter from one that was trained before, whatever program wrote it."""

import torch
from peft import PeftModel
from torch import Tensor

from sidestep.adapters.adapter import Adapter
from sidestep.adapters.attach import adapter_state, load_adapter_state
from sidestep.adapters.keys import parse_key
from sidestep.adapters.names import to_diffusers
from sidestep.config import TrainConfig
from sidestep.errors import UserError

CARRIERS = ("lora_B", "lokr_w1", "lokr_w1_b", "hada_w1_b")  # the factor that alpha/r is folded into
KIND_OF_TYPE = {"lora": "lora", "dora": "lora", "lokr": "lokr", "loha": "loha", "oft": "oft"}


@torch.no_grad()
def start_from(model: PeftModel, adapter: Adapter, config: TrainConfig) -> int:
    """Give the model's adapter the change that `adapter` makes; the number of modules that were set.

    A LoRA of lower rank fills the first rows and leaves the others at their start, which adds nothing. Modules that only the model has stay the
    identity. Raises UserError when kinds or shapes differ, or the model lacks a module: that training would silently be lost.
    """
    where = f"--init-from {config.init_from}"
    with_magnitudes = config.adapter_type == "dora" or config.lokr_weight_decompose
    if KIND_OF_TYPE[config.adapter_type] != adapter.kind or with_magnitudes != adapter.has_magnitudes:
        raise UserError(f"{where}: holds a {adapter.title}, this run trains --adapter-type {config.adapter_type}.", "Train the same kind of adapter.")
    state = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    keys = {parse_key(key): key for key in state}
    layers = dict(model.named_modules())
    present = {name for name, _ in keys}
    absent = [name for name in adapter.modules if name not in present]
    if absent:
        raise UserError(
            f"{where}: adapts {len(absent)} modules that this run does not, such as {absent[0]}.",
            "Choose --target-modules, --attention-type and --target-mlp so that all of them are trained.",
        )
    for name, factors in adapter.modules.items():
        layer = layers[f"base_model.model.{to_diffusers(name)}"]
        carrier = next((c for c in CARRIERS if c in factors), None)
        for factor, tensor in factors.items():
            key = keys.get((name, factor))
            if key is None:
                raise UserError(
                    f"{where}: the {adapter.title} of {name} is split in another way than this run's.", "Use the same --rank and --lokr-… settings."
                )
            value = tensor.float() / layer.scaling["default"] if factor == carrier else tensor.float()
            state[key] = _fitted(value, state[key], factor, f"{where}: {name}.{factor}")
    load_adapter_state(model, state)
    return len(adapter.modules)


def _fitted(value: Tensor, own: Tensor, factor: str, what: str) -> Tensor:
    """`value` in the shape of `own`; a LoRA of lower rank is filled up so that its product stays what it was."""
    if value.shape == own.shape:
        return value
    rank_axis = {"lora_A": 0, "lora_B": 1}.get(factor)
    grown = rank_axis is not None and value.shape[rank_axis] < own.shape[rank_axis] and value.shape[1 - rank_axis] == own.shape[1 - rank_axis]
    if not grown:
        hint = f"Use --rank {value.shape[rank_axis]} or more." if rank_axis is not None else "Use the settings it was trained with."
        raise UserError(f"{what} has shape {list(value.shape)}, this run's {list(own.shape)}.", hint)
    filled = own.clone() if factor == "lora_A" else torch.zeros_like(own)
    filled.narrow(rank_axis, 0, value.shape[rank_axis]).copy_(value)
    return filled
