"""An adapter that was read from a file, on a decoder, at any strength.

Begin a run from an adapter that is already there: `--init-from`.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sidestep.adapters.adapter import MAGNITUDE, Adapter, scaled
from sidestep.adapters.attach import KINDS, adapter_state, load_adapter_state
from sidestep.adapters.lokr import settings_of
from sidestep.adapters.names import parse_key, to_diffusers
from sidestep.adapters.read import read_adapter
from sidestep.adapters.targets import Targets, adaptable_names
from sidestep.adapters.write import adapter_of
from sidestep.errors import UserError
from sidestep.settings.config import TrainConfig


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
        shape = {
            "lokr_factor": lokr.factor,
            "lokr_decompose_both": lokr.decompose_both,
            "lokr_weight_decompose": adapter.has_magnitudes,
        }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {to_diffusers(name): r for name, r in ranks.items() if r != rank}
    targets = Targets(
        tuple(to_diffusers(name) for name in adapter.modules), rank, rank, pattern, dict(pattern)
    )  # alpha = r: the strength is in the factors
    nowhere = Path()
    config = TrainConfig(
        checkpoint_dir=nowhere,
        dataset_dir=nowhere,
        output_dir=nowhere,
        adapter_type=kind,
        rank=rank,
        alpha=rank,
        dropout=0.0,
        **shape,
    )
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


def start_from(model: PeftModel, path: Path) -> Adapter:
    """Give a freshly attached adapter the change of the one at `path`, written by any program; returns what was read.

    The scale is converted, so alpha may differ. A LoRA of a lower rank is extended: its change stays, the new ranks begin at zero.
    Modules that the file leaves out begin as the identity. Raises UserError where the two do not fit.
    """
    found = read_adapter(path)
    own = adapter_of(model)
    where = f"--init-from {path}"
    if (found.kind, found.has_magnitudes) != (own.kind, own.has_magnitudes):
        kinds = {
            "LoRA": "lora",
            "DoRA": "dora",
            "LoKr": "lokr",
            "LoHa": "loha",
            "OFT": "oft",
            "weight-decomposed LoKr": "lokr --lokr-weight-decompose",
        }
        raise UserError(
            f"{where}: holds a {found.title}, the run trains a {own.title}.",
            f"Add --adapter-type {kinds.get(found.title, found.kind)}",
        )
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
                raise UserError(
                    f"{where}: {name} is factored otherwise than in this run.",
                    "Use its --rank, --lokr-factor and --lokr-decompose-both",
                )
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
