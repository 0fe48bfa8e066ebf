"""LoRA that starts along the gradient: `lora_A` spans the directions that `estimate` measured, `lora_B` is zero, the base stays untouched."""

import math
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor

from sidestep.adapters.names import to_diffusers
from sidestep.errors import UserError


@torch.no_grad()
def start_along_gradient(model: PeftModel, directions: Mapping[str, Tensor]) -> int:
    """Set the first rows of every `lora_A` to a module's top right singular vectors; the number of modules that were set.

    directions: full module name (either spelling) → [k, in], orthonormal rows, strongest first. Rows beyond the k known ones keep their random start.
    The rows get the length 1/√3 that peft's random rows have on average, so learning rates carry over. Raises UserError for an adapter that is no LoRA.
    """
    known = {to_diffusers(name): rows for name, rows in directions.items()}
    count = 0
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, lora.Linear) and name in known:
            weight = module.lora_A["default"].weight
            rows = min(weight.shape[0], known[name].shape[0])
            weight[:rows] = known[name][:rows].to(weight) / math.sqrt(3)
            count += 1
    if not count:
        raise UserError("--init gradient: this adapter has no LoRA module that estimate measured.", "Use --adapter-type lora or dora, or --init default.")
    return count
