"""LoHa: W + alpha/r · (W1a·W1b) ∘ (W2a·W2b), the Hadamard product of two low-rank matrices (Yeh et al. 2023), as peft builds it."""

import torch.nn.functional as F
from peft import LoHaConfig, PeftModel
from peft.tuners import loha
from torch import Tensor

from sidestep.adapters.targets import Targets
from sidestep.errors import UserError
from sidestep.settings.config import TrainConfig


def peft_config(config: TrainConfig, targets: Targets) -> LoHaConfig:
    return LoHaConfig(
        r=targets.rank,
        alpha=targets.alpha,
        target_modules=list(targets.names),
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
    )


def finish(model: PeftModel, config: TrainConfig) -> None:
    """Give peft's layers LoRA's kind of dropout; refuse packed weights, whose shape peft would give to the change."""
    for name, layer in model.named_modules():
        if isinstance(layer, loha.Linear):
            weight = layer.get_base_layer().weight
            if weight.shape != (layer.out_features, layer.in_features):
                raise UserError(
                    f"--adapter-type loha cannot be used on a 4-bit base: {name.removeprefix('base_model.model.')} has packed weights.",
                    "Use --adapter-type lora or lokr, or train on an unquantised base.",
                )
            layer.__class__ = HadamardLinear  # the same parameters, another dropout
            layer.input_dropout = config.dropout


class HadamardLinear(loha.Linear):
    """peft's LoHa on a Linear, with dropout on the adapter's input: peft's own draws on the CPU, which would stop the GPU's queue."""

    input_dropout = 0.0

    def _get_delta_activations(self, adapter_name: str, x: Tensor, *args, **kwargs) -> Tensor:
        weight = self.get_delta_weight(adapter_name)
        return F.linear(F.dropout(self._cast_input_dtype(x, weight.dtype), self.input_dropout, self.training), weight)
