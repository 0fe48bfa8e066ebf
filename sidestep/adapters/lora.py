"""LoRA: W + alpha/r · B·A, with B zero at the start (Hu et al. 2021)."""

from peft import LoraConfig, PeftModel

from sidestep.adapters.targets import Targets
from sidestep.settings.config import TrainConfig


def peft_config(config: TrainConfig, targets: Targets) -> LoraConfig:
    return LoraConfig(
        r=targets.rank,
        lora_alpha=targets.alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets.names),
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
        bias="none",
    )


def finish(model: PeftModel, config: TrainConfig) -> None:
    """Nothing is left to do: peft's LoRA is used as it is."""
