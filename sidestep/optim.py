"""Optimizers and learning-rate schedules by name; all of them from libraries."""

from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO

import torch
from torch.optim import Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sidestep.errors import UserError
from sidestep.imports import asked_for
from sidestep.settings.config import TrainConfig

SCHEDULER_NAMES = {"cosine_restarts": "cosine_with_restarts"}
RESTARTS = 4
FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
# Prodigy's lr multiplies a step size that it finds by itself; far from 1 it is most likely meant for another optimizer.
PRODIGY_LR = (0.1, 10.0)
SMALL_TENSOR = 4096  # bitsandbytes keeps fp32 states for tensors of fewer values
STATE_BLOCK = 256  # values that share a scale in its 8-bit states


def make_optimizer(config: TrainConfig, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> Optimizer:
    """The optimizer of `--optimizer-type`. Raises UserError where the device cannot run it; none takes its place."""
    parameters = list(parameters)
    # Decay pulls towards zero, which is no change for a factor; for DoRA's magnitudes it would be silence.
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups: list[dict] = [{"params": matrices}] if matrices else []
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    if config.optimizer_type == "adamw":
        return AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=device.type in FUSED_DEVICES)
    if config.optimizer_type == "adafactor":
        # Its step is scaled by the size of the parameter, at least eps2. An adapter starts at zero and stays small, so
        # that with the default of 1e-3 nothing is learnt; with 1 the step is --lr times the normalised gradient.
        return Adafactor(groups, lr=config.lr, weight_decay=config.weight_decay, eps=(None, 1.0))
    if config.optimizer_type == "prodigy":
        from prodigyopt import Prodigy  # its import prints nothing and costs nothing, but few runs need it

        with redirect_stdout(StringIO()):  # it prints how it decays weights
            return Prodigy(
                groups,
                lr=config.lr,
                weight_decay=config.weight_decay,
                use_bias_correction=True,
                safeguard_warmup=True,
            )

    bitsandbytes = asked_for("bitsandbytes")
    make = bitsandbytes.optim.AdamW8bit
    probe = torch.nn.Parameter(torch.zeros(1, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        make([probe], min_8bit_size=1).step()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--optimizer-type adamw8bit: bitsandbytes {bitsandbytes.__version__} has no 8-bit optimizer "
            f"for the {device.type} device ({error}).",
            "Use --optimizer-type adamw, or adafactor where memory is short.",
        ) from None
    return make(groups, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate_note(config: TrainConfig) -> str:
    """What is worth saying of `--lr` under this optimizer; empty when nothing is."""
    if config.optimizer_type != "prodigy" or PRODIGY_LR[0] <= config.lr <= PRODIGY_LR[1]:
        return ""
    return (
        f"--lr {config.lr:g}: prodigy finds its step size by itself and multiplies it with --lr, so values around 1.0 "
        "are meant (--lr 1). It is used as typed."
    )


def can_skip_on_device(optimizer: Optimizer) -> bool:
    """Whether `found_inf` makes this optimizer leave a step out without the host looking (torch's fused kernels)."""
    return isinstance(optimizer, AdamW) and bool(optimizer.defaults.get("fused"))


def optimizer_bytes(optimizer_type: str, parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of the optimizer's state for these parameters, by each optimizer's own format.

    adamw: two fp32 moments. adamw8bit: two bytes a value and two fp32 scales per 256 values. adafactor: a row and a
    column. prodigy: four.
    """
    total = 0
    for p in parameters:
        count = p.numel()
        if optimizer_type == "adamw8bit" and count >= SMALL_TENSOR:
            total += 2 * count + 2 * 4 * -(-count // STATE_BLOCK)
        elif optimizer_type == "adafactor" and p.ndim > 1:
            total += 4 * (p.shape[0] + count // p.shape[0])
        else:
            total += 4 * count * {"adafactor": 1, "prodigy": 4}.get(optimizer_type, 2)
    return total


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Warm-up in optimizer steps: what was asked for, at most a tenth of the run."""
    return min(config.warmup_steps, total_steps // 10)


def make_scheduler(config: TrainConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The schedule of `--scheduler-type` over `total_steps` optimizer steps, at its beginning."""
    name = SCHEDULER_NAMES.get(config.scheduler_type, config.scheduler_type)
    of_its_own = {
        "cosine_restarts": {"num_cycles": RESTARTS},
        "warmup_stable_decay": {"num_decay_steps": total_steps // 5},  # Hu et al. 2024, arXiv 2404.06395: 10 to 20 %
    }
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps(config, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=of_its_own.get(config.scheduler_type, {}),
    )
