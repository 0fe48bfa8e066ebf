"""Adapters on the frozen decoder: attach a new one, load a given one, take the trained one off, scale it."""

import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Qwen3Model

from sidestep.adapters.adapter import (
    MERGE_INSTEAD,
    Adapter,
    kind_of,
    lokr_settings,
    most_common,
    scaled,
    shape_of,
)
from sidestep.adapters.layers import KINDS, Targets
from sidestep.adapters.names import (
    ATTENTIONS,
    MLP_PROJECTIONS,
    adaptable_names,
    in_model_order,
    parse_key,
    to_diffusers,
    to_original,
)
from sidestep.adapters.read import read_adapter
from sidestep.errors import JobError, UserError
from sidestep.settings.config import TrainConfig


def spelled(decoder: nn.Module, name: str) -> str:
    """The name of an original's module in memory: the DiT is diffusers', the language model transformers' own."""
    return name if isinstance(decoder, Qwen3Model) else to_diffusers(name)


def target_names(decoder: nn.Module, config: TrainConfig) -> list[str]:
    """Full diffusers names of the modules that the settings select, in model order. Raises UserError for none."""
    wanted: set[tuple[str, str]] = set()
    for attention, own in zip(ATTENTIONS, (config.self_target_modules, config.cross_target_modules), strict=True):
        if config.attention_type in ("both", attention.removesuffix("_attn")):
            wanted |= {(attention, projection) for projection in (config.target_modules if own is None else own)}
    if config.target_mlp:
        wanted |= {("mlp", projection) for projection in MLP_PROJECTIONS}
    names = [spelled(decoder, name) for name in adaptable_names(decoder) if tuple(name.split(".")[2:]) in wanted]
    if not names:
        raise UserError(
            f"The settings select no module to adapt (--attention-type {config.attention_type}, "
            f"--target-modules {' '.join(config.target_modules) or 'none'}).",
            "Name projections, for instance --target-modules q_proj k_proj v_proj o_proj, or add --target-mlp.",
        )
    return names


def check_sizes(config: TrainConfig, sizes: Mapping[str, Any]) -> None:
    """Raises UserError for settings beyond the sizes of a model (a checkpoint's config).

    A rank above the width adds parameters and nothing that they could express. LoKr takes one for "whole matrices",
    OFT has a rule of its own, and the default may stand on a tiny model.
    """
    width, layers = max(int(sizes["hidden_size"]), TrainConfig.rank), int(sizes["num_hidden_layers"])
    if config.adapter_type not in ("lokr", "oft") and config.rank > width:
        raise UserError(
            f"--rank {config.rank}: more than the model's width of {sizes['hidden_size']}, which no module can use.",
            f"Use at most --rank {width}; 16 to 128 are usual.",
        )
    for flag, number in (("--swap-blocks", config.swap_blocks), ("--recompute-layers", config.recompute_layers or 0)):
        if number > layers:
            raise UserError(f"{flag} {number}: the model has {layers} layers.", f"Use at most {flag} {layers}")


def targets_of(decoder: nn.Module, config: TrainConfig, rank_map: Mapping[str, Any] | None = None) -> Targets:
    """The adapted modules with their ranks.

    rank_map: `rank_pattern` {full name: rank} and, if it has one, `alpha_pattern` {full name: alpha}, names of either
    kind. It decides alone which modules are adapted: one that it leaves out, or gives rank 0, gets no adapter. Without
    an alpha a module keeps the scale `config.alpha / config.rank`. Raises UserError for a name that this decoder lacks.
    """
    if rank_map is None:
        return Targets(tuple(target_names(decoder, config)), config.rank, config.alpha, {}, {})
    given = {to_original(name): int(rank) for name, rank in rank_map["rank_pattern"].items() if int(rank) > 0}
    unknown = sorted(set(given) - set(adaptable_names(decoder)))
    if unknown:
        raise UserError(
            f"The rank map names {len(unknown)} modules that this model does not have, such as {unknown[0]}.",
            "It was made for another model: run estimate again for this one, or train without it: --ignore-rank-map",
        )
    if not given:
        raise UserError(
            "The rank map leaves out every module: nothing would be trained.", "Train without it: --ignore-rank-map"
        )
    ranks = {to_diffusers(name): given[name] for name in in_model_order(given)}
    said = {to_diffusers(to_original(name)): float(a) for name, a in (rank_map.get("alpha_pattern") or {}).items()}
    alphas = {name: said.get(name, config.alpha / config.rank * rank) for name, rank in ranks.items()}
    rank, pattern = most_common(ranks)
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return Targets(tuple(ranks), rank, alpha, pattern, {name: a for name, a in alphas.items() if a != alpha})


