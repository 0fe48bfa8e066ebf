"""Where an adapter starts: the ranks that `estimate` gave each module, the directions it measured, or an adapter trained before."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from sidestep import rank_map as maps
from sidestep.acestep.checkpoint import Checkpoint
from sidestep.adapters.gradient_init import start_along_gradient
from sidestep.adapters.start import start_from
from sidestep.config import TrainConfig
from sidestep.errors import UserError
from sidestep.events import Chosen, Notice, Report


def ranks_for(config: TrainConfig, checkpoint: Checkpoint, decoder: torch.nn.Module, dataset: str, report: Report) -> dict[str, dict[str, Any]] | None:
    """Rank and alpha patterns of the map that `estimate` left beside the data; None without one or with `--ignore-rank-map`.

    dataset: fingerprint of the songs. Raises UserError for a map of another model, and under OFT, which has one rank for all modules.
    """
    path = config.dataset_dir / maps.FILE_NAME
    if not path.is_file():
        return None
    if config.ignore_rank_map:
        report(Chosen(what="ranks", value=f"{config.rank} everywhere", reason=f"--ignore-rank-map; {path} is not used"))
        return None
    rank_map = maps.read(path)
    shapes = {name: (module.out_features, module.in_features) for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
    maps.check_fit(rank_map, path, checkpoint.variant.name, shapes)
    for doubt in maps.doubts(rank_map, path, checkpoint.identity(), dataset):
        report(Notice(message=doubt, level="warning"))
    report(Chosen(what="ranks", value="by module", reason=f"{path}: {rank_map.summary()}; --ignore-rank-map turns it off"))
    return rank_map.patterns(config.alpha / config.rank)


def start_of(model: PeftModel, config: TrainConfig, report: Report) -> None:
    """Set where a new adapter starts, if not from its default. Raises UserError."""
    if config.init_from:
        if config.init == "gradient":
            raise UserError("--init gradient and --init-from cannot both be followed.", "Leave one of them away.")
        found = start_from(model, config.init_from)
        report(Notice(message=f"The adapter starts from {config.init_from}, a {found.title} of {len(found.modules)} modules"))
    elif config.init == "gradient":
        path = config.dataset_dir / maps.DIRECTIONS_NAME
        count = start_along_gradient(model, _directions(path, config))
        report(Notice(message=f"lora_A of {count} modules starts along the gradients in {path}"))


def _directions(path: Path, config: TrainConfig) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        problem = f"--init gradient: {path} is not there."
    except (OSError, SafetensorError) as error:
        problem = f"--init gradient: {path} cannot be read ({error})."
    raise UserError(problem, f"Measure first: uv run train.py estimate --dataset-dir {config.dataset_dir} …, or use --init default.")
