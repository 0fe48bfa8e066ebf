"""OFT: W·R with R orthogonal and block-diagonal, the identity at the start (Qiu et al. 2023). `--rank` is the size of a block."""

import math

import torch
from peft import OFTConfig, PeftModel
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor

from sidestep.adapters.targets import Targets
from sidestep.errors import UserError
from sidestep.settings.config import TrainConfig


def peft_config(config: TrainConfig, targets: Targets) -> OFTConfig:
    if targets.ranks_differ:
        raise UserError(
            "--adapter-type oft has one block size for all modules; the rank map asks for different ones.",
            "Use --adapter-type lora, dora, lokr or loha, or train without the map: --ignore-rank-map",
        )
    return OFTConfig(oft_block_size=targets.rank, target_modules=list(targets.names))


def check(config: TrainConfig, widths: dict[str, int]) -> None:
    """Refuse a block size that does not divide a module's input width; peft would take another one for that module."""
    for name, width in widths.items():
        if width % config.rank:
            fitting = math.gcd(*widths.values())
            sizes = [d for d in range(2, fitting + 1) if fitting % d == 0]
            nearest = min(sizes, key=lambda d: abs(d - config.rank), default=1)
            raise UserError(
                f"--rank {config.rank}: with --adapter-type oft it is the block size and must divide the input width of every module; {name} has {width}.",
                f"The nearest that fits is --rank {nearest}",
            )


def finish(model: PeftModel, config: TrainConfig) -> None:
    """Give peft's rotations a dropout: peft declares one and never applies it."""
    for module in model.modules():
        if isinstance(module, OFTRotationModule):
            module.__class__ = Rotation  # the same parameters
            module.block_dropout = config.dropout


class Rotation(OFTRotationModule):
    """peft's block-diagonal rotation; in training each block is the identity with probability `block_dropout`."""

    block_dropout = 0.0

    def _cayley_batch(self, Q: Tensor, *args, **kwargs) -> Tensor:
        rotations = super()._cayley_batch(Q, *args, **kwargs)
        if not self.training or not self.block_dropout:
            return rotations
        keep = torch.rand(len(rotations), 1, 1, device=rotations.device) >= self.block_dropout
        return torch.where(
            keep, rotations, torch.eye(rotations.shape[-1], device=rotations.device, dtype=rotations.dtype)
        )