def attach(decoder: nn.Module, config: TrainConfig, rank_map: Mapping[str, Any] | None = None) -> PeftModel:
    """The decoder with an adapter of `config.adapter_type`: float32 weights on a frozen base, at first the identity.

    rank_map: see `targets_of`. The decoder is changed in place. Raises UserError for settings that do not fit it.
    """
    targets, check = targets_of(decoder, config, rank_map), KINDS[config.adapter_type].check
    if check:
        check(config, {name: decoder.get_submodule(name) for name in targets.names})
    return _with_layers(decoder, config, targets)


def _with_layers(decoder: nn.Module, config: TrainConfig, targets: Targets) -> PeftModel:
    kind = KINDS[config.adapter_type]
    decoder.requires_grad_(False)
    # pyrefly: ignore[bad-argument-type]  # declared for transformers' models, made for any module
    model = get_peft_model(decoder, kind.config(config, targets), autocast_adapter_dtype=True)
    if kind.prepare:
        for module in model.modules():
            kind.prepare(module, config)
    return model


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names, detached but not copied: what a saved run holds."""
    return {
        name: tensor.detach() for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Put tensors of `adapter_state` into a model with the same adapter.

    Raises JobError, with the model untouched, unless names and shapes are exactly those of the model: a tensor that
    finds no module is training that is silently lost.
    """
    own = adapter_state(model)
    for names, what in (
        (set(own) - set(state), "are missing from"),
        (set(state) - set(own), "have no place in the model, of"),
        ({name for name in set(own) & set(state) if own[name].shape != state[name].shape}, "have another shape in"),
    ):
        if names:
            raise JobError(
                f"{len(names)} of {len(own)} adapter tensors {what} the saved adapter, such as {min(names)}.",
                "It was saved with other adapter settings (type, rank, targets, rank map): use those of that run.",
            )
    unexpected = set_peft_model_state_dict(model, dict(state)).unexpected_keys
    if unexpected:
        raise JobError(f"{len(unexpected)} adapter tensors were not loaded, such as {unexpected[0]}.")


@torch.no_grad()
def start_along_gradient(model: PeftModel, directions: Mapping[str, Tensor]) -> int:
    """Set the first rows of every `lora_A` to a module's top right singular vectors; the number of modules set.

    directions: full module name of either kind → [k, in], orthonormal rows, strongest first; `estimate` measured them.
    Rows beyond the k known ones keep their random start. `lora_B` stays zero, so the base stays untouched. The rows
    get the length 1/√3 that peft's random rows have on average, so learning rates carry over. Raises UserError for an
    adapter that is no LoRA.
    """
    known = {to_diffusers(name): rows for name, rows in directions.items()}
    count = 0
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, lora.Linear) and name in known:
            weight: Any = module.lora_A["default"].weight  # pyrefly: ignore[bad-index]  # a ModuleDict
            rows = min(weight.shape[0], known[name].shape[0])
            weight[:rows] = known[name][:rows].to(weight) / math.sqrt(3)
            count += 1
    if not count:
        raise UserError(
            "--init gradient: this adapter has no LoRA module that estimate measured.",
            "Use --adapter-type lora or dora, or --init default.",
        )
    return count


