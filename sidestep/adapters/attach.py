"""Attach an adapter to the frozen decoder, and its trained tensors as a plain dictionary.

LoRA that starts along the gradient: `lora_A` spans the directions that `estimate` measured, `lora_B` is zero, the base stays untouched.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import lora as peft_lora
from torch import Tensor, nn

from sidestep.adapters import dora, loha, lokr, lora, oft
from sidestep.adapters.names import to_diffusers
from sidestep.adapters.targets import targets_of
from sidestep.errors import JobError, UserError
from sidestep.settings.config import TrainConfig

KINDS = {"lora": lora, "dora": dora, "lokr": lokr, "loha": loha, "oft": oft}


def attach(decoder: nn.Module, config: TrainConfig, rank_map: Mapping[str, Any] | None = None) -> PeftModel:
    """The decoder with an adapter of `config.adapter_type`: float32 trainable weights on a frozen base, the identity at the start.

    rank_map: see `targets.targets_of`. The decoder is changed in place. Raises UserError for settings that do not fit the model.
    """
    kind = KINDS[config.adapter_type]
    targets = targets_of(decoder, config, rank_map)
    layers = {name: decoder.get_submodule(name) for name in targets.names}
    if kind is oft:
        oft.check(config, {name: layer.in_features for name, layer in layers.items()})
    if kind is lokr:
        lokr.check(config, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    decoder.requires_grad_(False)
    model = get_peft_model(decoder, kind.peft_config(config, targets), autocast_adapter_dtype=True)
    kind.finish(model, config)
    return model


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names, detached but not copied: what a checkpoint holds and `load_adapter_state` takes."""
    return {
        name: tensor.detach() for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Put tensors of `adapter_state` into a model with the same adapter.

    Raises JobError, with the model untouched, unless names and shapes are exactly those of the model: a tensor that finds no place is
    training that is silently lost.
    """
    own = adapter_state(model)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    misshapen = sorted(name for name in set(own) & set(state) if own[name].shape != state[name].shape)
    for names, what in (
        (missing, "are missing from"),
        (unexpected, "have no place in the model, of"),
        (misshapen, "have another shape in"),
    ):
        if names:
            raise JobError(
                f"{len(names)} of {len(own)} adapter tensors {what} the saved adapter, such as {names[0]}.",
                "It was saved with other adapter settings (type, rank, targets or rank map): use the settings of that run.",
            )
    result = set_peft_model_state_dict(model, dict(state))
    if result.unexpected_keys:
        raise JobError(
            f"{len(result.unexpected_keys)} adapter tensors were not loaded, such as {result.unexpected_keys[0]}."
        )


@torch.no_grad()
def start_along_gradient(model: PeftModel, directions: Mapping[str, Tensor]) -> int:
    """Set the first rows of every `lora_A` to a module's top right singular vectors; the number of modules that were set.

    directions: full module name (either spelling) → [k, in], orthonormal rows, strongest first. Rows beyond the k known ones keep their random start.
    The rows get the length 1/√3 that peft's random rows have on average, so learning rates carry over. Raises UserError for an adapter that is no LoRA.
    """
    known = {to_diffusers(name): rows for name, rows in directions.items()}
    count = 0
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft_lora.Linear) and name in known:
            weight = module.lora_A["default"].weight
            rows = min(weight.shape[0], known[name].shape[0])
            weight[:rows] = known[name][:rows].to(weight) / math.sqrt(3)
            count += 1
    if not count:
        raise UserError(
            "--init gradient: this adapter has no LoRA module that estimate measured.",
            "Use --adapter-type lora or dora, or --init default.",
        )
    return count
