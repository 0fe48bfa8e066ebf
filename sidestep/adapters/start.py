"""Begin a run from an adapter that is already there: `--init-from`."""

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from sidestep.adapters.adapter import MAGNITUDE, Adapter, scaled
from sidestep.adapters.attach import adapter_state, load_adapter_state
from sidestep.adapters.export import adapter_of
from sidestep.adapters.keys import parse_key
from sidestep.adapters.names import to_diffusers
from sidestep.adapters.read import read_adapter
from sidestep.errors import UserError


def start_from(model: PeftModel, path: Path) -> Adapter:
    """Give a freshly attached adapter the change of the one at `path`, written by any program; returns what was read.

    The scale is converted, so alpha may differ. A LoRA of a lower rank is extended: its change stays, the new ranks begin at zero.
    Modules that the file leaves out begin as the identity. Raises UserError where the two do not fit.
    """
    found = read_adapter(path)
    own = adapter_of(model)
    where = f"--init-from {path}"
    if (found.kind, found.has_magnitudes) != (own.kind, own.has_magnitudes):
        kinds = {"LoRA": "lora", "DoRA": "dora", "LoKr": "lokr", "LoHa": "loha", "OFT": "oft", "weight-decomposed LoKr": "lokr --lokr-weight-decompose"}
        raise UserError(f"{where}: holds a {found.title}, the run trains a {own.title}.", f"Add --adapter-type {kinds.get(found.title, found.kind)}")
    strangers = [name for name in found.modules if name not in own.modules]
    if strangers:
        raise UserError(
            f"{where}: adapts {len(strangers)} modules that this run leaves alone, such as {strangers[0]}; what it learned there would be lost.",
            "Choose the same targets: --target-modules, --attention-type, --target-mlp, or --ignore-rank-map",
        )
    state = dict(adapter_state(model))
    names = {parse_key(key): key for key in state}
    layers = dict(model.named_modules())
    for name, factors in found.modules.items():
        layer = layers[f"base_model.model.{to_diffusers(name)}"]
        if found.kind != "oft":
            factors = scaled(factors, 1 / layer.scaling["default"])
        for factor, tensor in factors.items():
            key = names.get((name, factor))
            if key is None:
                raise UserError(f"{where}: {name} is factored otherwise than in this run.", "Use its --rank, --lokr-factor and --lokr-decompose-both")
            state[key] = _fitted(tensor, state[key], factor, name, where)
    load_adapter_state(model, state)
    return replace(found, placeholder=None)


def _fitted(tensor: Tensor, own: Tensor, factor: str, name: str, where: str) -> Tensor:
    tensor = tensor.to(own.device, own.dtype)
    if tensor.shape == own.shape:
        return tensor
    axis = {"lora_A": 0, "lora_B": 1}.get(factor)
    if axis is not None and tensor.shape[1 - axis] == own.shape[1 - axis]:
        have, want = tensor.shape[axis], own.shape[axis]
        if have > want:
            raise UserError(f"{where}: {name} has rank {have}, more than the run's {want}.", f"Add --rank {have}")
        rest = own.narrow(axis, have, want - have)
        return torch.cat([tensor, rest if factor == "lora_A" else torch.zeros_like(rest)], dim=axis)
    what = "magnitudes" if factor == MAGNITUDE else factor
    raise UserError(
        f"{where}: {what} of {name} has shape {list(tensor.shape)}, this run's has {list(own.shape)}.",
        "Use the --rank (LoKr: --lokr-factor too) and the model variant it was trained with.",
    )