@torch.no_grad()
def adapter_of(model: PeftModel, state: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter of a model with alpha/r folded in; tensors on the CPU.

    state: tensors by the names of `adapter_state`, where they are not the model's own (an average, a snapshot).
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (state or adapter_state(model)).items():
        name, factor = _own_key(key)
        modules.setdefault(name, {})[factor] = tensor.detach().cpu()
    modules = {name: modules[name] for name in in_model_order(modules)}
    kind = str(kind_of(next(iter(modules.values()))))
    layers: dict[str, Any] = {name: _layer(model, name) for name in modules}
    if kind == "oft":
        return Adapter(kind, modules, {name: int(layer.oft_block_size["default"]) for name, layer in layers.items()})
    modules = {name: scaled(factors, layers[name].scaling["default"]) for name, factors in modules.items()}
    return Adapter(kind, modules, {name: int(layer.r["default"]) for name, layer in layers.items()})


def _own_key(key: str) -> tuple[str, str]:
    """`parse_key` of a key of `adapter_state`, which is always one of this model's."""
    parsed = parse_key(key)
    assert parsed, key
    return parsed


def _layer(model: PeftModel, name: str) -> Any:
    """peft's layer on the module of an original name; Any, since its tables (`r`, `scaling`) are no Module's."""
    return model.get_submodule(f"base_model.model.{spelled(model.get_base_model(), name)}")


def settings_of(adapter: Adapter, spelled: Callable[[str], str]) -> tuple[TrainConfig, Targets]:
    """Settings and targets of a run whose layers have exactly the adapter's factors, with alpha = r.

    spelled: original name → the name in the model that the layers are for. Raises UserError where no settings do.
    """
    ranks, config = (
        adapter.ranks,
        TrainConfig(checkpoint_dir=Path(), dataset_dir=Path(), output_dir=Path(), dropout=0.0),
    )
    if adapter.kind == "lokr":
        lokr = lokr_settings(adapter)
        ranks = lokr.ranks
        config = replace(
            config,
            lokr_factor=lokr.factor,
            lokr_decompose_both=lokr.decompose_both,
            lokr_weight_decompose=adapter.has_magnitudes,
        )
    rank, pattern = most_common({spelled(name): r for name, r in ranks.items()})
    if adapter.kind == "oft" and pattern:
        raise UserError("peft's OFT has one block size for all modules; this adapter has several.", MERGE_INSTEAD)
    kind = "dora" if adapter.kind == "lora" and adapter.has_magnitudes else adapter.kind
    names = tuple(spelled(name) for name in adapter.modules)
    return replace(config, adapter_type=kind, rank=rank), Targets(names, rank, rank, pattern, {**pattern})


def load_adapter(decoder: nn.Module, adapter: Adapter, flag: str = "--model-variant") -> PeftModel:
    """The decoder with an adapter from a file, in the trainer's own layers: strength 1 is the trained model.

    The decoder is changed in place. Raises UserError for an adapter of a model of another size. flag: the one that
    chooses the model.
    """
    unmatched = sorted(set(adapter.modules) - set(adaptable_names(decoder)))
    if unmatched:
        raise UserError(
            f"The adapter changes {len(unmatched)} modules that this model does not have, such as {unmatched[0]}.",
            f"It was trained on another model: choose that one with {flag}.",
        )
    model = _with_layers(decoder, *settings_of(adapter, partial(spelled, decoder)))
    state = {}
    for key, own in adapter_state(model).items():
        name, factor = _own_key(key)
        found = adapter.modules[name].get(factor)
        if found is None or found.shape != own.shape:
            raise UserError(
                f"The adapter does not fit this model: {name} needs a {factor} of shape {list(own.shape)}, "
                f"the file has {'nothing' if found is None else list(found.shape)}.",
                f"It was trained on a model of another size: choose that one with {flag}.",
            )
        state[key] = found.float()
    load_adapter_state(model, state)
    return model.eval()


@contextmanager
def adapter_scale(model: PeftModel, strength: float) -> Generator[nn.Module]:
    """The decoder inside `model` with W + strength · (W′ − W) for every adapted weight W.

    0 is the base model bit for bit, 1 the trained one. Anything else asks both layers and goes between, or beyond,
    whatever the kind of adapter.
    """

    def between(layer: BaseTunerLayer, inputs: tuple, output: Tensor) -> Tensor:
        plain = layer.get_base_layer()(*inputs)
        return torch.lerp(plain.float(), output.float(), strength).to(output.dtype)

    decoder = model.get_base_model()
    if strength == 1.0:
        yield decoder
    elif strength == 0.0:
        with model.disable_adapter():
            yield decoder
    else:
        layers = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)]
        hooks = [layer.register_forward_hook(between) for layer in layers]
        try:
            yield decoder
        finally:
            for hook in hooks:
                hook.remove()


