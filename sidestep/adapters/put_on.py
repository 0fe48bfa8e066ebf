"""An adapter that was read from a file, on a decoder, at any strength."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sidestep.adapters.adapter import Adapter
from sidestep.adapters.attach import KINDS, adapter_state, load_adapter_state
from sidestep.adapters.keys import parse_key
from sidestep.adapters.lokr_file import settings_of
from sidestep.adapters.names import to_diffusers
from sidestep.adapters.targets import Targets, adaptable_names
from sidestep.config import TrainConfig
from sidestep.errors import UserError


def put_on(decoder: nn.Module, adapter: Adapter) -> PeftModel:
    """The decoder with the adapter, in the trainer's own layers: strength 1 is the trained model. The decoder is changed in place.

    Raises UserError for an adapter of a model of another size.
    """
    strangers = sorted(set(adapter.modules) - set(adaptable_names(decoder)))
    if strangers:
        raise UserError(
            f"The adapter changes {len(strangers)} modules that this model does not have, such as {strangers[0]}.",
            "It was trained on another model: choose that one with --model-variant.",
        )
    kind = "dora" if adapter.kind == "lora" and adapter.has_magnitudes else adapter.kind
    ranks, shape = dict(adapter.ranks), {}
    if kind == "lokr":
        lokr = settings_of(adapter)
        ranks = lokr.ranks
        shape = {"lokr_factor": lokr.factor, "lokr_decompose_both": lokr.decompose_both, "lokr_weight_decompose": adapter.has_magnitudes}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {to_diffusers(name): r for name, r in ranks.items() if r != rank}
    targets = Targets(tuple(to_diffusers(name) for name in adapter.modules), rank, rank, pattern, dict(pattern))  # alpha = r: the strength is in the factors
    nowhere = Path()
    config = TrainConfig(checkpoint_dir=nowhere, dataset_dir=nowhere, output_dir=nowhere, adapter_type=kind, rank=rank, alpha=rank, dropout=0.0, **shape)
    decoder.requires_grad_(False)
    model = get_peft_model(decoder, KINDS[kind].peft_config(config, targets), autocast_adapter_dtype=True)
    KINDS[kind].finish(model, config)
    state = {}
    for key, own in adapter_state(model).items():
        name, factor = parse_key(key)
        found = adapter.modules[name].get(factor)
        if found is None or found.shape != own.shape:
            there = "nothing" if found is None else list(found.shape)
            raise UserError(
                f"The adapter does not fit this model: {name} needs a {factor} of shape {list(own.shape)}, the file has {there}.",
                "It was trained on a model of another size: choose that one with --model-variant.",
            )
        state[key] = found.float()
    load_adapter_state(model, state)
    return model.eval()


@contextmanager
def at_strength(model: PeftModel, strength: float) -> Iterator[nn.Module]:
    """The decoder inside `model` with W + strength · (W′ − W) for every adapted weight W.

    0 is the base model bit for bit, 1 the trained one. Anything else asks both layers and goes between, or beyond, whatever the kind of adapter.
    """
    decoder = model.get_base_model()
    if strength == 1.0:
        yield decoder
    elif strength == 0.0:
        with model.disable_adapter():
            yield decoder
    else:
        layers = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)]
        hooks = [layer.register_forward_hook(partial(_between, strength=strength)) for layer in layers]
        try:
            yield decoder
        finally:
            for hook in hooks:
                hook.remove()


def _between(layer: BaseTunerLayer, inputs: tuple, output: torch.Tensor, strength: float) -> torch.Tensor:
    plain = layer.get_base_layer()(*inputs)
    return torch.lerp(plain.float(), output.float(), strength).to(output.dtype)
