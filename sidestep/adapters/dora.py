"""DoRA: magnitude and direction of each row of W + alpha/r · B·A are learned apart (Liu et al. 2024)."""

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from sidestep.adapters import lora
from sidestep.adapters.targets import Targets
from sidestep.settings.config import TrainConfig


def peft_config(config: TrainConfig, targets: Targets) -> LoraConfig:
    dora = lora.peft_config(config, targets)
    dora.use_dora = True
    return dora


@torch.no_grad()
def finish(model: PeftModel, config: TrainConfig) -> None:
    """Take the magnitudes again in float32: peft takes them in the base's numbers, and in bf16 that is 0.4 % away from the identity."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.lora_magnitude_vector:
            weight = dequantize_module_weight(layer.get_base_layer())
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.weight.copy_(torch.linalg.norm(weight.to(magnitude.weight.dtype), dim=1))