def start_from(model: PeftModel, path: Path) -> Adapter:
    """Give a freshly attached adapter the change of the one at `path`, written by any program; returns what was read.

    The scale is converted, so alpha may differ. A LoRA of a lower rank is extended: its change stays, the new ranks
    begin at zero. Modules that the file leaves out begin as the identity. Raises UserError where the two do not fit.
    """
    found, own, where = read_adapter(path), adapter_of(model), f"--init-from {path}"
    if (found.kind, found.has_magnitudes) != (own.kind, own.has_magnitudes):
        kind = {"DoRA": "dora", "weight-decomposed LoKr": "lokr --lokr-weight-decompose"}.get(found.title, found.kind)
        raise UserError(f"{where}: holds a {found.title}, the run trains a {own.title}.", f"Add --adapter-type {kind}")
    unmatched = [name for name in found.modules if name not in own.modules]
    if unmatched:
        raise UserError(
            f"{where}: adapts {len(unmatched)} modules that this run leaves alone, such as {unmatched[0]}; "
            "what it learned there would be lost.",
            "Choose the same targets: --target-modules, --attention-type, --target-mlp, or --ignore-rank-map",
        )
    state = adapter_state(model)
    keys = {parse_key(key): key for key in state}
    for name, factors in found.modules.items():
        if (shape := shape_of(factors)) != (wanted := shape_of(own.modules[name])):
            raise UserError(
                f"{where}: {name} is made for a weight of shape {list(shape)}, this run's has {list(wanted)}.",
                "Choose the model that it was trained on with --model-variant.",
            )
        if found.kind != "oft":
            factors = scaled(factors, 1 / _layer(model, name).scaling["default"])
        for factor, tensor in factors.items():
            key = keys.get((name, factor))
            axis = {"lora_A": 0, "lora_B": 1}.get(factor)
            missing = 0 if key is None or axis is None else state[key].shape[axis] - tensor.shape[axis]
            if key is None or missing < 0 or (axis is None and tensor.shape != state[key].shape):
                raise UserError(f"{where}: {name} is factored otherwise than in this run.", fitting_flags(found))
            tensor = tensor.to(state[key])
            if missing and axis is not None:  # the ranks that a LoRA lacks: rows as they were drawn, columns of zeros
                rest = state[key].narrow(axis, tensor.shape[axis], missing)
                tensor = torch.cat([tensor, rest if axis == 0 else torch.zeros_like(rest)], dim=axis)
            state[key] = tensor
    load_adapter_state(model, state)
    return replace(found, placeholder=None)


def fitting_flags(adapter: Adapter) -> str:
    """What to type for a run whose layers have the adapter's factors. Raises UserError where no settings do."""
    if adapter.kind == "lora":
        return f"Add --rank {max(adapter.ranks.values())}"
    ranks, flags = adapter.ranks, ""
    if adapter.kind == "lokr":
        lokr = lokr_settings(adapter)
        ranks, flags = lokr.ranks, f" --lokr-factor {lokr.factor}" + " --lokr-decompose-both" * lokr.decompose_both
    rank, others = most_common(ranks)
    own = ", with the rank map that it was trained with beside the tensors" if others else ""
    return f"Add --rank {rank}{flags}{own}"
